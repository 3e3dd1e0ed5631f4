"""`openline store`: look at what is kept, take it out, delete what is old."""

from __future__ import annotations

import asyncio
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from openline.config import ConfigError, StoreSettings, load
from openline.state.opening import default_path, start_store
from openline.state.retention import DAY_SECONDS, purged
from openline.state.store import Store, StoreInfo, StoreUnavailable, without_secrets

store = typer.Typer(help="Look after the store: count, export, purge.", no_args_is_help=True)
_console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)
_DAYS: Final = re.compile(r"([1-9][0-9]{0,4})d")

_Spec = Annotated[
    str | None,
    typer.Option("--store", help="The store: sqlite:PATH or postgresql://…; else what the configuration names."),
]
_ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="A configuration file in TOML.", envvar="OPENLINE_CONFIG")
]
_Work = Callable[[Store, StoreSettings], Coroutine[Any, Any, None]]


@store.command()
def info(
    *,
    spec: _Spec = None,
    config: _ConfigFile = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """Count what the store holds.

    For example:

      openline store info

      openline store info --store postgresql://openline@db/openline --json
    """

    async def show(opened: Store, settings: StoreSettings) -> None:
        found = await opened.info()
        if as_json:
            typer.echo(msgspec.json.format(msgspec.json.encode(found)).decode())
        else:
            _console.print(_table(found, settings))

    _run(show, spec, config)


@store.command()
def export(
    *,
    owner: Annotated[str | None, typer.Option(help="Only this owner's; else everybody's.", metavar="NAME")] = None,
    spec: _Spec = None,
    config: _ConfigFile = None,
) -> None:
    """Print every stored response, and every conversation, as a line of JSON.

    A response's line has owner, response_id, created_at, status, the response's
    own input, and the response; a conversation's has owner, conversation_id,
    created_at, metadata and items. What is sealed stays sealed.

    For example:

      openline store export > responses.jsonl

      openline store export --owner team-a --config openline.toml | jq .response.usage
    """

    async def print_all(opened: Store, settings: StoreSettings) -> None:
        del settings
        found = await opened.info()
        total = None if owner is not None else found.turns + found.conversations
        with _progress(total) as progress:
            task = progress.add_task("exported", total=total)
            async for line in _lines(opened, owner):
                sys.stdout.buffer.write(line)
                progress.advance(task)
        sys.stdout.buffer.flush()

    _run(print_all, spec, config)


@store.command()
def purge(
    *,
    older_than: Annotated[
        str, typer.Option(help="Delete what was not used for so many days, such as 30d.", metavar="DAYS")
    ],
    spec: _Spec = None,
    config: _ConfigFile = None,
) -> None:
    """Delete the responses and conversations that nobody has used for some days.

    A response goes only if nothing that is kept continues it. A server that runs
    does the same every hour, by its setting store.retain_days, and may run
    meanwhile. A SQLite file keeps its size: what is free in it is used again.

    For example:

      openline store purge --older-than 30d

      openline store purge --older-than 7d --store sqlite:openline.db
    """
    before = int(time.time()) - _days(older_than) * DAY_SECONDS

    async def delete(opened: Store, settings: StoreSettings) -> None:
        del settings
        deleted = 0
        with _progress(None) as progress:
            task = progress.add_task("deleted", total=None)
            async for count in purged(opened, before):
                deleted += count
                progress.advance(task, count)
        _console.print(f"Deleted {deleted:,} responses and conversations, not used since {_time(before)}.")

    _run(delete, spec, config)


def _run(work: _Work, spec: str | None, config: Path | None) -> None:
    """Open the store, do it, and say in one line what is wrong."""
    try:
        settings = load(config, os.environ, {"store": spec}).store
        asyncio.run(_with_store(work, settings))
    except ConfigError as error:
        _fail(str(error), 2)
    except StoreUnavailable as error:
        _fail(f"the store cannot be used: {error}.", 1)


async def _with_store(work: _Work, settings: StoreSettings) -> None:
    opened = await start_store(settings, make=False)
    try:
        await work(opened, settings)
    finally:
        await opened.close()


def _fail(message: str, code: int) -> None:
    _errors.print(f"[bold red]openline:[/] {escape(message)}")
    raise typer.Exit(code)


def _days(text: str) -> int:
    # Days and nothing less: what a turn that runs now goes on from must not be deleted under it.
    match = _DAYS.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"'{text}': expected days, such as 30d", param_hint="--older-than")
    return int(match[1])


def _progress(total: int | None) -> Progress:
    """Beside the output, for people only."""
    count = [SpinnerColumn(), TextColumn("{task.completed:,.0f} {task.description}"), TimeElapsedColumn()]
    bar = [BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn()]
    return Progress(
        *(count if total is None else bar), console=_errors, transient=True, disable=not _errors.is_terminal
    )


async def _lines(opened: Store, owner: str | None) -> AsyncIterator[bytes]:
    async for whose, turn in opened.export(owner):
        yield _line(
            {
                "owner": whose,
                "response_id": turn.response_id,
                "created_at": turn.created_at,
                "status": turn.status,
                "input": msgspec.Raw(turn.input),
                "response": msgspec.Raw(turn.response),
            }
        )
    async for whose, conversation in opened.conversations(owner):
        items = await opened.all_items(whose, conversation.id)
        if items is not None:  # else it was deleted meanwhile
            yield _line(
                {
                    "owner": whose,
                    "conversation_id": conversation.id,
                    "created_at": conversation.created_at,
                    "metadata": msgspec.Raw(conversation.metadata),
                    "items": [msgspec.Raw(item.raw) for item in items],
                }
            )


def _line(row: dict[str, object]) -> bytes:
    return msgspec.json.encode(row) + b"\n"


def _table(found: StoreInfo, settings: StoreSettings) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "store": without_secrets(settings.url) or f"sqlite:{default_path()}",
        "schema": str(found.schema),
        "size": decimal(found.bytes),
        "owners": f"{found.owners:,}",
        "responses": f"{found.turns:,}" + (f", {found.unfinished:,} unfinished" if found.unfinished else ""),
        "oldest": _time(found.oldest),
        "newest": _time(found.newest),
        "conversations": f"{found.conversations:,}, with {found.items:,} items",
        "kept": _kept(settings),
    }
    for name, value in rows.items():
        table.add_row(name, escape(value))
    return table


def _kept(settings: StoreSettings) -> str:
    if settings.url == "none":
        return "not at all"
    return f"for {settings.retain_days} days after their last use" if settings.retain_days else "for ever"


def _time(unix_seconds: int | None) -> str:
    if unix_seconds is None:
        return "none"
    return f"{datetime.fromtimestamp(unix_seconds, UTC).astimezone():%Y-%m-%d %H:%M}"
