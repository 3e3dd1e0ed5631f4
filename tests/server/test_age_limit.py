"""A connection has an age at which it starts nothing any more, lets what runs end, says why, and closes.

Source: WebSocket mode guide, "Connection life" and "Error frame"; guarantees, "The age limit".
"""

from __future__ import annotations

import asyncio
import time

import pytest

from openline.protocol.deltas import CallDelta, CallStarted, TextDelta
from openline.server import frames, websocket
from server.closing import GOING_AWAY, Leftovers, blocked_client, told, until_closed
from server.hand import HandTurn
from server.running import until

AGE_SECONDS = 0.24
GRACE_SECONDS = 0.15
LIMIT_REACHED = "websocket_connection_limit_reached"
LIMIT_FRAME = {
    "type": "error",
    "status": 400,
    "error": {
        "message": "Responses websocket connection limit reached (0.004 minutes). "
        "Create a new websocket connection to continue.",
        "type": "invalid_request_error",
        "param": None,
        "code": LIMIT_REACHED,
    },
}
LIMITS = {"connection_seconds_max": AGE_SECONDS, "age_grace_seconds_max": GRACE_SECONDS}


@pytest.fixture
async def aging(start, hand):
    """A server whose connections are old soon, and may take their time then."""
    return await start(engine=hand, limits={**LIMITS, "age_grace_seconds_max": 5.0})


async def retired(server):
    """Wait until the oldest connection has reached its age; nothing is sent that would tell."""
    (connection,) = server.app._sockets
    await until(lambda: connection._retiring)


def test_the_text_names_the_limit_in_minutes():
    """Clients match the service's own words, with the minutes that are configured.

    Source: WebSocket mode guide, "Error frame".
    """
    message = websocket._too_old(3600.0).message
    limit = "Responses websocket connection limit reached (60 minutes)."
    assert message == f"{limit} Create a new websocket connection to continue."
    assert "(25 minutes)" in websocket._too_old(1500.0).message


async def test_an_idle_socket_gets_one_error_without_a_lane_and_then_1001(aging):
    """Before that nothing at all, and nothing after; a new connection works at once."""
    async with aging.connect() as socket:
        started = time.monotonic()
        assert await until_closed(socket) == ([LIMIT_FRAME], GOING_AWAY)
        assert time.monotonic() - started >= AGE_SECONDS * 0.9
    async with aging.connect() as socket:
        assert await socket.is_silent()


async def test_an_idle_socket_that_has_named_lanes_gets_one_error_too(aging, hand):
    """One connection, one error, however many lanes it has used."""
    async with aging.connect() as socket:
        for lane in ("a", "b"):
            await socket.create(stream_id=lane)
            (await hand.next_turn()).answer("Yes.")
            await socket.rest()
        assert await until_closed(socket) == ([LIMIT_FRAME], GOING_AWAY)


async def test_running_turns_end_before_the_error(aging, hand):
    """SDKs take an `error` as the end of the running turn, so it must not come earlier."""
    async with aging.connect() as socket:
        turns = {}
        for lane in ("a", "b"):
            await socket.create(stream_id=lane)
            turns[lane] = await hand.next_turn()
            turns[lane].give(TextDelta("Once "))
        await retired(aging)
        for lane in ("b", "a"):
            turns[lane].finish(TextDelta("upon a time."))
        frames, code = await until_closed(socket)
    ends = [frame for frame in frames if frame["type"] == "response.completed"]
    assert {frame["stream_id"]: frame["response"]["output"][0]["content"][0]["text"] for frame in ends} == {
        "a": "Once upon a time.",
        "b": "Once upon a time.",
    }
    assert (frames[-1], code) == (LIMIT_FRAME, GOING_AWAY)
    assert [frame for frame in frames if frame["type"] == "error"] == [LIMIT_FRAME]


async def test_a_new_connection_works_while_the_old_one_still_ends(aging, hand):
    """A client rotates before its last turn has ended."""
    async with aging.connect() as old:
        await old.create()
        turn = await hand.next_turn()
        await retired(aging)
        async with aging.connect() as new:
            await new.create()
            (await hand.next_turn()).answer("Hello.")
            assert (await new.rest())[-1]["type"] == "response.completed"
        turn.answer("Goodbye.")
        assert told((await until_closed(old))[0]) == [(None, "response.completed"), (None, LIMIT_REACHED)]


