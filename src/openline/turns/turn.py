"""A running turn: its log, its writer, the task that runs it, and what others may do to it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from openline.protocol.deltas import IncompleteReason
from openline.protocol.fold import Event
from openline.turns.bind import TurnRequest
from openline.turns.log import TurnLog, Window
from openline.turns.writer import Writer


class Turn:
    """One turn.

    Args:
        request: what was asked for.
        window: the bytes that may wait for its client.
        kept_bytes_max: how much of it can be read again.

    Attributes:
        id: of its response; nobody can know it before `is_known`.
        writer: there once the request was bound.
        own_input: its items, of a turn in the background.
        task: that runs it; the registry's.
        stop_reason: why it was stopped, if it was.
        stopped: whether somebody wanted it to stop; a response that was being kept then is whole all the same.
    """

    __slots__ = ("id", "log", "own_input", "request", "stop_reason", "stopped", "task", "writer")

    task: asyncio.Task[None]

    def __init__(self, request: TurnRequest, response_id: str, window: Window, kept_bytes_max: int = 0) -> None:
        self.id = response_id
        self.request = request
        # What runs in the background goes on without readers, and waits for none.
        alone = request.in_background
        self.log = TurnLog(None if alone else window, None if alone else self.stop, kept_bytes_max)
        self.writer: Writer | None = None
        self.own_input: Sequence[bytes] = ()
        self.stop_reason: IncompleteReason = "cancelled"
        self.stopped = False

    def __repr__(self) -> str:
        return f"<Turn {self.request.transport} {self.log!r}>"

    @property
    def is_known(self) -> bool:
        """Whether a client can know its response."""
        return self.writer is not None and self.writer.is_open

    @property
    def bytes(self) -> int:
        """What it costs to keep it in memory: its events, and what was asked."""
        return self.log.kept_bytes + len(self.request.body) + sum(map(len, self.own_input))

    def snapshot(self) -> Event:
        """The response as it stands; only of a turn that is known."""
        if self.log.response is not None:
            return self.log.response
        assert self.writer is not None, "it is known"
        return self.writer.builder.fold.snapshot()

    def stop(self, reason: IncompleteReason = "cancelled") -> None:
        """Stop generating, or prefilling after a warm-up's end.

        The response ends as incomplete, for this reason; one that is being kept is left alone.
        """
        self.stopped = True
        if self.log.ended or not self.log.closing:
            self.stop_reason = reason
            self.task.cancel()

    def tell(self, event_type: str, fields: Event) -> None:
        """Write an event about the response into its log, behind its end if it has ended; only of one that is known."""
        assert self.writer is not None, "it is known"
        if self.log.ended:
            self.writer.append([{"type": event_type, "sequence_number": len(self.log), **fields}])
        else:
            self.writer.append(self.writer.builder.tell(event_type, fields))

    def yield_at_boundary(self) -> None:
        """End where no item is open, now or at the next such place, so that a successor can go on.

        Source: Mid-turn steering guide, "Safe boundary".
        """
        if self.writer is None or self.log.closing:
            return
        self.writer.builder.yield_at_boundary()
        if self.writer.builder.is_at_boundary and not self.task.cancelling():  # what is cancelled stays so
            self.stop("steered")
