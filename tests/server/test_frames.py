"""Several events in one write: what a client reads is what it would read of each alone.

Source: RFC 6455 §5.2, "Base Framing Protocol"; RFC 7692, "permessage-deflate".
"""

from __future__ import annotations

import json

import pytest
from websockets.client import ClientProtocol
from websockets.frames import Opcode
from websockets.protocol import State
from websockets.uri import parse_uri

from openline.protocol.deltas import TextDelta
from openline.server.frames import text_frame


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 100_000])
def test_a_frame_of_any_size_reads_back_as_one_text_message(size):
    """Each of the three forms of a length, at its edges, as a library that is not ours reads it."""
    client = ClientProtocol(parse_uri("ws://x/"), state=State.OPEN, max_size=None)
    payload = b"x" * size
    client.receive_data(text_frame(payload) + text_frame(b"{}"))
    first, second = client.events_received()
    assert (first.opcode, first.fin, bytes(first.data)) == (Opcode.TEXT, True, payload)
    assert bytes(second.data) == b"{}"


@pytest.mark.parametrize("deflate", [False, True])
async def test_a_batch_reaches_the_client_whole_and_in_order(start, hand, deflate):
    """Events that came together go out together, compressed where that was agreed, and none is lost or moved."""
    server = await start(engine=hand, server={"deflate": deflate})
    texts = [f"piece {number} “ü”" * (1 + number * 40) for number in range(100)]
    async with server.connect(offer_deflate=True) as line:
        extensions = line.connection.response.headers.get("Sec-WebSocket-Extensions", "")
        assert ("permessage-deflate" in extensions) is deflate
        for stream_id in (None, "lane"):
            lane = {} if stream_id is None else {"stream_id": stream_id}
            await line.create(model="m", **lane)
            turn = await hand.next_turn()
            turn.accept()
            turn.finish(*(TextDelta(text) for text in texts))
            events = await line.rest()
            assert [event["delta"] for event in events if event["type"] == "response.output_text.delta"] == texts
            assert [event["sequence_number"] for event in events] == list(range(len(events)))
            assert {event.get("stream_id") for event in events} == {stream_id}
            assert json.dumps(events[-1]["response"]["output"][0]["content"][0]["text"]) == json.dumps("".join(texts))
