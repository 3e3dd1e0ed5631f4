"""A response's events as an HTTP answer.

Source: Responses streaming reference, "Server-sent events".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final

from openline.protocol import sse
from openline.protocol.errors import ProtocolError
from openline.server.asgi import HeaderList, Send, answer_headers
from openline.turns.log import ReaderLagged

# uvicorn waits for a slow client before it takes a piece, not after; behind a piece above its high-water mark an
# empty one waits, so that the log is told of bytes as delivered that have gone.
_UNDRAINED_BYTES_MAX: Final = 64 * 1024
_HEADERS: Final[HeaderList] = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
]


async def send_event_stream(
    send: Send,
    read: Callable[[], Awaitable[Sequence[bytes]]],
    request_id: str,
    headers: Callable[[], Sequence[tuple[bytes, bytes]]] = tuple,
    *,
    may_be_refused: bool = False,
) -> None:
    """Send what `read` gives, until it gives nothing.

    A stream that ends without `[DONE]` was too slow for what is kept: its client can ask for the rest again.

    Args:
        headers: asked for when the status goes out.
        may_be_refused: whether the first events are waited for before that, as an error may come in their place.

    Raises:
        ProtocolError: of the first `read`: nothing was sent yet.
    """
    events = await _first(read) if may_be_refused else ()
    every = answer_headers(request_id, [*_HEADERS, *headers()])
    await send({"type": "http.response.start", "status": 200, "headers": every})
    try:
        events = events or await read()
        while events:
            for body in _pieces(events):
                await send({"type": "http.response.body", "body": body, "more_body": True})
                if len(body) > _UNDRAINED_BYTES_MAX:
                    await send({"type": "http.response.body", "body": b"", "more_body": True})
            events = await read()
    except ReaderLagged:
        await send({"type": "http.response.body", "body": b""})
    else:
        await send({"type": "http.response.body", "body": sse.DONE})


async def _first(read: Callable[[], Awaitable[Sequence[bytes]]]) -> Sequence[bytes]:
    try:
        return await read()
    except ReaderLagged as lagged:
        raise ProtocolError("resume_window_exceeded", str(lagged)) from None


def _pieces(events: Sequence[bytes]) -> Iterator[bytes]:
    """Events as they go out: together, but never so many that a slow client's buffer holds all of a long response."""
    piece: list[bytes] = []
    size = 0
    for event in events:
        piece.append(sse.encode(event))
        size += len(event)
        if size > _UNDRAINED_BYTES_MAX:
            yield b"".join(piece)
            piece, size = [], 0
    if piece:
        yield b"".join(piece)
