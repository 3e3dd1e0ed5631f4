"""What nobody uses any more is deleted, and nothing else: under a clock that the test sets."""

import asyncio
import logging

import pytest

from openline.state.conversation import find_anchor
from openline.state.retention import DAY_SECONDS, mark_used, purged, retain
from openline.state.sealing import Seal
from openline.state.sqlite import SqliteStore
from openline.state.store import StoredTurn, StoreUnavailable
from state.stores import conversation, turn

HOUR_SECONDS = 3600
START = 1_760_000_000


class Clock:
    """A wall clock that goes on only where somebody sleeps, and stops the test when it was slept on long enough."""

    def __init__(self, hours):
        self.now = START
        self.slept = []
        self._hours = hours
        self.at = {}  # what happens after so many hours

    def time(self):
        return float(self.now)

    async def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds
        if len(self.slept) > self._hours:
            raise asyncio.CancelledError
        if len(self.slept) in self.at:
            await self.at[len(self.slept)]()


@pytest.fixture
async def store():
    store = SqliteStore(None)
    yield store
    await store.close()


async def kept(store):
    return {each.response_id async for _, each in store.export()}


async def run(store, clock, retain_days=1):
    with pytest.raises(asyncio.CancelledError):
        await retain(store, retain_days, clock.time, clock.sleep)


async def test_each_turn_goes_in_the_hour_after_its_time(store):
    """It looks at once and then every hour, and deletes what was not used for so many days, and no minute earlier."""
    await store.put("ann", turn("resp_old", at=START - 3 * DAY_SECONDS))
    await store.put("ann", turn("resp_edge", at=START - DAY_SECONDS))
    await store.put("ann", turn("resp_new", at=START))
    clock, seen = Clock(hours=26), {}

    async def look():
        seen[clock.now] = await kept(store)

    clock.at = dict.fromkeys(range(1, 27), look)
    await run(store, clock)
    assert set(clock.slept) == {HOUR_SECONDS}
    assert seen[START + HOUR_SECONDS] == {"resp_edge", "resp_new"}  # after the look at START
    assert seen[START + 2 * HOUR_SECONDS] == {"resp_new"}
    assert seen[START + 25 * HOUR_SECONDS] == {"resp_new"}
    assert seen[START + 26 * HOUR_SECONDS] == set()


async def test_for_ever_deletes_nothing(store):
    """0 days: it does not even begin."""
    await store.put("ann", turn("resp_old", at=0))
    await retain(store, 0, Clock(0).time, Clock(0).sleep)
    assert await kept(store) == {"resp_old"}


async def test_many_go_in_batches(store):
    """More than fit into one batch go in one round, and others write in between."""
    for number in range(450):
        await store.put("ann", turn(f"resp_{number}", at=1))
    assert [count async for count in purged(store, START)] == [100, 100, 100, 100, 50]
    assert await kept(store) == set()


async def test_a_store_that_cannot_be_used_is_tried_again(store, caplog):
    """A fault is one line in the log, and the next hour works."""
    await store.put("ann", turn("resp_old", at=1))
    store._file._writer.execute("PRAGMA query_only = ON")
    clock = Clock(hours=1)

    async def mend():
        store._file._writer.execute("PRAGMA query_only = OFF")

    clock.at = {1: mend}
    with caplog.at_level(logging.INFO, "openline.store"):
        await run(store, clock, retain_days=30)
    assert caplog.messages == [
        "what was not used for 30 days could not be deleted: it is read-only (SQLITE_READONLY)",
        "deleted 1 turns and conversations, not used for 30 days",
    ]


@pytest.mark.parametrize("kept", [turn("kept_1", at=START), conversation("kept_1", at=START)], ids=["turn", "talk"])
async def test_a_use_is_marked_at_most_twice_a_day(store, kept):
    """A mark is a write, and a chain may be continued every second; what was made a moment ago needs none."""
    if isinstance(kept, StoredTurn):
        await store.put("ann", kept)
        get = store.get
    else:
        await store.create_conversation("ann", kept)
        get = store.conversation
    marks = set()
    for minutes in range(2 * 24 * 60):
        await mark_used(store, "ann", await get("ann", "kept_1"), START + 60.5 * minutes)
        marks.add((await get("ann", "kept_1")).last_used_at)
    assert len(marks - {None, START}) in {3, 4}


async def test_a_mark_that_fails_is_no_fault(store):
    """The chain can be read, so its turn goes on (G28)."""
    old = turn("resp_1", at=1)
    await store.put("ann", old)
    store._file._writer.execute("PRAGMA query_only = ON")
    with pytest.raises(StoreUnavailable):
        await store.used("ann", "resp_1", START)
    await mark_used(store, "ann", old, START)
    assert await store.get("ann", "resp_1") == old


async def test_continuing_a_chain_marks_it(store):
    """What is continued lives on, all of it, and what is only fetched does not."""
    old = StoredTurn("resp_0", None, START, "completed", True, b"[]", b'{"output":[],"model":"m"}')
    await store.put("ann", old)
    await store.put("ann", StoredTurn("resp_1", "resp_0", START, "completed", True, b"[]", old.response))
    await store.put("ann", StoredTurn("resp_2", "resp_0", START, "completed", True, b"[]", old.response))
    now = START + 20 * DAY_SECONDS
    await store.get("ann", "resp_2")
    await find_anchor("ann", "resp_1", None, store, Seal(bytes(32)), now=now)
    clock = Clock(hours=0)
    clock.now = START + 31 * DAY_SECONDS
    await run(store, clock, retain_days=30)
    assert await kept(store) == {"resp_0", "resp_1"}
