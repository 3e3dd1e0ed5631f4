"""Turns that can be read again: while they run, and for a while after their end. In memory only.

Source: Background mode guide; docs/adr/0007; docs/adr/0009.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from openline.config import ResumeSettings
from openline.turns.turn import Turn


class _Ended(NamedTuple):
    forgetting: asyncio.TimerHandle
    bytes: int


class Held:
    """The turns that somebody may come back to: those in the background, and those with an idempotency key.

    Args:
        settings: how long a turn is kept after its end, or runs on without readers; of those that have ended how many
            bytes, the oldest going first and the latest staying however large it is; how many run without readers.
    """

    def __init__(self, settings: ResumeSettings) -> None:
        self._settings = settings
        self._turns: dict[str, Turn] = {}
        self._keyed: dict[tuple[str, str], Turn] = {}  # by owner and key
        self._ended: dict[str, _Ended] = {}  # oldest first
        self._detached: dict[str, asyncio.TimerHandle] = {}  # those with a key that nobody reads, oldest first
        self._background = 0  # how many of them run
        self._bytes = 0

    def __repr__(self) -> str:
        detached = f" detached={len(self._detached)}" if self._detached else ""
        return f"<Held turns={len(self._turns)} ended={len(self._ended)}{detached} bytes={self._bytes}>"

    def get(self, owner: str, response_id: str) -> Turn | None:
        """A turn that a client can know, if it is the owner's and still held."""
        turn = self._turns.get(response_id)
        return turn if turn is not None and turn.request.owner == owner and turn.is_known else None

    def of_key(self, owner: str, key: str) -> Turn | None:
        """The turn that this key of the owner's stands for, from its create on; one that was refused has let go of it."""
        turn = self._keyed.get((owner, key))
        return turn if turn is not None and turn.log.refusal is None else None

    @property
    def running(self) -> int:
        """How many run in the background."""
        return self._background

    def claimed(self) -> list[Turn]:
        """The turns that run and whose unfinished row is ours."""
        return [turn for turn in self._turns.values() if turn.is_claimed and turn.id not in self._ended]

    def add(self, turn: Turn) -> None:
        """Hold a turn from its start on."""
        self._turns[turn.id] = turn
        self._background += turn.request.in_background
        if turn.key is not None:
            self._keyed[turn.request.owner, turn.key] = turn

    def end(self, turn: Turn) -> None:
        """It has ended; one that was refused, or that gave again what is in the store, is not held any more."""
        self.attached(turn)
        self._background -= turn.request.in_background
        if turn.log.response is None or turn.replays is not None:
            self._drop(turn)
            return
        turn.leave_connections()
        forgetting = asyncio.get_running_loop().call_later(self._settings.seconds, self._forget, turn.id)
        self._ended[turn.id] = _Ended(forgetting, turn.bytes)
        self._bytes += turn.bytes
        while self._bytes > self._settings.bytes_max and len(self._ended) > 1:
            self._forget(next(iter(self._ended)))

    def detached(self, turn: Turn) -> None:
        """Nobody reads a turn with a key any more: for a while it runs on. Where too many do, the oldest is stopped."""
        self._detached[turn.id] = asyncio.get_running_loop().call_later(self._settings.seconds, turn.stop)
        if len(self._detached) > self._settings.detached_active_max:
            oldest = next(iter(self._detached))
            self._detached.pop(oldest).cancel()
            self._turns[oldest].stop()

    def attached(self, turn: Turn) -> None:
        """Somebody reads it again, or it has ended."""
        waiting = self._detached.pop(turn.id, None)
        if waiting is not None:
            waiting.cancel()

    def forget(self, owner: str, response_id: str) -> bool:
        """Let go of a turn that has ended; False if there is none."""
        turn = self.get(owner, response_id)
        if turn is None or response_id not in self._ended:
            return False
        self._forget(response_id)
        return True

    def close(self) -> None:
        """Let go of all."""
        for response_id in list(self._ended):
            self._forget(response_id)

    def _forget(self, response_id: str) -> None:
        forgetting, size = self._ended.pop(response_id)
        forgetting.cancel()
        self._bytes -= size
        self._drop(self._turns[response_id])

    def _drop(self, turn: Turn) -> None:
        del self._turns[turn.id]
        if turn.key is not None and self._keyed.get((turn.request.owner, turn.key)) is turn:
            del self._keyed[turn.request.owner, turn.key]
