"""An upstream's event stream, one network read at a time, within its bounds of time and bytes."""

from __future__ import annotations

import asyncio
import logging
from typing import Final

import aiohttp

from openline.config import UpstreamSettings
from openline.engines.progress import Progress
from openline.engines.upstream_faults import FAULTS, fault_error, read_some, too_long
from openline.protocol import sse
from openline.protocol.errors import ProtocolError

logger = logging.getLogger("openline.upstream")

_TIMER_SECONDS_MIN: Final = 0.001  # zero would be no timer


class Allowance:
    """How much is taken of one answer: bytes, and seconds from now on."""

    def __init__(self, settings: UpstreamSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._ends_at = self._loop.time() + settings.answer_seconds_max
        self.bytes = 0

    def take(self, count: int) -> ProtocolError | None:
        """So many bytes more have come; the error if that is too many, or too late."""
        self.bytes += count
        settings = self._settings
        if self.bytes > settings.answer_bytes_max:
            message = f"sent more than {settings.answer_bytes_max} bytes (`answer_bytes_max`) in one answer."
            return ProtocolError("upstream_error", f"Upstream '{settings.label}' {message}")
        if self._loop.time() > self._ends_at:
            message = f"did not finish its answer in {settings.answer_seconds_max:g} seconds (`answer_seconds_max`)."
            return ProtocolError("upstream_timeout", f"Upstream '{settings.label}' {message}")
        return None


class EventReader:
    """Reads a response's events; it must be closed.

    Args:
        response: accepted, its body not read yet.
        settings: the upstream's.
        first_at: until when its first bytes must be there, by the loop's clock.
    """

    def __init__(self, response: aiohttp.ClientResponse, settings: UpstreamSettings, first_at: float) -> None:
        self._response = response
        self._settings = settings
        self._decoder = sse.Decoder(settings.event_bytes_max)
        self._loop = asyncio.get_running_loop()
        self._allowance = Allowance(settings)
        self._tail_ends_at: float | None = None
        self._ended = False
        self._fault: ProtocolError | None = None
        self._set_timer(first_at - self._loop.time())
        self._connection_lost = self._watch()

    def __repr__(self) -> str:
        return f"<EventReader {self._settings.label} bytes={self._allowance.bytes}>"

    def close(self) -> None:
        """Nothing more is read."""
        if self._connection_lost is not None:
            self._connection_lost.remove_done_callback(self._on_lost)

    async def read(self, progress: Progress) -> list[bytes] | None:
        """The data of the events that came; None once the stream has ended.

        Args:
            progress: of the answer. Once that is whole, a stream that breaks or falls silent has ended too.

        Raises:
            ProtocolError: it broke, fell silent, or goes above a bound.
        """
        if self._ended:
            return None
        if progress is Progress.OPEN:
            return await self._read()
        # What follows a whole answer is worth neither an error nor a long wait.
        if self._tail_ends_at is None:
            self._tail_ends_at = self._loop.time() + self._settings.end_seconds_max
        try:
            async with asyncio.timeout_at(self._tail_ends_at):
                return await self._read()
        except (ProtocolError, TimeoutError):
            logger.info("upstream %s did not end its stream behind a whole answer", self._settings.label)
            return None

    async def _read(self) -> list[bytes]:
        chunk = await self._read_chunk()
        if not self._allowance.bytes:
            self._set_timer(self._settings.idle_seconds_max)
        excess = self._allowance.take(len(chunk))
        try:
            if not chunk:
                self._ended = True
                return self._decoder.end()
            events = self._decoder.feed(chunk)
        except sse.TooLong:
            raise too_long(self._settings.label, self._settings.event_bytes_max) from None
        self._fault = self._fault or excess
        return events

    async def _read_chunk(self) -> bytes:
        """What one read brings; what came before a fault is given first."""
        if self._fault is not None:
            raise self._fault
        try:
            return await read_some(self._response)
        except FAULTS as error:
            self._fault = fault_error(error, self._settings.label, self._waited())
        # aiohttp raises at once, and keeps what came before: perhaps the rest of a whole answer.
        unread = self._response.content._read_nowait(-1)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
        if not unread:
            raise self._fault
        return unread

    def _set_timer(self, seconds: float) -> None:
        """How long the next bytes may take: by the timer that aiohttp restarts with each read, which costs least."""
        connection = self._response.connection
        if connection is not None and connection.protocol is not None:
            connection.protocol.read_timeout = max(seconds, _TIMER_SECONDS_MIN)
            connection.protocol.start_timeout()

    def _watch(self) -> asyncio.Future[None] | None:
        """See to it that a lost connection ends the body.

        aiohttp's parser in C closes the connection at a broken chunk, stops its timer, and tells the body nothing:
        whoever reads it would wait for ever.
        """
        connection = self._response.connection
        if connection is None or connection.protocol is None:
            return None  # the body has ended
        lost = connection.protocol.closed
        if lost is None:
            self._on_lost()
        else:
            lost.remove_done_callback(_retrieve)
            lost.add_done_callback(_retrieve)
            lost.add_done_callback(self._on_lost)
        return lost

    def _on_lost(self, _: object = None) -> None:
        content = self._response.content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("The connection was closed."))

    def _waited(self) -> str:
        if self._allowance.bytes:
            return f"{self._settings.idle_seconds_max:g} seconds (`idle_seconds_max`)"
        return f"{self._settings.first_event_seconds_max:g} seconds (`first_event_seconds_max`)"


def _retrieve(lost: asyncio.Future[None]) -> None:
    """Take the exception of a connection that is lost later, in the pool, where nobody else would."""
    if not lost.cancelled():
        lost.exception()
