"""Idempotency keys of stored turns, over every store, and over the processes that share one.

Each process is a registry, with a store of its own on one database.

Source: docs/adr/0009; guarantees, "Idempotent turns", "Resume" and "Durability".
"""

from __future__ import annotations

import asyncio
import json

import pytest

from openline.protocol.deltas import TextDelta
from openline.protocol.errors import ProtocolError
from openline.state.cache import ConnectionCache
from openline.state.sqlite import SqliteStore
from openline.state.store import Key, StoreUnavailable
from openline.turns.leases import renew, sweep
from openline.turns.log import Window
from openline.turns.turn import Place
from server.hand import Hand
from state.stores import KEEPING
from state.stores import place as made_place
from state.stores import turn as stored_turn
from turns.in_background import NOW, Clock, keyed, registry_of

LEASE = 15

each_kept = pytest.mark.parametrize("place", KEEPING, indirect=True)
shared = pytest.mark.parametrize("place", [kind for kind in KEEPING if kind != "sqlite memory"], indirect=True)


@pytest.fixture
async def place(request, tmp_path):
    """Where a database of this kind is."""
    async with made_place(request.param, tmp_path) as place:
        yield place


class Process:
    """What one process has: a store, an engine, and a registry of its turns."""

    def __init__(self, store, clock, **resume):
        self.store = store
        self.clock = clock
        self.hand = Hand()
        self.registry = registry_of(self.hand, store, clock, **resume)

    def attach(self, request):
        return self.registry.attach(request, Window(1_000_000))

    async def read(self, request):
        """All that a client gets, or its error."""
        attachment = self.attach(request)
        try:
            return await read(attachment)
        except ProtocolError as error:
            return error
        finally:
            attachment.leave()
            await asyncio.wait_for(asyncio.wait({attachment.turn.task}), 10)

    async def finished(self, request, said="Hi."):
        """What the client of a turn that is generated gets."""
        reading = asyncio.ensure_future(self.read(request))
        (await self.hand.next_turn()).answer(said)
        return await reading

    async def running(self, request):
        """A turn that has said something and goes on."""
        attachment = self.attach(request)
        engine = await self.hand.next_turn()
        engine.give(TextDelta("One "))
        await until(lambda: len(attachment.turn.log) >= 5)
        return attachment, engine

    async def of_key(self, key="k"):
        return await self.store.of_key("local", key)

    async def sweep(self):
        return await sweep(self.store, int(self.clock.now))

    def forget(self):
        """Memory only lasts so long."""
        self.registry.held.close()


async def read(attachment):
    events = []
    async with asyncio.timeout(10):
        await attachment.admitted()
        if not attachment.request.streams:
            await attachment.reader.to_the_end()
            return attachment.turn.log.response
        while batch := await attachment.reader.read():
            events += batch
    return events


async def until(condition):
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - that is what it is for
            await asyncio.sleep(0.001)


@pytest.fixture
async def process(place):
    process = Process(place.make(), Clock())
    yield process
    await process.registry.close()


@pytest.fixture
async def processes(place):
    """Two on one database, with one clock."""
    clock = Clock()
    both = Process(place.make(), clock), Process(place.make(), clock, claim_wait_seconds_max=0.3)
    yield both
    for process in both:
        await process.registry.close()


# --- Given again from the store


@each_kept
async def test_the_store_gives_again_what_memory_has_forgotten(process):
    """The same bytes from any place on, over any transport, and no second generation."""
    events = await process.finished(keyed())
    process.forget()
    for after in (None, *range(len(events))):
        assert await process.read(keyed(starting_after=after)) == events[0 if after is None else after + 1 :]
    response = json.loads(events[-1])["response"]
    assert await process.read(keyed(transport="json")) == response
    assert process.hand.is_idle
    assert repr(process.registry.held) == "<Held turns=0 ended=0 bytes=0>"


@shared
async def test_another_process_gives_it_again(processes):
    """Whichever a client comes to, restarted or beside it, while the first one holds it or not."""
    one, other = processes
    events = await one.finished(keyed())
    assert await other.read(keyed()) == events
    assert await other.read(keyed(starting_after=4)) == events[5:]
    assert other.hand.is_idle


