"""The ledger's tables, as an append-only list of steps; `PRAGMA user_version` counts those that a file has behind it."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Final

Migration = Callable[[sqlite3.Connection], None]

APPLICATION_ID: Final = 0x4F504C47  # "OPLG", so that another program's database is not taken for a ledger


class ForeignFile(Exception):  # noqa: N818 - what the file is
    """The database is not a ledger that this version knows; the message says what it is."""


def m001_steps(connection: sqlite3.Connection) -> None:
    """A session's steps, and the calls of each. A `call_id` is unique within its turn only: some servers count from 0."""
    connection.execute("CREATE TABLE sessions (session_id TEXT PRIMARY KEY, created_at REAL NOT NULL) WITHOUT ROWID")
    connection.execute(
        """
        CREATE TABLE steps (
            session_id TEXT NOT NULL REFERENCES sessions ON DELETE CASCADE,
            number INTEGER NOT NULL,
            run INTEGER NOT NULL,
            idempotency_key TEXT NOT NULL,
            body BLOB NOT NULL,
            before BLOB,
            status TEXT NOT NULL,
            response BLOB,
            changed_at REAL NOT NULL,
            PRIMARY KEY (session_id, number)
        )
        """
    )
    connection.execute(
        """
        CREATE TABLE calls (
            session_id TEXT NOT NULL,
            step INTEGER NOT NULL,
            position INTEGER NOT NULL,
            call_id TEXT NOT NULL,
            type TEXT NOT NULL,
            name TEXT NOT NULL,
            arguments TEXT NOT NULL,
            started_at REAL,
            finished_at REAL,
            output BLOB,
            PRIMARY KEY (session_id, step, call_id),
            FOREIGN KEY (session_id, step) REFERENCES steps ON DELETE CASCADE
        )
        """
    )


MIGRATIONS: Final[Sequence[Migration]] = (m001_steps,)


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Take the steps that the file has not taken yet, all or none.

    Raises:
        ForeignFile: it is another program's, or a newer version wrote it.
        sqlite3.Error: it cannot be read or written.
    """
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection, len(migrations))
        for migration in migrations[version:]:
            migration(connection)
        if version < len(migrations):
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {len(migrations)}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _version(connection: sqlite3.Connection, newest: int) -> int:
    (application_id,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    is_empty = (application_id, version, tables) == (0, 0, 0)
    if not is_empty and application_id != APPLICATION_ID:
        raise ForeignFile("is another program's database; name another file")
    if version > newest:
        raise ForeignFile(
            f"was written by a newer version of Openline: its schema is {version}, this version knows up to {newest}"
        )
    return version
