"""Steering: more input for a response that still runs, and what becomes of it.

A steer that was accepted waits until its response has ended. Then it is the input of a successor:
one that starts by itself, or the create that the client sends with the outputs of its tool calls.

Source: Mid-turn steering guide; WebSocket mode guide, "Steering".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from openline.protocol.events import Create, Steer, SteerRefused, user_message
from openline.protocol.fold import Event
from openline.protocol.items import OUTPUT_OF_CALL, Item, is_clients_call

ACCEPTED: Final = "response.steer.accepted"
PENDING: Final = "response.steer.pending"
FAILED: Final = "response.steer.failed"
_PARTS: Final = frozenset({"input_text", "input_image", "input_file"})


class Steered(msgspec.Struct, frozen=True):
    """A steer that was accepted.

    Attributes:
        items: its input as items of a context.
    """

    id: str
    steer: Steer
    items: tuple[Item, ...]


class _Part(msgspec.Struct):
    type: str


class _Message(msgspec.Struct, forbid_unknown_fields=True):
    role: str
    content: str | list[_Part]
    type: str = "message"


_input: Final = msgspec.json.Decoder(str | list[msgspec.Raw])
_message: Final = msgspec.json.Decoder(_Message)


def steer_items(steer: Steer) -> tuple[Item, ...]:
    """A steer's input as items: a text, or messages of the user's.

    Raises:
        SteerRefused: `invalid_input`.

    Source: Mid-turn steering guide, "response.steer", `input`.
    """
    try:
        given = _input.decode(steer.input)
        if isinstance(given, str):
            return (user_message(given),)
        items = tuple(_read_message(raw) for raw in given)
    except (msgspec.DecodeError, RecursionError) as error:
        expected = "expected a text, or messages of role 'user'"
        raise SteerRefused("invalid_input", f"'input' is not valid: {str(error)[:200]}: {expected}.", steer) from None
    if not items:
        raise SteerRefused("invalid_input", "'input' is empty: expected a text, or messages of role 'user'.", steer)
    return items


def _read_message(raw: msgspec.Raw) -> Item:
    message = _message.decode(raw)
    parts = [] if isinstance(message.content, str) else message.content
    if message.type != "message" or message.role != "user" or any(part.type not in _PARTS for part in parts):
        raise msgspec.ValidationError("It holds something else")
    return Item(bytes(raw), "message")


def require_support(steer: Steer, create: Create) -> None:
    """A response of a conversation, or one that sums itself up, cannot be steered.

    Args:
        create: the response's.

    Raises:
        SteerRefused: `steering_not_supported`.

    Source: Mid-turn steering guide, "Limits".
    """
    if create.conversation is not None or create.context_management:
        message = "A response with 'conversation' or 'context_management' cannot be steered."
        raise SteerRefused("steering_not_supported", message, steer)


def required_input(output: Sequence[Event]) -> list[Event]:
    """What a client has to send before its conversation can go on: a stub for every call of a response that waits.

    Source: Mid-turn steering guide, "response.steer.pending", `required_input`.
    """
    answered = {item.get("call_id") for item in output if item["type"] in OUTPUT_OF_CALL.values()}
    stubs: list[Event] = []
    for item in output:
        if item["type"] == "mcp_approval_request":
            stubs.append({"type": "mcp_approval_response", "approval_request_id": item.get("id")})
        elif is_clients_call(item) and item["call_id"] not in answered:
            stub: Event = {"type": OUTPUT_OF_CALL[item["type"]], "call_id": item["call_id"]}
            if item["type"] == "function_call":
                stub["name"] = item.get("name")
            elif item["type"] == "tool_search_call":
                stub["execution"] = "client"
            stubs.append(stub)
    return stubs


# --- The events -----------------------------------------------------------------------------------


def accepted(steered: Steered) -> Event:
    """The fields of `response.steer.accepted`: the input is ours now, and not yet applied."""
    return {"steer": {"id": steered.id, "previous_response_id": steered.steer.previous_response_id}}


def pending(steered: Steered, required: list[Event]) -> Event:
    """The fields of `response.steer.pending`: the client's next create will bring it along."""
    return {"reason": "waiting_for_required_input", "required_input": required, **accepted(steered)}


