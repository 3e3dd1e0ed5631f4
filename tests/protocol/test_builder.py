"""The canonical order of events, for each kind of turn."""

from __future__ import annotations

import pytest

from openline.protocol.builder import Builder
from openline.protocol.deltas import (
    CallDelta,
    CallStarted,
    Ended,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    Timings,
    UpstreamEvent,
    Usage,
)
from openline.protocol.states import IllegalTransition
from protocol import upstream
from protocol.pair import NOW, Pair, check_sequence, opening, over_the_wire, played

OPEN = ["created", "in_progress"]
LOGPROB = {"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []}


def call(name="f", number=0, call_type="function_call", namespace=None):
    return CallStarted(call_type, f"call_{number}", name, namespace)


def text_events(count=1):
    return [
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * count,
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ]


def call_events(count=1):
    kind = "function_call_arguments"
    return ["output_item.added", *[f"{kind}.delta"] * count, f"{kind}.done", "output_item.done"]


TURNS = {
    "text": ([TextDelta("a"), TextDelta("b")], [*text_events(2), "completed"]),
    "refusal": (
        [RefusalDelta("no")],
        [event.replace("output_text", "refusal") for event in text_events()] + ["completed"],
    ),
    "text then refusal": (
        [TextDelta("a"), RefusalDelta("no")],
        [
            *text_events()[:-1],
            "content_part.added",
            "refusal.delta",
            "refusal.done",
            "content_part.done",
            "output_item.done",
            "completed",
        ],
    ),
    "reasoning then text": (
        [ReasoningDelta("hm"), TextDelta("a")],
        [event.replace("output_text", "reasoning_text") for event in text_events()] + [*text_events(), "completed"],
    ),
    "parallel calls": (
        [call("f", 0), CallDelta("{"), CallDelta("}"), call("g", 1), CallDelta("{}")],
        [*call_events(2), *call_events(1), "completed"],
    ),
    "instant call": ([call()], [*call_events(0), "completed"]),
    "call then text": ([call(), CallDelta("{}"), TextDelta("a")], [*call_events(), *text_events(), "completed"]),
    "custom tool": (
        [call(call_type="custom_tool_call"), CallDelta("x")],
        [
            "output_item.added",
            "custom_tool_call_input.delta",
            "custom_tool_call_input.done",
            "output_item.done",
            "completed",
        ],
    ),
    "incomplete": ([TextDelta("a"), Ended("max_output_tokens")], [*text_events(), "incomplete"]),
    "warm-up": ([], ["completed"]),
}


@pytest.mark.parametrize("turn", TURNS)
def test_events_come_in_the_canonical_order(turn):
    """Item, part, deltas, each closed from the inside out (Streaming reference, "Event order")."""
    deltas, types = TURNS[turn]
    pair = played(*deltas)
    assert pair.types == [*OPEN, *types]
    check_sequence(pair.events)


@pytest.mark.parametrize("turn", TURNS)
def test_failing_anywhere_closes_what_is_open_and_ends_once(turn):
    """Open items are closed, then `response.failed`, at whichever delta it breaks (Streaming reference, "Failed turn")."""
    deltas, _ = TURNS[turn]
    for count in range(len(deltas) + 1):
        pair = Pair()
        pair.send(*deltas[:count])
        response = pair.fail()
        check_sequence(pair.events)
        assert (pair.types[-1], response["status"]) == ("failed", "failed")
        assert response["error"] == {"code": "upstream_error", "message": "It broke."}


@pytest.mark.parametrize("reason", ["max_output_tokens", "content_filter", "cancelled"])
@pytest.mark.parametrize("turn", TURNS)
def test_incomplete_anywhere_leaves_only_the_last_item_incomplete(turn, reason):
    """An incomplete item is the last one, and then the response is incomplete too (Streaming reference, "Event order")."""
    deltas, _ = TURNS[turn]
    for count in range(len(deltas) + 1):
        pair = Pair()
        pair.send(*deltas[:count], Ended(reason))
        response = pair.finish()
        check_sequence(pair.events)
        statuses = [item["status"] for item in response["output"]]
        assert statuses == ["completed"] * (len(statuses) - 1) + ["incomplete"] * bool(statuses)
        assert response["incomplete_details"] == {"reason": reason}
        assert (response["status"], response["completed_at"], response["error"]) == ("incomplete", None, None)


# --- What the events carry


def test_created_has_no_output_yet():
    """`output` empty, `usage` null, status in_progress (Streaming reference, "Event order")."""
    for event in Pair().events:
        response = event["response"]
        assert (response["output"], response["usage"], response["status"]) == ([], None, "in_progress")


def test_message_opens_empty_and_ends_whole():
    """Added with `content: []`, the part with `text: ""` (Streaming reference, "Plain text turn")."""
    pair = played(TextDelta("Hel"), TextDelta("lo"))
    where = {"item_id": "msg_0", "output_index": 0, "content_index": 0}
    assert pair.events[2:-1] == [
        {
            "type": "response.output_item.added",
            "sequence_number": 2,
            "output_index": 0,
            "item": {"type": "message", "status": "in_progress", "role": "assistant", "content": [], "id": "msg_0"},
        },
        {
            "type": "response.content_part.added",
            "sequence_number": 3,
            **where,
            "part": {"type": "output_text", "text": "", "annotations": []},
        },
        {"type": "response.output_text.delta", "sequence_number": 4, **where, "delta": "Hel", "logprobs": []},
        {"type": "response.output_text.delta", "sequence_number": 5, **where, "delta": "lo", "logprobs": []},
        {"type": "response.output_text.done", "sequence_number": 6, **where, "text": "Hello", "logprobs": []},
        {
            "type": "response.content_part.done",
            "sequence_number": 7,
            **where,
            "part": {"type": "output_text", "text": "Hello", "annotations": []},
        },
        {
            "type": "response.output_item.done",
            "sequence_number": 8,
            "output_index": 0,
            "item": {
                "type": "message",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "Hello", "annotations": []}],
                "id": "msg_0",
            },
        },
    ]


