"""A create whose key the store knows: its turn gives again what is kept there, and generates nothing.

Source: docs/adr/0009.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from openline.protocol.errors import ProtocolError
from openline.protocol.idempotency import key_reused, not_held
from openline.state.cache import Anchor
from openline.state.conversation import find_anchor
from openline.state.store import KeyedTurn, StoredTurn, StoreUnavailable, store_unavailable
from openline.turns.bind import Parts
from openline.turns.leases import give_up
from openline.turns.turn import Turn

_LOOK_SECONDS: Final = 0.25  # between two looks at a turn that another process runs
_FINAL: Final = frozenset({"completed", "incomplete", "failed"})
_fields: Final = msgspec.json.Decoder(dict[str, Any])


async def replayed(turn: Turn, parts: Parts) -> bool:
    """Give again what is kept under a turn's key. False if nothing is: then the turn is to run.

    Raises:
        ProtocolError: the key stands for another create; or its turn runs in another process, and does so for too
            long; or nothing is kept, and the client has already seen some of it; or the store cannot say.
    """
    kept = None
    if turn.request.create.stores:
        try:
            kept = await _kept(turn, parts)
            if kept is not None:
                await _replay(turn, kept.turn, parts)
                return True
        except StoreUnavailable as error:
            raise store_unavailable(error) from None
    if not turn.is_wanted:
        raise not_held(turn.key or "", turn.request.create.starting_after or 0)
    turn.begin(0)
    return False


async def _kept(turn: Turn, parts: Parts) -> KeyedTurn | None:
    """The turn that the store has under a key, once it has ended."""
    owner, key = turn.request.owner, turn.key or ""
    loop = asyncio.get_running_loop()
    wait_until = loop.time() + parts.resume.claim_wait_seconds_max
    while (kept := await parts.store.of_key(owner, key)) is not None:
        if kept.body_hash != turn.body_hash:
            raise key_reused(key)
        if kept.turn.lease_until is None:
            return kept
        now = int(parts.unix_time())
        if kept.turn.lease_until < now:
            await give_up(parts.store, owner, kept.turn, now)
        elif loop.time() < wait_until:
            await asyncio.sleep(_LOOK_SECONDS)
        else:
            message = f"The turn with the idempotency key '{key}' runs in another process of the server: ask again."
            raise ProtocolError("idempotency_key_in_use", message, headers={"retry-after": "1"})
    return None


async def _replay(turn: Turn, row: StoredTurn, parts: Parts) -> None:
    events = await parts.store.events(turn.request.owner, row.response_id)
    anchor = await _anchor(turn, row, parts) if turn.places else None
    turn.replays = row.response_id
    if anchor is not None:
        turn.keep_as_latest(anchor)
    elif row.status == "failed":
        turn.evict_failed_parent()
    response = _fields.decode(row.response)
    if events is None:
        turn.log.end_without_events(response)
    else:
        turn.log.append(whole_stream(row, events), last=response)
    turn.begin(len(turn.log))


async def _anchor(turn: Turn, row: StoredTurn, parts: Parts) -> Anchor | None:
    """What its lane goes on from; None if it failed, or came behind what was not stored."""
    owner, now = turn.request.owner, parts.unix_time()
    try:
        return await find_anchor(owner, row.response_id, None, parts.store, parts.seal, now=now)
    except ProtocolError:
        return None


def whole_stream(row: StoredTurn, kept: bytes) -> Sequence[bytes]:
    """The events that were kept with a response, and the terminal one, which is made of the response itself."""
    events = kept.split(b"\n")
    if row.status in _FINAL:
        head = f'{{"type":"response.{row.status}","sequence_number":{len(events)},"response":'.encode()
        events.append(b"%b%b}" % (head, row.response))
    return events
