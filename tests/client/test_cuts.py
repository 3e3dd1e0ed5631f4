"""A session whose connections are cut at any byte, either way: the stream it gives is the uncut one, and ran once.

Source: guarantees of resuming and of idempotent turns; docs/adr/0013.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter, deque
from itertools import cycle
from pathlib import Path

import msgspec
import pytest

from openline import ClientSettings, connect
from openline.config import UpstreamSettings
from openline.engines.scripted import ScriptedEngine
from openline.protocol.transcript import read_lines, turns
from server.cutting import Cut, Cutter

RECORDED = Path(__file__).parent.parent / "transcripts" / "parallel-function-calls.jsonl"
(CREATE, *_) = (turn.create for turn in turns(read_lines(RECORDED.read_text(encoding="utf-8"))))
ASKED = {name: value for name, value in CREATE.items() if name not in {"type", "stream"}}
SETTINGS = ClientSettings(tries_max=20, backoff_seconds=0.001)
over = pytest.mark.parametrize("transport", ["websocket", "http"])


class Halting(ScriptedEngine):
    """Plays the recording, and halts for a moment where a client was cut, so that most come back to a turn that runs.

    Attributes:
        calls: how often it was asked, by the key of the create.
    """

    def __init__(self) -> None:
        super().__init__(UpstreamSettings(kind="scripted", url=str(RECORDED)))
        self.calls: Counter[str] = Counter()
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    def halt(self) -> None:
        self.goes_on.clear()
        asyncio.get_running_loop().call_later(0.002, self.goes_on.set)

    def prepare(self, request):
        self.calls[request.create.idempotency_key] += 1
        return Haltable(super().prepare(request), self.goes_on)


class Haltable:
    dropped_tools = ()
    prefills = False

    def __init__(self, generation, goes_on) -> None:
        self.generation = generation
        self.goes_on = goes_on

    async def stream(self):
        async for batch in self.generation.stream():
            for _ in range(3):  # what was said before is on its way
                await asyncio.sleep(0)
            await self.goes_on.wait()
            yield batch


class Series(Cutter):
    """Cuts one connection after the other; what comes behind them is carried as it is."""

    def __init__(self, server: str) -> None:
        super().__init__(server)
        self.cuts: deque[Cut] = deque()

    def _accept(self, reader, writer) -> None:
        self.next_cut = self.cuts.popleft() if self.cuts else None
        super()._accept(reader, writer)


class Cutting:
    """A server behind a proxy that cuts, and sessions through it."""

    def __init__(self, server, engine: Halting, proxy: Series) -> None:
        self.server = server
        self.engine = engine
        self.proxy = proxy
        self.resumed = 0
        proxy.on_cut = self.on_cut

    def on_cut(self) -> None:
        self.engine.halt()
        self.resumed += len(self.server.registry) > 0

    async def events(self, transport: str, *cuts: Cut, store: bool = False) -> list[dict]:
        """What a session gives of one turn whose connections are cut there, one after the other."""
        self.proxy.cuts.extend(cuts)
        async with connect(f"http://{self.proxy.address}/v1", transport=transport, settings=SETTINGS) as session:
            stream = session.create(**ASKED, store=store)
            events = [event async for event in stream]
            assert await stream.response() == events[-1]["response"]
            assert self.engine.calls.pop(stream.idempotency_key) == 1, "one generation"
            assert session.history.response_id == events[-1]["response"]["id"]
        self.proxy.cuts.clear()
        self.proxy.drop()
        return events

    async def require_the_same(self, transport: str, cuts) -> None:
        """The joined stream equals the uncut one, wherever the cut is."""
        whole = await self.events(transport)
        size = self.proxy.answered_bytes
        assert size > 2000
        assert [event["sequence_number"] for event in whole] == list(range(len(whole)))
        count = 0
        for cut in cuts(size):
            assert same(await self.events(transport, cut)) == same(whole), cut
            count += 1
        assert self.resumed > count / 2, "most of them were cut while the turn ran"


def same(events: list[dict]) -> list[bytes]:
    """The events without what differs from one response to the next: its id's random part, and its time."""
    joined = b"\n".join(map(msgspec.json.encode, events))
    joined = re.sub(rb"[0-9a-f]{48}", b"0" * 48, joined)
    return re.sub(rb'"(created|completed)_at":[0-9]+', rb'"\1_at":0', joined).split(b"\n")


@pytest.fixture
async def cutting(start):
    engine = Halting()
    server = await start(engine=engine, resume={"bytes_max": 1_000_000})
    async with Series(server.address).listening() as proxy:
        yield Cutting(server, engine, proxy)


@over
async def test_a_session_whose_line_is_cut_anywhere_gives_the_whole_stream(cutting, transport):
    """At every 120th byte of what the server sends, closed, reset, or closed for the client only."""
    await cutting.require_the_same(transport, lambda size: map(Cut, range(0, size, 120), cycle(["fin", "rst", "half"])))


@pytest.mark.long
@pytest.mark.parametrize(("first", "how"), [(0, "fin"), (1, "rst")])
@over
async def test_a_session_whose_line_is_cut_at_every_third_byte_gives_the_whole_stream(cutting, transport, first, how):
    """Of what the server sends, the handshake included; closed at these, reset at those behind them."""
    await cutting.require_the_same(transport, lambda size: (Cut(after, how) for after in range(first, size, 3)))


@over
async def test_a_create_that_is_cut_anywhere_runs_once(cutting, transport):
    """Whether it arrived or not: the session asks, or sends it again under its key."""
    whole = same(await cutting.events(transport))
    for after in range(1, 1200, 67):  # behind its end nothing is cut
        for how in ("fin", "rst"):
            assert same(await cutting.events(transport, Cut(after, how, "request"))) == whole, after


@pytest.mark.parametrize("seed", range(3))
async def test_a_session_that_is_cut_again_and_again_gives_the_whole_stream(cutting, seed):
    """Up to six times in one turn, stored or not, over whichever way the session takes."""
    draw = random.Random(seed)
    whole = same(await cutting.events("websocket"))
    size = cutting.proxy.answered_bytes
    for _ in range(8):
        store = draw.random() < 0.3
        cuts = [Cut(draw.randrange(size // 2), draw.choice(["fin", "rst", "half"])) for _ in range(draw.randint(2, 6))]
        joined = same(await cutting.events(draw.choice(["auto", "websocket", "http"]), *cuts, store=store))
        stored = [event.replace(b'"store":false', b'"store":true') for event in whole]
        assert joined == (stored if store else whole)