@pytest.mark.parametrize("accepted", [True, False], ids=["in mid-text", "before the upstream accepts"])
async def test_a_turn_that_outlasts_the_grace_is_cancelled_with_its_terminal_event(start, hand, accepted):
    """It keeps what it has said; then the error, then 1001, and all within the grace."""
    server = await start(engine=hand, limits={**LIMITS, "created_wait_seconds_max": 5.0})
    async with server.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        if accepted:
            turn.give(TextDelta("Once upon"))
        started = time.monotonic()
        frames, code = await until_closed(socket)
        assert time.monotonic() - started < AGE_SECONDS + GRACE_SECONDS + 1
    if accepted:
        (end,) = (frame["response"] for frame in frames if frame["type"] == "response.incomplete")
        assert end["incomplete_details"] == {"reason": "cancelled"}
        assert end["output"][0]["content"][0]["text"] == "Once upon"
    else:
        assert len(told(frames[:-1])) == 1
    assert (frames[-1], code) == (LIMIT_FRAME, GOING_AWAY)
    assert turn.closed.is_set()


async def test_what_waits_and_what_still_comes_is_refused_in_its_lanes_order(aging, hand):
    """An error on a lane never stands before the running turn's terminal event; a free lane's comes at once."""
    async with aging.connect() as socket:
        await socket.create(stream_id="busy")
        turn = await hand.next_turn()
        await socket.create(stream_id="busy")  # waits
        turn.accept()
        assert told(await socket.until("response.in_progress")) == []
        await retired(aging)
        await socket.create(stream_id="busy")  # comes later
        await socket.create(stream_id="free")
        await socket.create()
        assert told([await socket.receive(), await socket.receive()]) == [
            ("free", LIMIT_REACHED),
            (None, LIMIT_REACHED),
        ]
        assert await socket.is_silent()
        turn.answer("Done.")
        frames, code = await until_closed(socket)
    assert told(frames) == [
        ("busy", "response.completed"),
        ("busy", LIMIT_REACHED),
        ("busy", LIMIT_REACHED),
        (None, LIMIT_REACHED),
    ]
    assert (frames[-1], code) == (LIMIT_FRAME, GOING_AWAY)
    assert hand.is_idle


async def test_a_turn_that_is_refused_for_itself_keeps_its_own_error(aging, hand):
    """A create that is wrong in itself says so at the age limit too."""
    async with aging.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        await socket.create(temperature="hot")
        await retired(aging)
        turn.answer("Done.")
        frames, _ = await until_closed(socket)
    assert told(frames) == [(None, "response.completed"), (None, "invalid_type"), (None, LIMIT_REACHED)]


async def test_a_turn_may_be_cancelled_in_the_grace(aging, hand):
    """The client need not wait for it."""
    async with aging.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.give(TextDelta("Once upon"))
        await retired(aging)
        await socket.send(type="response.cancel")
        frames, code = await until_closed(socket)
    assert told(frames) == [(None, "response.incomplete"), (None, LIMIT_REACHED)]
    assert code == GOING_AWAY


async def test_a_warm_ups_prefill_does_not_hold_the_connection(start, hand, monkeypatch):
    """The warm-up has ended; nobody will continue it here."""
    monkeypatch.setattr(HandTurn, "prefills", True)
    server = await start(engine=hand, limits={**LIMITS, "age_grace_seconds_max": 5.0})
    async with server.connect() as socket:
        await socket.completed(generate=False)
        prefill = await hand.next_turn()
        assert await until_closed(socket) == ([LIMIT_FRAME], GOING_AWAY)
        await asyncio.wait_for(prefill.closed.wait(), 1)
    await server.idle()


# Steers: what was accepted and can have no successor any more goes back.


async def steer(socket, turn, *said):
    """Steer a response that runs, once it has said this."""
    turn.give(*said)
    response_id = (await socket.until("response.output_item.added"))[0]["response"]["id"]
    await socket.send(type="response.steer", previous_response_id=response_id, input="Shorter.")
    await socket.until("response.steer.accepted")


async def test_a_steer_of_a_running_response_is_given_back(aging, hand):
    """Its successor cannot start any more."""
    async with aging.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        await steer(socket, turn, TextDelta("Once "))
        await retired(aging)
        turn.finish(TextDelta("upon a time."))
        frames, _ = await until_closed(socket)
    assert told(frames) == [
        (None, "response.completed"),
        (None, "response.steer.failed"),
        (None, LIMIT_REACHED),
    ]
    (failed,) = (frame for frame in frames if frame["type"] == "response.steer.failed")
    assert (failed["error"]["code"], failed["steer"]["input"]) == ("successor_creation_failed", "Shorter.")


