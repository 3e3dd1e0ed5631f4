"""Items: what a conversation is made of, read no further than we must.

An item stays the bytes it came as. Read is only its head: the type and what pairs a
tool call with its output. Unknown types pass through untouched.

Source: Responses API reference, "Items".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec

from openline.protocol.errors import ProtocolError


class Item(msgspec.Struct, frozen=True):
    """One item of a context.

    Attributes:
        raw: the item as JSON, in UTF-8, as the model is to read it.
        type: the item's `type`; `message` where an easy message left it out.
        call_id: what a tool call and its output share, else None.
        answers_later: a call made with `async: true`, whose output may come in any later turn.
        sealed: the item as the client has it, where that is not what the model reads.
        sums_up: it stands for everything before it.
    """

    raw: bytes
    type: str
    call_id: str | None = None
    answers_later: bool = False
    sealed: bytes | None = None
    sums_up: bool = False

    @property
    def wire(self) -> bytes:
        """The item as the client has it."""
        return self.raw if self.sealed is None else self.sealed


class _Head(msgspec.Struct):
    type: str | None = None
    role: str | None = None
    id: str | None = None
    call_id: str | None = None
    approval_request_id: str | None = None
    execution: str | None = None
    is_async: bool | None = msgspec.field(default=None, name="async")


_head = msgspec.json.Decoder(_Head)
_fields = msgspec.json.Decoder(dict[str, Any])

# A call of one of these types waits for an output of the type beside it.
# Hosted calls (web_search_call, …) are not here: nobody has to answer them.
OUTPUT_OF_CALL: Final[Mapping[str, str]] = {
    "function_call": "function_call_output",
    "custom_tool_call": "custom_tool_call_output",
    "local_shell_call": "local_shell_call_output",
    "shell_call": "shell_call_output",
    "apply_patch_call": "apply_patch_call_output",
    "computer_call": "computer_call_output",
    "tool_search_call": "tool_search_output",
}
REFERENCE: Final = "item_reference"
_OUTPUTS: Final = frozenset(OUTPUT_OF_CALL.values())
# The most of a decoder's complaint that an error message carries.
_TEXT_CHARACTERS_MAX: Final = 200
_MISSING: Final = re.compile("missing required field `(.*?)`")


def read_item(raw: bytes | msgspec.Raw, param: str) -> Item:
    """Read an input item's head.

    Args:
        raw: the item as JSON.
        param: where it stands in the request, such as `input[2]`, for the error.

    Raises:
        ProtocolError: it is not an object, its head has wrong types, or nothing says what it is.
    """
    try:
        head = _head.decode(raw)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise wrong_type(error, under=param) from None
    if head.type is None and head.role is None and head.id is not None:
        head.type = REFERENCE  # the reference's `type` may be left out
    if head.type is None and head.role is None:
        message = f"'{param}' has neither 'type' nor 'role': expected an input item or a message."
        raise ProtocolError("missing_required_parameter", message, param=f"{param}.type")
    item_type = head.type or "message"
    call_id = head.call_id
    if call_id is None and item_type == "local_shell_call_output":
        call_id = head.id  # this one output names its call by `id`
    if call_id is None and item_type in _OUTPUTS and item_type != "tool_search_output":
        message = f"'{param}.call_id' is missing: an item of type '{item_type}' names the call that it answers."
        raise ProtocolError("missing_required_parameter", message, param=f"{param}.call_id")
    return Item(bytes(raw), item_type, call_id, head.is_async is True)


def item_of(value: Mapping[str, Any]) -> Item:
    """An item that we made ourselves, from its wire form."""
    return Item(msgspec.json.encode(value), value["type"], value.get("call_id"), value.get("async") is True)


def is_clients_call(item: Mapping[str, Any]) -> bool:
    """Whether an output item is a call whose output the client has to bring before the model can go on."""
    return item.get("type") in OUTPUT_OF_CALL and item.get("call_id") is not None and item.get("async") is not True


class OpenCalls:
    """Which tool calls of a context wait for their output.

    Immutable: `after` gives the state after more items, so every node of a context
    tree can keep its own.
    """

    __slots__ = ("_waiting",)

    def __init__(self, waiting: Mapping[str, Item] | None = None) -> None:
        self._waiting: Mapping[str, Item] = waiting or {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, call_id: str) -> bool:
        return call_id in self._waiting

    def __repr__(self) -> str:
        return f"<OpenCalls waiting={len(self._waiting)}>"

    def after(self, items: Sequence[Item]) -> OpenCalls:
        """The calls that wait once these items stand behind the ones before.

        Raises:
            ProtocolError: an output whose call is not waiting.
        """
        if not self._waiting and all(item.call_id is None for item in items):
            return self
        waiting = dict(self._waiting)
        for item in items:
            if item.call_id is None:
                continue
            if item.type in OUTPUT_OF_CALL:
                waiting[item.call_id] = item
            elif item.type in _OUTPUTS and waiting.pop(item.call_id, None) is None:
                message = f"No tool call found for {_words(item.type)} with call_id {item.call_id}."
                raise ProtocolError("invalid_request", message, param="input")
        return OpenCalls(waiting)

    def require_none(self) -> None:
        """Every call has its output, so the model may go on.

        Raises:
            ProtocolError: a call is unanswered, and it was not one that may be answered later.
        """
        for call_id, item in self._waiting.items():
            if not item.answers_later:
                message = f"No tool output found for {_words(item.type)} {call_id}."
                raise ProtocolError("invalid_request", message, param="input")


def without_repeats(
    items: Sequence[Item], calls: OpenCalls, answers: Callable[[], Mapping[str, Item]]
) -> Sequence[Item]:
    """The items without the outputs that came before: a client that does not know whether one arrived sends it again.

    Args:
        calls: those that wait before these items.
        answers: the latest output of each call before these items; asked for only if it is needed.

    Raises:
        ProtocolError: a call that has its output gets another one.

    Source: docs/adr/0010.
    """
    if not any(item.type in _OUTPUTS for item in items):
        return items
    called: set[str] = set()
    answered: dict[str, Item] = {}
    earlier: Mapping[str, Item] | None = None
    kept: list[Item] = []
    for item in items:
        call_id = item.call_id
        if call_id is not None and item.type in OUTPUT_OF_CALL:
            called.add(call_id)
            answered.pop(call_id, None)
        elif call_id is not None and item.type in _OUTPUTS:
            first = answered.get(call_id)
            if first is None and call_id not in called and call_id not in calls:
                earlier = answers() if earlier is None else earlier
                first = earlier.get(call_id)
            if first is not None:
                _require_same(first, item)
                continue
            answered[call_id] = item
        kept.append(item)
    return kept


def answers_in(items: Iterable[Item]) -> dict[str, Item]:
    """The latest output of each call, by the call's id."""
    return {item.call_id: item for item in items if item.call_id is not None and item.type in _OUTPUTS}


