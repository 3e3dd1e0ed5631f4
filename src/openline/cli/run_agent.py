"""One run of `openline run`: find the model, decide about what a crash has left, run the loop, and say how it ended."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal, cast

import msgspec
from rich.console import Console

from openline.cli.counting_dial import CountingDial
from openline.cli.run_screen import STOPPED, Beginning, Failure, Note, Screen, ask_about, ending_of
from openline.client.aiohttp_dial import AiohttpDial
from openline.client.errors import ConnectionLost, OpenlineError, Refused, ToolOutcomeUnknown, TurnFailed
from openline.client.ledger import Ledger
from openline.client.progress import CallFinished, CallStarted, Progress
from openline.client.recovery import Action, FallBack, LookUp, ResendFull, ResendSameKey, Resume
from openline.client.run_options import RUN, STOP, Answer, OnUnknown, RunBoundReached, RunBounds
from openline.client.run_result import RunResult
from openline.client.run_state import Done, Run, next_move, tool_call
from openline.client.run_tools import run_tools
from openline.client.session import Session, connect
from openline.client.settings import ClientSettings, Transport
from openline.client.tools import Toolbox
from openline.client.wire import DialFailed, LineClosed
from openline.config import is_loopback

# Exit codes; typer's own for wrong usage is 2.
DONE, FAILED, USAGE, UNKNOWN, BOUND, INTERRUPTED = 0, 1, 2, 3, 4, 130
LAST: Final = "last"
DEFAULT_URL: Final = "http://127.0.0.1:8484/v1"

_BOUNDS: Final = RunBounds()
_START: Final = (
    "Start one in another terminal: `openline serve` in front of the model server of this machine, or "
    "`openline serve --upstream scripted:` to try it without a model. --base-url names another."
)
# What recovery decides → what people are told. What ends a turn comes as an error, which says the same.
_WHAT_NEXT: Final[dict[type[Action], str]] = {
    Resume: "taking the turn up again",
    ResendSameKey: "sending the turn again, under its key",
    ResendFull: "sending the whole conversation",
    LookUp: "asking what became of the turn",
    FallBack: "going on over HTTP",
}
_MODELS_SHOWN_MAX: Final = 8
_LOOK_SECONDS_MAX: Final = 10.0  # a busy model server may take a while to say what it has


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line asks for.

    Attributes:
        resume: a session's id, or `last`.
        ledger: as it was given; None is the user's own.
    """

    prompt: str | None = None
    tools: tuple[Path, ...] = ()
    model: str | None = None
    instructions: str | None = None
    base_url: str = DEFAULT_URL
    transport: Transport = "auto"
    resume: str | None = None
    ledger: str | None = None
    on_unknown: Literal["ask", "run", "stop"] | None = None
    store: bool = True
    parallel: bool = True
    tool_seconds_max: float = _BOUNDS.tool_seconds_max
    calls_max: int = _BOUNDS.calls_max
    turns_max: int = _BOUNDS.turns_max

    def settled(self, ledger: Ledger) -> Order:
        """The same with the id of the session that `last` means.

        Raises:
            OpenlineError: it says too little, or the ledger has no such session.
        """
        if self.resume is None:
            if not (self.prompt or "").strip():
                raise OpenlineError('what is the model to be asked? openline run "…", or openline run --resume.')
            return self
        held = ledger.sessions()
        if not held:
            raise OpenlineError(f"--resume: {_named(ledger)} holds no session yet.")
        if self.resume == LAST:
            return msgspec.structs.replace(self, resume=held[0].session_id)
        if self.resume not in {session.session_id for session in held}:
            raise OpenlineError(
                f"--resume: {_named(ledger)} holds no session '{self.resume}'; openline run --sessions lists what it holds. "
                'A prompt comes first: openline run "…" --resume.'
            )
        return self

    def command(self, session_id: str, **changed: object) -> str:
        """What goes on with the session, to be pasted."""
        told: dict[str, object] = {
            "--ledger": self.ledger,
            "--base-url": _unless(DEFAULT_URL, self.base_url),
            "--transport": _unless("auto", self.transport),
            "--tool-seconds-max": _unless(_BOUNDS.tool_seconds_max, self.tool_seconds_max),
            "--calls-max": _unless(_BOUNDS.calls_max, self.calls_max),
            "--turns-max": _unless(_BOUNDS.turns_max, self.turns_max),
            **changed,
        }
        words = ["openline", "run", "--resume", session_id]
        for file in self.tools:
            words += ["--tools", str(file)]
        for option, value in told.items():
            words += [] if value is None else [option, str(value)]
        return shlex.join([*words, *([] if self.parallel else ["--no-parallel"])])


