"""What `openline run` shows: for people, or one JSON object a line for programs.

What the model says goes to standard output, everything about it to standard error: `openline run … > answer.txt` holds
the answer alone.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, Protocol, TextIO

import msgspec
from rich import box
from rich.console import Console
from rich.prompt import Prompt
from rich.status import Status
from rich.table import Table
from rich.text import Text

from openline.cli.demo_tables import milliseconds
from openline.client.ledger import LedgerSession
from openline.client.progress import CallFinished, CallStarted, Progress, TextDelta, TurnFinished, TurnStarted
from openline.client.run_options import RUN, STOP, Answer, Output
from openline.client.run_result import RunResult
from openline.client.tools import ToolCall

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could drive a terminal; tabs and line breaks stay
STOPPED: Final = "stopped"  # a failure's code that is none: somebody wanted it so
_OUTPUT_LINES_MAX: Final = 3
_VALUE_CHARACTERS_MAX: Final = 60
_ELLIPSIS: Final = "…"


class Beginning(msgspec.Struct, frozen=True, tag="session"):
    """What is about to run.

    Attributes:
        turns: that the session has behind it already.
    """

    session_id: str
    model: str
    base_url: str
    transport: str
    tools: list[str]
    ledger: str | None
    turns: int


class Ending(msgspec.Struct, frozen=True, tag="result"):
    """How a run has ended.

    Attributes:
        sent_bytes: of JSON, by this process.
        seconds: likewise.
    """

    session_id: str
    status: str
    text: str
    turns: int
    calls: int
    failed_calls: int
    usage: dict[str, int]
    sent_bytes: int
    seconds: float


class Failure(msgspec.Struct, frozen=True, tag="error"):
    """Why a run has ended before its end.

    Attributes:
        code: the wire's where it has one; else ours, such as `unreachable` or `stopped`.
        remedy: what to do about it.
        command: what goes on with it; None if nothing does.
    """

    code: str
    message: str
    remedy: str = ""
    command: str | None = None


class Note(msgspec.Struct, frozen=True, tag="note"):
    """Something on the way: the connection broke and came back, a stop was asked for."""

    message: str


class Screen(Protocol):
    """Where a run is shown."""

    def begin(self, beginning: Beginning) -> None:
        """Before the first turn."""
        ...

    def show(self, progress: Progress) -> None:
        """As it goes on."""
        ...

    def note(self, note: Note) -> None:
        """Beside it."""
        ...

    def end(self, ending: Ending) -> None:
        """After the last turn."""
        ...

    def fail(self, failure: Failure) -> None:
        """Instead of an end."""
        ...

    def close(self) -> None:
        """Leave the terminal as it was."""
        ...


class JsonScreen:
    """One object a line, with a `type`."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def begin(self, beginning: Beginning) -> None:
        """As `Screen`."""
        self._write(beginning)

    def show(self, progress: Progress) -> None:
        """As `Screen`."""
        self._write(progress)

    def note(self, note: Note) -> None:
        """As `Screen`."""
        self._write(note)

    def end(self, ending: Ending) -> None:
        """As `Screen`."""
        self._write(ending)

    def fail(self, failure: Failure) -> None:
        """As `Screen`."""
        self._write(failure)

    def close(self) -> None:
        """As `Screen`."""

    def _write(self, told: msgspec.Struct) -> None:
        self._out.write(msgspec.json.encode(told).decode() + "\n")
        self._out.flush()


