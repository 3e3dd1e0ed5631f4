"""What makes a turn late: a store that takes its time, and a client that does not read."""

from __future__ import annotations

import asyncio
import socket as sockets
from typing import Any

from openline.state.sqlite import SqliteStore
from openline.state.store import StoredTurn
from server.running import Running

KERNEL_BYTES = 16 * 1024  # of each socket's buffer; Linux doubles it


class SlowStore(SqliteStore):
    """A SQLite store that keeps nothing, and finds nothing, until the test lets it."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.asked = asyncio.Event()
        self.fast = asyncio.Event()

    async def put(self, owner: str, turn: StoredTurn, **more: Any) -> None:
        self.asked.set()
        await self.fast.wait()
        await super().put(owner, turn, **more)

    async def chain(self, owner: str, response_id: str) -> list[StoredTurn] | None:
        self.asked.set()
        await self.fast.wait()
        return await super().chain(owner, response_id)


def stingy_connection(server: Running) -> sockets.socket:
    """A TCP connection that takes as little as the kernel allows before it is read; see `kernel_buffer_bytes`."""
    raw = sockets.socket()
    for option in (sockets.SO_RCVBUF, sockets.SO_SNDBUF):
        raw.setsockopt(sockets.SOL_SOCKET, option, KERNEL_BYTES)
    host, port = server.address.split(":")
    raw.connect((host, int(port)))
    raw.setblocking(False)
    return raw
