"""Owns the turn tasks: a turn belongs to the registry, not to the socket that asked for it."""

from __future__ import annotations

import asyncio

from openline.protocol.errors import ProtocolError, request_cancelled
from openline.turns.bind import Parts, TurnRequest
from openline.turns.held import Held
from openline.turns.log import Window
from openline.turns.run import run_turn
from openline.turns.turn import Turn


class Registry:
    """The turns that run now."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._turns: dict[asyncio.Task[None], Turn] = {}
        self.held = Held(parts.resume.seconds, parts.resume.bytes_max)

    def __repr__(self) -> str:
        return f"<Registry turns={len(self._turns)}>"

    def __len__(self) -> int:
        return len(self._turns)

    def start(self, request: TurnRequest, window: Window) -> Turn:
        """Start a turn. Its log is empty until its parent is bound and its upstream has accepted.

        Args:
            request: a create that may start.
            window: the bytes that may wait for its client.

        Raises:
            ProtocolError: too many run in the background.
        """
        parts = self.parts
        kept_bytes_max = 0
        if request.in_background:
            self._require_background()
            kept_bytes_max = parts.resume.bytes_max
        turn = Turn(request, parts.new_id("resp"), window, kept_bytes_max)
        if kept_bytes_max:
            self.held.add(turn)
        turn.task = asyncio.get_running_loop().create_task(run_turn(turn, self.parts))
        self._turns[turn.task] = turn
        turn.task.add_done_callback(self._forget)
        return turn

    def _forget(self, task: asyncio.Task[None]) -> None:
        turn = self._turns.pop(task)
        log = turn.log
        if not log.ended:  # cancelled before its first step, or a defect: its readers must not wait for ever
            defect = ProtocolError("internal_error", "The turn was stopped before it could end.")
            log.refuse(request_cancelled() if task.cancelled() else defect)

        if turn.request.in_background:
            self.held.end(turn)

    def _require_background(self) -> None:
        most = self.parts.resume.background_active_max
        if self.held.running >= most:
            message = f"{most} responses run in the background already: let some of them end first."
            raise ProtocolError("server_is_overloaded", message, headers={"retry-after": "5"})

    def new_id(self, prefix: str) -> str:
        """An unguessable id."""
        return self.parts.new_id(prefix)

    async def ended(self) -> None:
        """Wait until no turn runs."""
        while self._turns:
            await asyncio.wait(list(self._turns))

    async def close(self) -> None:
        """Stop every turn and wait until each has ended and been kept."""
        turns = list(self._turns.values())
        for turn in turns:
            turn.stop()
        await asyncio.gather(*(turn.task for turn in turns), return_exceptions=True)
        self.held.close()
