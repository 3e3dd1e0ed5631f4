"""An agent of fifty tool calls whose agent and server are killed and whose connection is cut: every line is there once.

Source: guarantees, "Tools exactly once".
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from commands import environment
from state.proxy import Proxy

AGENT = Path(__file__).parent / "fifty.py"
SECONDS_MAX = 300  # on a busy machine
# Slow enough that a fault meets a turn in its middle; and turns of a killed server are free again after a second.
CONFIG = '[[upstreams]]\nkind = "scripted"\ndelta_seconds = 0.002\n[resume]\nlease_seconds = 1\n'


class Faults(NamedTuple):
    """How often what happens, at random moments of the seed's."""

    agent_kills: int
    server_kills: int
    cuts: int


class World:
    """A server on a port of its own, a network before it, and what an agent leaves behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "lines.txt"
        self.proxy: Proxy
        self.server: asyncio.subprocess.Process
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.port = taken.getsockname()[1]
        (folder / "openline.toml").write_text(CONFIG)

    @property
    def lines(self) -> list[str]:
        return self.file.read_text().splitlines() if self.file.exists() else []

    async def start_server(self) -> None:
        command = ["serve", "--port", str(self.port), "--config", str(self.folder / "openline.toml")]
        self.server = await self.process("-m", "openline", *command, "--store", f"sqlite:{self.folder}/openline.db")
        assert self.server.stdout is not None
        while b"listens on" not in (line := await self.server.stdout.readline()):
            assert line, "the server has not started"

    async def kill_server(self) -> None:
        self.server.kill()
        await self.server.communicate()
        await self.start_server()

    async def start_agent(self, model: str) -> asyncio.subprocess.Process:
        return await self.process(
            str(AGENT), f"{self.proxy.url}/v1", model, str(self.folder / "ledger.db"), str(self.file)
        )

    async def process(self, *arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            env=environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=None if arguments[0] == str(AGENT) else asyncio.subprocess.DEVNULL,
        )


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    made = World(folder)
    await made.start_server()
    try:
        async with Proxy(f"http://127.0.0.1:{made.port}") as made.proxy:
            yield made
    finally:
        made.server.kill()
        await made.server.communicate()


async def run(at: World, calls: int, faults: Faults, chance: random.Random) -> bytes:
    """One run to its end, with the faults at random numbers of lines; what the last agent says."""
    kinds = ["agent"] * faults.agent_kills + ["server"] * faults.server_kills + ["cut"] * faults.cuts
    moments = sorted((chance.randrange(calls), chance.uniform(0, 0.02), kind) for kind in kinds)
    agent = await at.start_agent(f"scripted-tools-{calls}")
    try:
        for after_lines, seconds, kind in moments:
            while len(at.lines) < after_lines and agent.returncode is None:  # noqa: ASYNC110 - a file has no event
                await asyncio.sleep(0.001)
            await asyncio.sleep(seconds)
            if kind == "agent":
                agent.kill()
                await agent.communicate()
                agent = await at.start_agent(f"scripted-tools-{calls}")
            elif kind == "server":
                await at.kill_server()
            else:
                at.proxy.cut()
        said, _ = await agent.communicate()
        assert agent.returncode == 0
        return said
    finally:
        if agent.returncode is None:
            agent.kill()
            await agent.communicate()


async def check(folder: Path, calls: int, faults: Faults, seed: int) -> None:
    async with asyncio.timeout(SECONDS_MAX), world(folder) as at:
        said = await run(at, calls, faults, random.Random(seed))
        written = [line.split()[1] for line in at.lines]
    assert written == [f"item-{number:02d}" for number in range(1, calls + 1)], f"seed {seed}"
    assert said.startswith(f"{calls} Done after {calls} tool calls.".encode()), f"seed {seed}: {said}"


async def test_an_agent_that_is_killed_twice_writes_every_line_once(tmp_path: Path):
    """Its `on_unknown` looks into the file."""
    await check(tmp_path, 50, Faults(agent_kills=2, server_kills=0, cuts=0), seed=1)


async def test_a_tenth_of_all_faults_together(tmp_path: Path):
    """Server killed, connection cut, agent killed in one run."""
    await check(tmp_path, 50, Faults(agent_kills=1, server_kills=1, cuts=2), seed=2)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10))
async def test_an_agent_that_is_killed_five_times_writes_every_line_once(tmp_path: Path, seed: int):
    """At ten times five seeded moments."""
    await check(tmp_path, 50, Faults(agent_kills=5, server_kills=0, cuts=0), seed)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
async def test_all_faults_together(tmp_path: Path, seed: int):
    """The server is killed ten times, the connection cut twenty times, and the agent killed five times in one run."""
    await check(tmp_path, 50, Faults(agent_kills=5, server_kills=10, cuts=20), seed)
