"""`openline doctor`: try an upstream and say what is wrong with it."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from openline.cli.checks import Finding, Report, examine
from openline.config import ConfigError, UpstreamSettings, load
from openline.engines.opening import find_local_upstream

_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)
_MARKS = {"ok": ("✓", "green"), "warn": ("!", "yellow"), "bad": ("✗", "bold red")}


def doctor(
    *,
    upstream: Annotated[
        list[str] | None,
        typer.Option(
            help="What to try: chat:URL, responses:URL, … May be repeated; else what the configuration names."
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The model to try; the first that is listed unless given.")] = None,
    config: Annotated[Path | None, typer.Option(help="A configuration file in TOML.", envvar="OPENLINE_CONFIG")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Try an upstream: does it answer, stream, call tools, reuse its cache? Every finding has its remedy.

    It generates a few hundred tokens at most. The exit code is 0 if turns can work, 1 if they cannot.
    """
    logging.basicConfig(level=logging.CRITICAL)  # every fault is a finding
    try:
        settings = load(config, os.environ, {"upstream": upstream}).upstreams or _found()
        reports = asyncio.run(_examine(settings, model))
    except ConfigError as error:
        _errors.print(Text.assemble(("openline: ", "bold red"), str(error)))
        raise typer.Exit(2) from None
    is_good = all(report.is_good for report in reports)
    if as_json:
        typer.echo(msgspec.json.format(msgspec.json.encode({"ok": is_good, "upstreams": reports})).decode())
    else:
        for report in reports:
            _console.print(table(report))
    raise typer.Exit(0 if is_good else 1)


def _found() -> tuple[UpstreamSettings, ...]:
    found = asyncio.run(find_local_upstream())
    if found is None:
        raise ConfigError("no model server answers on the usual ports: name one with --upstream.")
    return (found[1],)


async def _examine(settings: tuple[UpstreamSettings, ...], model: str | None) -> list[Report]:
    """One after another, as they may share a machine whose times are measured."""
    return [await examine(each, model) for each in settings]


def table(report: Report) -> Group:
    """What was found of an upstream; a remedy stands under what it is for."""
    rows = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False, padding=(0, 1))
    rows.add_column(width=1)
    rows.add_column(no_wrap=True, style="bold")
    rows.add_column(ratio=1)
    for finding in report.findings:
        mark, style = _MARKS[finding.level]
        rows.add_row(Text(mark, style), finding.check, _words(finding))
    where = f" at {report.url}" if report.url not in {"", report.upstream} else ""
    title = Text.assemble((report.upstream, "bold"), where, f", model {report.tried}" if report.tried else "")
    wrong = sum(finding.level == "bad" for finding in report.findings)
    odd = sum(finding.level == "warn" for finding in report.findings)
    return Group(Text(), title, rows, Text(_sum_of(wrong, odd), "red" if wrong else "green"))


def _words(finding: Finding) -> Text:
    words = Text(finding.says)
    if finding.remedy:
        words.append(f"\n→ {finding.remedy}", "dim" if finding.level == "ok" else "cyan")
    return words


def _sum_of(wrong: int, odd: int) -> str:
    if wrong:
        return f"Turns will fail: {wrong} found that must be set right."
    return f"Turns work; {odd} worth knowing." if odd else "Everything works."
