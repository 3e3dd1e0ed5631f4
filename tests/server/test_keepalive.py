"""A response whose model is silent says again and again that it still runs; pings alone keep no client waiting.

Source: docs/adr/0006; WebSocket mode guide, "Connection life"; guarantees, "Zombies".
"""

from __future__ import annotations

import asyncio
import struct
import time
from contextlib import suppress

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.lib.responses_websocket import (
    AsyncResponsesWebSocketSession,
    ResponsesWebSocketAccumulator,
    ResponsesWebSocketLimits,
)
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosedError

from openline.protocol.deltas import CallDelta, CallStarted, Ended, ReasoningDelta, RefusalDelta, TextDelta
from openline.protocol.fold import Fold
from openline.server import frames
from openline.state.sqlite import SqliteStore
from protocol import upstream
from protocol.meaning import delta_sequences
from protocol.pair import Pair, check_sequence
from server.closing import Leftovers, blocked_client
from server.hand import HandTurn
from server.running import until
from server.silence import impatient_proxy

KEEPALIVE_SECONDS = 0.05
STREAM_EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture
async def silent(start, hand):
    """A server that soon says that a silent model still runs."""
    return await start(engine=hand, limits={"keepalive_seconds": KEEPALIVE_SECONDS})


def kinds(events):
    return [event["type"].removeprefix("response.") for event in events]


def folded(events):
    """The response that a client makes of these events, which checks their order and their numbers."""
    fold = Fold()
    for event in events:
        fold.apply(event)
    assert fold.output() == fold.snapshot()["output"]
    return fold.snapshot()


async def keepalive(socket):
    """The next message, which must be `response.in_progress`; the response in it."""
    event = await socket.receive()
    assert event["type"] == "response.in_progress", event
    return event["response"]


