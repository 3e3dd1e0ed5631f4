"""The disk of a running server fails, fills up, becomes read-only or slow, or another program locks the database.

A turn that needs no store goes on as if nothing were wrong. One that is to be kept is refused with `store_unavailable`, and
never completes without its row; what was refused is not there. Once the fault is over it works again, without a restart.

Source: guarantees, "Durability" and "Database faults"; docs/adr/0012.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import random
import shutil
import sqlite3
import subprocess
import time
from contextlib import asynccontextmanager, contextmanager

import pytest

from durability.faulty_disk import FaultyDisk
from durability.serving import nursery
from durability.world import (
    OPEN,
    WAYS,
    ModelServer,
    Talker,
    Told,
    api_of,
    check_completed,
    check_refused,
    check_rows,
    check_unseen,
)
from openline.state.sqlite import SqliteStore

RECOVERY_SECONDS_MAX = 5  # guarantee of database faults
SWEPT_SECONDS_MAX = 5
TURNS = 3  # of each client in each state of the disk
CONFIG = """
[resume]
lease_seconds = 0.5

[[upstreams]]
kind = "chat"
url = "{upstream}"
"""


class Scene:
    """A server on a disk, its model server, and one client of each way, once with `store: true` and once with `false`."""

    def __init__(self, model: ModelServer, told: Told, database) -> None:
        self.model = model
        self.told = told
        self.database = database
        self.storing = [Talker(f"storing-{way}", way, model, told, _nothing) for way in WAYS]
        unstored = [way for way in WAYS if way != "conversation"]  # which is kept, whatever `store` says
        self.recovered: list[float] = []  # seconds from each fault's end
        self.others = [Talker(f"other-{way}", way, model, told, _nothing, store=False) for way in unstored]

    async def talk(self, api, *, turns=TURNS):
        """So many turns of each client, all clients at once."""
        await asyncio.gather(*(self.turns(each, api, turns) for each in [*self.storing, *self.others]))

    @staticmethod
    async def turns(talker, api, turns):
        """A new conversation of one client."""
        async with api.socket() if talker.way == "socket" else contextlib.nullcontext() as socket:
            talker.restart()
            for _ in range(turns):
                await talker.turn(api, socket)

    async def works_again(self, api):
        """A turn that is to be kept completes in time."""
        began, count = time.monotonic(), len(self.told.completed)
        while len(self.told.completed) == count:
            await self.storing[0].turn(api)
            assert time.monotonic() - began < RECOVERY_SECONDS_MAX
        self.recovered.append(time.monotonic() - began)

    async def check(self, api):
        """What was told to be completed is there, and what was refused is not, or not as if it had gone well."""
        await check_completed(api, self.told, self.told.completed)
        for response_id in [each for each in self.told.refused if each.startswith("resp_")]:
            assert await check_unseen(api, response_id, "") in {"gone", "failed", *OPEN}
        assert not self.model.misled


def _nothing(_):
    pass


@asynccontextmanager
async def on_a_disk(tmp_path, folder, environ):
    """The scene, a server, and a way to kill it and to start another."""
    model = ModelServer(random.Random(0), _nothing)
    async with model, nursery(tmp_path, **environ) as makes:
        config = tmp_path / "openline.toml"
        config.write_text(CONFIG.format(upstream=model.url))
        scene = Scene(model, Told(), folder / "openline.db")

        async def start():
            return await makes.start("--config", str(config), "--store", f"sqlite:{scene.database}")

        yield scene, start


async def suffer(scene, api, fault, *, turns=TURNS, refuses_all=True):
    """One fault, from before to after it."""
    told = scene.told
    completed, unstored = len(told.completed), told.unstored
    with fault:
        await scene.talk(api, turns=turns)
        assert told.unstored == unstored + turns * len(scene.others)
        assert set(told.refused.values()) == {"store_unavailable"}
        if refuses_all:
            assert len(told.completed) == completed
        await check_completed(api, told, list(told.completed)[:completed])
    await scene.works_again(api)
    await scene.talk(api, turns=1)
    await scene.check(api)


async def survive(scene, start, server):
    """A kill: what was told before it holds after it."""
    assert "Traceback" not in server.says()
    await server.kill()
    server = await start()
    refused = len(scene.told.refused)
    async with api_of(server.url) as api:
        await scene.check(api)
        await scene.talk(api, turns=1)
        assert len(scene.told.refused) == refused
        await check_refused(api, scene.told, SWEPT_SECONDS_MAX)
    await server.stop()
    store = SqliteStore(scene.database)
    try:
        await check_rows(store, scene.told)
    finally:
        await store.close()
    figures = (
        f"{len(scene.told.completed)} completed, {scene.told.unstored} unstored, {len(scene.told.refused)} refused"
    )
    print(f"slowest recovery {max(scene.recovered):.2f} s, {figures}")  # noqa: T201 - the figures, with -s


FAULTS = {
    "each fsync fails": {"fsync_fails_every": 1},
    "each third fsync fails": {"fsync_fails_every": 3},
    "each seventh fsync fails": {"fsync_fails_every": 7},
    "full disk": {"write_errno": errno.ENOSPC},
    "I/O error": {"write_errno": errno.EIO},
    "read-only": {"write_errno": errno.EROFS, "open_errno": errno.EROFS, "fsync_fails_every": 1},
}


@pytest.fixture
def folder(tmp_path):
    """What is on the disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def disk(folder, tmp_path):
    return FaultyDisk(folder, tmp_path)


