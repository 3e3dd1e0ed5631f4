"""Who owns a turn's task, and that each turn's readers learn its end."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from openline.config import ResumeSettings, UpstreamSettings
from openline.engines.router import Router, Upstream
from openline.protocol.errors import ProtocolError
from openline.protocol.events import Create
from openline.state.nothing import NothingStore
from openline.state.sealing import Seal
from openline.turns.bind import Parts, TurnRequest
from openline.turns.log import Window
from openline.turns.registry import Registry
from server.hand import Hand


class Told:
    """A hook that keeps what it was told."""

    def __init__(self):
        self.turns = []

    def turn_ended(self, details):
        self.turns.append(details)


class Broken(NothingStore):
    """A store with a defect: it raises what no store may raise."""

    async def put(self, owner, turn, **more):
        raise ZeroDivisionError


@pytest.fixture
def hand():
    return Hand()


@pytest.fixture
def told():
    return Told()


async def everything(reader):
    """Read a turn to its end."""
    while await asyncio.wait_for(reader.read(), 5):
        pass


def registry_of(hand, told, store=None):
    router = Router([Upstream(UpstreamSettings(kind="scripted"), hand)])
    return Registry(
        Parts(
            router=router,
            store=store or NothingStore(),
            hook=told,
            unix_time=lambda: 1_800_000_000.0,
            new_id=lambda prefix: f"{prefix}_1",
            created_wait_seconds_max=30,
            keepalive_seconds=30,
            resume=ResumeSettings(),
            seal=Seal(bytes(32)),
        )
    )


def request(**fields):
    create = Create(**{"model": "m", "input": "Hello.", **fields})
    return TurnRequest(
        owner="local", create=create, body=msgspec.json.encode(create), request_id="req_1", transport="websocket"
    )


async def test_a_turn_is_forgotten_once_it_has_ended(hand, told):
    """The registry holds a turn exactly as long as it runs."""
    registry = registry_of(hand, told)
    turn = registry.start(request(), Window(1_000_000))
    assert len(registry) == 1
    with turn.log.deliver() as reader:
        (await hand.next_turn()).answer("Hi.")
        await everything(reader)
    await turn.task
    await asyncio.sleep(0)
    assert len(registry) == 0


async def test_the_hook_is_told_of_every_end_once(hand, told):
    """Completed, failed, refused: one line each, with status, code and count, and no content."""
    registry = registry_of(hand, told)
    for end in ("answer", "fail", "refuse"):
        turn = registry.start(request(input="canary-1"), Window(1_000_000))
        running = await hand.next_turn()
        if end == "answer":
            running.answer("canary-2")
        else:
            if end == "fail":
                running.accept()
            running.refuse()
        await turn.task
    assert [(details.status, details.error_code) for details in told.turns] == [
        ("completed", None),
        ("failed", "rate_limit_exceeded"),
        ("refused", "rate_limit_exceeded"),
    ]
    completed = told.turns[0]
    assert (completed.upstream, completed.model, completed.events) == ("hand", "m", 9)
    assert completed.usage["total_tokens"] == 2
    assert completed.first_event_seconds <= completed.seconds
    assert "canary" not in repr(told.turns)


async def test_a_turn_cancelled_before_its_first_step_ends_for_its_readers(hand, told):
    """A reader of a turn that never ran gets an error, and does not wait for ever."""
    registry = registry_of(hand, told)
    turn = registry.start(request(), Window(1_000_000))
    with turn.log.deliver() as reader:
        turn.stop()
        with pytest.raises(ProtocolError) as raised:
            await asyncio.wait_for(reader.read(), 5)
    assert raised.value.code == "request_cancelled"


async def test_a_defect_while_keeping_ends_the_turn_for_its_readers(hand, told, caplog):
    """Even what must not happen does not leave a client waiting, nor tell it that its response was kept."""
    registry = registry_of(hand, told, Broken())
    turn = registry.start(request(), Window(1_000_000))
    with turn.log.deliver() as reader:
        (await hand.next_turn()).answer("Hi.")
        await everything(reader)
    assert (turn.log.response["status"], turn.log.response["error"]["code"]) == ("failed", "server_error")
    assert "ZeroDivisionError" in caplog.text


async def test_closing_the_registry_ends_every_turn(hand, told):
    """After `close` nothing runs, and each turn's last event says that it was cancelled."""
    registry = registry_of(hand, told)
    turns = [registry.start(request(), Window(1_000_000)) for _ in range(3)]
    for _ in turns:
        (await hand.next_turn()).accept()
    await asyncio.sleep(0)
    await registry.close()
    await registry.close()
    assert len(registry) == 0
    assert [turn.log.response["incomplete_details"] for turn in turns] == [{"reason": "cancelled"}] * 3


async def test_a_response_that_is_being_kept_is_not_cancelled(hand, told):
    """Too late: the store has the last word, so the client's going changes nothing of a finished response."""
    keeping, release = asyncio.Event(), asyncio.Event()

    class Slow(NothingStore):
        async def put(self, owner, turn, **more):
            keeping.set()
            await release.wait()

    registry = registry_of(hand, told, Slow())
    turn = registry.start(request(), Window(1_000_000))
    with turn.log.deliver():
        (await hand.next_turn()).answer("Hi.")
        await asyncio.wait_for(keeping.wait(), 5)
    turn.stop()
    release.set()
    await turn.task
    assert turn.log.response["status"] == "completed"
