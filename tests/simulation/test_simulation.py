"""Server and client under one seeded loop: time is virtual, the network cuts and delays, the server dies and comes back.

Each run is one seed. What must hold is checked at every message by the network, at every generation by the model, at
every answer by the agents, and over all books at the end. A failure names its seed: the same seed is the same run.

Source: guarantees, "Determinism", and what that names: owners, durability, tools, idempotent turns, resume,
connection-local state, order.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from openline.client.session import Session, connect
from openline.client.settings import ClientSettings
from server.running import make_config
from simulation.agents import Agent, Books
from simulation.dial import SimulatedDial
from simulation.model import NAME, Witness
from simulation.network import OWNERS, Network
from simulation.world import World
from virtual_time import run

SEEDS = 20
SEEDS_LONG = 500
TASKS = 3
SECONDS_MAX = 20_000.0  # of virtual time: whoever is not done by then is stuck
TRANSPORTS = ("auto", "websocket", "auto", "http")
LIMITS = {
    "connection_seconds_max": 600,  # sockets come to their age, too
    "drain_seconds_max": 600,  # a drain lets everything end
}


class Run:
    """One simulated history.

    Attributes:
        trace: what happened to the server and the network, each with its time.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.books = Books()
        self.trace: list[str] = [f"seed {seed}"]
        self._folder = folder
        self._random = random.Random(seed)
        self._sessions: list[Session] = []

    async def main(self) -> None:
        """Everybody works until they are done, whatever the weather."""
        config = make_config(self._folder / "unused.db", keys={owner: owner for owner in OWNERS}, limits=LIMITS)
        self.engine = Witness(self._seed())
        self.world = World(config, self._folder / "openline.db", self.engine, self._seed())
        await self.world.start()
        self.network = Network(self.world, self._seed())
        agents = [self._agent(index) for index in range(len(TRANSPORTS))]
        async with asyncio.timeout(SECONDS_MAX):
            work = asyncio.gather(*(agent.work(TASKS) for agent in agents))
            weather = asyncio.ensure_future(self._weather(work))
            broken = self.network.broken
            await asyncio.wait({work, weather, broken}, return_when=asyncio.FIRST_COMPLETED)
            if broken.done():
                broken.result()
            await asyncio.gather(work, weather)
            await self._check_books()
            for session in self._sessions:
                await session.close()
            await self.world.drain()
        assert not broken.done()
        assert self.engine.working == 0, "the model works for nobody"

    def _seed(self) -> int:
        return self._random.getrandbits(32)

    def _agent(self, index: int) -> Agent:
        owner = OWNERS[index % 2]
        session = connect(
            "http://simulated/v1",
            api_key=owner,
            model=NAME,
            transport=TRANSPORTS[index],
            settings=ClientSettings(),
            dial=SimulatedDial(self.network),
            chance=random.Random(self._seed()),
        )
        self._sessions.append(session)
        return Agent(f"{owner}{index}", owner, session, self.books, stores=index < 2, seed=self._seed())

    async def _weather(self, work: asyncio.Future[Any]) -> None:
        """Cuts often, dies now and then, drains sometimes, as long as somebody works."""
        while not work.done():
            await asyncio.sleep(self._random.random() * 30)
            roll = self._random.random()
            if roll < 0.7:
                self._note("cut")
                self.network.cut_one()
                continue
            self._note("kill" if roll < 0.9 else "drain")
            await (self.world.kill() if roll < 0.9 else self.world.drain())
            await asyncio.sleep(self._random.random() * 20)
            self._note("start")
            await self.world.start()

    def _note(self, what: str) -> None:
        self.trace.append(f"{asyncio.get_running_loop().time():.3f} {what}")

    async def _check_books(self) -> None:
        """What was acknowledged is there, for its owner alone; every tool ran once; nothing was generated in vain."""
        for response_id, (owner, _) in self.books.acknowledged.items():
            for each in OWNERS:
                row = await self.world.disk.get(each, response_id)
                assert (row is not None) == (each == owner), response_id
        assert set(self.books.ran.values()) <= {1}, self.books.ran
        for (process, said), count in self.engine.generations.items():
            assert count <= 1 + self.books.lost[said], f"process {process} had it answered {count} times: {said}"


def simulate(folder: Path, seed: int) -> Run:
    """A whole history."""
    history = Run(folder, seed)
    try:
        run(history.main())
    except BaseException:
        print(*history.trace, sep="\n")  # noqa: T201 - pytest shows it with the failure
        raise
    return history


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_is_lost_or_doubled_whatever_breaks(tmp_path, seed):
    """Every turn ends once with all of its events, every conversation keeps its items, every tool runs once."""
    history = simulate(tmp_path, seed)
    assert history.books.ended >= len(TRANSPORTS) * TASKS


@pytest.mark.long
@pytest.mark.parametrize("hundred", range(1, SEEDS_LONG // 100 + 1))
def test_nothing_is_lost_or_doubled_in_many_more_histories(tmp_path_factory, hundred):
    """The same, for as many seeds as a release wants to see."""
    for seed in range(100 * hundred, 100 * hundred + 100):
        simulate(tmp_path_factory.mktemp("history"), seed)


def test_things_do_break(tmp_path_factory):
    """The histories above have cuts, deaths and drains in them: they would prove nothing otherwise."""
    traces = [simulate(tmp_path_factory.mktemp("history"), seed).trace for seed in range(3)]
    words = " ".join(line for trace in traces for line in trace)
    assert all(words.count(what) >= 2 for what in ("cut", "kill", "start")), traces


def test_the_same_seed_is_the_same_run(tmp_path_factory):
    """A failure can be looked at again: every message is the same, at the same time.

    Source: guarantees, "Determinism".
    """
    digests = {simulate(tmp_path_factory.mktemp("history"), 7).network.digest for _ in range(2)}
    assert len(digests) == 1
