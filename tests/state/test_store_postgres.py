"""What the PostgreSQL store promises beyond the contract: one query, faults that pass, many that start at once."""

import asyncio
import random
import sys
import time
from contextlib import asynccontextmanager
from functools import partial
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest

from openline.config import ConfigError, StoreSettings
from openline.state.opening import start_store
from openline.state.postgres import PostgresStore
from openline.state.postgres_migrations import MIGRATIONS, migrate
from openline.state.postgres_pool import unavailable
from openline.state.store import (
    AlreadyKept,
    Appended,
    ConversationItem,
    DuplicateItem,
    Key,
    KeyTaken,
    NotUnfinished,
    StoreUnavailable,
)
from state.proxy import Proxy
from state.stores import (
    WAIT_SECONDS_MAX,
    appended,
    conversation,
    items,
    postgres,
    postgres_schema,
    turn,
    until,
    with_options,
)

RECOVERY_SECONDS_MAX = 5  # guarantee of database faults


@pytest.fixture
async def url():
    """The URL of a schema of its own."""
    async with postgres_schema() as url:
        yield url


@pytest.fixture
async def connection(url):
    """A connection that is not the store's, to look and to interfere."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()


@asynccontextmanager
async def opened(url, **options):
    """A store, on its newest schema."""
    store = PostgresStore(url, **({"pool_connections_max": 2} | options))
    try:
        await store.open()
        yield store
    finally:
        await store.close()


@pytest.fixture
async def proxy(url):
    async with Proxy(url) as proxy:
        yield proxy


@asynccontextmanager
async def heard(store):
    """The queries of a store that has one connection."""
    queries = []
    held = await store._pool._pool.acquire()
    held.add_query_logger(lambda record: queries.append(record.query))
    await store._pool._pool.release(held)
    yield queries


async def works_again(store):
    """It does, in time, without being opened anew."""
    began = time.monotonic()
    while True:
        try:
            return await store.put("ann", turn(f"resp_{time.monotonic_ns()}"))
        except StoreUnavailable:
            assert time.monotonic() - began < RECOVERY_SECONDS_MAX


# --- Cost ------------------------------------------------------------------------------------------


async def test_a_call_costs_one_query(url):
    """A turn is put, got and continued, and a conversation read, in one query each, however long they are."""
    async with opened(url, pool_connections_max=1) as store:
        for number in range(100):
            await store.put("ann", turn(str(number), str(number - 1) if number else None))
        await store.create_conversation("ann", conversation(), items(*map(str, range(100))))
        async with heard(store) as queries:
            assert len(await store.chain("ann", "99")) == 100
            assert len(queries) == 1
            assert len(await store.all_items("ann", "conv_1")) == 100
            assert len(queries) == 2
            await store.put("ann", turn("resp_1"))
            await store.get("ann", "resp_1")
            assert len(queries) == 4
            assert not any("events" in query for query in queries)


async def test_connections_are_bounded_and_shared(url):
    """However many call at once, no more connections than were allowed; the rest wait."""
    async with Proxy(url) as proxy, opened(proxy.url, pool_connections_max=3) as store:
        await asyncio.gather(*(store.put("ann", turn(f"resp_{number}")) for number in range(100)))
        assert proxy.connections <= 3
        assert f"connections={proxy.connections} calls=0" in repr(store)


async def test_many_first_calls_connect_once(url, proxy):
    """A store that was never opened is opened by one of them; the others do not each make a pool of their own."""
    store = PostgresStore(proxy.url, pool_connections_max=2)
    await asyncio.gather(*(store.get("ann", f"resp_{number}") for number in range(50)))
    assert proxy.connections <= 2
    await store.close()


async def test_too_many_calls_are_refused(url, proxy):
    """What waits for a server that does not answer is bounded; one more is refused at once."""
    async with opened(proxy.url, calls_waiting_max=3) as store:
        proxy.stall()
        puts = [asyncio.ensure_future(store.put("ann", turn(f"resp_{number}"))) for number in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(StoreUnavailable, match="3 calls wait"):
            await store.get("ann", "resp_0")
        proxy.flow()
        await asyncio.gather(*puts)


async def test_commits_are_as_durable_as_the_server_makes_them(url, connection):
    """The store changes nothing about when a commit is on the disk (G19)."""
    async with opened(url.replace("&synchronous_commit=off", "")) as store:
        told = await store._pool.call(lambda held: held.fetchval("SHOW synchronous_commit"))
    plain = await postgres()
    assert told == await plain.fetchval("SHOW synchronous_commit")
    await plain.close()


# --- Starting --------------------------------------------------------------------------------------


async def test_many_may_start_at_once(url, connection):
    """Processes that find an empty database make its tables once, and none of them fails."""
    stores = [PostgresStore(url, pool_connections_max=1) for _ in range(8)]
    try:
        await asyncio.gather(*(store.open() for store in stores))
        await asyncio.gather(*(store.put("ann", turn(f"resp_{n}")) for n, store in enumerate(stores)))
        assert await connection.fetch("SELECT version FROM openline_schema") == [(len(MIGRATIONS),)]
    finally:
        for store in stores:
            await store.close()


async def test_only_missing_migrations_run(connection):
    """A database takes the steps that it has not taken, each once, and all or none of them."""
    steps = ["CREATE TABLE step_1 (x int)", "CREATE TABLE step_2 (x int)"]
    await migrate(connection, steps[:1])
    with pytest.raises(asyncpg.UndefinedTableError):
        await migrate(connection, [*steps, "INSERT INTO step_3 VALUES (1)"])
    assert await connection.fetchval("SELECT to_regclass('step_2')") is None
    for _ in range(2):
        await migrate(connection, steps)
    assert await connection.fetchval("SELECT version FROM openline_schema") == 2


async def test_a_newer_database_is_refused(url, connection):
    """An older Openline does not touch what it does not know."""
    async with opened(url):
        pass
    await connection.execute("UPDATE openline_schema SET version = 99")
    with pytest.raises(StoreUnavailable, match="newer version of Openline wrote it: its schema is 99"):
        async with opened(url):
            pass


async def test_a_user_who_may_not_make_tables_can_use_them(url, connection):
    """Once they are there, reading and writing them is all it needs."""
    async with opened(url):
        pass
    role, schema = "openline_plain_user", await connection.fetchval("SELECT current_schema()")
    await connection.execute(
        f"""
        DO $$ BEGIN CREATE ROLE {role} LOGIN; EXCEPTION WHEN duplicate_object OR unique_violation THEN END $$;
        GRANT USAGE ON SCHEMA {schema} TO {role};
        GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role};
        """
    )
    parts = urlsplit(url)
    plain = url.replace(parts.netloc, f"{role}@{parts.netloc.rpartition('@')[2]}", 1)
    async with opened(plain) as store:
        await store.put("ann", turn("resp_1"), events=b"event")
        await store.create_conversation("ann", conversation(), items("a"))
        assert await store.purge(2_000_000_000, 10) == 2


def unused_port():
    import socket

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        return nobody.getsockname()[1]


def at(url, **changes):
    """The URL with another user, server or database."""
    parts = urlsplit(url)
    user, _, server = parts.netloc.rpartition("@")
    netloc = f"{changes.get('user', user)}@{changes.get('server', server)}"
    return parts._replace(netloc=netloc, path=changes.get("path", parts.path)).geturl()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda url: at(url, server=f"127.0.0.1:{unused_port()}"), "it cannot be reached, Connection refused"),
        (lambda url: at(url, server="no.such.host.invalid"), "it cannot be reached, "),
        (lambda url: at(url, server="127.0.0.1:x"), "its URL cannot be used"),
        (lambda url: at(url, server="127.0.0.1:99999"), "its URL cannot be used"),
        (lambda url: at(url, user="nobody_of_that_name:canary"), "it refuses this user or password (28"),
        (lambda url: at(url, path="/no_such_database"), "it has no such database (3D000)"),
        (lambda url: at(url, user="ann:can#ary@"), "its URL cannot be used"),
        (lambda url: at(url, user="ann:canary/x"), "its URL cannot be used"),
        (lambda url: url.replace("search_path=", "search_path=no_such_"), "it has no schema for its tables (3F000)"),
        (lambda url: with_options(url, no_such_option="canary"), "it failed (42704)"),
        (lambda url: with_options(url, default_transaction_read_only="on"), "it is read-only (25006)"),
        (lambda url: with_options(url, sslmode="canary"), "its URL cannot be used"),
        (lambda url: with_options(url, sslmode="require"), "it cannot be reached, it has closed the connection or"),
    ],
    ids=[
        "refused",
        "host",
        "port",
        "port too high",
        "user",
        "database",
        "password #",
        "password /",
        "schema",
        "option",
        "read-only",
        "sslmode",
        "no TLS",
    ],
)
async def test_a_server_that_cannot_be_used_is_one_clear_line(url, change, reason):
    """At start: the setting, where the database is, and what is wrong, without a name, password or option (G16)."""
    with pytest.raises(ConfigError) as refused:
        await start_store(StoreSettings(url=change(url)))
    line = str(refused.value)
    assert line.startswith("store.url (--store) is 'postgresql://")
    assert reason in line
    assert "\n" not in line
    assert "canary" not in line
    assert "ann" not in line.replace("cannot", "")
    assert refused.value.__cause__ is None


async def test_a_server_that_says_nothing_is_given_up_in_time(url, proxy):
    """A network that swallows everything does not keep the start waiting for ever."""
    proxy.stall()
    store = PostgresStore(proxy.url, pool_connections_max=1, call_seconds_max=0.2)
    with pytest.raises(StoreUnavailable, match=r"has not answered within 0\.2 seconds"):
        await store.open()
    proxy.flow()
    await works_again(store)
    await store.close()


async def test_a_store_that_was_never_opened_opens_itself(url):
    """So that a server can start before its database is up, if it is told to."""
    store = PostgresStore(url, pool_connections_max=1)
    assert "not connected" in repr(store)
    await store.put("ann", turn("resp_1"))
    assert "open" in repr(store)
    await store.close()
    assert "closed" in repr(store)


async def test_without_asyncpg_a_line_says_what_to_install(monkeypatch):
    """It is an extra, and who names a server without it learns how to get it."""
    monkeypatch.delitem(sys.modules, "openline.state.postgres", raising=False)
    monkeypatch.delitem(sys.modules, "openline.state.postgres_pool", raising=False)
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    with pytest.raises(ConfigError) as refused:
        await start_store(StoreSettings(url="postgresql://ann:canary@db/x"))
    assert str(refused.value) == (
        "store.url (--store) is a postgresql: URL, which needs asyncpg: pip install 'openline[postgres]'."
    )


# --- Faults: each one is named, nothing is acknowledged, and it passes without a restart (G28) -----


async def test_a_server_that_was_stopped_is_used_again_when_it_is_back(url, proxy):
    """Refused while it is away, at once; then it works as before."""
    async with opened(proxy.url, doubt_seconds_max=0.1) as store:
        await store.put("ann", turn("resp_0"))
        proxy.refuse()
        for _ in range(3):
            with pytest.raises(StoreUnavailable, match=r"cannot be reached|closed the connection"):
                await store.put("ann", turn("resp_1"))
        with pytest.raises(StoreUnavailable, match="cannot be reached, Connection refused"):
            await store.get("ann", "resp_0")
        await proxy.accept()
        await works_again(store)
        assert await store.chain("ann", "resp_0") == [turn("resp_0")]
        assert await store.get("ann", "resp_1") is None


@pytest.mark.parametrize("text", [b"INSERT INTO openline_turns", b"INSERT INTO openline_events", b"COMMIT"])
async def test_a_write_that_was_cut_is_made_again(url, proxy, text):
    """Wherever the connection ends before the commit has left, the whole of the write is there in the end."""
    async with opened(proxy.url, pool_connections_max=1) as store:
        proxy.cut_before(text)
        await store.put("ann", turn("resp_1"), events=b"event")
        assert proxy.cut_at is None
        assert await store.get("ann", "resp_1") == turn("resp_1")
        assert await store.events("ann", "resp_1") == b"event"


# --- A commit whose answer is lost (docs/adr/0012) -------------------------------------------------


@pytest.fixture
async def store(proxy):
    """A store by way of the proxy, which has a conversation and has written a turn before."""
    async with opened(proxy.url, pool_connections_max=1, doubt_seconds_max=0.3) as store:
        await store.create_conversation("ann", conversation(), items("a"))
        await store.put("ann", turn("resp_0"))
        yield store


@pytest.mark.parametrize("lease_until", [None, 1_760_000_015], ids=["finished", "unfinished"])
async def test_a_turn_whose_commit_was_not_answered_is_kept(store, proxy, lease_until):
    """It is there, and so its turn is not told as failed."""
    proxy.lose_answer_to(b"resp_lost")
    await store.put("ann", turn("resp_lost", "resp_0", lease_until=lease_until))
    assert proxy.lost_at is None
    assert await store.get("ann", "resp_lost") == turn("resp_lost", "resp_0", lease_until=lease_until)


async def test_what_belongs_to_such_a_turn_is_kept_once(store, proxy):
    """Its events, and its items in a conversation."""
    proxy.lose_answer_to(b"COMMIT")
    await store.put("ann", turn("resp_lost"), events=b"event", appends=appended("conv_1", "b", "c"))
    assert proxy.lost_at is None
    assert await store.events("ann", "resp_lost") == b"event"
    assert await store.all_items("ann", "conv_1") == list(items("a", "b", "c"))


async def test_a_conversation_whose_commit_was_not_answered_is_kept_once(store, proxy):
    """And so is what is added to it."""
    proxy.lose_answer_to(b"COMMIT")
    await store.create_conversation("ann", conversation("conv_lost"), items("a"))
    assert proxy.lost_at is None
    proxy.lose_answer_to(b"COMMIT")
    await store.append("ann", appended("conv_lost", "b", "c"))
    assert proxy.lost_at is None
    assert await store.all_items("ann", "conv_lost") == list(items("a", "b", "c"))


async def test_another_turn_of_this_id_is_not_taken_for_ours(store, proxy):
    """A write that was refused, and whose refusal was lost, is refused in the end."""
    proxy.lose_answer_to(b"resp_0")
    with pytest.raises(AlreadyKept):
        await store.put("ann", msgspec.structs.replace(turn("resp_0"), response=b'{"id":"resp_0","output":[1]}'))
    assert proxy.lost_at is None
    assert await store.get("ann", "resp_0") == turn("resp_0")


async def test_a_turn_in_the_place_of_its_claim_is_kept(store, proxy):
    """Its claim is gone when it is written again, because it stands there itself."""
    key = Key("k", b"hash")
    await store.put("ann", turn("resp_claimed", lease_until=1_760_000_015), key=key)
    proxy.lose_answer_to(b"resp_claimed")
    await store.put("ann", turn("resp_claimed"), replaces=True)
    assert proxy.lost_at is None
    assert (await store.of_key("ann", "k")).turn == turn("resp_claimed")


async def test_what_the_server_refuses_stays_refused(store, proxy):
    """A claim that is not there, and a key that another turn has; the refusal was lost, and comes when it is asked again."""
    await store.put("ann", turn("resp_1"), key=Key("k", b"hash"))
    proxy.lose_answer_to(b"resp_gone")
    with pytest.raises(NotUnfinished):
        await store.put("ann", turn("resp_gone"), replaces=True)
    assert proxy.lost_at is None
    proxy.lose_answer_to(b"other hash")
    with pytest.raises(KeyTaken):
        await store.put("ann", turn("resp_2"), key=Key("k", b"other hash"))
    assert proxy.lost_at is None
    assert [await store.get("ann", each) for each in ("resp_gone", "resp_2")] == [None, None]


async def test_another_item_of_this_id_is_not_taken_for_ours(store, proxy):
    """Likewise in a conversation."""
    other = ConversationItem("a", b'{"id":"a","other":true}')
    proxy.lose_answer_to(b'"other"')
    with pytest.raises(DuplicateItem):
        await store.append("ann", Appended("conv_1", (other,), 1_760_000_000))
    assert proxy.lost_at is None
    assert await store.all_items("ann", "conv_1") == list(items("a"))


async def test_what_cannot_be_found_out_in_time_is_said(store, proxy):
    """The server stays away: the write may be there, and the message does not deny it."""
    proxy.lose_answer_to(b"resp_lost")
    put = asyncio.ensure_future(store.put("ann", turn("resp_lost")))
    await until(partial(was_lost, proxy))
    proxy.refuse()
    with pytest.raises(StoreUnavailable, match=r"cannot be reached, .*, and whether this was kept is not known"):
        await put
    await proxy.accept()
    assert await store.get("ann", "resp_lost") == turn("resp_lost")


async def was_lost(proxy):
    return proxy.lost_at is None


async def test_idle_connections_that_were_cut_are_replaced(url, proxy):
    """The server was restarted while nobody asked: nobody notices."""
    async with opened(proxy.url, pool_connections_max=3) as store:
        await asyncio.gather(*(store.put("ann", turn(f"resp_{number}")) for number in range(20)))
        proxy.cut()
        await until(partial(has_no_connection, store))
        assert await asyncio.gather(*(store.get("ann", f"resp_{n}") for n in range(20))) == [
            turn(f"resp_{number}") for number in range(20)
        ]


async def has_no_connection(store):
    return store._pool._pool.get_size() == 0


async def test_a_stall_fails_calls_in_time_and_passes(url, proxy):
    """A network that swallows everything: each call fails at its deadline, reads too, and later ones work."""
    async with opened(proxy.url, pool_connections_max=2, call_seconds_max=0.5, doubt_seconds_max=0.5) as store:
        await store.put("ann", turn("resp_0"))
        proxy.stall()
        began = time.monotonic()
        calls = [store.put("ann", turn(f"resp_{number}")) for number in range(1, 10)]
        outcomes = await asyncio.gather(*calls, store.get("ann", "resp_0"), return_exceptions=True)
        assert time.monotonic() - began < 4
        assert {str(outcome).partition(", and whether")[0] for outcome in outcomes} == {
            "it has not answered within 0.5 seconds"
        }
        proxy.flow()
        await works_again(store)
        assert await store.get("ann", "resp_0") == turn("resp_0")


async def test_a_stall_does_not_keep_close_waiting(url, proxy):
    """A process that is told to stop does, whatever its database does."""
    store = PostgresStore(proxy.url, pool_connections_max=1, call_seconds_max=0.5)
    await store.open()
    proxy.stall()
    purge = asyncio.ensure_future(store.purge(0, 1))  # which may take its time
    await asyncio.sleep(0)
    began = time.monotonic()
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        await store.close()
    assert time.monotonic() - began < 3
    with pytest.raises(StoreUnavailable, match="it is closed"):
        await purge


async def test_a_write_in_the_middle_of_a_restart_is_made_again(url, connection):
    """The server ends our connections while a write waits there, as a restart does."""
    async with opened(url) as store:
        await store.put("ann", turn("resp_1", lease_until=9))
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM openline_turns FOR UPDATE")
            put = asyncio.ensure_future(store.put("ann", turn("resp_1")))
            await until(partial(somebody_waits, connection))
            await connection.execute(END_WAITING)
        await put
        assert await store.get("ann", "resp_1") == turn("resp_1")


WAITING = """
SELECT count(*) FROM pg_locks AS waiting JOIN pg_locks AS held ON held.transactionid = waiting.transactionid
WHERE NOT waiting.granted AND held.pid = pg_backend_pid()
"""
END_WAITING = """
SELECT pg_terminate_backend(waiting.pid)
FROM pg_locks AS waiting JOIN pg_locks AS held ON held.transactionid = waiting.transactionid
WHERE NOT waiting.granted AND held.pid = pg_backend_pid()
"""


async def somebody_waits(connection):
    """For a lock that this connection has."""
    return await connection.fetchval(WAITING) > 0


FAILING = """
CREATE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'canary' USING ERRCODE = '{code}'; END $$;
CREATE TRIGGER fail BEFORE INSERT ON openline_turns FOR EACH ROW EXECUTE FUNCTION fail();
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("53100", "it is on a full disk (53100)"),
        ("53200", "it is out of memory (53200)"),
        ("53300", "it has no connection left (53300)"),
        ("25006", "it is read-only (25006)"),
        ("40001", "it met a conflict with another write (40001)"),
        ("40P01", "it met a conflict with another write (40P01)"),
        ("42501", "it does not let this user do it (42501)"),
        ("42P01", "it has lost its tables (42P01)"),
        ("54000", "it cannot hold a value so large (54000)"),
        ("55P03", "it is locked by another program (55P03)"),
        ("57014", "it did not answer in time (57014)"),
        ("57P01", "it is starting or stopping (57P01)"),
        ("57P03", "it is starting or stopping (57P03)"),
        ("58030", "it met an I/O error (58030)"),
        ("XX001", "it is corrupt (XX001)"),
        ("P0001", "it failed (P0001)"),
    ],
)
async def test_what_the_server_says_is_named_and_passes(url, connection, code, reason):
    """The reason is ours, by the error's code, and never the server's text, which quotes content (G16)."""
    async with opened(url) as store:
        await connection.execute(FAILING.format(code=code))
        for calls in range(2):
            with pytest.raises(StoreUnavailable) as refused:
                await (store.put("ann", turn("resp_1"), events=b"e") if calls else store.put("ann", turn("resp_1")))
            assert str(refused.value) == reason
            assert refused.value.__suppress_context__  # a traceback would show the server's text
        await connection.execute("DROP FUNCTION fail CASCADE")
        assert await store.get("ann", "resp_1") is None
        await store.put("ann", turn("resp_1"))


