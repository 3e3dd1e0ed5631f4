"""Turns with an idempotency key, in the memory of one process: one turn for one key, and who may come back to it.

Source: docs/adr/0009; guarantees, "Idempotent turns" and "Resume".
"""

from __future__ import annotations

import asyncio
import json

import pytest

from openline.protocol.deltas import TextDelta
from openline.protocol.errors import ProtocolError
from openline.state.cache import Anchor, ConnectionCache
from openline.state.context import EMPTY
from openline.state.nothing import NothingStore
from openline.turns.log import ReaderLagged, Window
from openline.turns.turn import Place
from server.hand import Hand
from turns.in_background import keyed, registry_of

NOTHING_HELD = "<Held turns=0 ended=0 bytes=0>"


@pytest.fixture
def hand():
    return Hand()


@pytest.fixture
async def registry(hand):
    registry = registry_of(hand)
    yield registry
    await registry.close()


def attach(registry, request, window_bytes=1_000_000):
    return registry.attach(request, Window(window_bytes))


async def read(attachment):
    """All that this client gets, to the end."""
    events = []
    async with asyncio.timeout(5):
        await attachment.admitted()
        while batch := await attachment.reader.read():
            events += batch
    attachment.leave()
    return events


async def refused(attachment):
    """The error that this client gets instead."""
    with pytest.raises(ProtocolError) as raised:
        await read(attachment)
    attachment.leave()
    return raised.value


async def finished(registry, hand, request, said="Hi."):
    """A turn that has ended, with all that its first client got."""
    attachment = attach(registry, request)
    (await hand.next_turn()).answer(said)
    events = await read(attachment)
    await asyncio.wait({attachment.turn.task})
    return attachment.turn, events


async def until(condition):
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - that is what it is for
            await asyncio.sleep(0.001)


async def said_bit_by_bit(engine):
    """An answer of 10 000 bytes, slowly enough to be read along."""
    for _ in range(10):
        engine.asked.clear()
        engine.give(TextDelta("x" * 1000))
        await engine.asked.wait()
        await settled()
    engine.finish()


async def settled():
    """Everything that can go on by itself has."""
    for _ in range(10):
        await asyncio.sleep(0)


# --- One turn for one key


async def test_two_creates_at_once_are_one_turn(registry, hand):
    """The key is taken before anything is waited for, so the second finds the first, and reads all of it."""
    attachments = [attach(registry, keyed()) for _ in range(5)]
    (await hand.next_turn()).answer("Once.")
    streams = [await read(each) for each in attachments]
    assert len({each.turn for each in attachments}) == 1
    assert all(stream == streams[0] for stream in streams)
    assert hand.is_idle


async def test_a_finished_turn_is_given_again(registry, hand):
    """Byte for byte, from any place on, as long as it is held."""
    turn, events = await finished(registry, hand, keyed())
    for after in (None, *range(len(events) - 1)):
        again = attach(registry, keyed(starting_after=after))
        assert again.turn is turn
        assert await read(again) == events[0 if after is None else after + 1 :]
    assert hand.is_idle


async def test_another_body_is_refused(registry, hand):
    """While it runs and when it has ended; nothing is generated, and the turn goes on."""
    attachment = attach(registry, keyed())
    engine = await hand.next_turn()
    for _ in range(2):
        with pytest.raises(ProtocolError) as raised:
            attach(registry, keyed(input="Goodbye."))
        assert (raised.value.status, raised.value.code) == (409, "idempotency_key_reused")
        engine.answer("Hi.")
        await asyncio.wait({attachment.turn.task})
    assert len(await read(attachment)) == 9
    assert hand.is_idle


async def test_how_a_client_reads_makes_no_other_body(registry, hand):
    """A socket's create, a stream and a plain request with one key and the same fields are one turn."""
    place = Place(ConnectionCache(), "a")
    on_socket = attach(registry, keyed(place=place))
    plain = attach(registry, keyed(transport="json", stream=False))
    (await hand.next_turn()).answer("Hi.")
    assert len(await read(on_socket)) == 9
    await plain.reader.to_the_end()
    assert plain.turn.log.response["status"] == "completed"


