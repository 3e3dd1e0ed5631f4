"""What a run tells of itself while it goes on."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from typing import Literal

import msgspec

from openline.client.tool_outputs import ToolOutput
from openline.client.tools import ToolCall
from openline.client.wire import Response


class TurnStarted(msgspec.Struct, frozen=True, tag="turn_started"):
    """A create is about to be sent. Once more for the same turn: what was said of it so far is void.

    Attributes:
        turn: its number in the session, from 1.
        is_resumed: an agent before this one had sent it, or was about to.
    """

    turn: int
    idempotency_key: str
    is_resumed: bool = False


class TextDelta(msgspec.Struct, frozen=True, tag="text_delta"):
    """A piece of what the model says, of its refusal, or of its reasoning as far as it is shown."""

    text: str
    kind: Literal["text", "refusal", "reasoning"] = "text"


class CallStarted(msgspec.Struct, frozen=True, tag="call_started"):
    """A tool is about to run; the ledger says so already."""

    call: ToolCall


class CallFinished(msgspec.Struct, frozen=True, tag="call_finished"):
    """A call has its output; the ledger has it already.

    Attributes:
        seconds: how long the tool took; None if it was not run: its arguments were wrong, there is no such tool, or
            `on_unknown` knew the output.
    """

    call: ToolCall
    output: ToolOutput
    seconds: float | None


class TurnFinished(msgspec.Struct, frozen=True, tag="turn_finished"):
    """A turn has ended; the ledger has its response already.

    Attributes:
        response: as its terminal event has it; its `status` says how it ended.
    """

    turn: int
    response: Response


Progress = TurnStarted | TextDelta | CallStarted | CallFinished | TurnFinished
OnProgress = Callable[[Progress], Awaitable[None] | None]


async def tell(on_progress: OnProgress | None, progress: Progress) -> None:
    """Tell the app, and wait until it has taken it."""
    if on_progress is not None:
        taken = on_progress(progress)
        if inspect.isawaitable(taken):
            await taken
