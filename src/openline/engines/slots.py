"""Which conversation has which slot of llama.cpp, where its KV cache is kept. Pure: the clock is an argument.

Left alone, llama.cpp gives a request the slot whose prompt is most like it. Agents share long
instructions and tools, so a new conversation takes the slot of another one and overwrites all of it
that stands behind them; with two conversations in turn, each turn reads its whole tail again (measured:
two slots, two conversations, a common prefix of 80 %; none of the tails was ever found). Named slots
keep both whole.

Source: llama.cpp, tools/server/server-context.cpp, `get_available_slot`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

import msgspec

from openline.engines.engine import EngineRequest
from openline.protocol.items import Item

# After so long without a turn an agent whose call was never answered has probably been stopped.
QUIET_SECONDS: Final = 300.0


class Opening(NamedTuple):
    """What a conversation begins with, up to the model's first word, which is the same in each of its turns.

    Attributes:
        bytes: of the whole context.
    """

    digest: bytes = b""
    is_over: bool = False
    bytes: int = 0


class _Role(msgspec.Struct):
    role: str | None = None


_role: Final = msgspec.json.Decoder(_Role)


class OpeningProjection:
    """Folds a context into its `Opening`."""

    key = "opening"

    def start(self) -> Opening:
        """Nothing yet."""
        return Opening()

    def extend(self, state: Opening, items: Sequence[Item]) -> Opening:
        """The opening, until the model has spoken."""
        digest, is_over, size = state
        for item in items:
            size += len(item.raw)
            is_over = is_over or _is_models(item)
            if not is_over:
                digest = _digest((digest, item.raw))
        return Opening(digest, is_over, size)


class Wanted(msgspec.Struct, frozen=True):
    """Whose turn it is.

    Attributes:
        conversation: tells it from others; None for a warm-up, whose conversation is still to come.
        family: what those have in common whose prompts begin alike: instructions and tools.
        shared_bytes: of that beginning.
        own_bytes: of what stands behind it.
    """

    conversation: bytes | None
    family: bytes
    shared_bytes: int
    own_bytes: int


def wanted(request: EngineRequest) -> Wanted:
    """Whose turn a request is."""
    create = request.create
    shared = [(create.instructions or "").encode(), *map(bytes, create.tools or ())]
    family = _digest(shared)
    opening = request.context.project(OpeningProjection())
    conversation = None
    if create.generates or opening.is_over:
        conversation = _digest((family, (create.prompt_cache_key or "").encode(), opening.digest))
    return Wanted(conversation, family, sum(map(len, shared)), opening.bytes)


class _Slot(msgspec.Struct):
    """One slot.

    Attributes:
        holds: whose turn it had last.
        is_busy: that turn still runs.
        waits: it ended in a call, so that its conversation comes back as soon as the call has run.
        used_at: when it ended.
    """

    id: int
    holds: Wanted | None = None
    is_busy: bool = False
    waits: bool = False
    used_at: float = 0.0


class Slots:
    """The slots, and what they hold.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self._slots = [_Slot(number) for number in range(count)]

    def __repr__(self) -> str:
        busy = sum(slot.is_busy for slot in self._slots)
        held = sum(slot.holds is not None for slot in self._slots)
        return f"<Slots {len(self._slots)} held={held} busy={busy}>"

    def take(self, turn: Wanted, now: float) -> int | None:
        """The slot for a turn; None if llama.cpp is to choose, as all are busy.

        Give it back with `release` when the turn has ended.
        """
        slot = self._find(turn, now)
        if slot is None:
            return None
        slot.holds, slot.is_busy, slot.used_at = turn, True, now
        return slot.id

    def release(self, slot_id: int, turn: Wanted, now: float, *, called: bool) -> None:
        """A turn has ended, in a call or not; a slot that another turn got meanwhile stays with that one."""
        slot = self._slots[slot_id]
        if slot.holds is turn:
            slot.is_busy, slot.waits, slot.used_at = False, called, now

    def _find(self, turn: Wanted, now: float) -> _Slot | None:
        """In this order: its own, that of its warm-up, one whose beginning it shares, an empty one, the oldest."""
        return (
            self._first(lambda slot: not slot.is_busy and _is_of(slot, turn))
            # The warm-up may still run: what it has read is just what is wanted.
            or self._first(lambda slot: _is_family(slot, turn) and _is_warmed(slot))
            or self._first(lambda slot: not slot.is_busy and _is_family(slot, turn) and _is_spare(slot, turn, now))
            or self._first(lambda slot: slot.holds is None)
            or min((slot for slot in self._slots if not slot.is_busy), key=_used_at, default=None)
        )

    def _first(self, fits: Callable[[_Slot], bool]) -> _Slot | None:
        return next(filter(fits, self._slots), None)


def _is_of(slot: _Slot, turn: Wanted) -> bool:
    return slot.holds is not None and turn.conversation is not None and slot.holds.conversation == turn.conversation


def _is_family(slot: _Slot, turn: Wanted) -> bool:
    return slot.holds is not None and slot.holds.family == turn.family


def _is_warmed(slot: _Slot) -> bool:
    return slot.holds is not None and slot.holds.conversation is None


def _is_spare(slot: _Slot, turn: Wanted, now: float) -> bool:
    """Whether a new conversation may overwrite the end of this one, to have its beginning.

    Not while it waits for a call, and not if more is lost than found.
    """
    at_rest = not slot.waits or now - slot.used_at >= QUIET_SECONDS
    return at_rest and slot.holds is not None and slot.holds.own_bytes <= turn.shared_bytes


def _used_at(slot: _Slot) -> float:
    return slot.used_at


def _is_models(item: Item) -> bool:
    if item.type == "message":
        return _role.decode(item.raw).role == "assistant"
    return item.type == "reasoning" or item.type.endswith("_call")


def _digest(parts: Iterable[bytes]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(len(part).to_bytes(8) + part)
    return found.digest()
