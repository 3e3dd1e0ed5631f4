"""A small Responses server that is not ours, on real sockets: no keys, no resuming, no header that says who it is."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from openline.protocol.transcript import read_lines

TRANSCRIPT = Path(__file__).parent.parent / "transcripts" / "text.jsonl"


class PlainServer:
    """Plays one transcript for every create.

    Attributes:
        asked: every create that came, over whichever way.
        cut_after: end the connection after so many events of a turn.
        upgrades: whether it has WebSocket mode; without it the status of its answer.
    """

    def __init__(self) -> None:
        lines = read_lines(TRANSCRIPT.read_text(encoding="utf-8"))
        self.events: list[dict[str, Any]] = [line.frame for line in lines if line.dir == "<"]
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.cut_after: int | None = None
        self.upgrades: int | None = None
        self.sockets = 0
        self.url = ""

    @asynccontextmanager
    async def run(self) -> AsyncIterator[PlainServer]:
        app = web.Application()
        app.add_routes([web.post("/v1/responses", self._post), web.get("/v1/responses", self._get)])
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        try:
            yield self
        finally:
            await runner.cleanup()

    def _turn(self) -> list[dict[str, Any]]:
        text = json.dumps(self.events).replace("resp_1", f"resp_{len(self.asked)}")
        return json.loads(text)[: self.cut_after]

    async def _post(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        self.headers.append(request.headers)
        answer = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await answer.prepare(request)
        for event in self._turn():
            await answer.write(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode())
        if self.cut_after is not None:
            request.transport.abort()
        return answer

    async def _get(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("upgrade") != "websocket":
            raise web.HTTPMethodNotAllowed("GET", ["POST"])
        if self.upgrades is not None:
            return web.Response(status=self.upgrades)
        self.sockets += 1
        self.headers.append(request.headers)
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            self.asked.append(json.loads(message.data))
            for event in self._turn():
                await socket.send_str(json.dumps(event))
            if self.cut_after is not None:
                await asyncio.sleep(0)
                request.transport.abort()
        return socket
