"""Idempotency keys: one turn for one key, however often and over whatever connection its create comes.

Source: docs/adr/0009; guarantees, "Idempotent turns".
"""

from __future__ import annotations

import asyncio

import pytest

from openline.protocol.deltas import TextDelta
from server.running import Running, until

KEY = "key-1"
OTHERS = [f"other-{number}" for number in range(3)]


async def keyed(server: Running, transport: str, **fields):
    """A create with a key over a transport: its final response, or its error."""
    fields = {"idempotency_key": KEY, **fields}
    if transport == "websocket":
        async with server.connect() as socket:
            last = (await socket.turn(**fields))[-1]
        return last.get("response") or last["error"]
    answer = await server.post(**fields, stream=transport == "sse")
    if answer.status != 200:
        return answer.json["error"]
    return answer.json if transport == "json" else answer.events[-1]["response"]


TRANSPORTS = ["websocket", "sse", "json"]
over = pytest.mark.parametrize("transport", TRANSPORTS)
stored = pytest.mark.parametrize("stores", [True, False], ids=["stored", "unstored"])


@over
@stored
async def test_the_same_key_and_body_is_the_same_response(played, hand, transport, stores):
    """A finished turn is given again, over every transport, and generated once."""
    asked = asyncio.ensure_future(keyed(played, transport, store=stores))
    (await hand.next_turn()).answer("Once.")
    first = await asked
    assert first["status"] == "completed", first
    for again in TRANSPORTS:
        assert await keyed(played, again, store=stores) == first
    assert hand.is_idle


@over
async def test_a_second_create_reads_the_turn_that_runs(played, hand, transport):
    """The same key and body while the turn runs is one more reader of it, from its first event on."""
    asked = [asyncio.ensure_future(keyed(played, each)) for each in (transport, *TRANSPORTS)]
    turn = await hand.next_turn()
    turn.give(TextDelta("One "))
    log = played.registry.held.of_key("local", KEY).log
    await until(lambda: f"readers={len(asked)}" in repr(log))
    turn.answer("two.")
    first, *rest = await asyncio.gather(*asked)
    assert first["output"][0]["content"][0]["text"] == "One two."
    assert rest == [first] * len(rest)
    assert hand.is_idle
