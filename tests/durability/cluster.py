"""A PostgreSQL server of the test's own, which can be stopped in the middle of anything and started again."""

from __future__ import annotations

import asyncio
import os
import pwd
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
# Nothing outlives the test, and the machine does not fail in it: the server's crash is what counts.
_SETTINGS = """
listen_addresses = '127.0.0.1'
port = {port}
unix_socket_directories = ''
fsync = off
shared_buffers = 16MB
"""


_HELD = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"


class Cluster:
    """One that runs, until it is stopped.

    Args:
        folder: all that it has.
        user: who it runs as, where this process is root's, as whom it does not run.
    """

    def __init__(self, folder: Path, user: str | None) -> None:
        self._folder = folder
        self._user = user
        self._tools = _BINARIES[-1].parent
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    async def make(self) -> None:
        await self._run(
            "initdb", "-D", "data", "-U", "postgres", "-A", "trust", "--no-sync", "-E", "UTF8", "--no-locale"
        )
        with (self._folder / "data" / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.write(_SETTINGS.format(port=self._port))

    async def start(self) -> None:
        """Until it takes connections, its recovery included."""
        await self._run("pg_ctl", "start", "-D", "data", "-w", "-l", "log")

    async def hold_commits(self) -> None:
        """Until some are done and not answered; only a crash sets them free.

        A commit waits for its standbys once it is on the disk, and here it has none.
        """
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'")
            await connection.execute("SELECT pg_reload_conf()")
            while not await connection.fetchval(_HELD):  # noqa: ASYNC110 - only looking tells
                await asyncio.sleep(0.01)
            await connection.execute("ALTER SYSTEM RESET synchronous_standby_names")  # for the next start
        finally:
            await connection.close()

    async def crash(self) -> None:
        """As if it had been killed: what runs there ends without a word."""
        await self._run("pg_ctl", "stop", "-D", "data", "-m", "immediate", "-w")

    async def _run(self, tool: str, *arguments: str) -> None:
        process = await asyncio.create_subprocess_exec(
            str(self._tools / tool),
            *arguments,
            cwd=self._folder,
            user=self._user,
            group=self._user and pwd.getpwnam(self._user).pw_gid,
            extra_groups=[] if self._user else None,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,  # pg_ctl leaves it to the server
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert await process.wait() == 0, f"{tool} {' '.join(arguments)}"


@asynccontextmanager
async def cluster() -> AsyncIterator[Cluster]:
    """A server that is gone afterwards; where none can be made the test is skipped, but not in CI."""
    if not _BINARIES[-1].name:
        reason = "there is no PostgreSQL here to make a server with"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    user = None if os.getuid() else "nobody"
    folder = Path(tempfile.mkdtemp(prefix="openline-postgres-"))  # tmp_path lets no other user in
    if user is not None:
        shutil.chown(folder, user)
    made = Cluster(folder, user)
    try:
        await made.make()
        await made.start()
        try:
            yield made
        finally:
            await made.crash()
    finally:
        shutil.rmtree(folder)
