"""Builds a turn's events and writes them into its log; and again where the model is silent for long."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import msgspec

from openline.protocol.builder import Builder
from openline.protocol.deltas import Delta
from openline.protocol.fold import Event
from openline.turns.log import TurnLog

_encoder: Final = msgspec.json.Encoder()


class Writer:
    """One turn's.

    Args:
        keepalive_seconds: after so long without an event, `response.in_progress` is repeated; None if nobody
            reads the events.
    """

    def __init__(self, log: TurnLog, builder: Builder, keepalive_seconds: float | None) -> None:
        self.log = log
        self.builder = builder
        self.opened_at: float | None = None
        self._loop = asyncio.get_running_loop()
        self._keepalive_seconds = keepalive_seconds
        self._keepalive: asyncio.TimerHandle | None = None
        self._written_at = 0.0

    def __repr__(self) -> str:
        return f"<Writer {self.builder!r}>"

    @property
    def is_open(self) -> bool:
        """Whether `response.created` was written."""
        return self.opened_at is not None

    def open(self) -> None:
        """`response.created` and `response.in_progress`, once."""
        if self.opened_at is None:
            self.opened_at = self._loop.time()
            self.append(self.builder.open())
            if self._keepalive_seconds is not None:
                self._keepalive = self._loop.call_later(self._keepalive_seconds, self._keep_alive)

    async def write(self, deltas: Sequence[Delta]) -> None:
        """The events of one read from the upstream, in one write; waits while the client is its window behind."""
        self.open()
        if deltas:
            self.append(self.builder.apply(deltas))
            await self.log.writable()

    def append(self, events: Sequence[Event], last: Event | None = None) -> None:
        """Write events.

        Args:
            last: the final response, when the terminal event is among them.
        """
        self.log.append([_encoder.encode(event) for event in events], last=last)
        self._written_at = self._loop.time()

    def end(self, response: Event) -> None:
        """The terminal event, with the response that has been kept."""
        self.open()
        self.append(self.builder.announce(response), last=response)
        self.close()

    def close(self) -> None:
        """Nothing more will be written."""
        if self._keepalive is not None:
            self._keepalive.cancel()
            self._keepalive = None

    def _keep_alive(self) -> None:
        """Clients and proxies give a connection up on which no data comes; pings do not count.

        A client that is behind has data to read. Source: docs/adr/0006.
        """
        assert self._keepalive_seconds is not None, "else nothing calls this"
        if self.log.ended or (self.log.closing and self.log.is_kept):  # nothing comes behind what is being kept
            return
        rest = self._written_at + self._keepalive_seconds - self._loop.time()
        if rest <= 0 and self.log.is_writable:
            self.append(self.builder.keep_alive())
        self._keepalive = self._loop.call_later(rest if rest > 0 else self._keepalive_seconds, self._keep_alive)
