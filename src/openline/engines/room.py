"""Which turns fit into llama.cpp's context at once.

Its slots share one KV cache, so that a long conversation may have all of it. Where those that run outgrow it together,
llama.cpp fails every one of them, although each would have fit alone. So a turn waits until there is room beside the
others. Its tokens are counted only when there are others.

Source: llama.cpp, tools/server/server-context.cpp, `update_slots`, "Context size has been exceeded."
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Final

from openline.protocol.errors import ProtocolError

_ANSWER_SHARE: Final = 8  # of the context is kept free for each answer; an agent's are seldom longer


class Place:
    """What one turn takes of the room.

    Attributes:
        tokens: of its prompt; None as long as nobody asked, 0 if they cannot be counted.
        is_shared: others ran at the same time.
    """

    def __init__(self, count: Callable[[], Awaitable[int]]) -> None:
        self._count = count
        self.tokens: int | None = None
        self.is_shared = False

    def __repr__(self) -> str:
        return f"<Place tokens={self.tokens} is_shared={self.is_shared}>"

    async def counted(self) -> int:
        """The tokens of its prompt, counted at most once."""
        if self.tokens is None:
            try:
                self.tokens = await self._count()
            except ProtocolError:
                self.tokens = 0  # the turn itself will say why
        return self.tokens


class Room:
    """The context that turns share, first come, first served.

    Args:
        tokens: how many it has.
    """

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._running: list[Place] = []
        self._entrance = asyncio.Lock()
        self._left = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Room {self._tokens} running={len(self._running)}>"

    @asynccontextmanager
    async def hold(self, count: Callable[[], Awaitable[int]]) -> AsyncGenerator[Place, None]:
        """Wait for a place beside those that run, and keep it while the block runs.

        Args:
            count: how many tokens the turn's prompt has.

        Raises:
            ProtocolError: `server_is_overloaded` for a block that failed as too long, if the others were at fault.
        """
        place = Place(count)
        async with self._entrance:
            await self._enter(place)
        try:
            yield place
        except ProtocolError as error:
            if error.code == "context_length_exceeded" and place.is_shared:  # alone it would have fit: it was counted
                raise self._outgrown() from None
            raise
        finally:
            self._running.remove(place)
            self._left.set()

    async def _enter(self, place: Place) -> None:
        while True:
            self._left.clear()
            if not self._running or await self._fits(place):
                break
            await self._left.wait()
        self._running.append(place)
        if len(self._running) > 1:
            for each in self._running:
                each.is_shared = True

    async def _fits(self, place: Place) -> bool:
        places = (*self._running, place)
        needed = sum([await each.counted() for each in places]) + len(places) * (self._tokens // _ANSWER_SHARE)
        return needed <= self._tokens

    def _outgrown(self) -> ProtocolError:
        message = (
            f"The conversations that ran at once outgrew the context of {self._tokens} tokens that they share. Try again;"
            " or set the upstream's `context_tokens` higher."
        )
        return ProtocolError("server_is_overloaded", message, headers={"retry-after": "1"})
