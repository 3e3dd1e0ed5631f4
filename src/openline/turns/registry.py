"""Owns the turn tasks: a turn belongs to the registry, not to the socket that asked for it."""

from __future__ import annotations

import asyncio

from openline.protocol.errors import ProtocolError, request_cancelled
from openline.protocol.idempotency import body_hash, key_reused
from openline.turns.attachment import Attachment
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
        self.held = Held(parts.resume)

    def __repr__(self) -> str:
        return f"<Registry turns={len(self._turns)}>"

    def __len__(self) -> int:
        return len(self._turns)

    def attach(self, request: TurnRequest, window: Window) -> Attachment:
        """Start a turn for a client, or bring it back to the one that its key stands for.

        Nothing is waited for in here: of two creates with one key that come at once, the second finds the first.

        Args:
            request: a create that may start.
            window: the bytes that may wait for its client.

        Raises:
            ProtocolError: the key stands for another create, or too many run in the background.

        Source: docs/adr/0009.
        """
        if request.key is None:
            return Attachment(self.start(request, window), request)
        digest = body_hash(request.body)
        turn = self.held.of_key(request.owner, request.key)
        if turn is None:
            return Attachment(self.start(request, window, digest), request)
        if turn.body_hash != digest:
            raise key_reused(request.key)
        self.held.attached(turn)
        return Attachment(turn, request, window)

    def start(self, request: TurnRequest, window: Window, digest: bytes = b"") -> Turn:
        """Start a turn. Its log is empty until its parent is bound and its upstream has accepted.

        Args:
            request: a create that may start.
            window: the bytes that may wait for its client.
            digest: the body's, of a turn with an idempotency key.

        Raises:
            ProtocolError: too many run in the background.
        """
        parts = self.parts
        if request.in_background:
            self._require_background()
        if request.in_background or request.key is not None:
            turn = Turn(
                request,
                parts.new_id("resp"),
                window,
                parts.resume.bytes_max,
                on_abandoned=None if request.key is None else self.held.detached,
                body_hash=digest,
            )
            self.held.add(turn)
        else:
            turn = Turn(request, parts.new_id("resp"), window)
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
        turn.begin(0)
        if turn.request.in_background or turn.key is not None:
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
