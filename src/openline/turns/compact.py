"""Compaction: the model sums a conversation up, and the sealed summary stands for everything before it.

Source: Responses API reference, "Compact", "context_management"; WebSocket mode guide, "Compaction"; docs/adr/0008.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import aclosing
from typing import Final

import msgspec

from openline.engines.engine import Engine, EngineRequest
from openline.protocol.builder import Builder
from openline.protocol.deltas import Ended, Usage
from openline.protocol.errors import ProtocolError
from openline.protocol.events import HttpCreate, user_message
from openline.protocol.fold import Event
from openline.protocol.ids import output_item_ids
from openline.protocol.response import opening_response
from openline.protocol.states import IllegalTransition
from openline.state.context import ContextNode
from openline.turns.bind import Bound, Found

_PROMPT: Final = (
    "Sum this conversation up for a model that will go on with it and sees nothing else of it. Write down what it is told to do and "
    "not to do; what the user wants, with the latest request word for word; what was decided and why; what was done and found out, "
    "with names, paths, numbers and identifiers as they are; what is still to do, and the next step. Write only the summary."
)


class Summary(msgspec.Struct, frozen=True):
    """What the model wrote, and the tokens that it took, as `usage` says it."""

    text: str
    usage: Event


async def is_due(engine: Engine, request: EngineRequest, context: ContextNode) -> bool:
    """Whether a context has reached the threshold at which its create wants it summed up, and there is a past to sum up.

    Counted by the upstream where it can, else estimated at four bytes a token.
    """
    thresholds = [each.compact_threshold for each in request.create.context_management or ()]
    threshold = min((tokens for tokens in thresholds if tokens is not None), default=None)
    if threshold is None or context.bytes < threshold:  # no token is shorter than a byte
        return False
    if not request.create.generates or len(context.last_words()) == context.depth:
        return False
    try:
        return await engine.count_tokens(request) >= threshold
    except ProtocolError:
        return context.bytes // 4 >= threshold


async def summed_up(found: Bound | Found) -> Summary:
    """Let the model sum up what a create refers to, under the create's own instructions.

    Raises:
        ProtocolError: the engine failed, or wrote nothing, or not to the end.
    """
    asked = HttpCreate(model=found.model, instructions=found.request.create.instructions)
    body = msgspec.json.encode({"model": asked.model, "instructions": asked.instructions})
    context = found.context.extend([user_message(_PROMPT)])
    request = EngineRequest(asked, body, context, found.request.model)
    response_id = "resp_0"  # nobody sees it
    opening = opening_response(asked, response_id=response_id, model=found.model, created_at=0)
    builder = Builder(opening, output_item_ids(response_id))
    builder.open()
    try:
        async with aclosing(found.engine.prepare(request).stream()) as batches:
            async for deltas in batches:
                builder.apply(deltas)
    except IllegalTransition as broken:
        raise _no_summary(found, f"sent an event that cannot stand where it came: {broken}") from None
    if builder.ended != Ended():
        raise _no_summary(found, "did not finish it")
    response = builder.final(0)
    text = "".join(_texts(response["output"])).strip()
    if not text:
        raise _no_summary(found, "wrote nothing")
    return Summary(text, response["usage"] or Usage().wire())


def _texts(output: Iterable[Event]) -> Iterator[str]:
    for item in output:
        if item["type"] == "message":
            yield from (part["text"] for part in item["content"] if part["type"] == "output_text")


def _no_summary(found: Bound | Found, reason: str) -> ProtocolError:
    message = f"The conversation could not be summed up: upstream '{found.engine.name}' {reason}."
    return ProtocolError("upstream_error", message)
