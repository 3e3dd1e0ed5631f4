"""An upstream that speaks the Responses API in WebSocket mode: OpenAI, another Openline.

The client's own session is the connection to it: only what is new goes out, a turn whose line was cut is taken up again
where the upstream can do that, everything is sent again where the upstream has lost the conversation, and HTTP is
used where a socket is refused. Nothing is stored there: what is remembered, we remember.

Source: WebSocket mode guide, "Continuation and the connection-local cache"; docs/adr/0016.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from openline.client.errors import ConnectionLost, OpenlineError, Refused
from openline.client.session import Session, connect
from openline.client.settings import ClientSettings
from openline.client.stream import ResponseStream
from openline.client.wire import Event
from openline.config import UpstreamSettings
from openline.engines.engine import EngineRequest, Model
from openline.engines.responses import ResponsesEngine, passed_on
from openline.engines.upstream import Upstream
from openline.engines.upstream_lines import Going, Lines, SaidProjection
from openline.engines.upstream_stream import Allowance
from openline.protocol.deltas import Delta, UpstreamEvent
from openline.protocol.errors import ProtocolError
from openline.protocol.states import TERMINAL_EVENTS

# How long a turn's line may be gone before the turn counts as failed: its client waits, and has a patience of its own.
_RECOVERY_SECONDS_MAX: Final = 30.0
_NO_SECONDS: Final = 0.001
_encoder: Final = msgspec.json.Encoder()
_FAILURES: Final = frozenset({"error", "response.failed"})


class ResponsesSocketEngine:
    """A Responses upstream with WebSocket mode.

    Args:
        settings: where it is.
        show_detail: whether clients may see its own words on errors.

    Raises:
        ConfigError: its `ca_file` cannot be read, or the environment's proxy is no URL.
    """

    def __init__(self, settings: UpstreamSettings, *, show_detail: bool) -> None:
        self.name = settings.label
        self._settings = settings
        self._http = ResponsesEngine(settings, show_detail=show_detail)
        self._client = ClientSettings(
            connect_seconds_max=settings.connect_seconds_max,
            idle_seconds_max=max(settings.first_event_seconds_max, settings.idle_seconds_max),
            recovery_seconds_max=_RECOVERY_SECONDS_MAX,
            # As over HTTP, but for that a session has no way to ask never again.
            refused_tries_max=max(settings.retries_max, 1),
            retry_after_seconds_max=settings.retry_after_seconds_max or _NO_SECONDS,
            ca_file=settings.ca_file,
        )
        self._lines = Lines(
            self._open_session, lines_max=settings.sockets_max, idle_seconds=settings.socket_idle_seconds
        )

    def __repr__(self) -> str:
        return f"<ResponsesSocketEngine {self.name} {self._lines!r}>"

    def prepare(self, request: EngineRequest) -> SocketGeneration:
        """The request; which part of its context is new to the upstream is seen when it is sent."""
        return SocketGeneration(request, self._http.upstream, self._lines, self._settings)

    async def count_tokens(self, request: EngineRequest) -> int:
        """What the upstream counts.

        Raises:
            ProtocolError: it does not count, refused or failed.
        """
        return await self._http.count_tokens(request)

    async def models(self) -> Sequence[Model]:
        """The models it lists.

        Raises:
            ProtocolError: it cannot be asked.
        """
        return await self._http.models()

    async def close(self) -> None:
        """Give back its connections."""
        await self._lines.close()
        await self._http.close()

    def _open_session(self) -> Session:
        settings = self._settings
        return connect(settings.url, api_key=settings.api_key or None, settings=self._client)


class SocketGeneration:
    """One request, as the upstream's events."""

    dropped_tools: Sequence[str] = ()
    prefills = False  # as over HTTP: nothing says that it has a cache to fill

    def __init__(self, request: EngineRequest, upstream: Upstream, lines: Lines, settings: UpstreamSettings) -> None:
        self._request = request
        self._upstream = upstream
        self._lines = lines
        self._settings = settings

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        """Its events, until the terminal one.

        Raises:
            ProtocolError: it cannot be reached, refused, failed, or its turn was lost on the way.
        """
        request = self._request
        said = request.context.project(SaidProjection())
        line, going = self._lines.take(request.owner, said)
        kept, allowance = False, Allowance(self._settings)
        try:
            turn = line.session.create(
                input=[msgspec.Raw(going.new)] if going.new else [],
                model=request.model,
                store=False,
                past=going,
                extra_body=passed_on(request),
            )
            async for event in _events(turn):
                if event["type"] in _FAILURES:
                    raise self._failure(event, going)
                yield [UpstreamEvent(event)]
                if event["type"] in TERMINAL_EVENTS:
                    self._lines.put_back(line, request.owner, said, event["response"])
                    kept = True
                elif (excess := allowance.take(len(_encoder.encode(event)))) is not None:
                    raise excess
        except Refused as refused:
            raise self._refusal(refused, going) from None
        except ConnectionLost as lost:
            code = "upstream_error" if lost.may_have_run else "upstream_unreachable"
            raise self._upstream.loss(code, lost.why, request=going.new) from None
        except OpenlineError as error:
            raise self._upstream.loss("upstream_error", str(error), request=going.new) from None
        finally:
            if not kept:
                self._lines.drop(line)  # which stops what runs there; nobody has to wait for that

    def _failure(self, event: Event, going: Going) -> ProtocolError:
        """Our error for an `error` in mid-turn, and for `response.failed`."""
        response: Event = event.get("response") or {}
        error: object = response.get("error") if response else event.get("error")
        return self._upstream.failure({"error": error or {}}, request=going.new)

    def _refusal(self, refused: Refused, going: Going) -> ProtocolError:
        """Our error for a create that was not taken, read as its answer over HTTP would be."""
        error = {"code": refused.code, "message": refused.message, "param": refused.param}
        headers = {} if refused.retry_after is None else {"retry-after": f"{refused.retry_after:g}"}
        return self._upstream.refusal(refused.status, msgspec.json.encode({"error": error}), headers, request=going.new)


async def _events(turn: ResponseStream) -> AsyncGenerator[Event, None]:
    """A turn's events; unlike its own iterator, one that is left does not wait for the turn's end."""
    with suppress(StopAsyncIteration):
        while True:
            yield await anext(turn)
