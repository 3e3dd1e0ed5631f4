"""A create as the body of a Chat Completions request.

Only what the client gave is sent: a server's defaults are its operator's choice. The
messages are bytes that a context has kept; everything else is encoded around them.

Source: Chat Completions reference, "Create chat completion".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple, cast

import msgspec

from openline.engines.chat_context import ChatProjection
from openline.engines.chat_tools import ToolName, choose, read_tools
from openline.engines.engine import EngineRequest
from openline.engines.profiles import Profile
from openline.protocol.errors import ProtocolError
from openline.protocol.events import Create

_encoder: Final = msgspec.json.Encoder()


class ChatRequest(NamedTuple):
    """One request, ready to be sent.

    Attributes:
        body: its JSON.
        names: for every function that the upstream got, by the name it got, what the client calls it.
        dropped_tools: the types of the tools that were left out.
        prefills: whether it is a warm-up that the upstream is to get.
    """

    body: bytes
    names: Mapping[str, ToolName]
    dropped_tools: tuple[str, ...]
    prefills: bool


def encode_request(request: EngineRequest, profile: Profile, *, prefills: bool) -> ChatRequest:
    """Put a turn into Chat Completions' form.

    Args:
        profile: the upstream's dialect.
        prefills: whether it is to get warm-ups.

    Raises:
        ProtocolError: something in it has no form there.
    """
    create = request.create
    context = request.context.project(ChatProjection(profile))
    toolset = read_tools(create.tools or (), later=context.tools)
    tools, tool_choice = choose(toolset, create.tool_choice, profile.tool_choice)
    messages = context.encoded(create.instructions)
    if not messages and create.generates:  # a warm-up may be of nothing yet: Codex begins so
        message = "'input' is empty: expected at least one item, or 'instructions'."
        raise ProtocolError("missing_required_parameter", message, param="input")
    fields = _sampling(create, profile)
    if tools:
        fields["tools"] = msgspec.Raw(b"[%b]" % b",".join(tool.encoded for tool in tools))
        fields["tool_choice"] = tool_choice
        fields["parallel_tool_calls"] = create.parallel_tool_calls
    given = {name: value for name, value in fields.items() if value is not None}
    if not create.generates:
        given[profile.max_tokens_field] = 1  # a prefill, which no server does without a token behind it
    given["stream"] = True
    if profile.asks_usage:
        given["stream_options"] = {"include_usage": True}
    model = _encoder.encode(request.model)
    body = b'{"model":%b,"messages":[%b],%b' % (model, messages, _encoder.encode(given)[1:])
    names = {tool.chat_name: tool.origin for tool in tools}
    return ChatRequest(body, names, toolset.dropped, prefills and not create.generates and bool(messages))


def _sampling(create: Create, profile: Profile) -> dict[str, Any]:
    """The parameters beside messages and tools; None where the client gave nothing."""
    text = create.text or {}
    return {
        profile.max_tokens_field: create.max_output_tokens,
        "temperature": create.temperature,
        "top_p": create.top_p,
        "presence_penalty": create.presence_penalty,
        "frequency_penalty": create.frequency_penalty,
        "response_format": _response_format(text.get("format")),
        "verbosity": text.get("verbosity"),
        "reasoning_effort": (create.reasoning or {}).get("effort"),
        **_logprobs(create),
        "user": create.user,
    }


def _logprobs(create: Create) -> dict[str, Any]:
    asked = "message.output_text.logprobs" in (create.include or ())
    return {
        "logprobs": True if asked or create.top_logprobs else None,
        "top_logprobs": create.top_logprobs or None,
    }


def _response_format(text_format: object) -> dict[str, Any] | None:
    """`text.format` as `response_format`; plain text is what an upstream answers anyway.

    Raises:
        ProtocolError: a format that Chat Completions does not know.

    Source: Responses API reference, "text.format".
    """
    if text_format is None:
        return None
    if not isinstance(text_format, dict):
        raise ProtocolError("invalid_type", "'text.format' is not an object.", param="text.format")
    fields = cast("dict[str, Any]", text_format)
    match fields.get("type"):
        case "text":
            return None
        case "json_object":
            return {"type": "json_object"}
        case "json_schema":
            known = ("name", "description", "schema", "strict")
            schema = {name: fields[name] for name in known if fields.get(name) is not None}
            return {"type": "json_schema", "json_schema": schema}
        case _:
            message = "'text.format.type' is not known: expected 'text', 'json_object' or 'json_schema'."
            raise ProtocolError("invalid_value", message, param="text.format.type")
