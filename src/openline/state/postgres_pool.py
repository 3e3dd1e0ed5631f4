"""Connections to a PostgreSQL server, and what can go wrong with them.

Every call has a deadline. Whatever fails is a `StoreUnavailable`; a connection that may be in the middle of
something is thrown away, and the next call makes another, so that a server that comes back is used at once.

A connection that is lost over a write leaves open whether the server has committed it. Writes that would be told
wrongly then are made again until the server has said so: docs/adr/0012.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final, TypeVar

import asyncpg  # pyright: ignore[reportMissingTypeStubs] - it has none; all of it is behind this file

from openline.state.postgres_migrations import migrate
from openline.state.store import NotAppended, StoreUnavailable, without_secrets

T = TypeVar("T")

# A call that has to wait for a connection, for another's lock and for the disk; G28 asks for recovery within 5 s.
CALL_SECONDS_MAX: Final = 5.0
# As many as SQLite's writer may have waiting; more is a server in trouble.
CALLS_WAITING_MAX: Final = 8192
# How long a write whose connection was lost is made again: a server that crashes is back in a few seconds.
DOUBT_SECONDS_MAX: Final = 10.0
_AGAIN_SECONDS: Final = 0.1
_OF_CALL: Final = 0.8  # of a call's time the server has so much
_GOODBYE_SECONDS_MAX: Final = 1.0
_IDLE_SECONDS_MAX: Final = 300.0  # then a connection is closed; servers count them

# By SQLSTATE, else by its class, which is its first two characters. The rest are named by their code.
_REASONS: Final = {
    "08": "has closed the connection",
    "22": "cannot hold such a value",
    "25006": "is read-only",
    "28": "refuses this user or password",
    "3D000": "has no such database",
    "3F000": "has no schema for its tables",
    "40": "met a conflict with another write",
    "42501": "does not let this user do it",
    "42P01": "has lost its tables",
    "53100": "is on a full disk",
    "53200": "is out of memory",
    "53300": "has no connection left",
    "54": "cannot hold a value so large",
    "55P03": "is locked by another program",
    "57014": "did not answer in time",
    "57P": "is starting or stopping",
    "58": "met an I/O error",
    "XX001": "is corrupt",
    "XX002": "is corrupt",
}


class ConnectionLost(StoreUnavailable):
    """The connection was lost over a call: what it was to do may have been done."""


class Pool:
    """Up to so many connections to one database, on the newest schema.

    Args:
        url: `postgresql://…`, as libpq knows it; what it does not say comes from PGHOST, PGPASSWORD, … and ~/.pgpass.
        connections_max: how many at most.
        call_seconds_max: how long a call may take, its wait for a connection included.
        doubt_seconds_max: for how long a write whose connection was lost is begun again.
        calls_waiting_max: how many may be under way or wait for a connection; one more is refused.
    """

    def __init__(
        self,
        url: str,
        *,
        connections_max: int,
        call_seconds_max: float,
        doubt_seconds_max: float,
        calls_waiting_max: int,
    ) -> None:
        self._url = url
        self._connections_max = connections_max
        self._call_seconds_max = call_seconds_max
        self._doubt_seconds_max = doubt_seconds_max
        self._calls_waiting_max = calls_waiting_max
        self._opening = asyncio.Lock()
        self._pool: Any = None
        self._closing = False
        self._calls: set[asyncio.Task[Any]] = set()

    def __repr__(self) -> str:
        state = "closed" if self._closing else "open" if self._pool else "not connected"
        connections = self._pool.get_size() if self._pool else 0
        return f"{without_secrets(self._url)} {state} connections={connections} calls={len(self._calls)}"

    async def call(
        self,
        work: Callable[[Any], Awaitable[T]],
        *,
        again: Callable[[Any], Awaitable[T]] | None = None,
        seconds_max: float | None = None,
    ) -> T:
        """Do something on a connection. It is done to its end also if the caller is cancelled.

        Args:
            work: gets asyncpg's connection, which is not in a transaction.
            again: does it where it may have been done already, because the connection was lost over it.
            seconds_max: how long it may take, if not as long as every call.

        Raises:
            NotAppended: `work` raised it.
            StoreUnavailable: `work` raised it, or the database cannot be used.
        """
        if self._closing:
            raise StoreUnavailable("it is closed")
        if len(self._calls) >= self._calls_waiting_max:
            raise StoreUnavailable(f"it is behind, {self._calls_waiting_max} calls wait already")
        task = asyncio.ensure_future(self._call(work, again, seconds_max or self._call_seconds_max))
        self._calls.add(task)
        task.add_done_callback(self._done)
        return await asyncio.shield(task)  # cut in its middle, a write may or may not be there

    async def close(self) -> None:
        """Let what runs end, and let go of the connections. Safe to call twice; what comes later is refused."""
        self._closing = True
        if self._calls:
            _, late = await asyncio.wait(list(self._calls), timeout=self._call_seconds_max)
            for call in late:  # only those that may take longer than a write
                call.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                async with asyncio.timeout(_GOODBYE_SECONDS_MAX):
                    await pool.close()
            except Exception:  # noqa: BLE001 - whatever it is, nothing is lost by hanging up
                pool.terminate()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._calls.discard(task)
        if not task.cancelled():
            task.exception()  # which nobody sees if the caller has gone

    async def _call(
        self,
        work: Callable[[Any], Awaitable[T]],
        again: Callable[[Any], Awaitable[T]] | None,
        seconds_max: float,
    ) -> T:
        try:
            return await self._attempt(work, seconds_max)
        except ConnectionLost as lost:
            if again is None:
                raise
            return await self._make_sure(again, lost)

    async def _make_sure(self, again: Callable[[Any], Awaitable[T]], lost: StoreUnavailable) -> T:
        """Do it again until the server has said what became of it."""
        deadline = _now() + self._doubt_seconds_max
        while _now() < deadline:
            try:
                return await self._attempt(again, self._call_seconds_max)
            except StoreUnavailable as still:
                if type(still) not in {StoreUnavailable, ConnectionLost}:
                    raise  # that is the answer
                lost = still
            await asyncio.sleep(_AGAIN_SECONDS)
        raise StoreUnavailable(f"{lost}, and whether this was kept is not known")

    async def _attempt(self, work: Callable[[Any], Awaitable[T]], seconds_max: float) -> T:
        began = False

        async def begun(connection: Any) -> T:
            nonlocal began
            began = True
            return await work(connection)

        try:
            async with asyncio.timeout(seconds_max):
                await self._open()
                return await self._on_connection(self._pool, begun)
        except NotAppended:
            raise
        except asyncio.CancelledError:
            if self._closing:
                raise StoreUnavailable("it is closed") from None
            raise
        except TimeoutError:
            if self._pool is not None:
                await self._pool.expire_connections()  # the others may lead nowhere as well
            reason = f"it has not answered within {seconds_max:g} seconds"
            raise (ConnectionLost(reason) if began else StoreUnavailable(reason)) from None
        except Exception as error:  # noqa: BLE001 - asyncpg, asyncio, ssl and the system each have their own
            reason = unavailable(error)
            raise (ConnectionLost(str(reason)) if began and _is_lost(error) else reason) from None

    async def _open(self) -> None:
        if self._pool is not None:
            return
        async with self._opening:  # one asks whether it is there, and the others learn it
            if self._pool is not None:
                return
            pool: Any = await asyncpg.create_pool(  # pyright: ignore[reportUnknownMemberType]
                self._url,
                min_size=0,
                max_size=self._connections_max,
                max_inactive_connection_lifetime=_IDLE_SECONDS_MAX,
                reset=_nothing_to_reset,
                server_settings=self._server_settings(),
            )
            try:
                await self._on_connection(pool, migrate)
            except BaseException:
                pool.terminate()
                raise
            self._pool = pool

    def _server_settings(self) -> dict[str, str]:
        milliseconds = str(max(1, int(self._call_seconds_max * _OF_CALL * 1000)))
        return {
            "application_name": "openline",
            # A server that has lost us gives up as well, and lets go of its locks. It does so first, and says so: where
            # we give up we do not know what it has done.
            "statement_timeout": milliseconds,
            "idle_in_transaction_session_timeout": milliseconds,
            "default_transaction_isolation": "read committed",
            "jit": "off",  # a chain's query looks expensive to the planner, and is not
        }

    @staticmethod
    async def _on_connection(pool: Any, work: Callable[[Any], Awaitable[T]]) -> T:
        connection = await pool.acquire()
        try:
            return await work(connection)
        except BaseException as error:
            if not isinstance(error, (asyncpg.PostgresError, StoreUnavailable, NotAppended)):
                connection.terminate()  # it may be in the middle of anything
            raise
        finally:
            await pool.release(connection)


async def _nothing_to_reset(connection: Any) -> None:
    """In place of a query that asyncpg would make after each use: no call leaves anything behind."""


def _now() -> float:
    return asyncio.get_running_loop().time()


def _is_lost(error: Exception) -> bool:
    """Whether the server may have done it and not said so: asyncpg gives an error of the server's only with its end."""
    if isinstance(error, asyncpg.PostgresError):
        return isinstance(error, asyncpg.PostgresConnectionError)
    return not isinstance(error, StoreUnavailable | ValueError | OverflowError)  # those of values that cannot be sent


