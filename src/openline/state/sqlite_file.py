"""One SQLite file, or a database in memory: durable when acknowledged, and cheap.

One thread writes. It takes everything that waits into one transaction, so one fsync pays
for all of it. Reads are single look-ups on a connection of their own and run where they
are called; in WAL mode neither waits for the other.

What must stay true:

* `write` returns after its COMMIT did, with `synchronous=FULL`: after the fsync of the log.
* No error ends the writer. A connection that may be damaged is replaced, and the next call opens the file anew.
* Nothing is written behind what may not be on the disk. Of a commit whose fsync failed the log still holds every byte,
  which the kernel shows to everybody and may never write. SQLite's index of the log leaves it out as long as one
  connection is open; who opens the file first reads the log itself, and finds it. So the next connection is there before
  the damaged one goes, and each empties the log before its first write: docs/adr/0012.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from openline.state.migrations import migrate
from openline.state.store import NotAppended, StoreUnavailable

T = TypeVar("T")

# A write costs some 30 µs of CPU, so this is a quarter of a second of work; more than that waiting is a disk in trouble.
WRITES_QUEUED_MAX: Final = 8192
# How long the writer waits for another program's write lock before its writes fail; G28 asks for recovery within 5 s.
LOCK_WAIT_SECONDS_MAX: Final = 2.0
# The same for reads, which hold up the event loop. In WAL mode a read meets a lock only while another process
# recovers or closes the file.
_READ_LOCK_WAIT_SECONDS_MAX: Final = 0.05
_LOOK_AGAIN_SECONDS: Final = 0.005  # for another's lock, where SQLite does not wait by itself
_WAL_BYTES_KEPT_MAX: Final = 64 * 1024 * 1024  # one message at its limit; a longer log is cut at the next checkpoint

# By SQLite's primary result code. The rest are named by their code.
_REASONS: Final = {
    sqlite3.SQLITE_BUSY: "is locked by another program",
    sqlite3.SQLITE_LOCKED: "is locked by another program",
    sqlite3.SQLITE_FULL: "is on a full disk",
    sqlite3.SQLITE_READONLY: "is read-only",
    sqlite3.SQLITE_IOERR: "met an I/O error",
    sqlite3.SQLITE_CORRUPT: "is corrupt",
    sqlite3.SQLITE_NOTADB: "is not a SQLite database",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened",
    sqlite3.SQLITE_PERM: "may not be opened",
    sqlite3.SQLITE_AUTH: "may not be opened",
    sqlite3.SQLITE_TOOBIG: "cannot hold a turn so large",
}
# These say nothing against the connection: it goes on once they are over.
_PASSING: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL})
# These fail one write, and leave the transaction of its neighbours as it was.
_WRITE_ERRORS: Final = (
    StoreUnavailable,
    NotAppended,
    sqlite3.IntegrityError,
    sqlite3.DataError,
    sqlite3.InterfaceError,
    sqlite3.ProgrammingError,
    OverflowError,
    UnicodeError,
)

Refusal = StoreUnavailable | NotAppended


class Statement(msgspec.Struct, frozen=True):
    """A statement of a write.

    Attributes:
        otherwise: why the whole write is refused if this changes no row; None accepts that.
    """

    sql: str
    parameters: tuple[Any, ...]
    otherwise: Refusal | None = None


class _Write(msgspec.Struct, frozen=True):
    future: asyncio.Future[int]  # rows changed
    statements: tuple[Statement, ...]


_Outcome = int | StoreUnavailable | NotAppended


class SqliteFile:
    """A database of our schema.

    A caller that is cancelled while it waits for a write only stops waiting: the
    write keeps its place and is committed.

    Args:
        path: the file; None is a database in memory.
        make: whether it is made, readable by its user alone, if there is none.
        writes_queued_max: how many writes may wait for the writer; one more is refused.
        lock_wait_seconds_max: how long a write waits for another program's lock.

    Raises:
        StoreUnavailable: it cannot be opened, is another program's, or a newer version wrote it.
    """

    def __init__(self, path: Path | None, *, make: bool, writes_queued_max: int, lock_wait_seconds_max: float) -> None:
        self.path = path.absolute() if path else None
        self._writes_queued_max = writes_queued_max
        self._lock_wait_seconds_max = lock_wait_seconds_max
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()  # None closes
        self._closing = False
        # In memory both share one connection, and this lock keeps reads out of half a transaction. A file's reader
        # has its own, so that no read waits for an fsync.
        self._write_lock = threading.Lock()
        self._read_lock = self._write_lock if path is None else threading.Lock()
        try:
            if make:
                self._make_file()
            elif self.path is not None and not self.path.exists():
                raise StoreUnavailable("there is no such file")
            self._writer: sqlite3.Connection | None = self._connect_writer()
            self._damaged = False  # the writer's connection, by an error
            self._log_is_sound = False
            self._reader: sqlite3.Connection | None = self._connect_reader()
        except (OSError, sqlite3.Error) as error:
            raise _unavailable(error) from None
        self._thread = threading.Thread(target=self._write_until_closed, name="openline-store", daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        state = "closed" if self._closing else "reopening" if self._damaged else "open"
        return f"{self.path or ':memory:'} {state} queued={self._queue.qsize()}"

    async def close(self) -> None:
        """Commit what waits and let go of the file. Safe to call twice; what comes later is refused."""
        if not self._closing:
            self._closing = True
            self._queue.put(None)
            self._drop_reader()  # so that the writer is the last one out, and leaves one tidy file
        await asyncio.to_thread(self._thread.join)

    # --- Reading ------------------------------------------------------------------------------------

    def read(self, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
        """The rows of a short query, read here and now.

        Raises:
            StoreUnavailable: they cannot be read.
        """
        return self._read(lambda: self._on_reader(sql, parameters))

    async def read_apart(self, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
        """The rows of a query that may take long, read on a thread and a connection of its own.

        Raises:
            StoreUnavailable: they cannot be read.
        """
        return await asyncio.to_thread(self._read, lambda: self._on_another(sql, parameters))

    def _read(self, query: Callable[[], list[Any]]) -> list[Any]:
        if self._closing:
            raise StoreUnavailable("it is closed")
        try:
            return query()
        except UnicodeEncodeError:
            return []  # a lone surrogate: no row has such an id, and SQLite takes none
        except sqlite3.Error as error:
            if not _passes(error):
                self._drop_reader()
            raise _unavailable(error) from None

    def _on_reader(self, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
        with self._read_lock:
            if self._reader is None:
                self._reader = self._connect_reader()
            return self._reader.execute(sql, parameters).fetchall()

    def _on_another(self, sql: str, parameters: tuple[Any, ...]) -> list[Any]:
        if self.path is None:
            return self._on_reader(sql, parameters)
        with contextlib.closing(self._connect_reader()) as connection:
            return connection.execute(sql, parameters).fetchall()

    def _drop_reader(self) -> None:
        if self.path is None:  # it is the writer's
            return
        with self._read_lock:
            if self._reader is not None:
                self._reader.close()
                self._reader = None

    # --- Writing, on the store's thread ------------------------------------------------------------

    async def write(self, *statements: Statement) -> int:
        """All of these, or none; how many rows they changed.

        Raises:
            NotAppended: a statement changed nothing, and has this reason.
            StoreUnavailable: the same, or they could not be committed.
        """
        if self._closing:
            raise StoreUnavailable("it is closed")
        if self._queue.qsize() >= self._writes_queued_max:
            raise StoreUnavailable(f"it is behind, {self._writes_queued_max} writes wait already")
        future = asyncio.get_running_loop().create_future()
        self._queue.put(_Write(future, statements))
        return await future

    def _write_until_closed(self) -> None:
        closed = False
        while not closed:
            waiting = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    waiting.append(self._queue.get_nowait())
            closed = waiting[-1] is None
            writes = [write for write in waiting if write is not None]
            if writes:
                _report(writes, self._commit(writes))
        if self._writer is not None:
            self._drop_writer()

    def _commit(self, writes: list[_Write]) -> list[_Outcome]:
        """One transaction; what each write came to, once the commit is on the disk."""
        with self._write_lock:
            try:
                writer = self._sound_writer()
                writer.execute("BEGIN IMMEDIATE")
                outcomes = [_apply(writer, write.statements) for write in writes]
                writer.execute("COMMIT")
                return outcomes
            except Exception as error:  # noqa: BLE001 - whatever it is, the next writes need this thread
                self._recover(error)
                return [_unavailable(error) for _ in writes]

    def _sound_writer(self) -> sqlite3.Connection:
        """A connection behind whose log one can write."""
        if self._damaged or self._writer is None:
            connection = self._connect_writer()
            self._drop_writer()
            self._writer, self._damaged, self._log_is_sound = connection, False, False
        if not self._log_is_sound:
            _empty_log(self._writer, self._lock_wait_seconds_max)
            self._log_is_sound = True
        return self._writer

    def _recover(self, error: Exception) -> None:
        if self._writer is None:
            return
        with contextlib.suppress(sqlite3.Error):
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
        if self.path is None or _passes(error):
            return
        if self._writer.in_transaction:  # it would keep the lock from the one that takes its place
            self._drop_writer()
        self._damaged = True
        self._drop_reader()  # whoever mends the file may put another in its place
        with contextlib.suppress(Exception):  # the next write says what is wrong
            self._sound_writer()  # at once, so that a failed commit is gone before anybody is told that it failed

    def _drop_writer(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(sqlite3.Error):
                self._writer.close()
            self._writer = None

    # --- Connections --------------------------------------------------------------------------------

    def _make_file(self) -> None:
        """Make the file before SQLite does, so that only its user can read it; SQLite's own files take its mode."""
        if self.path is not None:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))

    def _connect_writer(self) -> sqlite3.Connection:
        connection = self._connect(self._lock_wait_seconds_max)
        try:
            migrate(connection)
            mode = _journal_in_wal(connection, self._lock_wait_seconds_max)
            if self.path is not None and mode != "wal":
                raise StoreUnavailable("it is on a file system that cannot share memory, which WAL needs")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")  # what belongs to a deleted row goes with it
            connection.execute("PRAGMA secure_delete = ON")  # a deleted turn is overwritten, not only unlinked
            connection.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES_KEPT_MAX}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect_reader(self) -> sqlite3.Connection:
        if self.path is None:
            assert self._writer is not None
            return self._writer
        connection = self._connect(_READ_LOCK_WAIT_SECONDS_MAX)
        try:
            connection.execute("PRAGMA query_only = ON")
            connection.execute("PRAGMA temp_store = MEMORY")  # a chain's rows stay out of temporary files
        except BaseException:
            connection.close()
            raise
        return connection

    def _connect(self, lock_wait_seconds: float) -> sqlite3.Connection:
        # mode=rw: a file that has gone is an error, not a new and empty store.
        database = ":memory:" if self.path is None else f"{self.path.as_uri()}?mode=rw"
        return sqlite3.connect(
            database,
            uri=True,
            timeout=lock_wait_seconds,
            isolation_level=None,  # transactions are ours
            check_same_thread=False,  # opened at start, written on the store's thread
        )