async def test_another_programs_lock_fails_writes_until_it_ends(url, connection):
    """The server itself gives up before our deadline, so nothing of the write comes after all."""
    async with opened(url, call_seconds_max=1) as store:
        await store.put("ann", turn("resp_0"))
        async with connection.transaction():
            await connection.execute("LOCK TABLE openline_turns")
            with pytest.raises(StoreUnavailable, match="did not answer in time"):
                await store.put("ann", turn("resp_1"))
        assert await store.get("ann", "resp_1") is None
        await store.put("ann", turn("resp_1"))


async def test_lost_tables_are_named_and_used_when_they_are_back(url, connection):
    """A restore in its middle, for instance."""
    async with opened(url) as store:
        await connection.execute("ALTER TABLE openline_turns RENAME TO elsewhere")
        with pytest.raises(StoreUnavailable, match="it has lost its tables"):
            await store.get("ann", "resp_1")
        await connection.execute("ALTER TABLE elsewhere RENAME TO openline_turns")
        assert await store.get("ann", "resp_1") is None


@pytest.mark.parametrize(
    "bad",
    [turn("\ud800"), turn("resp\0"), turn("resp_x", at=2**63), turn(random.Random(0).randbytes(50_000).hex())],
    ids=["surrogate", "NUL", "integer", "id too long"],
)
async def test_what_a_row_cannot_hold_is_refused(url, bad):
    """A value that no column takes is the write's fault, and the connection stays as it was."""
    async with Proxy(url) as proxy, opened(proxy.url, pool_connections_max=1) as store:
        with pytest.raises(StoreUnavailable, match="it cannot hold"):
            await store.put("ann", bad)
        await store.put("ann", turn("resp_1"))
        assert proxy.connections <= 2


