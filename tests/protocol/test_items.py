"""Items: their heads, and which calls wait for an output."""

from __future__ import annotations

import msgspec
import pytest

from openline.protocol.errors import ProtocolError
from openline.protocol.items import (
    OUTPUT_OF_CALL,
    Item,
    OpenCalls,
    answers_in,
    item_of,
    read_item,
    without_repeats,
)

PAIRS = sorted(OUTPUT_OF_CALL.items())


def call(call_id="call_X", call_type="function_call", **fields):
    return item_of({"type": call_type, "call_id": call_id, **fields})


def output(call_id="call_X", call_type="function_call"):
    return item_of({"type": OUTPUT_OF_CALL[call_type], "call_id": call_id})


def refused(act):
    with pytest.raises(ProtocolError) as caught:
        act()
    return caught.value


def test_item_keeps_the_bytes_it_came_as():
    """Codex compares items for equality before it sends a delta (WebSocket mode guide, "Turn lifecycle")."""
    raw = b'{"type": "function_call",\n "call_id":"c",  "x":1.50, "async":true}'
    item = read_item(raw, "input[0]")
    assert (item.raw, item.type, item.call_id, item.answers_later) == (raw, "function_call", "c", True)


@pytest.mark.parametrize("item_type", ["web_search_call", "slug:vendor_item", "item_reference", "compaction"])
def test_item_of_any_type_passes(item_type):
    """Unknown types travel through unread (Responses API reference, "Items")."""
    assert read_item(msgspec.json.encode({"type": item_type, "id": "x"}), "input[0]").type == item_type


def test_item_without_type_is_an_easy_message():
    """`type` may be missing on easy messages (Responses API reference, "Items")."""
    assert read_item(b'{"role":"user","content":"hi"}', "input[0]").type == "message"


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"{}", "missing_required_parameter", "input[2].type"),
        (b'{"content":"hi"}', "missing_required_parameter", "input[2].type"),
        (b"1", "invalid_type", "input[2]"),
        (b'["role"]', "invalid_type", "input[2]"),
        (b'{"type":5}', "invalid_type", "input[2].type"),
        (b'{"role":[]}', "invalid_type", "input[2].role"),
        (b'{"type":"function_call","call_id":7}', "invalid_type", "input[2].call_id"),
        (b'{"type":"function_call","async":"yes"}', "invalid_type", "input[2].async"),
        (b'{"type":"function_call_output"}', "missing_required_parameter", "input[2].call_id"),
        (b'{"type":"custom_tool_call_output","call_id":null}', "missing_required_parameter", "input[2].call_id"),
    ],
)
def test_item_that_cannot_be_read_names_the_field(raw, code, param):
    """`param` is a path such as `input[0].content` (Responses API reference, "Errors")."""
    error = refused(lambda: read_item(raw, "input[2]"))
    assert (error.code, error.param, error.status) == (code, param, 400)
    assert f"'{param}'" in error.message or f"'{param.rpartition('.')[0]}'" in error.message


def test_error_does_not_repeat_what_came_without_bound():
    """A message names what came, but an input may be of any size (Responses API reference, "Errors")."""
    error = refused(lambda: read_item(b'{"type":' + b"1" * 400 + b"}", "input[0]"))
    assert len(error.message) < 300


def test_local_shell_output_names_its_call_by_id():
    """This one output has no `call_id` (Responses API reference, "Items")."""
    assert read_item(b'{"type":"local_shell_call_output","id":"c","output":""}', "input[0]").call_id == "c"


def test_tool_search_output_may_answer_nothing():
    """A search that the server ran has no `call_id` (Responses API reference, "Items")."""
    assert read_item(b'{"type":"tool_search_output","tools":[]}', "input[0]").call_id is None


