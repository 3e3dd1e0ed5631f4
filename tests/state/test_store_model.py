"""Any history of two owners equals a small model in dicts, on every store that keeps something (G13)."""

import asyncio
from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openline.state.store import (
    AlreadyKept,
    Appended,
    Conversation,
    ConversationFull,
    ConversationItem,
    DuplicateItem,
    ItemPage,
    Key,
    KeyedTurn,
    KeyTaken,
    NotAppended,
    NotUnfinished,
    StoredTurn,
    StoreUnavailable,
    UnknownConversation,
)
from state.stores import place as made_place

OWNERS = ["ann", "ben"]
IDS = [f"resp_{number}" for number in range(5)]
KEYS = ["key_0", "key_1", "key_2"]
CONVERSATIONS = ["conv_0", "conv_1"]
ITEMS_MAX = 4


@dataclass
class Talk:
    kept: Conversation
    items: dict[str, bytes] = field(default_factory=dict)


@dataclass
class Model:
    """What a store is to do, without owners: each has a model of its own."""

    turns: dict[str, StoredTurn] = field(default_factory=dict)
    streams: dict[str, bytes] = field(default_factory=dict)
    keys: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # the turn's id and the digest
    talks: dict[str, Talk] = field(default_factory=dict)

    def put(self, turn, events, appends, key, replaces):
        kept = self.turns.get(turn.response_id)
        is_unfinished = kept is not None and kept.lease_until is not None
        if replaces and not is_unfinished:
            raise NotUnfinished
        if kept is not None and not is_unfinished:
            raise AlreadyKept
        if key is not None and self.keys.get(key.key, (turn.response_id,))[0] != turn.response_id:
            raise KeyTaken
        if appends is not None:
            self.append(appends)
        self.turns[turn.response_id] = turn
        if key is not None:
            self.keys[key.key] = turn.response_id, key.body_hash
        if events is not None:
            self.streams[turn.response_id] = events

    def chain(self, response_id):
        path = []
        while response_id is not None:
            found = self.turns.get(response_id)
            if found is None or not found.chainable or found in path:
                return None
            path.insert(0, found)
            response_id = found.parent_id
        return path

    def of_key(self, key):
        response_id, body_hash = self.keys.get(key, (None, None))
        return None if response_id is None else KeyedTurn(body_hash, self.turns[response_id])

    def free_key(self, response_id):
        self.keys = {key: named for key, named in self.keys.items() if named[0] != response_id}

    def give_up(self, response_id, before, ended):
        kept = self.turns.get(response_id)
        if kept is None or kept.lease_until is None or kept.lease_until >= before:
            return False
        self.free_key(response_id)
        if ended is None:
            return self.delete(response_id)
        self.turns[response_id] = msgspec.structs.replace(ended, response_id=response_id)
        return True

    def delete(self, response_id):
        self.streams.pop(response_id, None)
        self.free_key(response_id)
        return self.turns.pop(response_id, None) is not None

    def renew(self, response_ids, until):
        renewed = 0
        for response_id in response_ids:
            kept = self.turns.get(response_id)
            if kept is not None and kept.lease_until is not None:
                self.turns[response_id] = msgspec.structs.replace(kept, lease_until=until)
                renewed += 1
        return renewed

    def used(self, kept_id, at):
        if kept_id in self.turns:
            kept = self.turns[kept_id]
            last = max(kept.created_at if kept.last_used_at is None else kept.last_used_at, at)
            self.turns[kept_id] = msgspec.structs.replace(kept, last_used_at=last)
        if kept_id in self.talks:
            self.touch(kept_id, at)

    def touch(self, conversation_id, at, **changes):
        talk = self.talks[conversation_id]
        talk.kept = msgspec.structs.replace(talk.kept, last_used_at=max(talk.kept.last_used_at, at), **changes)

    def purge(self, before):
        leaf = self.find_leaf(before)
        while leaf is not None:
            self.delete(leaf)
            leaf = self.find_leaf(before)
        for conversation_id in [each for each, talk in self.talks.items() if talk.kept.last_used_at < before]:
            del self.talks[conversation_id]

    def find_leaf(self, before):
        parents = {turn.parent_id for turn in self.turns.values()}
        for response_id, turn in self.turns.items():
            last = turn.created_at if turn.last_used_at is None else turn.last_used_at
            if last < before and turn.lease_until is None and response_id not in parents:
                return response_id
        return None

    def create(self, conversation_id, items, at):
        if conversation_id in self.talks:
            raise AlreadyKept
        self.require_fitting(items, {})
        self.talks[conversation_id] = Talk(Conversation(conversation_id, at, b"{}", at), dict(items))

    def append(self, appends):
        if appends.conversation_id not in self.talks:
            raise UnknownConversation
        talk = self.talks[appends.conversation_id]
        items = [(item.id, item.raw) for item in appends.items]
        self.require_fitting(items, talk.items)
        talk.items |= items
        self.touch(appends.conversation_id, appends.at)

    @staticmethod
    def require_fitting(items, there):
        ids = [item_id for item_id, _ in items]
        if len(set(ids) | set(there)) < len(ids) + len(there):
            raise DuplicateItem
        if len(ids) + len(there) > ITEMS_MAX:
            raise ConversationFull

    def page(self, conversation_id, limit, after, order):
        items = self.all_items(conversation_id)
        if items is None:
            return None
        if order == "desc":
            items.reverse()
        if after is not None:
            ids = [item.id for item in items]
            if after not in ids:
                return None
            items = items[ids.index(after) + 1 :]
        return ItemPage(items[:limit], len(items) > limit)

    def all_items(self, conversation_id):
        talk = self.talks.get(conversation_id)
        return None if talk is None else [ConversationItem(*item) for item in talk.items.items()]


