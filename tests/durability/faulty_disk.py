"""A disk that fails when it is told to, for one process: `faulty_disk.c` beside it, and what it has written down."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCE = Path(__file__).with_suffix(".c")
_HEAD = struct.Struct("=cBHIQ")  # `struct head`


class Orders(ctypes.Structure):
    """What the disk is to do: `struct orders`."""

    _fields_ = [
        (name, ctypes.c_int32)
        for name in (
            "fsync_fails_every",
            "fsync_errno",
            "write_errno",
            "open_errno",
            "fsync_waits",
            "fsyncs",
            "failures",
        )
    ]

    @classmethod
    def at(cls, path: str) -> Orders:
        """The same that the disk sees."""
        with open(path, "r+b") as file:  # noqa: PTH123 - the child that calls this has a text
            return cls.from_buffer(mmap.mmap(file.fileno(), 0))

    def obey(
        self, *, fsync_fails_every: int = 0, write_errno: int = 0, open_errno: int = 0, fsync_waits: bool = False
    ) -> None:
        """Do this, and nothing of what was ordered before."""
        self.fsync_errno = errno.EIO
        self.fsync_fails_every = fsync_fails_every
        self.write_errno = write_errno
        self.open_errno = open_errno
        self.fsync_waits = fsync_waits


class FaultyDisk:
    """The disk under one folder, for the processes that get its `environ`.

    Args:
        folder: its files, and nothing else, are on that disk.
        beside: where what belongs to the disk itself goes.

    Attributes:
        orders: to be obeyed, and its counts.
    """

    def __init__(self, folder: Path, beside: Path) -> None:
        library, orders, self._record = (beside / name for name in ("faulty_disk.so", "orders", "record"))
        _compile(library)
        orders.write_bytes(bytes(ctypes.sizeof(Orders)))
        self.orders = Orders.at(str(orders))
        self.environ = {
            "LD_PRELOAD": str(library),
            "FAULTY_DISK_FOLDER": str(folder.resolve()),
            "FAULTY_DISK_ORDERS": str(orders),
        }

    def recording(self) -> dict[str, str]:
        """The same environment for a process whose writes are to be recorded."""
        return self.environ | {"FAULTY_DISK_RECORD": str(self._record)}

    def recorded(self) -> list[Record]:
        """All that reached it, in order."""
        return list(_records(self._record.read_bytes()))


def _compile(library: Path) -> None:
    import pytest

    if sys.platform != "linux":
        pytest.skip("the faulty disk needs Linux")
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        reason = "there is no C compiler to make the faulty disk with"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)


# --- What would be left after a power cut


class Record(NamedTuple):
    """A call, or what a process said of itself between two calls."""

    kind: str  # w(rite), t(runcate), f(sync), u(nlink); any other is the process's own
    failed: bool
    name: str
    offset: int
    data: bytes


def say(kind: str, name: str) -> None:
    """Of a process on this disk: write down a word of its own."""
    record = os.open(os.environ["FAULTY_DISK_RECORD"], os.O_WRONLY | os.O_APPEND)
    os.write(record, _HEAD.pack(kind.encode(), 0, len(name), 0, 0) + name.encode())
    os.close(record)


def _records(raw: bytes) -> Iterator[Record]:
    at = 0
    while at < len(raw):
        kind, failed, name_bytes, data_bytes, offset = _HEAD.unpack_from(raw, at)
        data_at = at + _HEAD.size + name_bytes
        at = data_at + data_bytes
        yield Record(kind.decode(), bool(failed), raw[data_at - name_bytes : data_at].decode(), offset, raw[data_at:at])


class _File:
    def __init__(self) -> None:
        self.durable: bytearray | None = None  # None: not even its name is there
        self.pending: list[Record] = []

    def with_(self, records: list[Record]) -> bytearray:
        content = bytearray(self.durable or b"")
        for record in records:
            end = record.offset + len(record.data)
            if record.kind == "t":
                del content[end:]
            content.extend(bytes(max(0, end - len(content))))
            content[record.offset : end] = record.data
        return content


class Platter:
    """What is on the disk for sure, and what is on its way there, as the records are told to it."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}

    def take(self, record: Record) -> None:
        """One more call."""
        file = self._files.setdefault(record.name, _File())
        match record.kind:
            case "w" | "t":
                file.pending.append(record)
            case "f":
                if not record.failed:
                    file.durable = file.with_(file.pending)
                file.pending = []  # what an fsync failed over nobody writes again
            case "u":
                del self._files[record.name]

    def after_power_cut(self, folder: Path, rng: random.Random) -> None:
        """Write the files as they would be found: of what was on its way, some calls have arrived and some have not."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, file in self._files.items():
            share = rng.choice([0, 0.5, 1])
            arrived = [record for record in file.pending if rng.random() < share]
            if file.durable is not None or arrived:
                (folder / name).write_bytes(file.with_(arrived))
