"""A client behind a transport that takes nothing while the test holds it up: the ASGI server's place, for exact moments."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from openline.server import frames
from server.running import WAIT_SECONDS_MAX, Running, Socket, until


class SlowLine(Socket):
    """A socket of the server's app, without a network between."""

    def __init__(self, server: Running) -> None:
        self.states: list[tuple[str, int | None]] = []  # accepted, closed with a code
        self.takes = asyncio.Event()
        self.takes.set()
        self._held_up_behind = ""
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {"type": "websocket", "path": "/v1/responses", "headers": [(b"host", b"localhost")]}
        self.serving = asyncio.ensure_future(server.app(scope, self._inbox.get, self._take))

    async def send(self, **frame: Any) -> None:
        self._inbox.put_nowait({"type": "websocket.receive", "text": json.dumps(frame)})

    async def receive(self) -> dict[str, Any]:
        return await asyncio.wait_for(self._events.get(), WAIT_SECONDS_MAX)

    async def is_read(self) -> None:
        """Wait until the server has taken all that was sent, and acted on it as far as it can."""
        await until(self._inbox.empty)
        for _ in range(10):
            await asyncio.sleep(0)

    def hold_up(self, behind: str) -> None:
        """Take nothing any more once an event of this type has come."""
        self._held_up_behind = behind

    async def close(self) -> None:
        """Go; what the server does for it must end."""
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": 1005})
        await asyncio.wait_for(self.serving, WAIT_SECONDS_MAX)

    async def _take(self, message: dict[str, Any]) -> None:
        await self.takes.wait()
        if message["type"] == frames.MESSAGE:
            for event in message["events"]:
                self._events.put_nowait(json.loads(event))
                if json.loads(event)["type"] == self._held_up_behind:
                    self.takes.clear()
            return
        self.states.append((message["type"], message.get("code")))
        if message["type"] == "websocket.close":  # as uvicorn tells of our own close, and of the client's answer
            for code in (message["code"], 1005):
                self._inbox.put_nowait({"type": "websocket.disconnect", "code": code})
