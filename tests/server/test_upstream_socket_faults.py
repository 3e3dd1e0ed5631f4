"""Faults of an upstream that is spoken to over a socket: one end for each turn here too.

Source: guarantees, "Upstream faults" and "Upstream errors"; docs/adr/0016.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from typing import Any

import msgspec
import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from engines.faults import CANARY, KEY, LIMITED, RESPONSES, STREAMS, WORDS
from openline.config import UpstreamSettings
from openline.engines.opening import open_router
from openline.protocol.errors import ERRORS
from protocol.spoiled import ODD, Change, changed
from server.faulty import CLIENT_KEY, End, end_of, next_turn
from server.running import Running, running, until

Script = Callable[[ServerConnection], Awaitable[None]]
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
ADDED, TOKEN = RESPONSES[:3], RESPONSES[3]
CREATED = {"type": "response.created", "response": {"id": "resp_up", "status": "in_progress"}}
BOUNDS = {"first_event_seconds_max": 1.0, "idle_seconds_max": 1.0, "answer_bytes_max": 128 * 1024}
CODES = {kind.wire_code for kind in ERRORS.values()} - {ERRORS["internal_error"].wire_code}


def numbered(*events: Any) -> list[str]:
    """Events as text messages, in the order in which they are numbered."""
    decoded = (msgspec.json.decode(event) if isinstance(event, bytes) else event for event in events)
    return [json.dumps({**event, "sequence_number": number}) for number, event in enumerate(decoded)]


def says(*messages: str | bytes) -> Script:
    async def script(line: ServerConnection) -> None:
        for message in messages:
            await line.send(message)

    return script


def closes(code: int, *messages: str) -> Script:
    async def script(line: ServerConnection) -> None:
        await says(*messages)(line)
        await line.close(code, CANARY)

    return script


def cuts(*messages: str) -> Script:
    async def script(line: ServerConnection) -> None:
        await says(*messages)(line)
        line.transport.abort()

    return script


async def goes_on(line: ServerConnection) -> None:
    """An answer without end."""
    await says(*numbered(*ADDED))(line)
    for number in count(len(ADDED)):
        await line.send(json.dumps({**msgspec.json.decode(TOKEN), "sequence_number": number}))


GOOD = numbered(*RESPONSES)
ERROR = {"type": "error", "status": 429, "error": LIMITED, "headers": {"retry-after": "30"}}
# What it does, and the code in which the turn ends.
FAULTS: dict[str, tuple[Script, str | None]] = {
    "good": (says(*GOOD), None),
    "silent": (says(), "upstream_error"),
    "silent between tokens": (says(*numbered(*ADDED, TOKEN)), "upstream_error"),
    "no JSON": (says("{" + WORDS.decode()), "upstream_error"),
    "no text": (says(b"\0"), "upstream_error"),
    "no object": (says("[1]"), "upstream_error"),
    "limited": (says(json.dumps(ERROR)), "rate_limit_exceeded"),
    "fails": (
        says(*numbered(CREATED, {"type": "response.failed", "response": {"id": "resp_up", "error": LIMITED}})),
        "rate_limit_exceeded",
    ),
    "without end": (goes_on, "upstream_error"),
    "ends twice": (says(*GOOD, GOOD[-1]), None),
    "goes on behind the end": (says(*GOOD, *GOOD[3:5], json.dumps(ERROR)), None),
    **{f"closes behind {number}": (closes(1011, *GOOD[:number]), "upstream_error") for number in range(len(GOOD))},
    **{f"cuts behind {number}": (cuts(*GOOD[:number]), "upstream_error") for number in range(len(GOOD))},
    **{
        name: (says(*numbered(CREATED, *events)), code)
        for name, (events, code) in STREAMS.items()
        if name not in {"no-type", "nested-deeply"}  # over a socket both are told as a broken line
    },
}


class Scene:
    """A server in front of an upstream that plays what the input asks for."""

    def __init__(self, server: Running) -> None:
        self.server = server

    async def turn(self, name: str, line: Any) -> End:
        create = {"model": "m", "store": False, "tools": [TOOL], "input": f"fault={name};"}
        async with asyncio.timeout(30):
            return end_of(await next_turn(line, create))


@asynccontextmanager
async def scene(folder: Any, script: Callable[[str], Script]) -> AsyncIterator[Scene]:
    """With a key, so that clients are strangers.

    Args:
        script: what the upstream does, by the name of the fault that a create asks for.
    """

    async def handle(line: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            async for message in line:
                if json.loads(message)["type"] == "response.create":
                    await script(re.findall(r"fault=([^;]*);", str(message))[-1])(line)

    async with serve(handle, "127.0.0.1", 0, max_size=None) as upstream:
        url = f"http://127.0.0.1:{upstream.sockets[0].getsockname()[1]}/v1"
        router = open_router([UpstreamSettings(kind="responses+ws", url=url, **BOUNDS)], show_detail=False)
        async with running(folder, engine=router, keys={CLIENT_KEY: "team"}) as server:
            yield Scene(server)


@pytest.fixture(autouse=True)
def _upstream_key(monkeypatch):
    monkeypatch.setenv("OPENLINE_UPSTREAM_API_KEY", KEY)


async def test_every_fault_ends_its_turn_once(tmp_path, caplog):
    """With its code and without the upstream's words; then a good turn on the same connection, and nothing is left."""
    wrong: dict[str, Any] = {}
    before = len(asyncio.all_tasks())
    async with scene(tmp_path, lambda name: FAULTS[name][0]) as at:
        left = iter(FAULTS.items())

        async def work() -> None:
            for name, (_, code) in left:
                async with at.server.connect(key=CLIENT_KEY) as line:
                    end, good = await at.turn(name, line), await at.turn("good", line)
                if end.code != code or good.code is not None or CANARY in end.text or KEY in end.text:
                    wrong[name] = end.code, end.message, good.message

        await asyncio.gather(*(work() for _ in range(8)))
    assert wrong == {}
    await until(lambda: len(asyncio.all_tasks()) == before)
    assert KEY not in caplog.text


@pytest.mark.parametrize("turns", [100, pytest.param(3000, marks=pytest.mark.long)])
async def test_whatever_events_come_the_turn_ends_once(tmp_path, turns):
    """Each is JSON and has its number; fields are missing or of any type, events are lost, doubled, or moved."""
    seed = random.randrange(1 << 32)
    choose = random.Random(seed)
    plays = {
        str(number): says(*numbered(*changed([msgspec.json.decode(event) for event in RESPONSES], _changes(choose))))
        for number in range(turns)
    }
    ends: list[str | None] = []
    async with scene(tmp_path, plays.__getitem__) as at:
        left = iter(plays)

        async def work() -> None:
            for name in left:
                async with at.server.connect(key=CLIENT_KEY) as line:
                    ends.append((await at.turn(name, line)).code)

        await asyncio.gather(*(work() for _ in range(6)))
    assert set(ends) <= {None, *CODES}, f"seed {seed}"
    assert None in ends


def _changes(choose: random.Random) -> list[Change]:
    return [
        (
            choose.choice(["double", "swap", "lose", "spoil", "spoil"]),
            choose.random(),
            choose.random(),
            choose.choice(ODD),
        )
        for _ in range(choose.randrange(3))
    ]
