"""One WebSocket connection's side of the protocol, without the socket.

Text in, turns that may start out. Lanes are FIFOs named by `stream_id`; the default
lane has no name. It is all sync: the shell moves the text, starts the turns, and says
when they have ended.

Source: WebSocket mode guide, "stream_id", "Limits", "Error frame".
"""

from __future__ import annotations

from collections import deque

import msgspec

from openline.protocol.errors import ProtocolError, request_cancelled
from openline.protocol.events import Cancel, Inject, Processed, Refused, SocketCreate, Steer, read_client_event
from openline.protocol.states import LaneEvent, LaneState, next_lane_state


class Limits(msgspec.Struct, frozen=True):
    """What one connection may have at once; the guide's own numbers are the defaults.

    Source: WebSocket mode guide, "Limits" (16 responses, 32 named streams); the queue's
    bounds are ours: four turns for each that may run, and two messages of the largest size.
    """

    lanes_named_max: int = 32
    responses_active_max: int = 16
    creates_queued_max: int = 64
    creates_queued_bytes_max: int = 128 * 1024 * 1024


class Start(msgspec.Struct, frozen=True):
    """A create that may start, and the message it came in, for engines that pass on what we do not read.

    Attributes:
        is_successor: it goes on by itself, so no create of the client's waits for an answer.
    """

    create: SocketCreate
    body: str | bytes
    is_successor: bool = False


Direct = Cancel | Inject | Steer  # what is about a turn, and waits in no lane


class _Lane:
    __slots__ = ("has_slot", "queue", "state")

    def __init__(self) -> None:
        self.state = LaneState.IDLE
        self.has_slot = False  # whether what runs counts as one of the connection's active responses
        self.queue: deque[Start | Refused] = deque()

    def take(self, event: LaneEvent) -> None:
        self.state = next_lane_state(self.state, event)


