"""The SQLite schema, as an append-only list of steps.

A step that was released is never changed or removed: databases out there have taken
it. `PRAGMA user_version` counts the steps that a database has behind it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Final

from openline.state.store import StoreUnavailable

Migration = Callable[[sqlite3.Connection], None]

# "OPLN" in SQLite's header, so that another program's database is not taken for ours.
APPLICATION_ID: Final = 0x4F504C4E


def m001_turns(connection: sqlite3.Connection) -> None:
    """One row a turn: its own items and its parent's id.

    Not WITHOUT ROWID: rows are kilobytes long, and a chain then reads at half the speed.
    """
    connection.execute(
        """
        CREATE TABLE turns (
            owner TEXT NOT NULL,
            response_id TEXT NOT NULL,
            parent_id TEXT,
            created_at INTEGER NOT NULL,
            status TEXT NOT NULL,
            chainable INTEGER NOT NULL,
            input BLOB NOT NULL,
            response BLOB NOT NULL,
            PRIMARY KEY (owner, response_id)
        )
        """
    )


def m002_leases(connection: sqlite3.Connection) -> None:
    """Unfinished turns. A renewal rewrites one page of a row, however long it is, as its size stays the same."""
    connection.execute("ALTER TABLE turns ADD COLUMN lease_until INTEGER")
    connection.execute("CREATE INDEX turns_by_lease ON turns (lease_until) WHERE lease_until IS NOT NULL")


def m003_events(connection: sqlite3.Connection) -> None:
    """Streams of events, beside the turns, so that a chain is read without them."""
    connection.execute(
        """
        CREATE TABLE events (
            owner TEXT NOT NULL,
            response_id TEXT NOT NULL,
            events BLOB NOT NULL,
            PRIMARY KEY (owner, response_id),
            FOREIGN KEY (owner, response_id) REFERENCES turns ON DELETE CASCADE
        )
        """
    )


def m004_retention(connection: sqlite3.Connection) -> None:
    """When a turn was last used, and who continues it."""
    connection.execute("ALTER TABLE turns ADD COLUMN last_used_at INTEGER")
    connection.execute("CREATE INDEX turns_by_use ON turns (coalesce(last_used_at, created_at))")
    connection.execute("CREATE INDEX turns_by_parent ON turns (owner, parent_id) WHERE parent_id IS NOT NULL")


def m005_conversations(connection: sqlite3.Connection) -> None:
    """Conversations, and their items in the order of `position`, which is the rowid and so a part of every index."""
    connection.execute(
        """
        CREATE TABLE conversations (
            owner TEXT NOT NULL,
            conversation_id TEXT NOT NULL,
            created_at INTEGER NOT NULL,
            last_used_at INTEGER NOT NULL,
            metadata BLOB NOT NULL,
            PRIMARY KEY (owner, conversation_id)
        )
        """
    )
    connection.execute("CREATE INDEX conversations_by_use ON conversations (last_used_at)")
    connection.execute(
        """
        CREATE TABLE items (
            position INTEGER PRIMARY KEY,
            owner TEXT NOT NULL,
            conversation_id TEXT NOT NULL,
            item_id TEXT NOT NULL,
            raw BLOB NOT NULL,
            FOREIGN KEY (owner, conversation_id) REFERENCES conversations ON DELETE CASCADE
        )
        """
    )
    connection.execute("CREATE UNIQUE INDEX items_by_id ON items (owner, conversation_id, item_id)")
    connection.execute("CREATE INDEX items_in_order ON items (owner, conversation_id)")


def m006_keys(connection: sqlite3.Connection) -> None:
    """Idempotency keys, which go with their turns."""
    connection.execute(
        """
        CREATE TABLE keys (
            owner TEXT NOT NULL,
            key TEXT NOT NULL,
            response_id TEXT NOT NULL,
            body_hash BLOB NOT NULL,
            PRIMARY KEY (owner, key),
            FOREIGN KEY (owner, response_id) REFERENCES turns ON DELETE CASCADE
        ) WITHOUT ROWID
        """
    )
    connection.execute("CREATE INDEX keys_by_turn ON keys (owner, response_id)")


MIGRATIONS: Final[Sequence[Migration]] = (
    m001_turns,
    m002_leases,
    m003_events,
    m004_retention,
    m005_conversations,
    m006_keys,
)


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Take the steps that the database has not taken yet, all in one transaction or none.

    The connection must not have begun a transaction. It takes the write lock even when there
    is nothing to do, so a database that cannot be written is found out at start.

    Raises:
        StoreUnavailable: the database is another program's, or a newer version wrote it.
        sqlite3.Error: it cannot be read or written.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _read_version(connection, len(migrations))
        for migration in migrations[version:]:
            migration(connection)
        if version < len(migrations):
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # SQLite ends it by itself after some errors
            connection.execute("ROLLBACK")
        raise


def _read_version(connection: sqlite3.Connection, newest: int) -> int:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    empty = application_id == 0 and version == 0 and tables == 0
    if not empty and application_id != APPLICATION_ID:
        raise StoreUnavailable("it is another program's database")
    if version > newest:
        raise StoreUnavailable(
            f"a newer version of Openline wrote it: its schema is {version}, this version knows up to {newest}"
        )
    return version
