"""Owns the turn tasks: a turn belongs to the registry, not to the socket that asked for it."""

from __future__ import annotations

import asyncio

from openline.turns.log import TurnLog, Window
from openline.turns.run import Parts, TurnRequest, run_turn


class Turn:
    """A running turn: its log, and the right to stop it."""

    __slots__ = ("_task", "log", "request")

    def __init__(self, request: TurnRequest, window: Window, parts: Parts) -> None:
        self.request = request
        self.log = TurnLog(window, on_abandoned=self.cancel)
        self._task = asyncio.get_running_loop().create_task(run_turn(request, self.log, parts))

    def __repr__(self) -> str:
        return f"<Turn {self.request.transport} {self.log!r}>"

    def cancel(self) -> None:
        """Stop generating, or prefilling after a warm-up's end.

        The response ends as incomplete, reason `cancelled`; one that is being kept is left alone.
        """
        if self.log.ended or not self.log.closing:
            self._task.cancel()

    @property
    def task(self) -> asyncio.Task[None]:
        """What writes the log."""
        return self._task


class Registry:
    """The turns that run now."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._turns: dict[asyncio.Task[None], Turn] = {}

    def __repr__(self) -> str:
        return f"<Registry turns={len(self._turns)}>"

    def __len__(self) -> int:
        return len(self._turns)

    def start(self, request: TurnRequest, window: Window) -> Turn:
        """Start a turn. Its log is empty until its parent is bound and its upstream has accepted.

        Args:
            request: a create that may start.
            window: the bytes that may wait for its client.
        """
        turn = Turn(request, window, self._parts)
        self._turns[turn.task] = turn
        turn.task.add_done_callback(self._turns.pop)
        return turn

    async def close(self) -> None:
        """Stop every turn and wait until each has ended and been kept."""
        turns = list(self._turns.values())
        for turn in turns:
            turn.cancel()
        await asyncio.gather(*(turn.task for turn in turns), return_exceptions=True)