async def test_an_unforeseen_error_is_a_store_that_fails():
    """Whatever a library raises, nothing of its text goes on (G16)."""
    for error in (RuntimeError("canary"), asyncpg.InternalClientError("canary"), OSError("canary")):
        assert "canary" not in str(unavailable(error))
    assert str(unavailable(RuntimeError("canary"))) == "it failed (RuntimeError)"


async def test_repr_holds_no_secret():
    """Where the database is, and nothing of who comes in how (G16)."""
    for url, shown in [
        ("postgresql://ann:canary@db:5432/talks?password=canary", "postgresql://db:5432/talks"),
        ("postgres://ann:can@ary@db/talks", "postgres://db/talks"),
        ("postgresql://ann:can/ary@db/talks", "postgresql://…"),
        ("postgresql://ann:can?ary@db/talks", "postgresql://…"),
        ("postgresql://ann:can#ary@db/talks", "postgresql://…"),
        ("postgresql://db", "postgresql://db/"),
    ]:
        store = PostgresStore(url, pool_connections_max=1)
        assert repr(store) == f"<PostgresStore {shown} not connected connections=0 calls=0>"
        assert "ary" not in repr(store).replace("canary", "")
        await store.close()


async def test_what_is_continued_while_a_purge_goes_on_stays(url, connection):
    """Between the search and the deletion somebody may have gone on: each turn is checked again when it goes."""
    async with opened(url) as store:
        await store.put("ann", turn("resp_0", at=1))
        await store.put("ann", turn("resp_1", "resp_0", at=1))
        async with connection.transaction():
            await connection.execute("SELECT 1 FROM openline_turns WHERE response_id = 'resp_1' FOR UPDATE")
            purge = asyncio.ensure_future(store.purge(50, 10))
            await until(partial(somebody_waits, connection))  # it has looked, found both, and begins with the child
            await store.put("ann", turn("resp_2", "resp_0"))
        assert await purge == 1
        assert [each.response_id for each in await store.chain("ann", "resp_2")] == ["resp_0", "resp_2"]


