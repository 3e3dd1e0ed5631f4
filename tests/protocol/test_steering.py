"""Steering input, what a response waits for, and the steers that wait for their successor.

Source: Mid-turn steering guide; WebSocket mode guide, "Steering".
"""

from __future__ import annotations

import json
import sys
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponsesServerEvent
from pydantic import TypeAdapter

from openline.protocol import steering
from openline.protocol.errors import ProtocolError
from openline.protocol.events import Create, Steer, SteerRefused, read_client_event, user_message
from openline.protocol.items import OUTPUT_OF_CALL
from openline.protocol.steering import Steered, Steers, require_support, required_input, steer_items

SERVER_EVENT = TypeAdapter(ResponsesServerEvent)


def steer(given: Any = "Go on.", target: str = "resp_1") -> Steer:
    """A steer as it is read from the wire."""
    message = {"type": "response.steer", "previous_response_id": target, "input": given}
    event = read_client_event(json.dumps(message))
    assert isinstance(event, Steer)
    return event


def steered(name: str, given: Any = "Go on.", target: str = "resp_1") -> Steered:
    """A steer that was accepted."""
    read = steer(given, target)
    return Steered(name, read, steer_items(read))


def refused(given: Any) -> SteerRefused:
    with pytest.raises(SteerRefused) as caught:
        steer_items(steer(given))
    return caught.value


# --- Its input


def test_a_text_is_one_user_message():
    """As the `input` of a create (Mid-turn steering guide, "response.steer", `input`)."""
    assert steer_items(steer("Keep it small.")) == (user_message("Keep it small."),)


PARTS = [
    {"type": "input_text", "text": "Like this:"},
    {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "low"},
    {"type": "input_file", "filename": "a.txt", "file_data": "QQ=="},
]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "Smaller."},
        {"type": "message", "role": "user", "content": "Smaller."},
        {"type": "message", "role": "user", "content": PARTS},
    ],
    ids=["short", "whole", "parts"],
)
def test_messages_stay_the_bytes_they_came_as(message):
    """Messages of the user's, with a text or with parts of text, image and file; `type` may be left out.

    Source: Mid-turn steering guide, "response.steer", `input`.
    """
    raw = json.dumps(message, indent=1)
    event = read_client_event(f'{{"type":"response.steer","previous_response_id":"r","input":[{raw}, {raw}]}}')
    assert isinstance(event, Steer)
    assert [(item.raw, item.type) for item in steer_items(event)] == [(raw.encode(), "message")] * 2


MESSAGE = {"role": "user", "content": "x"}
INVALID = {
    "null": None,
    "number": 7,
    "boolean": True,
    "object": MESSAGE,
    "no item": [],
    "a text among items": ["x"],
    "null among items": [None],
    "assistant": [{"role": "assistant", "content": "x"}],
    "system": [{"role": "system", "content": "x"}],
    "no role": [{"type": "message", "content": "x"}],
    "role null": [{"role": None, "content": "x"}],
    "no content": [{"role": "user"}],
    "content null": [{"role": "user", "content": None}],
    "content number": [{"role": "user", "content": 1}],
    "tool output": [{"type": "function_call_output", "call_id": "call_1", "output": "x"}],
    "tool output that says it is the user's": [{"type": "function_call_output", "role": "user", "content": "x"}],
    "item reference": [{"type": "item_reference", "id": "msg_1"}],
    "type null": [{**MESSAGE, "type": None}],
    "extra key": [{**MESSAGE, "id": "msg_1"}],
    "part of the assistant": [{"role": "user", "content": [{"type": "output_text", "text": "x"}]}],
    "unknown part": [{"role": "user", "content": [{"type": "input_audio", "data": "x"}]}],
    "part without type": [{"role": "user", "content": [{"text": "x"}]}],
    "part that is a text": [{"role": "user", "content": ["x"]}],
    "good, then bad": [MESSAGE, {"role": "developer", "content": "x"}],
}


