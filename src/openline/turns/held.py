"""Turns that can be read again: while they run, and for a while after their end. In memory only.

Source: Background mode guide; docs/adr/0007.
"""

from __future__ import annotations

import asyncio

from openline.turns.turn import Turn


class Held:
    """The turns that somebody may come back to.

    Args:
        seconds: how long a turn is kept after its end.
        bytes_max: of those that have ended; the oldest go first, the latest stays however large it is.
    """

    def __init__(self, seconds: float, bytes_max: int) -> None:
        self._seconds = seconds
        self._bytes_max = bytes_max
        self._turns: dict[str, Turn] = {}
        self._ended: dict[str, asyncio.TimerHandle] = {}  # oldest first
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<Held turns={len(self._turns)} ended={len(self._ended)} bytes={self._bytes}>"

    def get(self, owner: str, response_id: str) -> Turn | None:
        """A turn that a client can know, if it is the owner's and still held."""
        turn = self._turns.get(response_id)
        return turn if turn is not None and turn.request.owner == owner and turn.is_known else None

    @property
    def running(self) -> int:
        """How many have not ended."""
        return len(self._turns) - len(self._ended)

    def stored_and_running(self) -> list[Turn]:
        """The turns whose unfinished row is ours."""
        turns = [turn for response_id, turn in self._turns.items() if response_id not in self._ended]
        return [turn for turn in turns if turn.is_known and turn.request.create.stores]

    def add(self, turn: Turn) -> None:
        """Hold a turn from its start on."""
        self._turns[turn.id] = turn

    def end(self, turn: Turn) -> None:
        """It has ended; a turn that was refused is not held any more."""
        if turn.log.response is None:
            del self._turns[turn.id]
            return
        self._ended[turn.id] = asyncio.get_running_loop().call_later(self._seconds, self._forget, turn.id)
        self._bytes += turn.bytes
        while self._bytes > self._bytes_max and len(self._ended) > 1:
            self._forget(next(iter(self._ended)))

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
        self._ended.pop(response_id).cancel()
        self._bytes -= self._turns.pop(response_id).bytes