class PeopleScreen:
    """Text as it comes, a line for each call, and a table at the end.

    Args:
        out: where the model's words go.
        console: where everything else goes.
    """

    def __init__(self, out: TextIO, console: Console) -> None:
        self._out = out
        self._console = console
        self._is_terminal = out.isatty()
        self._in_text = False  # the last line of text is not finished
        self._last: Literal["text", "call"] | None = None
        self._running: list[ToolCall] = []
        self._status: Status | None = None

    def begin(self, beginning: Beginning) -> None:
        """As `Screen`."""
        where = f"{beginning.base_url} ({beginning.transport})"
        self._line(Text.assemble(("model    ", "dim"), (beginning.model, "bold"), f" at {where}"))
        tools = ", ".join(beginning.tools) or "none"
        self._line(Text.assemble(("tools    ", "dim"), tools))
        behind = f", {beginning.turns} turn{'s' * (beginning.turns > 1)} behind it" if beginning.turns else ""
        kept = f" in {beginning.ledger}{behind}" if beginning.ledger else ", not kept"
        self._line(Text.assemble(("session  ", "dim"), beginning.session_id, (kept, "dim")))
        self._console.print()

    def show(self, progress: Progress) -> None:
        """As `Screen`."""
        match progress:
            case TurnStarted():
                self._finish_text()
                self._wait("waiting for the model")
            case TextDelta(text, kind):
                self._say(text, kind)
            case CallStarted(call):
                self._finish_text()
                self._gap("call")
                self._running.append(call)
                self._wait_for_calls()
            case CallFinished():
                self._finish_text()
                self._gap("call")
                self._running = [call for call in self._running if call.key != progress.call.key]
                self._show_call(progress)
                self._wait_for_calls()
            case TurnFinished():
                self._finish_text()

    def note(self, note: Note) -> None:
        """As `Screen`."""
        self._finish_text()
        self._line(Text(f"↻ {printable(note.message)}", "yellow"))

    def end(self, ending: Ending) -> None:
        """As `Screen`."""
        self._rest()
        if ending.status != "completed":
            self._line(Text(f"The answer is {ending.status}: the model was cut.", "yellow"))
        self._console.print(summary(ending))

    def fail(self, failure: Failure) -> None:
        """As `Screen`."""
        self._rest()
        if self._last is not None:
            self._console.print()
        if failure.code == STOPPED:
            self._console.print(Text("Stopped.", "bold yellow"))
        else:
            said = Text.assemble(("openline: ", "bold red"), printable(failure.message))
            self._words(said)
        if failure.remedy:
            self._words(Text(f"→ {failure.remedy}", "cyan"))
        if failure.command is not None:
            self._console.print(Text("\nGo on where it stopped with:\n", "dim"))
            self._console.print(Text(f"  {failure.command}\n"), soft_wrap=True)  # as one line, to be pasted

    def close(self) -> None:
        """As `Screen`."""
        self._rest()

    # Pieces.

    def _say(self, text: str, kind: str) -> None:
        self._rest(keep_text=True)
        self._gap("text")
        self._in_text = not text.endswith("\n")
        if kind == "reasoning":
            self._console.print(Text(printable(text), "dim italic"), end="", soft_wrap=True)
            return
        self._out.write(printable(text) if self._is_terminal else text)
        self._out.flush()

    def _show_call(self, finished: CallFinished) -> None:
        output = finished.output
        mark, style = ("✗", "red") if output.is_error else ("✓", "green")
        line = Text.assemble((f"{mark} ", style), called(finished.call))
        if finished.seconds is not None:
            line.append(f"  {milliseconds(finished.seconds)}", "dim")
        self._line(line)
        for shown in output_lines(output.content):
            self._line(Text(f"  {shown}", "red" if output.is_error else "dim"))

    def _gap(self, kind: Literal["text", "call"]) -> None:
        """An empty line between what the model says and what it does."""
        if self._last not in {None, kind}:
            self._console.print()
        self._last = kind

    def _words(self, text: Text) -> None:
        """Wrapped at its words, but for where it goes to a file."""
        self._console.print(text, soft_wrap=not self._console.is_terminal)

    def _line(self, text: Text) -> None:
        """A line that ends where the terminal does; whole where it goes to a file."""
        if self._console.is_terminal:
            text.truncate(self._console.width, overflow="ellipsis")
        self._console.print(text, soft_wrap=True)

    def _wait_for_calls(self) -> None:
        if self._running:
            self._wait(", ".join(called(call).plain for call in self._running))
        else:
            self._rest()

    def _wait(self, words: str) -> None:
        if not self._console.is_terminal:
            return
        text = Text(printable(words), "dim")
        text.truncate(self._console.width - 4, overflow="ellipsis")
        if self._status is None:
            self._status = self._console.status(text)
            self._status.start()
        else:
            self._status.update(text)

    def _rest(self, *, keep_text: bool = False) -> None:
        """Nothing moves any more."""
        if not keep_text:
            self._finish_text()
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _finish_text(self) -> None:
        if self._in_text:
            self._in_text = False
            self._out.write("\n")
            self._out.flush()


