"""Whether an upstream that cuts silently has read all it was sent.

Ollama drops what does not fit its context window and answers from the rest, with 200 and a
`prompt_tokens` of what is left. An agent whose instructions were cut away acts on nothing it
was told, so the turn fails as `context_length_exceeded` where the cut is certain. LM Studio answers
nothing at all, with 200 too.

Source: openai/codex#2293; ollama/ollama#17889; lmstudio-ai/lmstudio-bug-tracker#2339.
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

from openline.protocol.errors import ProtocolError

# Prose has four to five characters a token with the largest vocabularies, code and other scripts have
# fewer. Only runs of one character have more, and these count as one.
CHARS_PER_TOKEN_MAX: Final = 6
_RUN: Final = re.compile(r"(.)\1{3,}", re.DOTALL)


class _Function(msgspec.Struct, frozen=True):
    arguments: str = ""


class _Call(msgspec.Struct):
    function: _Function = _Function()


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    content: str | list[_Part] | None = None
    tool_calls: list[_Call] = []


class _Body(msgspec.Struct):
    messages: list[_Message] = []


_body: Final = msgspec.json.Decoder(_Body)


class Window(msgspec.Struct, frozen=True):
    """A context window that is not enforced by an error.

    Attributes:
        tokens: its size; None if it is not known.
        larger: how the upstream gets a larger one.
        is_cut_to: the rest is cut away, and `prompt_tokens` are of what was left.
    """

    tokens: int | None
    larger: str
    is_cut_to: bool

    def overflow(self, body: bytes, label: str) -> ProtocolError | None:
        """The error for a request that cannot fit, before it is sent."""
        if self.tokens is None or not exceeds(body, self.tokens):
            return None
        message = f"Upstream '{label}' has a context window of {self.tokens} tokens, and this conversation is longer."
        return self._error(message)

    def cut(self, body: bytes, tokens_read: int, label: str) -> ProtocolError | None:
        """The error for a request of which the upstream counts fewer tokens than it can have had."""
        if not self.is_cut_to or not tokens_read or not exceeds(body, tokens_read):
            return None
        size = f" (its context window is {self.tokens} tokens)" if self.tokens else ""
        message = f"Upstream '{label}' read the last {tokens_read} tokens of the conversation only{size}."
        return self._error(message)

    def silenced(self, tokens_read: int, label: str) -> ProtocolError | None:
        """The error for an answer of nothing, where no room for one was left."""
        if not self.is_nearly_full(tokens_read):
            return None
        message = (
            f"Upstream '{label}' answered nothing to {tokens_read} tokens; its context window is {self.tokens} tokens."
        )
        return self._error(message)

    def is_nearly_full(self, tokens_read: int) -> bool:
        """Whether the next turn may be cut without a sign."""
        return self.tokens is not None and tokens_read * 10 >= self.tokens * 9

    def _error(self, message: str) -> ProtocolError:
        remedy = f"Give it a larger one, by {self.larger}. Or shorten or compact the conversation."
        return ProtocolError("context_length_exceeded", f"{message} {remedy}", param="input")


def exceeds(body: bytes, tokens: int) -> bool:
    """Whether a request's texts are certainly more than so many tokens.

    Tools and reasoning do not count: not every template shows them to the model.
    """
    chars_max = tokens * CHARS_PER_TOKEN_MAX
    if len(body) <= chars_max:  # nearly always; a character is a byte or more
        return False
    texts = [text for message in _body.decode(body).messages for text in _texts(message)]
    if sum(map(len, texts)) <= chars_max:
        return False
    return sum(len(_RUN.sub(r"\1", text)) for text in texts) > chars_max


def _texts(message: _Message) -> list[str]:
    content = message.content or ""
    texts = [content] if isinstance(content, str) else [part.text for part in content]
    return [*texts, *(call.function.arguments for call in message.tool_calls)]