@pytest.mark.parametrize("given", INVALID.values(), ids=INVALID)
def test_anything_else_is_refused_with_what_was_expected(given):
    """Tool outputs, other roles and other items are no steering input (Mid-turn steering guide, "response.steer")."""
    error = refused(given)
    assert error.code == "invalid_input"
    assert "'input'" in error.message
    assert "role 'user'" in error.message


def test_the_message_of_a_refusal_is_bounded():
    """What was sent may be quoted in it."""
    assert len(refused([{**MESSAGE, "k" * 5000: 1}]).message) < 400


def test_input_nested_too_deeply_is_refused_wherever_it_is_noticed():
    """A client's nesting ends no connection, however near it comes to the interpreter's limit."""

    def deeper(event: Steer, calls: int) -> object:
        return deeper(event, calls - 1) if calls else steer_items(event)

    answers: set[str] = set()
    for depth in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit()):
        nested = "[" * depth + "]" * depth
        message = f'{{"role":"user","content":[{{"type":"input_text","text":"x","more":{nested}}}]}}'
        try:
            event = read_client_event(f'{{"type":"response.steer","previous_response_id":"r","input":[{message}]}}')
            assert isinstance(event, Steer)
            deeper(event, 10)  # nearer to the limit than it was read
            answers.add("accepted")
        except (ProtocolError, SteerRefused) as error:
            answers.add(error.code)
    assert answers == {"accepted", "invalid_input", "invalid_json"}


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_near = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant"]) | _json},
        optional={"type": st.just("message") | _json, "content": st.text() | st.lists(_json, max_size=2), "id": _json},
    ),
    max_size=3,
)


@given(_json | _near)
def test_whatever_comes_is_read_or_refused(given):
    """What is read is messages of the user's and nothing else (Mid-turn steering guide, "response.steer")."""
    roles, codes = set(), set()
    try:
        roles |= {json.loads(item.raw)["role"] for item in steer_items(steer(given))}
    except SteerRefused as error:
        codes.add(error.code)
    assert (roles, codes) in (({"user"}, set()), (set(), {"invalid_input"}))


# --- What can be steered


@pytest.mark.parametrize(
    ("fields", "supported"),
    [
        ({}, True),
        ({"conversation": None, "context_management": []}, True),
        ({"conversation": "conv_1"}, False),
        ({"conversation": {"id": "conv_1"}}, False),
        ({"context_management": [{"type": "compaction", "compact_threshold": 1000}]}, False),
    ],
)
def test_conversations_and_automatic_compaction_are_not_steered(fields, supported):
    """`steering_not_supported` for a response of the one or with the other (Mid-turn steering guide, "Limits")."""
    codes = []
    try:
        require_support(steer(), msgspec.convert(fields, Create))
    except SteerRefused as error:
        codes.append(error.code)
    assert codes == ([] if supported else ["steering_not_supported"])


# --- What a response waits for


def call(call_type: str, **fields: Any) -> dict[str, Any]:
    return {"type": call_type, "id": "item_1", "call_id": "call_1", "status": "completed", **fields}


STUBS = {
    "function": (
        call("function_call", name="look", arguments="{}"),
        {"type": "function_call_output", "call_id": "call_1", "name": "look"},
    ),
    "custom": (
        call("custom_tool_call", name="patch", input="x"),
        {"type": "custom_tool_call_output", "call_id": "call_1"},
    ),
    "computer": (
        call("computer_call", action={"type": "screenshot"}),
        {"type": "computer_call_output", "call_id": "call_1"},
    ),
    "shell": (call("shell_call", action={"commands": ["ls"]}), {"type": "shell_call_output", "call_id": "call_1"}),
    "apply_patch": (
        call("apply_patch_call", operation={"type": "delete_file", "path": "a"}),
        {"type": "apply_patch_call_output", "call_id": "call_1"},
    ),
    "local_shell": (
        call("local_shell_call", action={"type": "exec", "command": ["ls"], "env": {}}),
        {"type": "local_shell_call_output", "call_id": "call_1"},
    ),
    "tool_search": (
        call("tool_search_call", arguments={}, execution="client"),
        {"type": "tool_search_output", "call_id": "call_1", "execution": "client"},
    ),
    "mcp_approval": (
        {"type": "mcp_approval_request", "id": "mcpr_1", "name": "f", "arguments": "{}", "server_label": "s"},
        {"type": "mcp_approval_response", "approval_request_id": "mcpr_1"},
    ),
}