class Agent:
    """The run, from the first look at the server to its last words."""

    def __init__(self, order: Order, toolbox: Toolbox, ledger: Ledger, screen: Screen) -> None:
        self._order = order
        self._toolbox = toolbox
        self._ledger = ledger
        self._screen = screen
        self._steps = ledger.steps(order.resume) if order.resume is not None else []
        self._running = 0  # calls
        self._is_stopping = False
        self._task: asyncio.Task[Any] | None = None
        self._models: list[str] = []  # that the server names
        self._session_id = order.resume

    def run(self, on_unknown: OnUnknown | None, *, can_ask: bool) -> int:
        """Run it, and show how it ends.

        Args:
            on_unknown: the tools' file's own.
            can_ask: somebody sits at the terminal.

        Returns:
            The exit code.

        Raises:
            OpenlineError: the session cannot be gone on with as it was asked.
        """
        self._check_tools()
        decide = self._decide_unknown(on_unknown, can_ask=can_ask)
        handler = Notes(self._screen)
        logger = logging.getLogger("openline.client")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        try:
            return asyncio.run(self._run(decide))
        except (asyncio.CancelledError, KeyboardInterrupt):
            self._screen.fail(Failure(STOPPED, "", self._unkept(), self._resuming()))
            return INTERRUPTED
        finally:
            logger.removeHandler(handler)
            self._screen.close()

    # Before it.

    def _check_tools(self) -> None:
        """Without its tools a session would go on with errors for outputs."""
        if not self._steps:
            return
        told: list[dict[str, Any]] = self._steps[-1].create.get("tools") or []
        missing = [
            each["name"] for each in told if each.get("type") == "function" and each["name"] not in self._toolbox.tools
        ]
        if missing and not isinstance(self._next(), Done):
            raise OpenlineError(
                f"session '{self._session_id}' has the tools {', '.join(missing)}, which are not here: name their file with "
                "--tools."
            )

    def _next(self) -> object:
        return next_move(self._steps[-1], self._toolbox.is_idempotent)

    def _decide_unknown(self, own: OnUnknown | None, *, can_ask: bool) -> OnUnknown | None:
        """Who decides about calls whose outcome is unknown; people are asked now, before anything waits for them."""
        match self._order.on_unknown:
            case "run":
                return lambda _: RUN
            case "stop":
                return None
            case "ask":
                pass
            case None:
                if own is not None or not can_ask:
                    return own
        move = self._next() if self._steps else None
        unknown = move.unknown if isinstance(move, Run) else ()
        answers: dict[str, Answer] = {}
        for call in unknown:
            asked = tool_call(self._session_id or "", self._steps[-1], call)
            answers[asked.key] = ask_about(asked, Console(stderr=True, highlight=False))
        return lambda call: answers.get(call.key, STOP)

    # The run.

    async def _run(self, on_unknown: OnUnknown | None) -> int:
        self._task = asyncio.current_task()
        self._stop_on_signals()
        started = time.monotonic()
        key = os.environ.get("OPENLINE_API_KEY", "").strip() or None
        dial = CountingDial(AiohttpDial(self._order.base_url, ClientSettings()))
        try:
            model = await self._model(dial, key)
            async with connect(
                self._order.base_url, api_key=key, model=model, transport=self._order.transport, dial=dial
            ) as session:
                result = await self._run_tools(session, on_unknown, model)
        except OpenlineError as error:
            return self._fail(error)
        finally:
            await dial.close()
        ending = ending_of(result, sent_bytes=dial.sent_bytes, seconds=time.monotonic() - started)
        self._screen.end(ending)
        return DONE if ending.status == "completed" else FAILED

    async def _run_tools(self, session: Session, on_unknown: OnUnknown | None, model: str) -> RunResult:
        order = self._order
        self._session_id = order.resume or session.id
        self._screen.begin(
            Beginning(
                session_id=self._session_id,
                model=model,
                base_url=order.base_url,
                transport=order.transport,
                tools=list(self._toolbox.tools),
                ledger=None if self._ledger.path is None else str(self._ledger.path),
                turns=len(self._steps),
            )
        )
        return await run_tools(
            session,
            input=order.prompt,
            tools=[tool.function for tool in self._toolbox.tools.values()] + list(self._toolbox.hosted),
            ledger=None if self._ledger.path is None else self._ledger,
            resume=order.resume,
            on_unknown=on_unknown,
            on_progress=self._on_progress,
            parallel=order.parallel,
            tool_seconds_max=order.tool_seconds_max,
            calls_max=order.calls_max,
            turns_max=order.turns_max,
            **self._fields(),
        )

    def _fields(self) -> dict[str, Any]:
        given = {"model": self._order.model, "instructions": self._order.instructions}
        fields: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return fields if self._order.store else {**fields, "store": False}

    async def _model(self, dial: CountingDial, key: str | None) -> str:
        """Which model is asked; and whether a server is there at all, before a session would wait for one.

        Raises:
            Unreachable: none answers.
            OpenlineError: the server names no model, and neither did anybody else.
        """
        self._models = await self._listed(dial, key)
        held = self._steps[-1].create.get("model") if self._steps else None
        model = self._order.model or held or next(iter(self._models), None)
        if model is None:
            raise OpenlineError(f"{self._order.base_url} names no model: name one with --model.")
        return model

    async def _listed(self, dial: CountingDial, key: str | None) -> list[str]:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        try:
            async with asyncio.timeout(_LOOK_SECONDS_MAX):
                answer = await dial.get("/models", headers)
                body = await answer.body()
        except TimeoutError:
            raise Unreachable(
                self._order.base_url, f"/models has not answered within {_LOOK_SECONDS_MAX:g} s"
            ) from None
        except (DialFailed, LineClosed) as error:
            raise Unreachable(self._order.base_url, str(error)) from None
        if answer.status != 200:
            return []  # not every server has the list; if it refuses more than that, the turn will say so
        with suppress(msgspec.DecodeError):
            return [row.id for row in msgspec.json.decode(body, type=_Models).data]
        return []

    # Stopping.

    def _stop_on_signals(self) -> None:
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            with suppress(NotImplementedError, AttributeError):  # Windows; there Ctrl-C stops at once
                asyncio.get_running_loop().add_signal_handler(getattr(signal, name), self._stop)

    def _stop(self) -> None:
        """Wait for the tools that run, or, asked again, for nothing: what has started and not ended would be unknown."""
        assert self._task is not None
        if self._running and not self._is_stopping:
            self._is_stopping = True
            calls = "running call" if self._running == 1 else f"{self._running} running calls"
            self._screen.note(Note(f"stopping after the {calls}; Ctrl-C again stops at once"))
        else:
            self._task.cancel()

    async def _on_progress(self, progress: Progress) -> None:
        self._screen.show(progress)
        self._running += isinstance(progress, CallStarted)
        if isinstance(progress, CallFinished):
            self._running -= progress.seconds is not None
            if self._is_stopping:
                assert self._task is not None
                if not self._running:
                    self._task.cancel()
                await asyncio.Event().wait()  # the next call does not start; the last one to end cancels this

    # How it ends, if not well.

    def _fail(self, error: OpenlineError) -> int:
        code, failure = self._failure(error)
        self._screen.fail(failure)
        return code

    def _failure(self, error: OpenlineError) -> tuple[int, Failure]:
        says = str(error)
        match error:
            case Unreachable():
                return FAILED, Failure("unreachable", says, self._start(), self._resuming())
            case ToolOutcomeUnknown(call=call):
                remedy = f"Find out what {call['name']} did, then say its output, or that it is to run again."
                return UNKNOWN, Failure("tool_outcome_unknown", says, remedy, self._resuming(**{"--on-unknown": "ask"}))
            case RunBoundReached(bound=bound, value=value):
                option = f"--{bound.replace('_', '-')}"
                message = f"the run has reached {option} {value}."
                return BOUND, Failure(
                    "bound_reached", message, "Raise it to go on.", self._resuming(**{option: 2 * value})
                )
            case Refused(status=401):
                return FAILED, Failure(
                    "refused", says, "Put a key of that server into OPENLINE_API_KEY.", self._resuming()
                )
            case Refused(code="model_not_found"):
                return FAILED, Failure("refused", says, *self._another_model())
            case Refused() | TurnFailed():
                return FAILED, Failure("failed", says, "Going on asks the model again.", self._resuming())
            case ConnectionLost():
                return FAILED, Failure("connection_lost", says, "", self._resuming())
            case _:
                return FAILED, Failure("failed", says, "", self._resuming())

    def _another_model(self) -> tuple[str, str | None]:
        if not self._models:
            return "Name another with --model.", self._resuming()
        more = ", …" if len(self._models) > _MODELS_SHOWN_MAX else ""
        names = ", ".join(self._models[:_MODELS_SHOWN_MAX]) + more
        return f"The server has {names}.", self._resuming(**{"--model": self._models[0]})

    def _start(self) -> str:
        host = self._order.base_url.partition("//")[2].partition("/")[0].rpartition(":")[0]
        return _START if is_loopback(host) else "Is --base-url right?"

    def _resuming(self, **changed: object) -> str | None:
        """The command that goes on; None if there is nothing to go on with."""
        if self._session_id is None or self._ledger.path is None or not self._ledger.steps(self._session_id):
            return None
        return self._order.command(self._session_id, **changed)

    def _unkept(self) -> str:
        return "" if self._ledger.path is not None else "It cannot be gone on with: --ledger none keeps nothing."


class Unreachable(OpenlineError):  # noqa: N818 - what was found
    """No server answers."""

    def __init__(self, base_url: str, reason: str) -> None:
        words = reason.partition(" [")[0].replace(" ssl:default", "")  # of aiohttp's, what is for people
        super().__init__(f"no server answers at {base_url}: {words}.")


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


class Notes(logging.Handler):
    """Shows what the session logs of a turn whose line broke: its key, what happened, and what is done about it."""

    def __init__(self, screen: Screen) -> None:
        super().__init__()
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        """As `logging.Handler`."""
        if isinstance(record.args, tuple) and len(record.args) == 3:
            _, words, action = record.args
            if (next_ := _WHAT_NEXT.get(cast("type[Action]", type(action)))) is not None:
                self._screen.note(Note(f"{next_}: {words}"))


def _named(ledger: Ledger) -> str:
    return "--ledger none" if ledger.path is None else f"the ledger {ledger.path}"


def _unless(default: object, value: object) -> object | None:
    return None if value == default else value