def failed(refused: SteerRefused, steer_id: str | None = None) -> Event:
    """The fields of `response.steer.failed`: the input goes back to the client."""
    steer: dict[str, Any] = {"id": steer_id} if steer_id is not None else {}
    steer |= {"input": refused.steer.input, "previous_response_id": refused.steer.previous_response_id}
    error = {"type": "invalid_request_error", "code": refused.code, "message": refused.message}
    return {"error": error, "steer": steer}


# --- One connection's steers ------------------------------------------------------------------------


class _Ended(msgspec.Struct):
    """A lane's latest response, and the number of the next event about it."""

    response_id: str
    number: int


class Steers:
    """The accepted steers of a connection, by lane, until a successor has taken them.

    Args:
        count_max: how many may wait, over all lanes.
        bytes_max: of their input.
    """

    def __init__(self, count_max: int, bytes_max: int) -> None:
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._waiting: dict[str | None, list[Steered]] = {}
        self._ended: dict[str | None, _Ended] = {}

    def __repr__(self) -> str:
        return f"<Steers waiting={sum(map(len, self._waiting.values()))}>"

    def admit(self, steer: Steer) -> None:
        """Whether one more may wait.

        Raises:
            SteerRefused: `too_many_pending_steers`.
        """
        waiting = [steered for lane in self._waiting.values() for steered in lane]
        size = sum(len(bytes(steered.steer.input)) for steered in waiting)
        if len(waiting) >= self._count_max or (waiting and size + len(bytes(steer.input)) > self._bytes_max):
            message = f"{len(waiting)} steers of {size} bytes wait on this connection already."
            raise SteerRefused("too_many_pending_steers", message, steer)

    def add(self, stream_id: str | None, steered: Steered) -> None:
        """It was accepted on the lane of its response."""
        self._waiting.setdefault(stream_id, []).append(steered)

    def waiting(self, stream_id: str | None) -> Sequence[Steered]:
        """What waits on a lane, in the order of submission."""
        return self._waiting.get(stream_id, ())

    def take(self, stream_id: str | None) -> tuple[Steered, ...]:
        """The same, and nothing waits any more."""
        return tuple(self._waiting.pop(stream_id, ()))

    def take_all(self) -> tuple[Steered, ...]:
        """What waits on every lane, and nothing waits any more."""
        return tuple(steered for stream_id in list(self._waiting) for steered in self.take(stream_id))

    def ended(self, stream_id: str | None, response_id: str, events: int) -> None:
        """A lane's response has ended, after so many events."""
        self._ended[stream_id] = _Ended(response_id, events)

    def too_late(self, steer: Steer) -> SteerRefused:
        """Why a response that does not run cannot be steered."""
        target = steer.previous_response_id
        if any(ended.response_id == target for ended in self._ended.values()):
            return already_completed(steer)
        message = f"Response with id '{target[:256]}' not found: no response of that id runs on this connection."
        return SteerRefused("response_not_found", message, steer)

    def lane_of(self, response_id: str) -> str | None:
        """The lane whose latest response this is; None, as for the default lane, if it is nobody's."""
        return next((lane for lane, ended in self._ended.items() if ended.response_id == response_id), None)

    def number(self, response_id: str) -> int:
        """The number of the next event about a response: its counter goes on behind its end; 0 if it is not known."""
        for ended in self._ended.values():
            if ended.response_id == response_id:
                ended.number += 1
                return ended.number - 1
        return 0


def already_completed(steer: Steer) -> SteerRefused:
    """The one refusal for a response that has ended."""
    message = f"Response '{steer.previous_response_id}' has ended: send a create that continues it."
    return SteerRefused("response_already_completed", message, steer)