@each_kept
@pytest.mark.parametrize("end", ["fails", "is cut short"])
async def test_every_end_is_given_again(process, end):
    """A response that failed after its beginning was seen, one that was cancelled: as it ended (docs/adr/0009)."""
    attachment, engine = await process.running(keyed())
    if end == "fails":
        engine.refuse()
    else:
        attachment.turn.stop()
    events = await read(attachment)
    await asyncio.wait({attachment.turn.task})
    process.forget()
    assert await process.read(keyed()) == events
    status = json.loads(events[-1])["response"]["status"]
    assert (await process.of_key()).turn.status == status == {"fails": "failed"}.get(end, "incomplete")


@each_kept
async def test_another_body_is_refused_from_the_store(process):
    """409, also for who wants only the rest; the kept response stays."""
    await process.finished(keyed())
    process.forget()
    for after in (None, 2):
        error = await process.read(keyed(input="Goodbye.", starting_after=after))
        assert (error.status, error.code) == (409, "idempotency_key_reused")
    assert process.hand.is_idle


@each_kept
async def test_another_owners_stored_key_is_unknown(process):
    """It is free for its own creates, and gives nothing of another owner's (guarantees, "Owners")."""
    await process.finished(keyed(owner="a"), "Mine.")
    process.forget()
    error = await process.read(keyed(owner="b", starting_after=0))
    assert error.code == "resume_window_exceeded"
    assert b"Mine." not in b"".join(await process.finished(keyed(owner="b", input="Other.")))


@each_kept
async def test_who_has_seen_more_than_is_stored_saw_another_turn(process):
    """Never a silent gap (guarantees, "Resume")."""
    events = await process.finished(keyed())
    process.forget()
    error = await process.read(keyed(starting_after=len(events)))
    assert (error.status, error.code) == (409, "resume_window_exceeded")


@each_kept
async def test_a_replay_is_its_lanes_latest(process):
    """Its whole context is there, so the chain goes on on the new connection (docs/adr/0009)."""
    await process.finished(keyed("first", input="One."))
    parent = (await process.of_key("first")).turn.response_id
    await process.finished(keyed(input="Two.", previous_response_id=parent))
    process.forget()
    place = Place(ConnectionCache(), "a")
    await process.read(keyed(place=place, input="Two.", previous_response_id=parent))
    anchor = place.cache.get("local", (await process.of_key()).turn.response_id)
    assert [json.loads(item.raw).get("role") for item in anchor.node.items()] == ["user", "assistant"] * 2


@each_kept
async def test_a_trimmed_stream_is_not_stored_and_not_made_up(place):
    """The response is there for who wants only that; who wants its events is told that they are not kept."""
    process = Process(place.make(), Clock(), bytes_max=3000)
    reading = asyncio.ensure_future(process.read(keyed()))
    engine = await process.hand.next_turn()
    for _ in range(10):
        engine.asked.clear()
        engine.give(TextDelta("x" * 1000))
        await engine.asked.wait()
        for _ in range(5):
            await asyncio.sleep(0)
    engine.finish()
    events = await reading
    process.forget()
    for after in (None, 0, len(events) - 2):
        assert (await process.read(keyed(starting_after=after))).code == "resume_window_exceeded"
    assert await process.read(keyed(transport="json")) == json.loads(events[-1])["response"]
    assert process.hand.is_idle
    await process.registry.close()


@each_kept
async def test_an_unstored_turn_leaves_nothing(process):
    """With `store: false` its key lives in memory alone, and is written nowhere (guarantees, "Zero retention")."""
    await process.finished(keyed(store=False))
    assert await process.of_key() is None
    process.forget()
    assert await process.finished(keyed(store=False)) is not None


@each_kept
async def test_a_deleted_response_frees_its_key(process):
    """It can be asked for anew, with another body too."""
    await process.finished(keyed())
    process.forget()
    await process.store.delete("local", (await process.of_key()).turn.response_id)
    assert len(await process.finished(keyed(input="Goodbye."))) == 9


# --- The claim


