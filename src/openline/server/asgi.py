"""The few ASGI shapes that the hot path writes itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, MutableMapping
from contextlib import suppress
from typing import Any, Final

import msgspec

import openline
from openline.protocol.errors import ProtocolError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]

_VERSION: Final = openline.__version__.encode()


def answer_headers(request_id: str, extra: Iterable[tuple[bytes, bytes]] = ()) -> HeaderList:
    """The headers of every answer: which server this is, and the request's id for the log."""
    return [(b"openline-version", _VERSION), (b"x-request-id", request_id.encode()), *extra]


async def send_json(
    send: Send, status: int, body: bytes, headers: HeaderList, *, prefix: str = "http.response"
) -> None:
    """One whole JSON answer.

    Args:
        prefix: `websocket.http.response` where a WebSocket upgrade is refused.
    """
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *headers]
    await send({"type": f"{prefix}.start", "status": status, "headers": headers})
    await send({"type": f"{prefix}.body", "body": body})


def error_headers(error: ProtocolError) -> dict[str, str]:
    """The headers of an error's answer. SDKs repeat what got a 409 unless they are told that it will not change."""
    if error.status == 409 and "retry-after" not in error.headers:
        return {**error.headers, "x-should-retry": "false"}
    return error.headers


async def send_error(send: Send, error: ProtocolError, request_id: str, *, prefix: str = "http.response") -> None:
    """An error as the JSON envelope, with its status and its headers."""
    extra = [(name.encode(), value.encode("latin-1")) for name, value in error_headers(error).items()]
    body = msgspec.json.encode(error.envelope())
    await send_json(send, error.status, body, answer_headers(request_id, extra), prefix=prefix)


async def read_body(receive: Receive, bytes_max: int, *, declared: int = 0) -> bytes:
    """A request's whole body.

    Args:
        bytes_max: the most that is taken.
        declared: what its `Content-Length` says, 0 if it says nothing; too much is refused before it is sent.

    Raises:
        ProtocolError: it is larger than `bytes_max`.
        ClientGone: the client left before it was whole.
    """
    chunks: list[bytes] = []
    size = 0
    while declared <= bytes_max:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > bytes_max:
            break
        chunks.append(chunk)
        if not message.get("more_body"):
            return b"".join(chunks)
    raise ProtocolError("message_too_big", f"The body is larger than {bytes_max} bytes.")


class ClientGone(Exception):  # noqa: N818 - a state of the peer
    """The client closed its side."""


async def until_gone(receive: Receive, answering: Coroutine[object, object, None]) -> None:
    """Answer, unless the client goes first: then nothing is left to read a turn, and it is abandoned."""
    answer = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not answer.done():
            answer.cancel()
            await asyncio.wait({answer})
    if not answer.cancelled():
        with suppress(OSError):  # a write to a client that has just gone
            answer.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