@pytest.mark.parametrize(("call_type", "output_type"), PAIRS)
def test_output_answers_its_call(call_type, output_type):
    """Each kind of call has its kind of output (Responses API reference, "Items")."""
    waiting = OpenCalls().after([call(call_type=call_type)])
    answered = waiting.after([output(call_type=call_type)])
    answered.require_none()
    assert (len(waiting), len(answered)) == (1, 0)


@pytest.mark.parametrize(("call_type", "output_type"), PAIRS)
def test_orphan_output_is_refused(call_type, output_type):
    """An output whose call is nowhere: the text is OpenAI's (WebSocket mode guide, "Continuation")."""
    error = refused(lambda: OpenCalls().after([output(call_type=call_type)]))
    words = output_type.replace("_", " ")
    assert error.message == f"No tool call found for {words} with call_id call_X."
    assert error.envelope()["error"] | {"message": ""} == {
        "message": "",
        "type": "invalid_request_error",
        "param": "input",
        "code": None,
    }


def test_orphan_output_has_the_documented_text():
    """Gateways and clients match on it (WebSocket mode guide, "Continuation")."""
    error = refused(lambda: OpenCalls().after([output()]))
    assert error.message == "No tool call found for function call output with call_id call_X."


@pytest.mark.parametrize("items", [[], [call("other")]])
def test_orphan_is_refused_whatever_else_waits(items):
    """An empty `call_id` names no call either (WebSocket mode guide, "Continuation")."""
    before = OpenCalls().after(items)
    assert refused(lambda: before.after([output("")])).param == "input"


def test_unanswered_call_has_the_documented_text():
    """Every call must be answered before the next turn (WebSocket mode guide, "Continuation")."""
    error = refused(OpenCalls().after([call()]).require_none)
    assert error.message == "No tool output found for function call call_X."
    assert (error.status, error.param, error.envelope()["error"]["code"]) == (400, "input", None)


def test_unanswered_call_is_the_first_in_order():
    """Of two unanswered ones the older is named (WebSocket mode guide, "Continuation")."""
    message = item_of({"type": "message", "role": "user", "content": "hi"})
    calls = OpenCalls().after([call("a"), message, call("b", "custom_tool_call"), call("c")]).after([output("a")])
    assert refused(calls.require_none).message == "No tool output found for custom tool call b."


def test_async_call_may_be_answered_in_any_later_turn():
    """`async: true` is exempt, and its output is still matched (WebSocket mode guide, "Continuation")."""
    waiting = OpenCalls().after([call(**{"async": True})])
    waiting.require_none()
    assert len(waiting.after([output()])) == 0


def test_output_twice_is_an_orphan():
    """The first one has used the call up; `without_repeats` comes before (WebSocket mode guide, "Continuation")."""
    answered = OpenCalls().after([call(), output()])
    assert refused(lambda: answered.after([output()])).message.startswith("No tool call found")


# --- The same output again


def said(call_id="call_X", said="42", **fields):
    return read_item(
        msgspec.json.encode({"type": "function_call_output", "call_id": call_id, "output": said, **fields}), ""
    )


def never():
    raise AssertionError("nothing before these items is to be looked at")


def test_items_without_outputs_are_left_alone():
    """Most turns bring none, and pay nothing."""
    items = [call(), item_of({"type": "message", "role": "user", "content": "hi"})]
    assert without_repeats(items, OpenCalls(), never) is items


def test_the_same_output_again_is_dropped():
    """In the same input or in a later one: the first stays, where it stands (docs/adr/0010)."""
    waiting = OpenCalls().after([call("a"), call("b")])
    items = [said("a"), said("a"), said("b"), said("a")]
    assert without_repeats(items, waiting, never) == [items[0], items[2]]
    answers = answers_in([call("a"), call("b"), *items])
    assert without_repeats([said("b"), said("a")], OpenCalls(), lambda: answers) == []


