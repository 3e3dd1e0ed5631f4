"""A response is a fold over its events.

The one place that knows what an event does to a response. The builder reads what it
has built from here; a JSON answer, a snapshot and a client read the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, cast

from openline.protocol.states import LIFECYCLE_EVENTS, IllegalTransition, ResponseState, next_response_state

Event = dict[str, Any]


class Part:
    """A content or summary part, or a shell's command, while its text still comes."""

    __slots__ = ("_chunks", "_part", "_text_key", "annotations", "closed", "logprobs", "text_done")

    def __init__(self, part: Event) -> None:
        if not isinstance(part["type"], str):
            raise IllegalTransition("'type' of a part is not a string.")
        self._text_key = "refusal" if part["type"] == "refusal" else "text"
        self._part = part
        self._chunks: list[str] = [_text(part, self._text_key)]
        self.annotations: list[Any] = list(part.get("annotations") or ())
        self.logprobs: list[Any] = list(part.get("logprobs") or ())
        self.text_done = False
        self.closed = False

    @property
    def type(self) -> str:
        """`output_text`, `refusal`, `reasoning_text` or `summary_text`; a command is `command`."""
        return self._part["type"]

    @property
    def text(self) -> str:
        """All text so far."""
        if len(self._chunks) > 1:
            self._chunks = ["".join(self._chunks)]
        return self._chunks[0]

    def add(self, delta: str) -> None:
        """More text."""
        self._chunks.append(delta)

    def set_text(self, text: str) -> None:
        """The text, whole; the part itself is still open."""
        self._chunks, self.text_done = [text], True

    def close(self, part: Event) -> None:
        """The part as its `done` event has it."""
        self._part, self._chunks, self.closed = part, [_text(part, self._text_key)], True

    def snapshot(self) -> Event:
        """The part in the wire's form."""
        part = {**self._part, self._text_key: self.text}
        if self.closed:
            return part
        if part["type"] == "output_text":
            part["annotations"] = list(self.annotations)
            if self.logprobs:
                part["logprobs"] = list(self.logprobs)
        return part


class OutputItem:
    """An output item while its events come."""

    __slots__ = ("_action", "_chunks", "_item", "closed", "commands", "content", "index", "summary", "text_done")

    # Where an item of a type keeps the text that its own deltas bring.
    _TEXT_KEY: Final = {
        "function_call": "arguments",
        "mcp_call": "arguments",
        "custom_tool_call": "input",
        "code_interpreter_call": "code",
    }

    def __init__(self, item: Event, index: int) -> None:
        self.index = index
        self.text_done = False
        self.closed = False
        self.content = [Part(part) for part in item.get("content") or ()]
        self.summary = [Part(part) for part in item.get("summary") or ()]
        self.commands: list[Part] = []  # those of a shell call that its own events bring
        action: Any = item.get("action")
        self._action: Event = action if isinstance(action, dict) else {}
        self._item = item
        key = self._TEXT_KEY.get(item.get("type", ""))
        self._chunks: list[str] = [_text(item, key)] if key else []

    @property
    def id(self) -> str | None:
        """The item's id."""
        return self._item.get("id")

    @property
    def type(self) -> str:
        """The item's `type`; empty if the upstream gave none."""
        return self._item.get("type", "")

    @property
    def name(self) -> str | None:
        """A call's tool name."""
        return self._item.get("name")

    @property
    def text(self) -> str:
        """A call's arguments, input or code so far."""
        if len(self._chunks) > 1:
            self._chunks = ["".join(self._chunks)]
        return self._chunks[0] if self._chunks else ""

    def add(self, delta: str) -> None:
        """More of a call's arguments, input or code."""
        self._chunks.append(delta)

    def set_text(self, text: str) -> None:
        """A call's arguments, input or code, whole; the item itself is still open."""
        self._chunks, self.text_done = [text], True

    def close(self, item: Event) -> None:
        """The item as its `done` event has it."""
        self._item, self.closed = item, True

    def snapshot(self) -> Event:
        """The item in the wire's form."""
        if self.closed:
            return self._item
        item = dict(self._item)
        if self.content:
            item["content"] = [part.snapshot() for part in self.content]
        if self.summary:
            item["summary"] = [part.snapshot() for part in self.summary]
        if self.commands:
            item["action"] = {**self._action, "commands": [command.text for command in self.commands]}
        key = self._TEXT_KEY.get(self.type)
        if key:
            item[key] = self.text
        return item


