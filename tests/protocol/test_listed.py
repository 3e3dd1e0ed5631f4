"""Items as lists show them."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.ids import input_item_id
from openline.protocol.listed import listed_input, listed_item

RESPONSE = "resp_" + "0123456789abcdef" * 3


def listed(*items):
    """The items as a client reads them."""
    raws = [json.dumps(item, ensure_ascii=False).encode() for item in items]
    return json.loads(msgspec.json.encode(listed_input(raws, RESPONSE)))


@pytest.mark.parametrize("item_id", [None, "", ...])
def test_an_item_without_an_id_gets_one_that_tells_its_place(item_id):
    """So that an `item_reference` can name it (Responses API reference, "The input item list")."""
    item = {"role": "user", "content": []} | ({} if item_id is ... else {"id": item_id})
    first, second = listed(item, {"type": "reasoning", "summary": []})
    assert (first["id"], first["type"]) == (input_item_id("message", RESPONSE, 0), "message")
    assert second["id"] == input_item_id("reasoning", RESPONSE, 1)


@given(st.lists(st.none() | st.sampled_from(["msg_1", "msg_2", ""]) | st.text(max_size=3), max_size=12))
def test_no_two_items_have_one_id(ids):
    """Paging goes on behind an id; ids that clients sent stay, but the second of two equal ones (Responses API reference, "List input items")."""
    items = listed(*({"role": "user", "content": [], "id": item_id} for item_id in ids))
    found = [item["id"] for item in items]
    assert len(set(found)) == len(ids)
    for index, item_id in enumerate(ids):
        if item_id and item_id not in ids[:index]:
            assert found[index] == item_id


@pytest.mark.parametrize("role", ["user", "system", "developer", None])
def test_a_text_is_one_part(role):
    """`content` as text is short for one part (Responses API reference, "Items")."""
    (item,) = listed({"type": "message", "role": role, "content": 'A "quoted" é'})
    assert item["content"] == [{"type": "input_text", "text": 'A "quoted" é'}]


def test_an_assistants_text_is_output():
    """Its part is that of an answer (Responses API reference, "Items")."""
    (item,) = listed({"role": "assistant", "content": "x"})
    assert item["content"] == [{"type": "output_text", "text": "x", "annotations": []}]


@pytest.mark.parametrize(
    ("item", "status"),
    [
        ({"role": "user", "content": []}, "completed"),
        ({"role": "user", "content": [], "status": None}, "completed"),
        ({"type": "message", "role": "assistant", "content": [], "status": "incomplete"}, "incomplete"),
        ({"type": "function_call", "call_id": "c"}, "completed"),
        ({"type": "shell_call_output", "call_id": "c"}, "completed"),
        ({"type": "reasoning", "summary": []}, None),
        ({"type": "mcp_approval_response", "approve": True}, None),
        ({"type": "compaction", "encrypted_content": "x"}, None),
    ],
    ids=lambda value: value.get("type", "message") if isinstance(value, dict) else None,
)
def test_messages_calls_and_outputs_have_a_status(item, status):
    """It is there when items are returned, completed if nothing else was said (Responses API reference, "Items")."""
    assert listed(item)[0].get("status") == status


def test_everything_else_stays_as_it_was_sent():
    """Fields that nobody here knows, numbers as they were written, content of parts (Responses API reference, "Items")."""
    raw = (
        b'{"type":"acme:lookup","id":"a","big":123456789012345678901234567890,"n":1.50,"content":"text","deep":[[{}]]}'
    )
    (item,) = listed_input([raw], RESPONSE)
    assert json.loads(msgspec.json.encode(item)) == json.loads(raw)
    assert b"1.50" in msgspec.json.encode(item)


def test_one_item_is_shown_as_a_list_shows_it():
    """Under the id that it is given (Responses API reference, "Conversation items")."""
    raw = b'{"role":"user","content":"x","id":"mine"}'
    assert json.loads(msgspec.json.encode(listed_item(raw, "msg_1"))) == {**listed(json.loads(raw))[0], "id": "msg_1"}


def test_deep_items_are_not_read():
    """What could be sent can be shown: nothing is read that need not be."""
    deep = b'{"type":"x","deep":' + b"[" * 400 + b"]" * 400 + b"}"
    assert b"[" * 400 in msgspec.json.encode(listed_input([deep], RESPONSE))
