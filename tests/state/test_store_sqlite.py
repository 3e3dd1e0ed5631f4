"""What the SQLite store promises beyond the contract: durability, group commit, faults that pass, its schema."""

import asyncio
import contextlib
import os
import random
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest

from openline.state import migrations
from openline.state.migrations import APPLICATION_ID, MIGRATIONS, migrate
from openline.state.sqlite import SqliteStore
from openline.state.store import Appended, Conversation, ConversationItem, NotAppended, StoredTurn, StoreUnavailable
from state.stores import until

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX file modes and limits")


def turn(response_id, parent_id=None, *, created_at=1_760_000_000, body=b"[]", lease_until=None):
    return StoredTurn(
        response_id=response_id,
        parent_id=parent_id,
        created_at=created_at,
        status="completed",
        chainable=True,
        input=body,
        response=b"{}",
        lease_until=lease_until,
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store.db"


@pytest.fixture
async def store(path):
    """A store in a file, impatient about locks."""
    store = SqliteStore(path, lock_wait_seconds_max=0.05)
    yield store
    await store.close()


@contextlib.asynccontextmanager
async def writer_busy(store, statements=None):
    """Hold the writer at the BEGIN of one write, so that what is put meanwhile waits in its queue."""
    began, go_on = threading.Event(), threading.Event()

    def hold(statement):
        if statements is not None:
            statements.append(statement)
        if statement.startswith("BEGIN"):
            began.set()
            go_on.wait()

    store._file._writer.set_trace_callback(hold)
    first = asyncio.create_task(store.put("ann", turn("resp_first")))
    await asyncio.to_thread(began.wait)
    try:
        yield
    finally:
        go_on.set()
        await first


async def started(*calls):
    """The calls as tasks that have run up to their first wait."""
    tasks = [asyncio.create_task(call) for call in calls]
    await asyncio.sleep(0)
    return tasks


# --- Durability ------------------------------------------------------------------------------------


async def test_commits_reach_the_disk(store):
    """WAL with synchronous=FULL (2): a commit returns after the fsync of the log (G19)."""
    assert store._file._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store._file._writer.execute("PRAGMA synchronous").fetchone() == (2,)


async def test_an_acknowledged_turn_is_in_the_file(store, path):
    """Once put returns, any other connection finds the turn."""
    await store.put("ann", turn("resp_1"))
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT owner, response_id FROM turns").fetchall() == [("ann", "resp_1")]


WRITING_CHILD = """
import asyncio, os, sys
from pathlib import Path
from openline.state.sqlite import SqliteStore
from openline.state.store import StoredTurn

async def write(store, name):
    for number in range(100_000):
        response_id = f"{name}_{number}"
        await store.put("ann", StoredTurn(response_id, None, 0, "completed", True, b"[]", b"{}" + b" " * 2000))
        os.write(1, response_id.encode() + b"\\n")

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    async with asyncio.TaskGroup() as group:
        for name in range(8):
            group.create_task(write(store, name))

asyncio.run(main())
"""


def kill_while_it_writes(path, acknowledged_min):
    """What a writing process had acknowledged when it was killed."""
    with subprocess.Popen([sys.executable, "-c", WRITING_CHILD, str(path)], stdout=subprocess.PIPE) as child:
        lines = [child.stdout.readline() for _ in range(acknowledged_min)]
        child.kill()
        lines += child.stdout.readlines()
    return [line.strip().decode() for line in lines if line.endswith(b"\n")]


@pytest.mark.parametrize("attempt", range(5))
async def test_kill_9_loses_no_acknowledged_turn(path, attempt):
    """Killed at a random point, every turn whose put had returned is there and the database intact (G19)."""
    acknowledged_min = random.randint(1, 500)
    acknowledged = await asyncio.to_thread(kill_while_it_writes, path, acknowledged_min)
    assert len(acknowledged) >= acknowledged_min
    store = SqliteStore(path)
    try:
        lost = [each for each in acknowledged if await store.get("ann", each) is None]
        assert not lost, f"killed after {acknowledged_min} acknowledgements"
        assert store._file._writer.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finally:
        await store.close()


async def test_the_first_write_does_not_wait_long_for_a_reader(path):
    """It empties the log if it can (docs/adr/0012); others who would write wait for that, and must not give up over it."""
    before = SqliteStore(path)
    await before.put("ann", turn("resp_0"))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM turns").fetchall()
        await before.put("ann", turn("resp_1"))
        store = SqliteStore(path, lock_wait_seconds_max=1.6)
        began = time.monotonic()
        await store.put("ann", turn("resp_2"))
        assert 0.5 < time.monotonic() - began < 1.6
        assert store._file._writer.execute("PRAGMA busy_timeout").fetchone() == (1600,)
    await store.close()
    await before.close()


async def test_close_commits_what_waits(store, path):
    """Writes that were accepted before close are durable after it."""
    async with writer_busy(store):
        puts = await started(*(store.put("ann", turn(f"resp_{number}")) for number in range(20)))
        closing = asyncio.create_task(store.close())
    await asyncio.gather(*puts, closing)
    with contextlib.closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT count(*) FROM turns").fetchone() == (21,)


async def test_close_leaves_one_file(store, path):
    """Closed in order, the log is folded into the database."""
    await store.put("ann", turn("resp_1"))
    await store.get("ann", "resp_1")
    await store.close()
    assert list(path.parent.iterdir()) == [path]


async def test_a_cancelled_put_is_committed_all_the_same(store):
    """Cancelling stops the waiting, not the write."""
    async with writer_busy(store):
        (put,) = await started(store.put("ann", turn("resp_1")))
        put.cancel()
    with pytest.raises(asyncio.CancelledError):
        await put
    await store.put("ann", turn("resp_2"))
    assert await store.get("ann", "resp_1") is not None


# --- Cost ------------------------------------------------------------------------------------------


async def test_writes_that_wait_share_one_transaction(store):
    """Group commit: one fsync pays for everything in the queue."""
    statements = []
    async with writer_busy(store, statements):
        puts = await started(*(store.put("ann", turn(f"resp_{number}")) for number in range(50)))
    await asyncio.gather(*puts)
    assert statements.count("COMMIT") == 2


async def test_a_chain_costs_one_query(store):
    """Reading a chain is one statement, however long it is."""
    await asyncio.gather(*(store.put("ann", turn(str(n), str(n - 1) if n else None)) for n in range(200)))
    statements = []
    store._file._reader.set_trace_callback(statements.append)
    chain = await store.chain("ann", "199")
    assert [each.response_id for each in chain] == [str(n) for n in range(200)]
    assert len(statements) == 1


async def test_a_conversation_costs_one_query(store):
    """Reading all items for a turn's context is one statement, however many there are."""
    items = tuple(ConversationItem(f"item_{n}", b"{}") for n in range(200))
    await store.create_conversation("ann", Conversation("conv_1", 0, b"{}"), items)
    statements = []
    store._file._reader.set_trace_callback(statements.append)
    assert await store.all_items("ann", "conv_1") == list(items)
    assert len(statements) == 1


async def test_a_renewed_lease_rewrites_no_content(store, path):
    """A lease is renewed every few seconds, and what the turn holds may be megabytes: the log gets a few pages."""
    await store.put("ann", turn("resp_1", body=b"x" * 5_000_000, lease_until=1_760_000_000))
    store._file._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    await store.renew([("ann", "resp_1")], 1_760_000_015)
    assert path.with_name("store.db-wal").stat().st_size < 10 * 4200
    assert (await store.get("ann", "resp_1")).lease_until == 1_760_000_015


async def test_a_chain_is_read_without_its_events(store):
    """They may be many times as long as what a chain is read for."""
    await store.put("ann", turn("resp_1"), events=b"event")
    statements = []
    store._file._reader.set_trace_callback(statements.append)
    await store.get("ann", "resp_1")
    await store.chain("ann", "resp_1")
    assert statements
    assert not any("events" in statement for statement in statements)


async def test_a_full_queue_refuses_and_the_rest_is_kept(path):
    """The queue of writes is bounded; one more is refused at once, and nothing of it is kept."""
    store = SqliteStore(path, writes_queued_max=2)
    async with writer_busy(store):
        assert "queued=0" in repr(store)
        puts = await started(store.put("ann", turn("resp_1")), store.put("ann", turn("resp_2")))
        assert "queued=2" in repr(store)
        with pytest.raises(StoreUnavailable, match="2 writes wait"):
            await store.put("ann", turn("resp_3"))
    await asyncio.gather(*puts)
    assert await store.get("ann", "resp_2") is not None
    assert await store.get("ann", "resp_3") is None
    await store.close()


@pytest.mark.parametrize(
    "bad",
    [turn("resp_first"), turn("\ud800"), turn("resp_x", created_at=2**63), turn("resp_y", body=object())],
    ids=["duplicate", "surrogate", "integer", "type"],
)
async def test_a_bad_write_does_not_fail_its_neighbours(store, bad):
    """Writes of one transaction fail on their own."""
    async with writer_busy(store):
        calls = (store.put("ann", turn("resp_1")), store.put("ann", bad), store.put("ann", turn("resp_2")))
        puts = await started(*calls)
    before, failed, after = await asyncio.gather(*puts, return_exceptions=True)
    assert (before, isinstance(failed, StoreUnavailable), after) == (None, True, None)
    assert await store.get("ann", "resp_1") is not None
    assert await store.get("ann", "resp_2") is not None


async def has_queued(store, count):
    return f"queued={count}" in repr(store)


@pytest.mark.parametrize("saves", ["a child", "a mark"])
async def test_what_is_continued_while_a_purge_looks_stays(store, saves):
    """Between the search and the deletion somebody may have gone on: each turn is checked again when it goes."""
    await store.put("ann", turn("resp_0", created_at=1))
    await store.put("ann", turn("resp_1", "resp_0", created_at=1))
    async with writer_busy(store):
        going_on = store.put("ann", turn("resp_2", "resp_1")) if saves == "a child" else store.used("ann", "resp_1", 99)
        (saved,) = await started(going_on)
        purge = asyncio.create_task(store.purge(50, 10))
        await until(partial(has_queued, store, 2))  # it has looked, and found both
    await asyncio.gather(saved, purge)
    assert len(await store.chain("ann", "resp_1")) == 2
    assert purge.result() == 0


async def test_a_refused_write_of_many_does_not_fail_its_neighbours(store):
    """A turn with its events and items is taken back whole, between others that are committed with it."""
    unknown = Appended("conv_1", (ConversationItem("item_1", b"{}"),), 0)
    async with writer_busy(store):
        calls = (
            store.put("ann", turn("resp_1"), events=b"event"),
            store.put("ann", turn("resp_2"), events=b"event", appends=unknown),
            store.put("ann", turn("resp_3"), events=b"event"),
        )
        puts = await started(*calls)
    outcomes = await asyncio.gather(*puts, return_exceptions=True)
    assert [isinstance(outcome, NotAppended) for outcome in outcomes] == [False, True, False]
    assert [await store.events("ann", f"resp_{n}") for n in (1, 2, 3)] == [b"event", None, b"event"]


async def test_a_full_disk_in_the_middle_of_a_write_keeps_nothing_of_it(store):
    """Not the turn, if its events do not fit; and the next write works."""
    await store.put("ann", turn("resp_0"))
    (pages,) = store._file._writer.execute("PRAGMA page_count").fetchone()
    store._file._writer.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(StoreUnavailable, match="full disk"):
        await store.put("ann", turn("resp_1"), events=b"x" * 100_000)
    assert await store.get("ann", "resp_1") is None
    await store.put("ann", turn("resp_1"))


# --- Faults: each one is named, nothing is acknowledged, and it passes without a restart (G28) -----


async def test_another_programs_lock_fails_writes_until_it_ends(store, path):
    """A write behind a lock fails in time; reads go on meanwhile."""
    await store.put("ann", turn("resp_0"))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnavailable, match="locked by another program"):
            await store.put("ann", turn("resp_1"))
        assert await store.get("ann", "resp_0") is not None
        other.execute("ROLLBACK")
    assert await store.get("ann", "resp_1") is None
    await store.put("ann", turn("resp_1"))


