"""What random engines say, and what a client must hear: a model much simpler than the builder."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from openline.protocol.deltas import (
    CallDelta,
    CallStarted,
    Delta,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    Usage,
)

_text = st.text(max_size=12)
_logprobs = st.lists(
    st.fixed_dictionaries(
        {"token": _text, "bytes": st.just([1]), "logprob": st.just(-0.5), "top_logprobs": st.just([])}
    ),
    max_size=2,
)
_usage = st.builds(Usage, *[st.integers(0, 10**9)] * 5)


def _call(draw: Any, number: int) -> list[Delta]:
    start = CallStarted(
        draw(st.sampled_from(["function_call", "custom_tool_call"])),
        f"call_{number}",
        draw(_text),
        draw(st.none() | _text),
    )
    return [start, *draw(st.lists(st.builds(CallDelta, _text), max_size=4))]


@st.composite
def delta_sequences(draw: Any) -> list[Delta]:
    """Any legal sequence of an engine's deltas, in runs of one kind, with usage anywhere between."""
    said: list[Delta] = []
    for number in range(draw(st.integers(0, 6))):
        match draw(st.sampled_from(["text", "refusal", "reasoning", "call"])):
            case "text":
                said += draw(st.lists(st.builds(TextDelta, _text, _logprobs), min_size=1, max_size=4))
            case "refusal":
                said += draw(st.lists(st.builds(RefusalDelta, _text), min_size=1, max_size=3))
            case "reasoning":
                said += draw(st.lists(st.builds(ReasoningDelta, _text), min_size=1, max_size=4))
            case _:
                said += _call(draw, number)
    for usage in draw(st.lists(_usage, max_size=2)):
        said.insert(draw(st.integers(0, len(said))), usage)
    return said


@st.composite
def batches(draw: Any) -> list[list[Delta]]:
    """The same, in the slices that an upstream's reads make of it."""
    said = draw(delta_sequences())
    cuts = sorted(draw(st.sets(st.integers(0, len(said)), max_size=4)) | {0, len(said)})
    return [said[a:b] for a, b in pairwise(cuts)]


def meaning(said: list[Delta]) -> list[tuple[Any, ...]]:
    """The items that these deltas mean: a message's and a reasoning's parts, a call's name and text."""
    items: list[tuple[Any, ...]] = []
    for delta in said:
        match delta:
            case TextDelta() | RefusalDelta() | ReasoningDelta():
                kind = "reasoning" if isinstance(delta, ReasoningDelta) else "message"
                part = {TextDelta: "output_text", RefusalDelta: "refusal", ReasoningDelta: "reasoning_text"}[
                    type(delta)
                ]
                parts = items.pop()[1] if items and items[-1][0] == kind else []
                _, text, logprobs = parts.pop() if parts and parts[-1][0] == part else (part, "", [])
                logprobs = [*logprobs, *getattr(delta, "logprobs", [])]
                items.append((kind, [*parts, (part, text + delta.text, logprobs)]))
            case CallStarted():
                items.append((delta.type, delta.call_id, delta.name, delta.namespace, ""))
            case CallDelta():
                *head, text = items.pop()
                items.append((*head, text + delta.text))
            case _:
                pass
    return items


def heard(output: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A response's output in the model's words."""
    return [_heard(item) for item in output]


def _heard(item: dict[str, Any]) -> tuple[Any, ...]:
    if "content" in item:
        return item["type"], [
            (part["type"], part.get("text", part.get("refusal")), part.get("logprobs", [])) for part in item["content"]
        ]
    text = item.get("arguments", item.get("input"))
    return item["type"], item["call_id"], item["name"], item.get("namespace"), text
