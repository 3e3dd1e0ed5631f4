"""`openline serve` when it is told to stop: a real process, real signals, and a model server that this test plays.

Source: guarantees, "Drain"; WebSocket mode guide, "Connection life".
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket as sockets
import sys
import time
from asyncio.subprocess import PIPE, Process
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from websockets.exceptions import InvalidStatus

from commands import environment
from openline.config import Config
from openline.server.frames import LAST_WORDS_SECONDS_MAX
from server.closing import GOING_AWAY, blocked_client, until_closed
from server.listening import listening
from server.running import Running, read_sse, until

EXIT_SECONDS_MAX = 20.0
START_SECONDS_MAX = 30.0
AT_ONCE_SECONDS_MAX = 4.0  # far from the drain's 30, and from what two busy cores make of half a second
WORDS = [f"word-{number} " for number in range(20)]
TEXT = "".join(WORDS)


class Model:
    """A Chat Completions server that says WORDS, one after another, at a pace that no two turns share."""

    def __init__(self, word_seconds_max: float) -> None:
        self._random = random.Random(7)
        self._word_seconds_max = word_seconds_max
        self.begun = 0
        self.ended = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for number, word in enumerate(WORDS):
            await response.write(_chunk({"content": word}))
            self.begun += number == 0
            await asyncio.sleep(self._random.uniform(0, self._word_seconds_max))
        await response.write(_chunk({}, "stop") + b"data: [DONE]\n\n")
        self.ended += 1
        return response


class SilentModel(Model):
    """One that never ends, once it has said its first word."""

    def __init__(self) -> None:
        super().__init__(3600.0)


def _chunk(delta: dict[str, Any], reason: str | None = None) -> bytes:
    return f"data: {json.dumps({'choices': [{'delta': delta, 'finish_reason': reason}]})}\n\n".encode()


class Served(Running):
    """A process of the server, and ways to reach it."""

    def __init__(self, process: Process) -> None:
        super().__init__(Config(), Path())
        self.process = process

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Send a first signal; the process handles it in its loop's next step."""
        self.process.send_signal(number)
        async with asyncio.timeout(EXIT_SECONDS_MAX):
            while (await self.get("/readyz")).status == 200:
                pass

    async def seconds_to_exit(self) -> float:
        """Wait for its end, which must be a clean one; how long that took."""
        started = time.monotonic()
        _, errors = await asyncio.wait_for(self.process.communicate(), EXIT_SECONDS_MAX)
        assert (self.process.returncode, "Traceback" in errors.decode()) == (0, False), errors.decode()
        assert " ERROR " not in errors.decode(), errors.decode()
        return time.monotonic() - started


