"""A session's ways to its server: at most one open socket, and HTTP; and what is known of the server from its answers."""

from __future__ import annotations

import asyncio
from typing import Final, Literal

from openline.client.settings import ClientSettings, Transport
from openline.client.socket import Socket
from openline.client.wire import Dial, Headers

Over = Literal["websocket", "http"]
VERSION_HEADER: Final = "openline-version"  # a server that sends it knows idempotency keys and resuming


class Connections:
    """The socket and HTTP.

    Args:
        headers: of every request, with the key.
        transport: which of them the app wants.

    Attributes:
        has_extensions: whether the server knows idempotency keys and resuming; None until it has answered once.
        had_socket: whether a socket was open before.
    """

    def __init__(self, dial: Dial, headers: Headers, transport: Transport, settings: ClientSettings) -> None:
        self._dial = dial
        self._headers = headers
        self._transport = transport
        self._settings = settings
        self._socket: Socket | None = None
        self._no_socket_until: float | None = None  # by the loop's clock
        self.has_extensions: bool | None = None
        self.had_socket = False

    def __repr__(self) -> str:
        return f"<Connections {self._transport} {self._socket!r} extensions={self.has_extensions}>"

    @property
    def dial(self) -> Dial:
        """What reaches the server."""
        return self._dial

    @property
    def headers(self) -> Headers:
        """Those of every request."""
        return self._headers

    @property
    def may_fall_back(self) -> bool:
        """Whether HTTP may stand in for a socket."""
        return self._transport == "auto"

    @property
    def holds(self) -> str | None:
        """The response that the open socket's memory holds at the other end."""
        return self._socket.holds if self._socket is not None and self._is_usable(self._socket) else None

    def over(self, *, loops: bool, in_background: bool = False) -> Over:
        """What a create uses.

        Args:
            loops: it is one of several.
            in_background: it is a background turn, which WebSocket mode does not have.

        Source: WebSocket mode guide: generate once over HTTP, loop over a socket.
        """
        if in_background or self._transport == "http":
            return "http"
        if self._transport == "websocket":
            return "websocket"
        if self._no_socket_until is not None and self._now() < self._no_socket_until:
            return "http"
        return "websocket" if loops else "http"

    async def socket(self) -> Socket:
        """The open socket; a new one if there is none, or if it is nearly as old as servers let it get.

        Raises:
            DialRefused: the upgrade was refused.
            DialFailed: no connection came about.
        """
        if self._socket is not None and self._is_usable(self._socket):
            return self._socket
        await self.drop_socket()
        line = await self._dial.open_socket(self._headers)
        self.note(101, line.headers)
        self._socket = Socket(line, self._settings)
        self.had_socket = True
        return self._socket

    async def drop_socket(self) -> None:
        """Close the socket, if one is open."""
        socket, self._socket = self._socket, None
        if socket is not None:
            await socket.close()

    def refuse_socket(self, status: int | None) -> None:
        """No socket is to be had: use HTTP, and for how long.

        A server that says 426 means it. Anything else may be a proxy's word of the moment.

        Args:
            status: of the answer to the upgrade; None if there was none.

        Source: RFC 9110 §15.5.22; WebSocket mode guide, "Rejecting".
        """
        self._no_socket_until = float("inf") if status == 426 else self._now() + self._settings.socket_retry_seconds

    def note(self, status: int, headers: Headers) -> None:
        """Learn from an answer whether the server has the extensions.

        A proxy before the server answers in its place when something is wrong; that says nothing about the server.
        """
        if VERSION_HEADER in headers:
            self.has_extensions = True
        elif status < 300 or (status < 500 and self.has_extensions is None):
            self.has_extensions = False

    async def close(self) -> None:
        """Close everything."""
        await self.drop_socket()
        await self._dial.close()

    def _is_usable(self, socket: Socket) -> bool:
        return socket.is_open and self._now() - socket.opened_at < self._settings.connection_seconds_max

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
