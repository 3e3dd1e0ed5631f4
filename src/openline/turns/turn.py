"""A running turn: its log, its writer, the task that runs it, and what others may do to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from openline.protocol.deltas import IncompleteReason
from openline.protocol.errors import ProtocolError
from openline.protocol.fold import Event
from openline.state.cache import Anchor, ConnectionCache
from openline.turns.bind import TurnRequest
from openline.turns.log import TurnLog, Window
from openline.turns.writer import Writer


class Place(NamedTuple):
    """A lane, whose latest a turn becomes when it ends."""

    cache: ConnectionCache
    stream_id: str | None


def place_of(request: TurnRequest) -> Place | None:
    """The lane that a create came on; None over HTTP, which has none."""
    return None if request.cache is None else Place(request.cache, request.stream_id)


class Turn:
    """One turn.

    Args:
        request: what was asked for.
        window: the bytes that may wait for its client.
        kept_bytes_max: how much of it can be read again.
        on_abandoned: what happens once nobody reads it any more; it is stopped if that is not said.
        body_hash: of its body, if it has an idempotency key.

    Attributes:
        id: of the response that it makes; nobody can know it before `is_known`.
        key: its idempotency key.
        writer: there once the request was bound.
        own_input: its items, of a turn that is held.
        task: that runs it; the registry's.
        stop_reason: why it was stopped, if it was.
        stopped: whether somebody wanted it to stop; a response that was being kept then is whole all the same.
        places: the lanes that it is on: one, or several where clients came back.
        anchor: what continues its response, of a turn with a key that has ended.
        error: why its response failed.
        is_shown: whether somebody has seen that there is a response: then it cannot be refused any more.
        is_claimed: whether its unfinished row is in the store.
        is_wanted: whether somebody who asked for it has not seen any of it; if not, it is only read again.
        begun: of a turn with a key: done once it is known whether it is a new one, with the number of its events then.
        replays: the id of the stored response that it gives again, if it generates none of its own.
    """

    __slots__ = (
        "anchor",
        "begun",
        "body_hash",
        "error",
        "id",
        "is_claimed",
        "is_shown",
        "is_wanted",
        "key",
        "log",
        "own_input",
        "places",
        "replays",
        "request",
        "stop_reason",
        "stopped",
        "task",
        "writer",
    )

    task: asyncio.Task[None]

    def __init__(
        self,
        request: TurnRequest,
        response_id: str,
        window: Window,
        kept_bytes_max: int = 0,
        *,
        on_abandoned: Callable[[Turn], None] | None = None,
        body_hash: bytes = b"",
    ) -> None:
        self.id = response_id
        self.request = request
        self.key = request.key
        self.body_hash = body_hash
        # What runs in the background goes on without readers, and waits for none.
        alone = request.in_background
        abandoned = self.stop if on_abandoned is None else lambda: on_abandoned(self)
        self.log = TurnLog(None if alone else window, None if alone else abandoned, kept_bytes_max)
        self.writer: Writer | None = None
        self.own_input: Sequence[bytes] = ()
        self.stop_reason: IncompleteReason = "cancelled"
        self.stopped = False
        place = place_of(request)
        self.places = [] if place is None else [place]
        self.anchor: Anchor | None = None
        self.error: ProtocolError | None = None
        self.is_shown = request.streams or alone
        self.is_claimed = False
        self.is_wanted = False
        self.begun: asyncio.Future[int] | None = (
            None if self.key is None else asyncio.get_running_loop().create_future()
        )
        self.replays: str | None = None

    def __repr__(self) -> str:
        return f"<Turn {self.request.transport} {self.log!r}>"

    @property
    def response_id(self) -> str:
        """Of the response that its events are about."""
        return self.replays or self.id

    @property
    def is_known(self) -> bool:
        """Whether a client can know its response."""
        return self.log.response is not None or (self.writer is not None and self.writer.is_open)

    @property
    def bytes(self) -> int:
        """What it costs to keep it in memory: its events, what was asked, and the context that can be continued.

        The context counts whole, although turns of one conversation share most of theirs.
        """
        context = self.anchor.node.bytes if self.anchor is not None else 0
        return self.log.kept_bytes + len(self.request.body) + sum(map(len, self.own_input)) + context

    def snapshot(self) -> Event:
        """The response as it stands; only of a turn that is known."""
        if self.log.response is not None:
            return self.log.response
        assert self.writer is not None, "it is known"
        return self.writer.builder.fold.snapshot()

    def begin(self, events: int) -> None:
        """It is known whether it is a new one; then none of its events stand yet."""
        if self.begun is not None and not self.begun.done():
            self.begun.set_result(events)

    def stop(self, reason: IncompleteReason = "cancelled") -> None:
        """Stop generating, or prefilling after a warm-up's end.

        The response ends as incomplete, for this reason; one that is being kept is left alone.
        """
        self.stopped = True
        if self.log.ended or not self.log.closing:
            self.stop_reason = reason
            self.task.cancel()

    def stop_prefill(self) -> None:
        """Nobody needs the prefix of a warm-up in its upstream's cache any more."""
        self.stopped = True
        if self.log.ended:
            self.task.cancel()

    @property
    def is_settled(self) -> bool:
        """Whether its events are: what is kept for those who come back is written before it has ended."""
        return self.log.ended or (self.log.closing and self.request.keeps_events)

    def tell(self, event_type: str, fields: Event) -> None:
        """Write an event about the response into its log; only of one that is known and not settled."""
        assert self.writer is not None, "it is known"
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

    # Its lanes.

    def keep_at(self, place: Place) -> None:
        """Be a lane's latest as soon as it has ended, or now if it has: a client came back on it."""
        if not self.log.ended:
            self.places.append(place)
        elif self.anchor is not None:
            place.cache.keep(self.request.owner, place.stream_id, self.anchor)
        elif self.log.response is not None and self.log.response["status"] == "failed":
            self._evict_failed_parent(place)

    def leave_place(self, place: Place) -> None:
        """A client has left it before it ended: its lane may go on to something else."""
        if place in self.places:
            self.places.remove(place)

    def keep_as_latest(self, anchor: Anchor) -> None:
        """Its response can be continued: it is its lanes' latest."""
        for place in self.places:
            place.cache.keep(self.request.owner, place.stream_id, anchor)
        if self.key is not None:
            self.anchor = anchor

    def evict_failed_parent(self) -> None:
        """It was refused or failed: its parent leaves the connections' memory, where it was the lane's own.

        Source: WebSocket mode guide, "Failed continuations".
        """
        for place in self.places:
            self._evict_failed_parent(place)

    def _evict_failed_parent(self, place: Place) -> None:
        place.cache.evict_failed(self.request.owner, place.stream_id, self.request.create.previous_response_id)

    def leave_connections(self) -> None:
        """Nothing of the connections that it was on is needed any more, nor may it stay in memory because of this turn."""
        self.places.clear()
        self.request = msgspec.structs.replace(self.request, cache=None)
