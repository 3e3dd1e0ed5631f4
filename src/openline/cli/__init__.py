"""The command line: parse, call, print. One file a command."""

from __future__ import annotations

import io
import sys

import typer

from openline import __version__
from openline.cli.demo import demo
from openline.cli.doctor import doctor
from openline.cli.keys import keys
from openline.cli.run import ResumingCommand, run
from openline.cli.serve import serve
from openline.cli.store import store

app = typer.Typer(
    name="openline",
    help="An open, self-hosted server for the Responses API with WebSocket mode, in front of any model server.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(demo)
app.command(cls=ResumingCommand)(run)
app.command()(doctor)
app.add_typer(keys, name="keys")
app.add_typer(store, name="store")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"openline {__version__}")
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction] - typer calls it
    *,
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Show the version."),
) -> None:
    pass


def main() -> None:
    """The `openline` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # not every terminal has every character
    app()
