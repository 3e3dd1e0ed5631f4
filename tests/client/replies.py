"""A server whose engine answers each turn of a conversation as the test has written it down, however often it is asked."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import openline
from openline.engines.engine import EngineRequest, Model
from openline.engines.scripted import SeenProjection
from openline.protocol.deltas import CallDelta, CallStarted, Delta, Ended, TextDelta, Usage
from openline.protocol.errors import ProtocolError
from server.running import Running

Called = tuple[str, str]  # a function's name, and its arguments as the model writes them


class Cut:
    """A turn that stops in mid-text for this reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Held:
    """A turn that says a word and waits until the test lets it go on."""

    def __init__(self, then: Reply = "Done.") -> None:
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.then = then


Reply = str | list[Called] | ProtocolError | Cut | Held


class Replies:
    """The engine.

    Attributes:
        generations: which turn of its conversation each generation was, from 1.
        requests: the create of each.
    """

    name = "replies"

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.generations: list[int] = []
        self.requests: list[EngineRequest] = []

    def prepare(self, request: EngineRequest) -> Generation:
        turn = request.context.project(SeenProjection()).turns
        return Generation(self, request, turn)

    def outputs(self, generation: int = -1) -> dict[str, Any]:
        """What a generation was told of its conversation's calls: call_id → output."""
        items = [json.loads(item.raw) for item in self.requests[generation].context.items()]
        return {item["call_id"]: item["output"] for item in items if str(item.get("type")).endswith("_call_output")}

    async def count_tokens(self, request: EngineRequest) -> int:
        return len(request.body)

    async def models(self) -> Sequence[Model]:
        return [Model("m", owned_by=self.name)]

    async def close(self) -> None:
        """Nothing is held."""


class Generation:
    dropped_tools: Sequence[str] = ()
    prefills = False

    def __init__(self, engine: Replies, request: EngineRequest, turn: int) -> None:
        self._engine = engine
        self._request = request
        self._turn = turn

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        self._engine.generations.append(self._turn)
        self._engine.requests.append(self._request)
        reply = self._engine.replies[self._turn - 1]
        if isinstance(reply, ProtocolError) and reply.code == "rate_limit_exceeded":
            raise reply  # before anything was accepted
        yield []
        if isinstance(reply, Held):
            yield [TextDelta("Wait. ")]
            reply.begun.set()
            await reply.go_on.wait()
            reply = reply.then
        if isinstance(reply, ProtocolError):
            raise reply
        for batch in self._batches(reply):
            yield batch
            await asyncio.sleep(0)

    def _batches(self, reply: Reply) -> list[list[Delta]]:
        usage = Usage(input_tokens=10, cached_tokens=4, output_tokens=2, reasoning_tokens=1)
        if isinstance(reply, Cut):
            return [[TextDelta("Half a ")], [usage, Ended(reply.reason)]]
        if isinstance(reply, str):
            return [[TextDelta(reply)], [usage, Ended()]]
        assert isinstance(reply, list)
        calls: list[list[Delta]] = [
            [CallStarted("function_call", f"call_{self._turn}_{number}", name), CallDelta(arguments)]
            for number, (name, arguments) in enumerate(reply, 1)
        ]
        return [*calls, [usage, Ended()]]


class Peer:
    """A server, its engine, and sessions with it that end with the test."""

    def __init__(self, stack: AsyncExitStack, server: Running, engine: Replies) -> None:
        self._stack = stack
        self.server = server
        self.engine = engine
        self.url = f"{server.url}/v1"

    async def session(self, **options: Any) -> openline.Session:
        """A session of its own, as another process would have."""
        options = {"model": "m", **options}
        return await self._stack.enter_async_context(openline.connect(self.url, **options))