def _journal_in_wal(connection: sqlite3.Connection, lock_wait_seconds_max: float) -> str:
    """Switch a new file to WAL, if that can be; the mode that it is in.

    SQLite itself does not wait here for a lock: of two processes that start on one new file, each would wait for the other.
    Source: SQLite's documentation of `sqlite3_busy_handler`.
    """
    give_up_at = time.monotonic() + lock_wait_seconds_max
    while True:
        try:
            return connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        except sqlite3.OperationalError as error:
            if _code(error) & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= give_up_at:
                raise
        time.sleep(_LOOK_AGAIN_SECONDS)


def _empty_log(connection: sqlite3.Connection, lock_wait_seconds_max: float) -> None:
    """Bring all of the log into the database, and to the disk with that. Who reads for long keeps the log as it is."""
    # A connection that has not read yet would open the log in the checkpoint itself, and then wait for its own lock.
    connection.execute("PRAGMA user_version").fetchone()
    # It waits for readers, and meanwhile all others who would write wait for it: not so long that they give up.
    connection.execute(f"PRAGMA busy_timeout = {int(lock_wait_seconds_max * 500)}")
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(lock_wait_seconds_max * 1000)}")


def _apply(connection: sqlite3.Connection, statements: tuple[Statement, ...]) -> _Outcome:
    try:
        if len(statements) == 1:  # which SQLite itself undoes if it fails
            return _run(connection, statements[0])
        connection.execute("SAVEPOINT a_write")
        try:
            return sum(_run(connection, statement) for statement in statements)
        except _WRITE_ERRORS:
            connection.execute("ROLLBACK TO a_write")
            raise
        finally:
            if connection.in_transaction:
                connection.execute("RELEASE a_write")
    except _WRITE_ERRORS as error:
        return _refusal(error)


