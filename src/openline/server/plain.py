"""Plain HTTP answers, as Starlette's routes give them."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from openline.server.asgi import Receive, Scope, Send, answer_headers, read_body, send_json, until_gone

# A method, a path and what answers there.
RouteList = list[tuple[str, str, Callable[[Request], Awaitable[Response]]]]


def new_request_id() -> str:
    """What the client sees as `x-request-id` and the log names."""
    return f"req_{secrets.token_hex(12)}"


async def body_of(request: Request, bytes_max: int) -> bytes:
    """A request's whole body; too much of it is refused before it is sent, where its length is said.

    Raises:
        ProtocolError: it is larger than `bytes_max`.
        ClientGone: the client left before it was whole.
    """
    declared = int(request.headers.get("content-length", "0"))
    return await read_body(request.receive, bytes_max, declared=declared)


def json_answer(value: object, status: int = 200) -> Response:
    """A value as JSON."""
    return json_bytes_answer(msgspec.json.encode(value), status)


def json_bytes_answer(body: bytes, status: int = 200) -> Response:
    """JSON that is encoded already."""
    headers = {name.decode(): value.decode() for name, value in answer_headers(new_request_id())}
    return Response(body, status, headers, "application/json")


class AnswerInTime(Response):
    """A JSON answer that takes its time; it is not waited for once its client has gone.

    Args:
        value: makes it.
    """

    def __init__(self, value: Callable[[], Awaitable[object]], request_id: str) -> None:
        super().__init__()
        self._value = value
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        del scope
        await until_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        body = msgspec.json.encode(await self._value())
        await send_json(send, 200, body, answer_headers(self._request_id))
