"""Every create is sent twice, and run once.

Source: guarantees, "Idempotent turns": 10 000 duplicate pairs, concurrent and one after the other, one upstream call each.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from functools import partial
from itertools import cycle

import pytest

from openline.config import UpstreamSettings
from openline.engines.engine import EngineRequest, Generation
from openline.engines.scripted import ScriptedEngine
from server.running import Running, Socket

LANES = 16  # as many at once on a connection


class Counting(ScriptedEngine):
    """Counts how often it was asked for each key."""

    def __init__(self) -> None:
        super().__init__(UpstreamSettings(kind="scripted"))
        self.calls: Counter[str] = Counter()

    def prepare(self, request: EngineRequest) -> Generation:
        self.calls[request.create.idempotency_key or ""] += 1
        return super().prepare(request)


Create = Callable[[int], Awaitable[str]]  # which of the pair it is: the response's id


class Client:
    """Sends creates over two sockets, each lane of which has one at a time, and over HTTP."""

    def __init__(self, server: Running, sockets: list[Socket], *, stores: bool) -> None:
        self._server = server
        self._stores = stores
        self._sockets = sockets
        self._waiting: dict[tuple[int, str], asyncio.Future[str]] = {}
        self._readers = [asyncio.ensure_future(self._read(number)) for number in range(len(sockets))]

    async def over_websocket(self, lane: int, key: str, which: int) -> str:
        stream_id = str(lane)
        ended = self._waiting[which, stream_id] = asyncio.get_running_loop().create_future()
        await self._sockets[which].create(idempotency_key=key, stream_id=stream_id, store=self._stores)
        return await ended

    async def over_http(self, _: int, key: str, which: int) -> str:
        answer = await self._server.post(idempotency_key=key, stream=which == 0, store=self._stores)
        assert answer.status == 200, answer.body
        return (answer.events[-1]["response"] if which == 0 else answer.json)["id"]

    async def over_both(self, lane: int, key: str, which: int) -> str:
        return await (self.over_websocket if which else self.over_http)(lane, key, which)

    async def _read(self, number: int) -> None:
        while True:
            frame = json.loads(await self._sockets[number].connection.recv())
            if frame["type"] == "response.completed":
                self._waiting.pop((number, frame["stream_id"])).set_result(frame["response"]["id"])
            assert frame["type"] not in {"error", "response.failed"}, frame

    async def close(self) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)


async def one_after_the_other(create: Create) -> None:
    first = await create(0)
    assert await create(1) == first


async def at_once(create: Create) -> None:
    first, second = await asyncio.gather(create(0), create(1))
    assert first == second


@pytest.mark.parametrize("pairs", [(100, 900), pytest.param((1000, 9000), marks=pytest.mark.long)], ids=sum)
@pytest.mark.parametrize("stores", [True, False], ids=["stored", "unstored"])
async def test_of_every_pair_one_is_run(start, pairs, stores):
    """Stored, or held only in memory; over sockets, HTTP and both; at once and one after the other."""
    pairs = pairs[0] if stores else pairs[1]
    engine = Counting()
    server = await start(engine=engine)
    async with AsyncExitStack() as stack:
        sockets = [await stack.enter_async_context(server.connect(max_queue=None)) for _ in range(2)]
        client = Client(server, sockets, stores=stores)
        ways = cycle(
            (way, sending)
            for sending in (at_once, one_after_the_other)
            for way in (client.over_websocket, client.over_http, client.over_both)
        )
        todo = [(f"key-{number}", *next(ways)) for number in range(pairs)]

        async def work(lane: int) -> None:
            while todo:
                key, way, sending = todo.pop()
                await sending(partial(way, lane, key))

        await asyncio.gather(*map(work, range(LANES)))
        await client.close()
    assert len(engine.calls) == pairs
    assert set(engine.calls.values()) == {1}