def test_function_call_opens_with_its_name_and_no_arguments():
    """`arguments: ""`, real `name`, `call_id`, `id`; `done` repeats the name (Streaming reference, "Function-call turn")."""
    pair = played(call("get_weather"), CallDelta('{"city":'), CallDelta('"Paris"}'))
    opened = {"type": "function_call", "call_id": "call_0", "name": "get_weather", "id": "fc_0"}
    assert pair.one("output_item.added")["item"] == {**opened, "status": "in_progress", "arguments": ""}
    done = pair.one("function_call_arguments.done")
    assert (done["name"], done["item_id"], done["arguments"]) == ("get_weather", "fc_0", '{"city":"Paris"}')
    assert pair.one("output_item.done")["item"] == {**opened, "status": "completed", "arguments": '{"city":"Paris"}'}


def test_custom_call_carries_its_input():
    """`input` where a function has `arguments`, and no `name` on its `done` (Streaming reference, "Custom tool")."""
    pair = played(call("sh", call_type="custom_tool_call"), CallDelta("ls"), CallDelta(" -l"))
    assert pair.one("output_item.added")["item"]["input"] == ""
    assert pair.one("output_item.done")["item"]["input"] == "ls -l"
    done = pair.one("custom_tool_call_input.done")
    assert done == {
        "type": "response.custom_tool_call_input.done",
        "sequence_number": 5,
        "item_id": "ctc_0",
        "output_index": 0,
        "input": "ls -l",
    }


@pytest.mark.parametrize("call_type", ["function_call", "custom_tool_call"])
def test_namespace_of_a_call_is_on_its_item(call_type):
    """A function of a `namespace` tool names it, others have no such key (Responses API reference, "Items")."""
    inside = played(call(call_type=call_type, namespace="files")).one("output_item.done")["item"]
    outside = played(call(call_type=call_type)).one("output_item.done")["item"]
    assert (inside["namespace"], "namespace" in outside) == ("files", False)


def test_cut_call_keeps_its_partial_arguments():
    """`arguments.done` with the partial string, item incomplete (Streaming reference, "Incomplete turn")."""
    pair = played(call(), CallDelta('{"ci'), Ended("max_output_tokens"))
    assert pair.one("function_call_arguments.done")["arguments"] == '{"ci'
    assert pair.one("output_item.done")["item"]["status"] == "incomplete"


def test_reasoning_is_an_item_with_content_and_an_empty_summary():
    """Raw reasoning is content; `summary` is there all the same (Streaming reference, "Reasoning + text")."""
    item = played(ReasoningDelta("Let me"), ReasoningDelta(" see.")).one("output_item.done")["item"]
    assert item == {
        "type": "reasoning",
        "status": "completed",
        "summary": [],
        "content": [{"type": "reasoning_text", "text": "Let me see."}],
        "id": "rs_0",
    }


