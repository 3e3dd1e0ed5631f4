"""WebSocket mode as a client meets it: framing, errors, order, lanes."""

from __future__ import annotations

import asyncio
import json

import pytest
from websockets.exceptions import ConnectionClosedError

from openline.protocol.deltas import TextDelta


async def test_nothing_is_sent_before_the_first_frame(server):
    """No greeting: the server is silent until the client has spoken.

    Source: WebSocket mode guide, "Framing".
    """
    async with server.connect() as socket:
        assert await socket.is_silent()


async def test_nothing_follows_the_terminal_event(server):
    """The terminal event is the last: no `[DONE]`, no `error` behind it.

    Source: WebSocket mode guide, "Framing".
    """
    async with server.connect() as socket:
        await socket.completed()
        assert await socket.is_silent()


async def test_a_queued_create_is_answered_by_nothing_until_it_starts(played, hand):
    """A second create waits for the first one's terminal event, and no event tells of its waiting.

    Source: WebSocket mode guide, "Turn lifecycle".
    """
    async with played.connect() as socket:
        await socket.create(input="First.")
        await socket.create(input="Second.")
        first = await hand.next_turn()
        first.accept()
        await socket.until("response.in_progress")
        assert await socket.is_silent()
        assert hand.is_idle
        first.answer("One.")
        assert (await socket.rest())[-1]["type"] == "response.completed"
        (await hand.next_turn()).answer("Two.")
        events = await socket.rest()
        assert events[0]["type"] == "response.created"
        assert events[-1]["response"]["output"][0]["content"][0]["text"] == "Two."


async def test_error_frame_has_status_and_headers_in_both_places(played, hand):
    """`status` is always there, and headers stand at the top level for Codex and in `error` for the SDKs.

    Source: WebSocket mode guide, "Error frame".
    """
    async with played.connect() as socket:
        await socket.create()
        (await hand.next_turn()).refuse(headers={"retry-after": "7"})
        frame = await socket.receive()
    assert frame == {
        "type": "error",
        "status": 429,
        "headers": {"retry-after": "7"},
        "error": {
            "message": "Not now.",
            "type": "rate_limit_error",
            "param": None,
            "code": "rate_limit_exceeded",
            "headers": {"retry-after": "7"},
        },
    }


async def test_error_of_a_named_lane_names_it(played, hand):
    """A request-scoped error carries its create's `stream_id`.

    Source: WebSocket mode guide, "Server events".
    """
    async with played.connect() as socket:
        await socket.create(stream_id="side")
        (await hand.next_turn()).refuse()
        assert (await socket.receive())["stream_id"] == "side"


async def test_every_event_of_a_named_lane_names_it(server):
    """`stream_id` is on every event of its lane, and on none of the default lane.

    Source: WebSocket mode guide, "Server events".
    """
    async with server.connect() as socket:
        assert {frame.get("stream_id") for frame in await socket.turn(stream_id="side.1")} == {"side.1"}
        assert not any("stream_id" in frame for frame in await socket.turn())


async def test_a_pipelined_bad_create_does_not_end_the_running_turn(played, hand):
    """Clients take any `error` on a lane as the end of its turn, so a refusal waits until that turn has ended.

    Source: WebSocket mode guide, "Turn lifecycle".
    """
    async with played.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.accept()
        await socket.until("response.in_progress")
        await socket.create(temperature="hot")
        assert await socket.is_silent()
        turn.answer("Still here.")
        assert (await socket.rest())[-1]["type"] == "response.completed"
        assert (await socket.receive())["error"]["param"] == "temperature"
        assert await socket.is_silent()


async def test_a_refused_create_does_not_hold_up_its_lane(played, hand):
    """A create behind a refused one runs as soon as the refusal was written."""
    async with played.connect() as socket:
        await socket.create(temperature="hot")
        await socket.create(input="Now.")
        assert (await socket.receive())["type"] == "error"
        (await hand.next_turn()).answer("Yes.")
        assert (await socket.rest())[-1]["type"] == "response.completed"


async def test_broken_json_is_answered_at_once_while_a_turn_runs(played, hand):
    """A message that names no lane gets its error at once, and the running turn goes on.

    Source: WebSocket mode guide, "stream_id", order of checks.
    """
    async with played.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.accept()
        await socket.until("response.in_progress")
        await socket.connection.send("{")
        assert (await socket.receive())["error"]["code"] == "invalid_json"
        turn.answer("Still here.")
        assert (await socket.rest())[-1]["type"] == "response.completed"


async def test_a_binary_message_is_read_as_utf8(server):
    """JSON in a binary message is taken as if it were text; the answer is text.

    Source: WebSocket mode guide, "Framing".
    """
    create = {"type": "response.create", "model": "scripted-text", "input": "Grüße"}
    async with server.connect() as socket:
        await socket.connection.send(json.dumps(create, ensure_ascii=False).encode())
        assert (await socket.rest())[-1]["type"] == "response.completed"