@pytest.mark.parametrize(
    "again",
    [
        {"id": "fco_1"},
        {"status": "completed"},
        {"status": None},
        {"output": [{"text": "a", "type": "input_text"}]},
    ],
    ids=str,
)
def test_the_same_is_what_the_model_reads(again):
    """Neither white space nor the order of fields nor the item's own id makes another output (docs/adr/0010)."""
    first = {"type": "function_call_output", "call_id": "call_X", "output": [{"type": "input_text", "text": "a"}]}
    items = [read_item(msgspec.json.format(msgspec.json.encode(each)), "") for each in (first, first | again)]
    assert len(without_repeats(items, OpenCalls().after([call()]), never)) == 1


@pytest.mark.parametrize("again", [{"said": "43"}, {"said": ["42"]}, {"status": "incomplete"}, {"more": 1}], ids=str)
def test_a_different_output_is_refused(again):
    """The model has read the first one: nobody is told that it had read the second (docs/adr/0010)."""
    waiting = OpenCalls().after([call()])
    for act in (
        lambda: without_repeats([said(), said(**again)], waiting, never),
        lambda: without_repeats([said(**again)], OpenCalls(), lambda: answers_in([call(), said()])),
    ):
        error = refused(act)
        assert (error.code, error.status, error.param) == ("tool_output_conflict", 400, "input")
        assert "call_X" in error.message


def test_an_output_of_another_kind_is_refused():
    """What answers a custom call does not answer a function."""
    other = item_of({"type": "custom_tool_call_output", "call_id": "call_X", "output": "42"})
    assert refused(lambda: without_repeats([said(), other], OpenCalls().after([call()]), never)).param == "input"


def test_a_call_of_the_same_id_wants_an_output_of_its_own():
    """Some model servers number their calls anew in each turn."""
    items = [said(said="1"), call(), said(said="2"), said(said="2")]
    assert without_repeats(items, OpenCalls().after([call()]), never) == items[:3]
    asked_again = OpenCalls().after([call(), said(said="1"), call()])
    assert without_repeats([said(said="2")], asked_again, never) == [said(said="2")]


def test_an_output_that_cannot_be_read_is_compared_as_it_is():
    """It is refused where it is read, and does no harm here."""
    broken = Item(
        b'{"type":"function_call_output","call_id":"call_X","output":"\\ud800"}', "function_call_output", "call_X"
    )
    waiting = OpenCalls().after([call()])
    assert without_repeats([broken, broken], waiting, never) == [broken]
    assert refused(lambda: without_repeats([broken, said()], waiting, never)).code == "tool_output_conflict"


def test_output_before_its_call_is_an_orphan():
    """A context is read in order (Responses API reference, "Items")."""
    assert refused(lambda: OpenCalls().after([output(), call()])).message.startswith("No tool call found")


@pytest.mark.parametrize("item_type", ["web_search_call", "mcp_call", "image_generation_call"])
def test_hosted_call_waits_for_nobody(item_type):
    """Its result is the server's own business (Streaming reference, "Hosted tools")."""
    OpenCalls().after([call(call_type=item_type)]).require_none()


def test_calls_of_a_node_never_change():
    """Two branches of a context answer the same call, each for itself (WebSocket mode guide, "stream_id", fork)."""
    parent = OpenCalls().after([call("a"), call("b")])
    left, right = parent.after([output("a")]), parent.after([output("b")])
    assert (len(parent), len(left), len(right)) == (2, 1, 1)
    assert "b" in refused(left.require_none).message
    assert "a" in refused(right.require_none).message
    refused(lambda: parent.after([output("a"), output("nowhere")]))
    assert len(parent) == 2


def test_items_without_calls_cost_nothing():
    """The state is shared, not copied, where nothing is to be matched."""
    calls = OpenCalls()
    assert calls.after([item_of({"type": "message", "role": "user", "content": "hi"})]) is calls


def test_open_calls_say_their_state():
    """The `repr` is what an operator sees."""
    assert repr(OpenCalls().after([call()])) == "<OpenCalls waiting=1>"
