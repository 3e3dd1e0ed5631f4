"""Puts the stock clients into `.conform/`, once for each set of pinned versions.

Nothing outside that folder is touched. What cannot be installed is named with its reason; the cases that
need it are then skipped, and say so.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
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

# Beside the other npm packages, since they are large: 350 MB and 100 MB.
OPENCODE_PIN = "opencode-ai@1.18.33"
OPENCODE_HOME = HOME / "opencode"
OPENCODE = OPENCODE_HOME / "node_modules" / ".bin" / "opencode"

BUN_PIN = "bun@1.4.5"
SUITE_HOME = HOME / "openresponses"
BUN = SUITE_HOME / "node_modules" / ".bin" / "bun"
SUITE_VARIABLE = "OPENRESPONSES_DIR"
SUITE_FOLDERS = ("bin", "src/lib", "src/generated")  # the runner and what it imports

INSTALL_SECONDS_MAX = 600
NODE_MAJOR_MIN = 20


@dataclass
class Installed:
    """Which kinds of clients are there; `missing` maps the kinds that are not to their reason."""

    missing: dict[str, str] = field(default_factory=dict)


async def install(kinds: set[str]) -> Installed:
    """Install what the wanted kinds of clients need and is not there yet; `tiny` comes by make."""
    HOME.mkdir(exist_ok=True)
    (HOME / ".gitignore").write_text("*\n")
    LOGS.mkdir(exist_ok=True)
    installed = Installed()
    if "python" in kinds:
        note(installed, "python", await install_python())
    if kinds & {"node", "codex"}:
        reason = await install_node()
        note(installed, "node", reason)
        note(installed, "codex", reason or await binary_problem("the Codex CLI", CODEX))
    if "opencode" in kinds:
        note(installed, "opencode", await install_opencode())
    if "suite" in kinds:
        note(installed, "suite", await install_suite())
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
    if reason := await node_problem():
        return reason
    pins = [path for path in (HERE / "package.json", HERE / "package-lock.json") if path.exists()]
    if not is_current(NODE, pins):
        make_empty(NODE)
        for path in pins:
            shutil.copy(path, NODE)
        if reason := await npm("ci" if len(pins) > 1 else "install", NODE):
            return reason
        mark_current(NODE, pins)
    for script in (HERE / "clients").glob("*.mjs"):  # modules resolve from where the script lies
        shutil.copy(script, NODE)
    return ""


async def install_opencode() -> str:
    """Install opencode into a folder of its own; return why not, or nothing."""
    return await install_packages(OPENCODE_HOME, OPENCODE_PIN) or await binary_problem("opencode", OPENCODE)


async def install_suite() -> str:
    """Copy the Open Responses suite, and install what runs it; return why not, or nothing.

    Of its dependencies it takes the one that its tests import, at its own pin: the others, 460 MB, are a web site's.
    """
    checkout = os.environ.get(SUITE_VARIABLE, "")
    if not checkout:
        return f"{SUITE_VARIABLE} is not set; it names a clone of github.com/openresponses/openresponses"
    missing = [name for name in (*SUITE_FOLDERS, "bun.lock") if not (Path(checkout) / name).exists()]
    if missing:
        return f"{SUITE_VARIABLE} is {checkout}, where there is no {missing[0]}"
    zod = re.search(r'"(zod@[\d.]+)"', (Path(checkout) / "bun.lock").read_text())
    if zod is None:
        return f"{SUITE_VARIABLE} is {checkout}, where bun.lock does not pin zod"
    if reason := await install_packages(SUITE_HOME, BUN_PIN, zod[1]) or await binary_problem("bun", BUN):
        return reason
    for name in SUITE_FOLDERS:
        shutil.rmtree(SUITE_HOME / name, ignore_errors=True)
        shutil.copytree(Path(checkout) / name, SUITE_HOME / name)
    (SUITE_HOME / "version").write_text(await output_of(["git", "-C", checkout, "rev-parse", "--short", "HEAD"]))
    return ""


async def install_packages(folder: Path, *pins: str) -> str:
    """Install npm packages, given with their versions, into a folder of their own; return why not, or nothing."""
    if reason := await node_problem():
        return reason
    if is_current(folder, pins):
        return ""
    make_empty(folder)
    if reason := await npm("install", folder, *pins):
        return reason
    mark_current(folder, pins)
    return ""


async def npm(verb: str, folder: Path, *packages: str) -> str:
    """Run npm in a folder; return why it failed, or nothing."""
    command = ["npm", verb, "--prefix", str(folder), "--no-audit", "--no-fund", *packages]
    return await attempt(command, f"install-{folder.name}")


async def node_problem() -> str:
    """Say why Node and npm cannot be used, or nothing."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        return "node and npm are not installed"
    found = await output_of(["node", "--version"])
    major = re.match(r"v(\d+)", found)
    if major is None or int(major[1]) < NODE_MAJOR_MIN:
        return f"node {NODE_MAJOR_MIN} or newer is needed, found {found or 'none that runs'}"
    return ""


async def binary_problem(name: str, path: Path) -> str:
    """Say why a package that brings a binary for each platform does not run here, or nothing."""
    return "" if await output_of([str(path), "--version"]) else f"{name} has no binary that runs on this machine"


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


def make_empty(folder: Path) -> None:
    """Make a folder, anew where it exists."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def is_current(folder: Path, pins: Sequence[Path | str]) -> bool:
    """Tell whether the folder was made from exactly these pins."""
    stamp = folder / ".pins"
    return stamp.exists() and stamp.read_text() == digest(pins)


def mark_current(folder: Path, pins: Sequence[Path | str]) -> None:
    """Write down from which pins the folder was made; done last, so that a cut installation starts again."""
    (folder / ".pins").write_text(digest(pins))


def digest(pins: Sequence[Path | str]) -> str:
    """Return one value for the pins, or the contents of their files, and the Python they were installed for."""
    contents = [pin.encode() if isinstance(pin, str) else pin.read_bytes() for pin in pins]
    return hashlib.sha256(b"\0".join([sys.version.encode(), *contents])).hexdigest()
