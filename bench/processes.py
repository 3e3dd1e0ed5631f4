"""The processes that a benchmark starts, and their ports."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

STARTED_SECONDS_MAX: Final = 120.0  # a model file that is loaded first
ENDED_SECONDS_MAX: Final = 10.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends with the block."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(ENDED_SECONDS_MAX)
        finally:
            process.kill()  # nothing where it has ended


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until somebody accepts on the port."""
    ends = time.monotonic() + STARTED_SECONDS_MAX
    while time.monotonic() < ends and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit(f"Nothing listens on port {port}.")
