"""Items that a request names instead of sending them again.

Source: Responses API reference, "Input items", `item_reference`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

import msgspec

from openline.protocol.errors import ProtocolError
from openline.protocol.ids import Place, input_item_id, place_of
from openline.protocol.items import REFERENCE, Item, read_item
from openline.state.context import ContextNode
from openline.state.store import Store

# A reference is short, and what it names need not be: together as much as the largest message.
REFERENCED_BYTES_MAX: Final = 64 * 1024 * 1024
REFERENCED_RESPONSES_MAX: Final = 10_000  # each is a look-up in the store; as many as a chain may have


class _Named(msgspec.Struct):
    id: str | None = None


class _Output(msgspec.Struct):
    output: list[msgspec.Raw]


_named: Final = msgspec.json.Decoder(_Named)
_output: Final = msgspec.json.Decoder(_Output)
_raw_items: Final = msgspec.json.Decoder(list[msgspec.Raw])


async def resolved(items: Sequence[Item], context: ContextNode, owner: str, store: Store) -> Sequence[Item]:
    """The items with each reference replaced by what it names.

    Args:
        context: what stands before them; an item of it can be named although nothing is stored.

    Raises:
        ProtocolError: nothing of an id is known, or what is named is too large.
        StoreUnavailable: the store cannot be read.
    """
    named = {index: _id_of(item, index) for index, item in enumerate(items) if item.type == REFERENCE}
    if not named:
        return items
    wanted = set(named.values())
    known = _in_context(wanted, context)
    known |= await _in_store(wanted - known.keys(), owner, store)
    found: list[Item] = []
    size = 0
    for index, item in enumerate(items):
        if index in named:
            item = _known(named[index], known)
            size += len(item.raw)
            if size > REFERENCED_BYTES_MAX:
                message = f"What the references name is larger than {REFERENCED_BYTES_MAX} bytes."
                raise ProtocolError("message_too_big", message, param="input")
        found.append(item)
    return found


def _id_of(reference: Item, index: int) -> str:
    item_id = _own_id(reference)
    if not item_id:
        message = f"'input[{index}].id' is missing: expected the id of an item."
        raise ProtocolError("missing_required_parameter", message, param=f"input[{index}].id")
    return item_id


def _own_id(item: Item) -> str | None:
    return _named.decode(item.wire).id  # a summary has one only as the client has it


def _known(item_id: str, known: dict[str, Item]) -> Item:
    found = known.get(item_id)
    if found is None:
        message = f"Item with id '{item_id[:256]}' not found. Items of responses with 'store' false are not kept."
        raise ProtocolError("not_found", message, param="input")
    return found


def _in_context(wanted: Collection[str], context: ContextNode) -> dict[str, Item]:
    by_id = ((_own_id(item), item) for item in context.items())
    return {item_id: item for item_id, item in by_id if item_id is not None and item_id in wanted}


async def _in_store(wanted: Collection[str], owner: str, store: Store) -> dict[str, Item]:
    """Those of the items that are in the owner's stored responses; each response is read once."""
    places: dict[str, list[tuple[str, Place]]] = {}
    for item_id in wanted:
        place = place_of(item_id)
        if place is not None:
            places.setdefault(place.response_id, []).append((item_id, place))
    if len(places) > REFERENCED_RESPONSES_MAX:
        message = f"'input' names items of more than {REFERENCED_RESPONSES_MAX} responses."
        raise ProtocolError("invalid_value", message, param="input")
    found: dict[str, Item] = {}
    for response_id, of_response in places.items():
        turn = await store.get(owner, response_id)
        if turn is None:
            continue
        asked, said = _raw_items.decode(turn.input), _output.decode(turn.response).output
        for item_id, place in of_response:
            item = _at(asked if place.in_input else said, place.number)
            if item is not None and item_id in {_own_id(item), _listed_id(item, place)}:
                found[item_id] = item
    return found


def _at(raws: Sequence[msgspec.Raw], number: int) -> Item | None:
    return read_item(raws[number], "input") if number < len(raws) else None


def _listed_id(item: Item, place: Place) -> str | None:
    return input_item_id(item.type, place.response_id, place.number) if place.in_input else None
