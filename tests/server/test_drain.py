"""A server that is told to stop starts nothing more, and lets what runs end.

The signals themselves are tested on a real process, in `cli/test_signals.py`.

Source: WebSocket mode guide, "Connection life"; guarantees, "Drain".
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from contextlib import asynccontextmanager

import pytest
from websockets.exceptions import InvalidStatus

from openline.engines.router import Router
from openline.observe import LogHook
from openline.protocol.deltas import TextDelta
from openline.server import frames
from openline.server.runner import Server, bind, build, uvicorn_config
from openline.state.nothing import NothingStore
from server.closing import GOING_AWAY, Leftovers, blocked_client, told, until_closed
from server.running import make_config, read_sse, until
from server.slow_line import SlowLine

OVERLOADED = "server_is_overloaded"
SOON_SECONDS = 2.0  # nothing was waited for: the last words have 5, turns 30


class Draining:
    """A drain that goes on; `hurry` is an operator's second signal."""

    def __init__(self, server):
        self._hurry = asyncio.Event()
        self._task = asyncio.ensure_future(server.app.drain(self._hurry))
        self._started = time.monotonic()

    def hurry(self):
        self._hurry.set()

    @property
    def is_over(self):
        return self._task.done()

    async def seconds(self):
        """Wait for its end; how long it took in all."""
        await asyncio.wait_for(self._task, 5)
        return time.monotonic() - self._started


@asynccontextmanager
async def draining(server):
    """A drain, begun; it must be over at the end."""
    drain = Draining(server)
    await until(lambda: server.app._draining)
    yield drain
    await drain.seconds()


async def begun(hand, what, text="Once "):
    """The turn that `what` has just asked for, in mid-text."""
    turn = await hand.next_turn()
    turn.give(TextDelta(text))
    await until(lambda: turn.taken == 1)
    return turn


def text_of(response):
    return "".join(part["text"] for item in response["output"] for part in item["content"])


async def test_an_idle_socket_is_closed_with_1001_and_nothing_before(played):
    """A careless client dies of an event on an idle socket; a close frame it survives."""
    async with played.connect() as socket, draining(played) as drain:
        assert await until_closed(socket) == ([], GOING_AWAY)
        assert await drain.seconds() < SOON_SECONDS


async def test_without_clients_it_is_over_at_once(played):
    """Nothing is waited for that is not there."""
    async with draining(played) as drain:
        assert await drain.seconds() < SOON_SECONDS


async def test_running_turns_complete_on_every_transport(played, hand):
    """Lanes of one socket, an event stream and a plain answer get all of their text, and then their end."""
    async with played.connect() as socket:
        turns = []
        for lane in (None, "a", "b"):
            await socket.create(**({"stream_id": lane} if lane else {}))
            turns.append(await begun(hand, socket))
        streaming = asyncio.ensure_future(played.post(stream=True))
        turns.append(await begun(hand, streaming))
        posting = asyncio.ensure_future(played.post())
        turns.append(await begun(hand, posting))
        async with draining(played) as drain:
            for turn in turns:
                assert not drain.is_over
                turn.finish(TextDelta("upon a time."))
            came, code = await until_closed(socket)
            streamed = read_sse((await streaming).body)
            posted = (await posting).json
    ends = [frame["response"] for frame in came if frame["type"] == "response.completed"]
    assert [text_of(response) for response in [*ends, streamed[-1]["response"], posted]] == ["Once upon a time."] * 5
    assert {streamed[-1]["type"], posted["status"]} == {"response.completed", "completed"}
    assert (told(came)[-1][1], code) == ("response.completed", GOING_AWAY)


async def test_what_waits_and_what_still_comes_is_refused_in_its_lanes_order(played, hand):
    """Each create gets its error behind what runs before it; the connection itself gets none, only 1001."""
    async with played.connect() as socket:
        await socket.create(stream_id="busy")
        turn = await begun(hand, socket)
        await socket.create(stream_id="busy")  # waits
        await socket.until("response.output_text.delta")
        async with draining(played):
            await socket.create(stream_id="busy")  # comes later
            await socket.create(stream_id="free")
            refused = await socket.receive()
            assert told([refused]) == [("free", OVERLOADED)]
            assert (refused["status"], refused["headers"]) == (503, {"retry-after": "1"})
            assert await socket.is_silent()
            turn.finish()
            came, code = await until_closed(socket)
    assert told(came) == [("busy", "response.completed"), ("busy", OVERLOADED), ("busy", OVERLOADED)]
    assert code == GOING_AWAY
    assert hand.is_idle


