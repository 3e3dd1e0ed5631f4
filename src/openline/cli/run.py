"""`openline run`: an agent from the command line, with tools out of Python files, that can be stopped and gone on with."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console
from typer.core import TyperCommand

from openline.cli.run_agent import DEFAULT_URL, FAILED, LAST, USAGE, Agent, Order
from openline.cli.run_screen import Failure, JsonScreen, PeopleScreen, Screen, sessions_table
from openline.cli.tools_file import ToolsFileError, read_tools_file
from openline.client.errors import OpenlineError
from openline.client.ledger import Ledger, SessionLocked
from openline.client.run_options import RunBounds
from openline.client.tools import toolbox
from openline.config import ConfigError
from openline.state.opening import default_path

_errors = Console(stderr=True, highlight=False)
_NONE: Final = "none"
_BOUNDS: Final = RunBounds()
_GOING_ON: Final = "Going on where it stopped"
_BOUNDS_PANEL: Final = "Bounds"
_RETAIN_DAYS: Final = 30  # of what is done, in the ledger that nobody named; as long as the server keeps responses
EXAMPLES = """
Examples:

  openline run "What is the capital of Peru?"

    one turn; the model is the first that the server names

  openline run "Sum up the logs." --tools tools.py --model qwen3-coder

    an agent with the functions of tools.py as its tools

  openline run --resume

    go on with the session that was stopped last

  openline run --resume SESSION "And now in French."

    another question in a session that is done

  openline run "Sum up the logs." --tools tools.py --json | jq .type

    for programs: one JSON object a line

Ctrl-C waits for running tools, then stops; a second one stops at once. Either way the session can be gone on with.

Exit codes: 0 the model has answered · 1 it has not: a turn failed or was cut, or the server cannot be reached · 2 wrong usage ·
3 a tool had started before a crash and nobody knows how it ended · 4 a bound was reached · 130 stopped.
"""


class TransportName(StrEnum):
    """How turns travel."""

    AUTO = "auto"
    WEBSOCKET = "websocket"
    HTTP = "http"


class OnUnknownName(StrEnum):
    """What becomes of a call whose outcome is unknown."""

    ASK = "ask"
    RUN = "run"
    STOP = "stop"


class ResumingCommand(TyperCommand):
    """A command whose `--resume` may stand without a value."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put in `last` where it is missing."""
        whole: list[str] = []
        for index, argument in enumerate(args):
            whole.append(argument)
            if argument == "--resume" and (index + 1 == len(args) or args[index + 1].startswith("--")):
                whole.append(LAST)
        return super().parse_args(ctx, whole)


