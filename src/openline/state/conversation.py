"""How `previous_response_id` finds a conversation: in the connection's memory, else in the store."""

from __future__ import annotations

import msgspec

from openline.protocol.errors import previous_response_not_found
from openline.protocol.items import read_item
from openline.state.cache import Anchor, ConnectionCache
from openline.state.context import EMPTY
from openline.state.store import Store, StoredTurn


class _Output(msgspec.Struct):
    output: list[msgspec.Raw]
    model: str


_raw_items = msgspec.json.Decoder(list[msgspec.Raw])
_output = msgspec.json.Decoder(_Output)


async def find_anchor(owner: str, response_id: str, cache: ConnectionCache | None, store: Store) -> Anchor:
    """What `previous_response_id` names: out of the connection's memory, else out of the store.

    Args:
        owner: whose it must be.
        response_id: the id that the client sent.
        cache: the connection's, None over HTTP.
        store: where responses with `store: true` are.

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
    return _hydrate(chain)


def _hydrate(chain: list[StoredTurn]) -> Anchor:
    node = EMPTY
    model = ""
    for turn in chain:
        answer = _output.decode(turn.response)
        raws = (*_raw_items.decode(turn.input), *answer.output)
        node = node.extend([read_item(raw, "input") for raw in raws])
        model = answer.model
    return Anchor(response_id=chain[-1].response_id, node=node, model=model, stored=True)
