"""The lanes of one connection: order, limits, refusals in their place."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.connection import Connection, Limits, Start, frame
from openline.protocol.errors import ProtocolError
from openline.protocol.events import Cancel, Inject, Refused, Steer, SteerRefused
from openline.protocol.states import IllegalTransition


def create(name: str, lane: str | None = None, **fields: Any) -> str:
    """A create that a test knows again by `name`."""
    stream_id = {} if lane is None else {"stream_id": lane}
    return json.dumps({"type": "response.create", "model": name, **stream_id, **fields})


def refused(name: str, lane: str | None = None) -> str:
    """A create whose lane is known and that is refused all the same."""
    return create(name, lane, background=True, previous_response_id=name)


def startable(connection: Connection) -> list[str]:
    """The names of what may start now; a refusal's in brackets."""
    names: list[str] = []
    while (turn := connection.next_turn()) is not None:
        names.append(turn.create.model if isinstance(turn, Start) else f"({turn.previous_response_id})")
    return names


def receive(connection: Connection, *messages: str) -> list[str]:
    for message in messages:
        connection.receive(message)
    return startable(connection)


def end(connection: Connection, lane: str | None = None) -> list[str]:
    connection.end_turn(lane)
    return startable(connection)


@pytest.fixture
def connection():
    return Connection(Limits())


@pytest.mark.parametrize("lane", [None, "a"])
def test_second_create_waits_for_its_lane(connection, lane):
    """Within a lane, FIFO and never two at once (WebSocket mode guide, "stream_id")."""
    assert receive(connection, create("1", lane), create("2", lane), create("3", lane)) == ["1"]
    assert end(connection, lane) == ["2"]
    assert end(connection, lane) == ["3"]
    assert end(connection, lane) == []


def test_other_lanes_go_on(connection):
    """Different lanes may run at once, the default lane among them (WebSocket mode guide, "stream_id")."""
    assert receive(connection, create("a1", "a"), create("a2", "a"), create("b1", "b"), create("0")) == [
        "a1",
        "b1",
        "0",
    ]
    assert end(connection, "b") == []
    assert end(connection, "a") == ["a2"]


def test_create_may_start_at_once_after_the_terminal_event(connection):
    """The next create may come right behind it (WebSocket mode guide, "Turn lifecycle")."""
    receive(connection, create("1"))
    end(connection)
    assert receive(connection, create("2")) == ["2"]


def test_create_comes_with_the_message_it_came_in(connection):
    """An engine passes on the fields that we do not read (Responses API reference, "Create a response")."""
    message = create("1", vendor={"x": 1})
    connection.receive(message)
    assert connection.next_turn().body == message


def test_acknowledgement_starts_nothing(connection):
    """`response.processed` is accepted and ignored (WebSocket mode guide, "Client events")."""
    assert receive(connection, '{"type":"response.processed","response_id":"resp_1"}') == []


# --- Sixteen at once


def lanes(connection: Connection, count: int) -> list[str]:
    return receive(connection, *[create(f"{n}", f"{n}") for n in range(count)])


def test_sixteen_run_and_the_seventeenth_waits(connection):
    """Further creates are queued, which is no error (WebSocket mode guide, "Limits")."""
    assert len(lanes(connection, 17)) == 16
    assert end(connection, "3") == ["16"]


def test_default_lane_counts_among_the_sixteen(connection):
    """The bound is over all lanes, the default one included (WebSocket mode guide, "Limits")."""
    assert len(lanes(connection, 16)) == 16
    assert receive(connection, create("0")) == []
    assert end(connection, "0") == ["0"]


def test_freed_slot_goes_to_the_lane_that_waited_longest(connection):
    """Nobody starves while others take turns (WebSocket mode guide, "Limits")."""
    lanes(connection, 16)
    receive(connection, create("x1", "x"), create("0b", "0"), create("y1", "y"), create("x2", "x"))
    assert [end(connection, "0"), end(connection, "1"), end(connection, "2")] == [["x1"], ["y1"], ["0b"]]
    assert end(connection, "x") == ["x2"]


def test_refusal_between_two_waiting_creates_keeps_their_order():
    """A refusal passes those that wait for a slot, and none of them passes another (WebSocket mode guide, "Limits")."""
    connection = Connection(Limits(responses_active_max=1))
    receive(connection, create("0"))
    assert receive(connection, create("a", "a"), refused("r", "r"), create("b", "b")) == ["(r)"]
    assert end(connection) == ["a"]
    assert end(connection, "a") == ["b"]


# --- Thirty-two names


