"""A conversation as Chat Completions messages: a fold over its items that only grows.

System texts at the very beginning wait in the state, because `instructions` change with
every turn and stand in the same message. Assistant-side items that follow each other are
one message, so the last one waits in the state too until something else comes. So does a user
message that more may join: images out of tool outputs, which Chat Completions takes from users
only, what a template that wants roles to alternate needs joined, and what a user says before the
outputs of the calls are there, since servers take nothing between a call and its output. All other
messages are bytes that never change.

Source: Responses API reference, "Input items"; Chat Completions reference, "messages".
"""

from __future__ import annotations

import hashlib
import logging
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import msgspec

from openline.engines.chat_content import Part, content_of, image_part, text_of
from openline.engines.chat_tools import CUSTOM_ARGUMENT, chat_name
from openline.engines.profiles import GENERIC, Profile
from openline.protocol.context import SharedBytes
from openline.protocol.errors import ProtocolError
from openline.protocol.items import Item, wrong_type

logger = logging.getLogger("openline.chat")

PATH: Final = "input[*]"  # a context is longer than the request, so an item's own index would mislead

# What a hosted tool did on another server: nobody answers it, and Chat Completions has no form for it.
_LEFT_OUT: Final = frozenset(
    {"web_search_call", "file_search_call", "code_interpreter_call", "image_generation_call"}
    | {"mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response"}
    | {"tool_search_call", "tool_search_output"}
)
# Fields of a call or an output that say nothing to a model.
_BOOKKEEPING: Final = frozenset({"type", "id", "call_id", "caller", "created_by"})
_encoder: Final = msgspec.json.Encoder()
_canonical: Final = msgspec.json.Encoder(order="sorted")

_SHORT_ID: Final = re.compile(r"[a-zA-Z0-9]{9}")
_SHORT_ID_CHARS: Final = string.digits + string.ascii_letters

Content = str | list[dict[str, Any]]


class AssistantGroup(NamedTuple):
    """Assistant-side items in a row, which become one message; tool calls are encoded already."""

    texts: tuple[str, ...] = ()
    reasoning: tuple[str, ...] = ()
    calls: tuple[bytes, ...] = ()

    def encoded(self, reasoning_field: str) -> bytes:
        """The message. `content` is null only beside tool calls, where some servers refuse an empty text."""
        content = "\n".join(self.texts) if self.texts or not self.calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if self.reasoning:
            message[reasoning_field] = "\n".join(self.reasoning)
        if self.calls:
            message["tool_calls"] = [msgspec.Raw(call) for call in self.calls]
        return _encoder.encode(message)


class ChatContext(NamedTuple):
    """A context, folded.

    Attributes:
        messages: closed messages, joined by commas.
        leading: the texts of system items that nothing else stands before.
        open: the assistant message that the next item may still belong to.
        waiting: the contents of a user message that more may join; tool outputs go before it.
        unanswered: the calls of the last assistant message whose outputs have not come.
        tools: tools that came as items, for this turn and all that continue it.
        after_tool: whether the last closed message is a tool's.
        profile: whose form this is.
    """

    messages: SharedBytes
    leading: tuple[str, ...] = ()
    open: AssistantGroup | None = None
    waiting: tuple[Content, ...] = ()
    unanswered: frozenset[str] = frozenset()
    tools: tuple[msgspec.Raw, ...] = ()
    after_tool: bool = False
    profile: Profile = GENERIC

    def encoded(self, instructions: str | None) -> bytes:
        """The inside of the `messages` array."""
        texts = [text for text in (instructions, *self.leading) if text]
        parts = [_encoder.encode({"role": "system", "content": "\n\n".join(texts)})] if texts else []
        if len(self.messages):
            parts.append(bytes(self.messages))
        if self.open is not None:
            parts.append(self.open.encoded(self.profile.reasoning_field))
        parts += _user_messages(self.waiting, self.profile, after_tool=self.after_tool)
        return b",".join(parts)


