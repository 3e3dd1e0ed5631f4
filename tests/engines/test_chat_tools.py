"""Tools and `tool_choice` in Chat Completions' form."""

import json
import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.engines.chat_tools import ToolName, chat_name, choose, read_tools
from openline.protocol.errors import ProtocolError

LOOK = {"type": "function", "name": "look", "parameters": {"type": "object"}, "description": "Looks."}
PATCH = {"type": "custom", "name": "patch", "description": "Patches."}
DOCS = {
    "type": "namespace",
    "name": "docs",
    "description": "The docs.",
    "tools": [{"type": "function", "name": "find"}],
}
SEARCH = {"type": "web_search"}


def toolset(*tools):
    return read_tools([msgspec.Raw(msgspec.json.encode(tool)) for tool in tools])


def sent(*tools):
    return [json.loads(tool.encoded)["function"] for tool in toolset(*tools).tools]


def refused(make, *args):
    with pytest.raises(ProtocolError) as caught:
        make(*args)
    assert caught.value.status == 400
    return caught.value


def test_function_keeps_name_description_and_schema():
    """`strict` is not sent where it was not asked for: few servers know it."""
    assert sent({**LOOK, "strict": False}) == [
        {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
    ]
    assert sent({**LOOK, "strict": True})[0]["strict"] is True


@pytest.mark.parametrize("parameters", [{}, {"parameters": None}])
def test_function_without_a_schema_takes_an_empty_object(parameters):
    """Servers want a schema."""
    assert sent({"type": "function", "name": "look", **parameters}) == [
        {"name": "look", "parameters": {"type": "object", "properties": {}}}
    ]


def test_custom_tool_is_a_function_with_one_required_text():
    """The grammar goes into the description, since nothing enforces it."""
    (function,) = sent({**PATCH, "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x"'}})
    assert function["parameters"]["required"] == ["input"]
    assert function["parameters"]["properties"]["input"]["type"] == "string"
    assert function["description"].startswith("Patches.")
    assert 'lark grammar:\nstart: "x"' in function["description"]
    assert toolset(PATCH).tools[0].origin == ToolName("custom_tool_call", "patch")


def test_functions_of_a_namespace_carry_it_in_their_name():
    """And the origin tells the way back."""
    (tool,) = toolset(DOCS).tools
    assert tool.chat_name == "docs__find"
    assert tool.origin == ToolName("function_call", "find", "docs")


def test_hosted_tools_are_dropped_once_by_type():
    """In the order they came."""
    namespace = {**DOCS, "tools": [{"type": "mcp"}]}
    assert toolset(SEARCH, LOOK, SEARCH, {"type": "tool_search"}, namespace).dropped == (
        "web_search",
        "tool_search",
        "mcp",
    )


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        ({"type": "function"}, "tools[0].name"),
        ({**DOCS, "tools": [{"type": "custom"}]}, "tools[0].tools[0].name"),
        ({"type": "function", "name": 3}, "tools[0].name"),
    ],
)
def test_tool_of_a_wrong_shape_is_refused(tool, param):
    """By the path of the field."""
    assert refused(toolset, tool).param == param


def test_two_tools_with_one_name_at_the_upstream_are_refused():
    """A call could not be told apart on its way back; the same tool twice can."""
    assert refused(toolset, DOCS, {**LOOK, "name": "docs__find"}).param == "tools[1]"
    assert len(toolset(LOOK, LOOK).tools) == 1


@given(namespace=st.text(max_size=80), name=st.text(max_size=80))
def test_names_with_a_namespace_are_legal_and_stable(namespace, name):
    """Chat Completions takes 1 to 64 letters, digits, `_` and `-`."""
    first = chat_name(namespace, name)
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,64}", first)
    assert chat_name(namespace, name) == first


def test_long_names_that_begin_alike_stay_different():
    """The hash is over the whole of both."""
    assert chat_name("n" * 60, "abcdef") != chat_name("n" * 60, "abcdeg")
    assert chat_name("a b", "c") != chat_name("a_b", "c")


def test_name_without_a_namespace_stays_as_it_is():
    """It is the client's business with its upstream."""
    assert chat_name(None, "x" * 100) == "x" * 100


ALL = toolset(LOOK, PATCH, DOCS, SEARCH)


@pytest.mark.parametrize("mode", [None, "none", "auto", "required"])
def test_modes_pass(mode):
    """As they are."""
    assert choose(ALL, mode) == (ALL.tools, mode)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ({"type": "function", "name": "look"}, "look"),
        ({"type": "custom", "name": "patch"}, "patch"),
        ({"type": "function", "name": "find", "namespace": "docs"}, "docs__find"),
    ],
)
def test_chosen_tool_is_named_as_the_upstream_knows_it(choice, name):
    """All three kinds are functions there."""
    assert choose(ALL, choice).tool_choice == {"type": "function", "function": {"name": name}}


@pytest.mark.parametrize(
    "choice",
    [
        {"type": "function", "name": "nothing"},
        {"type": "function", "name": "patch"},
        {"type": "function", "name": "find"},
        {"type": "function"},
        {"type": "web_search"},
        {"type": "mcp", "server_label": "x"},
        {},
        {"type": ["function"]},
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": {}}]},
        "sometimes",
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "nothing"}]},
        {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "file_search"}]},
        {"type": "allowed_tools", "mode": "auto", "tools": ["look"]},
        {"type": "allowed_tools", "mode": "never", "tools": []},
        {"type": "allowed_tools", "mode": [], "tools": []},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "web_search"}]},
    ],
)
def test_choice_of_what_is_not_there_is_refused(choice):
    """A dropped tool among it; the model would do something else than was asked."""
    assert refused(choose, ALL, choice).param == "tool_choice"


def test_allowed_tools_are_a_hard_limit():
    """The upstream does not see the others."""
    allowed = [{"type": "custom", "name": "patch"}, {"type": "namespace", "name": "docs"}, {"type": "web_search"}]
    got = choose(ALL, {"type": "allowed_tools", "mode": "required", "tools": allowed})
    assert [tool.chat_name for tool in got.tools] == ["patch", "docs__find"]
    assert got.tool_choice == "required"


def test_without_tools_there_is_no_choice():
    """Servers refuse one then; `required` cannot be kept."""
    none = toolset(SEARCH)
    assert choose(none, "auto") == ((), None)
    assert refused(choose, none, "required").param == "tool_choice"