def test_thirty_third_name_is_one_too_many(connection):
    """It is echoed in the error, the documented one, and the connection stays usable.

    Source: WebSocket mode guide, "stream_id" and "Errors to handle".
    """
    for n in range(32):
        receive(connection, create("x", f"{n}"))
        if n < 16:
            end(connection, f"{n}")
    with pytest.raises(ProtocolError) as caught:
        connection.receive(create("x", "one-more"))
    message = (
        "This WebSocket connection has reached its maximum number of distinct stream IDs (32). "
        "Reuse an existing stream_id or open a new WebSocket connection."
    )
    kind = {"type": "invalid_request_error", "code": "websocket_stream_limit_reached"}
    error = {**kind, "message": message, "param": "stream_id"}
    assert caught.value.frame() == {"type": "error", "status": 400, "stream_id": "one-more", "error": error}
    assert receive(connection, create("known", "0"), create("default")) == []
    assert end(connection, "16") == ["known"]
    assert end(connection, "17") == ["default"]


def test_names_are_never_released(connection):
    """The bound is over the connection's life, not over what runs (WebSocket mode guide, "stream_id")."""
    for n in range(32):
        receive(connection, create("x", f"{n}"))
        end(connection, f"{n}")
    with pytest.raises(ProtocolError, match=r"\(32\)"):
        connection.receive(create("x", "one-more"))


def test_refused_create_uses_up_its_name(connection):
    """The client counts its lanes by what it sent (WebSocket mode guide, "stream_id")."""
    assert len(receive(connection, *[refused("x", f"{n}") for n in range(32)])) == 32
    with pytest.raises(ProtocolError, match=r"\(32\)"):
        connection.receive(create("x", "one-more"))


def test_lane_limit_is_checked_before_the_queue():
    """Lane limit, then queue (WebSocket mode guide, "stream_id", order of checks)."""
    connection = Connection(Limits(lanes_named_max=1, creates_queued_max=1))
    connection.receive(create("1", "a"))
    with pytest.raises(ProtocolError) as caught:
        connection.receive(create("2", "b"))
    assert caught.value.code == "websocket_stream_limit_reached"


# --- A full queue


@pytest.mark.parametrize("lane", [None, "a"])
def test_full_queue_is_refused_at_once(lane):
    """503 with `retry-after`, and the lane it is about (WebSocket mode guide, "Failure matrix")."""
    connection = Connection(Limits(creates_queued_max=2))
    assert receive(connection, create("1", lane)) == ["1"]
    receive(connection, create("2", lane), create("3", lane))
    with pytest.raises(ProtocolError) as caught:
        connection.receive(create("4", lane))
    frame = caught.value.frame()
    assert (frame["status"], frame["error"]["code"]) == (503, "server_is_overloaded")
    assert (frame["headers"], frame.get("stream_id")) == ({"retry-after": "1"}, lane)
    assert end(connection, lane) == ["2"]
    assert receive(connection, create("5", lane)) == []
    assert [end(connection, lane), end(connection, lane)] == [["3"], ["5"]]


def test_refusals_count_in_the_queue():
    """Everything has a bound, a flood of refused creates too."""
    connection = Connection(Limits(creates_queued_max=2))
    receive(connection, create("1"))
    receive(connection, refused("2"), refused("3"))
    with pytest.raises(ProtocolError, match="2 creates wait"):
        connection.receive(refused("4"))


def test_bytes_that_wait_are_bounded():
    """Sixty-four creates may wait, but not of any size; one alone always may."""
    connection = Connection(Limits(creates_queued_bytes_max=1000))
    receive(connection, create("1"))
    big = create("2", instructions="x" * 2000)
    connection.receive(big)
    with pytest.raises(ProtocolError, match="bytes of creates wait") as caught:
        connection.receive(create("3"))
    assert (caught.value.code, caught.value.status) == ("server_is_overloaded", 503)
    assert end(connection) == ["2"]
    connection.receive(create("4"))


# --- A refusal in its lane


def test_refusal_waits_for_its_lanes_head(connection):
    """Clients take any `error` on a lane as the end of its running turn (WebSocket mode guide, "Turn lifecycle")."""
    assert receive(connection, create("1"), refused("2"), create("3")) == ["1"]
    assert end(connection) == ["(2)"]
    assert end(connection) == ["3"]


def test_refusal_on_an_idle_lane_is_written_at_once(connection):
    """There is nothing to wait for (WebSocket mode guide, "Turn lifecycle")."""
    assert receive(connection, refused("1", "a")) == ["(1)"]


def test_nothing_of_a_lane_overtakes_its_refusal(connection):
    """Until its error is written the next turn waits: an `error` after a terminal event ends a connection for clients.

    Source: WebSocket mode guide, "Turn lifecycle", hard rules.
    """
    assert receive(connection, refused("1", "a"), refused("2", "a"), create("3", "a")) == ["(1)"]
    assert end(connection, "a") == ["(2)"]
    assert end(connection, "a") == ["3"]


