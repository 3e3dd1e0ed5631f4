"""The turn log: the ordered, encoded events of one response, and its readers.

One task writes it. Everything that looks at the turn reads it through a cursor of its
own. Only the reader that delivers to the client may hold the writer up, and only by
the bytes of its window; any other reader that falls behind what is kept is cut off.
A client that comes back with a new connection takes the place of the one that delivers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

from openline.protocol.errors import ProtocolError

# How far an observer may be behind the client before it is cut off. One that is not slow at all is behind by
# what was written last, as the client may have woken first.
LAG_BYTES_MAX: Final = 1024 * 1024
_BEHIND_EVERY_EVENT: Final = 2**62


class ReaderLagged(Exception):  # noqa: N818 - a state, told to one reader
    """The log was trimmed past this reader's cursor."""


class Window:
    """How many bytes may wait for one client, over all turns of its connection.

    Args:
        bytes_max: above it the writers of the connection's turns wait.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._waiting: list[asyncio.Future[None]] = []
        self.bytes = 0

    def __repr__(self) -> str:
        return f"<Window {self.bytes} of {self._bytes_max} bytes>"

    def add(self, count: int) -> None:
        """This many bytes wait more, or fewer if negative."""
        self.bytes += count
        if self._waiting and self.is_open:
            for waiting in self._waiting:
                _wake(waiting)
            self._waiting.clear()

    @property
    def is_open(self) -> bool:
        """Whether a writer may go on."""
        return self.bytes < self._bytes_max

    def opening(self) -> asyncio.Future[None]:
        """Done once a writer may go on; only while it may not."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        return waiting

    async def opened(self) -> None:
        """Wait until a writer may go on."""
        if not self.is_open:
            await self.opening()


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


