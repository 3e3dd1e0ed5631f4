"""The `openline` command as its users start it: in a process of its own."""

import os
import subprocess
import sys
from contextlib import contextmanager


def environment(**more):
    """Ours, without what would configure it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("OPENLINE_")}
    return kept | {"PYTHONUTF8": "1", "COLUMNS": "80"} | more


@contextmanager
def running(*arguments, **environ):
    """The running command; it is gone afterwards."""
    with subprocess.Popen(
        [sys.executable, "-m", "openline", *arguments],
        env=environment(**environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@contextmanager
def serving(*arguments, **environ):
    """`openline serve` on a free port, and what it has said up to its last hint; it is gone afterwards."""
    with running("serve", "--port", "0", "--store", "none", *arguments, **environ) as process:
        yield process, read_until(process, "supports_websockets")


def read_until(process, text):
    """What a running command says up to the line with this text."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"{text!r} never came: {''.join(lines)}{process.stderr.read()}")