def _require_same(first: Item, again: Item) -> None:
    if first.raw != again.raw and _said(first) != _said(again):
        message = (
            f"The call {again.call_id} has its output already, and this one is different: expected the same, or none."
        )
        raise ProtocolError("tool_output_conflict", message, param="input")


def _said(output: Item) -> dict[str, Any]:
    """What an output tells the model: all of it but what it is called, and that it is whole."""
    try:
        fields = _fields.decode(output.raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError):  # nobody has read all of it so far
        return {"raw": output.raw}
    return {**fields, "status": fields.get("status") or "completed", "id": None}


def _words(item_type: str) -> str:
    return item_type.replace("_", " ")


def wrong_type(error: Exception, under: str = "") -> ProtocolError:
    """A decoder's complaint as our error: which field, what came, what was expected.

    Args:
        error: msgspec's error; its text ends in ` - at `$.path`` where a field is at fault.
        under: the path of what was decoded, in front of the field's own.
    """
    text, _, path = str(error).partition(" - at `")
    # A key at fault is "`key` in `$.metadata`": the object is what we name.
    field = path.rpartition("$")[2].rstrip("`").replace("[...]", "[*]")
    param = (under + field).lstrip(".") or None
    if missing := _MISSING.search(text):
        param = f"{param}.{missing[1]}" if param else missing[1]
        return ProtocolError("missing_required_parameter", f"'{param}' is missing.", param=param)
    where = f"'{param}'" if param else "The request body"
    code = "invalid_type" if ", got `" in text else "invalid_value"
    # The text may quote what came, which has no bound.
    text = text if len(text) <= _TEXT_CHARACTERS_MAX else f"{text[:_TEXT_CHARACTERS_MAX]}…"
    return ProtocolError(code, f"{where} is not valid: {text[:1].lower()}{text[1:]}.", param=param)