def test_refusal_needs_no_slot(connection):
    """Only responses are bounded to sixteen (WebSocket mode guide, "Limits")."""
    lanes(connection, 16)
    assert receive(connection, refused("r", "r"), create("s", "s")) == ["(r)"]


def test_refusal_on_one_lane_leaves_the_others_running(connection):
    """A request-scoped error is that request's alone (WebSocket mode guide, "stream_id")."""
    receive(connection, create("a1", "a"))
    assert receive(connection, refused("b1", "b"), create("b2", "b")) == ["(b1)"]
    assert end(connection, "b") == ["b2"]
    assert end(connection, "a") == []


@pytest.mark.parametrize("message", ["nope", '{"type":"x"}', create("x", "not a lane")])
def test_error_without_a_lane_disturbs_none(connection, message):
    """It is answered at once, and nothing that runs or waits changes (WebSocket mode guide, "stream_id")."""
    receive(connection, create("1"), create("2"))
    with pytest.raises(ProtocolError):
        connection.receive(message)
    assert startable(connection) == []
    assert end(connection) == ["2"]


# --- Messages that wait in no lane


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ({"type": "response.steer", "previous_response_id": "resp_1", "input": "Go on."}, Steer),
        ({"type": "response.cancel", "response_id": "resp_1"}, Cancel),
        ({"type": "response.inject", "response_id": "resp_1", "input": []}, Inject),
    ],
    ids=["steer", "cancel", "inject"],
)
def test_what_is_about_a_turn_waits_in_no_lane(connection, message, kind):
    """It is for the caller to act on at once, whatever waits (WebSocket mode guide, "Client events")."""
    receive(connection, create("1"), create("2"))
    assert isinstance(connection.receive(json.dumps(message)), kind)
    assert startable(connection) == []
    assert end(connection) == ["2"]


@pytest.mark.parametrize("message", [create("1"), refused("1"), '{"type":"response.processed"}'])
def test_what_has_its_place_in_a_lane_is_not_for_the_caller(connection, message):
    """`next_turn` gives it (WebSocket mode guide, "stream_id")."""
    assert connection.receive(message) is None


def test_refused_steer_takes_no_place(connection):
    """It is answered by an event of its own (Mid-turn steering guide, "response.steer.failed")."""
    receive(connection, create("1"))
    with pytest.raises(SteerRefused) as caught:
        connection.receive('{"type":"response.steer","previous_response_id":"r","input":"x","stream_id":"a"}')
    assert caught.value.code == "invalid_input"
    assert repr(connection) == "<Connection lanes=1 active=1 queued=0>"


# --- What goes on by itself, and what is cancelled before it starts


def successor(name: str, lane: str | None = None) -> Start:
    """A create that no message of the client's stands for."""
    connection = Connection(Limits())
    connection.receive(create(name, lane))
    start = connection.next_turn()
    assert isinstance(start, Start)
    return msgspec.structs.replace(start, is_successor=True)


@pytest.mark.parametrize("lane", [None, "a"])
def test_successor_goes_before_what_waits_in_its_lane(connection, lane):
    """A terminal event does not prove that the lane is idle (Mid-turn steering guide, "Outcomes")."""
    receive(connection, create("1", lane), create("2", lane))
    connection.end_turn(lane, successor("1b", lane))
    assert not connection.is_idle
    assert startable(connection) == ["1b"]
    assert end(connection, lane) == ["2"]
    assert end(connection, lane) == []
    assert connection.is_idle


def test_successor_waits_for_a_slot_as_any_create():
    """Its predecessor's goes to the lane that waited longest (WebSocket mode guide, "Limits")."""
    connection = Connection(Limits(responses_active_max=1))
    receive(connection, create("a1", "a"), create("b1", "b"))
    connection.end_turn("a", successor("a1b", "a"))
    assert startable(connection) == ["b1"]
    assert repr(connection) == "<Connection lanes=3 active=1 queued=1>"
    assert end(connection, "b") == ["a1b"]


def test_successor_is_no_create_too_many():
    """A full queue refuses what the client sends, not what it was promised; and the count holds."""
    connection = Connection(Limits(creates_queued_max=1, creates_queued_bytes_max=100))
    receive(connection, create("1"))
    receive(connection, create("2"))
    connection.end_turn(None, successor("1b"))
    with pytest.raises(ProtocolError, match="2 creates wait"):
        connection.receive(create("3"))
    assert [startable(connection), end(connection), end(connection)] == [["1b"], ["2"], []]
    assert receive(connection, create("4", instructions="x" * 200)) == ["4"]
    assert repr(connection) == "<Connection lanes=1 active=1 queued=0>"


