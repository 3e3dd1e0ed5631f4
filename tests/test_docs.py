"""The examples of docs/ run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "```python\n" in page.read_text(encoding="utf-8"))
# Slow enough that a client can act in the middle of a turn.
CONFIG = """
[[upstreams]]
kind = "scripted"
delta_seconds = 0.01
"""


def examples() -> Iterator[object]:
    """Every Python block, by page and heading."""
    for page in PAGES:
        heading = ""
        for match in re.finditer(
            r"^#+ ([^\n]+)$|```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
        ):
            if match[1]:
                heading = match[1]
            else:
                yield pytest.param(match[2], id=f"{page.stem}-{heading.lower().replace(' ', '-')}")


@pytest.mark.parametrize("code", list(examples()))
def test_an_example_runs_as_it_stands(code: str, server: str):
    """Nothing is changed but the address, and it says something."""
    code = code.replace("http://127.0.0.1:8484", server)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`openline serve` in front of the script, on a free port; its address."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "openline.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "openline", "serve", "--port", "0", "--config", str(folder / "openline.toml")]
    command += ["--store", f"sqlite:{folder}/docs.db"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "listens on" in line)
        found = re.search(r"http://[^/\s]+", line)
        assert found
        yield found.group()
        process.terminate()
        assert process.wait(10) == 0, "a server that was told to stop ends with 0"
