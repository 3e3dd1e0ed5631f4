"""The response object as a turn opens with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openline.protocol.errors import ProtocolError
from openline.protocol.events import Create, read_http_create
from openline.protocol.response import opening_response
from protocol.pair import over_the_wire

# Responses API reference, "The response object": what openai-python or Open Responses requires to be there.
UNION = [
    "id",
    "object",
    "created_at",
    "completed_at",
    "status",
    "incomplete_details",
    "model",
    "previous_response_id",
    "instructions",
    "output",
    "error",
    "tools",
    "tool_choice",
    "truncation",
    "parallel_tool_calls",
    "text",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "top_logprobs",
    "temperature",
    "reasoning",
    "usage",
    "max_output_tokens",
    "max_tool_calls",
    "store",
    "background",
    "service_tier",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
]


def opened(**fields: Any) -> dict[str, Any]:
    create = read_http_create(json.dumps(fields).encode())
    return over_the_wire(opening_response(create, response_id="resp_1", model="m", created_at=7))


def test_union_has_the_31_keys_of_the_reference():
    """The list itself (Responses API reference, "The response object")."""
    assert len(set(UNION)) == 31


EVERYTHING = {
    "model": "alias",
    "input": "hi",
    "instructions": "Be brief.",
    "previous_response_id": "resp_0",
    "store": False,
    "tools": [{"type": "web_search"}],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tool_calls": 3,
    "max_output_tokens": 64,
    "temperature": 0,
    "top_p": 0.5,
    "top_logprobs": 2,
    "presence_penalty": 0.1,
    "frequency_penalty": -0.1,
    "text": {"format": {"type": "json_object"}},
    "reasoning": {"effort": "high"},
    "truncation": "auto",
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "service_tier": "flex",
    "safety_identifier": "s",
    "user": "u",
}


@pytest.mark.parametrize("fields", [{}, EVERYTHING, dict.fromkeys(EVERYTHING)], ids=["bare", "full", "nulls"])
def test_every_key_is_always_there(fields):
    """Null where it is allowed, but there (Responses API reference, "The response object")."""
    assert set(UNION) <= set(opened(**fields))


@pytest.mark.parametrize("fields", [{}, dict.fromkeys(EVERYTHING)], ids=["bare", "nulls"])
def test_what_was_not_asked_has_its_default(fields):
    """The effective values are told (Responses API reference, "Create a response")."""
    assert opened(**fields) == {
        "id": "resp_1",
        "object": "response",
        "created_at": 7,
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": "m",
        "previous_response_id": None,
        "instructions": None,
        "output": [],
        "usage": None,
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "max_tool_calls": None,
        "max_output_tokens": None,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_logprobs": 0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "reasoning": {"effort": None, "summary": None},
        "truncation": "disabled",
        "store": True,
        "background": False,
        "metadata": {},
        "service_tier": "default",
        "safety_identifier": None,
        "prompt_cache_key": None,
    }


@pytest.mark.parametrize("field", sorted(EVERYTHING.keys() - {"model", "input", "text", "reasoning"}))
def test_what_was_asked_is_echoed(field):
    """Values that count as false too (Responses API reference, "The response object")."""
    assert opened(**EVERYTHING)[field] == EVERYTHING[field]


def test_objects_are_echoed_with_their_defaults_filled_in():
    """`reasoning` has both its keys, `text` its verbosity (Open Responses, strictness of the schema)."""
    response = opened(**EVERYTHING)
    assert response["text"] == {"format": {"type": "json_object"}, "verbosity": "medium"}
    assert response["reasoning"] == {"effort": "high", "summary": None}


def test_model_is_the_name_the_client_asked_for():
    """Whatever the upstream calls it (Responses API reference, "The response object")."""
    assert opened(model="anything")["model"] == "m"


def test_auto_service_tier_is_told_as_the_one_used():
    """`auto` is a wish; the response tells what was used (Responses API reference, "Create a response")."""
    assert opened(service_tier="auto")["service_tier"] == "default"


def test_function_tool_is_echoed_with_its_optional_keys():
    """Open Responses requires `description`, `parameters` and `strict` (Open Responses, strictness of the schema)."""
    bare = {"type": "function", "name": "f"}
    assert opened(tools=[bare])["tools"] == [{**bare, "description": None, "parameters": None, "strict": None}]


@pytest.mark.parametrize(
    "tool",
    [
        {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True},
        {"type": "function", "name": "f", "parameters": {"a": 1}, "strict": False, "description": "", "async": True},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar", "syntax": "lark"}},
        {"type": "slug:vendor", "x": [1.5, None]},
    ],
)
def test_other_tools_are_echoed_as_they_came(tool):
    """Unknown tool types are accepted (Codex CLI sends many)."""
    assert opened(tools=[tool])["tools"] == [tool]


def test_tools_bytes_are_not_encoded_again():
    """What we do not read stays what it was, to the space."""
    raw = b'{"type" : "custom" , "x":1.50}'
    create = read_http_create(b'{"tools":[' + raw + b"]}")
    (tool,) = opening_response(create, response_id="r", model="m", created_at=7)["tools"]
    assert bytes(tool) == raw


@pytest.mark.parametrize(
    ("tools", "code", "param"),
    [
        ([{"type": "custom"}, 5], "invalid_type", "tools[1]"),
        ([{"name": "f"}], "missing_required_parameter", "tools[0].type"),
        ([{"type": None}], "invalid_type", "tools[0].type"),
    ],
)
def test_tool_that_is_none_is_named_by_its_place(tools, code, param):
    """`param` is a path (Responses API reference, "Errors")."""
    with pytest.raises(ProtocolError) as caught:
        opened(tools=tools)
    assert (caught.value.code, caught.value.param) == (code, param)


def test_user_is_echoed_only_where_it_was_sent():
    """It is deprecated, and not in the union (Responses API reference, "Create a response")."""
    assert "user" not in opening_response(Create(), response_id="r", model="m", created_at=7)