ids = st.sampled_from(IDS)
talk_ids = st.sampled_from(CONVERSATIONS)
item_ids = st.sampled_from([f"item_{number}" for number in range(5)])
times = st.integers(0, 9)
added = st.lists(st.tuples(item_ids, st.binary(max_size=3)), max_size=3)
turns = st.builds(
    lambda response_id, parent_id, at, chainable, body, lease: StoredTurn(
        response_id, parent_id, at, "in_progress" if lease is not None else "completed", chainable, body, body, lease
    ),
    ids,
    st.none() | ids,
    times,
    st.integers(0, 9).map(bool),
    st.binary(max_size=3),
    st.sampled_from([None, None, None, 3, 7]),
)
appends = st.builds(
    lambda talk_id, items, at: Appended(talk_id, tuple(ConversationItem(*item) for item in items), at),
    talk_ids,
    added,
    times,
)
key_names = st.sampled_from(KEYS)
keys = st.builds(Key, key_names, st.binary(max_size=2))
finished = turns.filter(lambda turn: turn.lease_until is None)
operations = st.one_of(
    st.tuples(
        st.just("put"), turns, st.none() | st.binary(max_size=3), st.none() | appends, st.none() | keys, st.booleans()
    ),
    st.tuples(st.sampled_from(["get", "chain", "events", "delete"]), ids),
    st.tuples(st.just("of_key"), key_names),
    st.tuples(st.just("give_up"), ids, times, st.none() | finished),
    st.tuples(st.just("renew"), st.lists(ids, max_size=3, unique=True), times),
    st.tuples(st.just("unfinished"), times),
    st.tuples(st.just("used"), ids | talk_ids, times),
    st.tuples(st.just("purge"), times, st.integers(1, 4)),
    st.tuples(st.just("create"), talk_ids, added, times),
    st.tuples(st.just("append"), appends),
    st.tuples(st.just("page"), talk_ids, st.integers(1, 3), st.none() | item_ids, st.sampled_from(["asc", "desc"])),
    st.tuples(st.sampled_from(["item", "delete_item"]), talk_ids, item_ids),
    st.tuples(st.just("set_metadata"), talk_ids, st.binary(max_size=3), times),
    st.tuples(st.just("delete_conversation"), talk_ids),
)
histories = st.lists(st.tuples(st.sampled_from(OWNERS), operations), max_size=50)


