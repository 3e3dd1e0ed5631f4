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
    ClientSettings,
    ConnectionLost,
    History,
    OpenlineError,
    Refused,
    ResponseStream,
    Session,
    SyncResponseStream,
    SyncSession,
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
