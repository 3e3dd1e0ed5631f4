"""Puts the stock clients into `.conform/`, once for each set of pinned versions.

Nothing outside that folder is touched. What cannot be installed is named with its reason; the cases that
need it are then skipped, and say so.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from processes import run_logged

from openline.engines.tiny import is_available

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
HOME = ROOT / ".conform"
LOGS = HOME / "logs"

PYTHON = HOME / "python" / "bin" / "python"
NODE = HOME / "node"
CODEX = NODE / "node_modules" / ".bin" / "codex"

INSTALL_SECONDS_MAX = 600
NODE_MAJOR_MIN = 20


@dataclass
class Installed:
    """Which kinds of clients are there; `missing` maps the kinds that are not to their reason."""

    missing: dict[str, str] = field(default_factory=dict)


async def install(kinds: set[str]) -> Installed:
    """Install what the wanted kinds (`python`, `node`, `codex`) need and is not there yet; `tiny` comes by make."""
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n")
    LOGS.mkdir(exist_ok=True)
    installed = Installed()
    if "python" in kinds:
        note(installed, "python", await install_python())
    if kinds & {"node", "codex"}:
        reason = await install_node()
        note(installed, "node", reason)
        note(installed, "codex", reason or await codex_problem())
    if "tiny" in kinds:
        note(
            installed, "tiny", "" if is_available() else "llama.cpp is not installed: there is no wheel for this system"
        )
    return installed


def note(installed: Installed, kind: str, reason: str) -> None:
    """Keep a reason, if there is one."""
    if reason:
        installed.missing[kind] = reason


async def install_python() -> str:
    """Make the virtual environment; return why not, or nothing."""
    pins = HERE / "requirements.txt"
    folder = HOME / "python"
    if is_current(folder, [pins]):
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(pins)],
    ):
        if reason := await attempt(command, "install-python"):
            return reason
    mark_current(folder, [pins])
    return ""


async def install_node() -> str:
    """Install the npm project and put the client scripts beside it; return why not, or nothing."""
    npm, node = shutil.which("npm"), shutil.which("node")
    if npm is None or node is None:
        return "node and npm are not installed"
    found = await output_of([node, "--version"])
    major = re.match(r"v(\d+)", found)
    if major is None or int(major[1]) < NODE_MAJOR_MIN:
        return f"node {NODE_MAJOR_MIN} or newer is needed, found {found or 'none that runs'}"
    pins = [path for path in (HERE / "package.json", HERE / "package-lock.json") if path.exists()]
    if not is_current(NODE, pins):
        shutil.rmtree(NODE, ignore_errors=True)
        NODE.mkdir()
        for path in pins:
            shutil.copy(path, NODE)
        verb = "ci" if len(pins) > 1 else "install"
        command = [npm, verb, "--prefix", str(NODE), "--no-audit", "--no-fund"]
        if reason := await attempt(command, "install-node"):
            return reason
        mark_current(NODE, pins)
    for script in (HERE / "clients").glob("*.mjs"):  # modules resolve from where the script lies
        shutil.copy(script, NODE)
    return ""


async def codex_problem() -> str:
    """Say why the Codex CLI does not run here, or nothing: it is one binary a platform."""
    found = await output_of([str(CODEX), "--version"])
    return "" if found else "the Codex CLI has no binary that runs on this machine"


async def attempt(command: list[str], log_name: str) -> str:
    """Run one step; return why it failed, or nothing."""
    log = LOGS / f"{log_name}.log"
    done = await run_logged(command, log, seconds_max=INSTALL_SECONDS_MAX, cwd=HOME)
    if done.exit_code == 0:
        return ""
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in said if "error" in line.lower()] or said[-1:] or ["it said nothing"]
    return f"{log_name} {done.reason}: {named[0][:160]}"


async def output_of(command: list[str]) -> str:
    """Return what a short command prints, or nothing where it does not run."""
    try:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
    except OSError:
        return ""
    stdout, _ = await process.communicate()
    return stdout.decode(errors="replace").strip() if process.returncode == 0 else ""


def is_current(folder: Path, pins: list[Path]) -> bool:
    """Tell whether the folder was made from exactly these pins."""
    stamp = folder / ".pins"
    return stamp.exists() and stamp.read_text() == digest(pins)


def mark_current(folder: Path, pins: list[Path]) -> None:
    """Write down from which pins the folder was made; done last, so that a cut installation starts again."""
    (folder / ".pins").write_text(digest(pins))


def digest(pins: list[Path]) -> str:
    """Return one value for the contents of the pin files and the Python they were installed for."""
    content = b"\0".join([sys.version.encode(), *(path.read_bytes() for path in pins)])
    return hashlib.sha256(content).hexdigest()