def ask_about(call: ToolCall, console: Console, stream: TextIO | None = None) -> Answer:
    """Ask a person about a call that had started when its agent stopped.

    Args:
        stream: where the answers come from; None is the terminal.
    """

    def ask(what: str, **options: Any) -> str:
        return Prompt.ask(f"  {what}", console=console, stream=stream, **options)

    console.print(Text.assemble(called(call), " had started when its agent stopped; how it ended was not noted."))
    console.print(Text("Look what it did. Then: run it again, tell its output, or stop?", "dim"))
    chosen = ask("run / output / stop", choices=["run", "output", "stop"], default="stop", show_choices=False)
    answer: Answer = Output(ask("its output")) if chosen == "output" else RUN if chosen == "run" else STOP
    console.print()
    return answer


def sessions_table(sessions: Sequence[LedgerSession]) -> Table:
    """What a ledger holds."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("session", no_wrap=True)
    table.add_column("turns", justify="right")
    table.add_column("changed", no_wrap=True)
    table.add_column("")
    for session in sessions:
        changed = datetime.fromtimestamp(session.changed_at, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M")
        state = Text("done", "dim") if session.is_done else Text("unfinished", "green")
        table.add_row(session.session_id, str(session.turns), changed, state)
    return table


def summary(ending: Ending) -> Table:
    """What the run has cost."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    usage = ending.usage
    calls = f"{ending.calls} ({ending.failed_calls} failed)" if ending.failed_calls else str(ending.calls)
    tokens = f"{usage['input_tokens']:,} in, {usage['output_tokens']:,} out" if usage["total_tokens"] else "not told"
    columns = {
        "turns": str(ending.turns),
        "calls": calls,
        "tokens": tokens,
        "cached": f"{usage['cached_tokens']:,}",
        "sent": f"{ending.sent_bytes / 1000:.1f} KB",
        "time": milliseconds(ending.seconds),
    }
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row(*columns.values())
    return table


def called(call: ToolCall) -> Text:
    """A call as people write one."""
    text = Text(printable(call.name), "bold")
    arguments = ", ".join(f"{name}={_value(value)}" for name, value in call.arguments.items())
    return text.append(f"({printable(arguments)})", "not bold")


def output_lines(content: Any) -> list[str]:
    """The first lines of an output."""
    if not isinstance(content, str):
        return [f"{len(content)} content parts"]
    lines = [printable(line) for line in content.strip().splitlines() if line.strip()]
    more = len(lines) - _OUTPUT_LINES_MAX
    return [*lines[:_OUTPUT_LINES_MAX], f"{_ELLIPSIS} {more} more lines"] if more > 1 else lines


def printable(text: str) -> str:
    """A text without what would drive the terminal: it is a model's, or a tool's."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def _value(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _VALUE_CHARACTERS_MAX else text[: _VALUE_CHARACTERS_MAX - 1] + _ELLIPSIS


def ending_of(result: RunResult, *, sent_bytes: int, seconds: float) -> Ending:
    """What there is to say of a run that has come to its end."""
    return Ending(
        session_id=result.session_id,
        status=result.response.get("status") or "",
        text=result.text,
        turns=len(result.responses),
        calls=len(result.calls),
        failed_calls=sum(done.output.is_error for done in result.calls),
        usage=result.usage,
        sent_bytes=sent_bytes,
        seconds=seconds,
    )