def test_refusal_is_a_part_and_the_turn_completes():
    """A refusal is no failure (Streaming reference, "Plain text turn")."""
    pair = played(RefusalDelta("I "), RefusalDelta("won't."))
    assert pair.one("refusal.done")["refusal"] == "I won't."
    item = pair.one("completed")["response"]["output"][0]
    assert (item["type"], item["content"]) == ("message", [{"type": "refusal", "refusal": "I won't."}])


def test_logprobs_are_on_deltas_and_whole_at_the_end():
    """Each delta has its own, `done` and the part have all (Streaming reference, field table)."""
    pair = played(TextDelta("a", [LOGPROB]), TextDelta("b"), TextDelta("c", [LOGPROB]))
    deltas = [event["logprobs"] for event in pair.events if event["type"] == "response.output_text.delta"]
    assert deltas == [[LOGPROB], [], [LOGPROB]]
    assert pair.one("output_text.done")["logprobs"] == [LOGPROB, LOGPROB]
    assert pair.one("content_part.done")["part"]["logprobs"] == [LOGPROB, LOGPROB]


def test_part_without_logprobs_has_no_such_key():
    """Where they were not asked for (Responses API reference, "Items")."""
    assert "logprobs" not in played(TextDelta("a")).one("content_part.done")["part"]


def test_every_item_has_an_id_of_its_own():
    """One id an item, with the field's prefix (Responses API reference, "The response object")."""
    pair = played(ReasoningDelta("a"), TextDelta("a"), call(), call("g", 1, "custom_tool_call"), TextDelta("b"))
    output = pair.one("completed")["response"]["output"]
    assert [item["id"] for item in output] == ["rs_0", "msg_1", "fc_2", "ctc_3", "msg_4"]


def test_usage_is_complete_and_the_last_one_counts():
    """Every key that openai-python requires, `cache_write_tokens` among them (Responses API reference, "usage")."""
    pair = played(Usage(1, 1, 1, 1, 1), TextDelta("a"), Usage(100, 40, 8, 20, 5))
    assert pair.one("completed")["response"]["usage"] == {
        "input_tokens": 100,
        "input_tokens_details": {"cached_tokens": 40, "cache_write_tokens": 8},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 5},
        "total_tokens": 120,
    }


@pytest.mark.parametrize(("asked", "told"), [(True, {"prompt_ms": 2.5, "predicted_ms": 4.0}), (False, None)])
def test_the_engines_times_are_told_to_who_asks(asked, told):
    """Stock clients see the plain usage (docs/adr/0004)."""
    builder = Builder(opening(), lambda prefix: prefix, timings=asked)
    builder.apply([Usage(1, timings=Timings(2.5, 4.0)), Ended()])
    usage = builder.final(NOW)["usage"]
    assert usage.get("openline_timings") == told
    assert usage["input_tokens"] == 1


def test_times_that_nobody_told_are_left_out():
    """Not every engine tells them."""
    builder = Builder(opening(), lambda prefix: prefix, timings=True)
    builder.apply([Usage(1), Ended()])
    assert "openline_timings" not in builder.final(NOW)["usage"]


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_usage_is_told_however_the_turn_ends(end):
    """A failed turn tells its usage too, if it is known (Streaming reference, "Failed turn")."""
    pair = Pair()
    pair.send(TextDelta("a"), Usage(3))
    assert getattr(pair, end)()["usage"]["total_tokens"] == 3


def test_completed_has_its_time():
    """`completed_at` is null unless completed (Responses API reference, "The response object")."""
    assert played().one("completed")["response"]["completed_at"] == NOW
    assert Pair().fail()["completed_at"] is None


def test_terminal_response_is_the_opening_one_with_its_end():
    """What was asked is echoed unchanged (Responses API reference, "The response object")."""
    opened = opening(model="m", instructions="Be brief.", metadata={"a": "b"})
    ended = played(response=opened).one("completed")["response"]
    assert ended == {**opened, "status": "completed", "completed_at": NOW}


def test_warm_up_has_no_items():
    """Created, in_progress, completed with `output: []` (Streaming reference, "Warm-up")."""
    pair = played(Usage(7))
    assert pair.types == [*OPEN, "completed"]
    response = pair.events[-1]["response"]
    assert (response["output"], response["usage"]["output_tokens"]) == ([], 0)


# --- Cut: an upstream ends the response, or fails, while a tool that it runs is at work