async def nothing_for(socket, seconds):
    """Nothing is sent for so long."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(socket.connection.recv(), seconds)


# What is sent, and when.


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_silent_model_is_said_to_run_still(silent, hand, transport):
    """`response.in_progress` again, with the next number and the text so far; what follows goes on from there."""

    async def say(turn):
        turn.give(TextDelta("Once "))
        await asyncio.sleep(3.5 * KEEPALIVE_SECONDS)
        turn.finish(TextDelta("upon a time."))

    if transport == "websocket":
        async with silent.connect() as socket:
            await socket.create()
            await say(await hand.next_turn())
            events = await socket.rest()
    else:
        posting = asyncio.ensure_future(silent.post(stream=True))
        await say(await hand.next_turn())
        events = (await posting).events
    check_sequence(events)
    first = kinds(events).index("output_text.delta") + 1
    again = events[first : kinds(events).index("output_text.delta", first)]
    assert set(kinds(again)) == {"in_progress"}
    assert 2 <= len(again) <= 4
    for event in again:
        (item,) = event["response"]["output"]
        assert (item["status"], item["content"][0]["text"]) == ("in_progress", "Once ")
        assert event["response"]["status"] == "in_progress"
    assert folded(events) == events[-1]["response"]
    assert folded(events)["output"][0]["content"][0]["text"] == "Once upon a time."


OPEN = {
    "message": ([TextDelta("Once ")], TextDelta("upon")),
    "refusal": ([RefusalDelta("I ")], RefusalDelta("cannot.")),
    "reasoning": ([ReasoningDelta("Hm, ")], ReasoningDelta("well.")),
    "function": ([CallStarted("function_call", "call_1", "look", "ns"), CallDelta('{"a"')], CallDelta(":1}")),
    "function without arguments yet": ([CallStarted("function_call", "call_1", "look")], CallDelta("{}")),
    "custom tool": ([CallStarted("custom_tool_call", "call_1", "run"), CallDelta("ls ")], CallDelta("-l")),
    "several items": (
        [ReasoningDelta("Hm."), TextDelta("Look: "), CallStarted("function_call", "call_1", "look"), CallDelta("{")],
        CallDelta("}"),
    ),
}


@pytest.mark.parametrize("what", OPEN)
async def test_it_shows_what_is_open(silent, hand, what):
    """A message, a call, a refusal or reasoning with its text so far, behind the items that are closed."""
    before, after = OPEN[what]
    async with silent.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.give(*before)
        events = await socket.until("response.in_progress")
        events += await socket.until("response.in_progress")
        assert events[-1]["response"] == folded(events[:-1])
        turn.finish(after)
        events += await socket.rest()
    check_sequence(events)
    assert folded(events) == events[-1]["response"]


async def test_it_comes_while_the_upstream_has_not_accepted_yet(start, hand):
    """From `response.created` on, which leaves by time in a long prefill."""
    limits = {"keepalive_seconds": KEEPALIVE_SECONDS, "created_wait_seconds_max": 0.01}
    server = await start(engine=hand, limits=limits)
    async with server.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        assert kinds([await socket.receive() for _ in range(4)]) == ["created", *["in_progress"] * 3]
        turn.refuse()
        await socket.until("response.failed")
        await nothing_for(socket, 2 * KEEPALIVE_SECONDS)


async def test_nothing_is_sent_before_the_response_has_begun(start, hand):
    """Before `response.created` a refusal can still have its status, and nothing can be repeated."""
    limits = {"keepalive_seconds": KEEPALIVE_SECONDS, "created_wait_seconds_max": 5.0}
    server = await start(engine=hand, limits=limits)
    async with server.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        await nothing_for(socket, 3 * KEEPALIVE_SECONDS)
        turn.refuse()
        assert kinds(await socket.rest()) == ["error"]


async def test_a_model_that_speaks_is_not_said_to_run(start, hand):
    """Only silence counts, from event to event, and on each lane for itself."""
    server = await start(engine=hand, limits={"keepalive_seconds": 0.25})
    async with server.connect() as socket:
        turns = {}
        for lane in ("loud", "silent"):
            await socket.create(stream_id=lane)
            turns[lane] = await hand.next_turn()
            turns[lane].accept()
        for _ in range(16):
            turns["loud"].give(TextDelta("word "))
            await asyncio.sleep(0.05)
        for turn in turns.values():
            turn.finish()
        events = await socket.rest() + await socket.rest()
    said = {lane: [event for event in events if event["stream_id"] == lane] for lane in turns}
    assert kinds(said["loud"]).count("in_progress") == 1
    assert kinds(said["silent"]).count("in_progress") >= 3
    for lane_events in said.values():
        check_sequence(lane_events)


async def test_a_plain_answer_has_none(silent, hand):
    """Nobody reads the events of a create that does not stream, so none are made."""
    posting = asyncio.ensure_future(silent.post())
    turn = await hand.next_turn()
    turn.give(TextDelta("Once "))
    (running,) = silent.registry._turns.values()
    await until(lambda: len(running.log) == 5)
    await asyncio.sleep(3 * KEEPALIVE_SECONDS)
    assert len(running.log) == 5
    turn.finish()
    assert (await posting).json["status"] == "completed"


async def test_a_client_that_is_behind_gets_none(start, hand):
    """It has data to read; what it does not read must not grow."""
    limits = {"keepalive_seconds": KEEPALIVE_SECONDS, "send_buffer_bytes_max": 64 * 1024}
    server = await start(engine=hand, limits=limits, kernel_buffer_bytes=16 * 1024)
    async with blocked_client(server) as socket:
        await socket.create()
        turn = await hand.next_turn()
        for _ in range(64):
            turn.give(TextDelta("x" * 16 * 1024))
        (running,) = server.registry._turns.values()
        await until(lambda: not running.log.is_writable)
        written = len(running.log)
        await asyncio.sleep(3 * KEEPALIVE_SECONDS)
        assert len(running.log) == written
        turn.finish()
        events = await socket.rest()
        check_sequence(events)


class SlowStore(SqliteStore):
    """A store that takes its time."""

    async def put(self, *what, **more):
        await asyncio.sleep(3.5 * KEEPALIVE_SECONDS)
        await super().put(*what, **more)


async def test_it_comes_while_the_store_is_slow(start, hand, tmp_path):
    """The response runs until it is kept; its closing events come before, its terminal event after."""
    limits = {"keepalive_seconds": KEEPALIVE_SECONDS}
    server = await start(engine=hand, store=SlowStore(tmp_path / "openline.db"), limits=limits)
    async with server.connect() as socket:
        await socket.create()
        (await hand.next_turn()).answer("Once upon a time.")
        events = await socket.rest()
        assert kinds(events).count("in_progress") >= 3
        check_sequence(events)
        assert folded(events) == events[-1]["response"]
        assert (await server.get(f"/v1/responses/{events[-1]['response']['id']}")).json == events[-1]["response"]


# When it ends.


ENDS = {
    "completed": lambda turn: turn.finish(TextDelta("upon a time.")),
    "failed": lambda turn: turn.refuse(),
    "incomplete": lambda turn: (turn.give(Ended("max_output_tokens")), turn.end()),
    "broken": lambda turn: turn.end(),
}


@pytest.mark.parametrize("end", ENDS)
async def test_nothing_follows_the_end(silent, hand, end):
    """Its timer goes with the turn."""
    async with silent.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.give(TextDelta("Once "))
        (running,) = silent.registry._turns.values()
        await until(lambda: running.writer is not None and running.writer.is_open)
        ENDS[end](turn)
        await socket.rest()
        assert running.writer._keepalive is None
        await nothing_for(socket, 2 * KEEPALIVE_SECONDS)


@pytest.mark.parametrize("how", ["cancel", "go"])
async def test_it_ends_with_a_turn_that_is_cancelled(silent, hand, how):
    """By the client's word, and by its going."""
    async with silent.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.give(TextDelta("Once "))
        await socket.until("response.output_text.delta")
        (running,) = silent.registry._turns.values()
        if how == "cancel":
            await socket.send(type="response.cancel")
            await socket.rest()
        else:
            socket.connection.transport.abort()
        await silent.idle()
        assert running.writer._keepalive is None


