"""Runs stock clients against Openline, each through a real tool loop: `make conform`.

    .venv/bin/python conform/run.py [--only NAME,…] [--keep] [--target URL --model M]

Without `--target` the harness starts a model server of its own and `openline serve` in front of it, and
checks what that model saw. Exit code 1 if a case fails; a client that cannot be installed is skipped, with
the reason in the table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checks
from cases import BY_CLIENT, BY_SERVER, CASE_SECONDS_MAX, CASES, LANES, PLANNED, SHELL, SUITE, TINY, Case
from chat_upstream import ChatUpstream
from install import HOME, LOGS, install
from processes import Finished, Server, plain_environment, run_logged
from relay import Relay
from rich.console import Console
from rich.table import Table

LOG_LINES_SHOWN = 15
LOG_LINE_CHARS_SHOWN = 500
LOG_COLUMNS = 180
REASON_CHARS_MAX = 240


@dataclass
class Setting:
    """What the cases run against.

    `upstream` is None where no model of ours keeps a record, `server_log` where the server is not ours.
    """

    relay: Relay
    base_url: str
    scratch: Path
    model: str | None = None
    upstream: ChatUpstream | None = None
    server_log: Path | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    outcome: str  # PASS, FAIL or SKIP
    reason: str = ""
    client: str = ""
    transport: str = ""
    calls: str = ""
    sent: str = ""
    seconds: str = ""


async def run_case(case: Case, setting: Setting) -> Row:
    """Run one client and judge it."""
    setting.relay.forget()
    log_start = setting.server_log.stat().st_size if setting.server_log else 0
    if setting.upstream:
        setting.upstream.forget()
    for old in LOGS.glob(f"{case.name}.*"):
        old.unlink()
    log = LOGS / f"{case.name}.log"
    command = case.command(setting.base_url, setting.model or case.model, sys.executable, setting.scratch)
    env = plain_environment()
    done = await run_logged(command, log, seconds_max=CASE_SECONDS_MAX, cwd=setting.scratch, env=env)
    result = last_json(done.stdout)
    problems = list(case_problems(case, setting, done, result))
    if setting.server_log:
        problems += server_problems(setting.server_log, log_start)
    if problems:
        keep_evidence(case, setting, log_start)
    return Row(
        case.name,
        "FAIL" if problems else "PASS",
        "\n".join(problems),
        (result or {}).get("client", ""),
        case.transport,
        calls_made(result or {}),
        f"{setting.relay.bytes_sent / 1024:.0f} KB",
        f"{done.seconds:.1f}",
    )


def case_problems(case: Case, setting: Setting, done: Finished, result: dict[str, Any] | None) -> Iterator[str]:
    """Judge the client's own result, then the wire, then what the model saw."""
    if done.exit_code != 0 or result is None:
        yield f"the client {done.reason}{last_error(LOGS / f'{case.name}.log')}"
        if setting.upstream:
            yield from checks.refusal_problems(setting.upstream.refused)
        return
    yield from result_problems(case, setting, result)
    if setting.server_log:
        yield from wire_problems(case, setting.relay)
        if case.listed:
            yield from checks.listed_problems(result, setting.relay.requests)
    if setting.upstream:
        yield from model_problems(case, setting.upstream, result)


def result_problems(case: Case, setting: Setting, result: dict[str, Any]) -> Iterator[str]:
    """Judge what the client said."""
    if case.task == SUITE:
        yield from checks.suite_problems(result, case.tests)
    elif setting.server_log is None:
        yield from checks.target_problems(result)
    elif setting.upstream is None:
        yield from checks.tiny_problems(result, case.rounds)
        if case.task == SHELL:
            yield from checks.tiny_shell_problems(result)
    elif case.task == SHELL:
        yield from checks.shell_problems(result, patched=case.patched)
    elif case.task == LANES:
        yield from checks.lanes_problems(result, case.rounds)
    else:
        yield from checks.loop_problems(result, case.rounds, case.width)


def wire_problems(case: Case, relay: Relay) -> Iterator[str]:
    """Judge what went over the wire."""
    if case.task == SUITE:
        yield from checks.suite_transport_problems(case.transport, relay.sockets, relay.posts(), len(case.tests))
        return
    turns = case.rounds + 1 + bool(case.compacted)
    sockets = 2 if case.compacted == BY_CLIENT else 1  # Codex opens one more for its own summary
    yield from checks.transport_problems(case.transport, relay.sockets, relay.posts(), turns, sockets)
    if case.task == LANES:
        yield from checks.lanes_wire_problems(relay.frames, case.lanes)
    if case.compacted and case.chained:
        by_server = case.compacted == BY_SERVER
        yield from checks.compaction_wire_problems(relay.frames, turns + case.warmed, by_server=by_server)
    elif case.chained:
        yield from checks.increment_problems(relay.frames, case.rounds + 1 + case.warmed)
    if case.warmed:
        yield from checks.warm_up_problems(relay.frames)


