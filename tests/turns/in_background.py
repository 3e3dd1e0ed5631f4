"""A registry on an engine in the test's hand, and turns that run there in the background or under a key."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import msgspec

from openline.config import ResumeSettings, UpstreamSettings
from openline.engines.router import Router, Upstream
from openline.observe import LogHook
from openline.protocol.events import HttpCreate
from openline.state.nothing import NothingStore
from openline.state.sealing import Seal
from openline.state.store import Store
from openline.turns.bind import Parts, TurnRequest
from openline.turns.log import Window
from openline.turns.registry import Registry
from openline.turns.turn import Place, Turn
from server.hand import Hand, HandTurn

NOW = 1_800_000_000
_numbers = itertools.count(1)  # of ids, over all registries: two processes never make the same one


class Clock:
    """The wall clock, which the test moves."""

    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


def registry_of(hand: Hand, store: Store | None = None, clock: Clock | None = None, **resume: Any) -> Registry:
    """A registry; `resume` as in the configuration."""
    return Registry(
        Parts(
            router=Router([Upstream(UpstreamSettings(kind="scripted"), hand)]),
            store=store or NothingStore(),
            hook=LogHook(),
            unix_time=clock or Clock(),
            new_id=lambda prefix: f"{prefix}_{next(_numbers):048x}",
            created_wait_seconds_max=30,
            keepalive_seconds=30,
            resume=ResumeSettings(**resume),
            seal=Seal(bytes(32)),
        )
    )


def request(owner: str = "local", **fields: Any) -> TurnRequest:
    """A create of a streamed background response."""
    create = HttpCreate(**{"model": "m", "input": "Hello.", "background": True, "stream": True, **fields})
    body = msgspec.json.encode(create)
    return TurnRequest(owner=owner, create=create, body=body, request_id="req_1", transport="sse")


def keyed(key: str = "k", *, owner: str = "local", place: Place | None = None, **fields: Any) -> TurnRequest:
    """A create with an idempotency key, as a socket, a stream or a plain request brings it."""
    transport = fields.pop("transport", "sse")
    create = HttpCreate(**{"model": "m", "input": "Hello.", "idempotency_key": key, **fields})
    cache, stream_id = place or (None, None)
    return TurnRequest(
        owner=owner,
        create=create,
        body=msgspec.json.encode(create),
        request_id="req_1",
        transport="websocket" if place is not None else transport,
        cache=cache,
        stream_id=stream_id,
    )


async def begun(registry: Registry, hand: Hand, **fields: Any) -> tuple[Turn, HandTurn]:
    """A turn that runs."""
    turn = registry.start(request(**fields), Window(1_000_000))
    return turn, await hand.next_turn()


async def ended(registry: Registry, hand: Hand, said: str = "Hi.", **fields: Any) -> Turn:
    """A turn that has ended, and that the registry knows to have."""
    turn, engine = await begun(registry, hand, **fields)
    engine.answer(said)
    await asyncio.wait({turn.task})
    return turn
