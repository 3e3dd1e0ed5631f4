"""A network that can fail: a TCP proxy before a server, which cuts, stalls and refuses."""

import asyncio
from contextlib import suppress
from urllib.parse import urlsplit


class Proxy:
    """Passes bytes on, both ways, as long as it is told to.

    Args:
        url: the server's; `url` of this object is the same by way of the proxy.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname, parts.port or 5432)
        self._netloc = parts.netloc
        self._url = url
        self._writers: set[asyncio.StreamWriter] = set()
        self._serving: set[asyncio.Task[None] | None] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._server: asyncio.Server | None = None
        self._port = 0
        self.connections = 0  # that were made, ever
        self.bytes = 0  # that clients have sent
        self.cut_at: bytes | None = None
        self.lost_at: bytes | None = None

    @property
    def url(self) -> str:
        user, at, _ = self._netloc.rpartition("@")
        return self._url.replace(self._netloc, f"{user}{at}127.0.0.1:{self._port}", 1)

    async def __aenter__(self):
        await self.accept()
        return self

    async def __aexit__(self, *_):
        self.flow()
        self.refuse()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def accept(self):
        """Listen, again at the same port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def refuse(self):
        """Nobody listens any more, and every connection is cut: the server has stopped."""
        self._server.close()
        self.cut()

    def cut(self):
        """Every connection ends without a word."""
        for writer in self._writers:
            writer.transport.abort()

    def cut_before(self, text: bytes):
        """Cut a connection when its client is about to send a text, and only the first one."""
        self.cut_at = text

    def lose_answer_to(self, text: bytes):
        """Cut a connection when the server answers a text, and only the first one: it has done what it was asked."""
        self.lost_at = text

    def stall(self):
        """Connections stay, new ones are taken, and no byte comes through."""
        self._flows.clear()

    def flow(self):
        self._flows.set()

    async def _serve(self, reader, writer):
        self.connections += 1
        self._serving.add(asyncio.current_task())
        try:
            there, back = await asyncio.open_connection(*self._target)
        except OSError:  # nobody listens there now, which is what the client has to see too
            writer.transport.abort()
            return
        self._writers |= {writer, back}
        answer_lost = asyncio.Event()
        try:
            await asyncio.gather(self._pass_on(reader, back, answer_lost), self._pass_back(there, writer, answer_lost))
        finally:
            self._writers -= {writer, back}
            for each in (writer, back):
                each.transport.abort()

    async def _pass_on(self, reader, writer, answer_lost):
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._flows.wait()
                self.bytes += len(data)
                if self.cut_at is not None and self.cut_at in data:
                    self.cut_at = None
                    break
                if self.lost_at is not None and self.lost_at in data:
                    self.lost_at = None
                    answer_lost.set()
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    async def _pass_back(self, reader, writer, answer_lost):
        with suppress(OSError):
            while data := await reader.read(65536):
                await self._flows.wait()
                if answer_lost.is_set():
                    break
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