def cut(item, *rest, by="max_output_tokens"):
    """An upstream's item that is not done when the response ends, and what came of it."""
    pair = Pair()
    pair.upstream("response.output_item.added", output_index=4, item={"id": "theirs", "status": "in_progress", **item})
    for event_type, fields in rest:
        pair.upstream(f"response.{event_type}", output_index=4, **fields)
    if by == "failure":
        pair.fail()
    else:
        pair.send(Ended(None if by == "end" else by))
        pair.finish()
    check_sequence(pair.events)
    return pair


CODE = {"type": "code_interpreter_call", "code": None, "container_id": "cntr_1", "outputs": None}
MCP = {"type": "mcp_call", "name": "f", "server_label": "s", "arguments": ""}
IMAGE = {"type": "image_generation_call", "result": None}
PATCH = {"type": "apply_patch_call", "call_id": "call_1", "operation": {"type": "delete_file", "path": "a"}}
COMMANDS = {"type": "shell_call", "call_id": "call_1", "action": {"commands": [], "timeout_ms": 7}}
CUTS = pytest.mark.parametrize("by", ["max_output_tokens", "content_filter", "cancelled", "failure"])


@CUTS
@pytest.mark.parametrize(
    ("item", "kind", "key"), [(CODE, "code_interpreter_call_code", "code"), (MCP, "mcp_call_arguments", "arguments")]
)
@pytest.mark.parametrize("pieces", [(), ("1 +",), ("1 ", "+ ")])
def test_cut_call_of_a_hosted_tool_keeps_what_came(item, kind, key, pieces, by):
    """Its code or arguments so far, in their `done` and in the item (Streaming reference, "Incomplete turn")."""
    pair = cut(item, *[(f"{kind}.delta", {"item_id": "theirs", "delta": piece}) for piece in pieces], by=by)
    text = "".join(pieces)
    done, item_done = pair.one(f"{kind}.done"), pair.one("output_item.done")["item"]
    assert (done[key], done["output_index"], done["item_id"]) == (text, 0, item_done["id"])
    assert item_done == {**item, "id": item_done["id"], "status": "incomplete", key: text}


def test_code_that_was_whole_is_not_closed_again():
    """Only what is open is closed (Streaming reference, "Incomplete turn")."""
    pair = cut(CODE, ("code_interpreter_call_code.done", {"item_id": "theirs", "code": "1 + 1"}))
    assert pair.one("code_interpreter_call_code.done")["code"] == "1 + 1"
    assert pair.one("output_item.done")["item"]["code"] == "1 + 1"


@CUTS
def test_cut_shell_call_keeps_its_commands(by):
    """Those that were whole and the one that was not, in their `done` and in the item.

    Source: Streaming reference, "Incomplete turn".
    """
    first, second = {"command_index": 0}, {"command_index": 1}
    kind = "shell_call_command"
    pair = cut(
        COMMANDS,
        (f"{kind}.added", {**first, "command": ""}),
        (f"{kind}.delta", {**first, "delta": "cd "}),
        (f"{kind}.done", {**first, "command": "cd docs"}),
        (f"{kind}.added", {**second, "command": ""}),
        (f"{kind}.delta", {**second, "delta": "ls "}),
        (f"{kind}.delta", {**second, "delta": "-"}),
        by=by,
    )
    done = [event for event in pair.events if event["type"] == f"response.{kind}.done"]
    assert [(event["command_index"], event["command"]) for event in done] == [(0, "cd docs"), (1, "ls -")]
    assert {event["output_index"] for event in done} == {0}
    item = pair.one("output_item.done")["item"]
    assert (item["status"], item["action"]) == ("incomplete", {"commands": ["cd docs", "ls -"], "timeout_ms": 7})


@CUTS
@pytest.mark.parametrize(("item", "status"), [(IMAGE, "failed"), (PATCH, "in_progress")])
def test_cut_item_whose_type_knows_no_incomplete_has_an_allowed_status(item, status, by):
    """There is no image, and nobody has completed the patch (Responses API reference, "Items": their `status`)."""
    assert cut(item, by=by).one("output_item.done")["item"]["status"] == status


@pytest.mark.parametrize("item", [CODE, MCP, IMAGE, PATCH, COMMANDS])
def test_item_that_its_upstream_left_open_is_completed_with_the_response(item):
    """Nothing was cut (Streaming reference, "Event order")."""
    assert cut(item, by="end").one("output_item.done")["item"]["status"] == "completed"


# --- Kept first, announced second


