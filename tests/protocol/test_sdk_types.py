"""OpenAI's own SDK is the oracle: its types parse every event, and its accumulators accept every sequence."""

from __future__ import annotations

import functools
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import omit
from openai._models import construct_type_unchecked
from openai.lib.responses_websocket._accumulator import ResponsesWebSocketAccumulator
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import (
    ResponseStreamEvent,
    ResponseTextConfig,
)
from openai.types.responses.responses_server_event import ResponseWsError
from pydantic import TypeAdapter

from openline.protocol.deltas import CallDelta, CallStarted, Ended, ReasoningDelta, RefusalDelta, TextDelta, Usage
from openline.protocol.errors import ERRORS, ProtocolError
from protocol import upstream
from protocol.meaning import batches
from protocol.pair import Pair, opening


@functools.cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(ResponseStreamEvent)


def _in_enums(event: dict[str, Any]) -> dict[str, Any]:
    """The event with its two open enums closed: Codex needs error codes, and a cancel a reason, that the SDK does not list."""
    response = event.get("response")
    if response is None:
        return event
    changes: dict[str, Any] = {}
    if response["error"] is not None:
        changes["error"] = {**response["error"], "code": "server_error"}
    if response["incomplete_details"] == {"reason": "cancelled"}:
        changes["incomplete_details"] = {"reason": "max_output_tokens"}
    return {**event, "response": {**response, **changes}}


def parsed(event: dict[str, Any]) -> Any:
    """The event as the SDK's type for it; unlike the SDK itself, which constructs, this checks every field."""
    found = _adapter().validate_json(msgspec.json.encode(_in_enums(event)), strict=True)
    assert found.type == event["type"]
    return found


