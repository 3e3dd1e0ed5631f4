"""A lock between processes that its holder's death sets free, however it dies.

The operating system holds it, on a file that names the holder's pid. A pid alone would not do: it says nothing across
containers, and is given to another process after a while.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_PID_BYTES_MAX: Final = 20


class Locked(Exception):  # noqa: N818 - what was found
    """Another holds the lock.

    Attributes:
        pid: its process, as it says itself; None if it has not said.
    """

    def __init__(self, pid: int | None) -> None:
        super().__init__(f"process {pid} holds the lock")
        self.pid = pid


@contextmanager
def process_lock(path: Path) -> Generator[None]:
    """Hold the lock in this block; two in one process exclude each other too.

    Args:
        path: a file that is the lock's own, made and removed here.

    Raises:
        Locked: another holds it.
        OSError: the file cannot be made.
    """
    handle = _take(path)
    try:
        os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        _give_back(path, handle)


def _take(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if not _try_lock(handle):
                raise Locked(_pid_in(handle))
            if _is_at(path, handle):
                os.ftruncate(handle, 0)  # the last holder died, and its pid still stands here
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has removed it meanwhile: this is nobody's lock any more


def _is_at(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _pid_in(handle: int) -> int | None:
    with suppress(OSError, ValueError):
        return int(os.pread(handle, _PID_BYTES_MAX, 0)) if sys.platform != "win32" else None
    return None


if sys.platform == "win32":  # pragma: no cover
    import msvcrt

    def _try_lock(handle: int) -> bool:
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _give_back(path: Path, handle: int) -> None:
        os.close(handle)
        with suppress(OSError):  # an open file cannot be removed there: another has it already
            path.unlink()

else:
    import fcntl

    def _try_lock(handle: int) -> bool:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _give_back(path: Path, handle: int) -> None:
        with suppress(FileNotFoundError):
            path.unlink()  # while it is held: whoever has the old file sees that it is not at this path
        os.close(handle)
