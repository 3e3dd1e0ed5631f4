"""A proxy in front of a server that cuts connections, each after so many bytes, and a bare client that comes back.

The client knows no library: it takes the bytes as they come, so that it has of a cut stream what is whole and no more.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, NamedTuple

How = Literal["fin", "rst", "half"]
WAIT_SECONDS_MAX = 10.0
_READ_BYTES = 65536


class Cut(NamedTuple):
    """Where a connection ends.

    Attributes:
        after: how many bytes of this way pass.
        how: closed, reset, or closed for the client only, while the server hears nothing of it.
        way: of the answer, or of the request.
    """

    after: int
    how: How
    way: Literal["answer", "request"] = "answer"


class Cutter:
    """The proxy. `next_cut` is for the next connection; the ones without are carried as they are."""

    def __init__(self, server: str) -> None:
        self._host, _, port = server.partition(":")
        self._port = int(port)
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = ""
        self.next_cut: Cut | None = None
        self.on_cut: Callable[[], object] = lambda: None
        self.answered_bytes = 0  # on the latest connection

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[Cutter]:
        server = await asyncio.start_server(self._accept, self._host, 0)
        self.address = "{}:{}".format(*server.sockets[0].getsockname())
        try:
            yield self
        finally:
            server.close()
            self.drop()
            await asyncio.gather(*self._tasks)

    def drop(self) -> None:
        """Close all that is still open."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        cut, self.next_cut = self.next_cut, None
        self.answered_bytes = 0
        task = asyncio.ensure_future(self._carry_both(reader, writer, cut))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry_both(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: Cut | None) -> None:
        far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
        self._writers += (writer, far_writer)
        ends = (writer,) if cut is not None and cut.how == "half" else (writer, far_writer)

        async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter, left: int | None) -> None:
            with suppress(ConnectionError):
                while data := await source.read(_READ_BYTES):
                    self.answered_bytes += len(data) if target is writer else 0
                    target.write(data if left is None else data[:left])
                    await target.drain()
                    if left is not None and (left := max(0, left - len(data))) == 0:
                        self.on_cut()
                        break
            for end in ends:
                _close(end, reset=cut is not None and cut.how == "rst")

        answer, request = (cut.after if cut is not None and cut.way == way else None for way in ("answer", "request"))
        await asyncio.gather(carry(far_reader, writer, answer), carry(reader, far_writer, request))


def _close(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset and not writer.is_closing():
        linger = struct.pack("ii", 1, 0)  # what closes it now sends a reset
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    writer.close()


# --- The bare client


class Seen(NamedTuple):
    """What a client has got of an answer: its whole events, and whether it came to its end."""

    events: list[bytes]
    ended: bool


_ENDS = (
    b'{"type":"response.completed"',
    b'{"type":"response.incomplete"',
    b'{"type":"response.failed"',
    b'{"type":"error"',
)
_UPGRADE = (
    "GET /v1/responses HTTP/1.1\r\nHost: {}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
_POST = "POST /v1/responses HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


async def ask(
    transport: str, address: str, create: dict[str, Any], on_event: Callable[[], object] = lambda: None
) -> Seen:
    """Send a create over its own connection, and read until it has ended or broken off."""
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    events: list[bytes] = []
    try:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            reading = _over_websocket if transport == "websocket" else _over_sse
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                async for event in reading(reader, writer, address, create):
                    events.append(event)
                    on_event()
                    if event.startswith(_ENDS):
                        return Seen(events, ended=True)
        return Seen(events, ended=False)
    finally:
        writer.transport.abort()


async def _over_websocket(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, create: dict[str, Any]
) -> AsyncIterator[bytes]:
    writer.write(_UPGRADE.format(address).encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 "), head
    assert b"\r\nopenline-version: " in head.lower()
    writer.write(_masked(json.dumps({"type": "response.create", **create}).encode()))
    while True:
        first, size = await reader.readexactly(2)
        if size >= 126:
            size = int.from_bytes(await reader.readexactly(2 if size == 126 else 8), "big")
        payload = await reader.readexactly(size)
        if first & 0x0F == 1:
            yield payload


def _masked(payload: bytes) -> bytes:
    """A client's text message as one frame, with a mask of zeros. Source: RFC 6455 §5.2."""
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
    return b"\x81" + size + bytes(4) + payload


async def _over_sse(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, address: str, create: dict[str, Any]
) -> AsyncIterator[bytes]:
    body = json.dumps({**create, "stream": True}).encode()
    writer.write(_POST.format(address, len(body)).encode() + body)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        yield b'{"type":"error",' + (await reader.readexactly(length))[1:]
    rest = b""
    while chunk := int(await reader.readuntil(b"\r\n"), 16):
        rest += (await reader.readexactly(chunk + 2))[:-2]
        *whole, rest = rest.split(b"\n\n")
        for each in whole:
            data = each.partition(b"\ndata: ")[2]
            if data:
                yield data


def number_of(event: bytes) -> int:
    return json.loads(event)["sequence_number"]