def model_problems(case: Case, upstream: ChatUpstream, result: dict[str, Any]) -> Iterator[str]:
    """Judge what the model saw."""
    if case.task == SUITE:
        yield from checks.suite_context_problems(upstream.requests, upstream.refused, result)
    elif case.task == LANES:
        yield from checks.lanes_context_problems(upstream.requests, upstream.refused, upstream.together, result)
    elif case.compacted:
        yield from checks.compaction_problems(upstream.requests, upstream.refused, result, case.rounds)
    else:
        yield from checks.context_problems(upstream.requests, upstream.refused, result, case.rounds)


def calls_made(result: dict[str, Any]) -> str:
    """Say how many tools a client ran, or how many tests of the suite passed."""
    if "tests" not in result:
        return str(len(result.get("outputs", [])))
    passed = sum(test["status"] == "passed" for test in result["tests"])
    return f"{passed} of {len(result['tests'])} tests"


def server_problems(log: Path, start: int) -> list[str]:
    """Look for tracebacks in what the server logged since `start`; a stock client must never cause one."""
    added = log.read_bytes()[start:]
    return ["the server logged a traceback"] if b"Traceback (most recent call last)" in added else []


def keep_evidence(case: Case, setting: Setting, log_start: int) -> None:
    """Write down what the model and the server saw in a case that failed, and where its turns began and ended."""
    (LOGS / f"{case.name}.frames.json").write_text(json.dumps(setting.relay.frames, indent=1, ensure_ascii=False))
    if setting.upstream:
        seen = {"refused": setting.upstream.refused, "requests": setting.upstream.requests}
        (LOGS / f"{case.name}.upstream.json").write_text(json.dumps(seen, indent=1, ensure_ascii=False))
    if setting.server_log:
        (LOGS / f"{case.name}.server.log").write_bytes(setting.server_log.read_bytes()[log_start:])


def last_json(stdout: str) -> dict[str, Any] | None:
    """Return the client's one line of JSON, the last it printed."""
    lines = stdout.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None


@asynccontextmanager
async def own_server(engine: str, scratch: Path, rows: list[Row]) -> AsyncIterator[Setting]:
    """Start model, server and relay; afterwards stop them, and judge how the server ended."""
    upstream = ChatUpstream() if engine == PLANNED else None
    spec = f"chat:{await upstream.start()}" if upstream else f"gguf:{engine}"
    log = server_log(engine)
    server = Server(spec, scratch / f"{engine}.db", log)
    relay = Relay("")
    try:
        relay.target = await server.start()
        yield Setting(relay, await relay.start(), scratch, upstream=upstream, server_log=log)
    finally:
        await relay.stop()
        exit_code = await server.stop()
        if upstream:
            await upstream.stop()
        if relay.target:
            said = "" if exit_code == 0 else f"after SIGTERM the exit code was {exit_code}; None: it had to be killed"
            rows.append(Row(f"openline serve, {engine}", "FAIL" if said else "PASS", said))


def server_log(engine: str) -> Path:
    """Return where a server of ours writes its log."""
    return LOGS / f"server-{engine}.log"


@asynccontextmanager
async def other_server(url: str, model: str, scratch: Path) -> AsyncIterator[Setting]:
    """Use a server that runs already, whatever model stands behind it."""
    relay = Relay(url)
    try:
        base_url = await relay.start() if url.startswith("http://") else url
        yield Setting(relay, base_url, scratch, model=model)
    finally:
        await relay.stop()