class Fold:
    """Folds a response's events, in order, into the response.

    Checks what clients' accumulators check: the table of `states.RESPONSE`, the
    sequence numbers, one index an item, deltas only where a part is open.
    """

    def __init__(self) -> None:
        self.state = ResponseState.NEW
        self.items: list[OutputItem] = []
        self.sequence_number = -1
        self._response: Event = {}

    def __repr__(self) -> str:
        return f"<Fold {self.state.value} events={self.sequence_number + 1} items={len(self.items)}>"

    @property
    def ended(self) -> bool:
        """Whether the terminal event has come."""
        return self.state in {ResponseState.COMPLETED, ResponseState.INCOMPLETE, ResponseState.FAILED}

    def apply(self, event: Event) -> None:
        """Take the next event.

        Raises:
            IllegalTransition: it cannot stand here.
        """
        event_type: str = event["type"]
        state = next_response_state(self.state, event_type)
        number: int = event["sequence_number"]
        if number != self.sequence_number + 1:
            msg = f"'{event_type}' has sequence_number {number}: expected {self.sequence_number + 1}."
            raise IllegalTransition(msg)
        if event_type in LIFECYCLE_EVENTS:
            self._response = _object(event, "response")
        elif event_type in _APPLY:
            _APPLY[event_type](self, event)
        # Only now, so that an event that could not stand here leaves no gap in the numbers.
        self.state, self.sequence_number = state, number

    def snapshot(self) -> Event:
        """The response as it stands: open items with their text so far."""
        if self.ended:
            return self._response
        return {**self._response, "output": self.output()}

    def output(self) -> list[Event]:
        """The output as the items' events alone make it."""
        return [item.snapshot() for item in self.items]

    def _item(self, event: Event) -> OutputItem:
        index: int = event["output_index"]
        if not 0 <= index < len(self.items) or self.items[index].closed:
            msg = f"'{event['type']}' is for output_index {index}, where no item is open."
            raise IllegalTransition(msg)
        return self.items[index]

    def _content(self, event: Event) -> Part:
        return _part(self._item(event).content, event, "content_index")

    def _summary(self, event: Event) -> Part:
        return _part(self._item(event).summary, event, "summary_index")

    def _command(self, event: Event) -> Part:
        return _part(self._item(event).commands, event, "command_index")

    def item_added(self, event: Event) -> None:
        """`response.output_item.added`."""
        if event["output_index"] != len(self.items):
            msg = f"output_index {event['output_index']} is added: expected {len(self.items)}."
            raise IllegalTransition(msg)
        self.items.append(OutputItem(event["item"], len(self.items)))

    def item_done(self, event: Event) -> None:
        """`response.output_item.done`."""
        self._item(event).close(event["item"])

    def content_added(self, event: Event) -> None:
        """`response.content_part.added`."""
        self._item(event).content.append(Part(event["part"]))

    def content_delta(self, event: Event) -> None:
        """Text of a content part: answer, refusal or raw reasoning."""
        part = self._content(event)
        part.add(_text(event, "delta"))
        if event.get("logprobs"):
            part.logprobs.extend(event["logprobs"])

    def content_text_done(self, event: Event) -> None:
        """The text of a content part, whole."""
        self._content(event).set_text(_text(event, "refusal" if event["type"] == "response.refusal.done" else "text"))

    def annotation_added(self, event: Event) -> None:
        """`response.output_text.annotation.added`."""
        self._content(event).annotations.append(event["annotation"])

    def content_done(self, event: Event) -> None:
        """`response.content_part.done`."""
        self._content(event).close(event["part"])

    def summary_added(self, event: Event) -> None:
        """`response.reasoning_summary_part.added`."""
        self._item(event).summary.append(Part(event["part"]))

    def summary_delta(self, event: Event) -> None:
        """`response.reasoning_summary_text.delta`."""
        self._summary(event).add(_text(event, "delta"))

    def summary_text_done(self, event: Event) -> None:
        """`response.reasoning_summary_text.done`."""
        self._summary(event).set_text(_text(event, "text"))

    def summary_done(self, event: Event) -> None:
        """`response.reasoning_summary_part.done`."""
        self._summary(event).close(event["part"])

    def call_delta(self, event: Event) -> None:
        """A piece of a call's arguments, input or code."""
        self._item(event).add(_text(event, "delta"))

    def arguments_done(self, event: Event) -> None:
        """A function's arguments, or an MCP tool's, whole."""
        self._item(event).set_text(_text(event, "arguments"))

    def input_done(self, event: Event) -> None:
        """A custom tool's input, whole."""
        self._item(event).set_text(_text(event, "input"))

    def code_done(self, event: Event) -> None:
        """A code interpreter's code, whole."""
        self._item(event).set_text(_text(event, "code"))

    def command_added(self, event: Event) -> None:
        """`response.shell_call_command.added`."""
        self._item(event).commands.append(Part({"type": "command", "text": event.get("command")}))

    def command_delta(self, event: Event) -> None:
        """`response.shell_call_command.delta`."""
        self._command(event).add(_text(event, "delta"))

    def command_done(self, event: Event) -> None:
        """`response.shell_call_command.done`."""
        self._command(event).close({"type": "command", "text": event.get("command")})


