"""Running a tool: whatever becomes of it is an output, unless the app wants its exceptions."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import Any

import pytest

from openline.client.calling import no_such_tool, run_tool
from openline.client.tool_outputs import ToolOutput
from openline.client.tools import as_tool, tool

WHO = contextvars.ContextVar("WHO", default="nobody")


async def ran(
    function: Any, *, seconds_max: float = 30.0, output_bytes_max: int = 1000, on_error: Any = "output"
) -> ToolOutput:
    return await run_tool(
        as_tool(function), {}, seconds_max=seconds_max, output_bytes_max=output_bytes_max, on_error=on_error
    )


async def test_a_function_runs_in_a_thread_and_a_coroutine_here():
    """A function may block; both see the caller's context."""

    def blocking() -> list[Any]:
        return [threading.current_thread() is threading.main_thread(), WHO.get()]

    async def waiting() -> list[Any]:
        return [threading.current_thread() is threading.main_thread(), WHO.get()]

    WHO.set("me")
    assert await ran(blocking) == ToolOutput('[false,"me"]')
    assert await ran(waiting) == ToolOutput('[true,"me"]')


async def test_a_function_that_gives_a_coroutine_is_awaited():
    """As a lambda around one does."""

    async def answer() -> str:
        return "here"

    def look() -> Any:
        return answer()

    assert await ran(look) == ToolOutput("here")


@pytest.mark.parametrize(
    "raised", [ValueError("no such file"), StopIteration("x"), SystemExit(3), asyncio.CancelledError()]
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_an_exception_is_an_error_for_the_model(raised: BaseException, is_async: bool):
    """Its class and text, without a traceback; also those that would end a process or a task."""

    def fail() -> None:
        raise raised

    async def fail_later() -> None:
        await asyncio.sleep(0)
        fail()

    output = await ran(fail_later if is_async else fail)
    name = "RuntimeError" if isinstance(raised, StopIteration) else type(raised).__name__  # PEP 479
    assert output.is_error
    assert str(output.content).startswith(f"Error: {name}: ")
    assert "Traceback" not in str(output.content)


@pytest.mark.parametrize("is_async", [False, True])
async def test_the_app_may_have_the_exceptions_instead(is_async: bool):
    """The very exception."""
    error = LookupError("mine")

    def fail() -> None:
        raise error

    async def fail_later() -> None:
        raise error

    with pytest.raises(LookupError) as raised:
        await ran(fail_later if is_async else fail, on_error="raise")
    assert raised.value is error


async def test_what_cannot_be_json_is_an_error():
    """The model is told what the tool returned."""

    def look() -> object:
        return object()

    output = await ran(look)
    assert output.is_error
    assert "object" in str(output.content)


async def test_an_output_is_cut_at_its_bound():
    """At the bound it is whole."""

    def read() -> str:
        return "x" * 1001

    assert str((await ran(read)).content).endswith("[cut: the first 1000 of 1001 bytes]")
    assert await ran(read, output_bytes_max=1001) == ToolOutput("x" * 1001)


async def test_a_coroutine_out_of_time_is_cancelled():
    """The model is told that it may be half done."""
    cancelled = asyncio.Event()

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    output = await ran(hang, seconds_max=0.01)
    assert output.is_error
    assert output.content == "Error: no result within 0.01 seconds; what it began may be half done, or still go on."
    assert cancelled.is_set()


async def test_a_thread_out_of_time_is_left_to_itself():
    """It cannot be stopped; what it returns later is dropped, and it does not hold up the process's end."""
    go_on, threads = threading.Event(), []

    def hang() -> str:
        threads.append(threading.current_thread())
        go_on.wait(30)
        return "too late"

    assert (await ran(hang, seconds_max=0.01)).is_error
    (thread,) = threads
    assert thread.daemon
    go_on.set()
    await asyncio.to_thread(thread.join)
    await asyncio.sleep(0)  # its result is delivered to nobody


async def test_a_tools_own_time_limit_goes_before():
    """`@tool(timeout_seconds=…)`."""

    @tool(timeout_seconds=0.01)
    async def hang() -> None:
        await asyncio.Event().wait()

    assert "within 0.01 seconds" in str((await ran(hang, seconds_max=60)).content)


async def test_a_timeout_of_the_tools_own_is_an_exception_like_others():
    """It is not taken for ours."""

    async def ask() -> None:
        raise TimeoutError("the database did not answer")

    assert (await ran(ask)).content == "Error: TimeoutError: the database did not answer"


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_cancelled_run_is_cancelled(is_async: bool):
    """No output is made of it, whatever the app wants of exceptions."""
    started, go_on = threading.Event(), threading.Event()

    def hang() -> None:
        started.set()
        go_on.wait(30)

    async def hang_here() -> None:
        started.set()
        await asyncio.Event().wait()

    running = asyncio.ensure_future(ran(hang_here if is_async else hang))
    await asyncio.to_thread(started.wait)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    go_on.set()


def test_a_tool_that_is_not_there_is_named_with_those_that_are():
    """A bounded list."""
    assert no_such_tool("x", ["a", "b"]).content == "Error: there is no tool 'x'. The tools are: a, b."
    assert no_such_tool("x", []).content == "Error: there is no tool 'x'. The tools are: none."
    assert str(no_such_tool("x", [f"tool_{n}" for n in range(99)]).content).endswith("tool_19, ….")
