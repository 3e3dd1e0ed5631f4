"""The contract of every store, run over all of them."""

import asyncio
from functools import partial
from itertools import pairwise

import pytest

from openline.state.store import (
    UNFINISHED_MAX,
    AlreadyKept,
    Conversation,
    ConversationFull,
    DuplicateItem,
    Key,
    KeyedTurn,
    KeyTaken,
    NothingIsKept,
    NotUnfinished,
    StoredTurn,
    StoreInfo,
    StoreUnavailable,
    UnknownConversation,
)
from state.stores import KEEPING, appended, conversation, items, turn, until

MEGABYTE = 1024 * 1024
HELLO, BYE = Key("hello", b"\x01" * 32), Key("bye", b"\x02" * 32)
STRANGE_IDS = ["", "\ud800", "resp\0_1", "'; DROP TABLE turns; --", "%", "$1", "x" * 1_000_000]

keeping = pytest.mark.parametrize("place", KEEPING, indirect=True)
surviving = pytest.mark.parametrize("place", ["sqlite file", "postgres"], indirect=True)
every = pytest.mark.parametrize("place", [*KEEPING, "none"], indirect=True)
none = pytest.mark.parametrize("place", ["none"], indirect=True)


async def exported(store, owner=None):
    return {(whose, each.response_id): each async for whose, each in store.export(owner)}


async def purge_all(store, before, limit=100):
    """How many went, and that no batch took more than it may."""
    total = 0
    while count := await store.purge(before, limit):
        assert count <= limit
        total += count
    return total


# --- One turn --------------------------------------------------------------------------------------


@keeping
async def test_a_put_turn_can_be_got_whole(store):
    """What comes back is what was put, field by field."""
    kept = turn("resp_1", "resp_0", text="größe")
    await store.put("ann", kept)
    assert await store.get("ann", "resp_1") == kept


