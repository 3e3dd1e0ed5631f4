"""The body of a Chat Completions request."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.engines.chat_request import encode_request
from openline.engines.engine import EngineRequest
from openline.engines.profiles import GENERIC, Profile
from openline.protocol.errors import ProtocolError
from openline.protocol.events import read_http_create, read_input
from openline.protocol.items import item_of, read_item
from openline.state.context import EMPTY

LOOK = {"type": "function", "name": "look"}


def encode(profile=GENERIC, context=EMPTY, **fields):
    fields.setdefault("input", "Hi")
    create = read_http_create(msgspec.json.encode({"model": "m", **fields}))
    request = EngineRequest(create, b"", context.extend(read_input(create)), "m")
    return encode_request(request, profile, prefills=True)


def body(profile=GENERIC, **fields):
    return json.loads(encode(profile, **fields).body)


def test_only_what_the_client_gave_is_sent():
    """Everything else is the upstream's default."""
    assert body() == {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@pytest.mark.parametrize(
    ("given_fields", "sent"),
    [
        ({"temperature": 0, "top_p": 0.5}, {"temperature": 0.0, "top_p": 0.5}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1.0, "frequency_penalty": -1.0}),
        ({"max_output_tokens": 7}, {"max_tokens": 7}),
        ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning_effort": "low"}),
        ({"text": {"verbosity": "low"}}, {"verbosity": "low"}),
        ({"text": {"format": {"type": "text"}}}, {}),
        ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"a": 1}, "strict": True}}},
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"a": 1}, "strict": True},
                }
            },
        ),
        ({"top_logprobs": 2}, {"logprobs": True, "top_logprobs": 2}),
        ({"top_logprobs": 0}, {}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": True}),
        ({"user": "u"}, {"user": "u"}),
        ({"metadata": {"a": "b"}, "store": False, "prompt_cache_key": "k", "service_tier": "auto"}, {}),
        ({"parallel_tool_calls": False, "tool_choice": "auto"}, {}),
    ],
)
def test_parameters_have_their_names_in_chat_completions(given_fields, sent):
    """What has none there is not sent."""
    got = body(**given_fields)
    for name in ("model", "messages", "stream", "stream_options"):
        del got[name]
    assert got == sent


def test_token_limit_has_the_name_that_the_upstream_knows():
    """Newer servers call it `max_completion_tokens`."""
    profile = Profile(max_tokens_field="max_completion_tokens")
    assert body(profile, max_output_tokens=7)["max_completion_tokens"] == 7


def test_tools_bring_choice_and_parallelism():
    """Only where they were given."""
    got = body(tools=[LOOK], tool_choice="required", parallel_tool_calls=False)
    assert (got["tool_choice"], got["parallel_tool_calls"]) == ("required", False)
    assert [tool["function"]["name"] for tool in got["tools"]] == ["look"]
    assert "tool_choice" not in body(tools=[LOOK])


def test_dropped_tools_are_named():
    """So that HTTP can say it in a header."""
    assert encode(tools=[LOOK, {"type": "web_search"}]).dropped_tools == ("web_search",)


@pytest.mark.parametrize("text_format", [{"type": "xml"}, "json", {}])
def test_unknown_text_format_is_refused(text_format):
    """With the formats that there are."""
    with pytest.raises(ProtocolError) as caught:
        encode(text={"format": text_format})
    assert caught.value.param.startswith("text.format")


def test_empty_context_is_refused():
    """No server answers to nothing."""
    with pytest.raises(ProtocolError) as caught:
        encode(input=[])
    assert (caught.value.code, caught.value.param) == ("missing_required_parameter", "input")


def test_a_warm_up_may_be_of_nothing_yet():
    """Codex opens its socket with `input: []`, without tools and instructions."""
    assert body(input=[], generate=False)["messages"] == []


def additional(*tools):
    return {"type": "additional_tools", "role": "developer", "tools": list(tools)}


def test_tools_that_came_as_an_item_hold_for_every_turn_after():
    """Codex brings its tools once, as an item of the first turn, and never in `tools`."""
    space = {"type": "namespace", "name": "fs", "description": "", "tools": [LOOK, {"type": "custom", "name": "patch"}]}
    first = EMPTY.extend([item_of(additional(space))])
    encoded = encode(context=first)
    sent = json.loads(encoded.body)
    assert [tool["function"]["name"] for tool in sent["tools"]] == ["fs__look", "fs__patch"]
    assert [message["role"] for message in sent["messages"]] == ["user"]
    assert encoded.names["fs__patch"] == ("custom_tool_call", "patch", "fs")


def test_of_two_tools_with_one_name_the_last_item_counts():
    """A tool is defined anew by the item that comes later, also over the request's own."""
    anew = {**LOOK, "description": "anew"}
    first = EMPTY.extend([item_of(additional(LOOK, {"type": "function", "name": "wait"})), item_of(additional(anew))])
    sent = json.loads(encode(context=first, tools=[LOOK]).body)
    functions = [tool["function"] for tool in sent["tools"]]
    assert [(function["name"], function.get("description")) for function in functions] == [
        ("look", "anew"),
        ("wait", None),
    ]


def test_instructions_alone_are_a_context():
    """They are a system message."""
    assert body(input=[], instructions="Go.")["messages"] == [{"role": "system", "content": "Go."}]


def turns():
    message = st.builds(
        lambda text: [{"role": "user", "content": text}], st.text(st.characters(codec="utf-8"), max_size=5)
    )
    calls = st.integers(1, 3).map(
        lambda count: [
            *(
                {"type": "function_call", "call_id": f"c{index}", "name": "f", "arguments": "{}"}
                for index in range(count)
            ),
            *({"type": "function_call_output", "call_id": f"c{index}", "output": "x"} for index in range(count)),
        ]
    )
    return st.lists(message | calls, min_size=1, max_size=6)


@given(turns=turns(), fork_at=st.integers(0, 5))
def test_body_of_a_continued_turn_equals_that_of_a_full_resend(turns, fork_at):
    """Byte for byte, through the context tree, also where another branch grew from the same node."""
    context, sent = EMPTY, []
    for index, turn in enumerate(turns[:-1]):
        sent += turn
        context = context.extend([read_item(msgspec.json.encode(item), "input[0]") for item in turn])
        if index == fork_at:
            encode(context=context, input="another branch")
    last = turns[-1]
    continued = encode(GENERIC, context, input=last, tools=[LOOK], instructions="I.")
    resent = encode(GENERIC, EMPTY, input=[*sent, *last], tools=[LOOK], instructions="I.")
    assert continued.body == resent.body
