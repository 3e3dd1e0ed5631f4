"""The one builder: an engine's deltas in, the response's events out.

Events are plain dicts in the wire's own shape. The builder numbers them, opens and
closes items and parts in the canonical order, and gives every item an id of ours. What
it has built so far it reads from the fold, so the two cannot disagree.

Source: Streaming reference, "Event order" and the field table of its events.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final, assert_never

from openline.protocol.deltas import (
    CallDelta,
    CallStarted,
    Delta,
    Ended,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    UpstreamEvent,
    Usage,
)
from openline.protocol.errors import ProtocolError
from openline.protocol.fold import Event, Fold, OutputItem, Part
from openline.protocol.ids import prefix_of
from openline.protocol.states import TERMINAL_EVENTS, IllegalTransition
from openline.protocol.steering import required_input

NewId = Callable[[str], str]


class _AtBoundary(Exception):  # noqa: N818 - a place in the stream
    """The next item would open, and the response has been steered."""


# The delta event of a content part, by the part's type, and the event that closes its text.
_PART_EVENTS: Final = {
    "output_text": ("response.output_text.delta", "response.output_text.done"),
    "refusal": ("response.refusal.delta", "response.refusal.done"),
    "reasoning_text": ("response.reasoning_text.delta", "response.reasoning_text.done"),
}
# The same for calls: delta, done, and the key that carries the whole text.
_CALL_EVENTS: Final = {
    "function_call": ("response.function_call_arguments.delta", "response.function_call_arguments.done", "arguments"),
    "custom_tool_call": ("response.custom_tool_call_input.delta", "response.custom_tool_call_input.done", "input"),
    "mcp_call": ("response.mcp_call_arguments.delta", "response.mcp_call_arguments.done", "arguments"),
    "code_interpreter_call": (
        "response.code_interpreter_call_code.delta",
        "response.code_interpreter_call_code.done",
        "code",
    ),
}
# What an item is whose type knows no `incomplete`, when it is cut.
_CUT_STATUS: Final = {"image_generation_call": "failed", "apply_patch_call": "in_progress"}
_PART_OF_EVENT: Final = {event: part for part, events in _PART_EVENTS.items() for event in events}
# WebSocket mode guide, "Framing": the Node SDK gives these names to its own events.
_RESERVED_TYPES: Final = frozenset({"raw", "close", "event", "reconnecting", "reconnected", "open"})
_EVENT_NAME: Final = re.compile(r"[\w.:/-]{1,128}", re.ASCII)
# What an upstream's terminal response may not decide: whose response it is, and what was asked.
_OURS: Final = frozenset(
    {
        "id",
        "object",
        "created_at",
        "completed_at",
        "model",
        "status",
        "output",
        "error",
        "instructions",
        "tools",
        "metadata",
    }
    | {"previous_response_id", "store", "background", "prompt_cache_key", "conversation", "incomplete_details"}
)


class Builder:
    """Builds one response's events.

    Call `open` once, `apply` for every delta, then `final` or `failed`, and `announce`.

    Args:
        response: the opening response object, status `in_progress`, `output` empty.
        new_id: makes an unguessable id with a prefix.
        timings: whether the client asked how long the upstream's engine took.
        seal: gives a finished reasoning item its `encrypted_content`; None if the client did not ask for it.
    """

    def __init__(
        self,
        response: Event,
        new_id: NewId,
        *,
        timings: bool = False,
        seal: Callable[[Event], Event] | None = None,
    ) -> None:
        self.fold = Fold()
        self.ended: Ended | None = None
        self.usage: Usage | None = None
        self._response = response
        self._new_id = new_id
        self._timings = timings
        self._seal = seal
        self._upstream: Event = {}  # what an upstream's terminal response said
        self._index_of: dict[Any, int] = {}  # an upstream's output_index → ours
        self._events: list[Event] = []
        self._yields = False
        self.yielded = False  # it ended at a boundary, whatever the upstream has still to say

    def __repr__(self) -> str:
        return f"<Builder {self._response.get('id')} {self.fold!r}>"

    def open(self) -> list[Event]:
        """`response.created` and `response.in_progress`; in the background `response.queued` between them."""
        if self._response["background"]:
            self._emit("response.created", response=self.queued)
            self._emit("response.queued", response=self.queued)
        else:
            self._emit("response.created", response=self._response)
        self._emit("response.in_progress", response=self._response)
        return self.take()

    @property
    def queued(self) -> Event:
        """A response of the background as it is created."""
        return {**self._response, "status": "queued"}

    @property
    def is_at_boundary(self) -> bool:
        """Whether the response could be cut here: no item is open, and nothing of it waits for the client."""
        return all(item.closed for item in self.fold.items) and not required_input(self.fold.output())

    def apply(self, deltas: Iterable[Delta]) -> list[Event]:
        """The events that these deltas make.

        Raises:
            IllegalTransition: an upstream's own event cannot stand here.
        """
        try:
            self._apply(deltas)
            if self._yields and self.ended is None and self.is_at_boundary:
                raise _AtBoundary
        except _AtBoundary:
            self.ended = Ended("steered")
            self.yielded = True
        return self.take()

    def _apply(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            match delta:
                case TextDelta():
                    self._part_delta("message", "output_text", delta.text, delta.logprobs)
                case ReasoningDelta():
                    self._part_delta("reasoning", "reasoning_text", delta.text)
                case CallDelta():
                    self._call_delta(delta.text)
                case CallStarted():
                    self._close_last("completed")
                    self._add_item(_call_item(delta))
                case RefusalDelta():
                    self._part_delta("message", "refusal", delta.text)
                case UpstreamEvent():
                    self._from_upstream(delta.event)
                case Usage():
                    self.usage = delta
                case Ended():
                    self.ended = delta
                case _:
                    assert_never(delta)

    def yield_at_boundary(self) -> None:
        """End before the next item begins, as incomplete with reason `steered`, unless a call waits for the client.

        Source: Mid-turn steering guide, "Safe boundary".
        """
        self._yields = True

    def tell(self, event_type: str, fields: Event) -> list[Event]:
        """An event about the response that changes nothing of it."""
        self._emit(event_type, **fields)
        return self.take()

    def keep_alive(self) -> list[Event]:
        """`response.in_progress` again, with what there is of the output: accumulators replace theirs by it.

        Source: docs/adr/0006.
        """
        self._emit("response.in_progress", response=self.fold.snapshot())
        return self.take()

    def finish(self, now: int) -> list[Event]:
        """`final` and `announce` in one, where nothing has to be kept between them."""
        return self.announce(self.final(now))

    def fail(self, error: ProtocolError) -> list[Event]:
        """`failed` and `announce` in one."""
        return self.announce(self.failed(error))

    def final(self, now: int) -> Event:
        """Close what is open; the response as `ended` says, not announced yet, so that it can be kept first.

        Args:
            now: Unix time in seconds.
        """
        reason = self.ended.reason if self.ended else None
        self._close_all("completed" if reason is None else "incomplete")
        if reason is None:
            return self._ending("completed", completed_at=now)
        if reason == "cancelled" and self._response["background"]:
            return self._ending("cancelled")
        return self._ending("incomplete", incomplete_details={"reason": reason})

    def failed(self, error: ProtocolError) -> Event:
        """Close what is open as incomplete; the response as it failed, not announced yet."""
        self._close_all("incomplete")
        return self._ending("failed", error=error.failure())

    def announce(self, response: Event) -> list[Event]:
        """The closing events, and the terminal event with this final response.

        There is none for `cancelled`: the stream of a background response that is cancelled just ends.

        Source: Streaming reference, "Cancelled turn".
        """
        if response["status"] != "cancelled":
            self._emit(f"response.{response['status']}", response=response)
        return self.take()

    def _ending(self, status: str, **changes: object) -> Event:
        known = {key: value for key, value in self._upstream.items() if key not in _OURS and value is not None}
        response = {**self._response, **known, **changes, "status": status, "output": self.fold.output()}
        if self.usage is not None:
            response["usage"] = self.usage.wire(timings=self._timings)
        return response

    # Every event passes here: numbered, folded, kept for the caller.

    def _emit(self, event_type: str, /, **fields: object) -> None:
        event: Event = {"type": event_type, "sequence_number": self.fold.sequence_number + 1, **fields}
        self.fold.apply(event)
        self._events.append(event)

    def take(self) -> list[Event]:
        """The events that were built and not yet taken."""
        events, self._events = self._events, []
        return events

    # Items and parts of our own making.

    def _part_delta(
        self, item_type: str, part_type: str, text: str, logprobs: list[dict[str, Any]] | None = None
    ) -> None:
        item = self.fold.items[-1] if self.fold.items else None
        if item is None or item.closed or item.type != item_type:
            self._close_last("completed")
            item = self._add_item(_empty_item(item_type))
        if not item.content or item.content[-1].closed or item.content[-1].type != part_type:
            self._close_parts(item)
            self._add_part(item, part_type)
        event: Event = {
            "type": _PART_EVENTS[part_type][0],
            "sequence_number": self.fold.sequence_number + 1,
            "item_id": item.id,
            "output_index": item.index,
            "content_index": len(item.content) - 1,
            "delta": text,
        }
        if part_type == "output_text":
            event["logprobs"] = logprobs or []
        self.fold.apply(event)
        self._events.append(event)

    def _call_delta(self, text: str) -> None:
        item = self.fold.items[-1] if self.fold.items else None
        if item is None or item.type not in _CALL_EVENTS:
            raise IllegalTransition("A piece of a call came, and no call is open.")
        self._emit(_CALL_EVENTS[item.type][0], item_id=item.id, output_index=item.index, delta=text)

    def _add_item(self, item: Event) -> OutputItem:
        if self._yields and self.is_at_boundary:
            raise _AtBoundary
        item_type: str = item.get("type", "item")
        item = {**item, "id": self._new_id(prefix_of(item_type))}
        self._emit("response.output_item.added", output_index=len(self.fold.items), item=item)
        return self.fold.items[-1]

    def _add_part(self, item: OutputItem, part_type: str) -> None:
        part: Event = {"type": part_type, "refusal" if part_type == "refusal" else "text": ""}
        if part_type == "output_text":
            part["annotations"] = []
        self._emit(
            "response.content_part.added",
            item_id=item.id,
            output_index=item.index,
            content_index=len(item.content),
            part=part,
        )

    def _close_last(self, status: str) -> None:
        if self.fold.items and not self.fold.items[-1].closed:
            self._close_item(self.fold.items[-1], status)

    def _close_all(self, status: str) -> None:
        for item in self.fold.items:
            if not item.closed:
                self._close_item(item, status)

    def _close_item(self, item: OutputItem, status: str) -> None:
        self._close_parts(item)
        for index, part in enumerate(item.summary):
            if not part.closed:
                self._close_summary(item, index, part, status)
        for index, command in enumerate(item.commands):
            if not command.closed:
                where = {"output_index": item.index, "command_index": index}
                self._emit("response.shell_call_command.done", **where, command=command.text)
        if item.type in _CALL_EVENTS and not item.text_done:
            _, done, key = _CALL_EVENTS[item.type]
            name = {"name": item.name} if item.type == "function_call" else {}
            self._emit(done, item_id=item.id, output_index=item.index, **name, **{key: item.text})
        closed = item.snapshot()
        if "status" in closed:
            closed["status"] = _CUT_STATUS.get(item.type, status) if status == "incomplete" else status
        self._emit("response.output_item.done", output_index=item.index, item=self._sealed(closed))

    def _sealed(self, item: Event) -> Event:
        return self._seal(item) if self._seal is not None and item["type"] == "reasoning" else item

    def _close_parts(self, item: OutputItem) -> None:
        for index, part in enumerate(item.content):
            if part.closed:
                continue
            where: dict[str, Any] = {"item_id": item.id, "output_index": item.index, "content_index": index}
            done = _PART_EVENTS.get(part.type)
            if done and not part.text_done:
                text_key = "refusal" if part.type == "refusal" else "text"
                extra: dict[str, Any] = {"logprobs": part.logprobs} if part.type == "output_text" else {}
                self._emit(done[1], **where, **{text_key: part.text}, **extra)
            self._emit("response.content_part.done", **where, part=part.snapshot())

    def _close_summary(self, item: OutputItem, index: int, part: Part, status: str) -> None:
        where: dict[str, Any] = {"item_id": item.id, "output_index": item.index, "summary_index": index}
        if not part.text_done:
            self._emit("response.reasoning_summary_text.done", **where, text=part.text)
        cut: Event = {"status": status} if status == "incomplete" else {}
        self._emit("response.reasoning_summary_part.done", **where, part=part.snapshot(), **cut)

    # Events of an upstream that speaks Responses: its words, our ids and numbers.

    def _from_upstream(self, event: Event) -> None:
        try:
            self._upstream_event(event)
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"An upstream's '{event.get('type')}' lacks a field or has one of a wrong type: {error!r}."
            raise IllegalTransition(msg) from error

    def _upstream_event(self, event: Event) -> None:
        event_type: Any = event.get("type")
        if not isinstance(event_type, str) or not _is_event_name(event_type):
            return
        if event_type in {"response.failed", "error"}:
            # Else a failed turn would end as completed.
            msg = f"'{event_type}' of an upstream is for its engine to raise as a ProtocolError."
            raise IllegalTransition(msg)
        if event_type in TERMINAL_EVENTS:
            self._upstream_terminal(event)
        elif event_type in {"response.created", "response.queued", "response.in_progress"}:
            return  # ours have been sent, or will be
        elif event_type == "response.output_item.added":
            self._index_of[event.get("output_index")] = len(self.fold.items)
            self._add_item(_checked_item(event["item"]))
        else:
            self._upstream_item_event(event, event_type)

    def _upstream_item_event(self, event: Event, event_type: str) -> None:
        rest = {key: value for key, value in event.items() if key not in {"type", "sequence_number", "stream_id"}}
        if "output_index" not in event:
            self._emit(event_type, **rest)
            return
        index = self._index_of.get(event["output_index"])
        if index is None:
            # A whole item without its `added`: some servers skip it for calls that come at once.
            if event_type != "response.output_item.done":
                return
            index = self._index_of[event["output_index"]] = len(self.fold.items)
            self._add_item({**_checked_item(event["item"]), "status": "in_progress"})
        item = self.fold.items[index]
        rest["output_index"] = index
        if "item_id" in rest:
            rest["item_id"] = item.id
        if "item" in rest:
            rest["item"] = {**_checked_item(event["item"]), "id": item.id}
            if event_type == "response.output_item.done":
                rest["item"] = self._sealed(rest["item"])
        part_type = _PART_OF_EVENT.get(event_type)
        if part_type is not None and event.get("content_index") == len(item.content):
            self._add_part(item, part_type)  # clients' accumulators want it before any text
        self._emit(event_type, **rest)

    def _upstream_terminal(self, event: Event) -> None:
        response: Event = {**event["response"]}
        for index, item in enumerate(response.get("output") or ()):
            if index not in self._index_of:  # servers that only pretend to stream bring the output here
                done = "response.output_item.done"
                self._upstream_item_event({"type": done, "output_index": index, "item": item}, done)
        details: Event = response.get("incomplete_details") or {}
        reason: Any = details.get("reason")
        if event["type"] == "response.completed":
            self.ended = Ended()
        else:
            self.ended = Ended(reason if isinstance(reason, str) and reason else "max_output_tokens")
        if response.get("usage") is not None:
            response["usage"] = _complete_usage(response["usage"])
        self._upstream = response


@lru_cache(maxsize=256)
def _is_event_name(event_type: str) -> bool:
    """Whether a client may get an event of this type.

    Node's SDK drops its connection at those that it has itself; and a type is written out as the name of a server-sent
    event too, where quotes and backslashes would stand otherwise than in JSON.
    """
    return event_type not in _RESERVED_TYPES and _EVENT_NAME.fullmatch(event_type) is not None


def _checked_item(item: Event) -> Event:
    """An upstream's item, if its head can be read as that of every item in a context.

    Raises:
        TypeError: it cannot.
    """
    if not isinstance(item["type"], str) or not isinstance(item.get("call_id"), str | None):
        msg = "'type' and 'call_id' of an item are strings"
        raise TypeError(msg)
    return item


def _complete_usage(usage: Event) -> Event:
    """An upstream's usage with every key that clients' types require; what it counts beside them stays."""
    complete: Event = {**Usage().wire(), **usage}
    for details in ("input_tokens_details", "output_tokens_details"):
        complete[details] = {**Usage().wire()[details], **(usage.get(details) or {})}
    return complete


def _empty_item(item_type: str) -> Event:
    if item_type == "reasoning":
        return {"type": "reasoning", "status": "in_progress", "summary": [], "content": []}
    return {"type": "message", "status": "in_progress", "role": "assistant", "content": []}


def _call_item(call: CallStarted) -> Event:
    item: Event = {"type": call.type, "status": "in_progress", "call_id": call.call_id, "name": call.name}
    if call.namespace is not None:
        item["namespace"] = call.namespace
    item["input" if call.type == "custom_tool_call" else "arguments"] = ""
    return item
