"""One turn as its app sees it: every event once and in order, whatever happens to the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from types import TracebackType
from typing import Final, Self

from openline.client.errors import ConnectionLost, OpenlineError, Refused, TurnFailed
from openline.client.settings import ClientSettings
from openline.client.turn import Turn
from openline.client.wire import Event, Response

_ENDED_WELL: Final = frozenset({"completed", "incomplete"})


class ResponseStream:
    """The events of one turn; nothing is sent before the first is asked for.

    Events are dicts in the wire's own shape, so the OpenAI SDK's types take them
    (`TypeAdapter(ResponseStreamEvent).validate_python(event)`). Leaving the `async for` loop, or the `async with` block, before
    the last event cancels the turn, unless `detach` was called.

    Attributes:
        idempotency_key: the turn's, known before anything is sent.
        is_leaving: whether it was left, or cancelled.
    """

    def __init__(
        self,
        turn: Turn,
        *,
        idempotency_key: str,
        settings: ClientSettings,
        begin: Callable[[ResponseStream], Awaitable[None]],
        end: Callable[[ResponseStream, Response | None], None],
    ) -> None:
        self.idempotency_key = idempotency_key
        self._turn = turn
        self._settings = settings
        self._begin = begin
        self._end = end
        self._events: AsyncGenerator[Event, None] | None = None
        self._is_new = True
        self._is_pulling = False
        self._pulled = asyncio.Event()  # set by the end of each read
        self._is_detached = False
        self.is_leaving = False
        self._error: OpenlineError | None = None
        self._ended = asyncio.Event()

    def __repr__(self) -> str:
        state = "ended" if self.is_ended else "new" if self._is_new else "running"
        return f"<ResponseStream {state} key={self.idempotency_key} {self._turn!r}>"

    @property
    def response_id(self) -> str | None:
        """The response's id; None before its first event."""
        return self._turn.reading.response_id

    @property
    def is_ended(self) -> bool:
        """Whether the last event has come, or no more will."""
        return self._ended.is_set()

    @property
    def restarts(self) -> int:
        """How often a second generation has begun, with another `response.created`; only with `on_lost="restart"`."""
        return self._turn.restarts

    async def __aiter__(self) -> AsyncGenerator[Event, None]:
        """Every event, once and in order.

        Raises:
            Refused: the server did not take the create.
            ConnectionLost: the turn cannot be gone on with.
        """
        try:
            while (event := await self._next(shown=True)) is not None:
                yield event
        finally:
            await self.aclose()

    async def __anext__(self) -> Event:
        """The next event; raises as `__aiter__`."""
        event = await self._next(shown=True)
        if event is None:
            raise StopAsyncIteration
        return event

    async def response(self) -> Response:
        """The response, folded from its events; what of them was not iterated over is waited for.

        Returns:
            The response as it ended: `status` is `completed`, or `incomplete` with a reason in `incomplete_details`
            (`max_output_tokens`, `content_filter`, `cancelled`).

        Raises:
            Refused: the server did not take the create.
            TurnFailed: it ended in `response.failed`.
            ConnectionLost: its end is not known.
        """
        try:
            with suppress(ConnectionLost):  # the events may be lost, and the end known all the same
                while await self._next(shown=False) is not None:
                    pass
        except asyncio.CancelledError:
            await self.aclose()
            raise
        final = self._turn.reading.final
        if final is None:
            assert self._error is not None, "a turn ends with its response, or with an error"
            raise self._error
        if final.get("status") == "failed":
            raise TurnFailed(final)
        return final

    async def cancel(self) -> None:
        """End the turn, and wait for its end: what was generated so far stays in the conversation.

        A server with our extensions ends it in `response.incomplete`, reason `cancelled`; with others the connection is
        closed, as they know no other way, and `response` gives what had come, marked in the same way. Does nothing to a turn
        that has ended.

        Source: WebSocket mode guide, "Cancelling".
        """
        if self._leaves():
            try:
                async with asyncio.timeout(self._settings.cancel_seconds_max):
                    await self._turn.cancel()
                    await self._drain()
            except TimeoutError:
                await self._turn.leave(detached=False)
        await self._drain()

    def detach(self) -> None:
        """Let the turn run on when this stream is left: a server with our extensions holds it for `resume.seconds`.

        Whoever has the idempotency key can take it up again: `session.create(…, idempotency_key=key, resume=True)`.
        """
        self._is_detached = True

    async def aclose(self) -> None:
        """Leave the stream: cancel the turn if it still runs, or only stop reading it if it is detached."""
        if not self._is_detached:
            await self.cancel()
        elif self._leaves():
            await self._turn.leave(detached=True)
            await self._drain()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _next(self, *, shown: bool) -> Event | None:
        """The next event; None after the last.

        Args:
            shown: the app sees it.
        """
        if self._is_pulling and self.is_leaving:
            await self._ended.wait()  # whoever leaves it reads it to its end
        if self.is_ended:
            if self._error is not None and shown and not self.is_leaving:
                raise self._error
            return None
        if self._is_pulling:
            raise OpenlineError("the stream is read in two places at once: one of them has to do.")
        self._is_pulling = True
        try:
            event = await self._pull()
        except OpenlineError as error:
            if not self._is_new:
                self._finish(error)
            raise
        finally:
            self._is_pulling = False
            self._pulled.set()
        if event is not None and shown:
            self._turn.was_shown = True
        if event is None or self._turn.reading.final is not None:
            self._finish(None)
        return event

    async def _pull(self) -> Event | None:
        if self._is_new:
            await self._begin(self)
            self._is_new = False
        if self._events is None:
            self._events = self._turn.events()
        try:
            event = await anext(self._events, None)
            if self._turn.reading.final is not None:
                await self._events.aclose()  # whoever stops at the last event has left nothing
            return event
        except BaseException:
            self._events = None  # a generator ends so; where reading was interrupted another one goes on from there
            raise

    def _leaves(self) -> bool:
        """Note that the stream is left, unless there is nothing to leave."""
        if self._is_new and not self.is_ended:
            self._finish(None)  # nothing was sent
        self.is_leaving = True
        return not self.is_ended

    async def _drain(self) -> None:
        """Read up to the end; somebody else who is at it may go on."""
        with suppress(OpenlineError):
            while not self.is_ended:
                if self._is_pulling:
                    self._pulled.clear()
                    await self._pulled.wait()
                else:
                    await self._next(shown=False)

    def _finish(self, error: OpenlineError | None) -> None:
        final = self._turn.reading.final
        if final is None and error is None:
            error = Refused(0, "request_cancelled", "The turn was cancelled before its response began.")
        self._error = error
        self._ended.set()
        self._end(self, final if final is not None and final.get("status") in _ENDED_WELL else None)
