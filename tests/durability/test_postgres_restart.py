"""PostgreSQL crashes and comes back in the middle of turns.

Source: guarantees, "Database faults"; docs/adr/0012.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import pytest

from durability.cluster import cluster
from durability.serving import nursery
from durability.world import WAYS, ModelServer, Talker, Told, api_of, check_completed, check_refused, check_rows
from openline.state.postgres import PostgresStore

TALKERS = 12
OTHERS = 3
RECOVERY_SECONDS_MAX = 5  # guarantee of database faults
SWEPT_SECONDS_MAX = 6
CONFIG = """
[store]
url = "{spec}"

[resume]
lease_seconds = 0.5
seconds = 0.2

[[upstreams]]
kind = "chat"
url = "{upstream}"
"""


class Clients:
    """Some whose responses are to be kept, and some who need no store."""

    def __init__(self, rng: random.Random) -> None:
        self.told = Told()
        self._count: Counter[str] = Counter()
        self._seen: dict[str, list[tuple[int, asyncio.Event]]] = {}
        self.model = ModelServer(rng, self._happened)
        self.storing = [
            Talker(f"s{n}", WAYS[n % len(WAYS)], self.model, self.told, self._happened) for n in range(TALKERS)
        ]
        ways = ("sse", "socket", "json")
        self.others = [Talker(f"o{n}", ways[n], self.model, self.told, _nothing, store=False) for n in range(OTHERS)]

    def _happened(self, what):
        self._count[what] += 1
        for number, event in self._seen.get(what, ()):
            if self._count[what] >= number:
                event.set()

    def leave(self):
        """Each after its turn."""
        for talker in (*self.storing, *self.others):
            talker.leaves = True

    async def until(self, what, count):
        """Until it has happened so many times more."""
        event = asyncio.Event()
        self._seen.setdefault(what, []).append((self._count[what] + count, event))
        await event.wait()

    async def until_completed(self):
        """Until one more response that was to be kept has completed; how many seconds that took."""
        began, count = time.monotonic(), len(self.told.completed)
        while len(self.told.completed) == count:
            await self.until("end", 1)
        return time.monotonic() - began


def _nothing(_):
    pass


@pytest.mark.parametrize(("seed", "crashes"), [(0, 3), pytest.param(1, 30, marks=pytest.mark.long)])
async def test_a_crash_of_postgresql_loses_and_invents_nothing(tmp_path, seed, crashes):
    """What needs no store is unharmed; what was acknowledged is there; what was refused is not, or has failed there too.

    It works again within five seconds of the database, without a restart. At each second crash commits are done and not
    answered.
    """
    rng = random.Random(seed)
    clients = Clients(rng)
    told, recovered = clients.told, []
    async with cluster() as database, clients.model, nursery(tmp_path, OPENLINE_SEALING_KEY="0" * 64) as makes:
        config = tmp_path / "openline.toml"
        config.write_text(CONFIG.format(spec=database.url, upstream=clients.model.url))
        server = await makes.start("--config", str(config))
        async with api_of(server.url) as api:
            talking = [asyncio.ensure_future(each.talk(api)) for each in [*clients.storing, *clients.others]]
            for crash in range(crashes):
                await clients.until_completed()
                if crash % 2:
                    await database.hold_commits()
                else:
                    await clients.until(rng.choice(["word", "answer", "end"]), rng.randint(1, 30))
                    await asyncio.sleep(rng.uniform(0, 0.01))
                unstored = told.unstored
                await database.crash()
                await asyncio.sleep(rng.choice([0, 0.5]))
                await database.start()
                recovered.append(await clients.until_completed())
                assert told.unstored > unstored
            clients.leave()
            await asyncio.gather(*talking)
            assert max(recovered) < RECOVERY_SECONDS_MAX
            assert not clients.model.misled
            assert set(told.refused.values()) <= {"store_unavailable"}
            assert not [each for each in told.refused if each.startswith("o")]
            await check_completed(api, told, told.completed)
            await check_refused(api, told, SWEPT_SECONDS_MAX)
        assert "Traceback" not in server.says()
        await server.stop()
        store = PostgresStore(database.url, pool_connections_max=1)
        try:
            rows = await check_rows(store, told)
        finally:
            await store.close()
    figures = f"{len(told.completed)} completed, {told.unstored} unstored, {len(told.refused)} refused, rows={rows}"
    print(f"seed {seed}: {crashes} crashes, slowest recovery {max(recovered):.2f} s, {figures}")  # noqa: T201 - with -s
