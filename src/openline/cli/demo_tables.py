"""What the demo's loops cost, as tables, and in words what the figures mean and what they do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Final, Literal

import msgspec
from rich import box
from rich.markup import escape
from rich.table import Table

from openline.cli.agent_loop import Run, Turn


class Row(msgspec.Struct, frozen=True):
    """One figure of each transport.

    Attributes:
        compares: whether less of it is better; `per turn` where it compares although one loop made more turns.
        holds_engine: the engine's own time is in it, which is the same work over both and differs by chance.
        told: by the engine, and not measured by the client.
    """

    label: str
    figure: Callable[[Run], float]
    shown: Callable[[float], str]
    compares: Literal["no", "per loop", "per turn"] = "per loop"
    holds_engine: bool = False
    told: bool = False


def milliseconds(seconds: float) -> str:
    """A time, with as many digits as say something."""
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1000:.2f} ms" if seconds < 0.01 else f"{seconds * 1000:.1f} ms"


def _kilobytes(size: float) -> str:
    return f"{size / 1000:.1f} KB" if size < 1_000_000 else f"{size / 1_000_000:.2f} MB"


def _count(number: float) -> str:
    return f"{number:,.0f}".replace(",", "\N{NO-BREAK SPACE}")


def _prompt_tokens(run: Run) -> int:
    return sum(turn.engine.prompt_tokens for turn in run.turns)


def _cached_tokens(run: Run) -> int:
    return sum(turn.engine.cached_tokens for turn in run.turns)


def _rest(run: Run) -> float:
    """What is neither prefill nor generation: the server, the way to it, and the engine's tokenizing of the prompt."""
    return median(turn.seconds - turn.engine.seconds for turn in run.turns)


_TIMES: Final = "\N{MULTIPLICATION SIGN}"

ROWS: Final = (
    Row("turns", lambda run: len(run.turns), _count, "no"),
    Row("tool calls", lambda run: sum(len(turn.calls) for turn in run.turns), _count, "no"),
    Row(
        "time, all turns",
        lambda run: sum(turn.seconds for turn in run.turns),
        milliseconds,
        holds_engine=True,
    ),
    Row(
        "time, median turn",
        lambda run: median(turn.seconds for turn in run.turns),
        milliseconds,
        "per turn",
        holds_engine=True,
    ),
    Row(
        "first event, median turn",
        lambda run: median(turn.first_event_seconds for turn in run.turns),
        milliseconds,
        "per turn",
    ),
    Row("sent, all turns", lambda run: sum(turn.sent_bytes for turn in run.turns), _kilobytes),
    Row("sent, last turn", lambda run: run.turns[-1].sent_bytes, _kilobytes),
    Row("received, all turns", lambda run: sum(turn.received_bytes for turn in run.turns), _kilobytes),
)
ENGINE_ROWS: Final = (
    Row("prompt tokens, all turns", _prompt_tokens, _count, "no", told=True),
    Row("  of them cached", _cached_tokens, _count, "no", told=True),
    Row(
        "prefill, all turns",
        lambda run: sum(turn.engine.prefill_seconds or 0 for turn in run.turns),
        milliseconds,
        "no",
        told=True,
    ),
    Row(
        "generation, all turns",
        lambda run: sum(turn.engine.generation_seconds or 0 for turn in run.turns),
        milliseconds,
        "no",
        told=True,
    ),
    Row("the rest, median turn", _rest, milliseconds, "per turn"),
)


def tells_times(runs: Sequence[Run]) -> bool:
    """Whether the engine told of every turn how long it took."""
    return all(turn.engine.prefill_seconds is not None for run in runs for turn in run.turns)


# --- Turn by turn -------------------------------------------------------------------------------


def turn_by_turn(runs: Sequence[Run]) -> Table | None:
    """Prompt, cache and prefill of each turn over each transport; None if the engine counts no tokens."""
    over_http, over_socket = runs
    if not _prompt_tokens(over_http):
        return None
    title = "Prompt tokens, those found cached, and prefill, as the engine tells them"
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("\n#", justify="right", no_wrap=True)
    table.add_column("\ncalls", no_wrap=True, style="dim")
    for heading in ("HTTP", "WebSocket"):
        style = "bold" if heading == "WebSocket" else ""
        for column in (f"{heading}\ntokens", "\ncached", "prefill\nms"):
            table.add_column(column, justify="right", no_wrap=True, style=style)
    for number in range(max(len(over_http.turns), len(over_socket.turns))):
        pair = [run.turns[number] if number < len(run.turns) else None for run in runs]
        called = next(turn for turn in pair if turn is not None).calls
        table.add_row(str(number + 1), called[0]["name"] if called else "answer", *_cells(pair[0]), *_cells(pair[1]))
    return table