async def test_new_clients_are_sent_away_at_once(played, hand):
    """503 with the envelope and `retry-after`, over both transports; the process lives, and is not ready."""
    async with played.connect() as socket:
        await socket.create()
        turn = await begun(hand, socket)
        async with draining(played):
            with pytest.raises(InvalidStatus) as refused:
                async with played.connect():
                    pass
            upgrade = refused.value.response
            posted = await played.post()
            for status, headers, body in (
                (upgrade.status_code, upgrade.headers, upgrade.body),
                (posted.status, posted.headers, posted.body),
            ):
                assert (status, headers["retry-after"]) == (503, "1")
                assert json.loads(body)["error"]["code"] == OVERLOADED
            ready, healthy = await played.get("/readyz"), await played.get("/healthz")
            assert (ready.status, ready.json["status"], healthy.status) == (503, "shutting down", 200)
            turn.finish()
            assert (await until_closed(socket))[1] == GOING_AWAY


async def test_a_create_that_is_still_being_sent_is_answered(played, hand):
    """It was let in before; the drain waits for it as for a turn."""
    rest = asyncio.Event()

    async def body():
        yield b'{"model": "m", "input": '
        await rest.wait()
        yield b'"Hello."}'

    posting = asyncio.ensure_future(played.request("POST", "/v1/responses", data=body()))
    await until(lambda: played.app._clients == 1)
    async with draining(played) as drain:
        rest.set()
        turn = await hand.next_turn()
        assert not drain.is_over
        turn.answer("Hello.")
        assert (await posting).json["status"] == "completed"


async def test_turns_that_take_too_long_are_cancelled_with_their_terminal_event(start, hand):
    """What they have said is kept; every transport is told."""
    server = await start(engine=hand, limits={"drain_seconds_max": 0.1})
    async with server.connect() as socket:
        await socket.create()
        turns = [await begun(hand, socket)]
        streaming = asyncio.ensure_future(server.post(stream=True))
        turns.append(await begun(hand, streaming))
        posting = asyncio.ensure_future(server.post())
        turns.append(await begun(hand, posting))
        async with draining(server) as drain:
            came, code = await until_closed(socket)
            ends = [came[-1], read_sse((await streaming).body)[-1]]
            posted = (await posting).json
            assert 0.1 <= await drain.seconds() < SOON_SECONDS
    assert [(end["type"], text_of(end["response"])) for end in ends] == [("response.incomplete", "Once ")] * 2
    assert (posted["status"], text_of(posted)) == ("incomplete", "Once ")
    assert {response["incomplete_details"]["reason"] for response in (ends[0]["response"], posted)} == {"cancelled"}
    assert code == GOING_AWAY
    assert all(turn.closed.is_set() for turn in turns)


async def test_who_does_not_want_to_wait_ends_it_at_once(played, hand):
    """The turns are cancelled, and still get their terminal events."""
    async with played.connect() as socket:
        await socket.create()
        await begun(hand, socket)
        streaming = asyncio.ensure_future(played.post(stream=True))
        await begun(hand, streaming)
        async with draining(played) as drain:
            assert await socket.until("response.output_text.delta")
            drain.hurry()
            came, code = await until_closed(socket)
            assert await drain.seconds() < SOON_SECONDS
            last = read_sse((await streaming).body)[-1]
    assert ([frame["type"] for frame in came][-1], last["type"], code) == (
        "response.incomplete",
        "response.incomplete",
        GOING_AWAY,
    )


async def test_a_connection_that_has_reached_its_age_drains_like_the_others(start, hand):
    """Its longer grace does not hold the server; it is told of its age all the same."""
    limits = {"connection_seconds_max": 0.05, "age_grace_seconds_max": 60.0, "drain_seconds_max": 0.1}
    server = await start(engine=hand, limits=limits)
    async with server.connect() as socket:
        await socket.create()
        await begun(hand, socket)
        (connection,) = server.app._sockets
        await until(lambda: connection._retiring)
        async with draining(server) as drain:
            came, code = await until_closed(socket)
            assert await drain.seconds() < SOON_SECONDS
    assert told(came) == [(None, "response.incomplete"), (None, "websocket_connection_limit_reached")]
    assert code == GOING_AWAY


