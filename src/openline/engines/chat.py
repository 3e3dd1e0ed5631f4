"""A model server that speaks Chat Completions: vLLM, SGLang, llama.cpp, Ollama, LM Studio, and most hosted ones."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Final

from openline.config import UpstreamSettings
from openline.engines.about import About, Inquiry
from openline.engines.chat_calls import BadStreamError
from openline.engines.chat_deltas import ChatDeltas, ErrorChunkError
from openline.engines.chat_request import ChatRequest, encode_request
from openline.engines.chat_tools import HOSTED
from openline.engines.chat_window import Window
from openline.engines.counting import count_chat
from openline.engines.engine import EngineRequest, Model
from openline.engines.profiles import overrides, profile_of
from openline.engines.upstream import Upstream
from openline.protocol.deltas import Delta, Usage
from openline.protocol.errors import ProtocolError

logger = logging.getLogger("openline.chat")

_NAME_CHARS_MAX: Final = 512  # of a model's name as it is remembered; it comes from a client


class ChatEngine:
    """A Chat Completions upstream.

    Args:
        settings: where it is, and its dialect.
        show_detail: whether clients may see its own words on errors.

    Raises:
        ConfigError: its `ca_file` cannot be read.
    """

    def __init__(self, settings: UpstreamSettings, *, show_detail: bool) -> None:
        self.name = settings.label
        self._settings = settings
        self._upstream = Upstream(settings, show_detail=show_detail)
        self._inquiry = Inquiry(self._upstream, settings)
        self._overrides = overrides(settings)
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<ChatEngine {self._upstream!r}>"

    def prepare(self, request: EngineRequest) -> ChatGeneration:
        """The request as a Chat Completions body.

        Raises:
            ProtocolError: something in it has no form there.
        """
        about = self._inquiry.about
        model = about.model(request.model)
        profile = profile_of(about.kind, f"{model.id} {model.known_as}"[:_NAME_CHARS_MAX], self._overrides)
        encoded = encode_request(request, profile, prefills=self._settings.prefills)
        for dropped in encoded.dropped_tools:
            self._warn_once(dropped)
        window = None
        if profile.larger_window:
            window = Window(model.context_window, profile.larger_window, profile.counts_what_it_read)
        return ChatGeneration(self._upstream, encoded, window, None if self._settings.profile else self._inquiry)

    async def count_tokens(self, request: EngineRequest) -> int:
        """What the upstream counts, of what a turn would send.

        Raises:
            ProtocolError: something has no form there, or it does not count, refused or failed.
        """
        kind = self._settings.profile or self._inquiry.about.kind
        if kind == "generic" and self._settings.profile is None:  # perhaps it was not asked yet
            kind = (await self._inquiry.ask()).kind
        return await count_chat(self._upstream, kind, self.prepare(request).body)

    async def models(self) -> Sequence[Model]:
        """The models it lists.

        Raises:
            ProtocolError: it cannot be asked.
        """
        return list((await self._inquiry.ask()).models.values())

    async def about(self) -> About:
        """What it tells of itself.

        Raises:
            ProtocolError: it cannot be asked.
        """
        return await self._inquiry.ask()

    async def close(self) -> None:
        """Give back its connections."""
        await self._inquiry.close()
        await self._upstream.close()

    def _warn_once(self, tool_type: str) -> None:
        named = tool_type if tool_type in HOSTED else "unknown"
        if named not in self._warned:
            self._warned.add(named)
            logger.warning("tools of type %s are dropped: upstream %s cannot do them", named, self.name)


class ChatGeneration:
    """One request, ready to be sent, and its stream.

    Args:
        window: the context window, if the upstream cuts to it.
        inquiry: what to ask the upstream by, when the request is sent; None if there is nothing to ask.
    """

    def __init__(
        self, upstream: Upstream, request: ChatRequest, window: Window | None, inquiry: Inquiry | None
    ) -> None:
        self._inquiry = inquiry
        self._upstream = upstream
        self._window = window
        self._tokens_read = 0
        self._said = False
        self._names = request.names
        self.body = request.body
        self.dropped_tools = request.dropped_tools
        self.prefills = request.prefills

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        """Its deltas, a batch a read; `Ended` is the last one.

        Raises:
            ProtocolError: the upstream refused, failed, fell silent, or ended before it had finished.
        """
        if self._window is not None and (overflow := self._window.overflow(self.body, self._upstream.label)):
            raise overflow
        if self._inquiry is not None:
            self._inquiry.begin()
        deltas = ChatDeltas(self._names, _new_call_id)
        events = self._upstream.post_events("/chat/completions", self.body, lambda: deltas.progress, whole_json=True)
        async with aclosing(events):
            async for batch in events:
                out: list[Delta] = []
                fault = self._feed(deltas, batch, out)
                if self._window is not None:
                    self._note(out)
                if out or not batch:
                    yield out
                if fault is not None:
                    raise fault
        last: list[Delta] = []
        try:
            deltas.end(last)
        except BadStreamError as error:
            raise self._unreadable(error) from None
        self._require_uncut()
        yield last

    def _note(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            if isinstance(delta, Usage):
                self._tokens_read = delta.input_tokens
            else:
                self._said = True

    def _require_uncut(self) -> None:
        if self._window is None:
            return
        tokens_read, label = self._tokens_read, self._upstream.label
        cut = self._window.cut(self.body, tokens_read, label)
        if cut is None and not self._said:
            cut = self._window.silenced(tokens_read, label)
        if cut is not None:
            logger.warning("%s", cut.message)
            raise cut
        if self._window.is_nearly_full(tokens_read):
            message = (
                "upstream %s read %d tokens, nearly its whole context window of %s: it cuts silently what comes above"
            )
            logger.warning(message, label, tokens_read, self._window.tokens)

    def _feed(self, deltas: ChatDeltas, batch: Sequence[bytes], out: list[Delta]) -> ProtocolError | None:
        """Map a batch; what came before a fault in it still goes out."""
        try:
            for data in batch:
                deltas.feed(data, out)
        except ErrorChunkError as error:
            return self._upstream.failure(error.data, request=self.body)
        except BadStreamError as error:
            return self._unreadable(error)
        return None

    def _unreadable(self, error: BadStreamError) -> ProtocolError:
        logger.warning("upstream %s %s", self._upstream.label, error)
        return ProtocolError("upstream_error", f"Upstream '{self._upstream.label}' {error}.")


def _new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"