@keeping
async def test_a_big_turn_comes_back_whole(store):
    """A message at its limit is a row like any other; here a third of it, in each direction, and as events."""
    body = bytes(range(256)) * (20 * MEGABYTE // 256)
    kept = StoredTurn("resp_1", None, 0, "completed", True, body, body[::-1])
    await store.put("ann", kept, events=body)
    assert await store.get("ann", "resp_1") == kept
    assert await store.chain("ann", "resp_1") == [kept]
    assert await store.events("ann", "resp_1") == body


@keeping
async def test_an_unchainable_turn_can_still_be_got(store):
    """A failed response is retrievable, only not continued (design: an unchainable row is kept)."""
    failed = turn("resp_1", chainable=False)
    await store.put("ann", failed)
    assert await store.get("ann", "resp_1") == failed
    assert await store.chain("ann", "resp_1") is None


@every
async def test_an_unknown_id_is_none(store):
    """Nothing is found where nothing was put, and that is no error."""
    await nothing_is_known_of(store, "resp_1")


@every
@pytest.mark.parametrize("strange", STRANGE_IDS, ids=lambda strange: repr(strange[:20]))
async def test_a_strange_id_is_an_unknown_id(store, strange):
    """Whatever a client sends as an id, the answer is that it is not known (G11)."""
    await nothing_is_known_of(store, strange)
    if await can_have_conversations(store):
        assert await store.item("ann", "conv_1", strange) is None
        assert await store.delete_item("ann", "conv_1", strange) is False
        assert await store.items("ann", "conv_1", limit=1, after=strange) is None
        assert len(await store.all_items("ann", "conv_1")) == 1


async def can_have_conversations(store):
    try:
        await store.create_conversation("ann", conversation(), items("item_1"))
    except NothingIsKept:
        return False
    return True


async def nothing_is_known_of(store, unknown):
    """By no method, neither as a response nor as a conversation."""
    assert await store.get("ann", unknown) is None
    assert await store.chain("ann", unknown) is None
    assert await store.events("ann", unknown) is None
    assert await store.of_key("ann", unknown) is None
    assert await store.delete("ann", unknown) is False
    assert await store.give_up("ann", unknown, 1, None) is False
    await store.used("ann", unknown, 1_760_000_000)
    assert await store.conversation("ann", unknown) is None
    assert await store.items("ann", unknown, limit=1) is None
    assert await store.all_items("ann", unknown) is None
    assert await store.item("ann", unknown, "item_1") is None
    assert await store.delete_item("ann", unknown, "item_1") is False
    assert await store.set_metadata("ann", unknown, b"{}", 0) is False
    assert await store.delete_conversation("ann", unknown) is False
    with pytest.raises(UnknownConversation):
        await store.append("ann", appended(unknown, "item_1"))


@every
async def test_every_store_accepts_a_put(store):
    """`none` takes a turn as well: it means that `store: true` is not kept, not that it fails."""
    await store.put("ann", turn("resp_1"))
    await store.put("ann", turn("resp_2", lease_until=9), events=b"event", key=HELLO)
    await store.put("ann", turn("resp_2"), replaces=True)


@keeping
async def test_an_owner_and_a_chain_may_have_any_name(store):
    """Quotes, wildcards and other alphabets are values like others, in ids and owners."""
    for number, name in enumerate(["o'brien", 'a "b"', "100%", "_", "größe 人", "a;b", "{}", "$1", "?1"]):
        first, second = turn(f"{name}-{number}"), turn(f"{name}+{number}", f"{name}-{number}")
        await store.put(name, first)
        await store.put(name, second)
        assert await store.chain(name, second.response_id) == [first, second]


@keeping
async def test_two_owners_may_have_the_same_id(store):
    """Ids are unique within an owner; nobody learns from a refusal that an id exists elsewhere (G13)."""
    mine, theirs = turn("resp_1", text="mine"), turn("resp_1", text="theirs")
    await store.put("ann", mine, events=b"mine")
    await store.put("ben", theirs, events=b"theirs")
    assert (await store.get("ann", "resp_1"), await store.get("ben", "resp_1")) == (mine, theirs)
    assert (await store.events("ann", "resp_1"), await store.events("ben", "resp_1")) == (b"mine", b"theirs")


@keeping
async def test_another_owner_neither_sees_nor_deletes(store):
    """Another owner's id is an unknown id (G13)."""
    await store.put("ann", turn("resp_1"), events=b"event")
    assert await store.get("ben", "resp_1") is None
    assert await store.chain("ben", "resp_1") is None
    assert await store.events("ben", "resp_1") is None
    assert await store.delete("ben", "resp_1") is False
    assert await store.get("ann", "resp_1") is not None


@keeping
async def test_a_second_turn_with_the_same_id_is_refused(store):
    """A finished turn is immutable: the first stays, with its events."""
    first = turn("resp_1", text="first")
    await store.put("ann", first, events=b"first")
    for second in (turn("resp_1", text="second"), turn("resp_1", lease_until=9)):
        with pytest.raises(AlreadyKept, match="holds a turn with this id already"):
            await store.put("ann", second, events=b"second")
    assert await store.get("ann", "resp_1") == first
    assert await store.events("ann", "resp_1") == b"first"


@keeping
async def test_a_closed_store_says_so(store):
    """After close every call is refused, and closing again does no harm."""
    await store.put("ann", turn("resp_1"))
    await store.close()
    await store.close()
    calls = [
        store.put("ann", turn("x")),
        store.get("ann", "x"),
        store.chain("ann", "x"),
        store.events("ann", "x"),
        store.of_key("ann", "x"),
        store.delete("ann", "x"),
        store.give_up("ann", "x", 1, None),
        store.renew([("ann", "x")], 0),
        store.unfinished(0),
        store.used("ann", "x", 0),
        store.create_conversation("ann", conversation()),
        store.conversation("ann", "x"),
        store.set_metadata("ann", "x", b"{}", 0),
        store.delete_conversation("ann", "x"),
        store.append("ann", appended("x")),
        store.items("ann", "x", limit=1),
        store.all_items("ann", "x"),
        store.item("ann", "x", "x"),
        store.delete_item("ann", "x", "x"),
        store.purge(0, 1),
        store.info(),
        exported(store),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="it is closed"):
            await call


@surviving
async def test_what_was_acknowledged_is_there_when_it_is_opened_again(place):
    """Closing loses nothing, of turns, events and conversations."""
    store = place.make()
    await store.put("ann", turn("resp_0"), events=b"event")
    await store.create_conversation("ann", conversation(), items("item_1"))
    await store.close()
    store = place.make()
    await store.put("ann", turn("resp_1", "resp_0"))
    assert await store.chain("ann", "resp_1") == [turn("resp_0"), turn("resp_1", "resp_0")]
    assert await store.events("ann", "resp_0") == b"event"
    assert await store.all_items("ann", "conv_1") == list(items("item_1"))


@surviving
async def test_two_processes_share_what_is_kept(place):
    """What one has acknowledged the other reads at once, and ids are unique between them."""
    one, other = place.make(), place.make()
    await one.put("ann", turn("resp_0"))
    await other.put("ann", turn("resp_1", "resp_0"))
    assert await one.chain("ann", "resp_1") == [turn("resp_0"), turn("resp_1", "resp_0")]
    with pytest.raises(AlreadyKept):
        await one.put("ann", turn("resp_1"))


@surviving
async def test_of_two_ends_of_one_turn_only_one_is_kept(place):
    """A process that comes back late and one that gave its turn up meanwhile: the first wins, the other learns it."""
    one, other = place.make(), place.make()
    for number in range(10):
        response_id = f"resp_{number}"
        await one.put("ann", turn(response_id, lease_until=1))
        ends = [turn(response_id, text="one"), turn(response_id, text="other", chainable=False)]
        puts = (one.put("ann", ends[0]), other.put("ann", ends[1]))
        outcomes = await asyncio.gather(*puts, return_exceptions=True)
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["AlreadyKept", "NoneType"]
        assert await one.get("ann", response_id) == ends[outcomes.index(None)]


@keeping
async def test_many_at_once_are_all_kept(store):
    """However many write and read at once, each gets its own."""
    turns = [turn(f"resp_{number}", text=str(number)) for number in range(200)]
    await asyncio.gather(*(store.put("ann", each) for each in turns))
    assert await asyncio.gather(*(store.get("ann", each.response_id) for each in turns)) == turns


@keeping
async def test_a_caller_that_goes_does_not_cut_a_write(store):
    """Cancelling stops the waiting, not the write: what is half there would be worse."""
    for number in range(10):
        put = asyncio.ensure_future(store.put("ann", turn(f"resp_{number}"), events=b"event"))
        await asyncio.sleep(0)  # it has begun
        put.cancel()
        await asyncio.gather(put, return_exceptions=True)
        await until(partial(is_kept, store, f"resp_{number}"))
        assert await store.events("ann", f"resp_{number}") == b"event"


async def is_kept(store, response_id):
    return await store.get("ann", response_id) is not None


# --- Chains ----------------------------------------------------------------------------------------


@keeping
async def test_a_chain_goes_from_its_start_to_the_turn(store):
    """Every ancestor comes once, oldest first, and no sibling with it."""
    turns = [turn("resp_0"), turn("resp_1", "resp_0"), turn("resp_2", "resp_1")]
    for each in [*turns, turn("resp_fork", "resp_1"), turn("resp_other")]:
        await store.put("ann", each)
    assert await store.chain("ann", "resp_2") == turns
    assert await store.chain("ann", "resp_0") == turns[:1]


@keeping
@pytest.mark.parametrize("middle", [None, turn("resp_1", "resp_0", chainable=False)], ids=["missing", "unchainable"])
async def test_a_chain_with_a_broken_link_is_none(store, middle):
    """One ancestor that is missing or unchainable breaks the whole chain."""
    for each in [turn("resp_0"), middle, turn("resp_2", "resp_1")]:
        if each is not None:
            await store.put("ann", each)
    assert await store.chain("ann", "resp_2") is None
    assert await store.chain("ann", "resp_0") is not None


@keeping
async def test_a_chain_does_not_pass_through_another_owner(store):
    """A parent id that is another owner's leads nowhere (G13)."""
    await store.put("ben", turn("resp_0"))
    await store.put("ann", turn("resp_1", "resp_0"))
    assert await store.chain("ann", "resp_1") is None


@keeping
async def test_a_chain_does_not_lead_through_another_owners_turn_of_the_same_id(store):
    """Two owners' turns may have the same ids: each is followed by its own parents (G13)."""
    mine = [turn("resp_0"), turn("resp_1", "resp_0"), turn("resp_2")]
    for each in mine:
        await store.put("ann", each)
    await store.put("ben", turn("resp_0", "resp_2"))
    assert await store.chain("ann", "resp_1") == mine[:2]


@keeping
async def test_a_chain_that_bites_its_tail_is_none(store):
    """A circle, which only a damaged store has, ends."""
    await store.put("ann", turn("resp_0", "resp_1"))
    await store.put("ann", turn("resp_1", "resp_0"))
    assert await store.chain("ann", "resp_1") is None


@keeping
async def test_a_chain_has_a_limit(place):
    """A chain of the limit is read, one turn more is a broken chain."""
    store = place.make(chain_turns_max=3)
    for n in range(4):
        await store.put("ann", turn(str(n), str(n - 1) if n else None))
    assert len(await store.chain("ann", "2")) == 3
    assert await store.chain("ann", "3") is None


@surviving
async def test_a_chain_takes_room_for_its_own_items_only(store):
    """A turn is its own items and its parent's id: each quarter of 1 000 turns takes the same room.

    Were it the whole conversation each time, the last quarter would take seven times as much as the first.
    """
    sizes = [(await store.info()).bytes]
    for number in range(1000):
        await store.put("ann", turn(f"resp_{number}", f"resp_{number - 1}" if number else None, text="x" * 1000))
        if (number + 1) % 250 == 0:
            sizes.append((await store.info()).bytes)
    quarters = [after - before for before, after in pairwise(sizes)]
    assert max(quarters) < 2 * min(quarters)
    assert len(await store.chain("ann", "resp_999")) == 1000


@keeping
async def test_deleting_a_turn_breaks_the_chains_below_it(store):
    """A deleted response is gone with its events, and what continued it cannot be continued any more."""
    await store.put("ann", turn("resp_0"), events=b"event")
    await store.put("ann", turn("resp_1", "resp_0"))
    assert await store.delete("ann", "resp_0") is True
    assert await store.get("ann", "resp_0") is None
    assert await store.events("ann", "resp_0") is None
    assert await store.get("ann", "resp_1") is not None
    assert await store.chain("ann", "resp_1") is None
    assert await store.delete("ann", "resp_0") is False


# --- Unfinished turns, and their events -------------------------------------------------------------


@keeping
async def test_an_unfinished_turn_is_replaced_until_it_has_finished(store):
    """Queued, in progress, completed: one row, of which the last put stays."""
    queued = turn("resp_1", lease_until=10)
    await store.put("ann", queued)
    assert await store.get("ann", "resp_1") == queued
    assert await store.chain("ann", "resp_1") is None
    await store.put("ann", turn("resp_1", text="going on", lease_until=20))
    await store.put("ann", turn("resp_1", text="done"))
    assert await store.get("ann", "resp_1") == turn("resp_1", text="done")
    assert await store.chain("ann", "resp_1") == [turn("resp_1", text="done")]


@keeping
async def test_events_stay_beside_their_turn(store):
    """They come with a put; one without leaves those of the unfinished turn, one with replaces them."""
    await store.put("ann", turn("resp_1", lease_until=10))
    assert await store.events("ann", "resp_1") is None
    await store.put("ann", turn("resp_1", lease_until=10), events=b"some")
    await store.put("ann", turn("resp_1", lease_until=20))
    assert await store.events("ann", "resp_1") == b"some"
    await store.put("ann", turn("resp_1"), events=b"all")
    assert await store.events("ann", "resp_1") == b"all"


@keeping
async def test_leases_that_have_ended_are_found_with_their_owners(store):
    """Whoever looks sees the turns that nobody runs any more, whole, and no other."""
    lost = turn("resp_1", lease_until=99)
    await store.put("ann", lost)
    await store.put("ben", lost)
    await store.put("ann", turn("resp_2", lease_until=100))
    await store.put("ann", turn("resp_3"))
    found = await store.unfinished(100)
    assert sorted(found, key=lambda each: each[0]) == [("ann", lost), ("ben", lost)]
    await store.put("ann", turn("resp_1", chainable=False))
    assert await store.unfinished(100) == [("ben", lost)]


@keeping
async def test_a_renewed_lease_goes_on(store):
    """Only of turns that are unfinished, and only the owner's own."""
    await store.put("ann", turn("resp_1", lease_until=10))
    await store.put("ben", turn("resp_1", lease_until=10))
    await store.put("ann", turn("resp_2"))
    assert await store.renew([("ann", "resp_1"), ("ann", "resp_2"), ("ann", "resp_gone")], 20) == 1
    assert await store.unfinished(15) == [("ben", turn("resp_1", lease_until=10))]
    assert await store.get("ann", "resp_1") == turn("resp_1", lease_until=20)
    assert await store.get("ann", "resp_2") == turn("resp_2")


@keeping
async def test_the_unfinished_come_in_portions(store):
    """However many a crash has left, a call gives a bounded number, those that have waited longest first."""
    count = UNFINISHED_MAX + 10
    puts = (store.put("ann", turn(f"resp_{number}", lease_until=1 + number)) for number in range(count))
    await asyncio.gather(*puts)
    found = [each.response_id for _, each in await store.unfinished(count + 1)]
    assert found == [f"resp_{number}" for number in range(UNFINISHED_MAX)]


# --- Idempotency keys -------------------------------------------------------------------------------


@keeping
async def test_a_key_stands_for_its_turn_from_its_claim_on(store):
    """Unfinished or finished, it finds the turn as it is, with the digest that came with it (docs/adr/0009)."""
    assert await store.of_key("ann", "hello") is None
    claim = turn("resp_1", lease_until=10)
    await store.put("ann", claim, key=HELLO)
    assert await store.of_key("ann", "hello") == KeyedTurn(HELLO.body_hash, claim)
    await store.put("ann", turn("resp_1"), events=b"event", replaces=True)
    assert await store.of_key("ann", "hello") == KeyedTurn(HELLO.body_hash, turn("resp_1"))
    assert await store.events("ann", "resp_1") == b"event"


@keeping
async def test_a_key_stands_for_one_turn(store):
    """Another turn does not get it, and nothing of it is kept; the same turn may bring it again."""
    await store.put("ann", turn("resp_1", lease_until=10), key=HELLO)
    with pytest.raises(KeyTaken):
        await store.put("ann", turn("resp_2", lease_until=10), events=b"event", key=HELLO)
    assert (await store.get("ann", "resp_2"), await store.events("ann", "resp_2")) == (None, None)
    await store.put("ann", turn("resp_1"), key=HELLO)
    assert await store.of_key("ann", "hello") == KeyedTurn(HELLO.body_hash, turn("resp_1"))


@surviving
async def test_of_two_claims_of_a_key_one_stands(place):
    """However close together, in one process or in two: so a create is generated once (guarantee of idempotent turns)."""
    one, other = place.make(), place.make()
    for number in range(20):
        key = Key(f"key_{number}", b"digest")
        turns = [turn(f"resp_{number}_{which}", lease_until=10) for which in "ab"]
        puts = (one.put("ann", turns[0], key=key), other.put("ann", turns[1], key=key))
        outcomes = await asyncio.gather(*puts, return_exceptions=True)
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["KeyTaken", "NoneType"]
        won = turns[outcomes.index(None)]
        assert await other.of_key("ann", key.key) == await one.of_key("ann", key.key) == KeyedTurn(b"digest", won)


@keeping
async def test_another_owners_key_is_an_unknown_key(store):
    """Two owners may use the same one for different creates (G13)."""
    await store.put("ann", turn("resp_1"), key=HELLO)
    assert await store.of_key("ben", "hello") is None
    await store.put("ben", turn("resp_1"), key=Key("hello", b"other"))
    assert (await store.of_key("ann", "hello")).body_hash == HELLO.body_hash
    assert await store.delete("ben", "resp_1")
    assert await store.of_key("ann", "hello") is not None


@keeping
async def test_a_key_goes_with_its_turn(store):
    """Deleted or purged, it can be used again; so a key lives as long as its response does (docs/adr/0009)."""
    await store.put("ann", turn("resp_1", at=99), key=HELLO)
    await store.put("ann", turn("resp_2", at=100), key=BYE)
    assert await purge_all(store, 100) == 1
    assert await store.of_key("ann", "hello") is None
    assert await store.delete("ann", "resp_2") is True
    assert await store.of_key("ann", "bye") is None
    await store.put("ann", turn("resp_3"), key=HELLO)
    assert (await store.of_key("ann", "hello")).turn == turn("resp_3")


@keeping
async def test_only_an_unfinished_turn_is_replaced(store):
    """What was ended or deleted meanwhile does not come back by the one who thought that he runs it (docs/adr/0009)."""
    await store.put("ann", turn("resp_ended", text="ended"))
    for missing in ("resp_gone", "resp_ended"):
        with pytest.raises(NotUnfinished):
            await store.put("ann", turn(missing, text="late"), events=b"late", replaces=True)
    assert await store.get("ann", "resp_gone") is None
    assert await store.get("ann", "resp_ended") == turn("resp_ended", text="ended")
    assert await store.events("ann", "resp_ended") is None


@keeping
@pytest.mark.parametrize("ended", [None, turn("resp_1", text="failed", chainable=False)], ids=["forgotten", "failed"])
async def test_a_turn_that_nobody_runs_is_given_up_with_its_key(store, ended):
    """Only once its lease has ended, and only once; another owner's stays (docs/adr/0009)."""
    for owner in ("ann", "ben"):
        await store.put(owner, turn("resp_1", lease_until=10), events=b"event", key=HELLO)
    assert await store.give_up("ann", "resp_1", 10, ended) is False
    assert await store.of_key("ann", "hello") is not None
    assert await store.give_up("ann", "resp_1", 11, ended) is True
    assert await store.get("ann", "resp_1") == ended
    assert await store.of_key("ann", "hello") is None
    assert await store.give_up("ann", "resp_1", 11, ended) is False
    await store.put("ann", turn("resp_2", lease_until=10), key=HELLO)
    assert (await store.of_key("ben", "hello")).turn == turn("resp_1", lease_until=10)


# --- Conversations ---------------------------------------------------------------------------------


@none
async def test_none_has_no_conversations(store):
    """A conversation that would be forgotten at once is refused, and says why; so are items for one."""
    with pytest.raises(NothingIsKept, match="--store none"):
        await store.create_conversation("ann", conversation())
    with pytest.raises(UnknownConversation):
        await store.put("ann", turn("resp_1"), appends=appended("conv_1", "item_1"))


@keeping
async def test_a_conversation_comes_back_with_its_items_in_order(store):
    """As it was made: metadata, first items, and what was added later, in the order of adding."""
    made = conversation(metadata=b'{"topic":"gr\xc3\xb6\xc3\x9fe"}')
    await store.create_conversation("ann", made, items("z", "a"))
    await store.append("ann", appended("conv_1", "m", "b"))
    await store.append("ann", appended("conv_1"))
    assert await store.conversation("ann", "conv_1") == made
    assert await store.all_items("ann", "conv_1") == list(items("z", "a", "m", "b"))
    assert await store.item("ann", "conv_1", "m") == items("m")[0]


@keeping
async def test_a_conversation_without_items_is_no_unknown_one(store):
    """Empty is an answer, None says that there is none."""
    await store.create_conversation("ann", conversation())
    assert await store.all_items("ann", "conv_1") == []
    page = await store.items("ann", "conv_1", limit=5)
    assert (page.items, page.has_more) == ([], False)
    assert await store.items("ann", "conv_1", limit=5, after="item_1") is None


@keeping
async def test_a_conversation_is_made_once(store):
    """A second one of the same id is refused, and the first stays."""
    await store.create_conversation("ann", conversation(), items("a"))
    with pytest.raises(AlreadyKept, match="holds a conversation with this id"):
        await store.create_conversation("ann", conversation(metadata=b'{"a":"b"}'), items("b"))
    assert await store.conversation("ann", "conv_1") == conversation()
    assert await store.all_items("ann", "conv_1") == list(items("a"))


@keeping
@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
async def test_pages_put_together_are_all_items(store, order, limit):
    """Page after page, each behind the last item of the one before: every item once, in order, and then no more."""
    ids = [f"item_{number:03}" for number in (5, 3, 1, 4, 0, 6, 2)]
    await store.create_conversation("ann", conversation(), items(*ids))
    await store.create_conversation("ann", conversation("conv_2"), items("other"))
    seen, after = [], None
    for _ in ids:
        page = await store.items("ann", "conv_1", limit=limit, after=after, order=order)
        seen += [item.id for item in page.items]
        assert len(page.items) <= limit
        if not page.has_more:
            break
        after = seen[-1]
    assert seen == (ids if order == "asc" else ids[::-1])


@keeping
async def test_metadata_is_replaced(store):
    """The whole of it, and nothing else."""
    await store.create_conversation("ann", conversation(at=5), items("a"))
    assert await store.set_metadata("ann", "conv_1", b'{"a":"b"}', 7) is True
    assert await store.conversation("ann", "conv_1") == Conversation("conv_1", 5, b'{"a":"b"}', 7)
    assert await store.all_items("ann", "conv_1") == list(items("a"))


@keeping
async def test_an_item_is_deleted_and_its_id_is_free(store):
    """The others keep their order; the id can be used again, at the end."""
    await store.create_conversation("ann", conversation(), items("a", "b", "c"))
    assert await store.delete_item("ann", "conv_1", "b") is True
    assert await store.delete_item("ann", "conv_1", "b") is False
    assert await store.item("ann", "conv_1", "b") is None
    await store.append("ann", appended("conv_1", "b"))
    assert await store.all_items("ann", "conv_1") == list(items("a", "c", "b"))


@keeping
async def test_a_deleted_conversation_takes_its_items_along(store):
    """One of the same id that is made later begins empty; turns that belonged to it stay."""
    await store.create_conversation("ann", conversation(), items("a"))
    await store.put("ann", turn("resp_1"), appends=appended("conv_1", "b"))
    assert await store.delete_conversation("ann", "conv_1") is True
    assert await store.delete_conversation("ann", "conv_1") is False
    assert await store.conversation("ann", "conv_1") is None
    assert await store.all_items("ann", "conv_1") is None
    assert await store.item("ann", "conv_1", "a") is None
    await store.create_conversation("ann", conversation())
    assert await store.all_items("ann", "conv_1") == []
    assert await store.get("ann", "resp_1") is not None


@keeping
async def test_another_owners_conversation_is_unknown(store):
    """By every way to it (G13)."""
    await store.create_conversation("ann", conversation(), items("a"))
    assert await store.conversation("ben", "conv_1") is None
    assert await store.items("ben", "conv_1", limit=5) is None
    assert await store.all_items("ben", "conv_1") is None
    assert await store.item("ben", "conv_1", "a") is None
    assert await store.delete_item("ben", "conv_1", "a") is False
    assert await store.set_metadata("ben", "conv_1", b"[]", 0) is False
    assert await store.delete_conversation("ben", "conv_1") is False
    with pytest.raises(UnknownConversation):
        await store.append("ben", appended("conv_1", "b"))
    with pytest.raises(UnknownConversation):
        await store.put("ben", turn("resp_1"), appends=appended("conv_1", "b"))
    await store.create_conversation("ben", conversation(), items("a", "z"))
    assert await store.conversation("ann", "conv_1") == conversation()
    assert await store.all_items("ann", "conv_1") == list(items("a"))
    assert await store.items("ann", "conv_1", limit=5, after="z") is None


@keeping
@pytest.mark.parametrize(
    ("wrong", "refusal"),
    [
        (appended("conv_2", "b"), UnknownConversation),
        (appended("conv_1", "b", "a"), DuplicateItem),
        (appended("conv_1", "b", "b"), DuplicateItem),
        (appended("conv_1", "b", "c", "d"), ConversationFull),
    ],
    ids=["unknown", "taken", "twice", "full"],
)
async def test_what_cannot_be_added_leaves_no_trace(place, wrong, refusal):
    """All items or none, and with them the turn that they came from."""
    store = place.make(conversation_items_max=3)
    await store.create_conversation("ann", conversation(), items("a"))
    await store.put("ann", turn("resp_1", lease_until=9))
    for unfit in (
        store.append("ann", wrong),
        store.put("ann", turn("resp_0"), events=b"event", appends=wrong),
        store.put("ann", turn("resp_1"), appends=wrong),
    ):
        with pytest.raises(refusal):
            await unfit
    assert await store.conversation("ann", "conv_1") == conversation()
    assert await store.all_items("ann", "conv_1") == list(items("a"))
    assert (await store.get("ann", "resp_0"), await store.events("ann", "resp_0")) == (None, None)
    assert await store.get("ann", "resp_1") == turn("resp_1", lease_until=9)
    await store.put("ann", turn("resp_1"), appends=appended("conv_1", "b", "c"))
    assert await store.all_items("ann", "conv_1") == list(items("a", "b", "c"))


@keeping
async def test_a_conversation_is_not_made_with_items_that_do_not_fit(place):
    """Too many, or two of one id: then it is not there at all."""
    store = place.make(conversation_items_max=2)
    with pytest.raises(ConversationFull):
        await store.create_conversation("ann", conversation(), items("a", "b", "c"))
    with pytest.raises(DuplicateItem):
        await store.create_conversation("ann", conversation(), items("a", "a"))
    assert await store.conversation("ann", "conv_1") is None


@keeping
async def test_a_turn_that_is_kept_already_adds_nothing(store):
    """A refused put adds no items either."""
    await store.create_conversation("ann", conversation())
    await store.put("ann", turn("resp_1"))
    with pytest.raises(AlreadyKept):
        await store.put("ann", turn("resp_1"), appends=appended("conv_1", "a"))
    assert await store.all_items("ann", "conv_1") == []


@keeping
async def test_what_is_added_at_once_stays_together(place):
    """Two turns of one conversation that end at the same time: the items of each stand side by side."""
    stores = [place.make(), place.make()] if place.survives else [place.make()]
    await stores[0].create_conversation("ann", conversation())
    batches = [[f"{batch}_{number}" for number in range(5)] for batch in range(20)]
    puts = [
        stores[index % len(stores)].put("ann", turn(f"resp_{index}"), appends=appended("conv_1", *batch))
        for index, batch in enumerate(batches)
    ]
    await asyncio.gather(*puts)
    ids = [item.id for item in await stores[0].all_items("ann", "conv_1")]
    assert sorted(ids[index : index + 5] for index in range(0, 100, 5)) == sorted(batches)


# --- Retention -------------------------------------------------------------------------------------


@keeping
async def test_what_was_not_used_is_purged(store):
    """Made before the time and not marked since: gone, with its events; of every owner."""
    await store.put("ann", turn("resp_old", at=99), events=b"event")
    await store.put("ben", turn("resp_old", at=99))
    await store.put("ann", turn("resp_new", at=100))
    await store.put("ann", turn("resp_used", at=1))
    await store.used("ann", "resp_used", 100)
    assert await purge_all(store, 100) == 2
    assert set(await exported(store)) == {("ann", "resp_new"), ("ann", "resp_used")}
    assert await store.events("ann", "resp_old") is None


@keeping
async def test_a_mark_is_seen_and_never_goes_back(store):
    """It is part of the turn; a clock that was set back does not shorten a life."""
    await store.put("ann", turn("resp_1", at=50))
    assert (await store.get("ann", "resp_1")).last_used_at is None
    for at, expected in [(40, 50), (60, 60), (55, 60)]:
        await store.used("ann", "resp_1", at)
        assert (await store.chain("ann", "resp_1"))[-1].last_used_at == expected
    await store.used("ben", "resp_1", 99)
    assert (await store.get("ann", "resp_1")).last_used_at == 60


@keeping
async def test_a_live_turn_keeps_its_whole_chain(store):
    """A parent never goes before its child, however old it is."""
    for number in range(5):
        await store.put("ann", turn(f"resp_{number}", f"resp_{number - 1}" if number else None, at=number))
    await store.put("ann", turn("resp_fork", "resp_1", at=9))
    await store.used("ann", "resp_3", 100)
    assert await purge_all(store, 50) == 2  # what comes after it, and the fork
    assert len(await store.chain("ann", "resp_3")) == 4


@keeping
@pytest.mark.parametrize("limit", [1, 2, 3, 100])
async def test_a_long_chain_goes_from_its_end(store, limit):
    """In batches of at most the limit, and at no time is a turn there whose parent has gone."""
    turns = [turn(f"resp_{number}", f"resp_{number - 1}" if number else None, at=number) for number in range(7)]
    for each in [*turns, turn("resp_fork", "resp_2", at=8), turn("resp_tip", "resp_fork", at=3)]:
        await store.put("ann", each)
    left = 9
    while count := await store.purge(50, limit):
        assert count <= limit
        left -= count
        there = await exported(store)
        assert len(there) == left
        assert all(each.parent_id is None or ("ann", each.parent_id) in there for each in there.values())
    assert left == 0


@keeping
async def test_another_owners_child_keeps_nothing_alive(store):
    """Who continues a turn is its owner's business alone (G13)."""
    await store.put("ann", turn("resp_0", at=1))
    await store.put("ben", turn("resp_1", "resp_0", at=99))
    assert await purge_all(store, 50) == 1
    assert set(await exported(store)) == {("ben", "resp_1")}


@keeping
async def test_an_unfinished_turn_is_not_purged(store):
    """Somebody may still run it; it goes once it has finished, or was given up."""
    await store.put("ann", turn("resp_0", at=1))
    await store.put("ann", turn("resp_1", "resp_0", at=1, lease_until=5))
    await store.put("ann", turn("resp_2", at=2))
    await store.put("ann", turn("resp_3", "resp_1", at=3))
    assert await purge_all(store, 50) == 2
    assert set(await exported(store)) == {("ann", "resp_0"), ("ann", "resp_1")}
    await store.put("ann", turn("resp_1", "resp_0", at=1, chainable=False))
    assert await purge_all(store, 50, limit=1) == 2


@keeping
async def test_conversations_are_purged_likewise(store):
    """Made, changed, added to and marked are uses; the items go with it."""
    for name in ("made", "changed", "added", "marked", "put", "old"):
        await store.create_conversation("ann", conversation(name, at=100 if name == "made" else 1), items("a"))
    await store.set_metadata("ann", "changed", b"{}", 100)
    await store.append("ann", appended("added", "b", at=100))
    await store.put("ann", turn("resp_1", at=100), appends=appended("put", "b", at=100))
    await store.used("ann", "marked", 100)
    await store.used("ben", "old", 100)
    assert await purge_all(store, 50, limit=1) == 1
    assert await store.conversation("ann", "old") is None
    assert await store.item("ann", "old", "a") is None
    assert await purge_all(store, 101, limit=2) == 6


@keeping
async def test_what_is_old_and_stays_hides_nothing(store, monkeypatch):
    """More of it than a purge looks at once, of one time and of many: what lies below is found all the same."""
    monkeypatch.setattr("openline.state.sqlite.LOOKED_AT_ONCE", 3)
    monkeypatch.setattr("openline.state.postgres.LOOKED_AT_ONCE", 3)
    for number in range(20):
        at = 30 if number < 10 else 30 + number
        await store.put("ann", turn(f"resp_{number}", f"resp_{number - 1}" if number else None, at=at))
    await store.put("ann", turn("resp_live", "resp_19", at=100))
    for number in range(5):
        await store.put("ann", turn(f"old_{number}", f"old_{number - 1}" if number else None, at=number))
    assert await purge_all(store, 90, limit=2) == 5
    assert len(await store.chain("ann", "resp_live")) == 21


@surviving
async def test_two_processes_may_purge_at_once(place):
    """Everything goes once, and none of them fails."""
    one, other = place.make(), place.make()
    turns = (turn(f"resp_{number}", f"resp_{number - 1}" if number % 10 else None, at=1) for number in range(200))
    await asyncio.gather(*(one.put("ann", each) for each in turns))
    counts = await asyncio.gather(purge_all(one, 50, 20), purge_all(other, 50, 20))
    assert await purge_all(one, 50) + sum(counts) == 200
    assert await exported(one) == {}


@keeping
async def test_writers_go_on_while_it_purges(store):
    """A purge in batches lets others in between, and touches nothing of theirs."""
    old = (turn(f"old_{number}", f"old_{number - 1}" if number % 10 else None, at=1) for number in range(300))
    await asyncio.gather(*(store.put("ann", each) for each in old))

    async def write():
        for number in range(50):
            await store.put("ann", turn(f"new_{number}", f"new_{number - 1}" if number else None, at=99))

    purged, _ = await asyncio.gather(purge_all(store, 50, 10), write())
    assert purged == 300
    assert len(await store.chain("ann", "new_49")) == 50


# --- Looking at the whole --------------------------------------------------------------------------


@every
async def test_an_empty_store_says_that_it_is_empty(store):
    """No rows, and no times."""
    info = await store.info()
    assert StoreInfo(schema=info.schema, bytes=info.bytes) == info
    assert await exported(store) == {}
    assert [each async for each in store.conversations()] == []


@keeping
async def test_info_counts(store):
    """Owners of turns and of conversations, unfinished turns too, the first and the last time, and the bytes."""
    before = await store.info()
    await store.put("ann", turn("resp_0", at=5, text="x" * 100_000))
    await store.put("ben", turn("resp_1", at=9, lease_until=20))
    await store.create_conversation("cid", conversation(), items("a", "b"))
    info = await store.info()
    assert (info.owners, info.turns, info.unfinished, info.conversations, info.items) == (3, 2, 1, 1, 2)
    assert (info.oldest, info.newest) == (5, 9)
    assert info.schema == before.schema > 0
    assert info.bytes > before.bytes


@keeping
async def test_an_export_gives_every_turn_once(store):
    """More than it reads at once, everybody's or one owner's, each as it was put."""
    turns = {(owner, f"resp_{n}"): turn(f"resp_{n}", text=owner) for owner in ("ann", "ben", "c d") for n in range(70)}
    await asyncio.gather(*(store.put(owner, each) for (owner, _), each in turns.items()))
    assert await exported(store) == turns
    assert len([each async for each in store.export()]) == len(turns)
    assert await exported(store, "ben") == {key: each for key, each in turns.items() if key[0] == "ben"}
    assert await exported(store, "dan") == {}


@keeping
async def test_every_conversation_is_given_once(store):
    """In the same way: more than are read at once, everybody's or one owner's."""
    made = {(owner, f"conv_{n}"): conversation(f"conv_{n}", at=n) for owner in ("ann", "ben") for n in range(70)}
    await asyncio.gather(*(store.create_conversation(owner, each) for (owner, _), each in made.items()))
    for owner in (None, "ann", "ben", "dan"):
        found = [(whose, each.id, each) async for whose, each in store.conversations(owner)]
        assert len(found) == len({key[:2] for key in found})
        wanted = {key: each for key, each in made.items() if owner in {None, key[0]}}
        assert {key[:2]: key[2] for key in found} == wanted
