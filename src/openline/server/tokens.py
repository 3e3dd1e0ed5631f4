"""How many tokens a create would have the model read, without running it.

Source: Responses API reference, "Get input token counts".
"""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from openline.protocol.events import read_http_create
from openline.server.asgi import Receive, Scope, Send, answer_headers, read_body, send_json, until_gone
from openline.server.guard import Guard
from openline.server.plain import RouteList, new_request_id
from openline.turns.bind import Parts, TurnRequest, find


class InputTokens:
    """The route `/v1/responses/input_tokens`.

    Args:
        message_bytes_max: of a body.
    """

    def __init__(self, guard: Guard, parts: Parts, message_bytes_max: int) -> None:
        self._guard = guard
        self._parts = parts
        self._message_bytes_max = message_bytes_max

    def routes(self) -> RouteList:
        """Below `/v1`."""
        return [("POST", "/responses/input_tokens", self.count)]

    async def count(self, request: Request) -> Response:
        """`POST /v1/responses/input_tokens`: the body is a create's; nothing is run and nothing stored."""
        owner = self._guard.admit(request.headers.raw)
        declared = int(request.headers.get("content-length", "0"))
        body = await read_body(request.receive, self._message_bytes_max, declared=declared)
        create = read_http_create(body)
        asked = TurnRequest(owner=owner, create=create, body=body, request_id=new_request_id(), transport="json")
        return _Counted(asked, self._parts)


class _Counted(Response):
    """The count; it is not waited for once its client has gone."""

    def __init__(self, asked: TurnRequest, parts: Parts) -> None:
        super().__init__()
        self._asked = asked
        self._parts = parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        del scope
        await until_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        found = await find(self._asked, self._parts)
        tokens = await found.engine.count_tokens(found.request)
        body = msgspec.json.encode({"object": "response.input_tokens", "input_tokens": tokens})
        await send_json(send, 200, body, answer_headers(self._asked.request_id))
