"""One turn as its app sees it: every event once and in order, whatever happens to the wire."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from types import TracebackType
from typing import Final, Self

from openline.client.errors import ConnectionLost, OpenlineError, Refused, TurnFailed
from openline.client.settings import ClientSettings
from openline.client.turn import Turn
from openline.client.wire import Event, Response

_ENDED_WELL: Final = frozenset({"completed", "incomplete"})
_EVENTS_AHEAD_MAX: Final = 16  # what its task hands over in one go; what else came waits as bytes, at the line


class Ahead:
    """Between the turn's task and who reads it: whoever stops waiting for the next event has lost none."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._is_unwanted = False
        self.has_ended = False

    def __len__(self) -> int:
        return len(self._events)

    async def put(self, event: Event) -> None:
        """Hand over an event, as soon as few enough wait."""
        await self._room.wait()
        if not self._is_unwanted:
            self._events.append(event)
            self._changed.set()
            if len(self._events) >= _EVENTS_AHEAD_MAX:
                self._room.clear()

    def end(self, last: Event | None) -> None:
        """Nothing more comes, but perhaps the last event."""
        if last is not None and not self._is_unwanted:
            self._events.append(last)
        self.has_ended = True
        self._changed.set()

    async def take(self) -> Event | None:
        """The next event; None after the last."""
        while not self._events:
            if self.has_ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        self._room.set()
        return self._events.popleft()

    def clear(self) -> None:
        """What waits is void."""
        self._events.clear()
        self._room.set()

    def unwanted(self) -> None:
        """Nobody takes anything any more."""
        self._is_unwanted = True
        self.clear()


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
        self.is_leaving = False
        self._turn = turn
        self._settings = settings
        self._begin = begin
        self._end = end
        self._ahead = Ahead()
        self._task: asyncio.Task[None] | None = None
        self._is_reading = False
        self._is_detached = False
        self._error: Exception | None = None
        self._ended = asyncio.Event()
        turn.on_restart = self._restart

    def __repr__(self) -> str:
        state = "ended" if self.is_ended else "new" if self._task is None else "running"
        return f"<ResponseStream {state} key={self.idempotency_key} {self._turn!r}>"

    @property
    def response_id(self) -> str | None:
        """The response's id; None before its first event."""
        return self._turn.reading.response_id

    @property
    def is_ended(self) -> bool:
        """Whether nothing more comes: the last event was taken, or there is none."""
        return self._ended.is_set() and not self._ahead

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
        if not self._leaves():
            return
        try:
            async with asyncio.timeout(self._settings.cancel_seconds_max):
                await self._turn.cancel()
                await self._ended.wait()
        except TimeoutError:
            await self._give_up(detached=False)

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
            await self._give_up(detached=True)

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
        if self._task is None and not self._ended.is_set():
            await self._begin(self)
            self._task = asyncio.create_task(self._run())
        if self._is_reading:
            raise OpenlineError("the stream is read in two places at once: one of them has to do.")
        self._is_reading = True
        try:
            event = await self._ahead.take()
        finally:
            self._is_reading = False
        if event is None and self._error is not None and shown and not self.is_leaving:
            raise self._error
        if event is not None and shown:
            self._turn.was_shown = True
        return event

    async def _run(self) -> None:
        """Read the turn, in a task of its own: no wait of the app's that is cut short cuts the turn."""
        last: Event | None = None
        try:
            async with aclosing(self._turn.events()) as events:
                async for event in events:
                    if self._turn.reading.final is not None:
                        last = event
                        break
                    await self._ahead.put(event)
        except Exception as error:  # noqa: BLE001 - whoever reads the stream gets it
            self._error = error
        except asyncio.CancelledError:
            self._error = ConnectionLost("the event loop ends.", idempotency_key=self.idempotency_key)
            raise
        finally:
            self._finish()
            self._ahead.end(last)  # whoever has the last event may begin another turn

    def _restart(self) -> None:
        """What was seen is void; what of it nobody has read, nobody shall read."""
        if not self._turn.was_shown:
            self._ahead.clear()

    def _leaves(self) -> bool:
        """Note that the stream is left; whether there is anything to leave."""
        if self._task is None and not self._ended.is_set():  # nothing was sent
            self._finish()
            self._ahead.end(None)
        self.is_leaving = True
        if not self._is_reading:
            self._ahead.unwanted()
        return not self._ended.is_set()

    async def _give_up(self, *, detached: bool) -> None:
        self._ahead.unwanted()
        await self._turn.leave(detached=detached)
        await self._ended.wait()

    def _finish(self) -> None:
        final = self._turn.reading.final
        if final is None and self._error is None:
            self._error = Refused(0, "request_cancelled", "The turn was cancelled before its response began.")
        self._ended.set()
        self._end(self, final if final is not None and final.get("status") in _ENDED_WELL else None)
