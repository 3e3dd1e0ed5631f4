"""A lane whose model never stops and never waits does not keep the others of its connection from ending.

Source: guarantees, "Slow consumer"; WebSocket mode guide, "Backpressure": other lanes share the pipe.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from server.closing import blocked_client
from server.listening import listening
from server.running import running

WORD = "x" * 64
SHORT_WORDS = 20
STEPS = SHORT_WORDS + 4  # in which the events of a short turn may come: at its opening, at each word, at its end
WINDOW_BYTES = 128 * 1024


def chunk(delta, reason=None):
    return f"data: {json.dumps({'choices': [{'delta': delta, 'finish_reason': reason}]})}\n\n".encode()


READ_EVENTS_MAX = 256 * 1024 / len(chunk({"content": WORD}))  # of what the network gives at once


async def answer(request):
    """Model `endless` says words as fast as they are taken; every other model a few."""
    body = await request.json()
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    try:
        while body["model"] == "endless":
            await response.write(chunk({"content": WORD}) * 100)
        for _ in range(SHORT_WORDS):
            await response.write(chunk({"content": WORD}))
            await asyncio.sleep(0)
        await response.write(chunk({}, "stop") + b"data: [DONE]\n\n")
    except ConnectionError:
        pass  # the turn was cancelled
    return response


async def read_on(socket):
    while True:
        await socket.receive()


@asynccontextmanager
async def serving(folder, **options):
    """A server in front of that model server."""
    async with listening(answer) as url:
        engine = ChatEngine(UpstreamSettings(kind="chat", url=url, profile="generic"), show_detail=True)
        async with running(folder, engine=engine, **options) as server:
            yield server


async def until_end_of(socket, lane, others_max):
    """Every message up to that lane's end; of the other lanes no more than so many."""
    frames, others = [await socket.receive()], 0
    while frames[-1]["stream_id"] != lane or not frames[-1]["type"].endswith(("completed", "failed", "incomplete")):
        frames.append(await socket.receive())
        others += frames[-1]["stream_id"] != lane
        assert others < others_max
    assert others
    return frames


async def loud(socket, lanes=1):
    """Begin turns that never end."""
    for number in range(lanes):
        await socket.create(stream_id=f"loud-{number}", model="endless", store=False)
        await socket.until("response.output_text.delta")


@pytest.fixture
async def server(tmp_path):
    """A server whose buffers hold little, so that few words pass between two steps."""
    async with serving(tmp_path, limits={"send_buffer_bytes_max": WINDOW_BYTES}, kernel_buffer_bytes=16 * 1024) as one:
        yield one


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("reader", ["fast", "slow"])
async def test_a_short_turn_ends_beside_endless_ones(server, lanes, reader):
    """It completes while they run: at each of its steps the others bring no more than a read of their upstreams' each."""
    async with blocked_client(server) as socket:
        await loud(socket, lanes)
        await socket.create(stream_id="short", model="short", store=False)
        if reader == "slow":
            await asyncio.sleep(0.2)  # every buffer is full now
        frames = await until_end_of(socket, "short", STEPS * lanes * READ_EVENTS_MAX)
        socket.connection.transport.abort()
    assert frames[-1]["type"] == "response.completed"


async def test_a_short_turn_ends_beside_an_endless_one_of_another_connection(server):
    """The same between sockets."""
    async with server.connect() as noisy, server.connect() as quiet:
        await loud(noisy)
        reading = asyncio.ensure_future(read_on(noisy))
        last = (await quiet.turn(stream_id="short", model="short", store=False))[-1]
        assert last["type"] == "response.completed"
        assert not reading.done()
        reading.cancel()
        await asyncio.wait({reading})
        noisy.connection.transport.abort()