async def test_an_owners_key_is_its_own(registry, hand):
    """Another owner's is an unknown key: it may be used for anything (guarantees, "Owners")."""
    mine, _ = await finished(registry, hand, keyed(owner="a"), "Mine.")
    theirs = attach(registry, keyed(owner="b", input="Other."))
    assert theirs.turn is not mine
    (await hand.next_turn()).answer("Theirs.")
    assert b"Mine." not in b"".join(await read(theirs))
    error = await refused(attach(registry, keyed(owner="c", starting_after=3)))
    assert error.code == "resume_window_exceeded"
    assert [registry.held.of_key(owner, "k") is not None for owner in "abc"] == [True, True, False]


# --- Which ends let go of the key


@pytest.mark.parametrize("reason", ["bad input", "upstream refuses", "stopped"])
async def test_a_turn_that_was_refused_lets_go_of_its_key(registry, hand, reason):
    """Nobody has seen a response: the next create with the key runs, with another body too."""
    request = keyed(input=[{"id": "msg_x"}]) if reason == "bad input" else keyed()
    attachment = attach(registry, request)
    if reason == "upstream refuses":
        (await hand.next_turn()).refuse()
    elif reason == "stopped":
        attachment.turn.stop()
    await refused(attachment)
    assert repr(registry.held) == NOTHING_HELD
    _, events = await finished(registry, hand, keyed(input="Goodbye."))
    assert len(events) == 9


async def test_a_create_that_comes_while_one_is_refused_runs(registry, hand):
    """Between the refusal and the moment at which the registry knows of it (docs/adr/0009)."""
    attachment = attach(registry, keyed())
    (await hand.next_turn()).refuse()
    while attachment.turn.log.refusal is None:  # noqa: ASYNC110 - the registry knows of it one step later
        await asyncio.sleep(0)
    assert len(registry) == 1
    second = attach(registry, keyed())
    assert second.turn is not attachment.turn
    (await hand.next_turn()).answer("Hi.")
    assert len(await read(second)) == 9
    assert registry.held.of_key("local", "k") is second.turn


async def test_a_response_that_failed_keeps_its_key(registry, hand):
    """Its events have been seen: whoever comes again gets the same failure, not a second try (docs/adr/0009)."""
    attachment = attach(registry, keyed())
    engine = await hand.next_turn()
    engine.give(TextDelta("One "))
    engine.refuse()
    events = await read(attachment)
    assert json.loads(events[-1])["type"] == "response.failed"
    assert await read(attach(registry, keyed())) == events
    assert hand.is_idle


async def test_a_plain_answer_that_failed_lets_go_of_its_key(registry, hand):
    """Its client got an error with its real status, and no response: it may try again (docs/adr/0003)."""
    plain = keyed(transport="json")
    attachment = attach(registry, plain)
    engine = await hand.next_turn()
    engine.give(TextDelta("One "))
    engine.refuse()
    assert (await refused(attachment)).code == "rate_limit_exceeded"
    assert repr(registry.held) == NOTHING_HELD


async def test_a_plain_answer_that_others_have_read_along_fails(registry, hand):
    """They have seen a response, and get its end; the plain one can still tell its client the real status."""
    attachment, streaming = attach(registry, keyed(transport="json")), attach(registry, keyed())
    engine = await hand.next_turn()
    engine.give(TextDelta("One "))
    engine.refuse()
    assert json.loads((await read(streaming))[-1])["type"] == "response.failed"
    assert attachment.turn.error.code == "rate_limit_exceeded"
    assert registry.held.of_key("local", "k") is attachment.turn


# --- From where on


async def test_the_rest_of_what_is_not_held_is_refused(registry, hand):
    """A client that has seen some of it learns for sure that nothing is held; nothing is generated."""
    error = await refused(attach(registry, keyed(starting_after=0)))
    assert (error.status, error.code, error.param) == (409, "resume_window_exceeded", "starting_after")
    await settled()
    assert hand.is_idle
    assert repr(registry.held) == NOTHING_HELD


