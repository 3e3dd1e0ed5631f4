"""Clients of responses that run in the background: they start them, look at them, follow them and stop them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from openline.protocol.deltas import TextDelta
from openline.turns.log import TurnLog
from server.hand import Hand, HandTurn
from server.running import WAIT_SECONDS_MAX, Answer, Running, read_sse, until

Event = dict[str, Any]


class Stream:
    """An event stream that is read one event at a time."""

    def __init__(self, answer: aiohttp.ClientResponse) -> None:
        self._answer = answer
        self.status = answer.status

    async def event(self) -> Event | None:
        """The next event; None at the end, which must be `[DONE]`."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            head = await self._answer.content.readline()
            if head == b"data: [DONE]\n":
                assert await self._answer.content.read() == b"\n"
                return None
            data = await self._answer.content.readline()
            assert await self._answer.content.readline() == b"\n", (head, data)
        event = json.loads(data.removeprefix(b"data: "))
        assert head == f"event: {event['type']}\n".encode()
        return event

    async def until(self, event_type: str) -> list[Event]:
        """Every event up to the first of a type."""
        events: list[Event] = []
        while not events or events[-1]["type"] != event_type:
            event = await self.event()
            assert event is not None, [each["type"] for each in events]
            events.append(event)
        return events

    async def rest(self) -> list[Event]:
        """Every event up to the end."""
        return [event async for event in self]

    async def __aiter__(self) -> AsyncIterator[Event]:
        while (event := await self.event()) is not None:
            yield event


async def begin(server: Running, **fields: Any) -> Event:
    """A background response as its create is answered, polled and not streamed unless `fields` says so."""
    answer = await server.post(**{"background": True, **fields})
    assert answer.status == 200, answer.body
    return answer.json


@asynccontextmanager
async def begin_stream(server: Running, **fields: Any) -> AsyncIterator[Stream]:
    """A background response whose create is answered by its events; `key` is sent as a bearer token."""
    key = fields.pop("key", None)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": "scripted-text", "input": "Hello.", "background": True, "stream": True, **fields}
    async with server.http.post(f"{server.url}/v1/responses", json=body, headers=headers) as answer:
        assert answer.status == 200, await answer.read()
        yield Stream(answer)


async def begin_streamed(server: Running, hand: Hand, *texts: str, **fields: Any) -> tuple[str, HandTurn]:
    """A streamed background response that has said this and goes on, and whose creator has gone."""
    async with begin_stream(server, **fields) as stream:
        created = await stream.event()
        assert created is not None
        turn = await hand.next_turn()
        turn.give(*map(TextDelta, texts))
        for _ in texts:
            await stream.until("response.output_text.delta")
    response_id = created["response"]["id"]
    await readers(server, response_id, 0)
    return response_id, turn


def log_of(server: Running, response_id: str) -> TurnLog:
    """The log of a response that is held."""
    return server.registry.held._turns[response_id].log


async def readers(server: Running, response_id: str, count: int) -> None:
    """Wait until so many read a response's log."""
    log = log_of(server, response_id)
    await until(lambda: f"readers={count}" in repr(log))


def path_of(response_id: str, after: int | None = None, *, stream: bool = False) -> str:
    """Where a response is asked for."""
    query = {"stream": "true"} if stream else {}
    if after is not None:
        query["starting_after"] = str(after)
    return f"/v1/responses/{response_id}?{'&'.join(f'{name}={value}' for name, value in query.items())}".rstrip("?")


async def retrieve(server: Running, response_id: str, **options: Any) -> Event:
    """A response as it stands."""
    answer = await server.get(path_of(response_id), **options)
    assert answer.status == 200, answer.body
    return answer.json


async def ended(server: Running, response_id: str, **options: Any) -> Event:
    """A response once it has ended: polled, as clients do."""
    while True:
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            response = await retrieve(server, response_id, **options)
            if response["status"] not in {"queued", "in_progress"}:
                return response
            await asyncio.sleep(0.001)


async def replay(server: Running, response_id: str, after: int | None = None) -> Answer:
    """The events behind a number, up to the end."""
    return await server.get(path_of(response_id, after, stream=True))


@asynccontextmanager
async def follow(server: Running, response_id: str, after: int | None = None) -> AsyncIterator[Stream]:
    """The events behind a number, as they come."""
    async with server.http.get(server.url + path_of(response_id, after, stream=True)) as answer:
        assert answer.status == 200, await answer.read()
        yield Stream(answer)


async def cancel(server: Running, response_id: str, **options: Any) -> Answer:
    """Ask for a response's end."""
    return await server.request("POST", f"/v1/responses/{response_id}/cancel", **options)


async def delete(server: Running, response_id: str, **options: Any) -> Answer:
    """Have a response forgotten."""
    return await server.request("DELETE", f"/v1/responses/{response_id}", **options)


def text_of(response: Event) -> str:
    """All that a response says."""
    return "".join(part["text"] for item in response["output"] for part in item["content"])


def events_of(answer: Answer) -> list[Event]:
    """The events of a whole stream."""
    assert answer.status == 200, answer.body
    return read_sse(answer.body)
