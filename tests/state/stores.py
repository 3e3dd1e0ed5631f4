"""Stores of every kind, each in a place of its own, for the tests."""

import asyncio
import os
import secrets
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest

from openline.state.nothing import NothingStore
from openline.state.sqlite import SqliteStore
from openline.state.store import Appended, Conversation, ConversationItem, StoredTurn

KEEPING = ["sqlite file", "sqlite memory", "postgres"]
POSTGRES = os.environ.get("OPENLINE_TEST_POSTGRES", "postgresql://postgres@127.0.0.1:5432/test")
ASKING_SECONDS_MAX = 5
WAIT_SECONDS_MAX = 10


def turn(response_id, parent_id=None, *, chainable=True, text="hello", at=1_760_000_000, lease_until=None):
    """A turn; one with a lease is unfinished."""
    ended = "completed" if chainable else "failed"
    return StoredTurn(
        response_id=response_id,
        parent_id=parent_id,
        created_at=at,
        status="in_progress" if lease_until else ended,
        chainable=chainable and not lease_until,
        input=b'[{"role":"user","content":"%s"}]' % text.encode(),
        response=b'{"id":"%s","output":[]}' % response_id.encode(errors="replace"),
        lease_until=lease_until,
    )


def conversation(conversation_id="conv_1", *, at=1_760_000_000, metadata=b"{}"):
    return Conversation(id=conversation_id, created_at=at, metadata=metadata, last_used_at=at)


def items(*item_ids):
    return tuple(ConversationItem(item_id, b'{"id":"%s"}' % item_id.encode(errors="replace")) for item_id in item_ids)


def appended(conversation_id, *item_ids, at=1_760_000_000):
    return Appended(conversation_id, items(*item_ids), at)


class Place:
    """Where a database is: it can be opened more than once, each time as another process would."""

    def __init__(self, kind: str, spec: str) -> None:
        self.kind = kind
        self.spec = spec
        self.survives = kind != "sqlite memory"  # being closed
        self._stack = AsyncExitStack()

    def make(self, **options):
        """One more store here; it is closed with its place."""
        store = self._made(options)
        self._stack.push_async_callback(store.close)
        return store

    def _made(self, options):
        match self.kind:
            case "none":
                return NothingStore()
            case "postgres":
                from openline.state.postgres import PostgresStore

                return PostgresStore(self.spec, **({"pool_connections_max": 4} | options))
        return SqliteStore(Path(self.spec.removeprefix("sqlite:")) if self.survives else None, **options)

    async def close(self):
        await self._stack.aclose()


@asynccontextmanager
async def place(kind, folder):
    """An empty database of a kind, which is gone afterwards."""
    async with AsyncExitStack() as stack:
        match kind:
            case "postgres":
                spec = await stack.enter_async_context(postgres_schema())
            case "sqlite file":
                spec = f"sqlite:{folder / 'store.db'}"
            case _:
                spec = {"sqlite memory": "sqlite::memory:", "none": "none"}[kind]
        made = Place(kind, spec)
        stack.push_async_callback(made.close)
        yield made


@asynccontextmanager
async def postgres_schema():
    """The URL of a schema of its own on the server of the tests; without a server the test is skipped, but not in CI."""
    name = f"openline_{secrets.token_hex(8)}"
    connection = await postgres()
    try:
        await connection.execute(f"CREATE SCHEMA {name}")
        try:
            # A commit that nobody will miss after a power cut need not wait for the disk.
            yield with_options(POSTGRES, search_path=name, synchronous_commit="off")
        finally:
            await connection.execute(f"DROP SCHEMA {name} CASCADE")
    finally:
        await connection.close()


async def postgres():
    """A connection to the server of the tests."""
    try:
        import asyncpg

        async with asyncio.timeout(ASKING_SECONDS_MAX):
            return await asyncpg.connect(POSTGRES)
    except (ImportError, OSError, TimeoutError) as error:
        reason = f"no PostgreSQL server answers at OPENLINE_TEST_POSTGRES: {type(error).__name__}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


def with_options(url, **options):
    more = "&".join(f"{name}={value}" for name, value in options.items())
    return f"{url}{'&' if '?' in url else '?'}{more}"


async def until(is_so):
    """Until something is so that nobody announces; it fails where that takes too long."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while not await is_so():  # noqa: ASYNC110 - only looking tells
            await asyncio.sleep(0)
