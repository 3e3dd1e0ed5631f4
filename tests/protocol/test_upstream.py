"""An upstream that speaks Responses: its words, our ids and numbers."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openline.protocol.deltas import UpstreamEvent, Usage
from openline.protocol.errors import ProtocolError
from openline.protocol.items import OpenCalls, item_of
from openline.protocol.states import TERMINAL_EVENTS, IllegalTransition
from protocol import upstream
from protocol.pair import Pair, check_sequence, opening
from protocol.spoiled import CHANGES, changed, every

TURN = upstream.turn()


def relayed(events: list[dict[str, Any]], response: dict[str, Any] | None = None) -> Pair:
    """A pair that has relayed these events of an upstream's."""
    pair = Pair(response)
    for event in events:
        pair.upstream(event["type"], **{key: value for key, value in event.items() if key != "type"})
    return pair


def without(event_type: str, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [event for event in events if event["type"] != f"response.{event_type}"]


def ended(event_type: str = "completed", **fields: Any) -> dict[str, Any]:
    response = {"id": "resp_theirs", "status": event_type, "output": [], **fields}
    return {"type": f"response.{event_type}", "response": response}


def test_relayed_turn_is_well_formed():
    """Our order, our numbers, one terminal event (Streaming reference, "Event order")."""
    pair = relayed(TURN)
    pair.finish()
    check_sequence(pair.events)
    assert pair.types[2:-1] == [event["type"].removeprefix("response.") for event in TURN[3:-1]]


def test_ids_and_numbers_and_lanes_are_ours():
    """The upstream's are never on the wire (the design, "One turn")."""
    pair = relayed(TURN)
    response = pair.finish()
    assert [item["id"] for item in response["output"]] == ["rs_0", "ws_1", "msg_2", "fc_3", "ctc_4", "mcp_5"]
    assert response["id"] == "resp_1"
    assert "theirs" not in repr(pair.events)
    assert not any("stream_id" in event for event in pair.events)


@pytest.mark.parametrize("place", range(3, len(TURN) - 1))
def test_words_are_the_upstreams(place):
    """Unknown events and fields travel through unread (WebSocket mode guide, "Framing")."""
    theirs = TURN[place]
    ours = relayed(TURN).events[place - 1]
    kept = theirs.keys() - {"item_id", "item"}
    assert {key: ours[key] for key in kept} == {key: theirs[key] for key in kept}
    if "item" in theirs:
        assert {**ours["item"], "id": None} == {**theirs["item"], "id": None}


@pytest.mark.parametrize("place", range(len(TURN)))
def test_upstream_that_dies_leaves_a_well_formed_failure(place):
    """Wherever it stops, open items are closed as incomplete, and nothing is said twice (Streaming reference, "Failed turn")."""
    pair = relayed(TURN[:place])
    was_open = [item["id"] for item in pair.client.output() if item.get("status") == "in_progress"]
    response = pair.fail()
    check_sequence(pair.events)
    assert response["status"] == "failed"
    assert [item["id"] for item in response["output"] if item.get("status") == "incomplete"] == was_open


def test_cut_summary_says_so():
    """`reasoning_summary_part.done` has `status: "incomplete"` if cut (Streaming reference, "Reasoning + text")."""
    pair = relayed(upstream.reasoning(0)[:3])
    pair.fail()
    done = pair.one("reasoning_summary_part.done")
    assert (done["status"], done["part"]["text"]) == ("incomplete", "Thi")
    assert pair.types.index("reasoning_summary_text.done") < pair.types.index("reasoning_summary_part.done")


@pytest.mark.parametrize("opened", ["output_text", "reasoning_text"])
def test_missing_content_part_is_supplied(opened):
    """openai-python's accumulator raises for text without a part (Streaming reference, accumulator invariants)."""
    events = upstream.message(0) if opened == "output_text" else upstream.reasoning(0)
    pair = relayed(without("content_part.added", events))
    pair.finish()
    check_sequence(pair.events)
    assert pair.one("content_part.added")["part"]["type"] == opened
    assert pair.types.index("content_part.added") < pair.types.index(f"{opened}.delta")


def test_missing_content_part_is_supplied_for_text_that_comes_at_once():
    """A `done` without deltas needs its part too (Streaming reference, accumulator invariants)."""
    events = without("output_text.delta", without("content_part.added", upstream.message(0)))
    events = without("output_text.annotation.added", events)
    assert relayed(events).types[3:6] == ["content_part.added", "output_text.done", "content_part.done"]


def test_item_that_comes_whole_gets_its_added():
    """Codex needs only `output_item.done`, others need both (Streaming reference, "Function-call turn")."""
    pair = relayed(upstream.call(0)[-1:])
    assert pair.types[2:] == ["output_item.added", "output_item.done"]
    added, done = pair.events[2]["item"], pair.events[3]["item"]
    assert (added["status"], done["status"]) == ("in_progress", "completed")
    assert (added["id"], added["call_id"]) == (done["id"], done["call_id"]) == ("fc_0", "call_0")


def test_text_of_an_item_that_was_never_added_waits_for_its_done():
    """The item's `done` has all of it (Streaming reference, "Function-call turn")."""
    pair = relayed(upstream.call(0)[1:])
    assert pair.types[2:] == ["output_item.added", "output_item.done"]
    assert pair.client.output()[0]["arguments"] == '{"a":1}'


@given(st.permutations([0] * 9 + [1] * 5 + [2] * 5), st.integers(0, 30))
def test_interleaved_items_keep_their_own_words(order, cut):
    """Parallel items may interleave by `output_index`, in any way, and be cut anywhere (Streaming reference, "Event order")."""
    streams = [iter(upstream.message(7)), iter(upstream.call(3)), iter(upstream.call(5, "custom_tool_call"))]
    pair = relayed([event for which in order[:cut] for event in [next(streams[which], None)] if event])
    pair.finish() if cut > len(order) else pair.fail()
    check_sequence(pair.events)


def test_index_is_ours_from_zero():
    """An upstream may skip indices, we do not (Streaming reference, accumulator invariants)."""
    pair = relayed([*upstream.message(7), *upstream.call(3)])
    assert {event["output_index"] for event in pair.events[2:]} == {0, 1}
    assert [item["type"] for item in pair.finish()["output"]] == ["message", "function_call"]


def test_upstreams_terminal_response_keeps_what_is_its_own():
    """The tier really used, its usage, and fields that we do not know (Responses API reference, "The response object")."""
    response = relayed(TURN).finish()
    assert (response["service_tier"], response["vendor"]) == ("flex", {"x": 1})
    assert response["usage"]["vendor_tokens"] == 2


OURS = {
    "id": "resp_theirs",
    "created_at": 1,
    "completed_at": 1,
    "model": "their-model",
    "status": "in_progress",
    "error": {"code": "x"},
    "instructions": "Leaked system prompt.",
    "tools": [{"type": "function", "name": "renamed"}],
    "metadata": {"theirs": "1"},
    "previous_response_id": "resp_theirs_0",
    "store": True,
    "background": True,
    "prompt_cache_key": "theirs",
}


@pytest.mark.parametrize("field", OURS)
def test_upstreams_terminal_response_does_not_decide_what_is_ours(field):
    """Whose response it is and what was asked, we know (Responses API reference, "The response object")."""
    opened = opening(instructions="Ours.", store=False)
    mine = relayed([ended()], opened).finish()
    theirs = relayed([ended(**{field: OURS[field]})], opened).finish()
    assert theirs == mine


def test_output_that_was_never_streamed_comes_with_the_end():
    """Servers that only pretend to stream send the whole output there (streaming reference, "Event order")."""
    item = {"type": "message", "id": "msg_theirs", "role": "assistant", "status": "completed", "content": []}
    final = relayed([ended(output=[item])]).finish()
    (message,) = final["output"]
    assert message == {**item, "id": message["id"]}
    assert message["id"] != "msg_theirs"


def test_output_that_was_streamed_is_not_brought_again():
    """What the events said stands (streaming reference, "Event order")."""
    final = relayed([*upstream.message(0), ended(output=[{"type": "message", "content": "other"}])]).finish()
    assert final["output"] == relayed([*upstream.message(0), ended()]).finish()["output"]


@pytest.mark.parametrize(
    "event_type",
    [
        None,
        "",
        [],
        5,
        "raw",
        "open",
        "close",
        "event",
        "reconnecting",
        "reconnected",
        'a"b',
        "a\\b",
        "a\nb",
        "é",
        "a" * 200,
    ],
)
def test_event_without_a_usable_type_goes_no_further(event_type):
    """Node's SDK drops its connection at one (WebSocket mode guide, "Framing")."""
    with_it = relayed([{"type": event_type, "note": 1}, ended()])
    assert len(with_it.events) == len(relayed([ended()]).events)


def test_null_of_an_upstream_does_not_hide_what_we_know():
    """A field that it leaves null keeps our echo (Responses API reference, "The response object")."""
    assert relayed([ended(temperature=None, text=None)]).finish()["temperature"] == 1.0


def test_upstreams_usage_is_completed():
    """openai-python requires the details and `cache_write_tokens` (Responses API reference, "usage")."""
    usage = {"input_tokens": 9, "output_tokens": 4, "total_tokens": 13, "input_tokens_details": {"cached_tokens": 5}}
    assert relayed([ended(usage=usage)]).finish()["usage"] == {
        **usage,
        "input_tokens_details": {"cached_tokens": 5, "cache_write_tokens": 0},
        "output_tokens_details": {"reasoning_tokens": 0},
    }


def test_engines_usage_goes_before_the_upstreams():
    """An engine that counts for itself is believed (Responses API reference, "usage")."""
    pair = relayed([ended(usage={"input_tokens": 9})])
    pair.send(Usage(1, 0, 0, 2, 0))
    assert pair.finish()["usage"]["total_tokens"] == 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"incomplete_details": {"reason": "content_filter"}}, "content_filter"),
        ({"incomplete_details": {"reason": "max_messages"}}, "max_messages"),
        ({"incomplete_details": None}, "max_output_tokens"),
        ({"incomplete_details": {"reason": 5}}, "max_output_tokens"),
        ({}, "max_output_tokens"),
    ],
)
def test_incomplete_upstream_tells_its_reason(fields, reason):
    """An incomplete response has its reason (Streaming reference, "Incomplete turn")."""
    pair = relayed([*upstream.message(0)[:4], ended("incomplete", **fields)])
    response = pair.finish()
    check_sequence(pair.events)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": reason})
    assert response["output"][0]["status"] == "incomplete"


