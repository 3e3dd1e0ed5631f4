"""Ids of items: unguessable, short enough for every client, and telling where the item is."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.ids import Place, input_item_id, output_item_ids, place_of, prefix_of

RESPONSE = "resp_" + "0123456789abcdef" * 3
OWN = RESPONSE.removeprefix("resp_")

_responses = st.text("0123456789abcdef", min_size=48, max_size=48).map("resp_{}".format)
_types = st.sampled_from(["message", "function_call_output", "web_search_call", "acme:lookup", ""]) | st.text(
    max_size=80
)


@pytest.mark.parametrize(
    ("item_type", "prefix"),
    [
        ("message", "msg"),
        ("reasoning", "rs"),
        ("function_call", "fc"),
        ("custom_tool_call", "ctc"),
        ("compaction", "cmp"),
        ("web_search_call", "ws"),
        ("mcp_call", "mcp"),
        ("mcp_list_tools", "mcp"),
        ("function_call_output", "function"),
        ("computer_call", "computer"),
        ("acme:lookup", "acme"),
        ("configuration_update", "item"),
        ("Shell", "item"),
        ("", "item"),
    ],
)
def test_prefix_says_what_an_item_is(item_type, prefix):
    """OpenAI's prefixes where it has one, else the type's first word if it is short (Responses API reference, "Items")."""
    assert prefix_of(item_type) == prefix


def test_output_items_are_numbered_in_their_order():
    """The number is the item's place in `output` (docs/adr/0007)."""
    new_id = output_item_ids(RESPONSE)
    assert [new_id("msg"), new_id("fc"), new_id("msg")] == [f"msg_{OWN}0000", f"fc_{OWN}0001", f"msg_{OWN}0002"]
    assert output_item_ids(RESPONSE)("rs") == f"rs_{OWN}0000"


def test_input_items_are_told_from_output_items():
    """The third item of the input is not the third item of the output (docs/adr/0007)."""
    assert input_item_id("message", RESPONSE, 2) == f"msg_{OWN}i0002"
    assert place_of(f"msg_{OWN}i0002") == Place(RESPONSE, in_input=True, number=2)
    assert place_of(f"msg_{OWN}0002") == Place(RESPONSE, in_input=False, number=2)


@given(_responses, _types, st.integers(0, 1_000_000))
def test_an_id_tells_its_place_and_is_short(response_id, item_type, number):
    """Back and forth, for any type and number; at most 64 characters, as some clients refuse more (Responses API reference, "Items")."""
    asked = input_item_id(item_type, response_id, number)
    assert place_of(asked) == Place(response_id, in_input=True, number=number)
    new_id = output_item_ids(response_id)
    for said in (new_id(prefix_of(item_type)), new_id(prefix_of(item_type))):
        assert re.fullmatch(r"[a-z]+_[0-9a-f]{52}", said)
    assert place_of(said) == Place(response_id, in_input=False, number=1)
    assert max(len(asked), len(said)) <= 64


@pytest.mark.parametrize(
    "item_id",
    [
        "",
        "msg_1",
        RESPONSE,
        f"msg_{OWN}",
        f"msg_{OWN}000",
        f"msg_{OWN}000000000",
        f"msg_{OWN}j0000",
        f"msg_{OWN.upper()}0000",
        f"msg_{OWN}0000\n",
        f"_{OWN}0000",
        f" msg_{OWN}0000",
        f"msg_{OWN}i",
        f"msg_é{OWN[1:]}0000",
        f"msg_{chr(0x660) * 48}0000",
    ],
)
def test_an_id_that_was_not_made_here_has_no_place(item_id):
    """A client's own id, or anybody else's, is no reason to look anywhere (docs/adr/0007)."""
    assert place_of(item_id) is None


@given(st.text())
def test_any_text_can_be_asked_for_its_place(item_id):
    """What a client sends as an id may be anything."""
    place = place_of(item_id)
    assert place is None or place.response_id[5:] in item_id
