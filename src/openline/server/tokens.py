"""How many tokens a create would have the model read, without running it.

Source: Responses API reference, "Get input token counts".
"""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from openline.protocol.events import read_http_create
from openline.server.guard import Guard
from openline.server.plain import AnswerInTime, RouteList, body_of, new_request_id
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
        body = await body_of(request, self._message_bytes_max)
        create = read_http_create(body)
        asked = TurnRequest(owner=owner, create=create, body=body, request_id=new_request_id(), transport="json")
        return AnswerInTime(partial(self._counted, asked), asked.request_id)

    async def _counted(self, asked: TurnRequest) -> dict[str, object]:
        found = await find(asked, self._parts)
        tokens = await found.engine.count_tokens(found.request)
        return {"object": "response.input_tokens", "input_tokens": tokens}