class ChatProjection:
    """The fold from items to messages, in the form that a profile wants."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._key = f"chat/{profile.form}"

    @property
    def key(self) -> str:
        """The form's name."""
        return self._key

    def start(self) -> ChatContext:
        """No items."""
        return ChatContext(SharedBytes(), profile=self._profile)

    def extend(self, state: ChatContext, items: Sequence[Item]) -> ChatContext:
        """The context with these items behind.

        Raises:
            ProtocolError: Chat Completions has no form for one of them.
        """
        fold = _Fold(state)
        for item in items:
            form = _FORMS.get(item.type)
            if form is not None:
                form(fold, item)
            elif item.type in _LEFT_OUT:
                logger.debug("an item of type %s is left out: it has no form in Chat Completions", item.type)
            else:
                raise _no_form(item)
        return fold.state()


class _Group:
    """An assistant message while items are added to it."""

    def __init__(self, before: AssistantGroup) -> None:
        self.texts = list(before.texts)
        self.reasoning = list(before.reasoning)
        self.calls = list(before.calls)

    def frozen(self) -> AssistantGroup:
        return AssistantGroup(tuple(self.texts), tuple(self.reasoning), tuple(self.calls))


class _Fold:
    """A context while items are added to it."""

    def __init__(self, state: ChatContext) -> None:
        self._before = state
        self._leading = list(state.leading)
        self._closed: list[bytes] = []
        self._open = None if state.open is None else _Group(state.open)
        self._waiting = list(state.waiting)
        self._unanswered = set(state.unanswered)
        self._after_tool = state.after_tool
        self.tools = list(state.tools)
        self.profile = state.profile

    def state(self) -> ChatContext:
        messages = self._before.messages
        if self._closed:
            joined = b",".join(self._closed)
            messages = messages.append(b"," + joined if len(messages) else joined)
        still_open = None if self._open is None else self._open.frozen()
        return ChatContext(
            messages,
            tuple(self._leading),
            still_open,
            tuple(self._waiting),
            frozenset(self._unanswered),
            tuple(self.tools),
            self._after_tool,
            self.profile,
        )

    def group(self) -> _Group:
        """The assistant message that stands last, or a new one."""
        if self._waiting:
            self._close_open()
            self._close_waiting()
        if self._open is None:
            self._open = _Group(AssistantGroup())
            self._unanswered.clear()
        return self._open

    def add_call(self, call_id: str, function: Mapping[str, Any]) -> None:
        call = {"id": self.sent_id(call_id), "type": "function", "function": function}
        self.group().calls.append(_encoder.encode(call))
        self._unanswered.add(call_id)

    def add_user(self, content: Content) -> None:
        self._waiting.append(content)
        if not self._unanswered:
            self._close_open()
            if not self.profile.joins_users:
                self._close_waiting()

    def add_system(self, text: str) -> None:
        role = self.profile.late_system_role
        if not self._waiting and not self._closed and self._open is None and not len(self._before.messages):
            self._leading.append(text)
        elif role == "user":
            self.add_user(text)
        else:
            self._close_open()
            self._close_waiting()
            self._close(_encoder.encode({"role": role, "content": text}))

    def add_tool(self, call_id: str | None, content: Content) -> None:
        """A tool's output; what of it is no text waits for the user message behind all tool messages."""
        self._close_open()
        self._unanswered.discard(call_id or "")
        sent_id = self.sent_id(call_id or "")
        if not isinstance(content, str):
            texts = [part["text"] for part in content if part["type"] == "text"]
            shown = [part for part in content if part["type"] != "text"]
            self._waiting.append([{"type": "text", "text": f"Output of tool call {sent_id}:"}, *shown])
            content = "".join(texts) or "The output is in the next user message."
        self._close(_encoder.encode({"role": "tool", "tool_call_id": sent_id, "content": content}), after_tool=True)

    def sent_id(self, call_id: str) -> str:
        """A call's id as this upstream takes it."""
        return short_id(call_id) if self.profile.short_call_ids else call_id

    def _close(self, message: bytes, *, after_tool: bool = False) -> None:
        self._closed.append(message)
        self._after_tool = after_tool

    def _close_open(self) -> None:
        if self._open is not None:
            self._close(self._open.frozen().encoded(self.profile.reasoning_field))
            self._open = None

    def _close_waiting(self) -> None:
        for message in _user_messages(self._waiting, self.profile, after_tool=self._after_tool):
            self._close(message)
        self._waiting.clear()