@pytest.mark.parametrize(
    ("waiting", "continued"),
    [
        ([], False),
        ([create("2", previous_response_id="resp_1")], True),
        ([create("2", previous_response_id="resp_0"), create("3", previous_response_id="resp_1")], False),
        ([create("2")], False),
        ([create("2", "b", previous_response_id="resp_1")], False),
        ([create("2", previous_response_id="resp_1", background=True)], False),
    ],
    ids=["nothing", "continues it", "continues another first", "fresh", "fork", "refused"],
)
def test_lane_knows_whether_its_next_create_continues_a_response(connection, waiting, continued):
    """Such a create takes the place of a successor (Mid-turn steering guide, "Outcomes")."""
    for message in (create("1"), *waiting):
        connection.receive(message)
    connection.next_turn()
    assert connection.is_continued(None, "resp_1") == continued


def cancelled(connection: Connection, lane: str | None = None) -> list[str]:
    """Cancel at a lane's head; what comes out, a refusal as its code."""
    assert not connection.cancel_queued(lane)
    codes: list[str] = []
    while (turn := connection.next_turn()) is not None:
        codes.append(turn.create.model if isinstance(turn, Start) else turn.error.code)
    return codes


@pytest.mark.parametrize("lane", [None, "a"])
def test_create_at_the_head_is_cancelled_before_it_starts(lane):
    """It is refused in its lane, needs no slot for that, and takes no parent with it; later creates go on.

    Source: WebSocket mode guide, "Cancelling"; "Continuing": a cancellation evicts nothing.
    """
    connection = Connection(Limits(responses_active_max=1))
    receive(connection, create("0", "busy"), create("1", lane, previous_response_id="resp_1"), create("2", lane))
    assert not connection.cancel_queued(lane)
    refusal = connection.next_turn()
    assert isinstance(refusal, Refused)
    assert (refusal.error.code, refusal.stream_id, refusal.previous_response_id) == ("request_cancelled", lane, None)
    assert end(connection, lane) == []
    assert end(connection, "busy") == ["2"]


def test_nothing_that_runs_or_is_not_next_is_cancelled(connection):
    """A cancel is for what the lane is at (WebSocket mode guide, "Cancelling")."""
    assert cancelled(connection) == []
    receive(connection, create("1"), create("2"))
    assert cancelled(connection) == []
    assert end(connection) == ["2"]


def test_refusal_at_the_head_stays_what_it_is():
    """It is over anyway (WebSocket mode guide, "Cancelling")."""
    connection = Connection(Limits(responses_active_max=1))
    for message in (create("0", "busy"), refused("1")):
        connection.receive(message)
    connection.next_turn()
    assert cancelled(connection) == ["unsupported_parameter"]


def test_cancelled_create_gives_its_bytes_back():
    """What waits no more does not count (Limits)."""
    connection = Connection(Limits(responses_active_max=1, creates_queued_bytes_max=1000))
    receive(connection, create("0", "busy"))
    receive(connection, create("1", instructions="x" * 2000))
    assert cancelled(connection) == ["request_cancelled"]
    connection.end_turn(None)
    receive(connection, create("2"))
    assert end(connection, "busy") == ["2"]


def test_successor_that_has_not_started_is_for_the_caller_to_cancel():
    """No create of the client's stands for it, so no error answers it (WebSocket mode guide, "Turn lifecycle")."""
    connection = Connection(Limits(responses_active_max=1))
    receive(connection, create("1"), create("0", "busy"))
    connection.end_turn(None, successor("1b"))
    assert startable(connection) == ["0"]
    assert connection.cancel_queued(None)
    assert end(connection, "busy") == ["1b"]


# --- What the caller may not do


def test_turn_ends_once(connection):
    """A second end of the same turn is a defect of the caller's."""
    receive(connection, create("1"))
    connection.end_turn(None)
    with pytest.raises(IllegalTransition):
        connection.end_turn(None)
    assert lanes(connection, 17)[-1] == "15"


def test_connection_says_its_state(connection):
    """The `repr` is what an operator sees."""
    receive(connection, create("1"), create("2"), create("a", "a"))
    assert repr(connection) == "<Connection lanes=2 active=2 queued=1>"


# --- An event as a message


def test_default_lanes_events_carry_no_stream_id():
    """They go out as they were encoded (WebSocket mode guide, "Server events")."""
    assert frame(b'{"type":"x","delta":"\xc3\xa4"}', None) == b'{"type":"x","delta":"\xc3\xa4"}'


@given(
    st.dictionaries(st.text(), st.integers() | st.text(), min_size=1),
    st.from_regex(r"[A-Za-z0-9_.-]{1,256}", fullmatch=True),
)
def test_spliced_frame_is_the_event_with_its_stream_id(event, stream_id):
    """Present and equal on every event of the lane (WebSocket mode guide, "Server events")."""
    event.pop("stream_id", None)
    text = frame(msgspec.json.encode({"type": "x", **event}), stream_id)
    assert json.loads(text) == {"stream_id": stream_id, "type": "x", **event}
