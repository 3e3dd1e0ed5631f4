"""The fold refuses what a client's accumulator would choke on."""

from __future__ import annotations

import pytest

from openline.protocol.fold import Fold
from openline.protocol.states import IllegalTransition, ResponseState
from protocol.pair import opening

ADDED = {"type": "response.output_item.added", "output_index": 0, "item": {"type": "message", "id": "msg_0"}}
CALL = {"type": "response.output_item.added", "output_index": 0, "item": {"type": "function_call", "id": "fc_0"}}
PART = {
    "type": "response.content_part.added",
    "output_index": 0,
    "content_index": 0,
    "part": {"type": "output_text", "text": "", "annotations": []},
}
TEXT = {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": "x"}
PART_DONE = {**PART, "type": "response.content_part.done"}
DONE = {**ADDED, "type": "response.output_item.done"}
SHELL = {
    "type": "response.output_item.added",
    "output_index": 0,
    "item": {"type": "shell_call", "action": {"commands": [], "timeout_ms": 7}},
}
COMMAND = {"type": "response.shell_call_command.added", "output_index": 0, "command_index": 0, "command": ""}
COMMAND_DELTA = {**COMMAND, "type": "response.shell_call_command.delta", "delta": "ls"}
COMMAND_DONE = {**COMMAND, "type": "response.shell_call_command.done", "command": "ls -l"}


def folded(*events):
    """A fold that has seen the opening and these events, numbered as they must be."""
    fold = Fold()
    opened = [{"type": kind, "response": opening()} for kind in ("response.created", "response.in_progress")]
    for event in (*opened, *events):
        fold.apply({**event, "sequence_number": fold.sequence_number + 1})
    return fold


ILLEGAL = {
    "text without an item": [TEXT],
    "text without a part": [ADDED, TEXT],
    "text after the part's end": [ADDED, PART, PART_DONE, TEXT],
    "text after the item's end": [ADDED, PART, PART_DONE, DONE, TEXT],
    "part after the item's end": [ADDED, DONE, PART],
    "part's end without a part": [ADDED, PART_DONE],
    "part's end twice": [ADDED, PART, PART_DONE, PART_DONE],
    "item's end without an item": [DONE],
    "item's end twice": [ADDED, DONE, DONE],
    "index used again": [ADDED, ADDED],
    "index skipped": [{**ADDED, "output_index": 1}],
    "index negative": [ADDED, {**PART, "output_index": -1}],
    "content index negative": [ADDED, PART, {**TEXT, "content_index": -1}],
    "text that is none": [ADDED, PART, {**TEXT, "delta": 5}],
    "arguments that are none": [
        CALL,
        {"type": "response.function_call_arguments.done", "output_index": 0, "arguments": {}},
    ],
    "part whose text is none": [ADDED, {**PART, "part": {"type": "output_text", "text": []}}],
    "summary text without a part": [
        ADDED,
        {"type": "response.reasoning_summary_text.delta", "output_index": 0, "summary_index": 0, "delta": "x"},
    ],
    "code that is none": [
        {**ADDED, "item": {"type": "code_interpreter_call"}},
        {"type": "response.code_interpreter_call_code.done", "output_index": 0, "code": 5},
    ],
    "command text without a command": [SHELL, COMMAND_DELTA],
    "command text after the command's end": [SHELL, COMMAND, COMMAND_DONE, COMMAND_DELTA],
    "command's end twice": [SHELL, COMMAND, COMMAND_DONE, COMMAND_DONE],
    "command that is none": [SHELL, {**COMMAND, "command": 5}],
    "lifecycle without a response": [{"type": "response.in_progress"}],
    "response that is none": [{"type": "response.completed", "response": []}],
    "part whose type is none": [ADDED, {**PART, "part": {"type": ["output_text"], "text": ""}}],
    "created twice": [{"type": "response.created", "response": {}}],
    "queued too late": [{"type": "response.queued", "response": {}}],
}


@pytest.mark.parametrize("events", ILLEGAL.values(), ids=ILLEGAL)
def test_event_that_cannot_stand_here_is_refused(events):
    """What the SDKs' accumulators check, we check first (Streaming reference, accumulator invariants)."""
    with pytest.raises(IllegalTransition):
        folded(*events)


@pytest.mark.parametrize("events", ILLEGAL.values(), ids=ILLEGAL)
def test_refused_event_changes_nothing(events):
    """The stream can still end well formed: no number is used up (Streaming reference, "Event order")."""
    *before, illegal = events
    fold = folded(*before)
    seen = (fold.state, fold.sequence_number, repr(fold.snapshot()))
    with pytest.raises(IllegalTransition):
        fold.apply({**illegal, "sequence_number": fold.sequence_number + 1})
    assert (fold.state, fold.sequence_number, repr(fold.snapshot())) == seen


@pytest.mark.parametrize("number", [-1, 0, 1, 3])
def test_number_must_be_the_next(number):
    """From 0, plus 1 an event (Streaming reference, "Event order")."""
    fold = folded()
    with pytest.raises(IllegalTransition, match=f"sequence_number {number}: expected 2"):
        fold.apply({**ADDED, "sequence_number": number})


@pytest.mark.parametrize("end", ["completed", "incomplete", "failed"])
def test_nothing_folds_after_the_terminal_event(end):
    """The terminal event is the last (Streaming reference, "Event order")."""
    fold = folded({"type": f"response.{end}", "response": {"id": "resp_1", "output": []}})
    assert (fold.ended, fold.state) == (True, ResponseState(end))
    with pytest.raises(IllegalTransition):
        fold.apply({**ADDED, "sequence_number": fold.sequence_number + 1})


def test_unknown_event_is_counted_and_changes_nothing():
    """Vendor events are possible and carry a number (WebSocket mode guide, "Framing")."""
    fold = folded(ADDED)
    before = fold.snapshot()
    fold.apply({"type": "slug:event", "sequence_number": 3, "x": 1})
    assert (fold.snapshot(), fold.sequence_number) == (before, 3)


def test_keepalive_keeps_the_items():
    """Another `response.in_progress` replaces the response's fields, not what the items' events made."""
    fold = folded(ADDED, PART, TEXT, {"type": "response.in_progress", "response": {"id": "resp_1", "output": []}})
    assert fold.snapshot()["output"][0]["content"][0]["text"] == "x"


def test_final_text_replaces_the_deltas():
    """`done` is authoritative for clients (Streaming reference, field table)."""
    done = {**TEXT, "type": "response.output_text.done", "text": "whole"}
    fold = folded(ADDED, PART, TEXT, done)
    assert fold.output()[0]["content"][0]["text"] == "whole"


@pytest.mark.parametrize("key", ["arguments", "input", "code"])
def test_null_text_is_empty(key):
    """Some servers open an item with `null` where its text will come (Responses API reference, "Items")."""
    item_type = {"arguments": "mcp_call", "input": "custom_tool_call", "code": "code_interpreter_call"}[key]
    fold = folded({**ADDED, "item": {"type": item_type, key: None}})
    assert fold.output() == [{"type": item_type, key: ""}]


def test_code_is_what_its_events_say():
    """A snapshot has the deltas so far, then what `done` says (Streaming reference, field table)."""
    added = {**ADDED, "item": {"type": "code_interpreter_call", "code": ""}}
    kind = "response.code_interpreter_call_code"
    deltas = [{"type": f"{kind}.delta", "output_index": 0, "delta": delta} for delta in ("1 +", " 1")]
    assert folded(added, *deltas).output()[0]["code"] == "1 + 1"
    assert folded(added, *deltas, {"type": f"{kind}.done", "output_index": 0, "code": "2"}).output()[0]["code"] == "2"


def test_commands_are_what_their_events_say():
    """A snapshot has the deltas so far, then what `done` says; the rest of the action stays.

    Source: Streaming reference, field table.
    """
    action = {"commands": ["ls"], "timeout_ms": 7}
    assert folded(SHELL, COMMAND, COMMAND_DELTA).output()[0]["action"] == action
    second = {**COMMAND, "command_index": 1}
    action["commands"] = ["ls -l", ""]
    assert folded(SHELL, COMMAND, COMMAND_DELTA, COMMAND_DONE, second).output()[0]["action"] == action


@pytest.mark.parametrize("action", [None, 5, {}, {"commands": "x"}])
def test_commands_need_no_action_before_them(action):
    """Whatever an upstream has opened the call with (Streaming reference, field table)."""
    fold = folded({**SHELL, "item": {"type": "shell_call", "action": action}}, COMMAND, COMMAND_DELTA)
    assert fold.output()[0]["action"] == {"commands": ["ls"]}


def test_item_added_with_content_keeps_it():
    """An item may come whole (Streaming reference, "Event order")."""
    item = {
        "type": "reasoning",
        "id": "rs_0",
        "summary": [{"type": "summary_text", "text": "s"}],
        "content": [{"type": "reasoning_text", "text": "t"}],
    }
    fold = folded({**ADDED, "item": item})
    assert fold.output() == [item]


def test_fold_says_its_state():
    """The `repr` is what an operator sees."""
    assert repr(folded(ADDED)) == "<Fold in_progress events=3 items=1>"