def _user_messages(contents: Sequence[Content], profile: Profile, *, after_tool: bool) -> list[bytes]:
    """The user message of these contents, if there are any, and what has to stand before it."""
    if not contents:
        return []
    messages: list[bytes] = []
    if after_tool and profile.after_tools:
        messages.append(_encoder.encode({"role": "assistant", "content": profile.after_tools}))
    messages.append(_encoder.encode({"role": "user", "content": _joined(contents)}))
    return messages


def _joined(contents: Sequence[Content]) -> Content:
    """Contents as one: a text as long as all are texts, since templates of many local models take nothing else."""
    if len(contents) == 1:
        return contents[0]
    texts = [content for content in contents if isinstance(content, str)]
    if len(texts) == len(contents):
        return "\n\n".join(texts)
    lists = [[{"type": "text", "text": each}] if isinstance(each, str) else each for each in contents]
    return [part for parts in lists for part in parts]


def short_id(call_id: str) -> str:
    """A call id as nine letters and digits: one that has this form already as it is, any other by its hash.

    An upstream's own ids keep their form through the client and back, so only foreign ones are
    replaced; a call and its output get the same one, in every turn.
    """
    if _SHORT_ID.fullmatch(call_id):
        return call_id
    number = int.from_bytes(hashlib.sha256(call_id.encode("utf-8", "surrogatepass")).digest()[:8])
    chars: list[str] = []
    for _ in range(9):
        number, index = divmod(number, len(_SHORT_ID_CHARS))
        chars.append(_SHORT_ID_CHARS[index])
    return "".join(chars)


# Items as far as they are read here.


class _Message(msgspec.Struct):
    role: str
    content: str | list[Part]


class _Reasoning(msgspec.Struct):
    summary: list[Part] | None = None
    content: list[Part] | None = None


class _FunctionCall(msgspec.Struct):
    call_id: str
    name: str
    arguments: str = ""
    namespace: str | None = None


class _CustomCall(msgspec.Struct):
    call_id: str
    name: str
    input: str
    namespace: str | None = None


class _Output(msgspec.Struct):
    output: str | list[Part]


class _AdditionalTools(msgspec.Struct):
    tools: list[msgspec.Raw]


_message: Final = msgspec.json.Decoder(_Message)
_reasoning: Final = msgspec.json.Decoder(_Reasoning)
_function_call: Final = msgspec.json.Decoder(_FunctionCall)
_custom_call: Final = msgspec.json.Decoder(_CustomCall)
_output: Final = msgspec.json.Decoder(_Output)
_additional_tools: Final = msgspec.json.Decoder(_AdditionalTools)
_fields: Final = msgspec.json.Decoder(dict[str, Any])