class TurnLog:
    """The events of one turn, encoded once, without `stream_id`.

    It ends in exactly one way: `append(…, last=True)` with the terminal event, or
    `refuse` before any event.

    Args:
        window: the delivering reader's; None if nobody waits for bytes.
        on_abandoned: called when the last reader has left before the end.
        kept_bytes_max: how much stays for those who come later, whatever the readers are at; 0 is nothing.
    """

    def __init__(
        self,
        window: Window | None = None,
        on_abandoned: Callable[[], object] | None = None,
        kept_bytes_max: int = 0,
    ) -> None:
        self._events: list[bytes] = []
        self._first = 0  # the number of the first event that is kept
        self._delivered = 0  # how many the client's transport has taken
        self._left = False  # whether the delivering reader has come and gone
        self._window = window
        self._on_abandoned = on_abandoned
        self._kept_bytes_max = kept_bytes_max
        self.is_kept = kept_bytes_max > 0  # so that it can be read again
        self.kept_bytes = 0  # counted only where some are to be kept
        self._readers: dict[LogReader, None] = {}  # in the order of their coming, so that a run can be repeated
        self._delivering: LogReader | None = None
        self._held_up: asyncio.Future[None] | None = None  # the writer, by the window
        self.closing = False  # the response is being kept: too late to cancel
        self.ended = False
        self.refusal: ProtocolError | None = None
        self.response: dict[str, Any] | None = None
        self.dropped_tools: Sequence[str] = ()  # tool types that the upstream cannot do

    def __repr__(self) -> str:
        kept = f"{self._first}..{self._first + len(self._events)}"
        return f"<TurnLog events={kept} readers={len(self._readers)}{' ended' if self.ended else ''}>"

    def __len__(self) -> int:
        return self._first + len(self._events)

    def append(self, events: Sequence[bytes], *, last: dict[str, Any] | None = None) -> None:
        """Write events; readers see them at once.

        Args:
            events: encoded, in order.
            last: the final response, when the terminal event is among them.
        """
        if self._kept_bytes_max:
            self._trim_to_limit()  # before these come, so that who keeps up can read them, however large they are
            self.kept_bytes += sum(map(len, events))
        self._events.extend(events)
        if self._left:
            self._trim(len(self))  # nobody holds the writer up any more, so observers keep up or are cut off
        if self._window is not None:
            seen = self._delivered - self._first - len(self._events) + len(events)  # of these, before they came
            self._window.add(sum(map(len, events[seen:] if seen > 0 else events)))
        if last is not None:
            self.response = last
            self.ended = True
        self._wake()

    def end_without_events(self, response: dict[str, Any]) -> None:
        """There is the response, and none of its events can be read any more."""
        self._first = _BEHIND_EVERY_EVENT
        self.response = response
        self.ended = True
        self._wake()

    def refuse(self, error: ProtocolError) -> None:
        """The turn never became a response: the error is all that its readers get."""
        self.refusal = error
        self.ended = True
        self._wake()

    @property
    def is_writable(self) -> bool:
        """Whether the delivering reader is less than its whole window behind."""
        return self._window is None or self._window.is_open

    async def writable(self) -> None:
        """Wait while the delivering reader is its whole window behind."""
        window = self._window
        while window is not None and not window.is_open:
            self._held_up = window.opening()
            await self._held_up
            if window is self._window:
                return  # whoever waited goes on once, whatever the others have written since: none is left behind
            window = self._window

    def deliver(self, after: int | None = None) -> LogReader:
        """The reader that delivers to the client: it holds the writer up, and the log is trimmed behind it.

        Args:
            after: as of `observe`.
        """
        reader = self._delivering = LogReader(self, delivering=True, start=None if after is None else after + 1)
        self._delivered = reader.cursor
        return reader

    def take_over(self, window: Window, after: int | None = None) -> LogReader:
        """The reader that delivers from now on; the one that did so becomes an observer, if it is still there.

        A client comes back on a new connection because the old one is dead, or half dead: nobody is to wait for that.

        Args:
            window: the new one's.
            after: as of `observe`.
        """
        self._give_window_back()
        if self._delivering is not None:
            self._delivering.delivering = False
        reader = self.deliver(after)
        self._left, self._window = False, window
        window.add(self._undelivered())
        return reader

    def observe(self, after: int | None = None) -> LogReader:
        """A reader that is cut off if it falls behind what is kept.

        Args:
            after: the number of the last event that is not wanted; None begins with the first that is kept.
        """
        return LogReader(self, delivering=False, start=None if after is None else after + 1)

    @property
    def first(self) -> int:
        """The number of the first event that is kept."""
        return self._first

    @property
    def is_whole(self) -> bool:
        """Whether every event is still kept."""
        return self._first == 0

    def reaches(self, number: int) -> bool:
        """Whether that event and all behind it are still kept."""
        return number >= self._first

    def events(self) -> Sequence[bytes]:
        """All that is kept."""
        return self._events

    # What readers do to the log.

    def attach(self, reader: LogReader) -> int:
        """A reader has come; its cursor."""
        self._readers[reader] = None
        return self._first

    def detach(self, reader: LogReader) -> None:
        """A reader has gone; the last one to leave a running turn abandons it."""
        if reader not in self._readers:
            return
        del self._readers[reader]
        if reader.delivering:
            self._left = True
            self._delivering = None
            self._give_window_back()
        if not self._readers and not self.ended and self._on_abandoned is not None:
            self._on_abandoned()

    def _give_window_back(self) -> None:
        if self._window is not None:
            self._window.add(-self._undelivered())
            self._window = None
            _wake(self._held_up)  # other turns may keep that window shut

    def after(self, cursor: int) -> list[bytes]:
        """The events from `cursor` on, as far as they have come.

        Raises:
            ReaderLagged: some of them have been trimmed.
        """
        if cursor < self._first:
            msg = f"Events {cursor} to {self._first - 1} are no longer kept."
            raise ReaderLagged(msg)
        return self._events[cursor - self._first :]

    def delivered(self, cursor: int) -> None:
        """The client's transport has taken everything before `cursor`."""
        if self._window is not None:
            self._window.add(-self._bytes(self._delivered, cursor))
        self._delivered = cursor
        self._trim(cursor)

    def _trim(self, cursor: int) -> None:
        """Let go of what is before `cursor`, as far as no observer still wants it."""
        if self._kept_bytes_max:
            return
        keep = cursor
        if len(self._readers) > 1 or self._left:
            keep = max(self._first, min((reader.cursor for reader in self._readers), default=cursor))
            lag = self._bytes(keep, cursor)
            while lag > LAG_BYTES_MAX:  # whoever has not read this one is cut off
                lag -= len(self._events[keep - self._first])
                keep += 1
        del self._events[: keep - self._first]
        self._first = keep

    def _trim_to_limit(self) -> None:
        """Let go of the oldest events while there are too many bytes; who has not read them is told so.

        Who holds the writer up has them at the most by its window, and they stay.
        """
        count = 0
        most = len(self._events) if self._window is None else self._delivered - self._first
        while self.kept_bytes > self._kept_bytes_max and count < most:
            self.kept_bytes -= len(self._events[count])
            count += 1
        del self._events[:count]
        self._first += count

    def _bytes(self, start: int, end: int) -> int:
        """Of the events between these two numbers, which are kept."""
        return sum(map(len, self._events[start - self._first : end - self._first]))

    def _undelivered(self) -> int:
        """The bytes that wait for the client, as far as they are kept."""
        return sum(map(len, self._events[max(0, self._delivered - self._first) :]))

    def _wake(self) -> None:
        for reader in self._readers:
            reader.wake()


class LogReader:
    """One reader's cursor. It must leave, however its reading ends; as a context manager it does."""

    __slots__ = ("_log", "_news", "cursor", "delivering")

    def __init__(self, log: TurnLog, *, delivering: bool, start: int | None = None) -> None:
        self._log = log
        self._news: asyncio.Future[None] | None = None
        self.delivering = delivering
        first = log.attach(self)
        self.cursor = first if start is None else start

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Stop reading; doing it again is harmless."""
        self._log.detach(self)

    async def read(self) -> list[bytes]:
        """The next events, all that are there; empty once the turn has ended.

        Calling it again says that the events before were taken by the transport.

        Raises:
            ProtocolError: the turn was refused before it became a response.
            ReaderLagged: this reader was too slow for what is kept.
        """
        log = self._log
        if self.delivering:
            log.delivered(self.cursor)
        while True:
            events = log.after(self.cursor)
            if events:
                self.cursor += len(events)
                return events
            if log.refusal is not None:
                raise log.refusal
            if log.ended:
                return []
            self._news = asyncio.get_running_loop().create_future()
            await self._news

    async def to_the_end(self) -> None:
        """Read all that comes, for whoever wants only the response; what is no longer kept is left out.

        Raises:
            ProtocolError: the turn was refused.
        """
        while True:
            try:
                if not await self.read():
                    return
            except ReaderLagged:
                self.cursor = self._log.first

    def wake(self) -> None:
        """Something was written."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)