async def run_all(cases: list[Case], args: argparse.Namespace, console: Console) -> list[Row]:
    """Install, run the cases one after another, and return the table's rows."""
    console.print(f"Clients live in {HOME.name}/; the first run installs them.")
    installed = await install({need for case in cases for need in case.needs})
    rows: list[Row] = []
    scratch = Path(tempfile.mkdtemp(prefix="openline-conform-"))  # not in here: Codex reads the repository around it
    runnable: list[Case] = []
    for case in cases:
        if reason := next(filter(None, map(installed.missing.get, case.needs)), ""):
            rows.append(Row(case.name, "SKIP", reason, transport=case.transport))
            report(rows[-1], console)
        else:
            runnable.append(case)
    try:
        if args.target:
            planned = [case for case in runnable if case.engine == PLANNED]  # the others are the same clients again
            await run_against(other_server(args.target, args.model, scratch), planned, rows, console)
        else:
            for engine in (PLANNED, TINY):
                mine = [case for case in runnable if case.engine == engine]
                if mine:
                    await run_own(engine, mine, scratch, rows, console)
    finally:
        if args.keep:
            console.print(f"Kept {scratch}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    return rows


async def run_own(engine: str, cases: list[Case], scratch: Path, rows: list[Row], console: Console) -> None:
    """Run cases against a server of our own; if it does not start, that is one more row."""
    try:
        await run_against(own_server(engine, scratch, rows), cases, rows, console)
    except RuntimeError as error:
        rows.append(Row(f"openline serve, {engine}", "FAIL", f"{error}{last_error(server_log(engine))}"))
        console.print(tail(server_log(engine)), markup=False, style="dim")


async def run_against(
    setting_of: AbstractAsyncContextManager[Setting], cases: list[Case], rows: list[Row], console: Console
) -> None:
    """Run cases against one server, and say how each went."""
    async with setting_of as setting:
        for case in cases:
            rows.append(await run_case(case, setting))
            report(rows[-1], console)


def report(row: Row, console: Console) -> None:
    """Say how a case went as soon as it is known; of a failed one, the end of its log too."""
    console.print(f"{row.outcome}  {row.name}  {row.seconds}", markup=False, highlight=False)
    if row.outcome == "FAIL":
        console.print(row.reason, markup=False, highlight=False)
        console.print(tail(LOGS / f"{row.name}.log"), markup=False, highlight=False, style="dim")


def tail(log: Path) -> str:
    """Return the last lines of a log, and the beginnings of those that are whole conversations."""
    if not log.exists():
        return ""
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
    return "\n".join(line[:LOG_LINE_CHARS_SHOWN] for line in lines)


def last_error(log: Path) -> str:
    """Return a log's last line that speaks of an error, to put behind a sentence; nothing where there is none."""
    lines = [
        line.strip() for line in log.read_text(errors="replace").splitlines() if re.search("(?i)error|exception", line)
    ]
    return f": {lines[-1][:REASON_CHARS_MAX]}" if lines else ""


def table(rows: list[Row]) -> Table:
    """Return the table of all cases."""
    colours = {"PASS": "green", "FAIL": "red", "SKIP": "yellow"}
    drawn = Table(title="Stock clients against Openline", title_justify="left")
    for heading in ("case", "client", "transport"):
        drawn.add_column(heading, no_wrap=True)
    for heading in ("calls", "sent", "seconds"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    drawn.add_column("result", no_wrap=True)
    drawn.add_column("reason", overflow="fold")
    for row in rows:
        outcome = f"[{colours[row.outcome]}]{row.outcome}[/]"
        reason = row.reason.replace("[", r"\[")
        drawn.add_row(row.name, row.client, row.transport, row.calls, row.sent, row.seconds, outcome, reason)
    return drawn


def chosen(only: str | None) -> list[Case]:
    """Return the cases of those names, or whose name contains one of the words; all without any."""
    words = [word.strip() for word in (only or "").split(",") if word.strip()]
    names = {case.name for case in CASES}
    return [
        case
        for case in CASES
        if not words or any(word == case.name if word in names else word in case.name for word in words)
    ]


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="NAME,…", help="run these cases, or those whose name contains the word")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder")
    parser.add_argument("--target", metavar="URL", help="a running server's base URL, ending in /v1")
    parser.add_argument("--model", metavar="M", help="the model to ask for there")
    args = parser.parse_args()
    if bool(args.target) != bool(args.model):
        parser.error("--target and --model go together")
    if not chosen(args.only):
        parser.error(f"--only {args.only}: no such case; there are {', '.join(case.name for case in CASES)}")
    return args


def main() -> int:
    """Run and return the exit code."""
    args = arguments()
    console = Console()
    if not console.is_terminal:
        console.width = LOG_COLUMNS  # a log has no width of its own
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ended from outside, it still ends what it started
    try:
        rows = asyncio.run(run_all(chosen(args.only), args, console))
    except KeyboardInterrupt:
        return 130
    console.print(table(rows))
    counted = {outcome: sum(row.outcome == outcome for row in rows) for outcome in ("PASS", "FAIL", "SKIP")}
    console.print(f"{counted['PASS']} passed, {counted['FAIL']} failed, {counted['SKIP']} skipped", highlight=False)
    if counted["FAIL"]:
        console.print(f"Logs: {LOGS.parent.name}/{LOGS.name}/")
    return 1 if counted["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
