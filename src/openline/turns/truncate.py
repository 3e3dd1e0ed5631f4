"""`truncation: auto`: where a conversation does not fit its model, its oldest turns are left out.

Source: Responses API reference, "truncation": drops items from the start of the conversation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from openline.protocol.context import Context
from openline.protocol.items import OUTPUT_OF_CALL, Item, OpenCalls
from openline.state.context import EMPTY, ContextNode, is_asked, is_system

_OUTPUTS: Final = frozenset(OUTPUT_OF_CALL.values())


def without_oldest(context: Context) -> ContextNode | None:
    """The context without the older half of what was said; None if its last turn is all that there is.

    What the system said stays, and so does a summary.
    """
    items = list(context.items())
    kept = [item for item in items if is_system(item) or item.sums_up]
    said = [item for item in items if not (is_system(item) or item.sums_up)]
    starts = list(_starts(said))
    if not starts:
        return None
    size = sum(len(item.raw) for item in said)
    start = next((at for at, before in starts if before * 2 >= size), starts[-1][0])
    return EMPTY.extend([*kept, *said[start:]])


def _starts(said: Sequence[Item]) -> Iterator[tuple[int, int]]:
    """Where a turn starts that is not the first, so that no call is parted from its output; and the bytes before it."""
    calls, size = OpenCalls(), 0
    for at, item in enumerate(said):
        is_users = is_asked(item) and not is_asked(said[at - 1])
        if at and not len(calls) and (is_users or said[at - 1].type in _OUTPUTS):
            yield at, size
        calls = calls.after([item])
        size += len(item.raw)
