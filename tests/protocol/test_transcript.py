"""The one transcript format."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.transcript import BadTranscript, Line, lane_of, read_lines, turns, write_line

_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
_lines = st.builds(
    Line,
    st.floats(0, 1e9, allow_nan=False),
    st.sampled_from([">", "<"]),
    st.dictionaries(st.text(), _json, max_size=4),
)


def to_server(event_type="response.create", **fields):
    return Line(0.0, ">", {"type": event_type, **fields})


def from_server(event_type, **fields):
    return Line(0.0, "<", {"type": event_type, **fields})


@given(st.lists(_lines))
def test_what_is_written_is_read(lines):
    """Any frame survives, with any character in it."""
    assert read_lines("\n".join(map(write_line, lines))) == lines


@pytest.mark.parametrize("character", ["\u2028", "\u0085", "\x0b", "\x0c", "\x1c", "\r"])
def test_only_a_newline_ends_a_line(character):
    """JSON strings may hold what Python takes for line breaks (RFC 8259 §7)."""
    line = Line(0.5, ">", {"text": f"a{character}b"})
    assert read_lines(write_line(line) + "\r\n\n \n" + write_line(line)) == [line, line]


def test_line_reads_aloud():
    """Seconds, direction, frame: in this order."""
    assert write_line(Line(1.5, "<", {"type": "x"})) == '{"t":1.5,"dir":"<","frame":{"type":"x"}}'


@pytest.mark.parametrize(
    "bad",
    [
        "nope",
        "[]",
        '{"t":0,"dir":"<"}',
        '{"t":"0","dir":"<","frame":{}}',
        '{"t":0,"dir":"=","frame":{}}',
        '{"t":0,"dir":"<","frame":[]}',
    ],
)
def test_bad_line_is_named(bad):
    """A fixture is edited by hand: the message says where to look."""
    good = write_line(to_server())
    with pytest.raises(BadTranscript, match=r"^Line 3 is not a transcript line"):
        read_lines(f"{good}\n\n{bad}\n{good}")


@pytest.mark.parametrize("end", ["response.completed", "response.incomplete", "response.failed", "error"])
def test_turn_ends_with_its_terminal_event_or_error(end):
    """One create, one end (WebSocket mode guide, "Turn lifecycle")."""
    lines = [to_server(model="a"), from_server("response.created"), from_server(end), from_server("stray")]
    (turn,) = turns([*lines])
    assert (turn.create["model"], [line.frame["type"] for line in turn.events]) == ("a", ["response.created", end])


def test_turns_come_in_order():
    """Creates sent before the last turn ended are answered first in, first out (WebSocket mode guide, "stream_id")."""
    one, two = to_server(model="1"), to_server(model="2")
    done = [from_server("response.completed", of="1"), from_server("response.completed", of="2")]
    for lines in ([one, done[0], two, done[1]], [one, two, *done]):
        assert [(turn.create["model"], turn.events[-1].frame["of"]) for turn in turns(lines)] == [
            ("1", "1"),
            ("2", "2"),
        ]


def test_lanes_keep_their_turns_apart():
    """Turns of different lanes run at once, and each has the events of its own lane (WebSocket mode guide, "stream_id")."""
    lines = [
        to_server(model="1"),
        to_server(model="a1", stream_id="a"),
        to_server(model="a2", stream_id="a"),
        from_server("response.created", stream_id="a"),
        from_server("response.created"),
        from_server("error", stream_id="a"),
        from_server("response.completed"),
        from_server("response.completed", stream_id="a"),
    ]
    assert [(turn.create["model"], turn.events) for turn in turns(lines)] == [
        ("a1", [lines[3], lines[5]]),
        ("1", [lines[4], lines[6]]),
        ("a2", [lines[7]]),
    ]


def test_events_of_a_lane_that_asked_nothing_are_no_turn():
    """Where a lane's name is wrong or missing, nothing is answered (WebSocket mode guide, "Server events")."""
    assert list(turns([to_server(stream_id="a"), from_server("error"), from_server("error", stream_id="b")])) == []


@pytest.mark.parametrize("stream_id", [None, 5, ["a"]])
def test_what_is_no_name_is_the_default_lane(stream_id):
    """A file is edited by hand: nothing in a frame may break its reading."""
    assert lane_of({"stream_id": stream_id}) is None
    assert len(list(turns([to_server(stream_id=stream_id), from_server("error")]))) == 1


def response(number, after=None):
    return {"id": f"resp_{number}", "previous_response_id": after and f"resp_{after}"}


def turn_events(number, after=None):
    """A whole response."""
    return [from_server(f"response.{kind}", response=response(number, after)) for kind in ("created", "completed")]


def of_steer(what, number):
    return from_server(f"response.steer.{what}", steer={"previous_response_id": f"resp_{number}"})


def successors_create(**fields):
    """What a turn without a create of its own is taken for."""
    return {"type": "response.create", "previous_response_id": "resp_1", "input": None, **fields}


