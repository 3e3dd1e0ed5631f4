"""What an app may say of a run: what it may cost, and what becomes of calls whose outcome is unknown."""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from openline.client.errors import OpenlineError
from openline.client.tools import ToolCall


class Output(msgspec.Struct, frozen=True):
    """What `on_unknown` answers if it knows the output of the call: it is not run again.

    Attributes:
        value: as the tool would have returned it.
    """

    value: Any


class Unknown(enum.Enum):
    """What `on_unknown` answers else."""

    RUN = "run"  # it did nothing, or doing it twice does no harm: run it again
    STOP = "stop"  # nobody knows: end with ToolOutcomeUnknown


RUN: Final = Unknown.RUN
STOP: Final = Unknown.STOP
Answer = Output | Unknown
OnUnknown = Callable[[ToolCall], Awaitable[Answer] | Answer]


class RunBounds(msgspec.Struct, frozen=True, kw_only=True):
    """How much a run may do. What is over a bound ends it with `RunBoundReached`; with a ledger it can be resumed.

    Attributes:
        tool_seconds_max: of one call, unless its tool says so itself.
        calls_max: of the whole run, those of its agents before a crash counted in.
        turns_max: likewise.
        parallel_max: calls of one turn that run at once.
        output_bytes_max: of one call's output; more is cut.
    """

    tool_seconds_max: float = 300.0
    calls_max: int = 200
    turns_max: int = 100
    parallel_max: int = 8
    output_bytes_max: int = 131_072  # some 32 000 tokens: a few such outputs fill a model's context

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} is {getattr(self, field)}: expected more than 0.")


class RunBoundReached(OpenlineError):  # noqa: N818 - what happened
    """A run would do more than it may; nothing of what was over the bound was begun.

    Attributes:
        bound: its name, as `run_tools` takes it.
        value: what it is.
    """

    def __init__(self, bound: str, value: int) -> None:
        super().__init__(
            f"the run has reached {bound} = {value}: raise it, and go on with resume= if the run has a ledger."
        )
        self.bound = bound
        self.value = value
