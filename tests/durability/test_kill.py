"""`kill -9` at any moment of turns with `store: true`: what was acknowledged is there, whole, and can be continued.

Source: guarantees, "Durability".
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import sqlite3
import time
from collections import Counter
from statistics import median

import aiohttp
import pytest

from durability.serving import Server, nursery
from durability.world import (
    OPEN,
    WAYS,
    Api,
    ModelServer,
    Talker,
    Told,
    api_of,
    check_completed,
    check_rows,
    check_unseen,
)
from state.stores import place as made_place

KILLS = 20  # with one seed
TALKERS = 12
LEASE_SECONDS = 0.5
# Its end is rounded up to a second, the clock down; it is looked at three times in a lease; and a second for us.
SWEPT_SECONDS_MAX = LEASE_SECONDS * 4 / 3 + 3
START_SECONDS = 0.2  # about as long as a start takes
KILLED_SECONDS_MAX = 10
CONFIG = """
[store]
url = "{spec}"

[resume]
lease_seconds = {lease}
seconds = 0.2

[[upstreams]]
kind = "chat"
url = "{upstream}"
"""


class Moment:
    """When the server is killed.

    Args:
        rng: chooses: in the middle of an answer; between its last word and the end that a client sees, where the
            response is committed; or at that end, when the next ones are being committed.
    """

    def __init__(self, rng: random.Random, seconds_to_end: float) -> None:
        self.what = rng.choice(["word", "answer", "answer", "end"])
        self._left = rng.randint(1, {"word": 400, "answer": 80, "end": 80}[self.what])
        span = {"word": 0, "answer": 2 * seconds_to_end, "end": seconds_to_end / 4}[self.what]
        self._delay = rng.uniform(0, span)
        self.server: Server | None = None

    def __repr__(self) -> str:
        return f"{1000 * self._delay:.1f} ms after {self.what}"

    def happened(self, what: str) -> None:
        if self.server is None or what != self.what:
            return
        self._left -= 1
        if self._left == 0:
            if self._delay:
                asyncio.get_running_loop().call_later(self._delay, self.server.kill_now)
            else:
                self.server.kill_now()


class World:
    """Clients and a model server that outlive the server between them."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.told = Told()
        self.moment: Moment | None = None
        self.model = ModelServer(self.rng, self._happened)
        self.talkers = [
            Talker(f"client-{n}", WAYS[n % len(WAYS)], self.model, self.told, self._happened, keyed=n >= len(WAYS))
            for n in range(TALKERS)
        ]
        self.fresh: set[str] = set()  # completed in the server's latest life
        self.killed_at = 0.0
        self.waiting: dict[str, tuple[str, float, bool]] = {}  # question, when it was killed, whether it may be gone
        self.fates: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"{self.moment!r}, {dict(sorted(self.fates.items()))}, sent again: {dict(self.told.sent_again)}"

    def _happened(self, what: str) -> None:
        if self.moment is not None:
            self.moment.happened(what)

    async def live(self, server: Server, api: Api) -> None:
        """Talk until the server is killed."""
        known = set(self.told.completed)
        self.moment = Moment(self.rng, median(self.model.seconds_to_end))
        self.moment.server = server
        async with asyncio.timeout(KILLED_SECONDS_MAX):
            ends = await asyncio.gather(*(each.talk(api) for each in self.talkers), return_exceptions=True)
        self.fates[f"killed behind a {self.moment.what}"] += 1
        self.fates["completed"] += len(self.told.completed) - len(known)
        self.fresh = set(self.told.completed) - known
        for end in ends:
            if not isinstance(end, aiohttp.ClientError | ConnectionError):
                raise end
        assert server.killed_at is not None, ends
        self.killed_at = server.killed_at

    async def check(self, api: Api) -> None:
        """Hold the server to what its clients knew when it was killed."""
        told = self.told
        await check_completed(api, told, self.fresh)
        for unseen in (told.opened, told.begun):
            for response_id, question in unseen.items():
                self.waiting[response_id] = (question, self.killed_at, unseen is told.opened)
        told.opened.clear()
        told.begun.clear()
        await self.check_waiting(api)
        for talker in self.talkers:
            await talker.resume(api)

    async def check_waiting(self, api: Api) -> None:
        """Responses whose end nobody has seen are whole or gone, or end before long; in the background they are never gone."""
        for response_id, (question, killed_at, may_be_gone) in list(self.waiting.items()):
            is_late = time.time() > killed_at + SWEPT_SECONDS_MAX
            fate = await check_unseen(api, response_id, question)
            assert fate in ({"gone", "completed", *OPEN} if may_be_gone else {"failed", "completed", *OPEN})
            if fate not in OPEN:
                del self.waiting[response_id]
                self.fates[f"unseen, {fate}" if may_be_gone else f"in the background, {fate}"] += 1
            else:
                assert not is_late, "it is stuck"

    async def finish(self, api: Api) -> None:
        """Whoever does not know of a create of theirs sends it a last time; nothing is left open."""
        for talker in self.talkers:
            if talker.unsure is not None:
                async with api.socket() if talker.way == "socket" else contextlib.nullcontext() as socket:
                    await talker.turn(api, socket)
        while self.waiting:
            await self.check_waiting(api)
            await asyncio.sleep(0.05)