async def test_a_warm_ups_prefill_is_silent(silent, hand, monkeypatch):
    """The warm-up has ended; nobody waits for its prefill."""
    monkeypatch.setattr(HandTurn, "prefills", True)
    async with silent.connect() as socket:
        warm = await socket.completed(generate=False)
        prefill = await hand.next_turn()
        prefill.accept()
        await nothing_for(socket, 3 * KEEPALIVE_SECONDS)
        await socket.create(previous_response_id=warm["id"])
        (await hand.next_turn()).answer("Yes.")
        assert (await socket.rest())[-1]["type"] == "response.completed"


# What clients make of it.


def accumulated(events):
    """What `responses.stream()` of openai-python tells an app: the text at each delta, and the final response."""
    state = ResponseStreamState(input_tools=[], text_format=openai.omit)
    told = [fired for event in events for fired in state.handle_event(STREAM_EVENT.validate_python(event))]
    return [fired.snapshot for fired in told if fired.type == "response.output_text.delta"], told[-1].response


def socket_accumulated(events):
    """What openai-python's accumulator of a lane shows, after each event."""
    accumulator = ResponsesWebSocketAccumulator()
    shown = []
    for event in events:
        accumulator.add_event(STREAM_EVENT.validate_python(event))
        shown.append((accumulator.snapshot().output, words(accumulator.detailed_snapshot()["output"])))
    return shown


def words(shown):
    """Every text in what an accumulator shows in detail, with its place; statuses and such left aside."""
    found = {}

    def walk(value, place):
        if isinstance(value, dict | list):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                walk(inner, (*place, key))
        elif isinstance(value, str) and place[-1] in {"text", "refusal", "arguments", "input", "name"}:
            found[place] = value

    walk(shown, ())
    return found


@settings(max_examples=60)
@given(delta_sequences(), st.data())
def test_wherever_it_comes_it_changes_nothing(said, data):
    """The final response is the same; SDKs' accumulators show the same after it as before, and at the end.

    Source: openai-python, `responses.stream()` and `responses_websocket`.
    """
    plain, kept = Pair(), Pair()
    for delta in said:
        plain.send(delta)
        kept.send(delta)
        for _ in range(data.draw(st.integers(0, 2))):
            kept._carry(kept.server.keep_alive())
    assert kept.finish() == plain.finish()
    check_sequence(kept.events)
    assert accumulated(kept.events)[1] == accumulated(plain.events)[1]
    check_shown(kept.events)


def test_it_may_come_between_any_two_events_of_an_upstreams_own(subtests):
    """Summaries, hosted tools, citations and items of a Responses server too."""
    events = upstream.turn()
    for place in range(len(events)):
        pair = Pair()
        for number, event in enumerate(events):
            pair.upstream(**{"event_type": event["type"], **{k: v for k, v in event.items() if k != "type"}})
            if number == place and pair.server.ended is None:
                pair._carry(pair.server.keep_alive())
        pair.finish()
        with subtests.test(place=place, event=events[place]["type"]):
            assert folded(pair.events)["status"] == "completed"
            check_shown([event for event in pair.events if not event["type"].startswith("slug:")])


def check_shown(events):
    """No keepalive takes anything away from what an accumulator shows."""
    shown = socket_accumulated(events)
    for number, event in enumerate(events):
        if event["type"] == "response.in_progress" and number > 1:
            assert shown[number] == shown[number - 1]


class Silence:
    """How long a model is silent, what the proxy bears, and after how long the server says something."""

    def __init__(self, silence, bears, keepalive_seconds):
        self.seconds = silence
        self.bears_seconds = bears
        self.limits = {"keepalive_seconds": keepalive_seconds}