async def test_a_full_disk_fails_writes_until_there_is_room(store):
    """Nothing is kept of a write that does not fit; what was kept stays readable."""
    await store.put("ann", turn("resp_0"))
    (pages,) = store._file._writer.execute("PRAGMA page_count").fetchone()
    store._file._writer.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StoreUnavailable, match=r"full disk \(SQLITE_FULL\)"):
        await store.put("ann", turn("resp_1", body=b"x" * 100_000))
    assert await store.get("ann", "resp_0") is not None
    assert await store.get("ann", "resp_1") is None
    store._file._writer.execute("PRAGMA max_page_count = 1000000")
    await store.put("ann", turn("resp_1", body=b"x" * 100_000))


async def test_a_read_only_database_fails_writes_until_it_is_writable(store):
    """The reason is named, and the store opens the file anew by itself."""
    store._file._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreUnavailable, match="read-only"):
        await store.put("ann", turn("resp_1"))
    await store.put("ann", turn("resp_1"))


async def test_a_connection_that_cannot_roll_back_does_not_keep_the_lock(store):
    """The one that takes its place can write at once."""

    def deny_rollback(action, argument, *_):
        denied = action == sqlite3.SQLITE_INSERT or (action == sqlite3.SQLITE_TRANSACTION and argument == "ROLLBACK")
        return sqlite3.SQLITE_DENY if denied else sqlite3.SQLITE_OK

    store._file._writer.set_authorizer(deny_rollback)
    with pytest.raises(StoreUnavailable, match="may not be opened"):
        await store.put("ann", turn("resp_1"))
    await store.put("ann", turn("resp_1"))