async def test_a_slow_client_is_waited_for_as_long_as_a_turn(start, hand, monkeypatch):
    """Its turn has ended, and it has still to read it: that is not over before it has."""
    monkeypatch.setattr(frames, "LAST_WORDS_SECONDS_MAX", 0.1)
    server = await start(engine=hand, kernel_buffer_bytes=16 * 1024)
    async with blocked_client(server) as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.finish(*[TextDelta("x" * 1000) for _ in range(500)])
        await server.idle()
        async with draining(server) as drain:
            await asyncio.sleep(0.2)  # longer than the last words
            assert not drain.is_over
            came, code = await until_closed(socket)
    assert (came[-1]["type"], code) == ("response.completed", GOING_AWAY)
    assert len(text_of(came[-1]["response"])) == 500_000


async def test_a_client_that_never_reads_does_not_keep_it(start, hand, monkeypatch):
    """After the turns' time and that of the last words it is cut."""
    monkeypatch.setattr(frames, "LAST_WORDS_SECONDS_MAX", 0.1)
    limits = {"drain_seconds_max": 0.1, "send_buffer_bytes_max": 64 * 1024}
    server = await start(engine=hand, limits=limits, kernel_buffer_bytes=16 * 1024)
    left = Leftovers(server)
    async with blocked_client(server) as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.give(*[TextDelta("x" * 1000) for _ in range(500)])
        async with draining(server) as drain:
            assert await drain.seconds() < SOON_SECONDS
        await until(lambda: not server.app._sockets)
        socket.connection.transport.abort()
    await left.gone()


async def test_a_signal_before_the_start_is_not_lost(tmp_path):
    """The server stops as soon as it has started."""
    config = make_config(tmp_path / "openline.db")
    store, router = NothingStore(), Router([])
    app, registry = build(config, router, store, LogHook())
    server = Server(uvicorn_config(config, app), lambda: None, app.drain)
    server.handle_exit(signal.SIGTERM, None)
    serving = asyncio.ensure_future(server.serve(sockets=[bind(config)]))
    stopped, _ = await asyncio.wait({serving}, timeout=2)
    server.should_exit = True
    await serving
    await registry.close()
    assert server.started
    assert stopped


async def test_a_connection_that_is_just_being_accepted_drains_like_the_others(played):
    """Its upgrade was let in before; it is answered, and closed."""
    line = SlowLine(played)
    line.takes.clear()
    await until(lambda: played.app._sockets)
    async with draining(played):
        line.takes.set()
        await asyncio.wait_for(line.serving, SOON_SECONDS)
    assert line.states == [("websocket.accept", None), ("websocket.close", GOING_AWAY)]


HANDSHAKE = (
    b"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
CLOSE = b"\x88\x02\x03\xe9"  # RFC 6455 §5.5.1: a close frame with code 1001


async def test_a_client_that_does_not_answer_the_close_is_cut(played, monkeypatch):
    """It is given the time of the last words.

    Source: RFC 6455 §7.1.1.
    """
    monkeypatch.setattr(frames, "LAST_WORDS_SECONDS_MAX", 0.2)
    host, port = played.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(HANDSHAKE)
    await reader.readuntil(b"\r\n\r\n")
    async with draining(played) as drain:
        assert await reader.readexactly(len(CLOSE)) == CLOSE
        assert not drain.is_over
        assert 0.1 < await drain.seconds() < SOON_SECONDS
    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(reader.readexactly(1), 1)
    writer.close()


async def test_the_answer_to_the_close_is_waited_for(played):
    """A connection that is shut before, with a client's message unread, is reset, and takes what was not read yet."""
    host, port = played.address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(HANDSHAKE)
    await reader.readuntil(b"\r\n\r\n")
    async with draining(played) as drain:
        assert await reader.readexactly(len(CLOSE)) == CLOSE
        assert not drain.is_over
        writer.write(b"\x88\x82\x00\x00\x00\x00\x03\xe9")
        assert await drain.seconds() < SOON_SECONDS
        assert await reader.read() == b""
    writer.close()
