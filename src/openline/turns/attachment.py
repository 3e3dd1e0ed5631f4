"""A client at a turn: the one that asked for it, or one that came back to it by its key."""

from __future__ import annotations

import asyncio

from openline.protocol.errors import ProtocolError
from openline.protocol.idempotency import not_held
from openline.turns.bind import TurnRequest
from openline.turns.log import LogReader, Window
from openline.turns.turn import Turn, place_of


class Attachment:
    """A client that reads a turn. It must leave, however its reading ends.

    One that comes later, over whatever connection, takes the place of the one that is delivered to, and the turn is
    its lane's latest as soon as it has ended, before its end can be read.

    Args:
        window: the bytes that may wait for a client that comes to a turn which has one already.

    Attributes:
        turn: which others may read as well, and whose own request may have come another way.
        request: this client's: how it reads, and on which lane.
        reader: of the turn's log.
        is_first: whether the turn was made for it.

    Raises:
        ProtocolError: what it wants to read is not held.
    """

    __slots__ = ("_is_early", "is_first", "reader", "request", "turn")

    def __init__(self, turn: Turn, request: TurnRequest, window: Window | None = None) -> None:
        self.turn = turn
        self.request = request
        self.is_first = window is None
        self._is_early = turn.begun is not None and not turn.begun.done()
        if turn.key is not None:
            if not self._is_early:
                _require_held(turn, request, len(turn.log))
            turn.is_wanted = turn.is_wanted or request.create.starting_after is None
            turn.is_shown = turn.is_shown or request.streams
        self.reader = _reader(turn, request, window)
        if window is not None and (place := place_of(request)) is not None:
            turn.keep_at(place)

    def __repr__(self) -> str:
        return f"<Attachment {self.request.transport} {self.turn!r}>"

    @property
    def is_new(self) -> bool:
        """Whether it is this client's create that is run; known once it is admitted."""
        return self.is_first and self.turn.replays is None

    def leave(self) -> None:
        """Stop reading; doing it again is harmless."""
        if self.turn.key is not None and (place := place_of(self.request)) is not None:
            self.turn.leave_place(place)
        self.reader.leave()

    async def admitted(self) -> None:
        """Wait until it is known whether the turn is a new one.

        Raises:
            ProtocolError: it is, or for another reason what this client wants to read is not held.
        """
        turn = self.turn
        if self._is_early and turn.begun is not None:
            await asyncio.wait([turn.begun])
            if turn.log.refusal is not None:
                return  # which is what it reads
            _require_held(turn, self.request, turn.begun.result())
        if turn.log.ended and self.request.transport == "websocket" and self.reader.cursor >= len(turn.log) > 0:
            # On a lane nothing but an event tells that it is free again.
            message = f"The response had ended with event {len(turn.log) - 1}: expected a number below it."
            raise ProtocolError("invalid_value", message, param="starting_after")


def _require_held(turn: Turn, request: TurnRequest, there: int) -> None:
    """Whether a client can have seen what it says that it has, and the rest can be read.

    Args:
        there: how many events of the turn there were when the client came, or when the turn began behind that.

    Raises:
        ProtocolError: it has seen more, so that was another turn, or the rest is not all kept.
    """
    after = request.create.starting_after
    if after is not None and after >= there:
        raise not_held(request.key or "", after)
    if request.streams and not turn.log.reaches(0 if after is None else after + 1):
        message = f"The events of response '{turn.response_id}' are no longer all kept: fetch the response."
        raise ProtocolError("resume_window_exceeded", message, param="starting_after")


def _reader(turn: Turn, request: TurnRequest, window: Window | None) -> LogReader:
    """What reads for a client, from where it wants to: a stream without a gap, or only the end."""
    after = request.create.starting_after
    if turn.key is None or not request.streams:
        after = None
    elif after is None:
        after = -1
    if window is None:
        return turn.log.deliver(after)
    return turn.log.observe(after) if request.in_background else turn.log.take_over(window, after)