LOGPROB = {"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []}
CALL = CallStarted("function_call", "call_1", "f", "ns")
CUSTOM = CallStarted("custom_tool_call", "call_2", "g")
TURNS = {
    "text": [TextDelta("a", [LOGPROB]), TextDelta("b"), Usage(9, 4, 1, 5, 2)],
    "refusal": [RefusalDelta("no")],
    "reasoning": [ReasoningDelta("hm"), TextDelta("a")],
    "calls": [CALL, CallDelta("{"), CallDelta("}"), CUSTOM, CallDelta("x"), TextDelta("a")],
    "warm-up": [],
}
OPENINGS = {
    "bare": opening(),
    "full": opening(
        instructions="Be brief.",
        previous_response_id="resp_0",
        tools=[msgspec.Raw(b'{"type":"function","name":"f","parameters":null}'), msgspec.Raw(b'{"type":"web_search"}')],
        tool_choice={"type": "function", "name": "f"},
        max_tool_calls=1,
        max_output_tokens=16,
        temperature=0.0,
        metadata={"a": "b"},
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        service_tier="flex",
        truncation="auto",
        user="u",
    ),
}


def run(deltas, end, response=None):
    pair = Pair(response)
    pair.send(*deltas)
    if end in ERRORS:
        pair.fail(end)
    else:
        pair.send(Ended(None if end == "finish" else end))
        pair.finish()
    return pair


@pytest.mark.parametrize("end", ["finish", "upstream_error", "max_output_tokens", "content_filter", "cancelled"])
@pytest.mark.parametrize("turn", TURNS)
def test_every_event_is_what_the_sdks_types_require(turn, end):
    """Required fields and types of openai-python, checked (Streaming reference, field table)."""
    for event in run(TURNS[turn], end).events:
        parsed(event)


@pytest.mark.parametrize("response", OPENINGS.values(), ids=OPENINGS)
def test_every_response_object_is_what_the_sdks_types_require(response):
    """Whatever was asked and echoed (Responses API reference, "The response object")."""
    events = run([TextDelta("a")], "finish", response).events
    assert isinstance(parsed(events[-1]).response.text, ResponseTextConfig)


def test_relayed_events_stay_what_the_sdks_types_require():
    """Hosted tools, summaries and citations of an upstream's, with our usage (Streaming reference, field table)."""
    pair = Pair()
    for event in upstream.turn():
        if not event["type"].startswith("slug:"):
            pair.upstream(**{"event_type": event["type"], **{k: v for k, v in event.items() if k != "type"}})
    pair.finish()
    for event in pair.events:
        parsed(event)
    assert parsed(pair.events[-1]).response.usage.input_tokens_details.cache_write_tokens == 0


def test_oracle_is_strict():
    """This test's own yardstick: a missing field or a wrong type does not pass."""
    event = run(TURNS["text"], "finish").events[4]
    parsed(event)
    for broken in ({**event, "delta": 5}, {key: value for key, value in event.items() if key != "item_id"}):
        with pytest.raises(ValueError, match="validation error"):
            parsed(broken)


@pytest.mark.parametrize("code", ERRORS)
def test_code_of_a_failure_reaches_the_app(code):
    """The SDK lists few codes but lets any through, and clients decide by them (Responses API reference, "The response object")."""
    event = run([TextDelta("a")], code).events[-1]
    as_the_sdk_does = construct_type_unchecked(value=event, type_=ResponseStreamEvent)
    assert as_the_sdk_does.response.error.code == (ERRORS[code].wire_code or "server_error")


def test_reason_of_a_cancelled_turn_reaches_the_app():
    """`cancelled` is no listed reason, and survives (WebSocket mode guide, "Cancelling")."""
    event = run([TextDelta("a")], "cancelled").events[-1]
    as_the_sdk_does = construct_type_unchecked(value=event, type_=ResponseStreamEvent)
    assert as_the_sdk_does.response.incomplete_details.reason == "cancelled"


@pytest.mark.parametrize("code", ERRORS)
def test_error_frame_is_what_the_sdks_type_requires(code):
    """The nested form of WebSocket mode (WebSocket mode guide, "Error frame")."""
    frame = ProtocolError(code, "It broke.", param="input", headers={"retry-after": "1"}).frame("a")
    error = TypeAdapter(ResponseWsError).validate_json(msgspec.json.encode(frame), strict=True)
    assert (error.status, error.error.message, error.stream_id) == (ERRORS[code].status, "It broke.", "a")


def accumulated(events):
    """The final response as `responses.stream()` of openai-python makes it, which enforces its invariants."""
    state = ResponseStreamState(input_tools=[], text_format=omit)
    return [fired for event in events for fired in state.handle_event(parsed(event))]


@pytest.mark.parametrize("turn", TURNS)
def test_stream_helper_accepts_the_sequence(turn):
    """`client.responses.stream()` (Streaming reference, accumulator invariants)."""
    pair = run(TURNS[turn], "finish")
    fired = accumulated(pair.events)
    assert len(fired) == len(pair.events)
    assert fired[-1].response.output_text == "".join(d.text for d in TURNS[turn] if isinstance(d, TextDelta))


def test_stream_helper_accepts_a_keepalive_in_mid_item():
    """A second `in_progress` with the snapshot so far breaks no accumulator (the design, "Our extensions")."""
    pair = Pair()
    pair.send(TextDelta("a"), CALL, CallDelta("{"))
    pair._carry(pair.server.keep_alive())
    pair.send(CallDelta("}"), TextDelta("b"))
    pair.finish()
    assert accumulated(pair.events)[-1].response.output_text == "ab"
    assert socket_accumulated(pair.events).output_text == "ab"


def socket_accumulated(events):
    accumulator = ResponsesWebSocketAccumulator()
    for event in events:
        accumulator.add_event(parsed({**event, "stream_id": "a"}))
    accumulator.detailed_snapshot()
    final = accumulator.get_final_response()
    assert final.to_dict() == _in_enums(events[-1])["response"]
    return accumulator.snapshot()


@pytest.mark.parametrize("end", ["finish", "upstream_error", "max_output_tokens"])
@pytest.mark.parametrize("turn", TURNS)
def test_socket_accumulator_accepts_the_sequence(turn, end):
    """The SDK's accumulator of a lane ends where our terminal event does (openai-python, `responses_websocket`)."""
    pair = run(TURNS[turn], end)
    snapshot = socket_accumulated(pair.events)
    assert (snapshot.terminal_type, snapshot.stream_id) == (pair.events[-1]["type"], "a")
    assert [item.item_id for item in snapshot.output] == [item["id"] for item in pair.client.output()]


@settings(max_examples=25)
@given(batches(), st.sampled_from(["finish", "upstream_error", "max_output_tokens"]))
def test_sdk_accepts_whatever_an_engine_says(said, end):
    """Types and accumulators both, for any turn (Streaming reference, accumulator invariants)."""
    pair = run([delta for batch in said for delta in batch], end)
    accumulated(pair.events)
    socket_accumulated(pair.events)
