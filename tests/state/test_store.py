"""The contract of every store, run over all of them."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openline.state.opening import open_store
from openline.state.sqlite import SqliteStore
from openline.state.store import StoredTurn, StoreUnavailable

KEEPING = ["sqlite file", "sqlite memory"]


def turn(response_id, parent_id=None, *, chainable=True, text="hello"):
    return StoredTurn(
        response_id=response_id,
        parent_id=parent_id,
        created_at=1_760_000_000,
        status="completed" if chainable else "failed",
        chainable=chainable,
        input=b'[{"role":"user","content":"%s"}]' % text.encode(),
        response=b'{"id":"%s","output":[]}' % response_id.encode(errors="replace"),
    )


def spec(kind, folder):
    return {"sqlite file": f"sqlite:{folder / 'store.db'}", "sqlite memory": "sqlite::memory:", "none": "none"}[kind]


@pytest.fixture
async def store(request, tmp_path):
    """A store that keeps turns, of each kind."""
    store = open_store(spec(request.param, tmp_path))
    yield store
    await store.close()


keeping = pytest.mark.parametrize("store", KEEPING, indirect=True)
every = pytest.mark.parametrize("store", [*KEEPING, "none"], indirect=True)


@keeping
async def test_a_put_turn_can_be_got_whole(store):
    """What comes back is what was put, field by field."""
    kept = turn("resp_1", "resp_0", text="größe")
    await store.put("ann", kept)
    assert await store.get("ann", "resp_1") == kept


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
    assert await store.get("ann", "resp_1") is None
    assert await store.chain("ann", "resp_1") is None
    assert await store.delete("ann", "resp_1") is False


@every
@pytest.mark.parametrize("response_id", ["", "\ud800", "resp\0_1", "'; DROP TABLE turns; --", "%", "x" * 1_000_000])
async def test_a_strange_id_is_an_unknown_id(store, response_id):
    """Whatever a client sends as an id, the answer is that it is not known (G11)."""
    assert await store.get("ann", response_id) is None
    assert await store.chain("ann", response_id) is None
    assert await store.delete("ann", response_id) is False


@every
async def test_every_store_accepts_a_put(store):
    """`none` takes a turn as well: it means that `store: true` is not kept, not that it fails."""
    await store.put("ann", turn("resp_1"))


async def test_none_keeps_nothing():
    """With `--store none` a response is unknown as soon as it was put."""
    store = open_store("none")
    await store.put("ann", turn("resp_1"))
    assert await store.get("ann", "resp_1") is None
    assert await store.chain("ann", "resp_1") is None
    assert await store.delete("ann", "resp_1") is False
    await store.close()


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
async def test_a_chain_that_bites_its_tail_is_none(store):
    """A circle, which only a damaged store has, ends."""
    await store.put("ann", turn("resp_0", "resp_1"))
    await store.put("ann", turn("resp_1", "resp_0"))
    assert await store.chain("ann", "resp_1") is None


@keeping
async def test_deleting_a_turn_breaks_the_chains_below_it(store):
    """A deleted response is gone, and what continued it cannot be continued any more."""
    await store.put("ann", turn("resp_0"))
    await store.put("ann", turn("resp_1", "resp_0"))
    assert await store.delete("ann", "resp_0") is True
    assert await store.get("ann", "resp_0") is None
    assert await store.get("ann", "resp_1") is not None
    assert await store.chain("ann", "resp_1") is None
    assert await store.delete("ann", "resp_0") is False


@keeping
async def test_another_owner_neither_sees_nor_deletes(store):
    """Another owner's id is an unknown id (G13)."""
    await store.put("ann", turn("resp_1"))
    assert await store.get("ben", "resp_1") is None
    assert await store.chain("ben", "resp_1") is None
    assert await store.delete("ben", "resp_1") is False
    assert await store.get("ann", "resp_1") is not None


@keeping
async def test_two_owners_may_have_the_same_id(store):
    """Ids are unique within an owner; nobody learns from a refusal that an id exists elsewhere (G13)."""
    mine, theirs = turn("resp_1", text="mine"), turn("resp_1", text="theirs")
    await store.put("ann", mine)
    await store.put("ben", theirs)
    assert (await store.get("ann", "resp_1"), await store.get("ben", "resp_1")) == (mine, theirs)


@keeping
async def test_a_second_turn_with_the_same_id_is_refused(store):
    """A turn is immutable: the first stays."""
    first = turn("resp_1", text="first")
    await store.put("ann", first)
    with pytest.raises(StoreUnavailable, match="holds a turn with this id already"):
        await store.put("ann", turn("resp_1", text="second"))
    assert await store.get("ann", "resp_1") == first


@keeping
async def test_a_closed_store_says_so(store):
    """After close every call is refused, and closing again does no harm."""
    await store.close()
    await store.close()
    calls = (store.put("ann", turn("x")), store.get("ann", "x"), store.chain("ann", "x"), store.delete("ann", "x"))
    for call in calls:
        with pytest.raises(StoreUnavailable, match="it is closed"):
            await call


OWNERS = ["ann", "ben"]
IDS = [f"resp_{number}" for number in range(5)]
ids = st.sampled_from(IDS)
operations = st.one_of(
    st.tuples(st.just("put"), ids, st.none() | ids, st.integers(0, 9).map(bool), st.text(max_size=3)),
    st.tuples(st.sampled_from(["get", "chain", "delete"]), ids),
)
histories = st.lists(st.tuples(st.sampled_from(OWNERS), operations), max_size=40)


def model_chain(kept, owner, response_id):
    path = []
    while response_id is not None:
        found = kept.get((owner, response_id))
        if found is None or not found.chainable or found in path:
            return None
        path.insert(0, found)
        response_id = found.parent_id
    return path


async def act(store, kept, owner, operation):
    """Do it to the store and to the model: what each says."""
    match operation:
        case "put", response_id, parent_id, chainable, text:
            new = turn(response_id, parent_id, chainable=chainable, text=text)
            taken = (owner, response_id) in kept
            kept.setdefault((owner, response_id), new)
            try:
                await store.put(owner, new)
            except StoreUnavailable:
                return False, not taken
            return True, not taken
        case "get", response_id:
            return await store.get(owner, response_id), kept.get((owner, response_id))
        case "chain", response_id:
            return await store.chain(owner, response_id), model_chain(kept, owner, response_id)
        case "delete", response_id:
            return await store.delete(owner, response_id), kept.pop((owner, response_id), None) is not None


async def replay(store, history):
    kept = {}
    try:
        for step, (owner, operation) in enumerate(history):
            said, expected = await act(store, kept, owner, operation)
            assert said == expected, (step, owner, operation)
        for owner in OWNERS:
            for response_id in IDS:
                assert await store.get(owner, response_id) == kept.get((owner, response_id))
    finally:
        await store.close()


@given(history=histories)
@settings(max_examples=150)
def test_owners_never_meet_in_memory(history):
    """Any history of two owners over the same ids equals one dict keyed by owner and id (G13)."""
    asyncio.run(replay(SqliteStore(None, chain_turns_max=len(IDS)), history))


@given(history=histories)
@settings(max_examples=15)
def test_owners_never_meet_in_a_file(tmp_path_factory, history):
    """The same in a file."""
    path = tmp_path_factory.mktemp("owners") / "store.db"
    asyncio.run(replay(SqliteStore(path, chain_turns_max=len(IDS)), history))
