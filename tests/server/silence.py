"""A proxy on the way to the server that gives up connections on which the client gets no data, as many do."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_BYTES_MAX = 65536


@asynccontextmanager
async def impatient_proxy(address: str, silence_seconds_max: float) -> AsyncIterator[str]:
    """Its own address. Once the server has begun to answer, each silence of its is measured; the client's is not."""
    host, port = address.split(":")
    writers: list[asyncio.StreamWriter] = []
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port))
        writers.extend((writer, far_writer))
        forth = asyncio.ensure_future(_carry(reader, far_writer, None))
        await _carry(far_reader, writer, silence_seconds_max)
        writer.transport.abort()
        far_writer.transport.abort()
        await forth

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.ensure_future(serve(reader, writer)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    try:
        proxy_host, proxy_port = server.sockets[0].getsockname()
        yield f"{proxy_host}:{proxy_port}"
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.gather(*serving)


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, silence_seconds_max: float | None) -> None:
    with suppress(TimeoutError, ConnectionError):
        data = await reader.read(_BYTES_MAX)
        while data:
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(silence_seconds_max):
                data = await reader.read(_BYTES_MAX)