async def test_a_failing_disk_harms_only_what_is_to_be_kept(tmp_path, folder, disk):
    """One fault after the other: what is to be kept is refused, and never acknowledged without being durable."""

    @contextmanager
    def failing(name):
        failures = disk.orders.failures
        disk.orders.obey(**FAULTS[name])
        yield
        assert disk.orders.failures > failures
        disk.orders.obey()

    async with on_a_disk(tmp_path, folder, disk.environ) as (scene, start):
        server = await start()
        async with api_of(server.url) as api:
            await scene.talk(api)
            assert len(scene.told.completed) == TURNS * len(scene.storing)
            for name, orders in FAULTS.items():
                await suffer(scene, api, failing(name), refuses_all=orders.get("fsync_fails_every", 1) == 1)
        await survive(scene, start, server)


async def test_a_locked_database_harms_only_what_is_to_be_kept(tmp_path):
    """Another program holds the write lock for longer than a write waits for it."""

    @contextmanager
    def locked():
        with contextlib.closing(sqlite3.connect(tmp_path / "openline.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield

    async with on_a_disk(tmp_path, tmp_path, {}) as (scene, start):
        server = await start()
        async with api_of(server.url) as api:
            await scene.talk(api)
            await suffer(scene, api, locked(), turns=1)
        await survive(scene, start, server)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB; where none may be mounted the test is skipped."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=4m", "openline-test", folder]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


async def test_a_disk_without_a_byte_left_harms_only_what_is_to_be_kept(tmp_path, small_disk):
    """The same where the kernel says it."""

    @contextmanager
    def full():
        filler = small_disk / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield
        filler.unlink()

    async with on_a_disk(tmp_path, small_disk, {}) as (scene, start):
        server = await start()
        async with api_of(server.url) as api:
            await scene.talk(api)
            await suffer(scene, api, full())
        await survive(scene, start, server)


async def test_a_slow_disk_holds_up_only_what_is_to_be_kept(tmp_path, folder, disk):
    """While one response waits for its fsync, however long, others that need none begin and end."""
    async with on_a_disk(tmp_path, folder, disk.environ) as (scene, start):
        server = await start()
        async with api_of(server.url) as api:
            await scene.storing[0].turn(api)
            disk.orders.obey(fsync_waits=True)
            slow = asyncio.ensure_future(scene.storing[0].turn(api))
            await asyncio.gather(*(scene.turns(other, api, TURNS) for other in scene.others))
            assert not slow.done()
            disk.orders.obey()
            await slow
            await scene.check(api)
            assert (len(scene.told.completed), len(scene.told.refused)) == (2, 0)
        await server.kill()
