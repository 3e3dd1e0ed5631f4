"""`openline demo`: an agent loop over HTTP and over WebSocket, through a server started for it, and what each cost."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Final

import typer
from aiohttp import ClientError, ClientSession, ClientTimeout
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from openline.cli.agent_loop import Question, Run, Turn, TurnFailed, compare
from openline.cli.demo_tables import comparison, milliseconds, notes, turn_by_turn
from openline.cli.demo_tools import INSTRUCTIONS, TASK, TOOLS, toolbox
from openline.engines.tiny import is_available as tiny_is_available

_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)

_SCRIPTED: Final = "scripted:"
_TINY: Final = "gguf:tiny"
_FAMILIES: Final = {_SCRIPTED: "scripted", _TINY: "tiny"}  # engines whose models are named after what they do
_NO_TINY: Final = (
    "llama.cpp is not installed here, so the scripted engine answers, which has no model: pip install 'openline[local]' "
    "brings the tiny model of this demo, where its wheel exists."
)
_START_SECONDS_MAX: Final = 600.0  # a large model file on a slow disk; usually it is half a second
_STOP_SECONDS_MAX: Final = 10.0
_OUTPUT_LINES_MAX: Final = 500
_TINY_CALLS_MAX: Final = 32  # in each loop: both share one KV cache, and above it each would push out the other's
_NO_TIMEOUT: Final = ClientTimeout(total=None)  # the agent loop has its own
_LISTENS: Final = re.compile(r"listens on (https?://\S+)")


class DemoFailed(Exception):  # noqa: N818 - what happened to the demo
    """The demo cannot go on; the message says why."""


def demo(
    *,
    once: Annotated[bool, typer.Option("--once", help="End after the comparison instead of serving on.")] = False,
    upstream: Annotated[
        list[str] | None,
        typer.Option(
            help="Who answers, as for `serve`; unless given, a tiny model in the server, or where that does not run a script.",
            envvar="OPENLINE_UPSTREAM",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Which model is asked; unless given, the first that the upstream names.")
    ] = None,
    turns: Annotated[
        int, typer.Option(min=1, max=200, help="Tool calls in each loop; a real model may make fewer.")
    ] = 20,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port of the server; 0 for any free one.", envvar="OPENLINE_PORT")
    ] = 0,
) -> None:
    """Compare an agent loop over HTTP with one over WebSocket, on a server of its own; then keep serving."""
    try:
        upstreams = upstream or [_own_upstream()]
        _check_room(upstreams, turns)
        asyncio.run(_demo(upstreams, model, turns, port, once=once))
    except (DemoFailed, TurnFailed, ClientError) as error:
        _errors.print(f"[bold red]openline:[/] {escape(str(error))}")
        raise typer.Exit(1) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        _errors.print("Stopped.")
        raise typer.Exit(130) from None


def _own_upstream() -> str:
    """The tiny model; where llama.cpp does not run, the script, and a word on it."""
    if tiny_is_available():
        return _TINY
    _console.print(escape(_NO_TINY))
    return _SCRIPTED


def _check_room(upstreams: Sequence[str], calls: int) -> None:
    if list(upstreams) == [_TINY] and calls > _TINY_CALLS_MAX:
        room = f"the tiny model has room for {_TINY_CALLS_MAX} in each loop"
        raise DemoFailed(f"--turns is {calls}: {room}. With --upstream {_SCRIPTED} there may be more.")


async def _demo(upstreams: Sequence[str], model: str | None, calls: int, port: int, *, once: bool) -> None:
    _stop_on_signals()
    with TemporaryDirectory(prefix="openline-demo-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        _console.print(f"Starting a server for the demo; behind it: [bold]{escape(', '.join(upstreams))}[/]")
        async with _server(upstreams, port, folder) as server:
            is_simulated = all(upstream.startswith(_SCRIPTED) for upstream in upstreams)
            family = _FAMILIES.get(upstreams[0]) if len(upstreams) == 1 else None
            async with ClientSession(timeout=_NO_TIMEOUT) as session:
                if model is None:
                    model = f"{family}-tools-{calls}" if family else await _first_model(session, server.base_url)
                question = Question(model, INSTRUCTIONS, TASK, TOOLS, turns_max=calls + 1)
                # A real model's turn may take long; a script's loop is over at once, and steadier once it has run.
                warm_up_turns = question.turns_max if is_simulated else 1
                with _progress() as progress:
                    runs = await compare(
                        session,
                        f"{server.base_url}/responses",
                        question,
                        lambda name: toolbox(folder / name),
                        warm_up_turns=warm_up_turns,
                        on_turn=_shown_on(progress, question.turns_max),
                    )
            _print_comparison(runs, model, is_simulated=is_simulated)
            if not once:
                await _keep_serving(server, f"{family}-text" if family else model)


def _stop_on_signals() -> None:
    """Let the signals that end a session end it as Ctrl-C does; else the server would outlive the demo."""
    task = asyncio.current_task()
    assert task is not None, "called from a coroutine"
    for name in ("SIGTERM", "SIGHUP"):
        with suppress(NotImplementedError, AttributeError):  # Windows has neither
            asyncio.get_running_loop().add_signal_handler(getattr(signal, name), task.cancel)


# --- The server ---------------------------------------------------------------------------------


class Server:
    """`openline serve` in a process of its own, and what it says.

    Attributes:
        printed: its last lines on standard output, which are hints on how to use it.
        logged: its last lines on standard error.
        tell: is given each further line.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.base_url = ""
        self.printed: deque[str] = deque(maxlen=_OUTPUT_LINES_MAX)
        self.logged: deque[str] = deque(maxlen=_OUTPUT_LINES_MAX)
        self.tell: Callable[[str], None] = lambda _: None
        self._listens: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reading = [
            asyncio.create_task(self._read(process.stdout, self.printed)),
            asyncio.create_task(self._read(process.stderr, self.logged)),
        ]

    async def ready(self) -> None:
        """Wait until it answers.

        Raises:
            DemoFailed: it has ended, or does not answer in time; with what it said.
        """
        ended = asyncio.ensure_future(self.process.wait())
        try:
            async with asyncio.timeout(_START_SECONDS_MAX):
                await asyncio.wait({ended, self._listens}, return_when=asyncio.FIRST_COMPLETED)
                if not self._listens.done():
                    await asyncio.wait(self._reading)  # its last words
                    raise DemoFailed(f"The server did not start, exit code {ended.result()}. It said:\n{self._words}")
                self.base_url = self._listens.result()
                await _check_health(self.base_url)
        except TimeoutError:
            message = f"The server did not answer within {_START_SECONDS_MAX:.0f} seconds. It said:\n{self._words}"
            raise DemoFailed(message) from None
        finally:
            ended.cancel()

    async def stop(self) -> None:
        """Ask it to end; make it, if it does not."""
        try:
            if self.process.returncode is None:
                self.process.terminate()
                async with asyncio.timeout(_STOP_SECONDS_MAX):
                    await self.process.wait()
        except TimeoutError:
            pass
        finally:  # also when a second Ctrl-C comes meanwhile
            if self.process.returncode is None:
                self.process.kill()
        await self.process.wait()
        await asyncio.wait(self._reading)

    @property
    def _words(self) -> str:
        return "\n".join([*self.printed, *self.logged]).strip() or "nothing"

    async def _read(self, stream: asyncio.StreamReader | None, lines: deque[str]) -> None:
        assert stream is not None, "both are pipes"
        async for raw in stream:
            line = raw.decode(errors="replace").rstrip()
            lines.append(line)
            self.tell(line)
            if (listens := _LISTENS.search(line)) and not self._listens.done():
                self._listens.set_result(listens[1])


