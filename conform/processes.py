"""Child processes that end: each has a log, a limit in seconds, and a process group of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

READY_SECONDS_MAX = 30
READY_POLL_SECONDS = 0.05  # readiness is only to be had by asking
STOP_SECONDS_MAX = 15


@dataclass(frozen=True)
class Finished:
    """How a child ended. `exit_code` is None when it ran past its limit."""

    exit_code: int | None
    stdout: str
    seconds: float

    @property
    def reason(self) -> str:
        """Say it in words."""
        return "ran past its limit" if self.exit_code is None else f"ended with exit code {self.exit_code}"


async def run_logged(
    command: list[str],
    log: Path,
    *,
    seconds_max: float,
    cwd: Path,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Run a command to its end, or to the limit; stdout and stderr go to the log, and stdout comes back too."""
    started = time.monotonic()
    with log.open("wb") as sink:
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=cwd,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=sink,
            start_new_session=True,
        )
        exit_code, stdout = None, b""
        try:
            async with asyncio.timeout(seconds_max):
                stdout, _ = await process.communicate()
            exit_code = process.returncode
        except TimeoutError:
            pass
        finally:
            await end_group(process)
            sink.write(stdout)
    return Finished(exit_code, stdout.decode(errors="replace"), time.monotonic() - started)


async def end_group(process: asyncio.subprocess.Process) -> None:
    """Kill what is left of a child and of its own children, and reap it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


@dataclass
class Server:
    """`openline serve` in front of an upstream, given by its SPEC, as a user would start it."""

    upstream: str
    store: Path
    log: Path
    url: str = ""
    _process: asyncio.subprocess.Process | None = field(default=None, repr=False)

    async def start(self) -> str:
        """Start it and wait until it says that it is ready; return the base URL, which ends in `/v1`.

        Raises:
            RuntimeError: it ended, or was not ready in time; the log says why.
        """
        port = free_port()
        command = [sys.executable, "-m", "openline", "serve", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--upstream", self.upstream, "--store", f"sqlite:{self.store}"]
        with self.log.open("wb") as sink:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.store.parent,
                env=plain_environment(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        self.url = f"http://127.0.0.1:{port}/v1"
        try:
            async with asyncio.timeout(READY_SECONDS_MAX):
                await self._ready(f"http://127.0.0.1:{port}/readyz")
        except TimeoutError:
            raise RuntimeError(f"the server was not ready after {READY_SECONDS_MAX} s") from None
        return self.url

    async def _ready(self, url: str) -> None:
        assert self._process is not None
        async with aiohttp.ClientSession() as session:
            while self._process.returncode is None:
                try:
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientError:
                    pass
                await asyncio.sleep(READY_POLL_SECONDS)
        raise RuntimeError(f"the server ended with exit code {self._process.returncode} before it was ready")

    async def stop(self) -> int | None:
        """Ask it to end, and return its exit code; None when it had to be killed."""
        if self._process is None:
            return None
        exit_code = None
        try:
            if self._process.returncode is None:
                self._process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(STOP_SECONDS_MAX):
                exit_code = await self._process.wait()
        except TimeoutError:
            pass
        finally:
            await end_group(self._process)
        return exit_code


def free_port() -> int:
    """Return a loopback port that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def plain_environment() -> dict[str, str]:
    """Return the environment without what would steer a client or the server elsewhere."""
    foreign = ("OPENAI_", "OPENLINE_", "CODEX_", "PYTHONPATH")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(foreign) and "_PROXY" not in name.upper()
    }
    return {**kept, "OPENAI_AGENTS_DISABLE_TRACING": "1", "PYTHONUNBUFFERED": "1"}
