"""A loopback relay between a client and the server, to see what the client really does on the wire.

Some clients fall back to HTTP without a word when a WebSocket fails, or resend everything when an item came
back changed. The relay moves bytes and reads along, so it tells the truth about any client.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

READ_BYTES_MAX = 65536
HEAD_BYTES_MAX = 512  # a request line may lie across two reads; no client's path is longer

CREATE = "response.create"
TERMINAL = ("response.completed", "response.failed", "response.incomplete", "error")
READ_ALONG = (CREATE, *TERMINAL)  # where turns begin and end

_REQUEST_LINE = re.compile(rb"(GET|POST|DELETE) (\S+) HTTP/1\.1\r\n")


class Frame(NamedTuple):
    """One message on the `socket`-th WebSocket: a client's create, or the server's end of a turn."""

    socket: int
    event: dict[str, Any]


@dataclass
class Relay:
    """Moves bytes to `target` and back, and keeps count of what clients did.

    `requests` are method and path of the HTTP requests, `sockets` the accepted upgrades, `frames` where turns
    began and ended on them, in order, `bytes_sent` is what clients wrote.
    """

    target: str
    requests: list[tuple[str, str]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    sockets: int = 0
    bytes_sent: int = 0
    _server: asyncio.Server | None = None
    _links: set[asyncio.Task[None]] = field(default_factory=set)

    async def start(self) -> str:
        """Listen on a free loopback port; return the target's URL with this address in it."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"http://{host}:{port}{urlsplit(self.target).path}"

    async def stop(self) -> None:
        """Close the listener and cut what is still open."""
        if self._server is not None:
            self._server.close()
        for link in self._links:
            link.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def forget(self) -> None:
        """Count from zero, for the next case."""
        self.requests, self.frames, self.sockets, self.bytes_sent = [], [], 0, 0

    def posts(self) -> int:
        """Return how many responses were asked for over plain HTTP."""
        return sum(1 for method, path in self.requests if method == "POST" and path.endswith("/responses"))

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        try:
            await _Link(self, reader, writer).run()
        except (OSError, asyncio.CancelledError):
            pass  # either side may go at any time; the client's own result says whether that mattered
        finally:
            self._links.discard(task)
            writer.close()


class Messages:
    """Reads one side's text messages out of the bytes of its frames (RFC 6455 §5.2), as they come.

    Compressed messages are passed over: the server under test does not offer compression by default.
    """

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._message = bytearray()
        self._readable = True

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take more bytes; yield the messages that are complete with them."""
        self._bytes += data
        while frame := self._next_frame():
            final, opcode, compressed, payload = frame
            if opcode >= 8:
                continue  # control frames may come in the middle of a message
            if opcode != 0:
                self._message, self._readable = bytearray(), not compressed
            self._message += payload
            if final and self._readable:
                yield bytes(self._message)

    def _next_frame(self) -> tuple[bool, int, bool, bytes] | None:
        """Take one whole frame off the buffer: final, opcode, compressed, plain payload."""
        buffer = self._bytes
        if len(buffer) < 2:
            return None
        length, start = buffer[1] & 0x7F, 2
        if length >= 126:
            start = 4 if length == 126 else 10
            length = int.from_bytes(buffer[2:start])
        masked = buffer[1] & 0x80  # a client's frames are, a server's are not
        end = start + length + (4 if masked else 0)
        if len(buffer) < end:
            return None
        payload = unmasked(bytes(buffer[start:end])) if masked else bytes(buffer[start:end])
        head = buffer[0]
        del buffer[:end]
        return bool(head & 0x80), head & 0x0F, bool(head & 0x40), payload


def unmasked(data: bytes) -> bytes:
    """Take the mask, which is the first four bytes, off a payload."""
    mask, masked = data[:4], data[4:]
    repeated = (mask * (len(masked) // 4 + 1))[: len(masked)]
    return (int.from_bytes(masked) ^ int.from_bytes(repeated)).to_bytes(len(masked))


@dataclass
class _Link:
    """One connection of a client, and the one to the server that belongs to it."""

    relay: Relay
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    socket: int = 0  # which one of the relay's, from the moment the server accepted an upgrade
    sent: Messages = field(default_factory=Messages)
    received: Messages = field(default_factory=Messages)

    async def run(self) -> None:
        """Pump until one side ends: no HTTP client closes one half only, so then there is nothing to wait for."""
        address = urlsplit(self.relay.target)
        server_reader, server_writer = await asyncio.open_connection(address.hostname, address.port or 80)
        pumps = [
            asyncio.create_task(self._pump_up(server_writer)),
            asyncio.create_task(self._pump_down(server_reader)),
        ]
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            server_writer.close()

    async def _pump_up(self, writer: asyncio.StreamWriter) -> None:
        tail = b""
        while data := await self.reader.read(READ_BYTES_MAX):
            self.relay.bytes_sent += len(data)
            if self.socket:
                self._read_along(self.sent, data)
            else:
                tail = self._read_requests(tail + data)
            writer.write(data)
            await writer.drain()

    async def _pump_down(self, reader: asyncio.StreamReader) -> None:
        first = True
        while data := await reader.read(READ_BYTES_MAX):
            if self.socket:
                self._read_along(self.received, data)
            elif first and data.startswith(b"HTTP/1.1 101 "):
                self.relay.sockets += 1
                self.socket = self.relay.sockets  # before the client can know, so all it sends from here on are frames
                self._read_along(self.received, data.partition(b"\r\n\r\n")[2])
            first = False
            self.writer.write(data)
            await self.writer.drain()

    def _read_requests(self, seen: bytes) -> bytes:
        """Note the request lines; return the end, in which another may have begun."""
        end = 0
        for line in _REQUEST_LINE.finditer(seen):
            self.relay.requests.append((line[1].decode(), line[2].decode()))
            end = line.end()
        return seen[end:][-HEAD_BYTES_MAX:]

    def _read_along(self, messages: Messages, data: bytes) -> None:
        for message in messages.feed(data):
            event = json.loads(message)
            if event.get("type") in READ_ALONG:
                self.relay.frames.append(Frame(self.socket, event))