@asynccontextmanager
async def _server(upstreams: Sequence[str], port: int, folder: Path) -> AsyncGenerator[Server, None]:
    """A server on loopback, ready, whose data is in `folder`; it ends with the block."""
    command = [sys.executable, "-m", "openline", "serve", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--store", f"sqlite:{folder / 'openline.db'}"]
    for upstream in upstreams:
        command += ["--upstream", upstream]
    process = await asyncio.create_subprocess_exec(
        *command,
        env=_environment(os.environ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        limit=1024 * 1024,
        start_new_session=True,  # Ctrl-C is ours: we end it by its handle
    )
    server = Server(process)
    try:
        await server.ready()
        yield server
    except TurnFailed:
        await server.stop()
        for line in server.logged:  # the error may say that the log has more
            if " INFO " not in line:
                _errors.print(line, style="dim", markup=False)
        raise
    finally:
        await server.stop()


def _environment(environ: Any) -> dict[str, str]:
    """Ours, without what would configure or colour the server: the demo shows its defaults."""
    kept = {
        name: value for name, value in environ.items() if not name.startswith("OPENLINE_") and name != "FORCE_COLOR"
    }
    if "OPENLINE_UPSTREAM_API_KEY" in environ:
        kept["OPENLINE_UPSTREAM_API_KEY"] = environ["OPENLINE_UPSTREAM_API_KEY"]
    return kept | {"PYTHONUTF8": "1"}


async def _check_health(base_url: str) -> None:
    try:
        async with ClientSession() as session, session.get(f"{base_url.removesuffix('/v1')}/healthz") as answer:
            answer.raise_for_status()
    except ClientError as error:
        raise DemoFailed(f"The server says that it listens on {base_url}, but does not answer: {error}.") from None


async def _keep_serving(server: Server, model: str) -> None:
    """Serve until Ctrl-C; what the server says from now on is shown."""
    url = server.base_url
    _console.rule("[bold green]The server keeps running")
    for line in server.printed:
        _console.print(line, markup=False, soft_wrap=True)
    _console.print("[dim]curl[/]")
    for line in (
        f"curl {url}/responses -H 'content-type: application/json' \\",
        f"""  -d '{{"model": "{model}", "input": "Hello"}}'""",
    ):
        _console.print(line, markup=False, soft_wrap=True)
    _console.print("\n[bold]Ctrl-C stops it.[/] What it stored is removed then.\n")
    server.tell = lambda line: _console.print(line, style="dim", markup=False, soft_wrap=True)
    try:
        code = await server.process.wait()
    except asyncio.CancelledError:
        _console.print("\nStopping.")
        return
    raise DemoFailed(f"The server has ended by itself, exit code {code}.")


# --- The comparison -----------------------------------------------------------------------------


async def _first_model(session: ClientSession, base_url: str) -> str:
    async with session.get(f"{base_url}/models") as answer:
        body = await answer.json()
    models: list[dict[str, Any]] = body.get("data") or []
    if not models:
        raise DemoFailed("The upstream names no model; is it running? Name one with --model.")
    return models[0]["id"]


def _progress() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description:<9}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[last]}"),
        console=_console,
        auto_refresh=False,  # nothing is drawn while a turn is measured
        disable=not _console.is_terminal,
    )


def _shown_on(progress: Progress, turns_max: int) -> Callable[[str, Turn], None]:
    """Draws each turn, when it has ended; as a plain line where no terminal is."""
    bars: dict[str, TaskID] = {}

    def show(name: str, turn: Turn) -> None:
        if name not in bars:
            bars[name] = progress.add_task(name, total=turns_max, last="")
        task = progress.tasks[bars[name]]
        number = int(task.completed) + 1
        tools = ", ".join(call["name"] for call in turn.calls) or "final answer"
        last = f"{tools:<14} {milliseconds(turn.seconds):>9}"
        total = turns_max if turn.calls else number
        progress.update(task.id, completed=number, total=total, last=last, refresh=True)
        if progress.disable:
            _console.print(f"{name:<9}  turn {number:>3}  {last}")

    return show


def _print_comparison(runs: Sequence[Run], model: str, *, is_simulated: bool) -> None:
    _console.print()
    if not is_simulated and (table := turn_by_turn(runs)) is not None:
        _console.print(table)
    _console.print(comparison(runs, model, is_simulated=is_simulated))
    for note in notes(runs, is_simulated=is_simulated):
        _console.print(f"{note}\n")