SHORT = Silence(0.8, 0.4, 0.1)
REAL = pytest.param(Silence(3.0, 2.0, 1.0), marks=pytest.mark.long, id="real figures")


async def speak(hand, silence):
    """A model that says something, is silent for long, and says the rest."""
    turn = await hand.next_turn()
    turn.give(TextDelta("Once "))
    await asyncio.sleep(silence.seconds)
    turn.finish(TextDelta("upon a time."))


async def http_texts(client):
    """The texts that `responses.stream()` shows at each delta, and the final one."""
    async with client.responses.stream(model="m", input="Hello.") as stream:
        shown = [event.snapshot async for event in stream if event.type == "response.output_text.delta"]
        return [*shown, (await stream.get_final_response()).output_text]


async def socket_texts(client):
    """The same of a session over WebSocket, whose accumulator the app feeds."""
    bounds = ResponsesWebSocketLimits(
        max_lanes=2, max_events_per_lane=128, max_events=128, max_bytes_per_lane=2**20, max_bytes=2**20
    )
    accumulator = ResponsesWebSocketAccumulator()
    shown = []
    async with (
        client.responses.connect(websocket_connection_options={"proxy": None}) as connection,
        AsyncResponsesWebSocketSession(connection, limits=bounds) as session,
    ):
        lane = session.lane("a")
        await lane.send({"type": "response.create", "model": "m", "input": "Hello."})
        while True:
            event = await lane.recv()
            accumulator.add_event(event)
            if event.type == "response.output_text.delta":
                shown.append(accumulator.snapshot().output_text)
            if event.type == "response.completed":
                final = accumulator.get_final_response()
                assert (await lane.get_final_response()).output_text == final.output_text
                return [*shown, final.output_text]


TEXTS = {"sse": http_texts, "websocket": socket_texts}
CUT = {"sse": openai.APIConnectionError, "websocket": ConnectionClosedError}


async def warm_up(server, hand, transport):
    """A first turn on the straight way: the SDK builds its types then, which stops everything in this process."""
    async with client_of(server.address) as client:
        asking = asyncio.ensure_future(TEXTS[transport](client))
        (await hand.next_turn()).answer("Once upon a time.")
        await asking


def client_of(address):
    return openai.AsyncOpenAI(base_url=f"http://{address}/v1", api_key="any", max_retries=0)


@pytest.mark.parametrize("silence", [pytest.param(SHORT, id="short"), REAL])
@pytest.mark.parametrize("transport", TEXTS)
async def test_a_proxy_that_cuts_silent_connections_does_not_cut_a_turn(start, hand, transport, silence):
    """The turn completes, and openai-python shows the whole text, what came before the silence included."""
    server = await start(engine=hand, limits=silence.limits)
    await warm_up(server, hand, transport)
    async with impatient_proxy(server.address, silence.bears_seconds) as address, client_of(address) as client:
        speaking = asyncio.ensure_future(speak(hand, silence))
        assert await TEXTS[transport](client) == ["Once ", "Once upon a time.", "Once upon a time."]
        await speaking


@pytest.mark.parametrize("transport", TEXTS)
async def test_without_it_such_a_proxy_cuts_the_turn(start, hand, transport):
    """The test above would see it."""
    server = await start(engine=hand, limits={"keepalive_seconds": 45.0})
    async with impatient_proxy(server.address, SHORT.bears_seconds) as address, client_of(address) as client:
        speaking = asyncio.ensure_future(speak(hand, SHORT))
        with pytest.raises(CUT[transport]):
            await TEXTS[transport](client)
        await speaking


# Pings.

