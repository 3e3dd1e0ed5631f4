"""The same session for programs without an event loop: it lives in a thread of its own, and every call waits for it."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from functools import wraps
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, Self, TypeVar

from openline.client.connections import Over
from openline.client.history import History
from openline.client.run_result import RunResult
from openline.client.run_tools import run_tools
from openline.client.session import Session, connect
from openline.client.stream import ResponseStream
from openline.client.wire import Event, Response

T = TypeVar("T")
P = ParamSpec("P")


class SyncResponseStream:
    """The events of one turn; its names are those of `ResponseStream`."""

    def __init__(self, thread: LoopThread, stream: ResponseStream) -> None:
        self._thread = thread
        self._stream = stream

    def __repr__(self) -> str:
        return f"<SyncResponseStream {self._stream!r}>"

    @property
    def idempotency_key(self) -> str:
        """As of `ResponseStream`."""
        return self._stream.idempotency_key

    @property
    def response_id(self) -> str | None:
        """As of `ResponseStream`."""
        return self._stream.response_id

    @property
    def is_ended(self) -> bool:
        """As of `ResponseStream`."""
        return self._stream.is_ended

    @property
    def restarts(self) -> int:
        """As of `ResponseStream`."""
        return self._stream.restarts

    def __iter__(self) -> Iterator[Event]:
        """Every event, once and in order; leaving the loop before the last cancels the turn, unless it is detached."""
        try:
            while (event := self._thread.call(_next(self._stream))) is not None:
                yield event
        finally:
            self.close()

    def __next__(self) -> Event:
        """The next event."""
        event = self._thread.call(_next(self._stream))
        if event is None:
            raise StopIteration
        return event

    def response(self) -> Response:
        """As of `ResponseStream`."""
        return self._thread.call(self._stream.response())

    def cancel(self) -> None:
        """As of `ResponseStream`."""
        self._thread.call(self._stream.cancel())

    def detach(self) -> None:
        """As of `ResponseStream`."""
        self._stream.detach()

    def close(self) -> None:
        """As `ResponseStream.aclose`."""
        if not self._stream.is_ended:
            self._thread.call(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _sync_create(
    create: Callable[Concatenate[Session, P], ResponseStream],
) -> Callable[Concatenate[SyncSession, P], SyncResponseStream]:
    """`Session.create` with the same arguments, for a `SyncSession`."""

    @wraps(create)
    def called(session: SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> SyncResponseStream:
        return SyncResponseStream(session.thread, create(session.session, *args, **kwargs))

    return called


def _sync_run_tools(
    run: Callable[Concatenate[Session, P], Coroutine[Any, Any, RunResult]],
) -> Callable[Concatenate[SyncSession, P], RunResult]:
    """`run_tools` with the same arguments, for a `SyncSession`."""

    @wraps(run)
    def called(session: SyncSession, /, *args: P.args, **kwargs: P.kwargs) -> RunResult:
        return session.thread.call(run(session.session, *args, **kwargs))

    return called


class SyncSession:
    """One conversation; `connect_sync` makes it. Its names are those of `Session`.

    Calls may come from any thread, one turn at a time. A KeyboardInterrupt ends the waiting; where a loop or a block is
    left by it, the turn is cancelled.

    Attributes:
        session: what it waits for.
        thread: where that lives.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.thread = LoopThread()
        # Also for one that nobody closes: its thread would stay, and its connections with it.
        self._close = weakref.finalize(self, _close, self.thread, session)

    def __repr__(self) -> str:
        return f"<SyncSession {self.session!r}>"

    @property
    def id(self) -> str:
        """As of `Session`."""
        return self.session.id

    @property
    def history(self) -> History:
        """As of `Session`."""
        return self.session.history

    @property
    def transport(self) -> Over:
        """As of `Session`."""
        return self.thread.call(_transport(self.session))

    @property
    def has_extensions(self) -> bool | None:
        """As of `Session`."""
        return self.session.has_extensions

    create = _sync_create(Session.create)
    run_tools = _sync_run_tools(run_tools)

    def close(self) -> None:
        """Cancel what runs, close every connection, and end the thread; doing it again is harmless."""
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _sync_connect(connect: Callable[P, Session]) -> Callable[P, SyncSession]:
    @wraps(connect, assigned=())
    def connect_sync(*args: P.args, **kwargs: P.kwargs) -> SyncSession:
        """A session for programs without an event loop; arguments and errors are those of `connect`.

        ```python
        with openline.connect_sync("http://127.0.0.1:8484/v1", model="qwen3-coder") as session:
            for event in session.create(input="Hello."):
                ...
        ```
        """
        return SyncSession(connect(*args, **kwargs))

    return connect_sync


connect_sync = _sync_connect(connect)


class LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop
        self._stopped: asyncio.Event
        self._thread = threading.Thread(target=self._run, name="openline-session", daemon=True)
        self._thread.start()
        self._started.wait()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run something there, and wait for it; whoever stops waiting ends it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the loop, and wait for its thread."""
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await self._stopped.wait()


def _close(thread: LoopThread, session: Session) -> None:
    try:
        thread.call(session.close())
    finally:
        thread.stop()


async def _next(stream: ResponseStream) -> Event | None:
    return await anext(stream, None)


async def _transport(session: Session) -> Over:
    return session.transport
