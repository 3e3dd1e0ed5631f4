"""Server-sent events, both directions."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.sse import DONE, DONE_DATA, Decoder, TooLong, encode


def decoded(*chunks: bytes, limit: int = 10_000) -> list[bytes]:
    decoder = Decoder(limit)
    return [event for chunk in chunks for event in decoder.feed(chunk)] + decoder.end()


def sliced(stream: bytes, size: int) -> list[bytes]:
    return [stream[at : at + size] for at in range(0, len(stream), size)]


def test_event_is_framed_as_the_reference_says():
    """`event` equals `type`, then `data`, then an empty line; no `id` (Responses streaming reference, "SSE framing")."""
    event = b'{"type":"response.created","x":1}'
    assert encode(event) == b"event: response.created\ndata: " + event + b"\n\n"


def test_stream_ends_with_done():
    """The last `data` is `[DONE]` (Responses streaming reference, "SSE framing")."""
    assert decoded(DONE) == [DONE_DATA]


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"data: a\n\n", [b"a"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a \n\n", [b" a "]),
        (b"data:\n\n", [b""]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\ndata: b\n\n", [b"a\nb"]),
        (b"data: a\ndata:\ndata: b\n\n", [b"a\n\nb"]),
        (b": keep-alive\n\n: x\ndata: a\n: y\n\n", [b"a"]),
        (b"event: x\nid: 1\nretry: 5\ndata: a\n\n", [b"a"]),
        (b"event: x\n\n\n\ndata: a\n\n", [b"a"]),
        (b"data: a\n\ndata: b", [b"a", b"b"]),
        (b"data: a\n", [b"a"]),
        (b"data: a\r", [b"a"]),
        (b"database: a\n\n", []),
        (b"", []),
    ],
)
def test_stream_is_read_as_the_standard_says(stream, events):
    """Fields, comments, several `data` lines, both line ends (WHATWG HTML, "Server-sent events")."""
    assert decoded(stream) == events
    assert decoded(*[bytes([byte]) for byte in stream]) == events


_data = st.lists(st.binary(max_size=20).map(lambda data: data.translate(None, b"\r\n")), min_size=1, max_size=3)


@given(st.lists(_data, max_size=5), st.sampled_from([b"\n", b"\r\n"]), st.lists(st.integers(0, 400)))
def test_slices_do_not_matter(events, newline, cuts):
    """A network cuts where it likes (WHATWG HTML, "Server-sent events")."""
    stream = b"".join(b"".join(b"data: " + line + newline for line in event) + newline for event in events)
    places = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    chunks = [stream[a:b] for a, b in pairwise(places)]
    assert decoded(*chunks) == [b"\n".join(event) for event in events]


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=9)))
def test_what_we_encode_we_decode(event):
    """One format, both directions, whatever an event holds (Responses streaming reference, "SSE framing")."""
    data = msgspec.json.encode({"type": "x", **event})
    assert decoded(encode(data), DONE) == [data, DONE_DATA]


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize(
    "stream", [b"data: " + b"x" * 200, b"data: x\n" * 101, b"data: " + b"x" * 101 + b"\n\n", b":" + b"x" * 200]
)
def test_event_beyond_the_bound_is_refused(stream, size):
    """Everything has a limit, however the bytes are sliced."""
    with pytest.raises(TooLong, match="100 bytes"):
        decoded(*sliced(stream, size), limit=100)


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_bound_is_an_events_not_the_streams(size):
    """A long stream of small events goes on (WHATWG HTML, "Server-sent events")."""
    stream = (b"data: " + b"x" * 90 + b"\n\n") * 50
    assert len(decoded(*sliced(stream, size), limit=100)) == 50


@pytest.mark.parametrize("behind", [b"data: " + b"x" * 200, b"data: " + b"x" * 95 + b"\n\ndata: b\n\n"])
def test_what_came_before_an_event_beyond_the_bound_is_given_first(behind):
    """However the network slices them; and nothing that comes behind it."""
    decoder = Decoder(100)
    assert decoder.feed(b"data: a\n\n" + behind) == [b"a"]
    for more in (b"\n\n", b"data: c\n\n"):
        with pytest.raises(TooLong):
            decoder.feed(more)
    with pytest.raises(TooLong):
        decoder.end()


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(("spare", "passes"), [(0, True), (-1, False)])
def test_bound_may_be_reached(size, spare, passes):
    """It counts the lines as they come, so that slices do not matter here either."""
    line = b"data: " + b"x" * 94
    if passes:
        assert decoded(*sliced(line + b"\n\n", size), limit=100 + spare) == [b"x" * 94]
    else:
        with pytest.raises(TooLong):
            decoded(*sliced(line + b"\n\n", size), limit=100 + spare)
