"""What a socket gets up to its very end."""

from __future__ import annotations

import asyncio
import socket as sockets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from websockets.exceptions import ConnectionClosed

from server.running import Running, Socket, until

GOING_AWAY = 1001


async def until_closed(socket: Socket) -> tuple[list[dict[str, Any]], int | None]:
    """Every message that is left, and the code that the server closes with; None if it just cut the connection."""
    frames = []
    try:
        while True:
            frames.append(await socket.receive())
    except ConnectionClosed as closed:
        return frames, closed.rcvd.code if closed.rcvd is not None else None


def told(frames: list[dict[str, Any]]) -> list[tuple[str | None, str]]:
    """Each message as its lane and its type, an error as its code, without what comes inside a response."""
    ends = {"response.completed", "response.incomplete", "response.failed"}
    return [
        (frame.get("stream_id"), frame["error"]["code"] if frame["type"] == "error" else frame["type"])
        for frame in frames
        if not frame["type"].startswith("response.") or frame["type"] in ends or ".steer." in frame["type"]
    ]


class Leftovers:
    """The tasks that a server runs for its clients."""

    def __init__(self, server: Running) -> None:
        self._server = server
        self._before = asyncio.all_tasks()

    async def gone(self) -> None:
        """Wait until nothing is left of any socket: no entry, no turn, no task."""
        await until(lambda: not self._server.app._sockets)
        await self._server.idle()
        await until(lambda: not asyncio.all_tasks() - self._before - {asyncio.current_task()})


_KERNEL_BYTES = 16 * 1024


@asynccontextmanager
async def blocked_client(server: Running) -> AsyncIterator[Socket]:
    """A socket that reads nothing unless the test does: little waits in the kernel, and one message in the client."""
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, _KERNEL_BYTES)
    host, port = server.address.split(":")
    raw.connect((host, int(port)))
    raw.setblocking(False)
    async with server.connect(sock=raw, max_queue=1) as socket:
        yield socket
