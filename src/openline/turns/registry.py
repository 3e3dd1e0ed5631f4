"""Owns the turn tasks: a turn belongs to the registry, not to the socket that asked for it."""

from __future__ import annotations

import asyncio

from openline.protocol.errors import ProtocolError
from openline.turns.bind import Parts, TurnRequest
from openline.turns.log import TurnLog, Window
from openline.turns.run import run_turn


class Turn:
    """A running turn: its log, the task that writes it, and the right to stop it."""

    __slots__ = ("log", "request", "task")

    def __init__(self, request: TurnRequest, window: Window, parts: Parts) -> None:
        self.request = request
        self.log = TurnLog(window, on_abandoned=self.cancel)
        self.task = asyncio.get_running_loop().create_task(run_turn(request, self.log, parts))

    def __repr__(self) -> str:
        return f"<Turn {self.request.transport} {self.log!r}>"

    def cancel(self) -> None:
        """Stop generating, or prefilling after a warm-up's end.

        The response ends as incomplete, reason `cancelled`; one that is being kept is left alone.
        """
        if self.log.ended or not self.log.closing:
            self.task.cancel()


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
        turn.task.add_done_callback(self._forget)
        return turn

    def _forget(self, task: asyncio.Task[None]) -> None:
        log = self._turns.pop(task).log
        if not log.ended:  # cancelled before its first step, or a defect: its readers must not wait for ever
            log.refuse(ProtocolError("internal_error", "The turn was stopped before it could end."))

    async def close(self) -> None:
        """Stop every turn and wait until each has ended and been kept."""
        turns = list(self._turns.values())
        for turn in turns:
            turn.cancel()
        await asyncio.gather(*(turn.task for turn in turns), return_exceptions=True)
