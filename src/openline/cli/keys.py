"""`openline keys`: make the keys that clients come in with."""

from __future__ import annotations

import hashlib
import secrets
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

keys = typer.Typer(help="Make keys for clients.", no_args_is_help=True)
_console = Console(highlight=False, soft_wrap=True)
_KEY_BYTES = 32  # 256 random bits: the hash of such a key needs no salt and no slow function


@keys.callback()
def _keys() -> None:  # pyright: ignore[reportUnusedFunction] - typer calls it, and so keeps `new` a command
    pass


@keys.command()
def new(
    *, owner: Annotated[str, typer.Option(help="Whose responses this key reads and writes.", metavar="NAME")]
) -> None:
    """Make a key, show it once, and the lines for the configuration, which hold only its hash.

    For example:

      openline keys new --owner team-a >> openline.toml
    """
    if not owner.strip() or len(owner) > 128:
        raise typer.BadParameter("expected 1 to 128 characters", param_hint="--owner")
    key = f"olk-{secrets.token_urlsafe(_KEY_BYTES)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    # The key goes to the terminal, the lines to standard output: `>> openline.toml` takes only the lines.
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"The key of [bold]{escape(owner)}[/], shown only now:\n\n  [bold]{key}[/]\n\nThe lines for the configuration:\n"
    )
    quoted = owner.replace("\\", "\\\\").replace('"', '\\"')
    _console.print(escape(f'[[keys]]\nowner = "{quoted}"\nsha256 = "{digest}"'))
