"""The response object as it stands when a turn opens.

The union of the keys that OpenAI's SDKs and the Open Responses schema require is
always there, in every event that carries a response.

Source: Responses API reference, "The response object".
"""

from __future__ import annotations

import msgspec

from openline.protocol.events import Create
from openline.protocol.fold import Event
from openline.protocol.items import wrong_type


class _ToolHead(msgspec.Struct):
    type: str


_tool_head = msgspec.json.Decoder(_ToolHead)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NULL = msgspec.Raw(b"null")
# What has no effect here, and is told back where it was sent.
_ECHOED = ("user", "access_programs", "background_options", "image", "prompt_cache_retention")
# The keys of a function tool that the Open Responses schema requires to be there.
_FUNCTION_DEFAULTS = {"description": _NULL, "parameters": _NULL, "strict": _NULL}


def opening_response(create: Create, *, response_id: str, model: str, created_at: int) -> Event:
    """The response that `response.created` carries.

    Args:
        create: the request, whose effective values are echoed.
        response_id: ours.
        model: the name the client asked for.
        created_at: Unix time in seconds.

    Raises:
        ProtocolError: a tool is not an object with a `type`.
    """
    response: Event = {
        "id": response_id,
        "object": "response",
        "created_at": created_at,
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "previous_response_id": create.previous_response_id,
        "instructions": create.instructions,
        "output": [],
        "usage": None,
        "tools": [_echoed_tool(tool, index) for index, tool in enumerate(create.tools or ())],
        "tool_choice": create.tool_choice if create.tool_choice is not None else "auto",
        "parallel_tool_calls": create.parallel_tool_calls is not False,
        "max_tool_calls": create.max_tool_calls,
        "max_output_tokens": create.max_output_tokens,
        "temperature": _or(create.temperature, 1.0),
        "top_p": _or(create.top_p, 1.0),
        "top_logprobs": _or(create.top_logprobs, 0),
        "presence_penalty": _or(create.presence_penalty, 0.0),
        "frequency_penalty": _or(create.frequency_penalty, 0.0),
        "text": _text(create),
        "reasoning": _reasoning(create),
        "truncation": create.truncation or "disabled",
        "store": create.stores,
        "background": create.background is True,
        "metadata": create.metadata or {},
        "service_tier": create.service_tier if create.service_tier not in {None, "auto"} else "default",
        "safety_identifier": create.safety_identifier,
        "prompt_cache_key": create.prompt_cache_key,
    }
    if create.conversation_id is not None:
        response["conversation"] = {"id": create.conversation_id}
    echoed = {name: getattr(create, name) for name in _ECHOED}
    return response | {name: value for name, value in echoed.items() if value is not None}


def _echoed_tool(raw: msgspec.Raw, index: int) -> msgspec.Raw | dict[str, msgspec.Raw]:
    """A tool as the response echoes it: as it came, a function with its optional keys filled in."""
    try:
        head = _tool_head.decode(raw)
    except msgspec.ValidationError as error:
        raise wrong_type(error, under=f"tools[{index}]") from None
    if head.type != "function":
        return raw
    tool = _fields.decode(raw)
    return raw if _FUNCTION_DEFAULTS.keys() <= tool.keys() else {**_FUNCTION_DEFAULTS, **tool}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _text(create: Create) -> Event:
    return {"format": {"type": "text"}, "verbosity": "medium", **(create.text or {})}


def _reasoning(create: Create) -> Event:
    return {"effort": None, "summary": None, **(create.reasoning or {})}