async def test_a_steer_that_waits_for_a_tools_output_is_given_back(aging, hand):
    """The create that was to bring it along can only be refused from now on."""
    async with aging.connect() as socket:
        await socket.create(stream_id="a")
        turn = await hand.next_turn()
        await steer(socket, turn, CallStarted("function_call", "call_1", "look"))
        turn.finish(CallDelta("{}"))
        await socket.until("response.steer.pending")
        frames, _ = await until_closed(socket)
    assert told(frames) == [("a", "response.steer.failed"), (None, LIMIT_REACHED)]


async def test_a_steer_whose_successor_waits_for_a_slot_is_given_back(start, hand):
    """The client sent no create for the successor, so no error stands for it on the lane."""
    limits = {**LIMITS, "age_grace_seconds_max": 5.0, "responses_active_max": 1, "connection_seconds_max": 0.3}
    server = await start(engine=hand, limits=limits)
    async with server.connect() as socket:
        await socket.create(stream_id="a")
        first = await hand.next_turn()
        await steer(socket, first, TextDelta("Once "))
        await socket.create(stream_id="b")
        first.finish(TextDelta("upon a time."))
        await socket.until("response.completed", "response.incomplete")
        second = await hand.next_turn()
        await retired(server)
        second.answer("Yes.")
        frames, _ = await until_closed(socket)
    assert told(frames) == [
        ("b", "response.completed"),
        ("a", "response.steer.failed"),
        (None, LIMIT_REACHED),
    ]


# Clocks, and peers that do not play along.


@pytest.mark.parametrize("step_seconds", [86_400.0, -86_400.0])
async def test_a_step_of_the_wall_clock_ages_no_connection(start, hand, monkeypatch, step_seconds):
    """Only monotonic time counts: a clock that is set closes nothing early and keeps nothing open.

    Source: guarantees, "The age limit".
    """
    server = await start(engine=hand, limits={**LIMITS, "connection_seconds_max": 0.3})
    real = time.time
    async with server.connect() as socket:
        monkeypatch.setattr(time, "time", lambda: real() + step_seconds)
        started = time.monotonic()
        await socket.create()
        (await hand.next_turn()).answer("Yes.")
        assert (await socket.rest())[-1]["type"] == "response.completed"
        assert (await until_closed(socket))[1] == GOING_AWAY
        assert 0.2 < time.monotonic() - started < 2


@pytest.mark.parametrize("how", ["close", "abort"])
async def test_a_peer_that_goes_in_the_grace_leaves_nothing(aging, hand, how):
    """Its turns stop within a second, and no task waits for the grace to pass."""
    left = Leftovers(aging)
    async with aging.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.give(TextDelta("Once upon"))
        await retired(aging)
        if how == "abort":
            socket.connection.transport.abort()
        else:
            await socket.connection.close()
        await asyncio.wait_for(turn.closed.wait(), 1)
    await left.gone()


async def test_a_peer_that_goes_before_its_age_leaves_nothing(aging):
    """The timer goes with the connection."""
    left = Leftovers(aging)
    async with aging.connect():
        pass
    await left.gone()
    await asyncio.sleep(2 * AGE_SECONDS)  # an error in a timer that was left would be in the log


async def test_a_peer_that_does_not_read_is_cut(start, hand, monkeypatch):
    """After the grace nothing waits for it any more; the text that it did not take is lost, and its connection too."""
    monkeypatch.setattr(frames, "LAST_WORDS_SECONDS_MAX", 0.2)
    limits = {**LIMITS, "send_buffer_bytes_max": 64 * 1024}
    server = await start(engine=hand, limits=limits, kernel_buffer_bytes=16 * 1024)
    left = Leftovers(server)
    async with blocked_client(server) as socket:
        await socket.create()
        turn = await hand.next_turn()
        for _ in range(64):
            turn.give(TextDelta("x" * 32 * 1024))
        await asyncio.wait_for(turn.closed.wait(), AGE_SECONDS + GRACE_SECONDS + 1)
        await until(lambda: not server.app._sockets)
        socket.connection.transport.abort()
    await left.gone()
