"""`openline doctor`: try an upstream and say what is wrong with it."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.text import Text

from openline.cli.checks import Report, examine
from openline.cli.findings import table
from openline.config import ConfigError, UpstreamSettings, load
from openline.engines.opening import find_local_upstream

_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


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
