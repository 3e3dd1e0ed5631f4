"""How `previous_response_id` and `conversation` find what came before: in the connection's memory, else in the store."""

from __future__ import annotations

import msgspec

from openline.protocol.errors import ProtocolError, previous_response_not_found
from openline.protocol.items import read_item
from openline.state.cache import Anchor, ConnectionCache
from openline.state.context import EMPTY, ContextNode
from openline.state.retention import mark_used
from openline.state.sealed_items import opened
from openline.state.sealing import Seal
from openline.state.store import Store, StoredTurn


class _Output(msgspec.Struct):
    output: list[msgspec.Raw]
    model: str


_raw_items = msgspec.json.Decoder(list[msgspec.Raw])
_output = msgspec.json.Decoder(_Output)


async def find_anchor(
    owner: str, response_id: str, cache: ConnectionCache | None, store: Store, seal: Seal, *, now: float = 0.0
) -> Anchor:
    """What `previous_response_id` names: out of the connection's memory, else out of the store.

    Args:
        owner: whose it must be.
        response_id: the id that the client sent.
        cache: the connection's, None over HTTP.
        store: where responses with `store: true` are.
        seal: opens what clients hold for us.
        now: Unix seconds, at which what is found in the store counts as used.

    Raises:
        ProtocolError: `previous_response_not_found`, the same for every reason.
        StoreUnavailable: the store cannot be read.

    Source: WebSocket mode guide, "Continuing", table of what is found where.
    """
    anchor = cache.get(owner, response_id) if cache is not None else None
    if anchor is not None:
        return anchor
    chain = await store.chain(owner, response_id)
    if chain is None:
        raise previous_response_not_found(response_id)
    await mark_used(store, owner, chain[-1], now)
    return _hydrate(chain, owner, seal)


async def conversation_node(
    owner: str, conversation_id: str, store: Store, seal: Seal, *, now: float = 0.0
) -> ContextNode:
    """The context that a conversation's items make.

    Args:
        owner: whose it must be.
        conversation_id: the id that the client sent.
        store: where it is.
        seal: opens what clients hold for us.
        now: Unix seconds, at which it counts as used, so that it is not deleted under a turn.

    Raises:
        ProtocolError: there is no such conversation.
        StoreUnavailable: the store cannot be read.

    Source: Responses API reference, "conversation".
    """
    conversation = await store.conversation(owner, conversation_id)
    if conversation is not None:
        await mark_used(store, owner, conversation, now)
    items = await store.all_items(owner, conversation_id)
    if items is None:
        raise conversation_not_found(conversation_id)
    return EMPTY.extend(opened((read_item(item.raw, "conversation") for item in items), owner, seal))


def conversation_not_found(conversation_id: str) -> ProtocolError:
    """The one error for an id that is unknown or another owner's."""
    message = f"Conversation with id '{conversation_id}' not found."
    return ProtocolError("not_found", message, param="conversation")


def _hydrate(chain: list[StoredTurn], owner: str, seal: Seal) -> Anchor:
    node = EMPTY
    model = ""
    for turn in chain:
        answer = _output.decode(turn.response)
        for raws in (_raw_items.decode(turn.input), answer.output):
            items = (read_item(raw, "input") for raw in raws)
            node = node.extend(opened(items, owner, seal, param="previous_response_id"))
        model = answer.model
    return Anchor(response_id=chain[-1].response_id, node=node, model=model, stored=True)
