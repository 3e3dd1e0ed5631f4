"""One open WebSocket of a session: what it sends, and whose events come over it.

A session takes its turns one after another, so all its creates go on the default lane, and every event is the
running turn's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any, Final

import msgspec

from openline.client.settings import ClientSettings
from openline.client.wire import Event, Line, LineClosed, as_object
from openline.protocol.states import TERMINAL_EVENTS

TURN_ENDS: Final = TERMINAL_EVENTS | {"error"}
_decoder: Final = msgspec.json.Decoder(dict[str, Any])


class Inbox:
    """What came for a turn and was not taken yet; whoever puts more into it waits for room.

    One timer a turn watches over it, and none an event.

    Args:
        bytes_max: of the messages, as they came; one message may be more than that.
        idle_seconds_max: for which nothing may come while nothing is there.
    """

    def __init__(self, bytes_max: int, idle_seconds_max: float) -> None:
        self._bytes_max = bytes_max
        self._idle_seconds_max = idle_seconds_max
        self._events: deque[tuple[Event, int]] = deque()
        self._bytes = 0
        self._why_closed: Exception | None = None
        self._came = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self._loop = asyncio.get_running_loop()
        self._last = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"<Inbox events={len(self._events)} bytes={self._bytes}>"

    def watch(self) -> None:
        """From now on something has to come."""
        self._last = self._loop.time()
        if self._why_closed is None:
            self._timer = self._loop.call_later(self._idle_seconds_max, self._look)

    def put(self, event: Event, size: int) -> None:
        """An event, and how many bytes it was."""
        self._events.append((event, size))
        self._bytes += size
        self._last = self._loop.time()
        self._came.set()
        if self._bytes >= self._bytes_max:
            self._room.clear()

    def close(self, why: Exception) -> None:
        """Nothing more comes."""
        if self._timer is not None:
            self._timer.cancel()
        self._why_closed = why
        self._came.set()
        self._room.set()

    async def has_room(self) -> None:
        """Wait until fewer bytes than the most are in it."""
        await self._room.wait()

    async def take(self) -> Event:
        """The next event.

        Raises:
            LineClosed: the line has ended, and everything before that was taken.
            TimeoutError: nothing came in time.
        """
        while not self._events:
            if self._why_closed is not None:
                raise self._why_closed
            self._came.clear()
            await self._came.wait()
        event, size = self._events.popleft()
        self._bytes -= size
        if self._bytes < self._bytes_max:
            self._room.set()
        return event

    def _look(self) -> None:
        """Whether something came lately, or waits to be taken: then look again when it could be too late."""
        last = self._loop.time() if self._events else self._last
        left = last + self._idle_seconds_max - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        else:
            self.close(TimeoutError())


class Socket:
    """A line, read all the time, so that pings are answered and its end is known before the next create.

    Attributes:
        opened_at: by the loop's clock.
        holds: the response that the connection's memory holds at the other end: the latest, if it can be continued.

    Source: WebSocket mode guide, "Continuation and the connection-local cache".
    """

    def __init__(self, line: Line, settings: ClientSettings) -> None:
        self._line = line
        self._settings = settings
        self._inbox: Inbox | None = None
        self._closed: LineClosed | None = None
        self.opened_at = asyncio.get_running_loop().time()
        self.holds: str | None = None
        self._reading = asyncio.create_task(self._read())

    def __repr__(self) -> str:
        state = "closed" if self._closed else "idle" if self._inbox is None else "in a turn"
        return f"<Socket {state} holds={self.holds}>"

    @property
    def is_open(self) -> bool:
        """Whether a create can be sent."""
        return self._closed is None

    async def exchange(self, frame: str) -> AsyncGenerator[Event, None]:
        """Send a create and give what comes, up to the turn's last event; an iterator that is left before gives up the line.

        Raises:
            NotSent: the line had ended before: nothing of the create has left.
            LineClosed: the line ended in the turn.
            TimeoutError: nothing came for `idle_seconds_max`.
        """
        assert self._inbox is None, "a session takes its turns one after another"
        if self._closed is not None:
            raise NotSent(self._closed)
        inbox = self._inbox = Inbox(self._settings.buffered_bytes_max, self._settings.idle_seconds_max)
        ended = False
        try:
            try:
                await self._line.send(frame)
            except LineClosed as closed:
                raise NotSent(closed) from None
            inbox.watch()
            while not ended:
                event = await inbox.take()
                ended = event["type"] in TURN_ENDS
                if ended:
                    inbox.close(LineClosed(None, "the turn has ended"))
                    self._inbox = None
                yield event
        finally:
            if not ended:
                await self.close()

    async def cancel(self, response_id: str | None) -> None:
        """Ask for the end of the running turn.

        Source: WebSocket mode guide, "Cancelling".
        """
        cancel = {"type": "response.cancel"}
        if response_id is not None:
            cancel["response_id"] = response_id
        await self._line.send(msgspec.json.encode(cancel).decode())

    async def close(self) -> None:
        """Close the line."""
        self._end(LineClosed(1000, "closed by this side"))
        self._reading.cancel()
        await asyncio.wait({self._reading})
        await self._line.close()

    async def _read(self) -> None:
        try:
            while True:
                if self._inbox is not None:
                    await self._inbox.has_room()
                text = await self._line.receive()
                event = _decoder.decode(text)
                if self._inbox is not None and isinstance(event.get("type"), str):
                    self._inbox.put(event, len(text) if text.isascii() else len(text.encode()))
                elif _is_last_word(event):
                    raise LineClosed(None, "the server ends the connection")
        except LineClosed as closed:
            self._end(closed)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            self._end(LineClosed(None, "the server sent a message that is no JSON object"))
        await self._line.close()

    def _end(self, closed: LineClosed) -> None:
        self._closed = self._closed or closed
        if self._inbox is not None:
            self._inbox.close(self._closed)


class NotSent(Exception):  # noqa: N818 - what it is
    """A create that could not be sent, because its line had ended.

    Attributes:
        closed: how it ended.
    """

    def __init__(self, closed: LineClosed) -> None:
        super().__init__(str(closed))
        self.closed = closed


def _is_last_word(event: Event) -> bool:
    """Whether an idle connection is told its end, as it is at its greatest age.

    Source: WebSocket mode guide, "Connection life".
    """
    error = as_object(event.get("error")) or {}
    return event.get("type") == "error" and error.get("code") == "websocket_connection_limit_reached"
