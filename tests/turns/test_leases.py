"""Background turns and the processes that run them: each process is a registry, with a store of its own on one database."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from openline.protocol.deltas import TextDelta
from openline.state.nothing import NothingStore
from openline.state.sqlite import SqliteStore
from openline.state.store import UNFINISHED_MAX, StoredTurn, StoreUnavailable
from openline.turns.leases import cancel_elsewhere, keep_leases, renew, sweep
from openline.turns.log import Window
from server.hand import Hand
from state.stores import KEEPING
from state.stores import place as made_place
from turns.in_background import NOW, Clock, begun, ended, registry_of, request

LEASE = 15

each_kept = pytest.mark.parametrize("place", KEEPING, indirect=True)
shared = pytest.mark.parametrize("place", [kind for kind in KEEPING if kind != "sqlite memory"], indirect=True)


@pytest.fixture
async def place(request, tmp_path):
    """Where a database of this kind is."""
    async with made_place(request.param, tmp_path) as place:
        yield place


class Process:
    """What one process has: a store, an engine, and a registry of its turns."""

    def __init__(self, store, clock):
        self.store = store
        self.clock = clock
        self.hand = Hand()
        self.registry = registry_of(self.hand, store, clock)

    async def begun(self, *said, **fields):
        """A turn that has said this and goes on."""
        turn, engine = await begun(self.registry, self.hand, **fields)
        engine.give(*map(TextDelta, said))
        await asyncio.wait_for(engine.asked.wait(), 5)
        return turn, engine

    async def renew(self):
        await renew(self.registry.held, self.store, int(self.clock.now) + LEASE)

    async def sweep(self):
        return await sweep(self.store, int(self.clock.now))

    async def row(self, turn):
        return await self.store.get(turn.request.owner, turn.id)


@pytest.fixture
async def process(place):
    """One process."""
    process = Process(place.make(), Clock())
    yield process
    await process.registry.close()


@pytest.fixture
async def processes(place):
    """Two on one database, with one clock."""
    clock = Clock()
    both = Process(place.make(), clock), Process(place.make(), clock)
    yield both
    for process in both:
        await process.registry.close()


def response_of(row):
    return json.loads(row.response)


# --- A row, and its lease


@each_kept
async def test_an_unfinished_row_has_a_lease(process):
    """From before its client knows it: its input, no output, not to be continued, and a lease (docs/adr/0007)."""
    turn, engine = await process.begun("One ", input="Hi?")
    row = await process.row(turn)
    assert (row.status, row.chainable, row.lease_until) == ("in_progress", False, NOW + LEASE)
    assert b"Hi?" in row.input
    assert (response_of(row)["output"], response_of(row)["status"]) == ([], "in_progress")
    engine.answer("two.")
    await asyncio.wait({turn.task})
    row = await process.row(turn)
    assert (row.status, row.chainable, row.lease_until) == ("completed", True, None)
    assert response_of(row) == turn.log.response


@each_kept
async def test_a_lease_is_never_too_short(process):
    """The clock's fractions count in favour of the process (docs/adr/0007)."""
    process.clock.now = NOW + 0.9
    turn, _ = await process.begun()
    assert (await process.row(turn)).lease_until == NOW + LEASE + 1


@each_kept
async def test_the_leases_of_what_runs_are_renewed(process):
    """Of stored ones only; those that have ended are left alone (docs/adr/0007)."""
    running, _ = await process.begun("One ")
    unstored, _ = await process.begun("One ", store=False)
    done = await ended(process.registry, process.hand)
    process.clock.now += 10
    await process.renew()
    assert (await process.row(running)).lease_until == NOW + 10 + LEASE
    assert await process.row(unstored) is None
    assert not unstored.log.ended
    assert (await process.row(done)).lease_until is None


@each_kept
async def test_without_anything_that_runs_nothing_is_written(process):
    """An idle server does not wake its disk."""
    await ended(process.registry, process.hand)
    await process.store.close()
    await process.renew()


async def test_one_that_was_stopped_before_its_row_stood_is_refused(tmp_path):
    """Its client gets an error and no id, for what may not be kept is not acknowledged (guarantees, "Durability")."""

    class Stuck(SqliteStore):
        async def put(self, owner, turn, **more):
            asked.set()
            await asyncio.Event().wait()

    asked = asyncio.Event()
    store = Stuck(tmp_path / "stuck.db")
    registry = registry_of(Hand(), store)
    turn = registry.start(request(), Window(1_000_000))
    await asyncio.wait_for(asked.wait(), 5)
    await registry.close()
    assert (len(turn.log), turn.log.refusal.code) == (0, "request_cancelled")
    assert repr(registry.held) == "<Held turns=0 ended=0 bytes=0>"
    await store.close()


