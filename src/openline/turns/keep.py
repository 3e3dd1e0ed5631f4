"""What is kept of a turn that has ended, before its end is announced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from openline.protocol.errors import ProtocolError
from openline.protocol.fold import Event
from openline.protocol.items import Item, item_of
from openline.state.cache import Anchor
from openline.state.context import ContextNode
from openline.state.store import Store, StoredTurn, StoreUnavailable, store_unavailable
from openline.turns.bind import Bound, TurnRequest

_encoder: Final = msgspec.json.Encoder()


async def keep(request: TurnRequest, bound: Bound, response: Event, store: Store) -> None:
    """Keep a response: in the store if it asks for that, and as its lane's latest if it can be continued.

    Nothing is kept of a response whose output cannot be read back.

    Raises:
        ProtocolError: it could not be kept.
    """
    node = _node_behind(bound, response)
    if request.create.stores:
        try:
            await store.put(request.owner, _row(bound, response))
        except StoreUnavailable as error:
            raise store_unavailable(error) from None
    if request.cache is not None and response["status"] != "failed":
        stored = request.create.stores and _is_chainable(bound)
        request.cache.keep(request.owner, request.stream_id, Anchor(response["id"], node, bound.model, stored))


def evict_failed_parent(request: TurnRequest) -> None:
    """The turn was refused or failed: its parent leaves the connection's memory, if it was its lane's own.

    Source: WebSocket mode guide, "Failed continuations".
    """
    if request.cache is not None:
        request.cache.evict_failed(request.owner, request.stream_id, request.create.previous_response_id)


def _node_behind(bound: Bound, response: Event) -> ContextNode:
    try:
        return bound.context.extend([item_of(item) for item in response["output"]])
    except ProtocolError as error:
        message = f"Upstream '{bound.upstream}' sent an output that nobody could continue: {error.message}"
        raise ProtocolError("upstream_error", message) from None


def _row(bound: Bound, response: Event) -> StoredTurn:
    return StoredTurn(
        response_id=response["id"],
        parent_id=bound.parent.response_id if bound.parent else None,
        created_at=response["created_at"],
        status=response["status"],
        chainable=response["status"] != "failed" and _is_chainable(bound),
        input=b"[" + b",".join(item.raw for item in _own_input(bound)) + b"]",
        response=_encoder.encode(response),
    )


def _own_input(bound: Bound) -> Sequence[Item]:
    is_new = bound.parent is None or bound.context is not bound.parent.node
    return bound.context.own_items if is_new else ()


def _is_chainable(bound: Bound) -> bool:
    # Nothing unstored is written by the back door, so a stored child of an unstored
    # ancestor cannot be continued outside its connection.
    return bound.parent is None or bound.parent.stored