@pytest.mark.parametrize("event_type", ["response.created", "response.queued", "response.in_progress"])
def test_upstreams_lifecycle_is_not_relayed(event_type):
    """Ours have been sent already (Streaming reference, "Event order")."""
    assert Pair().upstream(event_type, response={"id": "resp_theirs"}) == []


@pytest.mark.parametrize("event_type", ["response.failed", "error"])
def test_failure_of_an_upstream_is_never_relayed(event_type):
    """Its engine raises it as our error; relayed, the turn would end twice, or well (Streaming reference, "Failed turn")."""
    pair = Pair()
    with pytest.raises(IllegalTransition, match="ProtocolError"):
        pair.upstream(event_type, response={"id": "resp_theirs"}, message="x")
    assert pair.fail()["status"] == "failed"


ILLEGAL = {
    "item done twice": [*upstream.call(0), upstream.call(0)[-1]],
    "text after its item": [*upstream.call(0), upstream.call(0)[1]],
    "text for a later part": [upstream.message(0)[0], {**upstream.message(0)[2], "content_index": 3}],
    "part end without a part": [upstream.message(0)[0], upstream.message(0)[-2]],
    "item that is none": [{"type": "response.output_item.added", "output_index": 0}],
    "item of no shape": [{"type": "response.output_item.added", "output_index": 0, "item": "message"}],
    "item type of no shape": [{"type": "response.output_item.added", "output_index": 0, "item": {"type": []}}],
    "delta that is no text": [upstream.call(0)[0], {**upstream.call(0)[1], "delta": 5}],
    "delta without a part index": [upstream.message(0)[0], {"type": "response.output_text.delta", "output_index": 0}],
    "index of no shape": [{"type": "response.output_item.done", "output_index": [], "item": {}}],
    "terminal without a response": [{"type": "response.completed"}],
    "terminal of no shape": [{"type": "response.incomplete", "response": {"incomplete_details": "x"}}],
    "usage of no shape": [{"type": "response.completed", "response": {"usage": 5}}],
}


