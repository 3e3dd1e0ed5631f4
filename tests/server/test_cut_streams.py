"""A stream that is cut anywhere goes on where it was cut: the same events, each once, from one generation.

Source: guarantees, "Resume": a cut at every byte offset of a recorded stream, closed and reset; docs/adr/0009.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from itertools import cycle
from pathlib import Path

import pytest

from openline.config import UpstreamSettings
from openline.engines.engine import EngineRequest, Generation
from openline.engines.scripted import ScriptedEngine
from openline.protocol.deltas import Delta
from openline.protocol.transcript import read_lines, turns
from server.cutting import Cut, Cutter, Seen, ask, number_of

RECORDED = Path(__file__).parent.parent / "transcripts" / "parallel-function-calls.jsonl"
(CREATE, *_) = (turn.create for turn in turns(read_lines(RECORDED.read_text(encoding="utf-8"))))
TRANSPORTS = ["websocket", "sse"]


class Stopping(ScriptedEngine):
    """Plays the recording slowly enough to be read along, and waits where its client was cut until it is back.

    Attributes:
        calls: how often it was asked, by the key of the create.
        go: not set while a client that was cut is not back.
    """

    def __init__(self) -> None:
        super().__init__(UpstreamSettings(kind="scripted", url=str(RECORDED)))
        self.calls: Counter[str] = Counter()
        self.go = asyncio.Event()
        self.go.set()

    def prepare(self, request: EngineRequest) -> Generation:
        self.calls[request.create.idempotency_key or ""] += 1
        return _Stopping(super().prepare(request), self)


class _Stopping:
    dropped_tools = ()
    prefills = False

    def __init__(self, generation: Generation, engine: Stopping) -> None:
        self._generation = generation
        self._engine = engine

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        async for batch in self._generation.stream():
            for _ in range(3):  # what was said before is on its way
                await asyncio.sleep(0)
            await self._engine.go.wait()
            yield batch


class Cutting:
    """A server whose clients are cut, and go on."""

    def __init__(self, server, engine: Stopping, cutter: Cutter) -> None:
        self._server = server
        self._engine = engine
        self._cutter = cutter
        self._number = 0
        self.stores = False
        self.resumed_while_running = 0
        cutter.on_cut = engine.go.clear

    def new_create(self):
        self._number += 1
        return {**CREATE, "store": self.stores, "idempotency_key": f"key-{self._number}"}

    async def whole(self, transport) -> tuple[list[bytes], int]:
        """The events of an uncut stream, and how many bytes come from the server up to its end."""
        seen = await ask(transport, self._cutter.address, self.new_create())
        assert seen.ended
        return seen.events, self._cutter.answered_bytes

    async def joined(self, *connections: tuple[str, Cut]) -> list[bytes]:
        """What a client has got in the end whose connections were cut there, and that its turn was run once."""
        create = self.new_create()
        seen = Seen([], ended=False)
        for transport, cut in connections:
            self._cutter.next_cut = cut
            seen = await self._go_on(transport, self._cutter.address, create, seen)
            if seen.ended:
                break
        else:
            seen = await self._go_on(transport, self._server.address, create, seen)
        assert seen.ended
        self._engine.go.set()
        self._cutter.drop()
        assert self._engine.calls.pop(create["idempotency_key"]) == 1
        return seen.events

    async def _go_on(self, transport, address, create, seen: Seen) -> Seen:
        rest = {"starting_after": number_of(seen.events[-1])} if seen.events else {}
        turn = self._server.registry.held.of_key("local", create["idempotency_key"])
        before = turn.log._delivering if turn is not None else None
        asking = asyncio.ensure_future(ask(transport, address, {**create, **rest}))
        if turn is not None and not turn.log.ended:
            self.resumed_while_running += 1
            while turn.log._delivering in {None, before} and not asking.done():  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0)  # until it is back
        self._engine.go.set()
        more = await asking
        return Seen([*seen.events, *more.events], more.ended)


def same(events: list[bytes]) -> list[bytes]:
    """The same bytes without what differs from one response to the next: its id's random part, and its time."""
    joined = b"\n".join(events)
    joined = re.sub(rb"[0-9a-f]{48}", b"0" * 48, joined)
    return re.sub(rb'"(created|completed)_at":[0-9]+', rb'"\1_at":0', joined).split(b"\n")


@pytest.fixture
async def cutting(start):
    """With a database, for what is stored."""
    engine = Stopping()
    server = await start(engine=engine, resume={"bytes_max": 1_000_000})
    async with Cutter(server.address).listening() as cutter:
        yield Cutting(server, engine, cutter)


async def require_the_same(cutting, transport, cuts):
    """The joined stream equals the uncut one, byte for byte in every event, wherever the cut is."""
    whole, size = await cutting.whole(transport)
    assert size > 2000
    assert [number_of(event) for event in whole] == list(range(len(whole)))
    assert sum(b'"type":"function_call"' in event for event in whole if b"output_item.done" in event) == 2
    count = 0
    for cut in cuts(size):
        assert same(await cutting.joined((transport, cut))) == same(whole), cut
        count += 1
    # Most of them come back to a turn that still runs; the others, cut at its end, to one that has ended.
    assert cutting.resumed_while_running > count / 3


@pytest.mark.parametrize("stores", [False, True], ids=["unstored", "stored"])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stream_that_is_cut_anywhere_goes_on_where_it_was_cut(cutting, transport, stores):
    """At every 20th byte of the answer, a stored one at fewer: nothing is missing, nothing comes twice, in order.

    In turn the connection is closed, reset, or closed for the client only: then the server still writes to the old one.
    """
    cutting.stores = stores
    await require_the_same(
        cutting, transport, lambda size: map(Cut, range(0, size, 200 if stores else 20), cycle(["fin", "rst", "half"]))
    )


@pytest.mark.long
@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stream_that_is_cut_at_every_byte_goes_on_where_it_was_cut(cutting, transport, how):
    """Every byte offset of the answer, the head of the connection included; closed and reset."""
    await require_the_same(cutting, transport, lambda size: (Cut(after, how) for after in range(size)))


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_create_that_is_cut_anywhere_is_run_once(cutting, transport):
    """Whether it arrived or not, the client sends it again, and gets the one turn."""
    whole, _ = await cutting.whole(transport)
    for after in range(1, 1000, 17):  # behind its end nothing is cut
        for how in ("fin", "rst"):
            assert same(await cutting.joined((transport, Cut(after, how, "request")))) == same(whole), after


@pytest.mark.parametrize("seed", range(5))
async def test_a_stream_that_is_cut_again_and_again_goes_on(cutting, seed):
    """Over whichever transport the client tries next; a fall back to HTTP is no other turn."""
    draw = random.Random(seed)
    whole, size = await cutting.whole("websocket")
    for _ in range(10):
        cutting.stores = draw.random() < 0.2
        connections = [
            (draw.choice(TRANSPORTS), Cut(draw.randrange(size // 2), draw.choice(["fin", "rst", "half"])))
            for _ in range(draw.randint(2, 6))
        ]
        joined = same(await cutting.joined(*connections))
        assert joined == [event.replace(b'"store":false', b'"store":%b' % store(cutting)) for event in same(whole)]


def store(cutting):
    return b"true" if cutting.stores else b"false"