def intact(database, folder):
    """A copy of a database that nobody has open is intact; what the next server finds is not touched."""
    copy = folder / "copy"
    copy.mkdir(exist_ok=True)
    for path in database.parent.glob(f"{database.name}*"):
        if not path.name.endswith("-shm"):
            shutil.copy(path, copy)
    with contextlib.closing(sqlite3.connect(copy / database.name)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    shutil.rmtree(copy)


async def kill_again_and_again(kind, folder, seed, kills):
    """The test, on one kind of store."""
    data = folder / "data"
    data.mkdir()
    world = World(seed)
    async with made_place(kind, data) as place, world.model, nursery(folder, OPENLINE_SEALING_KEY="0" * 64) as makes:
        config = folder / "openline.toml"
        config.write_text(CONFIG.format(spec=place.spec, lease=LEASE_SECONDS, upstream=world.model.url))
        try:
            for _ in range(kills):
                server = await makes.start("--config", str(config))
                async with api_of(server.url) as api:
                    await world.check(api)
                    await world.live(server, api)
                await server.kill()
                if world.rng.random() < 0.3:  # and the next one while it starts
                    unlucky = await makes.begin("--config", str(config))
                    await asyncio.sleep(world.rng.uniform(0, START_SECONDS))
                    await unlucky.kill()
                    world.fates["killed while it started"] += 1
                if kind == "sqlite file":
                    intact(data / "store.db", folder)
                assert "Traceback" not in server.says()
            server = await makes.start("--config", str(config))
            async with api_of(server.url) as api:
                await world.check(api)
                await world.finish(api)
            await server.stop()
            rows = await check_rows(place.make(), world.told)
            assert not world.model.misled
            assert not world.told.refused
        except BaseException as error:
            error.add_note(f"seed {seed}, {world!r}")
            raise
    print(f"seed {seed}, {world!r}, rows={rows}")  # noqa: T201 - the figures, for whoever asks with -s


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 10))])
async def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path, seed):
    """Each kill: 0 acknowledged lost, 0 half-written readable, 0 stuck, every chain goes on, the database is intact."""
    await kill_again_and_again("sqlite file", tmp_path, seed, KILLS)


@pytest.mark.parametrize(("seed", "kills"), [(0, 2), pytest.param(1, 20, marks=pytest.mark.long)])
async def test_the_same_holds_with_postgresql(tmp_path, seed, kills):
    """Where the database outlives the server."""
    await kill_again_and_again("postgres", tmp_path, seed, kills)