@each_kept
async def test_a_turn_is_claimed_before_its_engine_is_asked(process):
    """A row with a lease, and its key: no other process runs it too, and no restart forgets it."""
    attachment, engine = await process.running(keyed(input="Hi?"))
    claim = await process.of_key()
    assert (claim.turn.response_id, claim.body_hash) == (attachment.turn.id, attachment.turn.body_hash)
    assert (claim.turn.status, claim.turn.chainable, claim.turn.lease_until) == ("in_progress", False, NOW + LEASE)
    assert b"Hi?" in claim.turn.input
    process.clock.now += 10
    await renew(process.registry.held, process.store, int(process.clock.now) + LEASE)
    assert (await process.of_key()).turn.lease_until == NOW + 10 + LEASE
    engine.finish()
    await read(attachment)
    row = (await process.of_key()).turn
    assert (row.status, row.lease_until, row.chainable) == ("completed", None, True)


@each_kept
@pytest.mark.parametrize("transport", ["sse", "json"])
async def test_a_refused_turn_leaves_no_claim(process, transport):
    """Its key is free before its client learns of the refusal (docs/adr/0009)."""
    reading = asyncio.ensure_future(process.read(keyed(transport=transport)))
    engine = await process.hand.next_turn()
    assert await process.of_key() is not None
    engine.refuse()
    assert (await reading).code == "rate_limit_exceeded"
    assert await process.of_key() is None
    assert await process.store.unfinished(2 * NOW) == []
    assert len(await process.finished(keyed())) == 9


@shared
async def test_a_turn_that_another_process_runs_is_waited_for(processes):
    """Its events can be read only there until it has ended; then they are given from the store."""
    one, other = processes
    patient = Process(other.store, other.clock)
    attachment, engine = await one.running(keyed())
    reading = asyncio.ensure_future(patient.read(keyed(starting_after=2)))
    await asyncio.sleep(0)
    engine.finish()
    events = await read(attachment)
    assert await reading == events[3:]
    assert patient.hand.is_idle
    await patient.registry.close()


@shared
async def test_a_turn_that_another_process_runs_for_long_is_refused(processes):
    """After `claim_wait_seconds_max`, with a code of its own and when to come again; nothing is generated."""
    one, other = processes
    attachment, engine = await one.running(keyed())
    error = await other.read(keyed())
    assert (error.status, error.code, error.headers) == (409, "idempotency_key_in_use", {"retry-after": "1"})
    assert (await other.read(keyed(input="Other."))).code == "idempotency_key_reused"
    assert other.hand.is_idle
    engine.finish()
    assert await other.read(keyed()) == await read(attachment)


@shared
async def test_a_turn_whose_process_is_gone_runs_again(processes):
    """Once its lease has run out: at the next sweep, or as soon as its client comes; who has seen some of it is told."""
    gone, other = processes
    first, _ = await gone.running(keyed())
    await gone.running(keyed("k2"))
    other.clock.now += LEASE
    assert (await other.read(keyed())).code == "idempotency_key_in_use"
    other.clock.now += 1
    assert (await other.read(keyed(starting_after=2))).code == "resume_window_exceeded"
    assert await other.store.get("local", first.turn.id) is None
    assert len(await other.finished(keyed())) == 9
    assert await other.of_key("k2") is not None
    assert await other.sweep() == 1
    assert await other.of_key("k2") is None
    assert len(await other.finished(keyed("k2"))) == 9


@shared
async def test_in_the_background_the_lost_response_fails_and_its_key_is_free(processes):
    """Its client knows the id and polls it; with the key it can have it run again (docs/adr/0007)."""
    gone, other = processes
    lost, _ = await gone.running(keyed(background=True))
    other.clock.now += LEASE + 1
    assert await other.sweep() == 1
    row = await other.store.get("local", lost.turn.id)
    assert (row.status, json.loads(row.response)["error"]["code"]) == ("failed", "server_error")
    assert await other.of_key() is None
    events = await other.finished(keyed(background=True))
    assert json.loads(events[-1])["response"]["id"] != lost.turn.id


@shared
async def test_a_process_that_was_taken_for_gone_does_not_keep_a_second_one(processes):
    """It was slow, not dead: the key is the other's by then, and its own turn fails for whoever still reads it."""
    slow, other = processes
    attachment, engine = await slow.running(keyed())
    other.clock.now += LEASE + 1
    events = await other.finished(keyed())
    engine.finish()
    last = json.loads((await read(attachment))[-1])
    assert (last["type"], last["response"]["error"]["code"]) == ("response.failed", "server_error")
    assert await slow.store.get("local", attachment.turn.id) is None
    assert json.loads(events[-1])["response"]["id"] == (await slow.of_key()).turn.response_id