def _run(connection: sqlite3.Connection, statement: Statement) -> int:
    changed = connection.execute(statement.sql, statement.parameters).rowcount
    if changed == 0 and statement.otherwise is not None:
        raise _refusal(statement.otherwise)
    return changed


def _report(writes: list[_Write], outcomes: list[_Outcome]) -> None:
    """Wake whoever waits, with one call for each event loop."""
    loops: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[int], _Outcome]]] = {}
    for write, outcome in zip(writes, outcomes, strict=True):
        loops.setdefault(write.future.get_loop(), []).append((write.future, outcome))
    for loop, done in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits
            loop.call_soon_threadsafe(_resolve, done)


def _resolve(done: list[tuple[asyncio.Future[int], _Outcome]]) -> None:
    for future, outcome in done:
        if future.done():  # its caller was cancelled
            continue
        if isinstance(outcome, int):
            future.set_result(outcome)
        else:
            future.set_exception(outcome)


def _passes(error: Exception) -> bool:
    return isinstance(error, sqlite3.Error) and _code(error) & 0xFF in _PASSING


def _code(error: sqlite3.Error) -> int:
    # Errors of the module itself, such as a closed connection, have no code.
    return getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)


def _refusal(error: Exception) -> Refusal:
    """What its caller gets: an exception of its own, as a raised one collects tracebacks."""
    return type(error)(*error.args) if isinstance(error, NotAppended) else _unavailable(error)


def _unavailable(error: Exception) -> StoreUnavailable:
    """The kind of an error as half a sentence, without the library's text, which may quote content."""
    if isinstance(error, StoreUnavailable):
        return type(error)(*error.args)
    if isinstance(error, sqlite3.Error):
        code = _code(error)
        reason = _REASONS.get(code & 0xFF, "failed")
        return StoreUnavailable(f"it {reason} ({getattr(error, 'sqlite_errorname', type(error).__name__)})")
    if isinstance(error, OSError):
        return StoreUnavailable(f"it cannot be opened, {error.strerror}")
    return StoreUnavailable(f"it failed ({type(error).__name__})")