@asynccontextmanager
async def starting(url: str, **limits: float):
    """A process of `openline serve` in front of a Chat Completions server; it is gone afterwards."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "openline", "serve", "--port", "0", "--store", "none", "--upstream", f"chat:{url}"),
        env=environment(**{f"OPENLINE_{name.upper()}": str(value) for name, value in limits.items()}),
        stdout=PIPE,
        stderr=PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


@asynccontextmanager
async def served(url: str, **limits: float):
    """The same once it listens, with ways to reach it."""
    async with starting(url, **limits) as process:
        server = Served(process)
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60), trust_env=False) as server.http:
            server.address = await _address(process)
            yield server


async def _address(process: Process) -> str:
    said = ""
    assert process.stdout is not None
    while "supports_websockets" not in said:
        line = await asyncio.wait_for(process.stdout.readline(), START_SECONDS_MAX)
        assert line, said
        said += line.decode()
    found = re.search(r"listens on http://(\S+)/v1", said)
    assert found, said
    return found[1]


def text_of(response: dict[str, Any]) -> str:
    return "".join(part["text"] for item in response["output"] for part in item["content"])


# A hundred turns, in mid-text when the signal comes.

CONNECTIONS, LANES, STREAMS, POSTS, IDLE = 12, 5, 20, 20, 10
TURNS = CONNECTIONS * LANES + STREAMS + POSTS


async def talk(server: Served) -> tuple[list[str], int | None]:
    """One connection with a turn on each of its lanes: the texts of those that completed, and the close code."""
    async with server.connect() as socket:
        for lane in range(LANES):
            await socket.create(stream_id=f"lane-{lane}")
        frames, code = await until_closed(socket)
    return [text_of(frame["response"]) for frame in frames if frame["type"] == "response.completed"], code


async def be_idle(server: Served) -> tuple[list[dict[str, Any]], int | None]:
    async with server.connect() as socket:
        return await until_closed(socket)


async def stream(server: Served) -> str:
    last = read_sse((await server.post(stream=True)).body)[-1]
    assert last["type"] == "response.completed"
    return text_of(last["response"])


async def post(server: Served) -> str:
    response = (await server.post()).json
    assert response["status"] == "completed"
    return text_of(response)


async def drained_run(wait_seconds: float) -> float:
    """One run; the signal comes so long after all turns have begun. How long the process took to end."""
    model = Model(word_seconds_max=0.04)
    async with listening(model.answer) as url, served(url) as server:
        talking = [asyncio.ensure_future(talk(server)) for _ in range(CONNECTIONS)]
        idling = [asyncio.ensure_future(be_idle(server)) for _ in range(IDLE)]
        streaming = [asyncio.ensure_future(stream(server)) for _ in range(STREAMS)]
        posting = [asyncio.ensure_future(post(server)) for _ in range(POSTS)]
        await until(lambda: model.begun == TURNS)
        await asyncio.sleep(wait_seconds)
        assert model.ended < TURNS
        await server.stop()
        assert ((await server.get("/readyz")).status, (await server.get("/healthz")).status) == (503, 200)
        await sent_away(server)
        seconds = await server.seconds_to_exit()
        talks, idles = await asyncio.gather(*talking), await asyncio.gather(*idling)
        texts = [text for said, _ in talks for text in said]
        texts += await asyncio.gather(*streaming, *posting)
    truncated = [text for text in texts if text != TEXT]
    assert (len(texts), truncated) == (TURNS, [])
    assert {code for _, code in talks} == {GOING_AWAY}
    assert all(idle == ([], GOING_AWAY) for idle in idles)
    return seconds


async def sent_away(server: Served) -> None:
    """Who comes now is told to come again, elsewhere or later."""
    with pytest.raises(InvalidStatus) as refused:
        async with server.connect():
            pass
    upgrade, posted = refused.value.response, await server.post()
    assert (upgrade.status_code, upgrade.headers["retry-after"]) == (503, "1")
    assert json.loads(upgrade.body or b"")["error"]["code"] == "server_is_overloaded"
    assert (posted.status, posted.headers["retry-after"]) == (503, "1")
    assert posted.json["error"]["code"] == "server_is_overloaded"


async def test_a_hundred_turns_in_mid_text_complete_before_the_process_ends():
    """No turn is truncated, over either transport; idle sockets get 1001; new clients 503; exit code 0."""
    await drained_run(0.0)


@pytest.mark.long
@pytest.mark.parametrize("run", range(20))
async def test_a_hundred_turns_complete_whenever_the_signal_comes(run: int):
    """The same twenty times, and the signal comes elsewhere in the turns each time.

    Source: guarantees, "Drain": 0 truncated turns.
    """
    await drained_run(0.015 * run)


# Turns that do not end, and operators that do not wait.


async def test_turns_that_outlast_the_drain_get_their_terminal_event():
    """They are cancelled when `drain_seconds_max` is over, and the process ends."""
    model = SilentModel()
    async with (
        listening(model.answer) as url,
        served(url, drain_seconds_max=0.3) as server,
        server.connect() as socket,
    ):
        await socket.create()
        streaming = asyncio.ensure_future(server.post(stream=True))
        await until(lambda: model.begun == 2)
        server.process.send_signal(signal.SIGTERM)
        frames, code = await until_closed(socket)
        events = read_sse((await streaming).body)
        assert await server.seconds_to_exit() < AT_ONCE_SECONDS_MAX
    assert [frames[-1]["type"], events[-1]["type"], code] == ["response.incomplete", "response.incomplete", GOING_AWAY]
    assert text_of(frames[-1]["response"]) == text_of(events[-1]["response"]) == WORDS[0]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_it_at_once(first: signal.Signals, second: signal.Signals):
    """The turns are cancelled, and get their terminal events; exit code 0."""
    model = SilentModel()
    async with listening(model.answer) as url, served(url) as server, server.connect() as socket:
        await socket.create()
        streaming = asyncio.ensure_future(server.post(stream=True))
        await until(lambda: model.begun == 2)
        await server.stop(first)
        server.process.send_signal(second)
        assert await server.seconds_to_exit() < AT_ONCE_SECONDS_MAX
        frames, code = await until_closed(socket)
        last = read_sse((await streaming).body)[-1]
    assert (frames[-1]["type"], last["type"], code) == ("response.incomplete", "response.incomplete", GOING_AWAY)


async def test_a_third_signal_waits_for_nobody():
    """Exit code 0, and no traceback all the same."""
    model = SilentModel()
    async with listening(model.answer) as url, served(url) as server, blocked_client(server) as socket:
        await socket.create()
        streaming = asyncio.ensure_future(server.post(stream=True))
        await until(lambda: model.begun == 2)
        for _ in range(3):
            server.process.send_signal(signal.SIGINT)
            await asyncio.sleep(0.01)  # signals that come together are one
        assert await server.seconds_to_exit() < AT_ONCE_SECONDS_MAX
        await asyncio.wait({streaming})
        socket.connection.transport.abort()


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_before_it_has_started_ends_it_too(stop: signal.Signals):
    """While it still looks at an upstream that does not answer; without a traceback."""
    with sockets.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        async with starting(f"http://127.0.0.1:{mute.getsockname()[1]}/v1") as process:
            connection, _ = await asyncio.to_thread(mute.accept)
            with connection:
                started = time.monotonic()
                process.send_signal(stop)
                said, errors = await asyncio.wait_for(process.communicate(), EXIT_SECONDS_MAX)
                assert time.monotonic() - started < AT_ONCE_SECONDS_MAX
    assert b"listens on" not in said
    assert b"Traceback" not in errors, errors.decode()


# Clients that do not play along.


async def flood(request: web.Request) -> web.StreamResponse:
    """A model that never stops."""
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    with suppress(ConnectionError):  # the turn was cancelled
        while True:
            await response.write(_chunk({"content": "x" * 65536}))
    return response


@asynccontextmanager
async def not_reading(server: Served, transport: str):
    """A client with a turn that never ends, which it does not read; all buffers are full."""
    if transport == "websocket":
        async with blocked_client(server) as socket:
            await socket.create()
            await asyncio.sleep(0.3)
            yield
            socket.connection.transport.abort()
    else:
        async with server.open_post(stream=True) as answer:
            assert answer.status == 200
            await asyncio.sleep(0.3)
            yield


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_second_signal_does_not_wait_for_a_client_that_does_not_read(transport: str):
    """It is cut; exit code 0, and no traceback."""
    async with listening(flood) as url, served(url) as server, not_reading(server, transport):
        await server.stop()
        server.process.send_signal(signal.SIGTERM)
        assert await server.seconds_to_exit() < AT_ONCE_SECONDS_MAX


@pytest.mark.long
@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_client_that_does_not_read_does_not_keep_it(transport: str):
    """It is cut after the turns' time and that of the last words; exit code 0, and no traceback."""
    drain_seconds = 0.3
    async with (
        listening(flood) as url,
        served(url, drain_seconds_max=drain_seconds) as server,
        not_reading(server, transport),
    ):
        await server.stop()
        assert await server.seconds_to_exit() < drain_seconds + LAST_WORDS_SECONDS_MAX + AT_ONCE_SECONDS_MAX


async def test_a_slow_client_that_still_writes_gets_all_of_its_turn():
    """What it says meanwhile, unread, does not reset its connection before it has read the end."""
    text = "x" * 2000

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(100):
            await response.write(_chunk({"content": text}))
        await response.write(_chunk({}, "stop") + b"data: [DONE]\n\n")
        return response

    async with listening(answer) as url, served(url) as server, blocked_client(server) as socket:
        await socket.create()
        await asyncio.sleep(0.5)
        server.process.send_signal(signal.SIGTERM)
        for _ in range(10):
            await asyncio.sleep(0.1)
            await socket.send(type="response.processed", response_id="resp_x")
        frames, code = await until_closed(socket)
        await server.seconds_to_exit()
    assert (frames[-1]["type"], code) == ("response.completed", GOING_AWAY)
    assert text_of(frames[-1]["response"]) == text * 100
