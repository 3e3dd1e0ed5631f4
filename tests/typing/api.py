"""The public API under the type checker: nothing here runs; `make check` reads it.

What an app writes has to be typed without a cast, and what it must not write has to be an error.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage

import openline
from openline import (
    RUN,
    STOP,
    ClientSettings,
    ConnectionLost,
    History,
    Ledger,
    OpenlineError,
    Output,
    Refused,
    ResponseStream,
    RunResult,
    Session,
    SyncResponseStream,
    SyncSession,
    ToolCall,
    ToolOutcomeUnknown,
    TurnFailed,
)


async def sessions() -> None:
    """One conversation, with every argument."""
    settings = ClientSettings(on_lost="restart", tries_max=3, idle_seconds_max=60.0)
    session = openline.connect(
        "http://127.0.0.1:8484/v1",
        api_key="local",
        model="m",
        transport="websocket",
        session_id="sess_mine",
        history=History(),
        settings=settings,
        headers={"openai-organization": "org"},
    )
    assert_type(session, Session)
    async with session as entered:
        assert_type(entered, Session)
        assert_type(entered.id, str)
        assert_type(entered.history, History)
        assert_type(entered.has_extensions, bool | None)
    openline.connect("http://127.0.0.1:8484/v1", transport="carrier pigeon")  # pyright: ignore[reportArgumentType]


async def streams(session: Session, call: ResponseFunctionToolCall, message: ResponseOutputMessage) -> None:
    """Text, dicts and the SDK's objects go in; dicts come out."""
    stream = session.create(input="Hello.", tools=[{"type": "web_search"}], store=False, temperature=0)
    assert_type(stream, ResponseStream)
    assert_type(stream.idempotency_key, str)
    async for event in stream:
        assert_type(event, dict[str, Any])
    events: AsyncIterator[dict[str, Any]] = stream
    assert_type(await anext(events), dict[str, Any])
    assert_type(await stream.response(), dict[str, Any])
    session.create(input=[{"role": "user", "content": "Hello."}, call, message], idempotency_key="mine", resume=True)
    session.create(input="Hello.", on_lost="raise", previous_response_id=None)
    session.create(input="Hello.", on_lost="retry")  # pyright: ignore[reportArgumentType]
    session.create(input=7)  # pyright: ignore[reportArgumentType]
    session.create("Hello.")  # pyright: ignore[reportCallIssue]
    async with session.create(input="Hello.") as entered:
        assert_type(entered, ResponseStream)
        entered.detach()
        await entered.cancel()


def sync() -> None:
    """The same without an event loop, with the same arguments."""
    with openline.connect_sync("http://127.0.0.1:8484/v1", api_key="local") as session:
        assert_type(session, SyncSession)
        stream = session.create(input="Hello.", idempotency_key="mine")
        assert_type(stream, SyncResponseStream)
        for event in stream:
            assert_type(event, dict[str, Any])
        events: Iterator[dict[str, Any]] = stream
        assert_type(next(events), dict[str, Any])
        assert_type(stream.response(), dict[str, Any])
        session.create(input="Hello.", on_lost="retry")  # pyright: ignore[reportArgumentType]
    openline.connect_sync("http://127.0.0.1:8484/v1", transport="carrier pigeon")  # pyright: ignore[reportArgumentType]


async def errors(stream: ResponseStream) -> None:
    """Each has what its handler needs."""
    try:
        await stream.response()
    except Refused as refused:
        assert_type(refused.status, int)
        assert_type(refused.code, str | None)
        assert_type(refused.retry_after, float | None)
    except TurnFailed as failed:
        assert_type(failed.response, dict[str, Any])
    except ConnectionLost as lost:
        assert_type(lost.why, str)
        assert_type(lost.may_have_run, bool)
    except ToolOutcomeUnknown as unknown:
        assert_type(unknown.call, dict[str, Any])
    except OpenlineError:
        pass


@openline.tool
def plain(a: int) -> str:
    """A tool."""
    return str(a)


@openline.tool(idempotent=True, timeout_seconds=3.0, name="other", description="Another.")
async def noted(a: int, call: ToolCall) -> dict[str, str]:
    """A tool that says more."""
    return {"key": call.key, "name": call.name, "session": call.session_id}


async def agents(session: Session, ledger: Ledger, blocking: SyncSession) -> None:
    """The loop, with every argument; tools stay the functions that they are."""
    assert_type(plain(1), str)

    def look(call: ToolCall) -> Output | openline.Unknown:
        return Output(3) if call.arguments else RUN

    async def ask(call: ToolCall) -> openline.Unknown:
        return STOP if call.turn else RUN

    result = await openline.run_tools(
        session,
        input="Go.",
        tools=[plain, noted, {"type": "web_search"}],
        ledger=ledger,
        on_unknown=look,
        on_progress=print,
        on_tool_error="raise",
        on_lost="raise",
        parallel=False,
        parallel_max=1,
        tool_seconds_max=1.0,
        calls_max=1,
        turns_max=1,
        output_bytes_max=1,
        instructions="Be exact.",
    )
    assert_type(result, RunResult)
    assert_type(result.text, str)
    assert_type(result.usage, dict[str, int])
    assert_type(result.response, dict[str, Any])
    await openline.run_tools(session, tools=[plain], ledger=ledger, resume="sess_x", on_unknown=ask)
    assert_type(blocking.run_tools(input="Go.", tools=[plain]), RunResult)
    with Ledger("ledger.db") as opened:
        assert_type(opened, Ledger)
        opened.delete("sess_x")
    await openline.run_tools(session, input="Go.", tools=[1])  # pyright: ignore[reportArgumentType]
    await openline.run_tools(session, input="Go.", tools=[plain], on_unknown=3)  # pyright: ignore[reportArgumentType]