def test_final_response_is_known_before_it_is_announced():
    """It can be kept before a client sees it, and chains from it (the design, keep, then announce)."""
    pair, builder = Pair(), Pair().server
    pair.send(TextDelta("a"))
    builder.apply([TextDelta("a")])
    kept = builder.final(NOW)
    assert not builder.fold.ended
    assert builder.announce(kept)[-1]["response"] == kept == pair.finish()


def test_turn_that_could_not_be_kept_fails():
    """Its items stand, and the response is failed, once (the design, keep, then announce)."""
    pair = Pair()
    pair.send(TextDelta("a"))
    pair.server.final(NOW)
    response = pair.fail("store_unavailable")
    check_sequence(pair.events)
    assert (response["error"]["code"], response["completed_at"]) == ("store_unavailable", None)
    assert response["output"][0]["status"] == "completed"


# --- Steered: it ends where no item is open


def steered_types(before, behind):
    """A response that is steered behind some deltas: the events that come of the others, and of its end."""
    pair = Pair()
    pair.send(*before)
    pair.server.yield_at_boundary()
    count = len(pair.types)
    pair.send(*behind)
    response = pair.finish()
    check_sequence(pair.events)
    assert pair.server.yielded == (response["incomplete_details"] == {"reason": "steered"})
    return pair.types[count:], response


@pytest.mark.parametrize(
    ("before", "behind", "cut"),
    [
        ([], [], True),
        ([ReasoningDelta("hm")], [ReasoningDelta("m"), TextDelta("a")], True),
        ([TextDelta("a")], [TextDelta("b"), Ended()], False),
        ([TextDelta("a")], [RefusalDelta("no"), Ended()], False),
        ([TextDelta("a")], [call(), CallDelta("{}"), Ended()], True),
        ([TextDelta("a")], [Usage(1), Ended("max_output_tokens")], False),
        ([call(), CallDelta("{")], [CallDelta("}"), call("g", 1), TextDelta("a"), Ended()], False),
        ([call(), TextDelta("a")], [TextDelta("b"), Ended()], False),
        ([Ended()], [], False),
    ],
    ids=[
        "nothing said",
        "reasoning ends",
        "text ends",
        "another part of the item",
        "call begins",
        "tokens end",
        "in a call",
        "behind a call",
        "over",
    ],
)
def test_steered_response_ends_before_its_next_item(before, behind, cut):
    """The item that is being written finishes, another does not begin; not where a call waits for the client.

    Source: Mid-turn steering guide, "Safe boundary".
    """
    types, response = steered_types(before, behind)
    assert (response["incomplete_details"] == {"reason": "steered"}) == cut
    assert types[-1] == ("incomplete" if response["incomplete_details"] else "completed")
    if cut:
        assert "output_item.added" not in types
        assert {item["status"] for item in response["output"]} <= {"completed"}


def test_steered_response_hears_its_engine_out_where_it_is_not_cut():
    """What comes behind its end, as the tokens that were used, still counts (Mid-turn steering guide, "Outcomes")."""
    pair = Pair()
    pair.send(TextDelta("a"))
    pair.server.yield_at_boundary()
    pair.send(Ended())
    assert not pair.server.yielded
    pair.send(Usage(3))
    assert pair.finish()["usage"]["total_tokens"] == 3


def test_steer_that_came_before_the_opening_counts():
    """It may be known earlier than the first delta."""
    pair = Pair()
    pair.server.yield_at_boundary()
    assert pair.send() == []
    assert pair.finish()["incomplete_details"] == {"reason": "steered"}


def items(*kinds):
    """An upstream's items, each as the list of its events."""
    return [getattr(upstream, kind)(index) for index, kind in enumerate(kinds)]


def test_steered_upstream_is_cut_between_two_items():
    """As soon as the first one is done, and what came in the same read is not begun (Mid-turn steering guide)."""
    first, second = items("reasoning", "message")
    for batch in (first[1:], [*first[1:], *second]):
        types, response = steered_types([UpstreamEvent(first[0])], [UpstreamEvent(event) for event in batch])
        assert types[-2:] == ["output_item.done", "incomplete"]
        assert [item["type"] for item in response["output"]] == ["reasoning"]


def test_steered_upstream_finishes_what_runs_side_by_side():
    """Hosted tools that run at once all finish (Mid-turn steering guide, "Safe boundary")."""
    first, second = items("web_search", "web_search")
    third = upstream.message(2)
    first_done, second_done = first.pop(), second.pop()
    types, response = steered_types(
        [UpstreamEvent(event) for event in (*first, second[0])],
        [UpstreamEvent(event) for event in (first_done, *second[1:], second_done, *third)],
    )
    assert types.count("output_item.done") == 2
    assert [item["status"] for item in response["output"]] == ["completed", "completed"]
    assert response["incomplete_details"] == {"reason": "steered"}


