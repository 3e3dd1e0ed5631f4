"""uvicorn's WebSocket protocol, with one ASGI message more: several events in one write.

One read from an upstream brings many small events. Framed and written one by one they
cost more than everything else that happens to them; as the frames of one write they do not.

Source: RFC 6455 §5.2, "Base Framing Protocol"; a server's frames are not masked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, cast

from uvicorn.protocols.utils import ClientDisconnected
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.http11 import Request

# The ASGI message `{"type": MESSAGE, "events": [bytes, …]}`, and the extension that says it is understood.
MESSAGE: Final = "openline.events"
CUT: Final = "openline.cut"  # the ASGI message that ends the connection now, whatever the peer has still to read
LAST_WORDS_SECONDS_MAX: Final = 5.0  # for a peer to read the last that it is told, and to close its side
_TEXT: Final = 0x81  # a final text frame


def text_frame(payload: bytes) -> bytes:
    """A whole text message as one unmasked frame."""
    size = len(payload)
    if size < 126:
        return bytes((_TEXT, size)) + payload
    if size < 65536:
        return bytes((_TEXT, 126, size >> 8, size & 0xFF)) + payload
    return bytes((_TEXT, 127)) + size.to_bytes(8, "big") + payload


class EventsProtocol(WebSocketsSansIOProtocol):
    """Takes `MESSAGE` and `CUT` beside the messages of ASGI."""

    _heard_at = 0.0  # when the peer's last bytes came

    def data_received(self, data: bytes) -> None:
        """Bytes of the peer's."""
        self._heard_at = self.loop.time()
        super().data_received(data)

    def handle_connect(self, event: Request) -> None:
        """Say in the scope that the message is understood; its task runs only after this."""
        super().handle_connect(event)
        if self.handshake_initiated and not self.close_sent:
            cast("dict[str, Any]", self.scope)["extensions"][MESSAGE] = {}

    async def send(self, message: Any) -> None:
        """One ASGI message.

        Raises:
            ClientDisconnected: the peer has gone, or the socket is closing.
        """
        if message["type"] == CUT:
            self.transport.abort()
            return
        if message["type"] != MESSAGE:
            await super().send(message)
            return
        await self.writable.wait()
        if self.disconnected or self.close_sent:
            raise ClientDisconnected
        self.transport.write(self._framed(message["events"]))
        if not self.writable.is_set():
            await self.writable.wait()  # what a slow client has not taken counts as not delivered

    def keepalive_timeout(self) -> None:
        """Close, and do not wait for ever until a peer that is gone has read that.

        A peer in the middle of a message cannot answer before its end, so as long as that goes on it is alive.
        """
        assert self.ping_timeout is not None, "else nothing calls this"
        rest = self._heard_at + self.ping_timeout - self.loop.time()
        if rest > 0 and self._is_receiving:
            self.pong_timer = self.loop.call_later(rest, self.keepalive_timeout)
            return
        super().keepalive_timeout()
        self.loop.call_later(LAST_WORDS_SECONDS_MAX, self.transport.abort)

    @property
    def _is_receiving(self) -> bool:
        """Whether a message has begun to come and is not whole: in fragments, or in one frame."""
        return bool(self.frames or self.conn.reader.buffer)

    def _framed(self, events: Iterable[bytes]) -> bytes:
        if not self.conn.extensions:
            return b"".join([text_frame(event) for event in events])
        for event in events:  # deflate keeps a state over all messages, so it has to see each
            self.conn.send_text(event)
        return b"".join(self.conn.data_to_send())
