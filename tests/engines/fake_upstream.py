"""A model server of bytes: real sockets on loopback, and a test decides each byte and each silence."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Exchange:
    """One request, and the connection to answer it on."""

    head: str
    body: bytes
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    closes: bool = False  # the connection is closed behind the answer, and the answer says so
    is_whole: bool = False  # the answer is, so that the connection can take another request

    async def send(self, data: bytes) -> None:
        if self.writer.is_closing():
            raise ConnectionResetError  # which uvloop says in another way
        self.writer.write(data)
        await self.writer.drain()

    async def begin(self, status: str = "200 OK", content_type: str = "text/event-stream") -> None:
        """Headers of a body in chunks."""
        await self.send(self._head(status, f"Content-Type: {content_type}", "Transfer-Encoding: chunked"))

    async def event(self, data: bytes) -> None:
        await self.send(chunked(b"data: " + data + b"\n\n"))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")
        self.is_whole = True

    async def answer(self, status: str, body: bytes, *fields: str) -> None:
        """A whole answer."""
        await self.send(self._head(status, f"Content-Length: {len(body)}", *fields) + body)
        self.is_whole = True

    def _head(self, status: str, *fields: str) -> bytes:
        return head(status, *fields, *(["Connection: close"] if self.closes else []))

    def reset(self) -> None:
        """RST instead of FIN: without a linger time, closing is a reset even where everything was read."""
        self.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def left(self) -> None:
        """Until the other side has closed the connection."""
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


def head(status: str, *fields: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *fields, "", ""]).encode()


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@dataclass
class FakeUpstream:
    """Answers every request by `script`; closes the connection when that returns, unless `keep_alive` and it is whole."""

    script: Callable[[Exchange], Awaitable[None]]
    keep_alive: bool = False
    exchanges: list[Exchange] = field(default_factory=list)
    connections: int = 0
    open: set[asyncio.StreamWriter] = field(default_factory=set)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(writer)
        try:
            await self._requests(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away
        finally:
            self.open.discard(writer)
            writer.close()

    def hang_up(self) -> None:
        """Close every connection, those too that wait for another request."""
        for writer in self.open:
            writer.close()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            first = await reader.readexactly(1)
            if first == b"\x16":  # a TLS handshake, where HTTP was expected
                writer.write(head("400 Bad Request", "Content-Length: 0"))
                return
            request = (first + await reader.readuntil(b"\r\n\r\n")).decode()
            lengths = [
                line.partition(":")[2] for line in request.splitlines() if line.lower().startswith("content-length")
            ]
            body = await reader.readexactly(int(lengths[0])) if lengths else b""
            exchange = Exchange(request, body, reader, writer, closes=not self.keep_alive)
            self.exchanges.append(exchange)
            await self.script(exchange)
            if not self.keep_alive or not exchange.is_whole:
                return


@asynccontextmanager
async def fake_upstream(script, *, keep_alive=False, ssl=None):
    """A server that runs while the block does."""
    fake = FakeUpstream(script, keep_alive)
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader, writer):
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with suppress(asyncio.CancelledError):
            await fake.serve(reader, writer)
        serving.discard(task)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=ssl)
    scheme = "https" if ssl else "http"
    fake.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield fake
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
