"""Nothing is kept for ever, unless that was asked for: what nobody uses any more is deleted after a time.

Source: Responses API guide, "Data retention".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Final

from openline.state.store import Conversation, Store, StoredTurn, StoreUnavailable

_log: Final = logging.getLogger("openline.store")

DAY_SECONDS: Final = 86_400
_HOUR_SECONDS: Final = 3600
# A use is a write, so not every one is marked. What runs now may have been marked so long ago, and still must not be
# deleted: this is less than a day, the shortest time that things are kept, by more than a turn takes.
_MARKED_EVERY_SECONDS: Final = DAY_SECONDS // 2
_DELETED_AT_ONCE: Final = 100  # SQLite's writer takes some 10 ms for them, and so long others wait


async def retain(
    store: Store,
    retain_days: int,
    unix_time: Callable[[], float],
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> None:
    """Delete what nobody has used for some days, now and then every hour, until cancelled.

    Args:
        retain_days: 0 is for ever: then there is nothing to do.
        unix_time: the wall clock, in seconds.
        sleep: waits for so many seconds.
    """
    while retain_days:
        before = int(unix_time()) - retain_days * DAY_SECONDS
        try:
            deleted = sum([count async for count in purged(store, before)])
        except StoreUnavailable as error:
            _log.warning("what was not used for %d days could not be deleted: %s", retain_days, error)
        else:
            if deleted:
                _log.info("deleted %d turns and conversations, not used for %d days", deleted, retain_days)
        await sleep(_HOUR_SECONDS)


async def purged(store: Store, before: int) -> AsyncIterator[int]:
    """Delete what was last used before a time in Unix seconds; the number of each batch, between which others write.

    Raises:
        StoreUnavailable: it cannot be read or written.
    """
    while count := await store.purge(before, _DELETED_AT_ONCE):
        yield count


async def mark_used(store: Store, owner: str, kept: StoredTurn | Conversation, now: float) -> None:
    """Note that a turn, and so its chain, or a conversation is used, if that was not noted a short while ago.

    Args:
        now: Unix seconds.
    """
    if now - (kept.last_used_at or kept.created_at) < _MARKED_EVERY_SECONDS:
        return
    kept_id = kept.response_id if isinstance(kept, StoredTurn) else kept.id
    with suppress(StoreUnavailable):  # it could be read, and that is enough to go on
        await store.used(owner, kept_id, int(now))
