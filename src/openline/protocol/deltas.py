"""What an engine says while it generates: a closed set of values.

Engines speak these; the builder alone knows which events they make. The order of the
deltas is the order of the output: a delta of another kind closes the open item.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

IncompleteReason = Literal["max_output_tokens", "content_filter", "cancelled", "steered"]


class TextDelta(msgspec.Struct, frozen=True):
    """A piece of the answer, with its `logprobs` in the wire's form where they were asked for."""

    text: str
    logprobs: list[dict[str, Any]] = []


class RefusalDelta(msgspec.Struct, frozen=True):
    """A piece of a refusal."""

    text: str


class ReasoningDelta(msgspec.Struct, frozen=True):
    """A piece of the model's raw reasoning."""

    text: str


class CallStarted(msgspec.Struct, frozen=True):
    """A tool call begins; `CallDelta`s belong to it until anything else comes."""

    type: Literal["function_call", "custom_tool_call"]
    call_id: str
    name: str
    namespace: str | None = None


class CallDelta(msgspec.Struct, frozen=True):
    """A piece of the open call's arguments, or of a custom tool's input."""

    text: str


class Timings(msgspec.Struct, frozen=True):
    """How long the upstream's engine took, in milliseconds: to read the prompt, and to generate."""

    prompt_ms: float
    predicted_ms: float


class Usage(msgspec.Struct, frozen=True):
    """Tokens of the turn, as far as the upstream counts them; a later one replaces an earlier one."""

    input_tokens: int = 0
    cached_tokens: int = 0
    cache_write_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    timings: Timings | None = None

    def wire(self, *, timings: bool = False) -> dict[str, Any]:
        """The `usage` object; openai-python's types require every key that is here.

        Args:
            timings: whether the client asked for `openline_timings`, which is there if the upstream told them.

        Source: Responses API reference, "usage"; docs/adr/0004.
        """
        ours = {"openline_timings": msgspec.to_builtins(self.timings)} if timings and self.timings is not None else {}
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {
                "cached_tokens": self.cached_tokens,
                "cache_write_tokens": self.cache_write_tokens,
            },
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
            **ours,
        }


class Ended(msgspec.Struct, frozen=True):
    """The model stopped; `reason` says why if it had not finished: an `IncompleteReason`, or an upstream's own."""

    reason: str | None = None


class UpstreamEvent(msgspec.Struct, frozen=True):
    """An event of an upstream that speaks Responses itself; it goes on with our ids and numbers."""

    event: dict[str, Any]


Delta = TextDelta | RefusalDelta | ReasoningDelta | CallStarted | CallDelta | Usage | Ended | UpstreamEvent
