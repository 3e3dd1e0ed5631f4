"""What is kept of a turn that has ended, before its end is announced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from openline.protocol.errors import ProtocolError
from openline.protocol.fold import Event
from openline.protocol.ids import input_item_id
from openline.protocol.items import Item, item_of
from openline.state.cache import Anchor
from openline.state.context import ContextNode
from openline.state.sealed_items import opened
from openline.state.sealing import Seal
from openline.state.store import (
    Appended,
    ConversationItem,
    Key,
    KeyTaken,
    NotAppended,
    NotUnfinished,
    Store,
    StoredTurn,
    StoreUnavailable,
    store_unavailable,
)
from openline.turns.bind import Bound, Parts, TurnRequest
from openline.turns.turn import Turn

_encoder: Final = msgspec.json.Encoder()
_fields: Final = msgspec.json.Decoder(dict[str, Any])
_raw_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])  # not read further: what is in them is the engine's


async def begin(turn: Turn, bound: Bound, parts: Parts) -> None:
    """Keep that a turn runs whose client may come back to it: no restart loses it, and no other process runs it too.

    Raises:
        KeyTaken: another turn has its key meanwhile.
        ProtocolError: it could not be kept.

    Source: Background mode guide; guarantee of durability: what is acknowledged is committed.
    """
    request = turn.request
    if request.create.stores:
        key = None if turn.key is None else Key(turn.key, turn.body_hash)
        row = msgspec.structs.replace(_row(bound, bound.response), chainable=False, lease_until=lease_end(parts))
        await _put(parts.store, request.owner, row, key=key)
        turn.is_claimed = True


async def let_go(turn: Turn, parts: Parts) -> None:
    """It is refused after all: its key is free again. If the store cannot be used now, its lease runs out."""
    if turn.is_claimed:
        turn.is_claimed = False
        with suppress(StoreUnavailable):
            await parts.store.delete(turn.request.owner, turn.id)


async def keep(turn: Turn, bound: Bound, response: Event, parts: Parts) -> Event:
    """Keep a response: in the store if it asks for that, and as its lane's latest if it can be continued.

    Nothing is kept of a response whose output cannot be read back. Of one that can be streamed again
    the events are kept too, but for the terminal one, which holds the response again.

    Returns:
        The response; if another process has ended it meanwhile, then as that one did.

    Raises:
        ProtocolError: it could not be kept.
    """
    request = turn.request
    node = _node_behind(request, bound, response, parts.seal)
    appends = _appended(request, bound, response, int(parts.unix_time()))
    if request.create.stores:
        try:
            row, events = _row(bound, response), _events(turn)
            await _put(parts.store, request.owner, row, events, appends, replaces=turn.is_claimed)
        except NotUnfinished:
            return await _ended_elsewhere(request, response["id"], parts)
        turn.is_claimed = False
    elif appends is not None:
        await _append(parts.store, request.owner, appends)
    if response["status"] != "failed":
        stored = request.create.stores and _is_chainable(bound)
        turn.keep_as_latest(Anchor(response["id"], node, bound.model, stored))
    return response


async def keep_failed(turn: Turn, bound: Bound, response: Event, error: ProtocolError, parts: Parts) -> None:
    """Keep that a response failed which could not be kept as it was, where its row says that it still runs.

    If the store cannot be used now, the row's lease runs out.
    """
    if turn.is_claimed and error.code != "store_unavailable":
        with suppress(StoreUnavailable):
            await parts.store.put(turn.request.owner, _row(bound, response), events=_events(turn), replaces=True)
            turn.is_claimed = False


def _events(turn: Turn) -> bytes | None:
    """All but the terminal one, of a turn whose events can be read again."""
    return b"\n".join(turn.log.events()) if turn.request.keeps_events and turn.log.is_whole else None


async def _ended_elsewhere(request: TurnRequest, response_id: str, parts: Parts) -> Event:
    """A response as another process has ended it: cancelled for its client, or failed, as ours seemed gone.

    Raises:
        ProtocolError: it was deleted there, or the store cannot say.
    """
    try:
        row = await parts.store.get(request.owner, response_id)
    except StoreUnavailable as error:
        raise store_unavailable(error) from None
    if row is None:
        raise ProtocolError("not_found", f"Response with id '{response_id}' was deleted while it ran.")
    return _fields.decode(row.response)


def lease_end(parts: Parts) -> int:
    """Until when a process that has just said so is taken to run its turns."""
    return math.ceil(parts.unix_time() + parts.resume.lease_seconds)


async def _put(
    store: Store,
    owner: str,
    row: StoredTurn,
    events: bytes | None = None,
    appends: Appended | None = None,
    *,
    key: Key | None = None,
    replaces: bool = False,
) -> None:
    try:
        await store.put(owner, row, events=events, appends=appends, key=key, replaces=replaces)
    except (KeyTaken, NotUnfinished):
        raise
    except NotAppended as error:
        raise _not_appended(error) from None
    except StoreUnavailable as error:
        raise store_unavailable(error) from None


async def _append(store: Store, owner: str, appends: Appended) -> None:
    try:
        await store.append(owner, appends)
    except NotAppended as error:
        raise _not_appended(error) from None
    except StoreUnavailable as error:
        raise store_unavailable(error) from None


def _not_appended(error: NotAppended) -> ProtocolError:
    return ProtocolError("invalid_request", f"The conversation does not take this turn: {error}.", param="conversation")


def _appended(request: TurnRequest, bound: Bound, response: Event, now: int) -> Appended | None:
    """What a turn adds to its conversation, once it has ended well: its input and its output.

    Source: Responses API reference, "conversation".
    """
    conversation_id = request.create.conversation_id
    if conversation_id is None or response["status"] not in {"completed", "incomplete"}:
        return None
    asked = [
        conversation_item(item, input_item_id(item.type, response["id"], index))
        for index, item in enumerate(own_input(bound))
    ]
    said = [ConversationItem(item["id"], _encoder.encode(item)) for item in response["output"]]
    return Appended(conversation_id, (*asked, *said), now)


def conversation_item(item: Item, item_id: str) -> ConversationItem:
    """An item that a client sent, under an id of ours: two that it gave the same one can stand in one conversation."""
    fields = _raw_fields.decode(item.wire)
    return ConversationItem(item_id, _encoder.encode({**fields, "type": item.type, "id": item_id}))


def _node_behind(request: TurnRequest, bound: Bound, response: Event, seal: Seal) -> ContextNode:
    try:
        return bound.context.extend(opened(map(item_of, response["output"]), request.owner, seal))
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
        input=b"[" + b",".join(item.wire for item in own_input(bound)) + b"]",
        response=_encoder.encode(response),
    )


def own_input(bound: Bound) -> Sequence[Item]:
    """The items that the request itself brought."""
    return bound.context.own_items if bound.context is not bound.before else ()


def _is_chainable(bound: Bound) -> bool:
    # Nothing unstored is written by the back door, so a stored child of an unstored
    # ancestor cannot be continued outside its connection. What belongs to a conversation goes on there.
    if bound.request.create.conversation_id is not None:
        return False
    return bound.parent is None or bound.parent.stored
