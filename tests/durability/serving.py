"""`openline serve` in processes of its own, which start at once and can be killed at any moment.

They are forks of one process (`forks.py`) that has imported Openline and has done nothing else, so that a start does not
take half a second; a test of durability starts many.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from commands import environment

START_SECONDS_MAX = 20


class Nursery:
    """Starts servers.

    Args:
        folder: where each writes what it says.
    """

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._count = 0

    async def begin(self, *arguments: str) -> Server:
        """A server that starts."""
        self._count += 1
        said = self._folder / f"said-{self._count}.log"
        pid = await self._ask({"arguments": ["serve", "--port", "0", *arguments], "said": str(said)})
        return Server(self, pid, said)

    async def start(self, *arguments: str) -> Server:
        """A server that listens."""
        server = await self.begin(*arguments)
        await server.listens()
        return server

    async def gone(self, pid: int) -> int:
        """Wait until a killed process is no more; its exit code, negative if a signal ended it."""
        return await self._ask({"wait": pid})

    async def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        return int(await self._process.stdout.readline())


class Server:
    """One that runs, until it is killed."""

    def __init__(self, nursery: Nursery, pid: int, said: Path) -> None:
        self._nursery = nursery
        self._pid = pid
        self._said = said
        self.url = ""
        self.killed_at: float | None = None

    async def listens(self) -> None:
        async with asyncio.timeout(START_SECONDS_MAX):
            while not (found := re.search(r"listens on (\S+)/v1", self.says())):
                assert self.says().count("openline:") == 0, self.says()
                await asyncio.sleep(0.002)
        self.url = found[1]

    def says(self) -> str:
        """All that it has written to its terminal, its log included."""
        return self._said.read_text(encoding="utf-8") if self._said.exists() else ""

    def kill_now(self) -> None:
        """SIGKILL, if it was not killed already."""
        if self.killed_at is None:
            self.killed_at = time.time()
            os.kill(self._pid, signal.SIGKILL)

    async def kill(self) -> None:
        """SIGKILL, and wait until nothing of it is left."""
        self.kill_now()
        assert await self._nursery.gone(self._pid) == -signal.SIGKILL, self.says()

    async def stop(self) -> None:
        """SIGTERM, and wait until it has ended by itself."""
        self.killed_at = time.time()
        os.kill(self._pid, signal.SIGTERM)
        assert await self._nursery.gone(self._pid) == 0, self.says()


@asynccontextmanager
async def nursery(folder: Path, **environ: str) -> AsyncIterator[Nursery]:
    """Starts servers with this environment; those that still run at the end are killed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(Path(__file__).with_name("forks.py")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=environment(**environ),
    )
    try:
        yield Nursery(process, folder)
    finally:
        assert process.stdin
        process.stdin.close()
        await process.wait()