def test_successor_that_started_by_itself_is_a_turn():
    """It has the settings of the response that it continues, on whose lane it is, and no input of its own.

    Source: Mid-turn steering guide, "Outcomes".
    """
    lines = [to_server(model="m", input="x"), *turn_events(1), *turn_events(2, after=1), *turn_events(3, after=2)]
    first, second, third = turns(lines)
    assert (second.create, second.events) == (successors_create(model="m"), lines[3:5])
    assert (third.create["previous_response_id"], third.events) == ("resp_2", lines[5:7])
    assert [turn.response_id for turn in (first, second, third)] == ["resp_1", "resp_2", "resp_3"]
    assert len(list(turns([*lines[:3], from_server("response.created", response=response(2, 1), stream_id="b")]))) == 1


def test_successor_goes_before_a_create_that_waits():
    """Unless that create continues the steered response itself (Mid-turn steering guide, "Outcomes")."""
    first, waiting = to_server(n=1), to_server(n=2, previous_response_id="resp_0")
    lines = [first, waiting, *turn_events(1), *turn_events(2, after=1), *turn_events(3, after=0)]
    assert [turn.create for turn in turns(lines)] == [first.frame, successors_create(n=1), waiting.frame]
    following = to_server(n=2, previous_response_id="resp_1")
    lines = [first, following, *turn_events(1), *turn_events(2, after=1)]
    assert [turn.create for turn in turns(lines)] == [first.frame, following.frame]


def test_what_becomes_of_a_steer_belongs_to_the_response_while_it_runs():
    """Behind the end, or about a response that nobody knows, it belongs to no turn (Mid-turn steering guide, "Outcomes")."""
    (created, completed), others = turn_events(1), [of_steer("failed", 7), from_server("response.steer.failed")]
    accepted, pending = of_steer("accepted", 1), of_steer("pending", 1)
    create = to_server(previous_response_id="resp_1")
    lines = [of_steer("failed", 1), to_server(), of_steer("failed", 1), created, *others, accepted, completed]
    lines += [pending, create, of_steer("failed", 1), *turn_events(2, after=1)]
    first, second = turns(lines)
    assert first.events == [created, accepted, completed]
    assert (second.create, second.events) == (create.frame, lines[-2:])


@pytest.mark.parametrize("broken", [None, 5, "resp_1", {"id": ["x"], "previous_response_id": {}}])
def test_response_of_no_shape_breaks_nothing(broken):
    """A file is edited by hand: what cannot be read continues nothing."""
    lines = [to_server(), *[from_server(kind, response=broken, steer=broken) for kind in ("response.steer.x", "error")]]
    (turn,) = turns([*lines, *lines[1:]])
    assert turn.events == [lines[2]]


def keyed(number=None, **fields):
    return to_server(idempotency_key="k", **({} if number is None else {"starting_after": number}), **fields)


def events(*numbers, end=None):
    last = [from_server("response.completed", sequence_number=end)] if end is not None else []
    return [*(from_server("response.x", sequence_number=number) for number in numbers), *last]


RECONNECTED = to_server("openline.reconnect")


def test_turn_that_was_cut_and_read_on_is_one():
    """Under its key, on whichever connection and lane; what comes again is there once (docs/adr/0009)."""
    before, after = events(0, 1), events(2, end=3)
    lines = [keyed(), *before, RECONNECTED, keyed(0), *events(1), *after]
    (turn,) = turns(lines)
    assert (turn.create, turn.events) == (lines[0].frame, [*before, *after])
    on_two_lanes = [keyed(), keyed(stream_id="a"), *before]
    on_two_lanes += [Line(0.0, "<", {**line.frame, "stream_id": "a"}) for line in (*before, *after)]
    (turn,) = turns([*on_two_lanes, *after])
    assert [line.frame["sequence_number"] for line in turn.events] == [0, 1, 2, 3]


def test_turn_that_is_read_again_is_no_other():
    """Its create was answered before; one that is refused is a turn of its own (docs/adr/0009)."""
    whole = events(0, 1, end=2)
    lines = [keyed(), *whole, keyed(), *whole, keyed(model="other"), from_server("error"), keyed(1), *whole[2:]]
    first, refused = turns(lines)
    assert (first.events, refused.create) == (whole, keyed(model="other").frame)
    assert list(turns([*lines, to_server(), *events(0, end=1)]))[-1].events == events(0, end=1)


def test_turn_without_a_key_ends_with_its_connection():
    """Nothing goes on behind it: what was asked or ran is no turn any more."""
    lines = [to_server(n=1), to_server(n=2), *events(0), RECONNECTED, to_server(n=3), *events(0, end=1)]
    assert [turn.create["n"] for turn in turns(lines)] == [3]


def test_unfinished_turn_is_none():
    """What was cut before its end is no turn; acknowledgements are none either."""
    assert list(turns([to_server("response.processed"), to_server(), from_server("response.created")])) == []
