"""The PostgreSQL schema, as an append-only list of steps.

A step that was released is never changed or removed: databases out there have taken
it. The one row of `openline_schema` counts the steps that a database has behind it.

Our tables share a schema with those of other programs, perhaps, and so have a prefix. Ids are compared byte by byte
(`COLLATE "C"`), which is what they are for, and the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from openline.state.store import StoreUnavailable

# One number for each schema of a database: several servers may start there at once, each on a schema of its own.
LOCK: Final = "SELECT pg_advisory_xact_lock(1330662478, hashtext(current_schema()))"

_M001_TURNS: Final = """
CREATE TABLE openline_turns (
    owner text COLLATE "C" NOT NULL,
    response_id text COLLATE "C" NOT NULL,
    parent_id text COLLATE "C",
    created_at bigint NOT NULL,
    status text NOT NULL,
    chainable boolean NOT NULL,
    input bytea NOT NULL,
    response bytea NOT NULL,
    lease_until bigint,
    last_used_at bigint,
    PRIMARY KEY (owner, response_id)
);
CREATE INDEX openline_turns_by_lease ON openline_turns (lease_until) WHERE lease_until IS NOT NULL;
CREATE INDEX openline_turns_by_use ON openline_turns ((coalesce(last_used_at, created_at)));
CREATE INDEX openline_turns_by_parent ON openline_turns (owner, parent_id) WHERE parent_id IS NOT NULL;
"""
_M002_EVENTS: Final = """
CREATE TABLE openline_events (
    owner text COLLATE "C" NOT NULL,
    response_id text COLLATE "C" NOT NULL,
    events bytea NOT NULL,
    PRIMARY KEY (owner, response_id),
    FOREIGN KEY (owner, response_id) REFERENCES openline_turns ON DELETE CASCADE
);
"""
# Items are numbered as they come; whoever adds some holds its conversation's row, so that their order is that of commits.
_M003_CONVERSATIONS: Final = """
CREATE TABLE openline_conversations (
    owner text COLLATE "C" NOT NULL,
    conversation_id text COLLATE "C" NOT NULL,
    created_at bigint NOT NULL,
    last_used_at bigint NOT NULL,
    metadata bytea NOT NULL,
    PRIMARY KEY (owner, conversation_id)
);
CREATE INDEX openline_conversations_by_use ON openline_conversations (last_used_at);
CREATE TABLE openline_items (
    owner text COLLATE "C" NOT NULL,
    conversation_id text COLLATE "C" NOT NULL,
    item_id text COLLATE "C" NOT NULL,
    position bigint GENERATED ALWAYS AS IDENTITY,
    raw bytea NOT NULL,
    PRIMARY KEY (owner, conversation_id, item_id),
    FOREIGN KEY (owner, conversation_id) REFERENCES openline_conversations ON DELETE CASCADE
);
CREATE UNIQUE INDEX openline_items_in_order ON openline_items (owner, conversation_id, position);
"""

# Idempotency keys, which go with their turns.
_M004_KEYS: Final = """
CREATE TABLE openline_keys (
    owner text COLLATE "C" NOT NULL,
    key text COLLATE "C" NOT NULL,
    response_id text COLLATE "C" NOT NULL,
    body_hash bytea NOT NULL,
    PRIMARY KEY (owner, key),
    FOREIGN KEY (owner, response_id) REFERENCES openline_turns ON DELETE CASCADE
);
CREATE INDEX openline_keys_by_turn ON openline_keys (owner, response_id);
"""

MIGRATIONS: Final[Sequence[str]] = (_M001_TURNS, _M002_EVENTS, _M003_CONVERSATIONS, _M004_KEYS)


async def migrate(connection: Any, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Take the steps that the database has not taken yet, all in one transaction or none, one process at a time.

    Args:
        connection: of asyncpg, not in a transaction.

    Raises:
        StoreUnavailable: a newer version wrote it.
        Exception: asyncpg's, if it cannot be read or written.
    """
    async with connection.transaction():
        await connection.execute(LOCK)
        version = await _read_version(connection)
        if version > len(migrations):
            raise StoreUnavailable(
                f"a newer version of Openline wrote it: its schema is {version}, "
                f"this version knows up to {len(migrations)}"
            )
        for step in migrations[version:]:
            await connection.execute(step)
        if version < len(migrations):
            await connection.execute("UPDATE openline_schema SET version = $1", len(migrations))


async def _read_version(connection: Any) -> int:
    # Looked for first, as a user who may not make tables can still use those that are there.
    if await connection.fetchval("SELECT to_regclass('openline_schema') IS NULL"):
        await connection.execute("CREATE TABLE openline_schema (version integer NOT NULL)")
        await connection.execute("INSERT INTO openline_schema (version) VALUES (0)")
    return await connection.fetchval("SELECT version FROM openline_schema")