@pytest.mark.parametrize("first", ["who wants the rest", "who wants all"])
async def test_who_wants_the_rest_does_not_keep_others_from_all(registry, hand, first):
    """Two creates at once, before it is known whether the turn is a new one: it is, and only one of them gets it."""
    requests = [keyed(starting_after=3), keyed()]
    if first == "who wants all":
        requests.reverse()
    attachments = [attach(registry, request) for request in requests]
    rest, whole = sorted(attachments, key=lambda each: each.request.create.starting_after is None)
    reading = asyncio.ensure_future(refused(rest))
    (await hand.next_turn()).answer("Hi.")
    assert (await reading).code == "resume_window_exceeded"
    assert len(await read(whole)) == 9


@pytest.mark.parametrize("when", ["running", "ended"])
async def test_who_has_seen_more_than_there_is_saw_another_turn(registry, hand, when):
    """An earlier one with this key, which was lost: its rest cannot come from this one (docs/adr/0009)."""
    attachment = attach(registry, keyed())
    engine = await hand.next_turn()
    engine.give(TextDelta("Hi."))
    await until(lambda: len(attachment.turn.log) == 5)
    if when == "ended":
        engine.finish()
        await asyncio.wait({attachment.turn.task})
    count = len(attachment.turn.log)
    with pytest.raises(ProtocolError) as raised:
        attach(registry, keyed(starting_after=count))
    assert raised.value.code == "resume_window_exceeded"
    attach(registry, keyed(starting_after=count - 1)).leave()


async def test_a_trimmed_log_is_never_read_with_a_gap(hand):
    """What is no longer all kept is refused, in any place before that; the plain answer has no events to miss."""
    registry = registry_of(hand, bytes_max=4000)
    attachment = attach(registry, keyed())
    engine, turn = await hand.next_turn(), attachment.turn
    reading = asyncio.ensure_future(read(attachment))
    await said_bit_by_bit(engine)
    events = await reading
    first = turn.log.first
    assert 0 < first < len(events)
    for after in (None, 0, first - 2):
        with pytest.raises(ProtocolError) as raised:
            attach(registry, keyed(starting_after=after))
        assert (raised.value.status, raised.value.code) == (409, "resume_window_exceeded")
        plain = attach(registry, keyed(transport="json", starting_after=after))
        await asyncio.wait_for(plain.reader.to_the_end(), 5)
    assert await read(attach(registry, keyed(starting_after=first - 1))) == events[first:]
    assert hand.is_idle
    await registry.close()


async def test_on_a_lane_the_end_that_was_seen_is_refused(registry, hand):
    """Nothing but an event tells there that the lane is free again; the turn is its latest all the same."""
    _, events = await finished(registry, hand, keyed())
    place = Place(ConnectionCache(), None)
    again = attach(registry, keyed(place=place, starting_after=len(events) - 1))
    error = await refused(again)
    assert (error.code, error.param) == ("invalid_value", "starting_after")
    assert place.cache.get("local", again.turn.id) is not None
    assert await read(attach(registry, keyed(starting_after=len(events) - 1))) == []


# --- Without readers


async def test_a_turn_goes_on_without_readers(registry, hand):
    """Its client was cut off: the model goes on, and is not held up by a window that nobody reads."""
    attachment = attach(registry, keyed(), window_bytes=10)
    engine = await hand.next_turn()
    engine.give(TextDelta("x" * 100))
    await until(lambda: not attachment.turn.log.is_writable)
    attachment.leave()
    assert repr(registry.held) == "<Held turns=1 ended=0 detached=1 bytes=0>"
    engine.finish(TextDelta("y"))
    await asyncio.wait({attachment.turn.task})
    assert attachment.turn.log.response["status"] == "completed"
    assert len(await read(attach(registry, keyed()))) == len(attachment.turn.log)


async def test_after_its_time_without_readers_a_turn_is_stopped(hand):
    """`resume.seconds`; then it ends as cancelled, and whoever comes later is told that."""
    registry = registry_of(hand, seconds=0.05)
    attachment = attach(registry, keyed())
    engine = await hand.next_turn()
    engine.give(TextDelta("One "))
    await until(lambda: attachment.turn.is_known)
    attachment.leave()
    await asyncio.wait_for(asyncio.wait({attachment.turn.task}), 5)
    assert engine.closed.is_set()
    last = json.loads((await read(attach(registry, keyed())))[-1])
    assert (last["type"], last["response"]["incomplete_details"]) == ("response.incomplete", {"reason": "cancelled"})
    await registry.close()


