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


MIGRATIONS: Final[Sequence[Migration]] = (m001_turns,)


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
