"""What a run has come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from openline.client.run_state import Step, tool_call
from openline.client.tool_outputs import ToolOutput
from openline.client.tools import ToolCall
from openline.client.wire import Response

_TOKENS: Final = ("input_tokens", "output_tokens", "total_tokens")


class FinishedCall(msgspec.Struct, frozen=True):
    """A call of a run, with its output."""

    call: ToolCall
    output: ToolOutput


class RunResult(msgspec.Struct, frozen=True):
    """A run that has come to its end.

    Attributes:
        session_id: under which the ledger holds it.
        responses: of every turn, the final one last; those of agents before a crash too.
        calls: in the order in which the model made them; likewise.
    """

    session_id: str
    responses: tuple[Response, ...]
    calls: tuple[FinishedCall, ...]

    @property
    def response(self) -> Response:
        """The last one; its `status` is `incomplete` if the model was cut, by its token limit for instance."""
        return self.responses[-1]

    @property
    def text(self) -> str:
        """What the last response says."""
        messages = [item for item in self.response.get("output") or () if item.get("type") == "message"]
        parts = [part for message in messages for part in message.get("content") or ()]
        return "".join(part.get("text") or part.get("refusal") or "" for part in parts)

    @property
    def usage(self) -> dict[str, int]:
        """The tokens of all turns together; a turn whose server tells nothing counts as none.

        Source: Responses API reference, "usage", with the two details as `cached_tokens` and `reasoning_tokens`.
        """
        total: Counter[str] = Counter()
        for response in self.responses:
            usage: dict[str, Any] = response.get("usage") or {}
            read: dict[str, int] = usage.get("input_tokens_details") or {}
            written: dict[str, int] = usage.get("output_tokens_details") or {}
            total.update({name: usage.get(name) or 0 for name in _TOKENS})
            total.update(cached_tokens=read.get("cached_tokens") or 0)
            total.update(reasoning_tokens=written.get("reasoning_tokens") or 0)
        return dict(total)


def result_of(session_id: str, steps: Sequence[Step]) -> RunResult:
    """The result of a run that is done.

    Args:
        steps: the run's.
    """
    return RunResult(
        session_id,
        tuple(step.response for step in steps if step.response is not None),
        tuple(
            FinishedCall(tool_call(session_id, step, call), call.output)
            for step in steps
            for call in step.calls
            if call.output is not None
        ),
    )