def expected(models, owner, operation):  # noqa: C901 - one case an operation
    """What the model says, by the rules above."""
    model = models[owner]
    match operation:
        case "get", response_id:
            return model.turns.get(response_id)
        case "events", response_id:
            return model.streams.get(response_id)
        case "unfinished", now:
            lost = ((whose, turn) for whose, each in models.items() for turn in each.turns.values())
            return {(whose, turn) for whose, turn in lost if turn.lease_until is not None and turn.lease_until < now}
        case "purge", before, _:
            count = size(models)
            for each in models.values():
                each.purge(before)
            return count - size(models)
        case "item", talk_id, item_id:
            talk = model.talks.get(talk_id)
            return ConversationItem(item_id, talk.items[item_id]) if talk and item_id in talk.items else None
        case "delete_item", talk_id, item_id:
            talk = model.talks.get(talk_id)
            return talk is not None and talk.items.pop(item_id, None) is not None
        case "set_metadata", talk_id, metadata, at:
            if talk_id in model.talks:
                model.touch(talk_id, at, metadata=metadata)
            return talk_id in model.talks
        case "delete_conversation", talk_id:
            return model.talks.pop(talk_id, None) is not None
        case name, *arguments:
            return getattr(model, name)(*arguments)


def size(models):
    return sum(len(model.turns) + len(model.talks) for model in models.values())


async def said(store, owner, operation):
    """What the store says."""
    match operation:
        case "put", turn, events, appends, key, replaces:
            return await store.put(owner, turn, events=events, appends=appends, key=key, replaces=replaces)
        case "give_up", response_id, before, ended:
            ended = None if ended is None else msgspec.structs.replace(ended, response_id=response_id)
            return await store.give_up(owner, response_id, before, ended)
        case "renew", response_ids, until:
            return await store.renew([(owner, response_id) for response_id in response_ids], until)
        case "unfinished", now:
            return set(await store.unfinished(now))
        case "purge", before, limit:
            return await purged(store, before, limit)
        case "create", talk_id, items, at:
            made = Conversation(talk_id, at, b"{}")
            return await store.create_conversation(owner, made, [ConversationItem(*item) for item in items])
        case "page", talk_id, limit, after, order:
            return await store.items(owner, talk_id, limit=limit, after=after, order=order)
        case name, *arguments:
            return await getattr(store, name)(owner, *arguments)


async def purged(store, before, limit):
    """In batches, after none of which a turn stands without a parent that it had before."""
    there = {(owner, turn.response_id): turn async for owner, turn in store.export()}
    total = 0
    while count := await store.purge(before, limit):
        assert count <= limit
        total += count
        now = {(owner, turn.response_id): turn async for owner, turn in store.export()}
        for (owner, _), turn in now.items():
            assert (owner, turn.parent_id) in now or (owner, turn.parent_id) not in there
        there = now
    return total


async def outcome(result):
    """What came back, or how it was refused."""
    try:
        return await result if asyncio.iscoroutine(result) else result()
    except (StoreUnavailable, NotAppended) as error:
        return type(error)


async def replay(kind, folder, history):
    async with made_place(kind, folder) as place:
        store = place.make(chain_turns_max=len(IDS), conversation_items_max=ITEMS_MAX)
        models = {owner: Model() for owner in OWNERS}
        for step, (owner, operation) in enumerate(history):
            wanted = await outcome(lambda owner=owner, operation=operation: expected(models, owner, operation))
            assert await outcome(said(store, owner, operation)) == wanted, (step, owner, operation)
        await require_equal(store, models)


async def require_equal(store, models):
    """Everything that can be read is what the model has, and there is nothing else."""
    there = {(owner, turn.response_id): turn async for owner, turn in store.export()}
    assert there == {(owner, key): turn for owner, model in models.items() for key, turn in model.turns.items()}
    info = await store.info()
    talks = [talk for model in models.values() for talk in model.talks.values()]
    assert (info.conversations, info.items) == (len(talks), sum(len(talk.items) for talk in talks))
    for owner, model in models.items():
        for response_id in IDS:
            assert await store.events(owner, response_id) == model.streams.get(response_id)
        for key in KEYS:
            assert await store.of_key(owner, key) == model.of_key(key)
        for talk_id in CONVERSATIONS:
            talk = model.talks.get(talk_id)
            assert await store.conversation(owner, talk_id) == (talk and talk.kept)
            assert await store.all_items(owner, talk_id) == model.all_items(talk_id)


@given(history=histories)
@settings(max_examples=200)
def test_histories_in_memory(history):
    """Every operation says what the model says, and at the end the same is there."""
    asyncio.run(replay("sqlite memory", None, history))


@pytest.mark.parametrize("kind", ["sqlite file", "postgres"])
@given(history=histories)
@settings(max_examples=20)
def test_histories_on_disk(kind, tmp_path_factory, history):
    """The same on a disk, and on a server."""
    asyncio.run(replay(kind, tmp_path_factory.mktemp("model"), history))