@pytest.mark.parametrize("kind", STUBS)
def test_each_kind_of_call_has_its_stub(kind):
    """A stub names what it answers, and holds nothing else (Mid-turn steering guide, `required_input`)."""
    item, stub = STUBS[kind]
    assert required_input([item]) == [stub]


def test_every_call_that_can_be_answered_has_a_stub():
    """The table of calls and the stubs do not part ways."""
    made = {stub["type"] for item in OUTPUT_OF_CALL for stub in required_input([call(item, name="f")])}
    assert made == set(OUTPUT_OF_CALL.values())


def test_stubs_come_in_the_order_of_the_calls():
    """A client answers them one by one (Mid-turn steering guide, `required_input`)."""
    output = [
        {"type": "message", "id": "msg_1", "content": []},
        call("function_call", name="f", call_id="call_b"),
        call("custom_tool_call", name="g", call_id="call_a"),
        STUBS["mcp_approval"][0],
    ]
    assert [list(stub.values())[1] for stub in required_input(output)] == ["call_b", "call_a", "mcpr_1"]


@pytest.mark.parametrize(
    "output",
    [
        [],
        [{"type": "message", "id": "msg_1", "content": []}, {"type": "reasoning", "id": "rs_1", "summary": []}],
        [{"type": "web_search_call", "id": "ws_1", "status": "completed"}],
        [call("function_call", name="f", **{"async": True})],
        [call("tool_search_call", call_id=None, execution="server")],
        [call("shell_call"), {"type": "shell_call_output", "id": "sho_1", "call_id": "call_1", "output": []}],
    ],
    ids=["nothing", "words", "hosted tool", "answered later", "searched by the server", "run by the server"],
)
def test_nothing_is_required_where_nobody_waits(output):
    """Hosted tools answer themselves, and an async call may be answered in any later turn."""
    assert required_input(output) == []


# --- Its events