class Connection:
    """The lanes of one connection.

    Args:
        limits: bounds on lanes, running turns and waiting creates.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lanes: dict[str | None, _Lane] = {None: _Lane()}
        self._waiting: deque[str | None] = deque()  # lanes whose head may start, longest wait first
        self._active = 0
        self._queued = 0
        self._queued_bytes = 0
        self._retired: ProtocolError | None = None

    def __repr__(self) -> str:
        return f"<Connection lanes={len(self._lanes)} active={self._active} queued={self._queued}>"

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return all(lane.state is LaneState.IDLE for lane in self._lanes.values())

    def receive(self, message: str | bytes) -> Direct | None:
        """Take one message from the peer.

        A `response.create` joins the lane its `stream_id` names. Call `next_turn`
        afterwards, until it returns None, to learn what may start.

        Args:
            message: a JSON object in UTF-8; its size has been checked by the transport.

        Returns:
            what the shell has to do itself, now; None for what takes its place in a lane.

        Raises:
            ProtocolError: the message is refused at once; answer with its frame.
            SteerRefused: it steers, and cannot be read; answer with its event.

        Source: WebSocket mode guide, "stream_id".
        """
        try:
            event = read_client_event(message)
        except Refused as refused:
            self._enqueue(refused.stream_id, refused)
            return None
        if isinstance(event, SocketCreate):
            self._enqueue(event.stream_id, Start(event, message))
            return None
        return None if isinstance(event, Processed) else event

    def next_turn(self) -> Start | Refused | None:
        """The next create that may start, or the next refusal that has reached its lane's head.

        What is returned occupies its lane until `end_turn`, a refusal too: nothing of the
        lane may overtake its error. Only a create needs one of the connection's slots.
        """
        full = self._active >= self._limits.responses_active_max
        for place, stream_id in enumerate(self._waiting):
            lane = self._lanes[stream_id]
            head = lane.queue[0]
            if full and isinstance(head, Start):
                continue  # it keeps its place; only a refusal may pass it
            del self._waiting[place]
            self._queued -= 1
            lane.queue.popleft()
            self._queued_bytes -= _size(head)
            lane.take(LaneEvent.STARTED)
            lane.has_slot = isinstance(head, Start)
            self._active += lane.has_slot
            return head
        return None

    def end_turn(self, stream_id: str | None, successor: Start | None = None) -> None:
        """The running turn of this lane has had its terminal event, or its error, written.

        Args:
            successor: what goes on by itself, before all that waits in the lane.

        Source: Mid-turn steering guide: a terminal event does not prove that the lane is idle.
        """
        lane = self._lanes[stream_id]
        if successor is not None:
            lane.queue.appendleft(successor)
            self._queued += 1
            self._queued_bytes += _size(successor)
        lane.take(LaneEvent.ENDED if lane.queue else LaneEvent.ENDED_LAST)
        self._active -= lane.has_slot
        if lane.queue:
            self._waiting.append(stream_id)

    def is_continued(self, stream_id: str | None, response_id: str) -> bool:
        """Whether the next create of this lane continues that response."""
        queue = self._lanes[stream_id].queue
        return bool(queue) and isinstance(queue[0], Start) and queue[0].create.previous_response_id == response_id

    def cancel_queued(self, stream_id: str | None) -> bool:
        """Refuse the create at a lane's head, if it has not started.

        Returns:
            whether a successor stands there, which is for the shell to let go.

        Source: WebSocket mode guide, "Cancelling".
        """
        lane = self._lanes[stream_id]
        if lane.state is not LaneState.WAITING:
            return False
        self._refuse_queued(lane, stream_id, 0, request_cancelled())
        return isinstance(lane.queue[0], Start)

    def retire(self, error: ProtocolError) -> None:
        """Start nothing any more: what waits, and what still comes, is refused in its lane.

        Source: WebSocket mode guide, "Connection life".
        """
        self._retired = error
        for stream_id, lane in self._lanes.items():
            for place in range(len(lane.queue)):
                self._refuse_queued(lane, stream_id, place, error)

    def _refuse_queued(self, lane: _Lane, stream_id: str | None, place: int, error: ProtocolError) -> None:
        entry = lane.queue[place]
        if isinstance(entry, Start) and not entry.is_successor:  # which the shell lets go, without an error
            self._queued_bytes -= _size(entry)
            lane.queue[place] = Refused(error, stream_id, None)

    def _enqueue(self, stream_id: str | None, entry: Start | Refused) -> None:
        lane = self._lanes.get(stream_id) or self._new_lane(stream_id)
        if self._queued >= self._limits.creates_queued_max:
            raise _overloaded(f"{self._queued} creates", stream_id)
        if self._queued and self._queued_bytes + _size(entry) > self._limits.creates_queued_bytes_max:
            raise _overloaded(f"{self._queued_bytes} bytes of creates", stream_id)
        if self._retired is not None:
            entry = Refused(self._retired, stream_id, None)
        was_idle = lane.state is LaneState.IDLE
        lane.take(LaneEvent.QUEUED)
        lane.queue.append(entry)
        self._queued += 1
        self._queued_bytes += _size(entry)
        if was_idle:
            self._waiting.append(stream_id)

    def _new_lane(self, stream_id: str | None) -> _Lane:
        # Names are never released, as the guide says; the default lane is not counted.
        if len(self._lanes) > self._limits.lanes_named_max:
            message = (  # the guide's own words, as of all errors that it lists
                "This WebSocket connection has reached its maximum number of distinct stream IDs "
                f"({self._limits.lanes_named_max}). Reuse an existing stream_id or open a new WebSocket connection."
            )
            raise ProtocolError("websocket_stream_limit_reached", message, param="stream_id", stream_id=stream_id)
        lane = self._lanes[stream_id] = _Lane()
        return lane


def _size(entry: Start | Refused) -> int:
    return len(entry.body) if isinstance(entry, Start) else 0


def _overloaded(what: str, stream_id: str | None) -> ProtocolError:
    message = f"{what} wait on this connection already: let some of them end first."
    return ProtocolError("server_is_overloaded", message, headers={"retry-after": "1"}, stream_id=stream_id)


def frame(event: bytes, stream_id: str | None) -> bytes:
    """An encoded event as one WebSocket message, in UTF-8, with its lane's name spliced in.

    Events are encoded once, without `stream_id`, for every reader; a lane's name is made
    of characters that need no escape.
    """
    if stream_id is None:
        return event
    return b'{"stream_id":"%b",%b' % (stream_id.encode(), event[1:])
