"""Counts what a session sends."""

from __future__ import annotations

from openline.client.wire import Dial, Events, Headers, Line


class CountingDial:
    """A dial as another one is, which counts.

    Attributes:
        sent_bytes: of JSON, without the headers of HTTP requests and of WebSocket frames.
    """

    def __init__(self, dial: Dial) -> None:
        self._dial = dial
        self.sent_bytes = 0

    async def open_socket(self, headers: Headers) -> Line:
        """As `Dial`."""
        return _CountingLine(await self._dial.open_socket(headers), self)

    async def post(self, path: str, body: bytes, headers: Headers) -> Events:
        """As `Dial`."""
        self.sent_bytes += len(body)
        return await self._dial.post(path, body, headers)

    async def get(self, path: str, headers: Headers) -> Events:
        """As `Dial`."""
        return await self._dial.get(path, headers)

    async def close(self) -> None:
        """As `Dial`."""
        await self._dial.close()


class _CountingLine:
    def __init__(self, line: Line, dial: CountingDial) -> None:
        self._line = line
        self._dial = dial

    @property
    def headers(self) -> Headers:
        """As `Line`."""
        return self._line.headers

    async def send(self, text: str) -> None:
        """As `Line`."""
        self._dial.sent_bytes += len(text.encode())
        await self._line.send(text)

    async def receive(self) -> str:
        """As `Line`."""
        return await self._line.receive()

    async def close(self) -> None:
        """As `Line`."""
        await self._line.close()