def parsed(event_type: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The event, once the SDK has read it strictly; nothing of it may be lost."""
    event = msgspec.json.decode(msgspec.json.encode({"type": event_type, "sequence_number": 3, **fields}))
    read = SERVER_EVENT.validate_json(json.dumps(event), strict=True)
    assert read.model_dump(mode="json", by_alias=True, exclude_unset=True, warnings="error") == event
    return event


def test_accepted_names_the_steer_and_its_response():
    """And not the input, which is ours now (Mid-turn steering guide, "response.steer.accepted")."""
    event = parsed(steering.ACCEPTED, steering.accepted(steered("steer_1")))
    assert event["steer"] == {"id": "steer_1", "previous_response_id": "resp_1"}


@pytest.mark.parametrize("kind", [kind for kind in STUBS if kind != "local_shell"])  # which the SDK does not list
def test_pending_says_what_it_waits_for(kind):
    """Reason, stubs and the steer (Mid-turn steering guide, "response.steer.pending")."""
    item, stub = STUBS[kind]
    event = parsed(steering.PENDING, steering.pending(steered("steer_1"), required_input([item])))
    assert (event["reason"], event["required_input"]) == ("waiting_for_required_input", [stub])
    assert event["steer"] == {"id": "steer_1", "previous_response_id": "resp_1"}


@pytest.mark.parametrize(("steer_id", "named"), [("steer_1", {"id": "steer_1"}), (None, {})])
@pytest.mark.parametrize("given", ["Smaller.", [{"type": "message", **MESSAGE}]])
def test_failed_gives_the_input_back_as_it_came(given, steer_id, named):
    """With the id that was given, if one was (Mid-turn steering guide, "response.steer.failed")."""
    error = SteerRefused("response_not_found", "There is none.", steer(given))
    event = parsed(steering.FAILED, steering.failed(error, steer_id))
    assert event["steer"] == {**named, "input": given, "previous_response_id": "resp_1"}
    assert event["error"] == {
        "type": "invalid_request_error",
        "code": "response_not_found",
        "message": "There is none.",
    }


# --- Those of a connection


@pytest.fixture
def steers():
    return Steers(3, 1000)


def test_steers_leave_in_the_order_in_which_they_came(steers):
    """Once, and each lane's own (Mid-turn steering guide, "Outcomes")."""
    first, second, other = steered("steer_1"), steered("steer_2"), steered("steer_3", target="resp_2")
    for lane, each in ((None, first), ("a", other), (None, second)):
        steers.add(lane, each)
    assert repr(steers) == "<Steers waiting=3>"
    assert list(steers.waiting(None)) == [first, second]
    assert (steers.take(None), steers.take(None)) == ((first, second), ())
    assert list(steers.waiting(None)) == []
    assert steers.take("a") == (other,)


def test_all_lanes_steers_can_be_taken_at_once(steers):
    """When a connection ends (WebSocket mode guide, "Connection life")."""
    first, other = steered("steer_1"), steered("steer_2", target="resp_2")
    steers.add(None, first)
    steers.add("a", other)
    assert (steers.take_all(), steers.take_all()) == ((first, other), ())


def too_many(steers: Steers, given: str) -> bool:
    try:
        steers.admit(steer(given))
    except SteerRefused as error:
        return error.code == "too_many_pending_steers"
    return False


def test_so_many_may_wait(steers):
    """Over all lanes, until a successor has taken them (Mid-turn steering guide, "too_many_pending_steers")."""
    for number, lane in enumerate((None, "a", "a")):
        assert not too_many(steers, "x")
        steers.add(lane, steered(f"steer_{number}"))
    assert too_many(steers, "x")
    steers.take("a")
    assert not too_many(steers, "x")


def test_so_many_bytes_may_wait(steers):
    """Of their input; one alone always may, as large as a message is (Mid-turn steering guide, codes)."""
    assert not too_many(steers, "x" * 5000)
    steers.add(None, steered("steer_1", "x" * 598))  # and two quotes
    assert not too_many(steers, "y" * 398)
    assert too_many(steers, "y" * 399)
    steers.add(None, steered("steer_2", "y" * 398))
    assert too_many(steers, "")


def test_it_is_too_late_for_a_lanes_latest_response(steers):
    """An id that ended is told from one that never was (Mid-turn steering guide, codes)."""
    steers.ended(None, "resp_1", 9)
    steers.ended("a", "resp_2", 5)
    steers.ended("a", "resp_3", 5)
    codes = [steers.too_late(steer(target=f"resp_{number}")).code for number in (1, 2, 3, 4)]
    assert codes == [
        "response_already_completed",
        "response_not_found",
        "response_already_completed",
        "response_not_found",
    ]


def test_an_unknown_id_is_not_quoted_without_end(steers):
    """A client may send any."""
    assert len(steers.too_late(steer(target="x" * 5000)).message) < 400


def test_a_responses_counter_goes_on_behind_its_end(steers):
    """Each response has its own, and an unknown one none (Mid-turn steering guide, `sequence_number`)."""
    steers.ended(None, "resp_1", 9)
    steers.ended("a", "resp_2", 5)
    asked = ("resp_1", "resp_2", "resp_1", "resp_0", "resp_1", "resp_0")
    assert [steers.number(response_id) for response_id in asked] == [9, 5, 10, 0, 11, 0]
    assert [steers.lane_of(response_id) for response_id in ("resp_1", "resp_2", "resp_0")] == [None, "a", None]