PING, PONG = 0x89, 0x8A
HANDSHAKE = (
    b"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
NO_MASK = b"\0\0\0\0"


async def read_frame(reader):
    """One frame of a server's: its first byte and its payload.

    Source: RFC 6455 §5.2.
    """
    first, size = await reader.readexactly(2)
    if size == 126:
        (size,) = struct.unpack("!H", await reader.readexactly(2))
    return first, await reader.readexactly(size)


async def raw_connection(server):
    """A client that does what the test does, and no more."""
    host, port = server.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(HANDSHAKE)
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


def write_create(writer):
    create = b'{"type":"response.create","model":"m","input":"Hello."}'
    writer.write(bytes((0x81, 0x80 | len(create))) + NO_MASK + create)


async def test_the_server_pings_while_a_turn_generates(start, hand):
    """Not only idle sockets may be dead; a peer that answers stays."""
    server = await start(engine=hand, limits={"ping_seconds": 0.05, "pong_seconds_max": 0.2})
    reader, writer = await raw_connection(server)
    write_create(writer)
    turn = await hand.next_turn()
    pings = 0
    async with asyncio.timeout(5):
        while pings < 5:
            turn.give(TextDelta("word "))
            first, payload = await read_frame(reader)
            if first == PING:
                pings += 1
                writer.write(bytes((PONG, 0x80 | len(payload))) + NO_MASK + payload)
    assert not turn.closed.is_set()
    writer.close()


async def test_a_peer_that_answers_no_ping_is_closed_in_mid_turn(start, hand):
    """With 1011, and its turn stops.

    Source: WebSocket mode guide, "Connection life"; guarantees, "Zombies".
    """
    server = await start(engine=hand, limits={"ping_seconds": 0.05, "pong_seconds_max": 0.1})
    reader, writer = await raw_connection(server)
    write_create(writer)
    turn = await hand.next_turn()
    turn.accept()
    async with asyncio.timeout(5):
        while (frame := await read_frame(reader))[0] != 0x88:
            pass
        assert frame[1] == struct.pack("!H", 1011) + b"keepalive ping timeout"
        await turn.closed.wait()
    writer.close()


async def test_a_peer_that_still_sends_a_message_may_answer_a_ping_behind_it(start, hand):
    """A pong cannot stand inside a frame (RFC 6455 §5.4), and a large message takes its time on a slow line.

    Source: WebSocket mode guide, "Connection life": no timeout while a message is still being received.
    """
    server = await start(engine=hand, limits={"ping_seconds": 0.05, "pong_seconds_max": 0.2})
    reader, writer = await raw_connection(server)
    create = b'{"type":"response.create","model":"m","input":"%b"}' % (b"x" * 10_000)
    writer.write(b"\x81\xfe" + struct.pack("!H", len(create)) + NO_MASK)
    for start_of_piece in range(0, len(create), 1000):
        await asyncio.sleep(0.05)  # in all more than twice what an answer may take
        writer.write(create[start_of_piece : start_of_piece + 1000])
    (await hand.next_turn()).answer("Hi.")
    async with asyncio.timeout(5):
        first, payload = await read_frame(reader)
        assert first == PING
        writer.write(bytes((PONG, 0x80 | len(payload))) + NO_MASK + payload)
        while b"response.completed" not in payload:
            _, payload = await read_frame(reader)
    writer.close()


async def test_a_peer_that_stops_in_the_middle_of_a_message_is_closed(start, hand):
    """With 1011, as one that is silent otherwise (guarantees, "Zombies")."""
    server = await start(engine=hand, limits={"ping_seconds": 0.05, "pong_seconds_max": 0.1})
    reader, writer = await raw_connection(server)
    writer.write(b"\x81\xfe" + struct.pack("!H", 1000) + NO_MASK + b'{"type":')
    async with asyncio.timeout(5):
        while (frame := await read_frame(reader))[0] != 0x88:
            assert frame[0] == PING
    assert frame[1] == struct.pack("!H", 1011) + b"keepalive ping timeout"
    writer.close()


async def test_a_peer_that_neither_reads_nor_answers_a_ping_is_gone(start, hand, monkeypatch):
    """What it has not read holds its connection no longer than the last words are given.

    Source: guarantees, "Zombies" and "Slow consumer".
    """
    monkeypatch.setattr(frames, "LAST_WORDS_SECONDS_MAX", 0.1)
    limits = {"ping_seconds": 0.05, "pong_seconds_max": 0.1, "send_buffer_bytes_max": 64 * 1024}
    server = await start(engine=hand, limits=limits, kernel_buffer_bytes=16 * 1024)
    left = Leftovers(server)
    async with blocked_client(server) as socket:
        await socket.create()
        turn = await hand.next_turn()
        for _ in range(64):
            turn.give(TextDelta("x" * 16 * 1024))
        await asyncio.wait_for(turn.closed.wait(), 1)
        await until(lambda: not server.app._sockets)
        socket.connection.transport.abort()
    await left.gone()


async def test_a_clients_pings_are_answered_while_a_turn_generates(played, hand):
    """At once, between the events of a turn that speaks as fast as it can."""
    async with played.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        speaking = asyncio.ensure_future(speak_on(turn))
        reading = asyncio.ensure_future(read_on(socket))
        for _ in range(20):
            started = time.monotonic()
            await asyncio.wait_for(await socket.connection.ping(), 1)
            assert time.monotonic() - started < 0.5
        assert not turn.closed.is_set()
        for task in (speaking, reading):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def speak_on(turn):
    while True:
        turn.give(TextDelta("word " * 20))
        await asyncio.sleep(0)


async def read_on(socket):
    while True:
        await socket.receive()
