"""A Chat Completions stream as deltas: pure, one function a kind.

Source: Chat Completions reference, "The chat completion chunk object".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from openline.engines.chat_calls import BadStreamError, CallFragment, Calls
from openline.engines.chat_tools import ToolName
from openline.engines.progress import Progress
from openline.protocol.deltas import (
    Delta,
    Ended,
    IncompleteReason,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    Timings,
    Usage,
)
from openline.protocol.sse import DONE_DATA


class ErrorChunkError(Exception):
    """The upstream sent an error inside its stream.

    Attributes:
        data: the chunk, as JSON.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__("The upstream sent an error inside its stream.")
        self.data = data


class _TokenLogprob(msgspec.Struct):
    token: str
    logprob: float | None = None
    bytes: list[int] | None = None
    top_logprobs: list[_TokenLogprob] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_TokenLogprob] | None = None


class _Said(msgspec.Struct):
    """`delta` of a chunk, or `message` of a whole completion."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[CallFragment] | None = None


class _Choice(msgspec.Struct):
    index: int | None = 0
    delta: _Said | None = None
    message: _Said | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None
    cache_write_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    timings: Any = None  # llama.cpp's; another server may mean something else by it
    error: Any = None
    object: str | None = None


_chunk: Final = msgspec.json.Decoder(_Chunk)

# Why a model stopped before it had finished. Everything else is an end like any other.
_REASONS: Final[Mapping[str, IncompleteReason]] = {
    "length": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "model_length": "max_output_tokens",
    "content_filter": "content_filter",
}
_BROKEN_OFF: Final = frozenset({"error", "abort"})  # OpenRouter's and vLLM's words for a generation that failed


class ChatDeltas:
    """Turns the chunks of one stream into deltas.

    Call `feed` with each event's data, then `end` once. `Ended` comes last, behind the usage
    that upstreams send after their `finish_reason`.

    Args:
        names: what the client calls the tools, by the names that the upstream got.
        new_call_id: makes an id for a call that came without one.
    """

    def __init__(self, names: Mapping[str, ToolName], new_call_id: Callable[[], str]) -> None:
        self._calls = Calls(names, new_call_id)
        self._held: list[Delta] = []  # text that came while a call was open
        self._finish_reason: str | None = None
        self._done = False
        self._spoken = False

    def __repr__(self) -> str:
        return f"<ChatDeltas {self._calls!r} held={len(self._held)} finish_reason={self._finish_reason}>"

    @property
    def progress(self) -> Progress:
        """Behind `finish_reason` only the usage follows, and of some servers not even `[DONE]`."""
        if self._done:
            return Progress.OVER
        return Progress.OPEN if self._finish_reason is None else Progress.WHOLE

    def feed(self, data: bytes, out: list[Delta]) -> None:
        """Take one event; its deltas are appended to `out`.

        Raises:
            ErrorChunkError: it is an error.
            BadStreamError: it is not a chunk.
        """
        if self._done:
            return  # what follows `[DONE]` belongs to nothing
        if data == DONE_DATA:
            self._done = True
            return
        try:
            chunk = _chunk.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise BadStreamError(f"sent a chunk that cannot be read: {error}") from None
        if chunk.error is not None or chunk.object == "error":
            raise ErrorChunkError(data)
        for choice in chunk.choices or ():
            if not choice.index:  # one answer is asked for; more would have nowhere to go
                self._choice(choice, out)
        if chunk.usage is not None:
            out.append(_usage(chunk.usage, chunk.timings))

    def end(self, out: list[Delta]) -> None:
        """The stream is over: what was held back goes out, then how it ended.

        Raises:
            BadStreamError: it was not finished.
        """
        reason = self._finish_reason
        if reason in _BROKEN_OFF:
            raise BadStreamError(f"broke the generation off: finish_reason is '{reason}'")
        # A few servers forget `finish_reason`; then `[DONE]` behind an answer has to do.
        if reason is None and not (self._done and (self._spoken or self._calls.seen)):
            raise BadStreamError("ended its stream before the answer was finished")
        incomplete = _REASONS.get(reason) if reason is not None else None
        self._calls.release(out, cut=incomplete is not None)
        out.extend(self._held)
        self._held.clear()
        out.append(Ended(incomplete))

    def _choice(self, choice: _Choice, out: list[Delta]) -> None:
        said = choice.delta or choice.message
        if said is not None:
            # Some servers send the reasoning under both names; it is the same text.
            reasoning = said.reasoning_content or said.reasoning
            if reasoning:
                self._say(ReasoningDelta(reasoning), out)
            if said.content:
                logprobs = choice.logprobs
                self._say(TextDelta(said.content) if logprobs is None else _text(said.content, logprobs), out)
            if said.refusal:
                self._say(RefusalDelta(said.refusal), out)
            if said.tool_calls:
                self._calls.add(said.tool_calls, out, whole=said is choice.message)
        if choice.finish_reason:
            self._finish_reason = choice.finish_reason

    def _say(self, delta: Delta, out: list[Delta]) -> None:
        """Text goes out at once, but never into a call that is not complete yet."""
        self._spoken = True
        if self._calls.seen and (self._held or not self._calls.settle(out)):
            self._held.append(delta)
        else:
            out.append(delta)


def _text(content: str, logprobs: _Logprobs) -> TextDelta:
    return TextDelta(content, [_logprob(token) for token in logprobs.content or ()])


def _logprob(token: _TokenLogprob) -> dict[str, Any]:
    """A token's logprob in the Responses form.

    Source: Streaming reference, "response.output_text.delta", `logprobs`.
    """
    top = [_top_logprob(other) for other in token.top_logprobs or ()]
    return {**_top_logprob(token), "top_logprobs": top}


def _top_logprob(token: _TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "bytes": token.bytes or [], "logprob": token.logprob or 0.0}


def _usage(usage: _Usage, timings: Any) -> Usage:
    prompt = usage.prompt_tokens_details or _PromptDetails()
    completion = usage.completion_tokens_details or _CompletionDetails()
    return Usage(
        input_tokens=usage.prompt_tokens or 0,
        cached_tokens=prompt.cached_tokens or 0,
        cache_write_tokens=prompt.cache_write_tokens or 0,
        output_tokens=usage.completion_tokens or 0,
        reasoning_tokens=completion.reasoning_tokens or 0,
        timings=_timings(timings),
    )


def _timings(timings: Any) -> Timings | None:
    """What llama.cpp tells of its own time.

    Source: llama.cpp, tools/server/README.md, "timings".
    """
    try:
        return msgspec.convert(timings, Timings)
    except msgspec.ValidationError:
        return None
