"""Tools in Chat Completions' form, and their names on the way there and back.

Chat Completions knows functions with a JSON schema only. A custom tool becomes a
function with one string argument; the functions of a namespace get it into their
name. Hosted tools have no form there and are dropped, by name, not silently.

Source: Responses API reference, "tools" and "tool_choice".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple, cast

import msgspec

from openline.protocol.errors import ProtocolError
from openline.protocol.items import wrong_type

NAME_CHARS_MAX: Final = 64  # Chat Completions reference, "function.name"
# What may be said of a dropped tool in the log: its type is what its client wrote, and that may be anything.
HOSTED: Final = frozenset(
    {"apply_patch", "code_interpreter", "computer", "computer_use_preview", "file_search", "image_generation"}
    | {"local_shell", "mcp", "programmatic_tool_calling", "shell", "tool_search", "web_search"}
    | {"web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"}
)
CUSTOM_ARGUMENT: Final = "input"
_CACHED_TOOLSETS_MAX: Final = 128  # agents send the same tools every turn
_CACHED_BYTES_MAX: Final = 256 * 1024
_HASH_CHARS: Final = 8
_ILLEGAL: Final = re.compile(r"[^A-Za-z0-9_-]")
_NO_PARAMETERS: Final = msgspec.Raw(b'{"type":"object","properties":{}}')
_NULL: Final = msgspec.Raw(b"null")  # msgspec takes no `Raw | None`
_encoder: Final = msgspec.json.Encoder()


class ToolName(NamedTuple):
    """What a tool is called on the Responses side."""

    call_type: Literal["function_call", "custom_tool_call"]
    name: str
    namespace: str | None = None


class ChatTool(NamedTuple):
    """One function that the upstream gets.

    Attributes:
        chat_name: what the upstream calls it.
        origin: what the client calls it.
        encoded: its entry of `tools`, as JSON.
    """

    chat_name: str
    origin: ToolName
    encoded: bytes


class Toolset(NamedTuple):
    """A request's tools: those that the upstream can do, and the types of those it cannot."""

    tools: tuple[ChatTool, ...]
    dropped: tuple[str, ...]


class _Format(msgspec.Struct):
    type: str = "text"
    syntax: str = ""
    definition: str = ""


class _Tool(msgspec.Struct):
    type: str
    name: str | None = None
    description: str | None = None
    parameters: msgspec.Raw = _NULL
    strict: bool | None = None
    format: _Format | None = None
    tools: list[_Tool] = []


_tools: Final = msgspec.json.Decoder(list[_Tool])


def chat_name(namespace: str | None, name: str) -> str:
    """The upstream's name for a tool; one without a namespace keeps its own.

    It depends on nothing but the two, so that a call in the history gets the same name as
    its tool, also in a turn that does not bring the tool.
    """
    if namespace is None:
        return name
    joined = f"{namespace}__{name}"
    if len(joined) <= NAME_CHARS_MAX and not _ILLEGAL.search(joined):
        return joined
    digest = hashlib.sha256(f"{namespace}\0{name}".encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARS]
    return f"{_ILLEGAL.sub('_', joined)[: NAME_CHARS_MAX - _HASH_CHARS - 1]}_{digest}"


def read_tools(raw_tools: Sequence[msgspec.Raw], later: Sequence[msgspec.Raw] = ()) -> Toolset:
    """A request's `tools`, in the upstream's form.

    Args:
        raw_tools: the request's own.
        later: those that came as items of the conversation; of two with one name the last counts.

    Raises:
        ProtocolError: a tool is not of its type's shape, or two of the request would get the same name.
    """
    toolset = _cached(b"[%b]" % b",".join(bytes(raw) for raw in raw_tools))
    if not later:
        return toolset
    sets = (toolset, *(_cached(b"[%b]" % bytes(raw)) for raw in later))
    tools = {tool.chat_name: tool for each in sets for tool in each.tools}
    dropped = dict.fromkeys(dropped for each in sets for dropped in each.dropped)
    return Toolset(tuple(tools.values()), tuple(dropped))


def _cached(joined: bytes) -> Toolset:
    return _read_tools(joined) if len(joined) <= _CACHED_BYTES_MAX else _read_tools.__wrapped__(joined)


@lru_cache(maxsize=_CACHED_TOOLSETS_MAX)
def _read_tools(joined: bytes) -> Toolset:
    try:
        decoded = _tools.decode(joined)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise wrong_type(error, under="tools") from None
    tools: dict[str, ChatTool] = {}
    dropped: dict[str, None] = {}
    for index, tool in enumerate(decoded):
        if tool.type in {"function", "custom", "namespace"}:
            for made in _chat_tools(tool, f"tools[{index}]", dropped):
                _add(tools, made, index)
        else:
            dropped[tool.type] = None
    return Toolset(tuple(tools.values()), tuple(dropped))


def _add(tools: dict[str, ChatTool], made: ChatTool, index: int) -> None:
    """Put a tool behind the others; the same one twice is one."""
    if tools.setdefault(made.chat_name, made) != made:
        message = f"'tools[{index}]' has a tool that another one has the name of: '{made.chat_name}' at the upstream."
        raise ProtocolError("invalid_value", message, param=f"tools[{index}]")


def _chat_tools(tool: _Tool, param: str, dropped: dict[str, None]) -> Iterator[ChatTool]:
    name = _name_of(tool, param)
    if tool.type != "namespace":
        yield _chat_tool(tool, name, None)
        return
    for index, inner in enumerate(tool.tools):
        if inner.type in {"function", "custom"}:
            yield _chat_tool(inner, _name_of(inner, f"{param}.tools[{index}]"), name)
        else:
            dropped[inner.type] = None