@shared
async def test_a_claim_that_is_deleted_elsewhere_stops_its_turn(processes):
    """Any process can delete a response; the one that runs it stops when it renews its leases (docs/adr/0007)."""
    one, other = processes
    attachment, engine = await one.running(keyed())
    await other.store.delete("local", attachment.turn.id)
    await renew(one.registry.held, one.store, NOW + LEASE)
    assert engine.closed.is_set()
    assert await one.store.get("local", attachment.turn.id) is None
    assert len(await one.finished(keyed())) == 9


@shared
async def test_of_two_processes_at_once_one_generates(processes):
    """However close: the store lets one of them claim the key, and the other gives its turn again."""
    one, other = processes
    patient = Process(other.store, other.clock)
    for number in range(4):
        request = keyed(f"k{number}")
        reading = [asyncio.ensure_future(each.read(request)) for each in (one, patient)]
        await until(lambda: not (one.hand.is_idle and patient.hand.is_idle))
        (await (patient if one.hand.is_idle else one).hand.next_turn()).answer("Once.")
        first, second = await asyncio.gather(*reading)
        assert first == second
        assert one.hand.is_idle
        assert patient.hand.is_idle
    await patient.registry.close()


async def test_a_key_that_was_taken_a_moment_ago_is_looked_up_again(tmp_path):
    """Between the look and the claim another process was faster: its turn is given, and this one never ran."""

    class Late(SqliteStore):
        async def of_key(self, owner, key):
            found = await super().of_key(owner, key)
            if found is None:
                digest = attachment.turn.body_hash
                await self.put(owner, stored_turn("resp_other"), events=b'{"a":1}', key=Key(key, digest))
            return found

    store = Late(tmp_path / "late.db")
    process = Process(store, Clock())
    attachment = process.attach(keyed())
    events = await read(attachment)
    end = b'{"type":"response.completed","sequence_number":1,"response":{"id":"resp_other","output":[]}}'
    assert events == [b'{"a":1}', end]
    assert (attachment.turn.response_id, attachment.turn.writer) == ("resp_other", None)
    assert process.hand.is_idle
    await process.registry.close()
    await store.close()


async def test_a_store_that_cannot_say_is_no_reason_to_generate(tmp_path):
    """503, and the key is free: it may stand for something there. An unstored turn does not ask it."""

    class Broken(SqliteStore):
        async def of_key(self, owner, key):
            raise StoreUnavailable("it is broken")

    store = Broken(tmp_path / "broken.db")
    process = Process(store, Clock())
    error = await process.read(keyed())
    assert (error.status, error.code) == (503, "store_unavailable")
    assert process.hand.is_idle
    assert repr(process.registry.held) == "<Held turns=0 ended=0 bytes=0>"
    assert len(await process.finished(keyed(store=False))) == 9
    await process.registry.close()
    await store.close()


async def test_a_turn_that_was_stopped_before_its_claim_stood_is_refused(tmp_path):
    """Nothing was acknowledged, and its engine was not asked."""

    class Stuck(SqliteStore):
        async def put(self, owner, turn, **more):
            asked.set()
            await asyncio.Event().wait()

    asked = asyncio.Event()
    store = Stuck(tmp_path / "stuck.db")
    process = Process(store, Clock())
    reading = asyncio.ensure_future(process.read(keyed()))
    await asyncio.wait_for(asked.wait(), 5)
    await process.registry.close()
    assert (await reading).code == "request_cancelled"
    assert process.hand.is_idle
    await store.close()


async def test_a_turn_that_cannot_be_kept_fails_and_frees_its_key_in_time(tmp_path):
    """No acknowledgement without durability; its claim runs out, and the next create with the key runs."""

    class Full(SqliteStore):
        is_full = False

        async def put(self, owner, turn, **more):
            if self.is_full:
                raise StoreUnavailable("it is on a full disk")
            await super().put(owner, turn, **more)

    store = Full(tmp_path / "full.db")
    process = Process(store, Clock())
    attachment, engine = await process.running(keyed())
    store.is_full = True
    engine.finish()
    assert json.loads((await read(attachment))[-1])["response"]["error"]["code"] == "store_unavailable"
    await asyncio.wait({attachment.turn.task})
    store.is_full = False
    process.forget()
    process.clock.now += LEASE + 1
    assert len(await process.finished(keyed())) == 9
    await process.registry.close()
    await store.close()