@pytest.mark.parametrize("events", ILLEGAL.values(), ids=ILLEGAL)
def test_illegal_upstream_event_is_named_and_the_turn_can_still_end(events):
    """A broken upstream costs its own turn, which ends once and without a gap (Streaming reference, "Failed turn")."""
    pair = relayed(events[:-1])
    with pytest.raises(IllegalTransition):
        pair.send(UpstreamEvent(events[-1]))
    pair.fail()
    assert [event["sequence_number"] for event in pair.events] == list(range(len(pair.events)))
    assert pair.types[-1] == "failed"
    assert pair.types.count("output_item.added") == pair.types.count("output_item.done")


_json = st.recursive(
    st.none() | st.integers(-1, 2) | st.sampled_from(["", "x", "message", "function_call", "output_text"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["type", "id", "text", "content", "reason", "usage"]), inner, max_size=3)
    ),
    max_leaves=5,
)
_types = sorted({event["type"] for event in TURN} | {"response.incomplete"})
_garbage = st.fixed_dictionaries(
    {"type": st.sampled_from(_types)},
    optional={
        "output_index": st.integers(-1, 2) | _json,
        "content_index": st.integers(-1, 1) | _json,
        "summary_index": st.integers(-1, 1) | _json,
        **dict.fromkeys(["item", "item_id", "part", "delta", "text", "arguments", "input", "response"], _json),
        **dict.fromkeys(["annotation", "self", "event_type", "type_"], _json),
    },
)


