"""A running turn: its log, its writer, the task that runs it, and what others may do to it."""

from __future__ import annotations

import asyncio

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

    Attributes:
        writer: there once the request was bound.
        task: that runs it; the registry's.
        stop_reason: why it was stopped, if it was.
    """

    __slots__ = ("log", "request", "stop_reason", "task", "writer")

    task: asyncio.Task[None]

    def __init__(self, request: TurnRequest, window: Window) -> None:
        self.request = request
        self.log = TurnLog(window, on_abandoned=self.stop)
        self.writer: Writer | None = None
        self.stop_reason: IncompleteReason = "cancelled"

    def __repr__(self) -> str:
        return f"<Turn {self.request.transport} {self.log!r}>"

    @property
    def response_id(self) -> str | None:
        """Its response's id, once a client can know it."""
        return self.writer.builder.response_id if self.writer is not None and self.writer.is_open else None

    def stop(self, reason: IncompleteReason = "cancelled") -> None:
        """Stop generating, or prefilling after a warm-up's end.

        The response ends as incomplete, for this reason; one that is being kept is left alone.
        """
        if self.log.ended or not self.log.closing:
            self.stop_reason = reason
            self.task.cancel()

    def tell(self, event_type: str, fields: Event) -> bool:
        """Write an event about the response into its log; False once the response has ended."""
        if self.writer is None or self.log.ended:
            return False
        self.writer.append(self.writer.builder.tell(event_type, fields))
        return True

    def yield_at_boundary(self) -> None:
        """End where no item is open, now or at the next such place, so that a successor can go on.

        Source: Mid-turn steering guide, "Safe boundary".
        """
        if self.writer is None or self.log.closing:
            return
        self.writer.builder.yield_at_boundary()
        if self.writer.builder.is_at_boundary:
            self.stop("steered")
