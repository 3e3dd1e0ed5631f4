"""The two tables: every pair of a state and an event, legal and illegal."""

from __future__ import annotations

from itertools import product

import pytest

from openline.protocol.states import (
    ITEM_EVENT,
    LANE,
    LIFECYCLE_EVENTS,
    RESPONSE,
    TERMINAL_EVENTS,
    IllegalTransition,
    LaneEvent,
    LaneState,
    ResponseState,
    next_lane_state,
    next_response_state,
)

# The rules once more, told the other way round: for each event, where it is legal and where it leads.
LANE_RULES = {
    (LaneState.IDLE, LaneEvent.QUEUED): LaneState.WAITING,
    (LaneState.WAITING, LaneEvent.QUEUED): LaneState.WAITING,
    (LaneState.RUNNING, LaneEvent.QUEUED): LaneState.RUNNING,
    (LaneState.WAITING, LaneEvent.STARTED): LaneState.RUNNING,
    (LaneState.RUNNING, LaneEvent.ENDED): LaneState.WAITING,
    (LaneState.RUNNING, LaneEvent.ENDED_LAST): LaneState.IDLE,
}
R = ResponseState
STARTED = (R.CREATED, R.QUEUED, R.IN_PROGRESS)
RESPONSE_RULES = {
    (R.NEW, "response.created"): R.CREATED,
    (R.CREATED, "response.queued"): R.QUEUED,
    **{(state, "response.in_progress"): R.IN_PROGRESS for state in STARTED},
    **{(state, "response.completed"): R.COMPLETED for state in STARTED},
    **{(state, "response.incomplete"): R.INCOMPLETE for state in STARTED},
    **{(state, "response.failed"): R.FAILED for state in STARTED},
    (R.IN_PROGRESS, "response.output_text.delta"): R.IN_PROGRESS,
    (R.IN_PROGRESS, "vendor:anything"): R.IN_PROGRESS,
}
ITEM_EVENTS = ["response.output_text.delta", "vendor:anything"]


@pytest.mark.parametrize(("state", "event"), list(product(LaneState, LaneEvent)))
def test_lane_takes_exactly_what_the_guide_allows(state, event):
    """Within a lane turns run one after another, in the order they came (WebSocket mode guide, "stream_id")."""
    expected = LANE_RULES.get((state, event))
    if expected is None:
        with pytest.raises(IllegalTransition, match=f"{state.value} cannot take '{event.value}'"):
            next_lane_state(state, event)
    else:
        assert next_lane_state(state, event) is expected


@pytest.mark.parametrize(("state", "event"), list(product(ResponseState, [*sorted(LIFECYCLE_EVENTS), *ITEM_EVENTS])))
def test_response_takes_exactly_what_the_event_order_allows(state, event):
    """Created, then in_progress, then items, then exactly one terminal event (Streaming reference, "Event order")."""
    expected = RESPONSE_RULES.get((state, event))
    if expected is None:
        with pytest.raises(IllegalTransition, match=f"{state.value} cannot take '{event}'"):
            next_response_state(state, event)
    else:
        assert next_response_state(state, event) is expected


@pytest.mark.parametrize(("table", "states"), [(LANE, LaneState), (RESPONSE, ResponseState)])
def test_every_state_has_its_row_and_can_be_reached(table, states):
    """A table is exhaustive over its enum, and every state but the first is some event's result."""
    first = next(iter(states))
    assert list(table) == list(states)
    assert {target for row in table.values() for target in row.values()} | {first} == set(states)


def test_every_event_stands_somewhere_in_its_table():
    """No event is named that nothing can take."""
    assert {event for row in LANE.values() for event in row} == set(LaneEvent)
    assert {event for row in RESPONSE.values() for event in row} == LIFECYCLE_EVENTS | {ITEM_EVENT}


@pytest.mark.parametrize("state", [R.COMPLETED, R.INCOMPLETE, R.FAILED])
def test_a_terminal_state_takes_nothing(state):
    """Nothing follows the terminal event (Streaming reference, "Event order")."""
    assert RESPONSE[state] == {}


def test_each_terminal_event_leads_to_the_state_of_its_name():
    """`response.completed` completes, and so on (Streaming reference, "Event order")."""
    ends = {event: next_response_state(R.IN_PROGRESS, event) for event in TERMINAL_EVENTS}
    assert ends == {f"response.{state.value}": state for state in (R.COMPLETED, R.INCOMPLETE, R.FAILED)}