@given(st.lists(st.sampled_from(TURN) | _garbage, max_size=12))
def test_no_upstream_event_breaks_the_turn(events):
    """Whatever comes, it is relayed or refused, and then the turn still ends in one well-numbered terminal event."""
    pair = Pair()
    try:
        for event in events:
            pair.send(UpstreamEvent(event))
    except IllegalTransition:
        pair.fail()
    else:
        pair.finish()
    assert [event["sequence_number"] for event in pair.events] == list(range(len(pair.events)))
    assert pair.types[-1] in {"completed", "incomplete", "failed"}


def end_after(events: list[Any]) -> None:
    """Relay them, end the turn as its runner would, and read what came of it."""
    pair = Pair()
    try:
        for event in events:
            pair.send(UpstreamEvent(event))
    except IllegalTransition:
        response = pair.fail()
    else:
        response = pair.finish()
    assert [event["sequence_number"] for event in pair.events] == list(range(len(pair.events)))
    assert [event["type"] in TERMINAL_EVENTS for event in pair.events[:-1]] == [False] * (len(pair.events) - 1)
    with suppress(ProtocolError):  # which fails the turn
        OpenCalls().after([item_of(item) for item in response["output"]])


@pytest.mark.parametrize("value", [..., 7, {}, [[]]], ids=repr)
def test_a_turn_can_be_ended_whatever_a_field_of_an_upstream_is(value):
    """An event that cannot stand fails the turn, and that works: where it is seen, and where it is not.

    Source: guarantees, "Upstream faults".
    """
    for number, event in enumerate(TURN):
        for spoilt in every(event, value):
            end_after([*TURN[:number], spoilt])


@pytest.mark.long
@settings(max_examples=20_000)
@given(changes=CHANGES, count=st.integers(1, len(TURN)))
def test_a_turn_can_be_ended_whatever_an_upstream_sends(changes, count):
    """The same with several fields at once, and with events lost, doubled and moved."""
    end_after(changed(TURN, changes)[:count])
