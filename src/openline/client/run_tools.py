"""The agent loop: ask, run the tools that the model calls, send their outputs, until it calls none.

Every step of it is in the ledger before it is taken, and what comes next is decided from the ledger's rows alone
(`run_state.next_move`): a run that is taken up after a crash takes the same path as one that goes on.

Source: Responses API reference, "Function calling"; guarantees, "Tools exactly once".
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from typing import Any, Final, Literal, cast

import msgspec

from openline.client.calling import OnToolError
from openline.client.create import checked, encode
from openline.client.errors import ConnectionLost, OpenlineError, Refused, TurnFailed
from openline.client.history import History, Input, encode_items
from openline.client.ledger import Ledger, committed
from openline.client.progress import OnProgress, TextDelta, TurnFinished, TurnStarted, tell
from openline.client.run_calls import Caller
from openline.client.run_history import before_of, history_of
from openline.client.run_options import OnUnknown, RunBoundReached, RunBounds
from openline.client.run_result import RunResult, result_of
from openline.client.run_state import Done, Move, Run, Send, SendAgain, SendOutputs, Status, Step, calls_of, next_move
from openline.client.session import Session
from openline.client.settings import OnLost
from openline.client.tool_schema import Function
from openline.client.tools import Toolbox, toolbox
from openline.client.wire import Item, Response

_BOUNDS: Final = RunBounds()
_DELTAS: Final[dict[str, Literal["text", "refusal", "reasoning"]]] = {
    "response.output_text.delta": "text",
    "response.refusal.delta": "refusal",
    "response.reasoning_text.delta": "reasoning",
    "response.reasoning_summary_text.delta": "reasoning",
}
_CANCELLED_MAX: Final = 3  # turns of a run that the server cancels, as one does that is told to stop


async def run_tools(
    session: Session,
    *,
    tools: Iterable[Function | Item],
    input: Input | None = None,  # noqa: A002 - the wire's name
    ledger: Ledger | None = None,
    resume: str | None = None,
    on_unknown: OnUnknown | None = None,
    on_progress: OnProgress | None = None,
    on_tool_error: OnToolError = "output",
    on_lost: OnLost = "restart",
    parallel: bool = True,
    parallel_max: int = _BOUNDS.parallel_max,
    tool_seconds_max: float = _BOUNDS.tool_seconds_max,
    calls_max: int = _BOUNDS.calls_max,
    turns_max: int = _BOUNDS.turns_max,
    output_bytes_max: int = _BOUNDS.output_bytes_max,
    **fields: Any,
) -> RunResult:
    """Ask the model, run the tools that it calls, send it their outputs, until it calls none.

    With a ledger it can be taken up in another process after this one has died, or after an error, or when it was
    cancelled: `resume=` the session's id. What had finished is not done again.

    Args:
        session: takes the turns; nothing else may use it meanwhile.
        tools: functions, plain or with `@openline.tool`; dicts are tools that the server runs.
        input: a text, or items. With `resume` only if the session's last run is done: another one follows then.
        ledger: where every step is noted before it is taken; None notes nothing.
        resume: the id of a session in the ledger. Its fields, such as `model` and `instructions`, go on to hold unless
            they are given again.
        on_unknown: is asked about a call that had started, and of whose end the ledger has nothing: `Output(value)`, `RUN`
            or `STOP`, which is what happens without it. Not asked about idempotent tools: they run again.
        on_progress: is told what happens, as it happens; what it raises ends the run.
        on_tool_error: `raise` lets a tool's exception out instead of telling the model; the call is unknown then.
        on_lost: a turn that the server has lost is asked anew by default: no tool of it has run. See `ClientSettings`.
        parallel: False runs calls one after another, and asks the model to make only one at a time.
        parallel_max: calls of one turn that run at once. This and the next: see `RunBounds`.
        fields: every other field of a create, such as `model`, `instructions`, `store`. `tool_choice` is said in the
            run's first turn only: if it forces a call, the model could never answer.

    Raises:
        ToolOutcomeUnknown: a call has started, is not idempotent, and nobody knows how it ended.
        RunBoundReached: the run would do more than it may.
        Refused, TurnFailed, ConnectionLost: as `Session.create`.
        LedgerFailed: the ledger cannot be written; nothing was begun that is not in it.
        SessionLocked: another agent works on the session.
        OpenlineError: what was asked for does not fit what the ledger has; the message says how to go on.

    Source: Responses API reference, "Function calling".
    """
    bounds = RunBounds(
        tool_seconds_max=tool_seconds_max,
        calls_max=calls_max,
        turns_max=turns_max,
        parallel_max=parallel_max if parallel else 1,
        output_bytes_max=output_bytes_max,
    )
    if resume is not None:
        if ledger is None:
            raise OpenlineError(f"resume='{resume}' needs the ledger= that holds the session.")
        session.id = resume
    box = toolbox(tools)
    if not parallel and box.wire:
        fields.setdefault("parallel_tool_calls", False)
    with ExitStack() as held:
        noted = ledger if ledger is not None else held.enter_context(Ledger(None))
        held.enter_context(noted.hold(session.id))
        loop = _Loop(
            session,
            noted,
            box,
            Caller(
                session.id,
                box,
                noted,
                bounds,
                on_unknown=on_unknown,
                on_progress=on_progress,
                on_tool_error=on_tool_error,
            ),
            bounds,
            await asyncio.to_thread(noted.steps, session.id),
            on_progress,
            on_lost,
            survives=ledger is not None,
        )
        await (loop.begin(input, fields) if resume is None else loop.resume(input, fields))
        return await loop.to_its_end()


class _Loop:
    """One run.

    Args:
        steps: of the session, from its first.
        survives: another process may go on with it.
    """

    def __init__(
        self,
        session: Session,
        ledger: Ledger,
        toolbox: Toolbox,
        caller: Caller,
        bounds: RunBounds,
        steps: list[Step],
        on_progress: OnProgress | None,
        on_lost: OnLost,
        *,
        survives: bool,
    ) -> None:
        self._session = session
        self._ledger = ledger
        self._toolbox = toolbox
        self._caller = caller
        self._bounds = bounds
        self._steps = steps
        self._on_progress = on_progress
        self._on_lost: OnLost = on_lost
        self._survives = survives
        self._given: Mapping[str, Any] = {}  # the fields that whoever resumes names, for the next create
        self._cancelled = 0  # turns, by the server
        self._may_be_known = False  # the last step's create was another's, who may have sent it

    @property
    def _last(self) -> Step:
        return self._steps[-1]

    @property
    def _run(self) -> list[Step]:
        """The steps of the last run."""
        return [step for step in self._steps if step.run == self._last.run]

    def _next(self) -> Move:
        return next_move(self._last, self._toolbox.is_idempotent)

    def _history(self) -> History:
        """What the ledger has of the conversation."""
        return history_of(self._steps, bytes_max=self._session.settings.history_bytes_max)

    # How it begins.

    async def begin(self, given: Input | None, fields: Mapping[str, Any]) -> None:
        """A run of its own: the session's first, or another after one that is done.

        Raises:
            OpenlineError: there is no input, or the last run is not done.
        """
        if given is None:
            raise OpenlineError("input: expected what the model is asked, or resume= with a session's id.")
        if self._steps and not isinstance(self._next(), Done):
            raise OpenlineError(
                f"session '{self._session.id}' has a run in the ledger that is not done: go on with it by "
                f"resume='{self._session.id}', or delete it from the ledger."
            )
        if self._steps and self._session.history.is_empty:
            self._session.history = self._history()
        await self._ask(given, fields, before=before_of(self._session.history, self._history()))

    async def resume(self, given: Input | None, fields: Mapping[str, Any]) -> None:
        """Take up what the ledger has, as it stands there; after a run that is done another may follow.

        Raises:
            OpenlineError: it does not hold the session, or there is an input for a run that is not done.
        """
        if not self._steps:
            raise OpenlineError(f"resume: {self._ledger!r} holds no session '{self._session.id}'.")
        is_done = isinstance(self._next(), Done)
        if given is not None and not is_done:
            raise OpenlineError(
                f"input: the last run of session '{self._session.id}' is not done, and would not see it: resume it "
                "without an input first."
            )
        self._session.history = self._history()
        self._may_be_known = True
        self._given = fields
        if given is not None:
            await self._ask(given, {**_carried(self._last.create), **fields})

    async def _ask(self, given: Input, fields: Mapping[str, Any], *, before: dict[str, Any] | None = None) -> None:
        items = [msgspec.json.decode(item) for item in encode_items(given)]
        create = {"model": self._session.model, **fields, "input": items}
        await self._add_step(create, run=self._last.run + 1 if self._steps else 1, before=before)

    # How it goes on.

    async def to_its_end(self) -> RunResult:
        """Take one step after another, each as the ledger's last rows say."""
        while True:
            match self._next():
                case Send():
                    await self._take_turn()
                case SendAgain():
                    self._check_cancelled()
                    self._session.history = self._history()  # without what came of it
                    await self._add_step({**self._last.create, **self._given})
                case Run() as move:
                    self._check_bound("calls_max", sum(len(step.calls) for step in self._run))
                    self._steps[-1] = await self._caller.run(self._last, move)
                case SendOutputs(items):
                    await self._add_step({**_carried(self._last.create), **self._given, "input": list(items)})
                case Done():
                    return result_of(self._session.id, self._run)

    async def _add_step(
        self, create: Mapping[str, Any], *, run: int | None = None, before: dict[str, Any] | None = None
    ) -> None:
        """Note a create that is about to be sent."""
        if run is None:
            run = self._last.run
            self._check_bound("turns_max", len(self._run) + 1)
        fields = checked({**create, "tools": self._toolbox.wire or None})
        step = Step(
            number=len(self._steps) + 1,
            run=run,
            idempotency_key=f"key_{secrets.token_hex(16)}",
            create=msgspec.json.decode(encode(fields)),
            before=before,
        )
        await committed(self._ledger.add_step, self._session.id, step)
        self._steps.append(step)
        self._may_be_known = False
        self._given = {}  # from now on they are the last create's

    async def _take_turn(self) -> None:
        """Send the last step's create, and note how its turn ends.

        Raises:
            OpenlineError: it did not end well.
        """
        step = self._last
        try:
            response = await self._response(step)
        except TurnFailed as error:
            await self._end_turn(step, "failed", error.response)
            raise
        except Refused as error:
            if 400 <= error.status < 500:  # else it may be a proxy that says so, and the turn runs
                await self._end_turn(step, "refused", None)
            raise
        await self._end_turn(step, _status_of(response), response)

    async def _response(self, step: Step) -> Response:
        stream = self._session.create(
            **step.create, idempotency_key=step.idempotency_key, resume=self._may_be_known, on_lost=self._on_lost
        )
        if self._survives:
            stream.detach()  # whoever goes on with the session finds the turn at the server
        await self._tell_started(step)
        restarts = 0
        async with stream:
            with suppress(ConnectionLost):  # the events may be lost, and the response known all the same
                async for event in stream:
                    if stream.restarts > restarts:
                        restarts = stream.restarts
                        await self._tell_started(step)
                    if (kind := _DELTAS.get(event["type"])) is not None:
                        await tell(self._on_progress, TextDelta(event["delta"], kind))
            return await stream.response()

    async def _tell_started(self, step: Step) -> None:
        await tell(self._on_progress, TurnStarted(step.number, step.idempotency_key, self._may_be_known))

    async def _end_turn(self, step: Step, status: Status, response: Response | None) -> None:
        calls = calls_of(response) if status == "completed" and response is not None else ()
        ended = msgspec.structs.replace(step, status=status, response=response, calls=calls)
        await committed(self._ledger.end_turn, self._session.id, ended)
        self._steps[-1] = ended
        if response is not None:
            await tell(self._on_progress, TurnFinished(step.number, response))

    def _check_bound(self, bound: Literal["calls_max", "turns_max"], count: int) -> None:
        if count > getattr(self._bounds, bound):
            raise RunBoundReached(bound, getattr(self._bounds, bound))

    def _check_cancelled(self) -> None:
        self._cancelled += self._last.status == "cancelled" and not self._may_be_known
        if self._cancelled >= _CANCELLED_MAX:
            raise OpenlineError(
                f"the server has cancelled turn {self._last.number} and those before it, {_CANCELLED_MAX} in all: go on "
                "with resume= once it takes turns again."
            )


def _status_of(response: Response) -> Status:
    if response.get("status") == "completed":
        return "completed"
    details: dict[str, Any] = response.get("incomplete_details") or {}
    return "cancelled" if details.get("reason") == "cancelled" else "incomplete"


def _carried(create: Mapping[str, Any]) -> dict[str, Any]:
    """What of a create holds for the next one too.

    An input and a parent are the next one's own; a choice that forces a call would force calls for ever.
    """
    choice: Any = create.get("tool_choice")
    forces = choice == "required" or (isinstance(choice, dict) and cast("Item", choice).get("mode") != "auto")
    left_out = {"input", "previous_response_id", *(["tool_choice"] if forces else [])}
    return {name: value for name, value in create.items() if name not in left_out}
