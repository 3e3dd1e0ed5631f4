"""`POST /v1/responses/compact`: a conversation summed up, as a window to go on from.

Source: Responses API reference, "Compact a response".
"""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from openline.protocol.errors import ProtocolError
from openline.protocol.events import read_http_create
from openline.protocol.ids import output_item_ids, prefix_of
from openline.protocol.listed import listed_input
from openline.server.guard import Guard
from openline.server.plain import AnswerInTime, RouteList, body_of, new_request_id
from openline.state.context import is_system
from openline.state.sealed_items import COMPACTION, compaction_item
from openline.turns.bind import Parts, TurnRequest, find
from openline.turns.compact import summed_up


class Compacting:
    """The route.

    Args:
        message_bytes_max: of a body.
    """

    def __init__(self, guard: Guard, parts: Parts, message_bytes_max: int) -> None:
        self._guard = guard
        self._parts = parts
        self._message_bytes_max = message_bytes_max

    def routes(self) -> RouteList:
        """Below `/v1`."""
        return [("POST", "/responses/compact", self.compact)]

    async def compact(self, request: Request) -> Response:
        """The window: what the system said, one item that stands for everything else, and what it took."""
        owner = self._guard.admit(request.headers.raw)
        body = await body_of(request, self._message_bytes_max)
        create = read_http_create(body)
        if not create.model:
            message = "'model' is missing: expected the name of the model that is to write the summary."
            raise ProtocolError("missing_required_parameter", message, param="model")
        asked = TurnRequest(owner=owner, create=create, body=body, request_id=new_request_id(), transport="json")
        return AnswerInTime(partial(self._window, asked), asked.request_id)

    async def _window(self, asked: TurnRequest) -> dict[str, object]:
        found = await find(asked, self._parts)
        if found.context.depth == 0:
            message = "'input' is missing: expected what is to be summed up."
            raise ProtocolError("missing_required_parameter", message, param="input")
        summary = await summed_up(found)
        response_id = self._parts.new_id("resp")
        item_id = output_item_ids(response_id)(prefix_of(COMPACTION))
        item = compaction_item(summary.text, asked.owner, self._parts.seal)
        kept = listed_input((item.wire for item in found.context.items() if is_system(item)), response_id)
        return {
            "id": response_id,
            "object": "response.compaction",
            "created_at": int(self._parts.unix_time()),
            "output": [*kept, {"id": item_id, **item}],
            "usage": summary.usage,
        }
