"""Unfinished rows of turns: those whose process is gone, and those that another process than ours is told to stop.

A process renews the leases of the turns that it runs. What nobody renews has lost its process, and is given up. What a
process finds ended, or deleted, while it runs it was stopped by another one.

Source: Background mode guide; Responses API reference, "The response object", `status`; docs/adr/0007; docs/adr/0009.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, Final

import msgspec

from openline.protocol.errors import ProtocolError
from openline.state.store import UNFINISHED_MAX, AlreadyKept, Store, StoredTurn, StoreUnavailable
from openline.turns.bind import Parts
from openline.turns.held import Held
from openline.turns.keep import lease_end

_log: Final = logging.getLogger("openline.turns")


class _Kept(msgspec.Struct):
    background: bool = False


_kept: Final = msgspec.json.Decoder(_Kept)


async def keep_leases(held: Held, parts: Parts) -> None:
    """Renew ours and end those of others that have run out, until cancelled."""
    while True:
        try:
            await renew(held, parts.store, lease_end(parts))
            await sweep(parts.store, int(parts.unix_time()))
        except StoreUnavailable as error:
            _log.warning("the leases of unfinished responses were not renewed: %s", error)
        except Exception:  # noqa: BLE001 - whatever it is, the next renewal needs this loop
            _log.exception("the leases of unfinished responses were not renewed")
        await asyncio.sleep(parts.resume.lease_seconds / 3)


async def renew(held: Held, store: Store, until: int) -> None:
    """Say that what runs here still does; stop what another process has ended or deleted."""
    running = held.claimed()
    if not running or await store.renew([(turn.request.owner, turn.id) for turn in running], until) == len(running):
        return
    for turn in running:
        row = await store.get(turn.request.owner, turn.id)
        if turn.log.closing or (row is not None and row.lease_until is not None):
            continue
        turn.stop()
        await asyncio.wait({turn.task})
        if row is None:
            held.forget(turn.request.owner, turn.id)


async def sweep(store: Store, now: int) -> int:
    """End what nobody runs any more; how many there were."""
    count = 0
    while lost := await store.unfinished(now):
        count += sum([await give_up(store, owner, turn, now) for owner, turn in lost])
        if len(lost) < UNFINISHED_MAX:
            break
    if count:
        _log.warning("%d responses had lost their process and are given up now", count)
    return count


async def give_up(store: Store, owner: str, turn: StoredTurn, now: int) -> bool:
    """End a turn that nobody runs any more: one in the background has failed, of any other its client knew no end.

    Its key is free then, so that its create can be sent again. False if it has ended or is run after all.
    """
    failed = None
    if _kept.decode(turn.response).background:
        error = ProtocolError("internal_error", "The server stopped before this response was finished.")
        failed = ended(turn, status="failed", error=error.failure())
    return await store.give_up(owner, turn.response_id, now, failed)


async def cancel_elsewhere(store: Store, owner: str, turn: StoredTurn) -> None:
    """Cancel a turn that another process runs, if it has not ended meanwhile; that one stops once it renews its lease."""
    with suppress(AlreadyKept):
        await store.put(owner, ended(turn, status="cancelled"))


def ended(turn: StoredTurn, *, status: str, **changes: object) -> StoredTurn:
    """An unfinished turn as nobody runs it any more."""
    response: dict[str, Any] = msgspec.json.decode(turn.response)
    response |= {"status": status, **changes}
    return msgspec.structs.replace(turn, status=status, lease_until=None, response=msgspec.json.encode(response))