async def test_who_comes_back_in_time_stops_the_clock(registry, hand):
    """Every time without readers is counted by itself."""
    attachment = attach(registry, keyed())
    engine = await hand.next_turn()
    for _ in range(2):
        attachment.leave()
        stopping = registry.held._detached[attachment.turn.id]
        attachment = attach(registry, keyed())
        assert stopping.cancelled()
    assert "detached" not in repr(registry.held)
    engine.answer("Hi.")
    assert json.loads((await read(attachment))[-1])["type"] == "response.completed"


async def test_of_too_many_without_readers_the_oldest_is_stopped(hand):
    """`detached_active_max`: one more, and the one that nobody has come back to for the longest time goes."""
    registry = registry_of(hand, detached_active_max=2)
    attachments = []
    for number in range(4):
        attachments.append(attach(registry, keyed(f"k{number}")))
        (await hand.next_turn()).accept()
        await until(lambda: attachments[-1].turn.is_known)
    attachments[0].leave()
    attachments[1].leave()
    attach(registry, keyed("k0")).leave()  # so it is not the oldest any more
    await settled()
    assert not any(each.turn.log.ended for each in attachments)
    attachments[2].leave()
    await asyncio.wait_for(asyncio.wait({attachments[1].turn.task}), 5)
    assert [each.turn.log.ended for each in attachments] == [False, True, False, False]
    await registry.close()


async def test_in_the_background_nobody_has_to_read(registry, hand):
    """A background turn with a key runs on as one without does, and is not counted as left (docs/adr/0007)."""
    attachment = attach(registry, keyed(background=True))
    engine = await hand.next_turn()
    attachment.leave()
    assert "detached" not in repr(registry.held)
    again = attach(registry, keyed(background=True))
    assert again.turn is attachment.turn
    engine.answer("Hi.")
    assert json.loads((await read(again))[-1])["type"] == "response.completed"


# --- How long, and how much


async def test_an_ended_turn_is_held_for_its_time(hand):
    """`resume.seconds` from its end on; then its key is unknown, and may be used again."""
    registry = registry_of(hand, seconds=0.05)
    await finished(registry, hand, keyed())
    await until(lambda: registry.held.of_key("local", "k") is None)
    assert repr(registry.held) == NOTHING_HELD
    await finished(registry, hand, keyed(input="Goodbye."))
    await registry.close()


async def test_a_forgotten_response_lets_go_of_its_key(registry, hand):
    """Deleted by its client, it can be asked for anew."""
    turn, _ = await finished(registry, hand, keyed())
    assert registry.held.forget("local", turn.id)
    assert registry.held.of_key("local", "k") is None
    await finished(registry, hand, keyed())


async def test_contexts_count(hand):
    """What a held turn can be continued from stays in memory for it, so it has the same bound (guarantees, "Bounds")."""
    registry = registry_of(hand, bytes_max=200_000)
    turns = [(await finished(registry, hand, keyed(f"k{number}", input="x" * 20_000)))[0] for number in range(10)]
    held = [turn for turn in turns if registry.held.get("local", turn.id) is not None]
    assert 2 <= len(held) <= 3  # as it came, as an item, and in the context
    assert all(turn.anchor.node.bytes > 20_000 for turn in held)
    assert sum(turn.bytes for turn in held) <= 200_000
    assert [turn.id for turn in held] == [turn.id for turn in turns[-len(held) :]]
    await registry.close()
    assert repr(registry.held) == NOTHING_HELD


async def test_nothing_of_a_connection_is_held_with_its_turn(registry, hand):
    """Else a turn would keep all that its connection remembered, which nobody counts."""
    place = Place(ConnectionCache(), None)
    turn, _ = await finished(registry, hand, keyed(place=place))
    await settled()
    assert (turn.request.cache, turn.places) == (None, [])
    assert place.cache.get("local", turn.id) is not None