async def test_processed_is_answered_by_nothing(server):
    """Codex acknowledges a response with `response.processed`; nothing answers it.

    Source: WebSocket mode guide, "Client events".
    """
    async with server.connect() as socket:
        await socket.send(type="response.processed", response_id="resp_1")
        assert await socket.is_silent()
        await socket.completed()


async def test_sixteen_lanes_run_at_once_and_the_next_one_waits(played, hand):
    """Sixteen responses run at once on a connection; a seventeenth is silent until one of them has ended.

    Source: WebSocket mode guide, "stream_id", "Limits".
    """
    async with played.connect() as socket:
        turns = []
        for lane in range(16):
            await socket.create(stream_id=f"lane-{lane}")
            turns.append(await hand.next_turn())
            turns[-1].accept()
            assert (await socket.until("response.in_progress"))[0]["stream_id"] == f"lane-{lane}"
        await socket.create(stream_id="lane-16")
        assert await socket.is_silent()
        assert hand.is_idle
        turns[3].answer("Done.")
        assert (await socket.rest())[-1]["stream_id"] == "lane-3"
        (await hand.next_turn()).answer("My turn.")
        assert {frame["stream_id"] for frame in await socket.rest()} == {"lane-16"}
        assert len(played.registry) == 15


async def test_lanes_interleave_and_each_keeps_its_own_order(played, hand):
    """Events of two lanes may interleave; each lane's numbers run from 0 without a gap.

    Source: WebSocket mode guide, "Server events".
    """
    async with played.connect() as socket:
        turns = []
        for lane in ("a", "b"):
            await socket.create(stream_id=lane)
            turns.append(await hand.next_turn())
        for turn in (*turns, *turns, *turns):
            turn.give(TextDelta("word "))
        for turn in turns:
            turn.finish()
        frames = await socket.rest() + await socket.rest()
        for lane in ("a", "b"):
            own = [frame for frame in frames if frame["stream_id"] == lane]
            assert [frame["sequence_number"] for frame in own] == list(range(len(own)))
            assert own[-1]["response"]["output"][0]["content"][0]["text"] == "word word word "


async def test_the_lane_limit_refuses_one_name_and_leaves_the_socket_usable(start):
    """One lane name too many is refused with that name; the other lanes go on.

    Source: WebSocket mode guide, "stream_id", "Limits".
    """
    server = await start(limits={"lanes_named_max": 2})
    async with server.connect() as socket:
        await socket.completed(stream_id="one")
        await socket.completed(stream_id="two")
        frame = await socket.refused(stream_id="three")
        assert (frame["error"]["code"], frame["error"]["param"]) == ("websocket_stream_limit_reached", "stream_id")
        assert frame["stream_id"] == "three"
        await socket.completed(stream_id="two")
        await socket.completed()


async def test_a_full_queue_is_answered_at_once(start, hand):
    """More creates than may wait: `server_is_overloaded` with `retry-after`, at once; those that wait are kept."""
    server = await start(engine=hand, limits={"creates_queued_max": 1})
    async with server.connect() as socket:
        await socket.create(input="Running.")
        running = await hand.next_turn()
        await socket.create(input="Waiting.")
        await socket.create(input="One too many.")
        frame = await socket.receive()
        assert (frame["status"], frame["error"]["code"]) == (503, "server_is_overloaded")
        assert frame["headers"] == {"retry-after": "1"}
        running.answer("One.")
        await socket.rest()
        (await hand.next_turn()).answer("Two.")
        assert (await socket.rest())[-1]["type"] == "response.completed"


async def test_a_message_above_the_limit_closes_the_socket_with_1009(start):
    """A message larger than `message_bytes_max` closes the connection with 1009; one of that size is read.

    Source: WebSocket mode guide, "Framing".
    """
    server = await start(limits={"message_bytes_max": 2000})
    async with server.connect() as socket:
        frame = {"type": "response.create", "model": "scripted-text", "input": ""}
        padding = "x" * (2000 - len(json.dumps(frame)))
        await socket.connection.send(json.dumps(frame | {"input": padding}))
        assert (await socket.rest())[-1]["type"] == "response.completed"
        await socket.connection.send(json.dumps(frame | {"input": padding + "x"}))
        with pytest.raises(ConnectionClosedError) as closed:
            await asyncio.wait_for(socket.connection.recv(), 5)
    assert closed.value.rcvd is not None
    assert closed.value.rcvd.code == 1009


async def test_an_oversize_message_cancels_the_running_turn_quietly(start, hand):
    """A connection that is closed for its own fault ends its turn, and no traceback tells of it."""
    server = await start(engine=hand, limits={"message_bytes_max": 2000})
    async with server.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.accept()
        await socket.until("response.in_progress")
        await socket.connection.send("x" * 3000)
        for _ in range(5):
            turn.give(TextDelta("word "))
        await asyncio.wait_for(turn.closed.wait(), 1)
    await server.idle()
