"""An event loop whose time is a number: it passes when nothing else is left to do, and at once.

Nothing here waits for sockets. What still takes real time is a thread, the store's own for instance: while it works, time
stands still, and its answer is taken when the loop has nothing else to do, so that the same seed is the same run.
"""

from __future__ import annotations

import asyncio
import queue
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")

THREAD_SECONDS_MAX = 30.0  # real ones


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """asyncio's own loop with that clock.

    Attributes:
        problems: what it was told of exceptions that nobody has taken.
    """

    def __init__(self) -> None:
        self.problems: list[dict[str, Any]] = []
        self._now = 0.0
        self._thread_id = threading.get_ident()
        self._outside = 0  # answers that threads still owe
        self._arrived: queue.SimpleQueue[tuple[Callable[..., object], tuple[Any, ...]]] = queue.SimpleQueue()
        super().__init__(_NoSockets(self))
        self.set_exception_handler(lambda _, context: self.problems.append(context))

    def time(self) -> float:
        return self._now

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any, context: Any = None) -> Any:
        if threading.get_ident() == self._thread_id:
            return self.call_soon(callback, *args, context=context)
        self._arrived.put((callback, args))
        return None

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        del timeout
        with self.outside():
            await super().shutdown_default_executor()

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Something is done on a thread: time does not pass until it is over."""
        self._outside += 1
        try:
            yield
        finally:
            self._outside -= 1

    def pass_time(self, seconds: float | None) -> None:
        """Nothing is ready: a thread has to answer, or the next timer's time has come."""
        if self._outside:
            callback, args = self._arrived.get(timeout=THREAD_SECONDS_MAX)
            self.call_soon(callback, *args)
        elif seconds is None:
            raise AssertionError("everything waits, and nothing will ever come")
        else:
            self._now += seconds


class _NoSockets(selectors.SelectSelector):
    """Stands where a loop waits for sockets: there are none but its own."""

    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout > 0:
            self._loop.pass_time(timeout)
        return []


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run to the end, in no time; a task that is left over a minute later, or an exception that nobody took, is an error."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:

        async def checked() -> T:
            result = await main
            await asyncio.sleep(60)
            left = asyncio.all_tasks() - {asyncio.current_task()}
            assert not left, f"tasks are left: {left}"
            return result

        result = runner.run(checked())
        loop = runner.get_loop()
    assert isinstance(loop, VirtualTimeLoop)
    assert not loop.problems, loop.problems
    return result
