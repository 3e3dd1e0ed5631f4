"""The import contract of pyproject.toml: imports go down only, and the protocol is pure."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(source: Path) -> subprocess.CompletedProcess[str]:
    """Check the contract on the package in `source`, which comes before the installed one."""
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=source,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": str(source), "PYTHONUTF8": "1", "NO_COLOR": "1"},
        check=False,
        timeout=60,
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of `src/` to plant defects in."""
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "src"


def test_imports_go_down_only(source):
    """The package as it is keeps the contract."""
    result = lint(source)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("layer", "planted"),
    [
        ("protocol", "openline.config"),
        ("state", "openline.turns"),
        ("engines", "openline.state"),
        ("turns", "openline.server"),
        ("server", "openline.cli"),
        ("protocol", "time"),
        ("protocol", "asyncio"),
    ],
)
def test_a_planted_import_breaks_the_contract(source, layer, planted):
    """A module that imports a higher layer or a sibling, or a clock in the protocol, is found and named."""
    (source / "openline" / layer / "planted.py").write_text(f"import {planted}\n", encoding="utf-8")
    result = lint(source)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"openline.{layer}.planted -> {planted}" in result.stdout
