"""Turns that can be read again: whose, how long, and how many."""

from __future__ import annotations

import asyncio

import pytest

from openline.protocol.errors import ProtocolError
from openline.turns.log import Window
from server.hand import Hand
from turns.in_background import begun, ended, registry_of, request

EMPTY = "<Held turns=0 ended=0 bytes=0>"


@pytest.fixture
def hand():
    return Hand()


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - that is what it is for
            await asyncio.sleep(0.001)


async def test_a_turn_is_held_from_the_moment_that_its_client_can_know_it(hand):
    """Not before its request was bound and kept: until then it may still be refused."""
    registry = registry_of(hand)
    turn = registry.start(request(), Window(1_000_000))
    assert registry.held.get("local", turn.id) is None
    engine = await hand.next_turn()
    assert registry.held.get("local", turn.id) is turn
    engine.answer("Hi.")
    await asyncio.wait({turn.task})
    assert registry.held.get("local", turn.id) is turn
    registry.held.close()


async def test_only_its_owner_finds_it(hand):
    """Another owner's id is an unknown id (guarantees, "Isolation")."""
    registry = registry_of(hand)
    turn = await ended(registry, hand, owner="a")
    assert registry.held.get("a", turn.id) is turn
    assert registry.held.get("b", turn.id) is None
    assert not registry.held.forget("b", turn.id)
    assert registry.held.forget("a", turn.id)
    assert registry.held.get("a", turn.id) is None


async def test_a_refused_turn_is_not_held(hand):
    """Nothing of it can be asked for; it counts no more."""
    registry = registry_of(hand)
    for fields in ({"model": None}, {"input": [{"id": "msg_x"}]}):
        turn = registry.start(request(**fields), Window(1_000_000))
        await asyncio.wait({turn.task})
        assert turn.log.refusal is not None
    stopped = registry.start(request(), Window(1_000_000))
    stopped.stop()  # before its first step
    await asyncio.wait({stopped.task})
    assert repr(registry.held) == EMPTY


async def test_what_is_not_in_the_background_is_not_held(hand):
    """Nobody was promised that it can be read again."""
    registry = registry_of(hand)
    await ended(registry, hand, background=None)
    assert repr(registry.held) == EMPTY


async def test_an_ended_turn_goes_after_its_time(hand):
    """`resume.seconds` from its end on, whatever its length; one that runs stays (docs/adr/0007)."""
    registry = registry_of(hand, seconds=0.05)
    running, engine = await begun(registry, hand)
    turn = await ended(registry, hand)
    assert registry.held.get("local", turn.id) is turn
    await until(lambda: registry.held.get("local", turn.id) is None)
    assert registry.held.get("local", running.id) is running
    engine.answer("Hi.")
    await asyncio.wait({running.task})
    assert registry.held.get("local", running.id) is running
    await until(lambda: registry.held.get("local", running.id) is None)
    assert repr(registry.held) == EMPTY


async def test_the_oldest_end_goes_first(hand):
    """Not the one that was begun first: the one that ended first (docs/adr/0007)."""
    registry = registry_of(hand, bytes_max=60_000)
    early, engine = await begun(registry, hand)
    first = await ended(registry, hand, "x" * 4000)
    engine.answer("y" * 4000)
    await asyncio.wait({early.task})
    third = await ended(registry, hand, "z" * 4000)
    found = [registry.held.get("local", turn.id) is not None for turn in (first, early, third)]
    assert found == [False, True, True]
    registry.held.close()


async def test_what_was_asked_counts_too(hand):
    """A long input is held as long as its events are, so both have one bound (guarantees, "Bounds")."""
    registry = registry_of(hand, bytes_max=100_000)
    turns = [await ended(registry, hand, input="x" * 20_000) for _ in range(10)]
    held = [turn for turn in turns if registry.held.get("local", turn.id) is not None]
    assert 1 <= len(held) <= 2  # as it came, and as an item
    assert sum(turn.bytes for turn in held) <= 100_000
    registry.held.close()
    assert repr(registry.held) == EMPTY


async def test_the_latest_stays_however_large_it_is(hand):
    """Else a long response could never be read after its end; the next one takes its place (docs/adr/0007)."""
    registry = registry_of(hand, bytes_max=100)
    first = await ended(registry, hand)
    assert registry.held.get("local", first.id) is first
    second = await ended(registry, hand)
    assert registry.held.get("local", first.id) is None
    assert registry.held.get("local", second.id) is second
    registry.held.close()


async def test_the_sum_is_exact(hand):
    """Whatever ends, goes, is forgotten or is read meanwhile, the bytes are those of what is held."""
    registry = registry_of(hand, bytes_max=60_000)
    turns = []
    for number in range(12):
        turn = await ended(registry, hand, "x" * 700 * number, input="y" * 500 * number)
        with turn.log.observe(-1 if turn.log.is_whole else None) as reader:
            await reader.read()
        turns.append(turn)
        if number % 3 == 0:
            registry.held.forget("local", turn.id)
        held = [each for each in turns if registry.held.get("local", each.id) is not None]
        total = sum(each.bytes for each in held)
        assert repr(registry.held) == f"<Held turns={len(held)} ended={len(held)} bytes={total}>"
    registry.held.close()
    assert repr(registry.held) == EMPTY


async def test_one_that_runs_is_not_forgotten(hand):
    """It has to be stopped first, so that its end is kept."""
    registry = registry_of(hand)
    turn, engine = await begun(registry, hand)
    assert not registry.held.forget("local", turn.id)
    assert registry.held.get("local", turn.id) is turn
    engine.answer("Hi.")
    await asyncio.wait({turn.task})
    assert registry.held.forget("local", turn.id)
    assert not registry.held.forget("local", turn.id)


async def test_those_that_run_are_counted_from_their_start_on(hand):
    """Also what may still be refused takes one of `background_active_max` places (guarantees, "Bounds")."""
    registry = registry_of(hand, background_active_max=2)
    for _ in range(2):
        registry.start(request(), Window(1_000_000))
    with pytest.raises(ProtocolError) as raised:
        registry.start(request(), Window(1_000_000))
    assert (raised.value.code, raised.value.headers) == ("server_is_overloaded", {"retry-after": "5"})
    registry.start(request(background=None), Window(1_000_000))
    assert (registry.held.running, len(registry)) == (2, 3)
    await registry.close()
    assert registry.held.running == 0


async def test_closing_lets_go_of_all(hand):
    """Nothing waits any more; what ran was stopped and told so."""
    registry = registry_of(hand)
    await ended(registry, hand)
    turn, engine = await begun(registry, hand)
    await registry.close()
    assert engine.closed.is_set()
    assert turn.log.response["status"] == "cancelled"
    assert repr(registry.held) == EMPTY