# --- A process that is gone


@shared
async def test_what_lost_its_process_is_failed_by_another(processes):
    """Once its lease has run out, and not before; it says why, and keeps who asked for what (docs/adr/0007)."""
    gone, other = processes
    turn, _ = await gone.begun("One ", input="Hi?", metadata={"k": "v"})
    for later in (0, LEASE):
        other.clock.now = NOW + later
        assert await other.sweep() == 0
        assert (await other.row(turn)).status == "in_progress"
    other.clock.now = NOW + LEASE + 1
    assert await other.sweep() == 1
    assert await other.sweep() == 0
    row = await other.row(turn)
    response = response_of(row)
    assert (row.status, row.lease_until, row.chainable) == ("failed", None, False)
    assert (response["status"], response["error"]["code"], response["completed_at"]) == ("failed", "server_error", None)
    assert (response["metadata"], response["id"], b"Hi?" in row.input) == ({"k": "v"}, turn.id, True)


@shared
async def test_what_is_renewed_is_never_swept(processes):
    """However long it runs, as long as its process says so in time."""
    runs, other = processes
    turn, engine = await runs.begun("One ")
    for _ in range(20):
        runs.clock.now += LEASE - 1
        await runs.renew()
        assert await other.sweep() == 0
    engine.answer("two.")
    await asyncio.wait({turn.task})
    other.clock.now += 10 * LEASE
    assert await other.sweep() == 0
    assert (await other.row(turn)).status == "completed"


@shared
async def test_more_than_one_read_gives_are_all_failed(processes):
    """A sweep goes on until nothing is left (docs/adr/0007)."""
    gone, other = processes
    count = UNFINISHED_MAX + 5
    turn, _ = await gone.begun()
    row = await gone.row(turn)
    for number in range(count - 1):
        await gone.store.put("local", StoredTurn(**{**_fields(row), "response_id": f"resp_{number}"}))
    other.clock.now += LEASE + 1
    assert await other.sweep() == count
    assert await other.store.unfinished(2 * NOW) == []


def _fields(row):
    return {name: getattr(row, name) for name in row.__struct_fields__}


async def test_what_has_ended_after_all_stays_as_it_ended(tmp_path):
    """Its process comes back between the look and the write: the finished row stays, and the others are failed."""

    class Racing(SqliteStore):
        async def unfinished(self, now):
            lost = await super().unfinished(now)
            if not engine.closed.is_set():
                engine.answer("In time.")
                await asyncio.wait({turn.task})
            return lost

    store = Racing(tmp_path / "racing.db")
    process = Process(store, Clock())
    turn, engine = await process.begun()
    other, _ = await process.begun()
    process.clock.now += LEASE + 1
    assert await process.sweep() == 1
    assert (await process.row(turn)).status == "completed"
    assert (await process.row(other)).status == "failed"
    await process.registry.close()
    await store.close()


@shared
async def test_a_process_that_was_taken_for_gone_takes_the_others_word(processes):
    """It was slow, not dead: its response is failed everywhere, not failed here and completed there (docs/adr/0007)."""
    slow, other = processes
    turn, engine = await slow.begun("One ")
    other.clock.now += LEASE + 1
    await other.sweep()
    engine.answer("two.")
    await asyncio.wait({turn.task})
    row = await other.row(turn)
    assert row.status == "failed"
    assert turn.log.response == response_of(row)
    assert json.loads(turn.log.events()[-1])["type"] == "response.failed"


@each_kept
async def test_ours_are_renewed_before_others_are_swept(process):
    """A process that was stopped for a minute does not fail what it runs itself."""
    turn, _ = await process.begun()
    process.clock.now += 60
    async with keeping(process):
        await until_lease(process.store, turn, NOW + 60 + LEASE)
    assert (await process.row(turn)).status == "in_progress"


# --- Ended by another process


