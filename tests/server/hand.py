"""An engine that the test plays by hand: it says when the upstream accepts, what comes, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from openline.engines.engine import EngineRequest, Model
from openline.protocol.deltas import Delta, Ended, TextDelta, Usage
from openline.protocol.errors import ProtocolError


class Hand:
    """The engine. `next_turn` waits for a turn and gives the test its strings."""

    name = "hand"

    def __init__(self) -> None:
        self.dropped_tools: Sequence[str] = ()
        self._turns: asyncio.Queue[HandTurn] = asyncio.Queue()

    def prepare(self, request: EngineRequest) -> HandTurn:
        return HandTurn(request, self.dropped_tools, self._turns)

    async def next_turn(self) -> HandTurn:
        """The next turn that runs."""
        return await asyncio.wait_for(self._turns.get(), 5)

    @property
    def is_idle(self) -> bool:
        """Whether no turn waits to be taken by the test."""
        return self._turns.empty()

    async def count_tokens(self, request: EngineRequest) -> int:
        return sum(len(item.raw) for item in request.context.items())

    async def models(self) -> Sequence[Model]:
        return [Model("hand-model", owned_by=self.name)]

    async def close(self) -> None:
        """Nothing is held."""


class HandTurn:
    """One turn in the test's hand."""

    prefills = False

    def __init__(self, request: EngineRequest, dropped_tools: Sequence[str], running: asyncio.Queue[HandTurn]) -> None:
        self.request = request
        self.dropped_tools = dropped_tools
        self._running = running
        self.closed = asyncio.Event()  # the generator was closed, or ended by itself
        self.taken = 0  # batches that the server has asked for
        self.asked = asyncio.Event()  # set by each of them
        self._batches: asyncio.Queue[list[Delta] | Exception | None] = asyncio.Queue()

    @property
    def input(self) -> list[bytes]:
        """The raw items of the whole context."""
        return [item.raw for item in self.request.context.items()]

    def accept(self) -> None:
        """The upstream's 2xx headers have come."""
        self.give()

    def give(self, *deltas: Delta) -> None:
        """What one read from the upstream brings."""
        self._batches.put_nowait(list(deltas))

    def fail(self, error: Exception) -> None:
        self._batches.put_nowait(error)

    def finish(self, *deltas: Delta) -> None:
        """Say the last and stop."""
        self.give(*deltas, Usage(input_tokens=1, output_tokens=1), Ended())
        self.end()

    def end(self) -> None:
        """The upstream's stream is over, whatever was said."""
        self._batches.put_nowait(None)

    def answer(self, text: str) -> None:
        self.accept()
        self.finish(TextDelta(text))

    def refuse(self, code: str = "rate_limit_exceeded", **fields: object) -> None:
        self.fail(ProtocolError(code, "Not now.", **fields))

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        self._running.put_nowait(self)
        try:
            while (batch := await self._batches.get()) is not None:
                if isinstance(batch, Exception):
                    raise batch
                self.taken += 1
                self.asked.set()
                yield batch
        finally:
            self.closed.set()
