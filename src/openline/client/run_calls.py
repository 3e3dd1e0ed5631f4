"""Runs the calls of one turn: each is noted before it starts and when it is finished, and only then told of."""

from __future__ import annotations

import asyncio
import inspect
from collections import deque
from collections.abc import Iterable

import msgspec

from openline.client.calling import OnToolError, no_such_tool, run_tool
from openline.client.errors import OpenlineError, ToolOutcomeUnknown
from openline.client.ledger import Ledger, committed
from openline.client.progress import CallFinished, CallStarted, OnProgress, tell
from openline.client.run_options import RUN, STOP, OnUnknown, Output, RunBounds
from openline.client.run_state import Call, Run, Step, tool_call
from openline.client.tool_outputs import ToolOutput, error_output, output_of
from openline.client.tools import Toolbox, WrongArguments


class Caller:
    """Runs calls for one run of one session.

    Args:
        bounds: how many at once, for how long, and how much of their outputs.
    """

    def __init__(
        self,
        session_id: str,
        toolbox: Toolbox,
        ledger: Ledger,
        bounds: RunBounds,
        *,
        on_unknown: OnUnknown | None,
        on_progress: OnProgress | None,
        on_tool_error: OnToolError,
    ) -> None:
        self._session_id = session_id
        self._toolbox = toolbox
        self._ledger = ledger
        self._bounds = bounds
        self._on_unknown = on_unknown
        self._on_progress = on_progress
        self._on_tool_error: OnToolError = on_tool_error

    async def run(self, step: Step, move: Run) -> Step:
        """Run what is ready, and what the app wants to run again.

        Returns:
            The step with the outputs in it.

        Raises:
            ToolOutcomeUnknown: nobody knows of one of the calls; then none was run.
        """
        chosen = {call.call_id for call in move.ready}
        for call in move.unknown:
            if (output := await self._ask(step, call)) is None:
                chosen.add(call.call_id)
            else:
                step = step.with_call(await self._finish(step, call, output, seconds=None))
        for call in await self._run_all(step, [call for call in step.calls if call.call_id in chosen]):
            step = step.with_call(call)
        return step

    async def _ask(self, step: Step, call: Call) -> ToolOutput | None:
        """The output of a call that has started, if the app knows it; None if it is to run again."""
        answer = STOP if self._on_unknown is None else self._on_unknown(tool_call(self._session_id, step, call))
        if inspect.isawaitable(answer):
            answer = await answer
        if isinstance(answer, Output):
            return output_of(answer.value, self._bounds.output_bytes_max)
        if answer is RUN:
            return None
        if answer is STOP:
            raise ToolOutcomeUnknown(call.item)
        raise OpenlineError(f"on_unknown answered {answer!r}: expected Output(value), RUN or STOP.")

    async def _run_all(self, step: Step, calls: Iterable[Call]) -> list[Call]:
        waiting = deque(calls)
        finished: list[Call] = []

        async def work() -> None:
            try:
                while waiting:
                    finished.append(await self._run_one(step, waiting.popleft()))
            except BaseException:
                waiting.clear()  # nothing starts after an error, not even until it is known to the others
                raise

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self._bounds.parallel_max, len(waiting))):
                    group.create_task(work())
        except BaseExceptionGroup as errors:  # of those that failed together, the first; the rest were cancelled
            raise errors.exceptions[0] from None
        return finished

    async def _run_one(self, step: Step, call: Call) -> Call:
        told = tool_call(self._session_id, step, call)
        tool = self._toolbox.tools.get(call.name)
        if tool is None:
            output = no_such_tool(call.name, list(self._toolbox.tools))
            return await self._finish(step, call, output, seconds=None)
        try:
            keywords = tool.keywords(told, call.arguments)
        except WrongArguments as error:
            return await self._finish(step, call, error_output(f"{error}."), seconds=None)
        await committed(self._ledger.start_call, self._session_id, step, call)
        await tell(self._on_progress, CallStarted(told))
        clock = asyncio.get_running_loop().time
        started = clock()
        output = await run_tool(
            tool,
            keywords,
            seconds_max=self._bounds.tool_seconds_max,
            output_bytes_max=self._bounds.output_bytes_max,
            on_error=self._on_tool_error,
        )
        return await self._finish(step, call, output, seconds=clock() - started)

    async def _finish(self, step: Step, call: Call, output: ToolOutput, *, seconds: float | None) -> Call:
        finished = msgspec.structs.replace(call, output=output)
        await committed(self._ledger.finish_call, self._session_id, step, finished)
        await tell(self._on_progress, CallFinished(tool_call(self._session_id, step, call), output, seconds))
        return finished
