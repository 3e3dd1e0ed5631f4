"""A client that goes: its turn stops within a second, and nothing of it is left running."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import closing

import pytest

from openline.protocol.deltas import TextDelta
from server.running import until

STOP_SECONDS_MAX = 1.0  # guarantees, "Cancellation"


@pytest.fixture
async def begun(start, hand):
    """A server, and a turn of it that has begun to speak."""
    return await start(engine=hand)


async def stopped(server, turn):
    """The engine's generator is closed in time, and no turn is left."""
    async with asyncio.timeout(STOP_SECONDS_MAX):
        await turn.closed.wait()
        await until(lambda: len(server.registry) == 0)


async def kept(server):
    """The one response in the database, as it was kept."""
    await until(lambda: len(server.registry) == 0)
    with closing(sqlite3.connect(server.database)) as connection:
        ((body,),) = connection.execute("SELECT response FROM turns").fetchall()
    return json.loads(body)


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_closed_websocket_stops_its_turns(begun, hand, how):
    """Closing the socket, properly or not, stops the generation of all its lanes.

    Source: WebSocket mode guide, "Cancelling": always stop generation when the socket closes.
    """
    async with begun.connect() as socket:
        turns = []
        for lane in ("a", "b"):
            await socket.create(stream_id=lane)
            turns.append(await hand.next_turn())
            turns[-1].give(TextDelta("Once upon"))
            await socket.until("response.output_text.delta")
        if how == "abort":
            socket.connection.transport.abort()
        else:
            await socket.connection.close()
        for turn in turns:
            await stopped(begun, turn)


async def test_a_queued_create_never_starts_once_its_socket_is_closed(begun, hand):
    """What waits behind the running turn goes with the connection."""
    async with begun.connect() as socket:
        await socket.create(input="Running.")
        turn = await hand.next_turn()
        await socket.create(input="Waiting.")
        assert await socket.is_silent()
    await stopped(begun, turn)
    assert hand.is_idle


@pytest.mark.parametrize("stream", [True, False], ids=["sse", "json"])
async def test_a_gone_http_client_stops_its_turn(begun, hand, stream):
    """An HTTP client that goes before its answer is whole stops the generation, streamed or not.

    Source: event order, "Cancelled turn".
    """
    posting = asyncio.ensure_future(begun.post(stream=stream))
    turn = await hand.next_turn()
    turn.give(TextDelta("Once upon"))
    await until(lambda: turn.taken == 1)
    posting.cancel()
    await stopped(begun, turn)


@pytest.mark.parametrize("transport", ["websocket", "sse", "json"])
async def test_a_gone_client_stops_a_turn_that_its_upstream_has_not_accepted(begun, hand, transport):
    """The same while the upstream is still silent."""
    if transport == "websocket":
        async with begun.connect() as socket:
            await socket.create()
            turn = await hand.next_turn()
    else:
        posting = asyncio.ensure_future(begun.post(stream=transport == "sse"))
        turn = await hand.next_turn()
        posting.cancel()
    await stopped(begun, turn)


async def test_a_cancelled_stored_response_is_kept_as_far_as_it_came(begun, hand):
    """A stored response whose client went is kept as incomplete, reason `cancelled`, with its open item closed.

    Source: event order, "Cancelled turn".
    """
    async with begun.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.give(TextDelta("Once upon"))
        await socket.until("response.output_text.delta")
    await stopped(begun, turn)
    response = await kept(begun)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "cancelled"})
    assert response["completed_at"] is None
    (item,) = response["output"]
    assert (item["status"], item["content"][0]["text"]) == ("incomplete", "Once upon")
    assert (await begun.get(f"/v1/responses/{response['id']}")).json == response


async def test_a_cancelled_unstored_response_leaves_nothing(begun, hand):
    """`store: false` holds for a cut turn too."""
    async with begun.connect() as socket:
        await socket.create(store=False, input="canary-9d2e")
        turn = await hand.next_turn()
        turn.give(TextDelta("canary-5c1b"))
        await socket.until("response.output_text.delta")
    await stopped(begun, turn)
    assert b"canary" not in begun.files()


async def test_other_connections_go_on(begun, hand):
    """One client's going stops its own turn only."""
    async with begun.connect() as stays:
        await stays.create(input="Staying.")
        staying = await hand.next_turn()
        async with begun.connect() as goes:
            await goes.create(input="Going.")
            going = await hand.next_turn()
        await asyncio.wait_for(going.closed.wait(), STOP_SECONDS_MAX)
        staying.answer("Still here.")
        assert (await stays.rest())[-1]["type"] == "response.completed"


@pytest.mark.parametrize("how", ["abort", "oversize"])
@pytest.mark.parametrize("what", ["refusal", "text"])
async def test_a_peer_may_go_at_any_moment(start, hand, how, what):
    """Whatever the server is about to write when the peer goes, the turn stops, and the log has no traceback."""
    server = await start(engine=hand, limits={"message_bytes_max": 2000})
    for moment in range(16):  # steps of the event loop between the going and the writing
        async with server.connect() as socket:
            await socket.create()
            turn = await hand.next_turn()
            await socket.connection.send("{")  # an error that is to be written at once
            await socket.create(stream_id="side", temperature="hot")
            if how == "abort":
                socket.connection.transport.abort()
            else:
                await socket.connection.send("x" * 3000)
            for _ in range(moment):
                await asyncio.sleep(0)
            if what == "refusal":
                turn.refuse()
            else:
                for _ in range(30):
                    turn.give(TextDelta("word "))
            await asyncio.wait_for(turn.closed.wait(), STOP_SECONDS_MAX)
    await server.idle()


async def test_stopping_the_server_ends_and_keeps_its_turns(start, hand):
    """`Registry.close` stops every turn and returns when each has ended and been kept."""
    server = await start(engine=hand)
    async with server.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.give(TextDelta("Once upon"))
        await socket.until("response.output_text.delta")
        started = time.monotonic()
        await server.registry.close()
        assert time.monotonic() - started < STOP_SECONDS_MAX
        last = (await socket.rest())[-1]
        assert (last["type"], last["response"]["incomplete_details"]) == (
            "response.incomplete",
            {"reason": "cancelled"},
        )
    assert turn.closed.is_set()
    assert (await kept(server))["status"] == "incomplete"