def _name_of(tool: _Tool, param: str) -> str:
    if not tool.name:
        message = f"'{param}.name' is missing: a tool of type '{tool.type}' has a name."
        raise ProtocolError("missing_required_parameter", message, param=f"{param}.name")
    return tool.name


def _chat_tool(tool: _Tool, name: str, namespace: str | None) -> ChatTool:
    function: dict[str, Any] = {"name": chat_name(namespace, name)}
    if tool.type == "custom":
        function["description"] = _custom_description(tool)
        function["parameters"] = _custom_parameters()
    else:
        if tool.description is not None:
            function["description"] = tool.description
        function["parameters"] = _NO_PARAMETERS if bytes(tool.parameters) == b"null" else tool.parameters
        if tool.strict:
            function["strict"] = True
    origin = ToolName("custom_tool_call" if tool.type == "custom" else "function_call", name, namespace)
    return ChatTool(function["name"], origin, _encoder.encode({"type": "function", "function": function}))


def _custom_description(tool: _Tool) -> str:
    texts = [tool.description] if tool.description else []
    texts.append(f"Takes free text: put it into `{CUSTOM_ARGUMENT}` as it is.")
    if tool.format is not None and tool.format.type == "grammar":
        texts.append(f"`{CUSTOM_ARGUMENT}` must follow this {tool.format.syntax} grammar:\n{tool.format.definition}")
    return "\n\n".join(texts)


def _custom_parameters() -> dict[str, Any]:
    argument = {"type": "string", "description": "Free text."}
    return {
        "type": "object",
        "properties": {CUSTOM_ARGUMENT: argument},
        "required": [CUSTOM_ARGUMENT],
        "additionalProperties": False,
    }


class Choice(NamedTuple):
    """What `tool_choice` came to: the tools that are sent, and the upstream's `tool_choice`, None if there is none."""

    tools: tuple[ChatTool, ...]
    tool_choice: object


def choose(
    toolset: Toolset, choice: str | Mapping[str, Any] | None, forms: Literal["any", "modes", "none"] = "any"
) -> Choice:
    """Apply `tool_choice`, in the forms of it that this upstream knows.

    A tool that must be called is the only one that is sent, where no form can name it; where
    a mode is not obeyed, `none` sends no tools. Nothing can stand for `required` there.

    Raises:
        ProtocolError: it names what is not among the tools, or what this upstream cannot do.
    """
    chosen = _choose(toolset, choice)
    if forms == "any":
        return chosen
    if isinstance(chosen.tool_choice, dict):
        name = cast("Any", chosen.tool_choice)["function"]["name"]
        return Choice(tuple(tool for tool in chosen.tools if tool.chat_name == name), "required")
    if forms == "none" and chosen.tool_choice == "none":
        return Choice((), None)
    return chosen


def _choose(toolset: Toolset, choice: str | Mapping[str, Any] | None) -> Choice:
    if choice is None or isinstance(choice, str):
        return _by_mode(toolset.tools, choice)
    choice_type = choice.get("type")
    if choice_type in ("function", "custom"):
        tool = _named({tool.origin: tool for tool in toolset.tools}, choice)
        return Choice(toolset.tools, {"type": "function", "function": {"name": tool.chat_name}})
    if choice_type == "allowed_tools":
        return _by_mode(_allowed(toolset, choice), choice.get("mode", "auto"))
    raise _not_chosen(f"asks for '{choice_type}', which this upstream cannot do", "unsupported_parameter")


def _by_mode(tools: tuple[ChatTool, ...], mode: object) -> Choice:
    if mode not in (None, "none", "auto", "required"):  # a tuple: a mode may be anything, also unhashable
        raise _not_chosen("has an unknown mode: expected 'none', 'auto' or 'required'")
    if mode == "required" and not tools:
        raise _not_chosen("is 'required', but there is no tool that this upstream can do")
    return Choice(tools, mode if tools else None)


def _allowed(toolset: Toolset, choice: Mapping[str, Any]) -> tuple[ChatTool, ...]:
    """The tools that `allowed_tools` leaves; it is a hard limit, so the upstream does not see the others.

    Source: Responses API reference, "tool_choice", `allowed_tools`.
    """
    by_origin = {tool.origin: tool for tool in toolset.tools}  # once: both lists are the client's, and may be long
    allowed: set[ToolName] = set()
    namespaces: set[object] = set()
    entries: Any = choice.get("tools")
    for entry in cast("list[object]", entries if isinstance(entries, list) else []):
        match entry:
            case {"type": "function" | "custom"}:
                allowed.add(_named(by_origin, cast("dict[str, Any]", entry)).origin)
            case {"type": "namespace", "name": str(name)}:
                namespaces.add(name)
            case {"type": str(dropped)} if dropped in toolset.dropped:
                continue  # allowed, but this upstream cannot do it
            case _:
                raise _not_chosen("allows in 'tools' what is not among the tools")
    return tuple(t for t in toolset.tools if t.origin in allowed or (t.origin.namespace or "") in namespaces)


def _named(by_origin: Mapping[ToolName, ChatTool], choice: Mapping[str, Any]) -> ChatTool:
    """The tool that a choice names.

    Raises:
        ProtocolError: there is none.
    """
    name, namespace = choice.get("name"), choice.get("namespace")
    call_type = "custom_tool_call" if choice["type"] == "custom" else "function_call"
    if isinstance(name, str) and isinstance(namespace, str | None):
        tool = by_origin.get(ToolName(call_type, name, namespace))
        if tool is not None:
            return tool
    raise _not_chosen(f"names the {choice['type']} {str(name)[:128]!r}, which is not among the tools")


def _not_chosen(reason: str, code: str = "invalid_value") -> ProtocolError:
    return ProtocolError(code, f"'tool_choice' {reason}.", param="tool_choice")