def run(
    prompt: Annotated[
        str | None, typer.Argument(help="What the model is asked; - reads it from standard input.", show_default=False)
    ] = None,
    *,
    tools: Annotated[
        list[Path] | None,
        typer.Option(
            help="A Python file whose functions are tools: its TOOLS, else those with @openline.tool, else all. "
            "May be repeated.",
            metavar="FILE",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which model is asked; else the first that the server names.", metavar="NAME")
    ] = None,
    instructions: Annotated[str | None, typer.Option(help="How the model is to behave.", metavar="TEXT")] = None,
    base_url: Annotated[
        str, typer.Option(help="The server's API.", envvar="OPENLINE_BASE_URL", metavar="URL")
    ] = DEFAULT_URL,
    transport: Annotated[
        TransportName, typer.Option(help="auto, websocket or http; auto is a socket where it pays.", metavar="NAME")
    ] = TransportName.AUTO,
    no_store: Annotated[bool, typer.Option("--no-store", help="The server keeps no response.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each event as a JSON object on a line.")] = False,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with a session; without a value, with the one that changed last.",
            metavar="[SESSION]",
            rich_help_panel=_GOING_ON,
        ),
    ] = None,
    ledger: Annotated[
        str | None,
        typer.Option(
            help="Where every step is noted, content included, or none; else runs.db in the user's data directory, for 30 "
            "days.",
            metavar="FILE",
            envvar="OPENLINE_LEDGER",
            rich_help_panel=_GOING_ON,
        ),
    ] = None,
    on_unknown: Annotated[
        OnUnknownName | None,
        typer.Option(
            help="Of a call that had started before a crash: ask, run it again, or stop. Else on_unknown of the tools' file "
            "decides, else you, if this is a terminal.",
            metavar="WHAT",
            rich_help_panel=_GOING_ON,
        ),
    ] = None,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="List what the ledger holds, and end.", rich_help_panel=_GOING_ON)
    ] = False,
    no_parallel: Annotated[
        bool, typer.Option("--no-parallel", help="Calls of one turn run one by one.", rich_help_panel=_BOUNDS_PANEL)
    ] = False,
    tool_seconds_max: Annotated[
        float, typer.Option(help="Of one call.", metavar="SECONDS", rich_help_panel=_BOUNDS_PANEL)
    ] = _BOUNDS.tool_seconds_max,
    calls_max: Annotated[
        int, typer.Option(help="Of the whole run.", metavar="N", rich_help_panel=_BOUNDS_PANEL)
    ] = _BOUNDS.calls_max,
    turns_max: Annotated[
        int, typer.Option(help="Of the whole run.", metavar="N", rich_help_panel=_BOUNDS_PANEL)
    ] = _BOUNDS.turns_max,
) -> None:
    """Run an agent: ask a model, run the tools that it calls, until it has answered. Its key: OPENLINE_API_KEY."""
    screen: Screen = JsonScreen(sys.stdout) if as_json else PeopleScreen(sys.stdout, _errors)
    order = Order(
        prompt=prompt,
        tools=tuple(tools or ()),
        model=model,
        instructions=instructions,
        base_url=base_url.rstrip("/"),
        transport=transport.value,
        resume=resume,
        ledger=ledger,
        on_unknown=None if on_unknown is None else on_unknown.value,
        store=not no_store,
        parallel=not no_parallel,
        tool_seconds_max=tool_seconds_max,
        calls_max=calls_max,
        turns_max=turns_max,
    )
    try:
        with _opened(ledger) as opened:
            if sessions:
                _errors.print(sessions_table(opened.sessions()))
                return
            code = _run(order, opened, screen, can_ask=sys.stdin.isatty() and _errors.is_terminal and not as_json)
    except (ToolsFileError, OpenlineError, ConfigError, TypeError, ValueError) as error:
        screen.fail(Failure("usage", str(error)))
        code = USAGE
    except BrokenPipeError:  # nobody reads on, as after `| head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = FAILED
    raise typer.Exit(code)


run.__doc__ = f"{run.__doc__}\n\n{EXAMPLES}"


def _run(order: Order, ledger: Ledger, screen: Screen, *, can_ask: bool) -> int:
    if order.prompt == "-":
        order = msgspec.structs.replace(order, prompt=sys.stdin.read())
    files = [read_tools_file(file) for file in order.tools]
    box = toolbox([tool for file in files for tool in file.tools])
    decides = [file.on_unknown for file in files if file.on_unknown is not None]
    agent = Agent(order.settled(ledger), box, ledger, screen)
    return agent.run(decides[0] if decides else None, can_ask=can_ask)


def _opened(name: str | None) -> Ledger:
    """The ledger of that name; the user's own has what is long done taken out."""
    if name == _NONE:
        return Ledger(None)
    if name is not None:
        return Ledger(name)
    path = default_path().with_name("runs.db")
    with suppress(OSError):  # the ledger says what is wrong
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    ledger = Ledger(path)
    for session in ledger.sessions():
        if session.is_done and session.changed_at < time.time() - _RETAIN_DAYS * 86_400:
            with suppress(SessionLocked):
                ledger.delete(session.session_id)
    return ledger
