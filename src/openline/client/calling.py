"""Running a tool: in a thread or as a coroutine, for so long, and whatever becomes of it is an output."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final, Literal, NamedTuple

from openline.client.tool_outputs import ToolOutput, error_output, output_of
from openline.client.tools import Tool

# What becomes of a tool's exception: the model reads it, or it ends the run.
OnToolError = Literal["output", "raise"]

_NAMES_MAX: Final = 20  # of tools, in the answer to a call of one that is not there


async def run_tool(
    tool: Tool, keywords: Mapping[str, Any], *, seconds_max: float, output_bytes_max: int, on_error: OnToolError
) -> ToolOutput:
    """Run a tool, and give what the model will read.

    A coroutine that is out of time is cancelled. A thread cannot be: it is left to itself, and what it returns is
    dropped.

    Args:
        seconds_max: how long it may take, unless the tool says so itself.
        on_error: `raise` lets the tool's exceptions out.
    """
    seconds = tool.options.timeout_seconds or seconds_max
    timeout = asyncio.timeout(seconds)
    try:
        async with timeout:
            value = await _value(tool, keywords)
        return output_of(value, output_bytes_max)
    except (Exception, SystemExit, asyncio.CancelledError) as error:
        if isinstance(error, asyncio.CancelledError) and _is_cancelled():
            raise
        if timeout.expired():
            return error_output(
                f"no result within {seconds:g} seconds; what it began may be half done, or still go on."
            )
        if on_error == "raise":
            raise
        return error_output(f"{type(error).__name__}: {error}")


def no_such_tool(name: str, names: list[str]) -> ToolOutput:
    """What the model reads that has called a tool which is not there."""
    listed = ", ".join(names[:_NAMES_MAX]) + (", …" if len(names) > _NAMES_MAX else "")
    return error_output(f"there is no tool '{name}'. The tools are: {listed or 'none'}.")


async def _value(tool: Tool, keywords: Mapping[str, Any]) -> Any:
    value = tool.function(**keywords) if tool.is_async else await _in_thread(tool, keywords)
    return await value if inspect.isawaitable(value) else value


class _Ended(NamedTuple):
    value: Any
    error: BaseException | None


async def _in_thread(tool: Tool, keywords: Mapping[str, Any]) -> Any:
    """In a thread of its own, which does not keep the process alive: a tool that hangs would hold up its end."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[_Ended] = loop.create_future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            end = _Ended(context.run(lambda: tool.function(**keywords)), None)
        except BaseException as error:  # noqa: BLE001 - whatever it is, somebody waits for it
            end = _Ended(None, error)
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_deliver, ended, end)

    threading.Thread(target=work, name=f"openline-tool-{tool.name}", daemon=True).start()
    end = await ended
    if end.error is not None:
        raise end.error
    return end.value


def _deliver(ended: asyncio.Future[_Ended], end: _Ended) -> None:
    if not ended.done():  # it was out of time, or cancelled
        ended.set_result(end)


def _is_cancelled() -> bool:
    """Whether the cancellation is ours, and not one that a tool raised."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