@contextlib.contextmanager
def file_size_limit(size):
    """Let the kernel refuse to write any file past `size`: a real I/O error."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@posix
async def test_an_io_error_fails_writes_until_it_ends(store):
    """A write that the disk refuses is not acknowledged and not there; the next one after it is."""
    await store.put("ann", turn("resp_0"))
    with file_size_limit(100_000):
        for attempt in range(3):
            with pytest.raises(StoreUnavailable, match="I/O error"):
                await store.put("ann", turn(f"resp_big_{attempt}", body=b"x" * 200_000))
        assert await store.get("ann", "resp_0") is not None
        assert await store.get("ann", "resp_big_0") is None
    await store.put("ann", turn("resp_1"))
    assert await store.chain("ann", "resp_1") is not None


@posix
async def test_a_file_that_has_gone_is_not_replaced_by_an_empty_one(store, path):
    """When it must open the file anew and it is away, it waits for it: an empty store would look like lost data."""
    await store.put("ann", turn("resp_0"))
    away = path.rename(path.with_name("away.db"))
    store._file._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreUnavailable):
        await store.put("ann", turn("resp_1"))
    assert "reopening" in repr(store)
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        await store.put("ann", turn("resp_1"))
    with pytest.raises(StoreUnavailable, match="cannot be opened"):
        await store.get("ann", "resp_0")
    away.rename(path)
    await store.put("ann", turn("resp_1"))
    assert await store.get("ann", "resp_0") is not None


@posix
async def test_a_damaged_file_is_named_and_a_mended_one_is_taken_up(store, path):
    """Garbage in the file is an error of reads and writes; the mended file is used without a restart."""
    await asyncio.gather(*(store.put("ann", turn(f"resp_{n}", body=b"x" * 5000)) for n in range(50)))
    await store.close()
    good = path.read_bytes()
    store = SqliteStore(path)
    path.write_bytes(good[:100] + b"\xff" * (len(good) - 100))
    try:
        with pytest.raises(StoreUnavailable, match="corrupt"):
            await store.get("ann", "resp_1")
        with pytest.raises(StoreUnavailable, match="corrupt"):
            await store.put("ann", turn("resp_new"))
        path.write_bytes(good)
        assert await store.get("ann", "resp_1") is not None
        await store.put("ann", turn("resp_new"))
    finally:
        await store.close()


@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "memory"])
async def test_an_unforeseen_error_does_not_end_the_writer(path, monkeypatch, in_memory):
    """Whatever goes wrong fails the writes at hand, of which nothing is kept, and only those."""
    store = SqliteStore(None if in_memory else path)

    def break_down(connection, statements):
        for statement in statements:
            connection.execute(statement.sql, statement.parameters)
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("openline.state.sqlite_file._apply", break_down)
        with pytest.raises(StoreUnavailable, match="MemoryError"):
            await store.put("ann", turn("resp_1"))
    assert await store.get("ann", "resp_1") is None
    await store.put("ann", turn("resp_1"))
    await store.close()


async def test_memory_survives_an_error():
    """A database in memory is never opened anew: that would empty it."""
    store = SqliteStore(None)
    await store.put("ann", turn("resp_0"))
    store._file._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreUnavailable, match="read-only"):
        await store.put("ann", turn("resp_1"))
    store._file._writer.execute("PRAGMA query_only = OFF")
    await store.put("ann", turn("resp_1"))
    assert await store.get("ann", "resp_0") is not None
    await store.close()


# --- Privacy ---------------------------------------------------------------------------------------


@posix
async def test_only_its_user_can_read_the_files(path):
    """The database, its log and its index are 0600, whatever the umask (G16)."""
    before = os.umask(0)
    try:
        store = SqliteStore(path)
        await store.put("ann", turn("resp_1"))
        modes = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.iterdir()}
    finally:
        os.umask(before)
    await store.close()
    assert modes == {"store.db": 0o600, "store.db-wal": 0o600, "store.db-shm": 0o600}


async def test_a_deleted_turn_is_overwritten(store, path):
    """After a delete and a close no byte of the content is in the file."""
    await store.put("ann", turn("resp_1", body=b"canary" * 3000))
    await store.put("ann", turn("resp_2", body=b"other"))
    await store.delete("ann", "resp_1")
    await store.close()
    assert b"other" in path.read_bytes()
    assert b"canary" not in path.read_bytes()


async def test_errors_and_repr_hold_no_content(store):
    """What a store says about itself and its errors names neither ids nor content (G16)."""
    await store.put("canary_owner", turn("canary_id", body=b"canary"))
    with pytest.raises(StoreUnavailable) as refused:
        await store.put("canary_owner", turn("canary_id", body=b"canary"))
    assert str(refused.value) == "it holds a turn with this id already"
    assert refused.value.__cause__ is None
    assert "canary" not in repr(store)


# --- Migrations ------------------------------------------------------------------------------------


@pytest.fixture
def connection():
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        yield connection


def version_of(connection):
    return connection.execute("PRAGMA user_version").fetchone()[0]


def test_migrations_are_named_by_their_place():
    """The list is append-only: step n is called m00n, and every such function is in it."""
    numbers = [int(step.__name__[1:4]) for step in MIGRATIONS]
    assert numbers == list(range(1, len(MIGRATIONS) + 1))
    assert [step.__name__ for step in MIGRATIONS] == sorted(name for name in vars(migrations) if name[:2] == "m0")


def test_only_missing_migrations_run_and_in_order(connection):
    """A database takes the steps that it has not taken, each once."""
    taken = []
    steps = [lambda _, step=step: taken.append(step) for step in range(3)]
    migrate(connection, steps[:1])
    migrate(connection, steps)
    migrate(connection, steps)
    assert taken == [0, 1, 2]
    assert version_of(connection) == 3
    assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)


async def open_and_write(path, number):
    store = SqliteStore(path)
    await store.put("ann", turn(f"resp_{number}"))
    await store.close()


def process(path, number):
    """What a process does that starts now."""
    asyncio.run(open_and_write(path, number))


@posix
def test_many_processes_may_start_at_once(tmp_path):
    """Those that find an empty file make its tables once, one after the other, and none of them fails."""
    with ProcessPoolExecutor(4, get_context("fork")) as processes:
        for attempt in range(20):
            path = tmp_path / f"{attempt}.db"
            list(processes.map(process, [path] * 4, range(4)))
            with contextlib.closing(sqlite3.connect(path)) as connection:
                assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
                assert connection.execute("SELECT count(*) FROM turns").fetchone() == (4,)


async def test_a_store_of_the_first_release_is_taken_up(path):
    """Its turns are there, can be continued and purged, and the file has all that a new one has."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as old:
        migrate(old, MIGRATIONS[:1])
        row = ("ann", "resp_0", None, 5, "completed", 1, b"[]", b"{}")
        old.execute("INSERT INTO turns VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
    store = SqliteStore(path)
    new = SqliteStore(None)
    try:
        assert await store.chain("ann", "resp_0") == [turn("resp_0", created_at=5)]
        schema = "SELECT type, name, tbl_name FROM sqlite_master ORDER BY name"
        assert store._file.read(schema, ()) == new._file.read(schema, ())
        await store.put("ann", turn("resp_1", "resp_0", created_at=9), events=b"event")
        assert await store.purge(8, 10) == 0
        assert await store.purge(10, 10) == 2
    finally:
        await store.close()
        await new.close()


def test_a_failing_migration_takes_all_back(connection):
    """All steps or none: a database is never between two versions."""

    def create(connection):
        connection.execute("CREATE TABLE other (x)")

    def fail(connection):
        connection.execute("CREATE TABLE turns (x)")

    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, [*MIGRATIONS, create, fail])
    assert version_of(connection) == 0
    assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def test_a_newer_database_is_refused(connection):
    """An older Openline does not touch what it does not know."""
    migrate(connection)
    connection.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreUnavailable, match=r"newer version of Openline wrote it: its schema is 99"):
        migrate(connection)


@pytest.mark.parametrize("statement", ["CREATE TABLE t (x)", "PRAGMA user_version = 1", "PRAGMA application_id = 7"])
def test_another_programs_database_is_refused(connection, statement):
    """A database that is not ours, and not empty, stays as it is."""
    connection.execute(statement)
    with pytest.raises(StoreUnavailable, match="another program's database"):
        migrate(connection)
    assert connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'turns'").fetchone() == (0,)