async def test_order_in_a_conversation_is_that_of_commits(url, connection):
    """Who adds items waits for whoever adds to the same conversation, and other conversations do not."""
    async with opened(url) as store:
        await store.create_conversation("ann", conversation())
        await store.create_conversation("ann", conversation("conv_2"))
        async with connection.transaction():
            touch = "UPDATE openline_conversations SET last_used_at = 0 WHERE conversation_id = 'conv_1'"
            await connection.execute(touch)
            add = (
                "INSERT INTO openline_items (owner, conversation_id, item_id, raw) VALUES ('ann', 'conv_1', 'a', '{}')"
            )
            append = asyncio.ensure_future(store.append("ann", Appended("conv_1", items("b"), 0)))
            await until(partial(somebody_waits, connection))
            await store.append("ann", appended("conv_2", "c"))
            await connection.execute(add)
        await append
        assert [item.id for item in await store.all_items("ann", "conv_1")] == ["a", "b"]


@pytest.mark.parametrize(("ci", "outcome"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
async def test_without_a_server_tests_skip_but_fail_in_ci(monkeypatch, ci, outcome):
    """A developer needs no server; nothing that CI should have tried is left out unseen."""
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr("state.stores.POSTGRES", f"postgresql://127.0.0.1:{unused_port()}/test")
    with pytest.raises(outcome, match="no PostgreSQL server answers at OPENLINE_TEST_POSTGRES: ConnectionRefusedError"):
        await postgres()
