"""A model server that speaks Chat Completions: vLLM, SGLang, llama.cpp, Ollama, LM Studio, and most hosted ones."""

from __future__ import annotations

import logging
import secrets
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from openline.config import UpstreamSettings
from openline.engines.chat_calls import BadStreamError
from openline.engines.chat_context import ChatProjection
from openline.engines.chat_deltas import ChatDeltas, ErrorChunkError
from openline.engines.chat_request import ChatRequest, encode_request
from openline.engines.engine import EngineRequest, Model
from openline.engines.upstream import Upstream
from openline.protocol.deltas import Delta
from openline.protocol.errors import ProtocolError

logger = logging.getLogger("openline.chat")


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
        self._projection = ChatProjection(settings.late_system_role)
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<ChatEngine {self._upstream!r}>"

    def prepare(self, request: EngineRequest) -> ChatGeneration:
        """The request as a Chat Completions body.

        Raises:
            ProtocolError: something in it has no form there.
        """
        encoded = encode_request(request, self._projection, self._settings)
        for dropped in encoded.dropped_tools:
            self._warn_once(dropped)
        return ChatGeneration(self._upstream, encoded)

    async def models(self) -> Sequence[Model]:
        """The models it lists.

        Raises:
            ProtocolError: it cannot be asked.
        """
        return await self._upstream.get_models()

    async def close(self) -> None:
        """Give back its connections."""
        await self._upstream.close()

    def _warn_once(self, tool_type: str) -> None:
        # Types come from clients, so what is remembered of them has a bound.
        if tool_type not in self._warned and len(self._warned) < 100:
            self._warned.add(tool_type)
            logger.warning("tools of type %r are dropped: upstream %s cannot do them", tool_type[:64], self.name)


class ChatGeneration:
    """One request, ready to be sent, and its stream."""

    def __init__(self, upstream: Upstream, request: ChatRequest) -> None:
        self._upstream = upstream
        self._names = request.names
        self.body = request.body
        self.dropped_tools = request.dropped_tools
        self.prefills = request.prefills

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        """Its deltas, a batch a read; `Ended` is the last one.

        Raises:
            ProtocolError: the upstream refused, failed, fell silent, or ended before it had finished.
        """
        deltas = ChatDeltas(self._names, _new_call_id)
        events = self._upstream.post_events("/chat/completions", self.body, whole_json=True)
        async with aclosing(events):
            async for batch in events:
                out: list[Delta] = []
                fault = self._feed(deltas, batch, out)
                if out or not batch:
                    yield out
                if fault is not None:
                    raise fault
        last: list[Delta] = []
        try:
            deltas.end(last)
        except BadStreamError as error:
            raise self._unreadable(error) from None
        yield last

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