def _object(holder: Event, key: str) -> Event:
    value: Any = holder.get(key)
    if not isinstance(value, dict):
        raise IllegalTransition(f"'{key}' of '{holder.get('type')}' is not an object.")
    return cast("Event", value)


def _text(holder: Event, key: str) -> str:
    """A text field; empty where it is null or left out."""
    text = holder.get(key)
    if text is None:
        return ""
    if not isinstance(text, str):
        msg = f"'{key}' of '{holder.get('type')}' is not a string."
        raise IllegalTransition(msg)
    return text


def _part(parts: list[Part], event: Event, index_key: str) -> Part:
    index: int = event[index_key]
    if not 0 <= index < len(parts) or parts[index].closed:
        msg = f"'{event['type']}' is for {index_key} {index}, where no part is open."
        raise IllegalTransition(msg)
    return parts[index]


# Hosted tools' progress events change no field of the response, and unknown events nothing that we know of.
_APPLY: Final[dict[str, Callable[[Fold, Event], None]]] = {
    "response.output_item.added": Fold.item_added,
    "response.output_item.done": Fold.item_done,
    "response.content_part.added": Fold.content_added,
    "response.content_part.done": Fold.content_done,
    "response.output_text.delta": Fold.content_delta,
    "response.output_text.done": Fold.content_text_done,
    "response.output_text.annotation.added": Fold.annotation_added,
    "response.refusal.delta": Fold.content_delta,
    "response.refusal.done": Fold.content_text_done,
    "response.reasoning_text.delta": Fold.content_delta,
    "response.reasoning_text.done": Fold.content_text_done,
    "response.reasoning_summary_part.added": Fold.summary_added,
    "response.reasoning_summary_part.done": Fold.summary_done,
    "response.reasoning_summary_text.delta": Fold.summary_delta,
    "response.reasoning_summary_text.done": Fold.summary_text_done,
    "response.function_call_arguments.delta": Fold.call_delta,
    "response.function_call_arguments.done": Fold.arguments_done,
    "response.mcp_call_arguments.delta": Fold.call_delta,
    "response.mcp_call_arguments.done": Fold.arguments_done,
    "response.custom_tool_call_input.delta": Fold.call_delta,
    "response.custom_tool_call_input.done": Fold.input_done,
    "response.code_interpreter_call_code.delta": Fold.call_delta,
    "response.code_interpreter_call_code.done": Fold.code_done,
    "response.shell_call_command.added": Fold.command_added,
    "response.shell_call_command.delta": Fold.command_delta,
    "response.shell_call_command.done": Fold.command_done,
}
