"""The protocol's two state machines, as tables.

Two rules hold for this file. Every transition of a lane and of a response stands
here and nowhere else. And nothing here knows who plays which part: server, client,
fold and tests walk the same tables. A key that is absent *is* the illegal
transition. The diagrams in `docs/protocol/` are drawn from these dicts.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class LaneState(Enum):
    """What a lane, the FIFO that a `stream_id` names, is doing."""

    IDLE = "idle"
    WAITING = "waiting"
    RUNNING = "running"


class LaneEvent(Enum):
    """What can happen to a lane."""

    QUEUED = "queued"  # a create, or its refusal, took a place in the lane
    STARTED = "started"  # the turn at the head got one of the connection's slots, or its refusal is being written
    ENDED = "ended"  # the turn's terminal event, or its error, was written; others wait behind it
    ENDED_LAST = "ended_last"  # the turn's terminal event, or its error, was written; nothing waits


# WebSocket mode guide, "stream_id": within a lane turns run one after another in
# the order they came; different lanes run at once, as far as there are slots.
LANE: Final[dict[LaneState, dict[LaneEvent, LaneState]]] = {
    LaneState.IDLE: {LaneEvent.QUEUED: LaneState.WAITING},
    LaneState.WAITING: {
        LaneEvent.QUEUED: LaneState.WAITING,
        LaneEvent.STARTED: LaneState.RUNNING,
    },
    LaneState.RUNNING: {
        LaneEvent.QUEUED: LaneState.RUNNING,
        LaneEvent.ENDED: LaneState.WAITING,
        LaneEvent.ENDED_LAST: LaneState.IDLE,
    },
}


class ResponseState(Enum):
    """How far a response's event stream has come."""

    NEW = "new"
    CREATED = "created"
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    INCOMPLETE = "incomplete"
    FAILED = "failed"


# The name under which every event that belongs to an output item stands in the table.
ITEM_EVENT: Final = "item event"

# Streaming reference, "Event order": created, then (queued,) in_progress, then the
# items' events, then exactly one terminal event, always last. A second in_progress
# is the keepalive. A turn may also end before it got to in_progress.
_ENDS: Final = {
    "response.completed": ResponseState.COMPLETED,
    "response.incomplete": ResponseState.INCOMPLETE,
    "response.failed": ResponseState.FAILED,
}
RESPONSE: Final[dict[ResponseState, dict[str, ResponseState]]] = {
    ResponseState.NEW: {"response.created": ResponseState.CREATED},
    ResponseState.CREATED: {
        "response.queued": ResponseState.QUEUED,
        "response.in_progress": ResponseState.IN_PROGRESS,
        **_ENDS,
    },
    ResponseState.QUEUED: {"response.in_progress": ResponseState.IN_PROGRESS, **_ENDS},
    ResponseState.IN_PROGRESS: {
        "response.in_progress": ResponseState.IN_PROGRESS,
        ITEM_EVENT: ResponseState.IN_PROGRESS,
        **_ENDS,
    },
    ResponseState.COMPLETED: {},
    ResponseState.INCOMPLETE: {},
    ResponseState.FAILED: {},
}

LIFECYCLE_EVENTS: Final = frozenset({"response.created", "response.queued", "response.in_progress", *_ENDS})
TERMINAL_EVENTS: Final = frozenset(_ENDS)


class IllegalTransition(Exception):  # noqa: N818 - it names what happened, as h11's errors do
    """An event that its state machine does not allow: a defect of whoever made the event."""


def next_lane_state(state: LaneState, event: LaneEvent) -> LaneState:
    """Where `event` takes a lane.

    Raises:
        IllegalTransition: the table has no such row.
    """
    try:
        return LANE[state][event]
    except KeyError:
        msg = f"A lane that is {state.value} cannot take '{event.value}'."
        raise IllegalTransition(msg) from None


def next_response_state(state: ResponseState, event_type: str) -> ResponseState:
    """Where an event of this wire type takes a response.

    Raises:
        IllegalTransition: the table has no such row.
    """
    row = RESPONSE[state]
    found = row.get(event_type) if event_type in LIFECYCLE_EVENTS else row.get(ITEM_EVENT)
    if found is None:
        msg = f"A response that is {state.value} cannot take '{event_type}'."
        raise IllegalTransition(msg)
    return found
