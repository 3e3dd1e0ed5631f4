"""A server that can die: the real app, registry, memory and SQLite file, on a disk that takes its time.

`kill` is what `kill -9` is: what was committed stays, everything else is gone, and nobody is told. `drain` is SIGTERM.
"""

from __future__ import annotations

import asyncio
import inspect
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from openline.config import Config, UpstreamSettings
from openline.engines.router import Router, Upstream
from openline.server.runner import build
from openline.state.opening import open_store
from openline.state.store import Store, StoreUnavailable
from openline.turns.leases import keep_leases
from simulation.model import Witness
from virtual_time import VirtualTimeLoop

_SEEK_SECONDS_MAX = 0.5
_UNIX_TIME = 1_760_000_000


class Hook:
    def turn_ended(self, details: object) -> None:
        """Nobody listens."""


class Disk:
    """The real store, one call after another, each with a pause before and behind it in which a crash may fall."""

    def __init__(self, store: Store, loop: VirtualTimeLoop, rng: random.Random) -> None:
        self.is_dead = False
        self._store = store
        self._loop = loop
        self._random = rng
        self._arm = asyncio.Lock()
        self._seeks: set[asyncio.Task[Any]] = set()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if not inspect.iscoroutinefunction(method):
            return method

        async def call(*args: Any, **options: Any) -> Any:
            seek = self._loop.create_task(self._seek(lambda: method(*args, **options)))
            self._seeks.add(seek)
            seek.add_done_callback(self._forget)
            return await asyncio.shield(seek)  # a caller that leaves does not take its write along

        return call

    async def _seek(self, call: Any) -> Any:
        async with self._arm:
            await self._pause()
            with self._loop.outside():
                result = await call()
            await self._pause()
            return result

    def _forget(self, seek: asyncio.Task[Any]) -> None:
        self._seeks.discard(seek)
        seek.exception()  # a caller that has left does not ask

    async def _pause(self) -> None:
        await asyncio.sleep(self._random.random() * _SEEK_SECONDS_MAX)
        if self.is_dead:
            raise StoreUnavailable("its process is gone")

    async def crash(self) -> None:
        """Nothing reaches it any more, and nobody hears from it."""
        self.is_dead = True
        await asyncio.gather(*self._seeks, return_exceptions=True)
        with self._loop.outside():
            await self._store.close()


class World:
    """One server process after another, over one database file.

    Args:
        config: of every process.
        engine: the model server, which outlives them.
        seed: of the disk's times, and of ids.
    """

    def __init__(self, config: Config, database: Path, engine: Witness, seed: int) -> None:
        self.config = config
        self.engine = engine
        self.is_up = False
        self.served: dict[asyncio.Task[None], None] = {}  # connections, by their ASGI task, in the order they came
        self._database = database
        self._random = random.Random(seed)
        self._loop = asyncio.get_running_loop()
        self._background: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """A new process: it finds what the one before has committed."""
        assert isinstance(self._loop, VirtualTimeLoop)
        self.disk = Disk(open_store(f"sqlite:{self._database}"), self._loop, self._random)
        router = Router([Upstream(UpstreamSettings(kind="scripted"), self.engine)])
        self.app, self.registry = build(
            self.config, router, self.disk, Hook(), unix_time=self._unix_time, new_id=self._new_id
        )
        self._background = [self._loop.create_task(keep_leases(self.registry.held, self.registry.parts))]
        self.engine.process += 1
        self.is_up = True

    def is_committed(self, response_id: str) -> bool:
        """Whether a response's end is on the disk, as another process would read it."""
        with closing(sqlite3.connect(f"{self._database.as_uri()}?mode=ro", uri=True)) as connection:
            query = "SELECT 1 FROM turns WHERE response_id = ? AND lease_until IS NULL"
            return connection.execute(query, (response_id,)).fetchone() is not None

    def serve(self, scope: dict[str, Any], receive: Any, send: Any) -> asyncio.Task[None]:
        """One connection or request reaches the process."""
        task = self._loop.create_task(self.app(scope, receive, send))
        self.served[task] = None
        task.add_done_callback(self.served.pop)
        return task

    async def kill(self) -> None:
        """The process is gone at once; its connections learn of it in their own time."""
        self.is_up = False
        self.disk.is_dead = True  # before anything is cancelled: what it does then, it only does to itself
        turns = list(self.registry._turns)  # a process that dies does not ask
        for task in (*self.served, *turns, *self._background):
            task.cancel()
        await asyncio.gather(*self.served, *turns, *self._background, return_exceptions=True)
        await self.registry.close()
        await self.disk.crash()

    async def drain(self) -> None:
        """Let what runs end, close every socket, then stop."""
        hurry = asyncio.Event()
        await self.app.drain(hurry)
        self.is_up = False
        await _ended(*self.served)
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.registry.close()
        await self.disk.crash()

    def _unix_time(self) -> float:
        return _UNIX_TIME + self._loop.time()

    def _new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._random.getrandbits(192):048x}"


async def _ended(*tasks: asyncio.Task[None]) -> None:
    if tasks:
        await asyncio.wait(tasks)
