"""One turn of an engine in front of a server of bytes."""

import asyncio
from contextlib import aclosing, asynccontextmanager

import msgspec
import pytest

from engines.fake_upstream import fake_upstream
from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from openline.engines.engine import EngineRequest
from openline.protocol.errors import ProtocolError
from openline.protocol.events import read_http_create, read_input
from openline.state.context import EMPTY

TURN_SECONDS_MAX = 20.0  # far above what any of them takes
CANARY = "my CANARY prompt that nobody else may read"
CHUNKS = [
    b'{"choices":[{"index":0,"delta":{"content":"a"}}]}',
    b'{"choices":[{"index":0,"delta":{"content":"b"}}]}',
    b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}',
    b"[DONE]",
]


@asynccontextmanager
async def engine_for(url, *, show_detail=True, **settings):
    engine = ChatEngine(UpstreamSettings(name="gpu-1", url=url, profile="generic", **settings), show_detail=show_detail)
    try:
        yield engine
    finally:
        await engine.close()


def generation(engine, text=CANARY):
    create = read_http_create(msgspec.json.encode({"model": "m", "input": text}))
    return engine.prepare(EngineRequest(create, b"", EMPTY.extend(read_input(create)), "m"))


async def played(engine, text=CANARY):
    """Every batch of one turn."""
    async with asyncio.timeout(TURN_SECONDS_MAX), aclosing(generation(engine, text).stream()) as batches:
        return [list(batch) async for batch in batches]


async def collect(batches, seen):
    async with asyncio.timeout(TURN_SECONDS_MAX):
        async for batch in batches:
            seen.extend(batch)


async def failed(script, *, ssl_context=None, sent=1, **settings):
    """The error that a turn ends in, and the batches before it; the upstream gets at most `sent` requests."""
    seen = []
    async with fake_upstream(script, ssl=ssl_context) as fake, engine_for(fake.url, **settings) as engine:
        async with aclosing(generation(engine).stream()) as batches:
            with pytest.raises(ProtocolError) as caught:
                await collect(batches, seen)
        assert len(fake.exchanges) <= sent
    assert "gpu-1" in caught.value.message
    return caught.value, seen


async def whole_stream(exchange):
    await exchange.begin()
    for chunk in CHUNKS:
        await exchange.event(chunk)
    await exchange.end()


def refuse(status, body=b"", *fields):
    async def script(exchange):
        await exchange.answer(status, body, *fields)

    return script