# --- Lanes


def anchor(response_id):
    return Anchor(response_id, EMPTY, "m", stored=False)


async def test_a_turn_is_the_latest_of_every_lane_that_it_is_on(registry, hand):
    """Of the one that it was asked for on, and of the ones where its client came back, before its end can be read."""
    places = [Place(ConnectionCache(), lane) for lane in (None, "a", "b")]
    places.append(Place(places[0].cache, "c"))
    attachments = [attach(registry, keyed(place=place)) for place in places[:3]]
    (await hand.next_turn()).answer("Hi.")
    turn = attachments[0].turn
    await attachments[0].admitted()
    while not turn.log.ended:
        await attachments[0].reader.read()
    assert [place.cache.get("local", turn.id) is not None for place in places[:3]] == [True] * 3
    late = attach(registry, keyed(place=places[3]))
    places[0].cache.keep("local", None, anchor("resp_next"))
    assert places[3].cache.get("local", turn.id) is turn.anchor
    late.leave()


async def test_a_lane_that_was_left_is_not_touched_any_more(registry, hand):
    """It may have gone on to something else meanwhile."""
    old, new = Place(ConnectionCache(), None), Place(ConnectionCache(), None)
    first, second = attach(registry, keyed(place=old)), attach(registry, keyed(place=new))
    first.leave()
    old.cache.keep("local", None, anchor("resp_other"))
    (await hand.next_turn()).answer("Hi.")
    await read(second)
    assert old.cache.get("local", "resp_other") is not None
    assert new.cache.get("local", second.turn.id) is not None


@pytest.mark.parametrize("when", ["before its end", "after its end"])
async def test_a_failed_turn_takes_its_parent_out_of_every_lane(registry, hand, when):
    """Where it was the lane's own (WebSocket mode guide, "Failed continuations")."""
    places = [Place(ConnectionCache(), None), Place(ConnectionCache(), "a")]
    for place in places:
        place.cache.keep("local", place.stream_id, anchor("resp_parent"))
    first = attach(registry, keyed(place=places[0], previous_response_id="resp_parent"))
    engine = await hand.next_turn()
    engine.give(TextDelta("One "))
    if when == "before its end":
        attach(registry, keyed(place=places[1], previous_response_id="resp_parent"))
    engine.refuse()
    await read(first)
    if when == "after its end":
        attach(registry, keyed(place=places[1], previous_response_id="resp_parent")).leave()
    assert [place.cache.get("local", "resp_parent") for place in places] == [None, None]


async def test_who_lags_behind_another_is_told_so(hand):
    """The one that was replaced may read on, as far as is kept; never with a gap."""
    registry = registry_of(hand, bytes_max=4000)
    first = attach(registry, keyed())
    engine = await hand.next_turn()
    second = attach(registry, keyed())
    reading = asyncio.ensure_future(read(second))
    await settled()
    await first.admitted()
    await said_bit_by_bit(engine)
    assert json.loads((await reading)[-1])["type"] == "response.completed"
    with pytest.raises(ReaderLagged):
        await first.reader.read()
    await registry.close()


# --- While it is being kept


async def test_nothing_gets_between_what_is_kept_and_its_end(hand):
    """Its events are settled while the store writes: the kept stream is the one that was read."""
    keeping, release = asyncio.Event(), asyncio.Event()
    kept = []

    class Slow(NothingStore):
        async def put(self, owner, turn, *, events=None, **more):
            if events is not None:
                kept.append(events)
                keeping.set()
                await release.wait()

    registry = registry_of(hand, Slow())
    attachment = attach(registry, keyed())
    turn = await hand.next_turn()
    assert not attachment.turn.is_settled
    turn.answer("Hi.")
    reading = asyncio.ensure_future(read(attachment))
    await asyncio.wait_for(keeping.wait(), 5)
    assert attachment.turn.is_settled
    release.set()
    events = await reading
    await registry.close()
    assert attachment.turn.is_settled
    assert json.loads(events[-1])["type"] == "response.completed"
    assert b"\n".join(events[:-1]) == kept[0]
