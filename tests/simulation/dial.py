"""How a session reaches the simulated network: its `Dial`, over the app's own ASGI instead of sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from openline.client.wire import DialFailed, DialRefused, LineClosed
from openline.protocol import sse
from openline.server import frames
from simulation.network import Connection, Network

_ANSWER_BYTES_MAX = 64 * 1024 * 1024


class Lost:
    """What a client's end takes out of a connection that was cut."""


class SimulatedDial:
    """Reaches the server that is up now, if one is."""

    def __init__(self, network: Network) -> None:
        self._network = network

    async def open_socket(self, headers: Mapping[str, str]) -> SimulatedLine:
        connection = await self._connect("websocket", "GET", "/responses", headers, {"extensions": _EXTENSIONS})
        try:
            start = await connection.to_client.get()
            match start["type"] if isinstance(start, dict) else "lost":
                case "websocket.accept":
                    return SimulatedLine(connection, _read_headers(start))
                case "websocket.http.response.start":
                    body = await connection.to_client.get()
                    raise DialRefused(
                        start["status"], _read_headers(start), body["body"] if isinstance(body, dict) else b""
                    )
            raise DialFailed("the connection ended before the upgrade was answered", reached=True)
        except BaseException:
            connection.close()
            raise

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> SimulatedAnswer:
        return await self._request("POST", path, headers, body)

    async def get(self, path: str, headers: Mapping[str, str]) -> SimulatedAnswer:
        return await self._request("GET", path, headers, b"")

    async def close(self) -> None:
        """Nothing is pooled."""

    async def _request(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> SimulatedAnswer:
        connection = await self._connect("http", method, path, headers, {"method": method})
        connection.send({"type": "http.request", "body": body})
        try:
            start = await connection.to_client.get()
        except BaseException:
            connection.close()
            raise
        if not isinstance(start, dict):
            raise LineClosed(None, "cut before it was answered")
        return SimulatedAnswer(connection, start["status"], _read_headers(start))

    async def _connect(
        self, kind: str, method: str, path: str, headers: Mapping[str, str], more: dict[str, Any]
    ) -> Connection:
        await asyncio.sleep(self._network.delay())
        if not self._network.world.is_up:
            raise DialFailed("nobody listens")
        path, _, query = path.partition("?")
        scope = {
            "type": kind,
            "path": f"/v1{path}",
            "raw_path": f"/v1{path}".encode(),
            "root_path": "",
            "scheme": "http",
            "query_string": query.encode(),
            "headers": [(b"host", b"127.0.0.1"), *((name.encode(), value.encode()) for name, value in headers.items())],
            **more,
        }
        return Connection(self._network, scope, Lost())


class SimulatedLine:
    """An open WebSocket."""

    def __init__(self, connection: Connection, headers: Mapping[str, str]) -> None:
        self.headers = headers
        self._connection = connection
        self._texts: list[str] = []
        self._closed: LineClosed | None = None

    async def send(self, text: str) -> None:
        if self._closed is not None:
            raise self._closed
        self._connection.send({"type": "websocket.receive", "text": text})

    async def receive(self) -> str:
        while not self._texts:
            if self._closed is not None:
                raise self._closed
            self._take(await self._connection.to_client.get())
        return self._texts.pop(0)

    async def close(self) -> None:
        self._connection.close()
        self._closed = self._closed or LineClosed(1000, "")

    def _take(self, message: Any) -> None:
        if not isinstance(message, dict):
            self._closed = LineClosed(1006, "cut")
        elif message["type"] == frames.MESSAGE:
            self._texts += [event.decode() for event in message["events"]]
        elif message["type"] == "websocket.close":
            self._connection.close()  # the closing handshake's second half
            self._closed = LineClosed(message.get("code", 1000), message.get("reason") or "")


class SimulatedAnswer:
    """An HTTP answer."""

    def __init__(self, connection: Connection, status: int, headers: Mapping[str, str]) -> None:
        self.status = status
        self.headers = headers
        self._connection = connection

    async def events(self) -> AsyncIterator[bytes]:
        decoder = sse.Decoder(_ANSWER_BYTES_MAX)
        async with aclosing(self._chunks()) as chunks:
            async for chunk in chunks:
                for data in decoder.feed(chunk):
                    yield data
        for data in decoder.end():
            yield data

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self._chunks()])

    async def close(self) -> None:
        self._connection.close()

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            message = await self._connection.to_client.get()
            if not isinstance(message, dict):
                raise LineClosed(None, "cut")
            yield message.get("body", b"")
            if not message.get("more_body"):
                return


_EXTENSIONS: dict[str, Any] = {"websocket.http.response": {}, frames.MESSAGE: {}}


def _read_headers(message: Mapping[str, Any]) -> dict[str, str]:
    return {name.decode().lower(): value.decode("latin-1") for name, value in message.get("headers") or ()}