@shared
async def test_a_cancel_reaches_the_process_that_runs_it(processes):
    """Any process can cancel: the row at once, the upstream when its process renews (docs/adr/0007)."""
    runs, other = processes
    turn, engine = await runs.begun("One ")
    neighbour, _ = await runs.begun("One ")
    await cancel_elsewhere(other.store, "local", await other.row(turn))
    cancelled = await other.row(turn)
    assert (cancelled.status, response_of(cancelled)["status"]) == ("cancelled", "cancelled")
    assert not engine.closed.is_set()
    await runs.renew()
    assert engine.closed.is_set()
    assert turn.log.response == response_of(await other.row(turn))
    assert turn.log.response["status"] == "cancelled"
    assert not neighbour.log.ended
    assert (await other.row(neighbour)).status == "in_progress"


@shared
async def test_a_cancel_that_comes_too_late_changes_nothing(processes):
    """What has ended stays as it ended (Responses API reference, "Cancel")."""
    runs, other = processes
    turn, engine = await runs.begun()
    seen = await other.row(turn)
    engine.answer("Hi.")
    await asyncio.wait({turn.task})
    await cancel_elsewhere(other.store, "local", seen)
    assert (await other.row(turn)).status == "completed"


@shared
async def test_what_another_process_deleted_does_not_come_back(processes):
    """It is stopped when its process renews, or ends by itself before: either way nothing of it is kept."""
    runs, other = processes
    stopped, engine = await runs.begun("One ")
    ends, other_engine = await runs.begun("One ")
    for turn in (stopped, ends):
        assert await other.store.delete("local", turn.id)
    other_engine.answer("two.")
    await asyncio.wait({ends.task})
    assert ends.log.response["status"] == "failed"
    await runs.renew()
    assert engine.closed.is_set()
    assert runs.registry.held.get("local", stopped.id) is None
    assert [await runs.row(turn) for turn in (stopped, ends)] == [None, None]


async def test_a_store_that_keeps_nothing_ends_nothing():
    """With `--store none` nobody else can know a turn, so it goes on."""
    process = Process(NothingStore(), Clock())
    turn, engine = await process.begun("One ")
    await process.renew()
    engine.answer("two.")
    await asyncio.wait({turn.task})
    assert turn.log.response["status"] == "completed"
    await process.registry.close()


# --- The task that keeps them


@asynccontextmanager
async def keeping(process):
    """The task of a server, with short leases; it must not have ended by itself."""
    parts = registry_of(process.hand, process.store, process.clock, lease_seconds=LEASE).parts
    task = asyncio.ensure_future(keep_leases(process.registry.held, parts))
    yield
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})


async def until_lease(store, turn, least):
    """Wait until a turn's lease goes on at least to then."""
    async with asyncio.timeout(5):
        while (await store.get("local", turn.id)).lease_until < least:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.001)


class Trouble(SqliteStore):
    """A store whose leases fail as often as the test says."""

    errors: list[Exception]

    async def renew(self, turns, until):
        if self.errors:
            raise self.errors.pop()
        return await super().renew(turns, until)


@pytest.mark.parametrize(
    "error", [StoreUnavailable("it is locked"), ZeroDivisionError("a defect")], ids=["unavailable", "defect"]
)
async def test_a_store_in_trouble_ends_the_keeping_of_leases_never(tmp_path, error, caplog):
    """It is tried again a third of a lease later, and told in the log (guarantees, "Store failures")."""
    store = Trouble(tmp_path / "trouble.db")
    store.errors = [error, error]
    hand, clock = Hand(), Clock()
    registry = registry_of(hand, store, clock, lease_seconds=0.1)
    turn, _ = await begun(registry, hand)
    clock.now += 100
    task = asyncio.ensure_future(keep_leases(registry.held, registry.parts))
    await until_lease(store, turn, NOW + 100)
    assert not task.done()
    task.cancel()
    told = [record for record in caplog.records if "were not renewed" in record.getMessage()]
    assert len(told) == 2
    await registry.close()
    await store.close()


async def test_who_follows_a_deleted_one_is_told_so(tmp_path):
    """Whoever still reads it gets a failure that says why."""
    store = SqliteStore(tmp_path / "store.db")
    process = Process(store, Clock())
    turn, engine = await process.begun("One ")
    await store.delete("local", turn.id)
    engine.answer("two.")
    await asyncio.wait({turn.task})
    assert turn.log.response["error"]["message"] == f"Response with id '{turn.id}' was deleted while it ran."
    await process.registry.close()
    await store.close()
