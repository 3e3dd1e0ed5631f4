"""The power fails: what a store had acknowledged is on the disk, also where fsyncs have failed before.

A process that is killed loses nothing of what it has written, as the kernel still has it. Here the kernel is gone too:
only what an fsync has carried to the disk is sure to be there, and of the rest any part may be.

Source: guarantees, "Durability"; docs/adr/0012.
"""

import contextlib
import os
import random
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from durability.faulty_disk import FaultyDisk, Platter

CUTS = 15
# How often an fsync fails, in each third of a process's life: 0 is never, 1 is each.
LIVES = [(0, 1, 0), (0, 0, 1), (1, 0, 5), (0, 3, 1), (7, 1, 7), (0, 0, 0)]
PROLOGUE = """
import asyncio, os, random, sys
from pathlib import Path
from durability.faulty_disk import Orders, say
from openline.state.sqlite import SqliteStore
from openline.state.store import StoredTurn, StoreUnavailable

def turn(response_id, response=b"{}"):
    return StoredTurn(response_id, None, 0, "completed", True, b"[]", response)
"""
LIFE = """
async def write(store, name, rng):
    for number in range(8):
        response_id = f"{name}_{number}"
        response = b"{}" + b" " * rng.choice([100, 3000, 90_000])
        try:
            await store.put("ann", turn(response_id, response))
            say("a", response_id)
        except StoreUnavailable:
            say("x", response_id)

async def main(path, life, *fails):
    rng, orders = random.Random(life), Orders.at(os.environ["FAULTY_DISK_ORDERS"])
    store = SqliteStore(Path(path))
    for third, fails_every in enumerate(map(int, fails)):
        orders.obey(fsync_fails_every=fails_every)
        await asyncio.gather(*(write(store, f"{life}_{third}_{name}", rng) for name in range(4)))
    say("k", life)
    os.kill(os.getpid(), 9)

asyncio.run(main(*sys.argv[1:]))
"""
ONE_FAILURE = """
async def main(path):
    orders = Orders.at(os.environ["FAULTY_DISK_ORDERS"])
    store = SqliteStore(Path(path))
    await store.put("ann", turn("before"))
    orders.obey(fsync_fails_every=orders.fsyncs + 1)  # the next one
    try:
        await store.put("ann", turn("refused"))
    except StoreUnavailable:
        os.kill(os.getpid(), 9)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture
def folder(tmp_path):
    """What is on the disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    return folder


@pytest.fixture
def disk(folder, tmp_path):
    return FaultyDisk(folder, tmp_path)


def live(disk, code, *arguments):
    """Run a process on the disk, up to where it kills itself."""
    environ = os.environ | disk.recording() | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    ran = subprocess.run([sys.executable, "-c", PROLOGUE + code, *map(str, arguments)], env=environ, check=False)
    assert ran.returncode == -9


def rows(database):
    """The ids of the turns in a database that must be intact."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {response_id for (response_id,) in connection.execute("SELECT response_id FROM turns")}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(1, 20))])
def test_what_was_acknowledged_survives_a_power_cut(folder, disk, tmp_path, seed):
    """At any moment, also when earlier fsyncs have failed and processes were killed in the middle of that.

    What was refused is not there, but for what was being written when its process was killed on a disk that still failed.
    """
    rng = random.Random(seed)
    for number, fails in enumerate(rng.sample(LIVES, len(LIVES))):
        live(disk, LIFE, folder / "store.db", f"{rng.random()}_{number}", *fails)
    records = disk.recorded()
    moments = {index for index, record in enumerate(records) if record.kind in "ax"}
    moments = {*rng.sample(sorted(moments), CUTS), len(records) - 1}
    platter = Platter()
    acknowledged, refused = set(), set()
    unsettled, left_open = set(), set()  # refused since an fsync last worked; the same when a process was killed
    for index, record in enumerate(records):
        match record.kind:
            case "a":
                acknowledged.add(record.name)
            case "x":
                refused.add(record.name)
                unsettled.add(record.name)
            case "k":
                left_open |= unsettled
                unsettled = set()
            case _:
                if record.kind == "f" and not record.failed:
                    unsettled = set()
                platter.take(record)
        if index in moments:
            platter.after_power_cut(tmp_path / "found", rng)
            found = rows(tmp_path / "found" / "store.db")
            assert acknowledged <= found, f"cut at record {index} of {len(records)}"
            assert not found & (refused - unsettled - left_open), f"cut at record {index} of {len(records)}"
    found = rows(folder / "store.db")  # if only the last process had been killed
    assert acknowledged <= found
    assert not found & (refused - left_open)
    assert len(acknowledged) > 100
    assert disk.orders.failures > 20


def test_what_was_refused_is_gone_before_it_is_told(folder, disk):
    """Over one failed fsync, and its process is killed at once: nobody finds a turn later that was told as failed."""
    live(disk, ONE_FAILURE, folder / "store.db")
    assert disk.orders.failures == 1
    assert rows(folder / "store.db") == {"before"}
