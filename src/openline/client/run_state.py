"""What a run of tools has behind it, and what it does next. Pure: no I/O, no clock.

A run is a row of steps. A step is a turn and the calls that it made:

    open ──> completed ──> calls started ──> calls finished ──> the next step, with their outputs
         ├─> incomplete, or completed without calls: the run is done
         └─> refused, failed or cancelled: the same input again, in a step of its own

`next_move` looks at the last step alone. It knows no difference between a run that goes on and one that is taken up
after a crash, so there is no second path that only a crash would try.

Source: Responses API reference, "Function calling"; guarantees, "Tools exactly once".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Literal, cast

import msgspec

from openline.client.errors import OpenlineError
from openline.client.tool_outputs import ToolOutput, error_output
from openline.client.tools import ToolCall
from openline.client.wire import Item, Response

Status = Literal["open", "completed", "incomplete", "failed", "cancelled", "refused"]

# A call's type → its output's.
_OUTPUTS: Final = {
    "function_call": "function_call_output",
    "custom_tool_call": "custom_tool_call_output",
}


class Call(msgspec.Struct, frozen=True):
    """A call that a model made.

    Attributes:
        type: the item's: `function_call` or `custom_tool_call`.
        arguments: as the model wrote them.
        has_started: its tool may have done something.
        output: None until it is finished.
    """

    call_id: str
    type: str
    name: str
    arguments: str
    has_started: bool = False
    output: ToolOutput | None = None

    @property
    def item(self) -> Item:
        """The call, as the model made it."""
        holds = "arguments" if self.type == "function_call" else "input"
        return {"type": self.type, "call_id": self.call_id, "name": self.name, holds: self.arguments}

    @property
    def output_item(self) -> Item:
        """Its output, as the next create has it."""
        assert self.output is not None, "it is finished"
        return {"type": _OUTPUTS[self.type], "call_id": self.call_id, "output": self.output.content}


class Step(msgspec.Struct, frozen=True):
    """A turn and its calls.

    Attributes:
        number: in its session, from 1.
        run: which of the session's runs it belongs to, from 1.
        idempotency_key: the create's.
        create: what the create says: `input`, `tools` and the other fields.
        before: what was said before it, if not by the steps before it.
        status: `open` until its terminal event was read, or it was refused; `cancelled` is `incomplete` for that reason.
        response: as the terminal event has it.
        calls: in the order of the response's output.
    """

    number: int
    run: int
    idempotency_key: str
    create: dict[str, Any]
    before: dict[str, Any] | None = None
    status: Status = "open"
    response: Response | None = None
    calls: tuple[Call, ...] = ()

    def with_call(self, call: Call) -> Step:
        """The same step, after something happened to one of its calls."""
        calls = tuple(call if each.call_id == call.call_id else each for each in self.calls)
        return msgspec.structs.replace(self, calls=calls)


class Send(msgspec.Struct, frozen=True, tag=True):
    """Send the step's create, with its key: for the first time, or again."""


class SendAgain(msgspec.Struct, frozen=True, tag=True):
    """Send the same input in a step of its own, with another key: under the old one the failure would be replayed."""


class Run(msgspec.Struct, frozen=True, tag=True):
    """Run calls.

    Attributes:
        ready: those that have not started, or may start again.
        unknown: those that started, are not idempotent, and whose outcome nobody noted.
    """

    ready: tuple[Call, ...] = ()
    unknown: tuple[Call, ...] = ()


class SendOutputs(msgspec.Struct, frozen=True, tag=True):
    """Send the outputs of all calls in the next step."""

    items: tuple[Item, ...]


class Done(msgspec.Struct, frozen=True, tag=True):
    """The run is done; the last response is its answer."""


Move = Send | SendAgain | Run | SendOutputs | Done


def next_move(step: Step, is_idempotent: Callable[[str], bool]) -> Move:
    """What comes after this state of the last step.

    Args:
        is_idempotent: by a tool's name, whether a call may simply be run again.
    """
    if step.status == "open":
        return Send()
    if step.status in {"failed", "cancelled", "refused"}:
        return SendAgain()
    if is_done(step.status, len(step.calls)):
        return Done()
    unfinished = [call for call in step.calls if call.output is None]
    if not unfinished:
        return SendOutputs(tuple(call.output_item for call in step.calls))
    return Run(
        tuple(call for call in unfinished if not call.has_started or is_idempotent(call.name)),
        tuple(call for call in unfinished if call.has_started and not is_idempotent(call.name)),
    )


def is_done(status: Status, calls: int) -> bool:
    """Whether a run is over with a last step of this status, with so many calls of the model's."""
    return status == "incomplete" or (status == "completed" and calls == 0)


def calls_of(response: Response) -> tuple[Call, ...]:
    """The calls that wait for an output of ours.

    Two under one `call_id` are one call if they say the same. Else no output could say whose it is: none of them
    is run, and the model is told.

    Raises:
        OpenlineError: a call has no `call_id`, so that its output could not be sent.
    """
    calls: dict[str, Call] = {}
    for item in response.get("output") or ():
        if item.get("type") not in _OUTPUTS:
            continue
        call = _call(item)
        before = calls.setdefault(call.call_id, call)
        if (before.type, before.name, before.arguments) != (call.type, call.name, call.arguments):
            told = error_output("the call was not run: this response makes different calls under its call_id.")
            calls[call.call_id] = msgspec.structs.replace(before, output=told)
    return tuple(calls.values())


def tool_call(session_id: str, step: Step, call: Call) -> ToolCall:
    """A call as its tool, and the app, get it."""
    try:
        arguments: Any = (
            msgspec.json.decode(call.arguments) if call.type == "function_call" else {"input": call.arguments}
        )
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        arguments = None
    named = cast("dict[str, Any]", arguments) if isinstance(arguments, dict) else {}
    return ToolCall(session_id, step.number, call.call_id, call.name, named)


def _call(item: Item) -> Call:
    call_id = item.get("call_id")
    if not isinstance(call_id, str) or not call_id:
        raise OpenlineError(f"the response calls '{item.get('name')}' without a call_id: its output cannot be sent.")
    arguments = item.get("arguments") if item["type"] == "function_call" else item.get("input")
    return Call(call_id, item["type"], item.get("name") or "", arguments or "")