def unavailable(error: Exception) -> StoreUnavailable:
    """The kind of an error as half a sentence, without the library's text, which may quote content or a password."""
    if isinstance(error, StoreUnavailable):
        return error
    if isinstance(error, asyncpg.PostgresError):
        sqlstate: str = getattr(error, "sqlstate", None) or "no code"
        return StoreUnavailable(f"it {_reason(sqlstate)} ({sqlstate})")
    if isinstance(error, asyncpg.InterfaceError) and not isinstance(error, ValueError):
        return StoreUnavailable("it has closed the connection")
    if isinstance(error, asyncpg.InterfaceError) and not isinstance(error, asyncpg.ClientConfigurationError):
        return StoreUnavailable("it cannot hold such a value")
    if isinstance(error, ValueError | OverflowError):  # asyncpg's own, or of what reads a URL's parts
        return StoreUnavailable("its URL cannot be used")
    if isinstance(error, ssl.SSLError):
        return StoreUnavailable(f"its TLS cannot be used ({error.reason})")
    if isinstance(error, OSError):
        return StoreUnavailable(f"it cannot be reached, {_system_reason(error)}")
    return StoreUnavailable(f"it failed ({type(error).__name__})")


def _reason(sqlstate: str) -> str:
    for length in (5, 3, 2):
        if sqlstate[:length] in _REASONS:
            return _REASONS[sqlstate[:length]]
    return "failed"


def _system_reason(error: OSError) -> str:
    if error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)  # asyncio's own text repeats the address
    return error.strerror or "it has closed the connection or does not speak TLS"