def _decode(decoder: msgspec.json.Decoder[Any], item: Item) -> Any:
    try:
        return decoder.decode(item.raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise wrong_type(error, under=PATH) from None


# One function an item type.


def _add_message(fold: _Fold, item: Item) -> None:
    message: _Message = _decode(_message, item)
    match message.role:
        case "user":
            fold.add_user(content_of(message.content, f"{PATH}.content", joiner="\n"))
        case "assistant":
            text = text_of(message.content, f"{PATH}.content", "")
            if text:
                fold.group().texts.append(text)
        case "system" | "developer":
            fold.add_system(text_of(message.content, f"{PATH}.content", "\n"))
        case role:
            expected = "expected 'user', 'assistant', 'system' or 'developer'"
            raise ProtocolError("invalid_value", f"'{PATH}.role' is '{role[:64]}': {expected}.", param=f"{PATH}.role")


def _add_reasoning(fold: _Fold, item: Item) -> None:
    """Raw reasoning, or its summary; sealed reasoning of another server is nothing that a model can read."""
    if not fold.profile.reasoning_field:
        return
    reasoning: _Reasoning = _decode(_reasoning, item)
    texts = [part.text for part in reasoning.content or reasoning.summary or () if part.text]
    if texts:
        fold.group().reasoning.append("\n".join(texts))


def _add_function_call(fold: _Fold, item: Item) -> None:
    call: _FunctionCall = _decode(_function_call, item)
    # Servers parse the arguments of the history, and an empty text is not JSON.
    _add_call(fold, call.call_id, chat_name(call.namespace, call.name), call.arguments or "{}")


def _add_custom_call(fold: _Fold, item: Item) -> None:
    call: _CustomCall = _decode(_custom_call, item)
    arguments = _encoder.encode({CUSTOM_ARGUMENT: call.input}).decode()
    _add_call(fold, call.call_id, chat_name(call.namespace, call.name), arguments)


def _add_other_call(fold: _Fold, item: Item) -> None:
    """A call of a built-in tool that the client runs: its type is the function, its fields are the arguments."""
    fields: dict[str, Any] = _decode(_fields, item)
    if item.call_id is None:
        message = f"'{PATH}.call_id' is missing: an item of type '{item.type}' has one."
        raise ProtocolError("missing_required_parameter", message, param=f"{PATH}.call_id")
    name = item.type.removesuffix("_call")
    _add_call(fold, item.call_id, name, _canonical.encode(_telling(fields)).decode())


def _add_output(fold: _Fold, item: Item) -> None:
    output: _Output = _decode(_output, item)
    fold.add_tool(item.call_id, content_of(output.output, f"{PATH}.output", joiner=""))


def _add_other_output(fold: _Fold, item: Item) -> None:
    fields: dict[str, Any] = _decode(_fields, item)
    fold.add_tool(item.call_id, _other_output(fields))


def _add_tools(fold: _Fold, item: Item) -> None:
    """Tools that are part of the conversation: no message, but the upstream gets them from here on.

    The raws are copied: a decoded `Raw` keeps the whole buffer it was read from.
    """
    more: _AdditionalTools = _decode(_additional_tools, item)
    fold.tools += [msgspec.Raw(bytes(tool)) for tool in more.tools]


def _other_output(fields: dict[str, Any]) -> Content:
    """The output's fields as JSON; a text that stands alone as it is, and a screenshot as the image it is."""
    telling = _telling(fields)
    output = telling.get("output")
    if isinstance(output, dict) and output.get("type") == "computer_screenshot":  # pyright: ignore[reportUnknownMemberType]
        try:
            screenshot = msgspec.convert(output, Part)
        except msgspec.ValidationError as error:
            raise wrong_type(error, under=f"{PATH}.output") from None
        return [image_part(screenshot, f"{PATH}.output")]
    if isinstance(output, str) and len(telling) == 1:
        return output
    return _canonical.encode(telling).decode()


def _telling(fields: dict[str, Any]) -> dict[str, Any]:
    """What of an item says something to a model; of its status only that it failed."""
    return {
        key: value
        for key, value in fields.items()
        if key not in _BOOKKEEPING and value is not None and (key != "status" or value == "failed")
    }


_FORMS: Final[Mapping[str, Callable[[_Fold, Item], None]]] = {
    "message": _add_message,
    "reasoning": _add_reasoning,
    "additional_tools": _add_tools,
    "function_call": _add_function_call,
    "custom_tool_call": _add_custom_call,
    "function_call_output": _add_output,
    "custom_tool_call_output": _add_output,
    **dict.fromkeys(("local_shell_call", "shell_call", "apply_patch_call", "computer_call"), _add_other_call),
    **dict.fromkeys(
        ("local_shell_call_output", "shell_call_output", "apply_patch_call_output", "computer_call_output"),
        _add_other_output,
    ),
}


def _add_call(fold: _Fold, call_id: str, name: str, arguments: str) -> None:
    fold.add_call(call_id, {"name": name, "arguments": arguments})


def _no_form(item: Item) -> ProtocolError:
    message = f"'input' has an item of type '{item.type[:64]}', which this upstream cannot be given."
    if item.type == "compaction":
        message += " Another server made it, and no other can read it."
    return ProtocolError("unsupported_parameter", message, param="input")
