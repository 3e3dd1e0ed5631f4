"""Which turns fit into one context at once."""

import asyncio
from contextlib import suppress

import pytest

from openline.engines.room import Room
from openline.protocol.errors import ProtocolError

TOKENS = 800  # so that 100 are kept for each answer


def prompt(tokens, counted=None):
    async def count():
        if counted is not None:
            counted.append(tokens)
        return tokens

    return count


async def uncountable():
    raise ProtocolError("upstream_refused", "No.")


class Turn:
    """One that holds its place until it is told to end."""

    def __init__(self, room, count):
        self._end = asyncio.Event()
        self.runs = False
        self.task = asyncio.create_task(self._hold(room, count))

    async def _hold(self, room, count):
        async with room.hold(count):
            self.runs = True
            await self._end.wait()

    async def end(self):
        self._end.set()
        await self.task


async def started(room, *counts):
    """These turns, in this order, each as far as it comes."""
    turns = [Turn(room, count) for count in counts]
    await settled()
    return turns


async def settled():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_turns_that_fit_run_at_once():
    """Up to the last token, with what their answers may take."""
    one, two = await started(Room(TOKENS), prompt(300), prompt(300))
    assert (one.runs, two.runs) == (True, True)
    await one.end()
    await two.end()


async def test_a_turn_waits_for_room():
    """One token more than there is, and it runs when the other has ended."""
    one, two = await started(Room(TOKENS), prompt(300), prompt(301))
    assert (one.runs, two.runs) == (True, False)
    await one.end()
    await settled()
    assert two.runs
    await two.end()


async def test_nobody_overtakes():
    """A short turn behind a long one waits too; else the long one might never run."""
    one, two, three = await started(Room(TOKENS), prompt(300), prompt(500), prompt(10))
    assert (one.runs, two.runs, three.runs) == (True, False, False)
    await one.end()
    await settled()
    assert (two.runs, three.runs) == (True, True)
    await two.end()
    await three.end()


async def test_a_turn_alone_is_not_counted():
    """What costs time is asked for only when it decides something, and once."""
    counted = []
    room = Room(TOKENS)
    (one,) = await started(room, prompt(100, counted))
    assert counted == []
    two, three = await started(room, prompt(101, counted), prompt(102, counted))
    assert counted == [100, 101, 102]
    for turn in (one, two, three):
        await turn.end()


@pytest.mark.parametrize("count", [prompt(TOKENS * 2), uncountable])
async def test_a_turn_that_never_fits_runs_alone(count):
    """Its own error says what is wrong with it."""
    room = Room(TOKENS)
    (one,) = await started(room, count)
    assert one.runs
    await one.end()


async def test_a_turn_that_is_cancelled_while_it_waits_holds_up_nobody():
    """Its client has gone."""
    one, two, three = await started(Room(TOKENS), prompt(300), prompt(500), prompt(300))
    two.task.cancel()
    with suppress(asyncio.CancelledError):
        await two.task
    await settled()
    assert (two.runs, three.runs) == (False, True)
    await one.end()
    await three.end()


@pytest.mark.parametrize(("others", "code"), [([prompt(100)], "server_is_overloaded"), ([], "context_length_exceeded")])
async def test_who_is_at_fault_decides_the_code(others, code):
    """A client compacts a conversation that is too long; one that the others crowd out may be tried again."""
    room = Room(TOKENS)
    turns = await started(room, *others)
    with pytest.raises(ProtocolError) as failed:
        async with room.hold(prompt(100)):
            raise ProtocolError("context_length_exceeded", "Context size has been exceeded.")
    assert failed.value.code == code
    assert ("context_tokens" in failed.value.message) is bool(others)
    for turn in turns:
        await turn.end()
