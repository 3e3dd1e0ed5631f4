"""The ledger: what an agent has done, in a SQLite file, so that another process can go on where it died.

What must stay true, because "exactly once" hangs on it:

* A create and its idempotency key are committed before the create is sent.
* A turn's response is committed, with the calls in it, before the first of them starts.
* That a call starts is committed before its tool runs; its output before the next create.

Committed is on the disk: `synchronous=FULL`. The file holds the conversation, the tools' arguments and their outputs, as
plain as the app gave them; only its user can read it. `delete` overwrites what it deletes.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from openline.client.errors import OpenlineError
from openline.client.ledger_schema import ForeignFile, migrate
from openline.client.process_lock import Locked, process_lock
from openline.client.run_state import Call, Step, is_done
from openline.client.tool_outputs import ToolOutput

# Agents with other sessions may share the file, and write for a few milliseconds at a time.
LOCK_WAIT_SECONDS_MAX: Final = 10.0
_WAL_BYTES_KEPT_MAX: Final = 16 * 1024 * 1024

_encode: Final = msgspec.json.Encoder().encode
_output: Final = msgspec.json.Decoder(ToolOutput)


class LedgerFailed(OpenlineError):  # noqa: N818 - what happened
    """The ledger cannot be read or written, so nothing goes on; the message names the file and why."""


class SessionLocked(OpenlineError):  # noqa: N818 - what was found
    """Another agent works on the session."""


class LedgerSession(msgspec.Struct, frozen=True):
    """A session that a ledger holds.

    Attributes:
        created_at: seconds since 1970.
        changed_at: likewise, of its last entry.
        is_done: its last run came to its end.
    """

    session_id: str
    created_at: float
    changed_at: float
    turns: int
    is_done: bool


class Ledger:
    """A ledger. As a context manager it is closed at the end.

    Many agents may share one, each with a session of its own. Its methods block for as long as a disk takes to
    write; any thread may call them.

    Args:
        path: the file, which is made, readable by its user alone, if there is none; None is one in memory, which helps
            nobody after a crash.
        lock_wait_seconds_max: how long a write waits for another agent's.

    Raises:
        LedgerFailed: it cannot be opened, is another program's, or a newer version wrote it.
    """

    def __init__(self, path: Path | str | None, *, lock_wait_seconds_max: float = LOCK_WAIT_SECONDS_MAX) -> None:
        self.path = Path(path).expanduser().absolute() if path is not None else None
        self._lock = threading.Lock()  # one connection, used by one thread at a time
        with self._errors():
            self._connection: sqlite3.Connection | None = _connect(self.path, lock_wait_seconds_max)

    def __repr__(self) -> str:
        return f"<Ledger {self.path or ':memory:'}{'' if self._connection else ' closed'}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the file. Safe to call twice."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    # --- Whole sessions -----------------------------------------------------------------------------

    def sessions(self) -> list[LedgerSession]:
        """What it holds, the last changed first."""
        with self._transaction() as db:
            rows = db.execute(
                """
                SELECT session_id, created_at, changed_at, number, status, (
                    SELECT count(*) FROM calls WHERE calls.session_id = steps.session_id AND step = number)
                FROM sessions JOIN steps USING (session_id)
                WHERE number = (SELECT max(number) FROM steps AS of_it WHERE of_it.session_id = steps.session_id)
                ORDER BY changed_at DESC
                """
            ).fetchall()
        return [
            LedgerSession(session_id, created_at, changed_at, turns=number, is_done=is_done(status, calls))
            for session_id, created_at, changed_at, number, status, calls in rows
        ]

    def steps(self, session_id: str) -> list[Step]:
        """A session's steps, oldest first; none if it is not held."""
        with self._transaction() as db:
            steps = db.execute("SELECT * FROM steps WHERE session_id = ? ORDER BY number", (session_id,)).fetchall()
            calls = db.execute("SELECT * FROM calls WHERE session_id = ? ORDER BY position", (session_id,)).fetchall()
        of_step: dict[int, list[Call]] = {}
        for row in calls:
            of_step.setdefault(row["step"], []).append(_call(row))
        return [_step(row, of_step.get(row["number"], ())) for row in steps]

    def delete(self, session_id: str) -> None:
        """Delete a session with everything in it; nothing if it is not held.

        Raises:
            SessionLocked: an agent works on it.
        """
        with self.hold(session_id), self._transaction() as db:
            db.execute("DELETE FROM sessions WHERE session_id = ?", (session_id,))

    @contextmanager
    def hold(self, session_id: str) -> Generator[None]:
        """Keep other agents away from a session in this block. The death of this process ends it too.

        Raises:
            SessionLocked: another agent works on it.
        """
        if self.path is None:
            yield
            return
        # A session's id may be the app's own, and no file's name.
        digest = hashlib.sha256(session_id.encode(errors="surrogatepass")).hexdigest()[:16]
        lock = process_lock(self.path.with_name(f"{self.path.name}.{digest}.lock"))
        with ExitStack() as held:
            try:
                with self._errors():
                    held.enter_context(lock)
            except Locked as error:
                by = f"process {error.pid}" if error.pid else "another process"
                raise SessionLocked(
                    f"session '{session_id}' of {self.path} is held by {by}: two agents would do its work twice; wait for "
                    "the other one, or end it."
                ) from None
            yield

    # --- Entries ------------------------------------------------------------------------------------

    def add_step(self, session_id: str, step: Step) -> None:
        """A create is about to be sent."""
        now = time.time()
        with self._transaction() as db:
            db.execute("INSERT INTO sessions VALUES (?, ?) ON CONFLICT DO NOTHING", (session_id, now))
            db.execute(
                "INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?, NULL, ?)",
                (
                    session_id,
                    step.number,
                    step.run,
                    step.idempotency_key,
                    _encode(step.create),
                    None if step.before is None else _encode(step.before),
                    step.status,
                    now,
                ),
            )

    def end_turn(self, session_id: str, step: Step) -> None:
        """A turn has ended; the calls that it made are to be run."""
        response = None if step.response is None else _encode(step.response)
        with self._transaction() as db:
            db.execute(
                "UPDATE steps SET status = ?, response = ?, changed_at = ? WHERE session_id = ? AND number = ?",
                (step.status, response, time.time(), session_id, step.number),
            )
            db.executemany(
                "INSERT INTO calls VALUES (?, ?, ?, ?, ?, ?, ?, NULL, NULL, ?)",
                [
                    (session_id, step.number, position, call.call_id, call.type, call.name, call.arguments, _told(call))
                    for position, call in enumerate(step.calls)
                ],
            )

    def start_call(self, session_id: str, step: Step, call: Call) -> None:
        """A tool is about to run."""
        with self._transaction() as db:
            db.execute(
                "UPDATE calls SET started_at = ? WHERE session_id = ? AND step = ? AND call_id = ?",
                (time.time(), session_id, step.number, call.call_id),
            )

    def finish_call(self, session_id: str, step: Step, call: Call) -> None:
        """A call has its output."""
        with self._transaction() as db:
            db.execute(
                "UPDATE calls SET finished_at = ?, output = ? WHERE session_id = ? AND step = ? AND call_id = ?",
                (time.time(), _told(call), session_id, step.number, call.call_id),
            )

    # --- SQLite -------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        """All of the block is committed at its end, on the disk, or none of it."""
        with self._lock, self._errors():
            if self._connection is None:
                raise LedgerFailed(f"the ledger {self.path or 'in memory'} is closed.")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except ForeignFile as error:
            raise LedgerFailed(f"the ledger {self.path} {error}.") from None
        except (sqlite3.Error, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise LedgerFailed(f"the ledger {self.path or 'in memory'} cannot be used: {reason}.") from None


def _connect(path: Path | None, lock_wait_seconds: float) -> sqlite3.Connection:
    if path is not None:  # made before SQLite does, so that only its user can read it; SQLite's own files take its mode
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    connection = sqlite3.connect(
        ":memory:" if path is None else path,
        timeout=lock_wait_seconds,
        isolation_level=None,  # transactions are ours
        check_same_thread=False,  # the lock sees to it
    )
    try:
        connection.row_factory = sqlite3.Row
        migrate(connection)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")  # what belongs to a deleted session goes with it
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES_KEPT_MAX}")
    except BaseException:
        connection.close()
        raise
    return connection


def _told(call: Call) -> bytes | None:
    return None if call.output is None else _encode(call.output)


def _call(row: sqlite3.Row) -> Call:
    return Call(
        call_id=row["call_id"],
        type=row["type"],
        name=row["name"],
        arguments=row["arguments"],
        has_started=row["started_at"] is not None,
        output=None if row["output"] is None else _output.decode(row["output"]),
    )


def _step(row: sqlite3.Row, calls: Iterable[Call]) -> Step:
    return Step(
        number=row["number"],
        run=row["run"],
        idempotency_key=row["idempotency_key"],
        create=msgspec.json.decode(row["body"]),
        before=None if row["before"] is None else msgspec.json.decode(row["before"]),
        status=row["status"],
        response=None if row["response"] is None else msgspec.json.decode(row["response"]),
        calls=tuple(calls),
    )


async def committed(write: Callable[..., None], *arguments: object) -> None:
    """Make an entry from a coroutine, which goes on once the entry is on the disk, also when it is cancelled meanwhile."""
    writing = asyncio.ensure_future(asyncio.to_thread(write, *arguments))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        raise
