"""`openline serve`: run the server."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding

from openline.cli.checks import Report, examine, look
from openline.cli.findings import rows
from openline.config import Config, ConfigError, UpstreamSettings, load
from openline.engines.engine import Model
from openline.engines.opening import USUAL_PORTS, find_local_upstream
from openline.engines.profiles import KINDS
from openline.engines.router import offered
from openline.engines.tiny import URL as TINY_URL
from openline.server.runner import bind, run

_console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)
_LOOK_SECONDS_MAX = 3.0

_LOG_LEVELS = ("debug", "info", "warning", "error")
EXAMPLES = """
Examples:

  openline serve

    in front of the model server that runs on this machine

  openline serve --upstream chat:http://127.0.0.1:8000/v1

    in front of vLLM, SGLang, llama.cpp, Ollama, LM Studio, …

  openline serve --upstream gguf:model.gguf

    a model file in this process; gguf:tiny is one that comes with Openline, whose words mean nothing

  openline serve --upstream responses:https://api.openai.com/v1

    in front of OpenAI; its key comes from OPENLINE_UPSTREAM_API_KEY

  openline serve --upstream scripted: --store none

    without a model, and nothing is kept
"""


def serve(
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on; 127.0.0.1 unless configured.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 8484 unless configured, 0 for any free one.")
    ] = None,
    upstream: Annotated[
        list[str] | None,
        typer.Option(help="Who answers: chat:URL, responses:URL, gguf:PATH or scripted:[TRANSCRIPT]. May be repeated."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Where stored responses are kept: sqlite:PATH, sqlite::memory:, postgresql://… or none."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A configuration file in TOML.", envvar="OPENLINE_CONFIG")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="A certificate chain in PEM; with --tls-key.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key in PEM.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Try the upstreams first, as `openline doctor` does; it takes some turns.")
    ] = False,
    log_level: Annotated[
        str, typer.Option(help="debug, info, warning or error.", envvar="OPENLINE_LOG_LEVEL")
    ] = "info",
) -> None:
    """Serve the Responses API, over WebSocket and HTTP, in front of a model server."""
    flags = {
        "host": host,
        "port": port,
        "upstream": upstream,
        "store": store,
        "tls_cert": str(tls_cert) if tls_cert else None,
        "tls_key": str(tls_key) if tls_key else None,
    }
    try:
        _start_logging(log_level)
        _serve(load(config, os.environ, flags), check=check)
    except ConfigError as error:
        _errors.print(f"[bold red]openline:[/] {escape(str(error))}")
        raise typer.Exit(2) from None


serve.__doc__ = f"{serve.__doc__}\n\n{EXAMPLES}"


def _serve(config: Config, *, check: bool) -> None:
    if not config.upstreams:
        config = _with_found_upstream(config)
    with bind(config) as listening:
        reports = asyncio.run(_examine(config.upstreams) if check else _look(config.upstreams))
        _say_what_loads(config.upstreams)
        run(config, listening, lambda: _print_started(config, listening, reports))


def _say_what_loads(upstreams: tuple[UpstreamSettings, ...]) -> None:
    """A large model takes a minute, in which nothing else is heard of the server."""
    for upstream in upstreams:
        if upstream.kind == "gguf" and upstream.url != TINY_URL:
            path = Path(upstream.url).expanduser()
            size = path.stat().st_size / 1e9
            _console.print(f"Loading {escape(path.name)} ({size:.1f} GB)", style="dim")


def _start_logging(level: str) -> None:
    if level.lower() not in _LOG_LEVELS:
        raise ConfigError(f"--log-level is '{level}': expected debug, info, warning or error.")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("openline").setLevel(level.upper())


def _with_found_upstream(config: Config) -> Config:
    found = asyncio.run(find_local_upstream())
    if found is None:
        looked = ", ".join(f"{name} {port}" for name, port in USUAL_PORTS.items())
        _console.print(f"No model server answers on the usual ports ({looked}).")
        _console.print("The [bold]scripted engine[/] answers instead: it follows a script and has no model.")
        upstream = UpstreamSettings(kind="scripted")
    else:
        name, upstream = found
        _console.print(f"Found a model server at {upstream.url}, where {name} usually listens.")
    return msgspec.structs.replace(config, upstreams=(upstream,))


async def _examine(upstreams: tuple[UpstreamSettings, ...]) -> list[Report]:
    """What they do when they are tried, one after another, as they may share a machine whose times are measured."""
    return [await examine(each) for each in upstreams]


async def _look(upstreams: tuple[UpstreamSettings, ...]) -> list[Report]:
    """What the upstreams tell of themselves; a dead one does not keep the server from starting."""
    return list(await asyncio.gather(*map(_look_at, upstreams)))


async def _look_at(upstream: UpstreamSettings) -> Report:
    try:
        async with asyncio.timeout(_LOOK_SECONDS_MAX):
            return await look(upstream)
    except TimeoutError:
        report = Report(upstream.label, upstream.url)
        report.add("reachable", "bad", f"It has not answered within {_LOOK_SECONDS_MAX:g} seconds.")
        return report


def _print_started(config: Config, listening: socket.socket, reports: list[Report]) -> None:
    host, port = listening.getsockname()[:2]
    scheme = "https" if config.server.tls_cert else "http"
    shown = f"[{host}]" if ":" in host else host
    base_url = f"{scheme}://{shown}:{port}/v1"
    _console.print(f"\n[bold green]Openline listens on {escape(base_url)}[/]", end="")
    _console.print(" (HTTP and WebSocket)" if config.server.websocket else " (HTTP only)")
    for upstream, report in zip(config.upstreams, reports, strict=True):
        _print_upstream(upstream, report)
    pairs = zip(config.upstreams, reports, strict=True)
    models = [model for upstream, report in pairs for model in offered(upstream, report.models)]
    _print_hints(base_url, models[0] if models else Model("MODEL"), config)


def _print_upstream(upstream: UpstreamSettings, report: Report) -> None:
    """What stands behind, what may be asked of it, and what was found."""
    where = f" at {upstream.url}" if upstream.url not in {"", upstream.label} else ""
    kind = f", {KINDS[report.kind].title}" if report.kind != "generic" else ""
    _console.print(f"  behind it: [bold]{escape(upstream.label)}[/] ({upstream.kind}{escape(where)}{kind})")
    may_be_asked = offered(upstream, report.models)
    if may_be_asked != report.models:
        _console.print(f"  offered: {escape(', '.join(model.id for model in may_be_asked[:8]))}")
    _console.print(Padding(rows(report), (0, 0, 0, 2)), soft_wrap=False)
    if not report.is_good:
        _console.print("  Turns fail until then; /readyz tells when it answers.")
    elif not report.tried and upstream.kind != "scripted":
        _console.print("  `openline doctor` tries turns too: tool calls, reasoning, prefix cache.", style="dim")


def _saying_the_key(*, has_keys: bool) -> Sequence[str]:
    """A command that prints a client's key, of which there is any where none is configured.

    Codex asks for the list of models, and so for their context windows, only of a provider that has such a command.
    """
    if sys.platform == "win32":  # `echo` is no program there
        return ("cmd", "/c", "echo %OPENLINE_API_KEY%" if has_keys else "echo any")
    return ("printenv", "OPENLINE_API_KEY") if has_keys else ("echo", "any")


def _print_hints(base_url: str, model: Model, config: Config) -> None:
    key = 'os.environ["OPENLINE_API_KEY"]' if config.keys else '"any"'
    sdk = f'client = OpenAI(base_url="{base_url}", api_key={key})\nmodel = "{model.id}"'
    lines = [("Python SDK", sdk)]
    command, *arguments = _saying_the_key(has_keys=bool(config.keys))
    codex = f"""model = "{model.id}"
model_provider = "openline"
[model_providers.openline]
name = "openline"
base_url = "{base_url}"
wire_api = "responses"
auth = {{ command = "{command}", args = {msgspec.json.encode(arguments).decode()} }}
supports_websockets = {"true" if config.server.websocket else "false"}"""
    lines.append(("Codex, ~/.codex/config.toml", codex))
    for title, text in lines:
        _console.print(f"\n[dim]{title}[/]")
        _console.print(escape(text))
    _console.print()