def _cells(turn: Turn | None) -> tuple[str, str, str]:
    if turn is None:
        return "", "", ""
    engine = turn.engine
    prefill = "?" if engine.prefill_seconds is None else _count(engine.prefill_seconds * 1000)
    return _count(engine.prompt_tokens), _count(engine.cached_tokens), prefill


# --- The comparison -----------------------------------------------------------------------------


def comparison(runs: Sequence[Run], model: str, *, is_simulated: bool) -> Table:
    """Both loops side by side."""
    over_http, over_socket = runs
    title = f"The same agent loop over each, model {escape(model)}"
    table = Table(title=title, title_style="bold", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("what the client saw", no_wrap=True)
    table.add_column("HTTP\nfull resend", justify="right")
    table.add_column("WebSocket\nincrements", justify="right", style="bold")
    table.add_column("WebSocket\nneeds", style="green")
    table.add_column("figure is", style="dim")
    engine_rows = ENGINE_ROWS if not is_simulated and tells_times(runs) else ()
    for row in (*ROWS, *engine_rows):
        if row is ENGINE_ROWS[0]:
            table.add_section()
        values = [row.figure(run) for run in runs]
        needs = "" if row.holds_engine and engine_rows else ratio(row, over_http, over_socket)
        table.add_row(row.label, *map(row.shown, values), needs, "engine's" if row.told else "measured")
    if is_simulated:
        table.add_row("model's own time", "none", "none", "", "simulated")
    return table


def ratio(row: Row, over_http: Run, over_socket: Run) -> str:
    """How much less the WebSocket needs; empty where that would compare unlike things."""
    unlike = len(over_http.turns) != len(over_socket.turns)
    if row.compares == "no" or (row.compares == "per loop" and unlike):
        return ""
    factor = row.figure(over_http) / row.figure(over_socket)
    if 0.95 < factor < 1.05:
        return "as much"
    times = max(factor, 1 / factor)
    return f"{times:.{0 if times >= 10 else 1}f}{_TIMES} {'less' if factor > 1 else 'more'}"


# --- In words -----------------------------------------------------------------------------------


def notes(runs: Sequence[Run], *, is_simulated: bool) -> list[str]:
    """What the figures mean, and what they do not."""
    over_http, over_socket = runs
    found = [_measured("loop" if is_simulated else "turn")]
    if is_simulated:
        found.append(_SIMULATED)
    elif tells_times(runs):
        found.append(_cache_note(over_http, over_socket))
    else:
        found.append(_REAL)
    if len(over_http.turns) != len(over_socket.turns):
        found.append("The model took another number of turns over each, so that totals do not compare.")
    found += [
        f"Over {run.name} the loop was stopped before the model's final answer; --turns allows for more."
        for run in runs
        if run.turns[-1].calls
    ]
    return found


def _measured(warm_up: str) -> str:
    return (
        f"Measured on this machine, client and server on loopback without network latency, after one unmeasured {warm_up} "
        "on each connection; the loops took turns, each going first every other time. Bytes are JSON and events, without the "
        "headers of HTTP and of WebSocket frames."
    )


def _cache_note(over_http: Run, over_socket: Run) -> str:
    """That a full resend is no new prefill, and what is saved then: plainly, whatever the figures are."""
    hits = [_cached_tokens(run) / max(_prompt_tokens(run), 1) for run in (over_http, over_socket)]
    sent = [_kilobytes(sum(turn.sent_bytes for turn in run.turns)) for run in (over_http, over_socket)]
    rest = [milliseconds(_rest(run)) for run in (over_http, over_socket)]
    work = "the model's work is the same over both, and its time, most of a turn here, differs by chance only"
    if abs(hits[0] - hits[1]) > _UNLIKE_HITS:
        work = "the model had another amount of work over each"
    return (
        f"Full resend hits the engine's prefix cache too: it found {hits[0]:.0%} of the prompt tokens cached over HTTP and "
        f"{hits[1]:.0%} over WebSocket, so {work}. What increments save is sending and parsing: {sent[0]} over HTTP, "
        f"{sent[1]} over WebSocket. On loopback that is little: what is neither prefill nor generation, the engine's "
        f"tokenizing of the whole prompt among it, took {rest[0]} and {rest[1]} of the median turn. Over a network the "
        "resent bytes have to travel as well."
    )


_UNLIKE_HITS: Final = 0.05
_SIMULATED: Final = (
    "The model is simulated: a script that answers at once and has no prefill. No model time is in these times; what "
    "is left is the cost of sending, reading and keeping the conversation."
)
_REAL: Final = (
    "The upstream is taken as it is: the time of the model and of the way to it, which varies from run to run, is in "
    "these times. A full resend may hit its prefix cache as well as an increment does; what is saved then are bytes and "
    "parsing."
)