APPROVAL = {"type": "mcp_approval_request", "name": "f", "arguments": "{}", "server_label": "s"}
SHELL = {"type": "shell_call", "call_id": "call_1", "status": "completed", "action": {"commands": ["ls"]}}


def whole(item, index):
    return UpstreamEvent({"type": "response.output_item.done", "output_index": index, "item": item})


def test_steered_response_is_not_cut_where_an_approval_is_asked():
    """It completes, and waits for the client (Mid-turn steering guide, "Outcomes")."""
    added, *rest = (UpstreamEvent(event) for event in upstream.web_search(0))
    pair = Pair()
    pair.send(added)
    pair.server.yield_at_boundary()
    pair.send(whole(APPROVAL, 1))
    pair.send(*rest)
    assert not pair.server.yielded
    pair.send(Ended())
    assert pair.finish()["status"] == "completed"


def test_steered_response_is_cut_behind_a_tool_that_the_server_ran():
    """The output that the same response holds has answered the call (Mid-turn steering guide, "Safe boundary")."""
    pair = Pair()
    pair.send(UpstreamEvent({"type": "response.output_item.added", "output_index": 0, "item": SHELL}))
    pair.server.yield_at_boundary()
    pair.send(whole(SHELL, 0))
    assert not pair.server.yielded
    pair.send(whole({"type": "shell_call_output", "call_id": "call_1", "output": []}, 1))
    assert pair.server.yielded
    assert [item["type"] for item in pair.finish()["output"]] == ["shell_call", "shell_call_output"]


@pytest.mark.parametrize("at", ["opened", "in an item", "kept"])
def test_told_events_are_counted_and_change_nothing(at):
    """Steering events stand in the response's own numbers (Mid-turn steering guide, `sequence_number`)."""
    pair = Pair()
    if at != "opened":
        pair.send(TextDelta("a"))
    before = pair.server.fold.snapshot()
    kept = pair.server.final(NOW) if at == "kept" else None
    told = pair._carry(pair.server.tell("response.steer.accepted", {"steer": {"id": "steer_1"}}))
    assert told[-1] == {
        "type": "response.steer.accepted",
        "sequence_number": len(pair.events) - 1,
        "steer": {"id": "steer_1"},
    }
    if kept is None:
        assert pair.server.fold.snapshot() == before
        kept = pair.server.final(NOW)
    pair._carry(pair.server.announce(kept))
    check_sequence(pair.events)
    assert pair.events[-1]["response"] == over_the_wire(kept)


# --- Who uses it wrongly


@pytest.mark.parametrize("before", [[], [TextDelta("a")], [call(), TextDelta("a")]])
def test_piece_of_a_call_needs_an_open_call(before):
    """A delta of another kind has closed it."""
    pair = Pair()
    pair.send(*before)
    with pytest.raises(IllegalTransition, match="no call is open"):
        pair.send(CallDelta("{"))
    pair.fail()
    check_sequence(pair.events)


@pytest.mark.parametrize("end", ["finish", "fail"])
@pytest.mark.parametrize("late", ["finish", "fail", "text"])
def test_nothing_comes_after_the_end(end, late):
    """Exactly one terminal event, always last (Streaming reference, "Event order")."""
    pair = Pair()
    getattr(pair, end)()
    with pytest.raises(IllegalTransition):
        pair.send(TextDelta("a")) if late == "text" else getattr(pair, late)()
    check_sequence(pair.events)


def test_nothing_comes_before_the_opening():
    """The first event is `response.created` (Streaming reference, "Event order")."""
    builder = Builder(opening(), lambda prefix: prefix)
    with pytest.raises(IllegalTransition):
        builder.apply([TextDelta("a")])


def test_events_built_before_an_illegal_delta_are_not_lost():
    """What came before the fault in the same read goes out with the end (Streaming reference, "Failed turn")."""
    pair = Pair()
    with pytest.raises(IllegalTransition):
        pair.send(TextDelta("so far"), CallDelta("{"))
    assert pair.fail()["output"][0]["content"][0]["text"] == "so far"
    check_sequence(pair.events)


def test_builder_says_its_state():
    """The `repr` names the response and how far it is, and none of its text."""
    pair = Pair()
    pair.send(TextDelta("secret"))
    assert repr(pair.server) == "<Builder resp_1 <Fold in_progress events=5 items=1>>"
