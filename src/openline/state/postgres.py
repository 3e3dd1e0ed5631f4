"""Turns and conversations in PostgreSQL: one store for many processes and nodes.

What must stay true: owner is part of every primary key, and of every query's WHERE but those of the whole store
(leases, retention, counting, export). Every query is written here; whatever comes from outside is a parameter.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, Literal, TypeVar

from openline.state.postgres_migrations import MIGRATIONS
from openline.state.postgres_pool import CALL_SECONDS_MAX, CALLS_WAITING_MAX, DOUBT_SECONDS_MAX, Pool
from openline.state.store import (
    CHAIN_TURNS_MAX,
    CONVERSATION_ITEMS_MAX,
    LOOKED_AT_ONCE,
    UNFINISHED_MAX,
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
    NotUnfinished,
    StoredTurn,
    StoreInfo,
    UnknownConversation,
    can_be_id,
)

T = TypeVar("T")

# What goes over the whole store takes its time, and holds nobody up.
_SLOW_CALL_SECONDS_MAX: Final = 600.0
_EXPORTED_AT_ONCE: Final = 50
_LONG_AGO: Final = -(2**63)

# --- Turns ----------------------------------------------------------------------------------------

_PUT: Final = """
INSERT INTO openline_turns (
    owner, response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
ON CONFLICT (owner, response_id) DO UPDATE SET
    parent_id = excluded.parent_id, created_at = excluded.created_at, status = excluded.status,
    chainable = excluded.chainable, input = excluded.input, response = excluded.response,
    lease_until = excluded.lease_until, last_used_at = excluded.last_used_at
WHERE openline_turns.lease_until IS NOT NULL
"""
_REPLACE: Final = """
UPDATE openline_turns SET
    parent_id = $3, created_at = $4, status = $5, chainable = $6, input = $7, response = $8, lease_until = $9,
    last_used_at = $10
WHERE owner = $1 AND response_id = $2 AND lease_until IS NOT NULL
"""
_PUT_KEY: Final = """
INSERT INTO openline_keys (owner, key, response_id, body_hash) VALUES ($1, $2, $3, $4)
ON CONFLICT (owner, key) DO UPDATE SET body_hash = excluded.body_hash
WHERE openline_keys.response_id = excluded.response_id
"""
_PUT_EVENTS: Final = """
INSERT INTO openline_events (owner, response_id, events) VALUES ($1, $2, $3)
ON CONFLICT (owner, response_id) DO UPDATE SET events = excluded.events
"""
_RESPONSE: Final = "SELECT response FROM openline_turns WHERE owner = $1 AND response_id = $2"
_GET: Final = """
SELECT response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
FROM openline_turns WHERE owner = $1 AND response_id = $2
"""
_OF_KEY: Final = """
SELECT body_hash, turn.response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
FROM openline_keys AS named JOIN openline_turns AS turn ON turn.owner = $1 AND turn.response_id = named.response_id
WHERE named.owner = $1 AND key = $2
"""
# From the node to the root; where an ancestor is missing, another owner's or unchainable, it ends early.
_CHAIN: Final = """
WITH RECURSIVE path AS (
    SELECT 1 AS depth, response_id, parent_id
    FROM openline_turns WHERE owner = $1 AND response_id = $2 AND chainable
    UNION ALL
    SELECT depth + 1, turn.response_id, turn.parent_id
    FROM path JOIN openline_turns AS turn
    ON turn.owner = $1 AND turn.response_id = path.parent_id AND turn.chainable
    WHERE depth < $3
)
SELECT turn.response_id, turn.parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
FROM path JOIN openline_turns AS turn ON turn.owner = $1 AND turn.response_id = path.response_id
ORDER BY depth DESC
"""
_EVENTS: Final = "SELECT events FROM openline_events WHERE owner = $1 AND response_id = $2"
_DELETE: Final = "DELETE FROM openline_turns WHERE owner = $1 AND response_id = $2"
_RENEW: Final = """
UPDATE openline_turns AS turn SET lease_until = $3
FROM unnest($1::text[], $2::text[]) AS named (owner, response_id)
WHERE turn.owner = named.owner AND turn.response_id = named.response_id AND turn.lease_until IS NOT NULL
"""
_UNFINISHED: Final = """
SELECT owner, response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
FROM openline_turns WHERE lease_until < $1 ORDER BY lease_until LIMIT $2
"""
_TAKE_LOST: Final = """
SELECT 1 FROM openline_turns WHERE owner = $1 AND response_id = $2 AND lease_until < $3 FOR UPDATE
"""
_FREE_KEY: Final = "DELETE FROM openline_keys WHERE owner = $1 AND response_id = $2"
_USED: Final = """
WITH conversation AS (
    UPDATE openline_conversations SET last_used_at = greatest(last_used_at, $3)
    WHERE owner = $1 AND conversation_id = $2
)
UPDATE openline_turns SET last_used_at = greatest(coalesce(last_used_at, created_at), $3)
WHERE owner = $1 AND response_id = $2
"""

# --- Conversations --------------------------------------------------------------------------------

_CREATE: Final = """
INSERT INTO openline_conversations (owner, conversation_id, created_at, last_used_at, metadata)
VALUES ($1, $2, $3, $3, $4) ON CONFLICT DO NOTHING
"""
_CONVERSATION: Final = """
SELECT conversation_id, created_at, metadata, last_used_at
FROM openline_conversations WHERE owner = $1 AND conversation_id = $2
"""
_SET_METADATA: Final = """
UPDATE openline_conversations SET metadata = $3, last_used_at = greatest(last_used_at, $4)
WHERE owner = $1 AND conversation_id = $2
"""
_DELETE_CONVERSATION: Final = "DELETE FROM openline_conversations WHERE owner = $1 AND conversation_id = $2"
_TOUCH: Final = """
UPDATE openline_conversations SET last_used_at = greatest(last_used_at, $3)
WHERE owner = $1 AND conversation_id = $2
"""
_ADD_ITEMS: Final = """
INSERT INTO openline_items (owner, conversation_id, item_id, raw)
SELECT $1, $2, item_id, raw
FROM unnest($3::text[], $4::bytea[]) WITH ORDINALITY AS added (item_id, raw, number) ORDER BY number
ON CONFLICT DO NOTHING
"""
_COUNT_ITEMS: Final = "SELECT count(*) FROM openline_items WHERE owner = $1 AND conversation_id = $2"
# A conversation without items is one row without an item, an unknown one is no row. So is one without `after`.
_ITEMS: Final = """
SELECT i.item_id, i.raw
FROM openline_conversations AS c
LEFT JOIN openline_items AS at ON at.owner = $1 AND at.conversation_id = $2 AND at.item_id = $3::text
LEFT JOIN openline_items AS i ON i.owner = $1 AND i.conversation_id = $2
AND i.position {beyond} coalesce(at.position, {edge})
WHERE c.owner = $1 AND c.conversation_id = $2 AND ($3::text IS NULL OR at.position IS NOT NULL)
ORDER BY i.position {direction} LIMIT $4
"""
_PAGES: Final = {
    "asc": _ITEMS.format(beyond=">", edge=0, direction="ASC"),
    "desc": _ITEMS.format(beyond="<", edge=2**63 - 1, direction="DESC"),
}
_ITEM: Final = """
SELECT item_id, raw FROM openline_items WHERE owner = $1 AND conversation_id = $2 AND item_id = $3
"""
_DELETE_ITEM: Final = "DELETE FROM openline_items WHERE owner = $1 AND conversation_id = $2 AND item_id = $3"

# --- The whole store ------------------------------------------------------------------------------

_UNHURRIED: Final = "SET LOCAL statement_timeout = 0"
_PURGE_LOCK: Final = "SELECT pg_advisory_xact_lock(1330662479, hashtext(current_schema()))"
# The oldest of so many turns, the newest first, that were used before a time.
_LOOKED_AT: Final = """
SELECT coalesce(last_used_at, created_at) FROM openline_turns WHERE coalesce(last_used_at, created_at) < $1
ORDER BY coalesce(last_used_at, created_at) DESC LIMIT 1 OFFSET $2
"""
# Leaves that nobody used, and from each on its ancestors, as long as nothing else continues them: children come first.
_PURGEABLE: Final = """
WITH RECURSIVE tail AS (
    (
        SELECT 1 AS height, leaf.owner, leaf.response_id, leaf.parent_id FROM openline_turns AS leaf
        WHERE coalesce(leaf.last_used_at, leaf.created_at) >= $3 AND coalesce(leaf.last_used_at, leaf.created_at) < $4
        AND leaf.lease_until IS NULL AND NOT EXISTS (
            SELECT 1 FROM openline_turns AS child
            WHERE child.owner = leaf.owner AND child.parent_id = leaf.response_id
        )
        LIMIT $2
    )
    UNION ALL
    SELECT height + 1, parent.owner, parent.response_id, parent.parent_id
    FROM tail JOIN openline_turns AS parent ON parent.owner = tail.owner AND parent.response_id = tail.parent_id
    WHERE height < $2
    AND coalesce(parent.last_used_at, parent.created_at) < $1 AND parent.lease_until IS NULL AND NOT EXISTS (
        SELECT 1 FROM openline_turns AS child
        WHERE child.owner = parent.owner AND child.parent_id = parent.response_id
        AND child.response_id <> tail.response_id
    )
)
SELECT owner, response_id FROM tail ORDER BY height LIMIT $2
"""
# One by one, each sees what those before it did. Checked again, because it was continued or used meanwhile, perhaps.
_PURGE: Final = """
DELETE FROM openline_turns AS turn
WHERE owner = $1 AND response_id = $2 AND coalesce(last_used_at, created_at) < $3
AND NOT EXISTS (
    SELECT 1 FROM openline_turns AS child WHERE child.owner = turn.owner AND child.parent_id = turn.response_id
)
"""
_COUNT_LEFT: Final = """
SELECT count(*) FROM openline_turns AS turn
JOIN unnest($1::text[], $2::text[]) AS named (owner, response_id)
ON turn.owner = named.owner AND turn.response_id = named.response_id
"""
_PURGE_CONVERSATIONS: Final = """
DELETE FROM openline_conversations WHERE last_used_at < $1 AND (owner, conversation_id) IN (
    SELECT owner, conversation_id FROM openline_conversations WHERE last_used_at < $1 LIMIT $2
)
"""
_INFO: Final = """
SELECT
    (SELECT count(*) FROM (SELECT owner FROM openline_turns UNION SELECT owner FROM openline_conversations) AS owners),
    (SELECT count(*) FROM openline_turns),
    (SELECT count(*) FROM openline_turns WHERE lease_until IS NOT NULL),
    (SELECT count(*) FROM openline_conversations),
    (SELECT count(*) FROM openline_items),
    pg_total_relation_size('openline_turns') + pg_total_relation_size('openline_events')
        + pg_total_relation_size('openline_keys') + pg_total_relation_size('openline_conversations')
        + pg_total_relation_size('openline_items'),
    (SELECT min(created_at) FROM openline_turns),
    (SELECT max(created_at) FROM openline_turns)
"""
_EXPORT: Final = """
SELECT owner, response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
FROM openline_turns WHERE (owner, response_id) > ($1, $2) AND ($3::text IS NULL OR owner = $3)
ORDER BY owner, response_id LIMIT $4
"""
_EXPORT_CONVERSATIONS: Final = """
SELECT owner, conversation_id, created_at, metadata, last_used_at
FROM openline_conversations WHERE (owner, conversation_id) > ($1, $2) AND ($3::text IS NULL OR owner = $3)
ORDER BY owner, conversation_id LIMIT $4
"""


class PostgresStore:
    """A `Store` in a PostgreSQL database. It connects when it is opened, or first called.

    A caller that is cancelled while it waits for a write only stops waiting: the write goes on.

    Args:
        url: `postgresql://USER:PASSWORD@HOST:PORT/DATABASE`; `?search_path=NAME` is the schema for its tables.
        pool_connections_max: how many connections it makes at most.
        call_seconds_max: how long a call may take, after which it fails.
        doubt_seconds_max: for how long a write whose connection was lost is begun again, to learn whether it was kept.
        calls_waiting_max: how many calls may be under way or wait for a connection; one more is refused.
        chain_turns_max: a longer chain counts as broken.
        conversation_items_max: how many items a conversation may hold.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_connections_max: int,
        call_seconds_max: float = CALL_SECONDS_MAX,
        doubt_seconds_max: float = DOUBT_SECONDS_MAX,
        calls_waiting_max: int = CALLS_WAITING_MAX,
        chain_turns_max: int = CHAIN_TURNS_MAX,
        conversation_items_max: int = CONVERSATION_ITEMS_MAX,
    ) -> None:
        self._chain_turns_max = chain_turns_max
        self._items_max = conversation_items_max
        self._pool = Pool(
            url,
            connections_max=pool_connections_max,
            call_seconds_max=call_seconds_max,
            doubt_seconds_max=doubt_seconds_max,
            calls_waiting_max=calls_waiting_max,
        )

    def __repr__(self) -> str:
        return f"<PostgresStore {self._pool!r}>"

    async def open(self) -> None:
        """Connect, and bring the tables to the newest schema. See `Store.open`."""
        await self._pool.call(_nothing)

    async def close(self) -> None:
        """Let what runs end, and let go of the connections. See `Store.close`."""
        await self._pool.close()

    # --- Turns ------------------------------------------------------------------------------------

    async def put(
        self,
        owner: str,
        turn: StoredTurn,
        *,
        events: bytes | None = None,
        appends: Appended | None = None,
        key: Key | None = None,
        replaces: bool = False,
    ) -> None:
        """Keep a turn, and all that comes with it. See `Store.put`."""
        put = _replace if replaces else _put

        async def put_all(connection: Any) -> None:
            await put(connection, owner, turn)
            if key is not None:
                await _put_key(connection, owner, turn.response_id, key)
            if events is not None:
                await connection.execute(_PUT_EVENTS, owner, turn.response_id, events)
            if appends is not None:
                await self._append(connection, owner, appends)

        async def put_again(connection: Any) -> None:
            try:
                async with connection.transaction():
                    await put_all(connection)
            except (AlreadyKept, NotUnfinished):
                if await connection.fetchval(_RESPONSE, owner, turn.response_id) != turn.response:
                    raise

        if events is None and appends is None and key is None:
            await self._pool.call(lambda connection: put(connection, owner, turn), again=put_again)
        else:
            await self._pool.call(_in_transaction(put_all), again=put_again)

    async def get(self, owner: str, response_id: str) -> StoredTurn | None:
        """One turn, or None. See `Store.get`."""
        rows = await self._rows(_GET, owner, response_id)
        return _turn(rows[0]) if rows else None

    async def of_key(self, owner: str, key: str) -> KeyedTurn | None:
        """The turn that an idempotency key stands for, or None. See `Store.of_key`."""
        rows = await self._rows(_OF_KEY, owner, key)
        return KeyedTurn(rows[0][0], _turn(rows[0][1:])) if rows else None

    async def chain(self, owner: str, response_id: str) -> list[StoredTurn] | None:
        """The turns from the chain's start to this one. See `Store.chain`."""
        turns = [_turn(row) for row in await self._rows(_CHAIN, owner, response_id, self._chain_turns_max)]
        return turns if turns and turns[0].parent_id is None else None

    async def events(self, owner: str, response_id: str) -> bytes | None:
        """The stream of events that was kept with a turn, or None. See `Store.events`."""
        rows = await self._rows(_EVENTS, owner, response_id)
        return rows[0][0] if rows else None

    async def delete(self, owner: str, response_id: str) -> bool:
        """Forget a turn; False if there was none. See `Store.delete`."""
        return await self._changes(_DELETE, owner, response_id)

    async def renew(self, turns: Sequence[tuple[str, str]], until: int) -> int:
        """Extend the leases of unfinished turns. See `Store.renew`."""
        owners, ids = [owner for owner, _ in turns], [response_id for _, response_id in turns]
        return await self._count_changes(_RENEW, owners, ids, until)

    async def unfinished(self, now: int) -> list[tuple[str, StoredTurn]]:
        """Turns whose lease has ended. See `Store.unfinished`."""
        return [(row[0], _turn(row[1:])) for row in await self._rows(_UNFINISHED, now, UNFINISHED_MAX)]

    async def give_up(self, owner: str, response_id: str, before: int, ended: StoredTurn | None) -> bool:
        """End an unfinished turn that nobody runs any more. See `Store.give_up`."""
        if not can_be_id(owner, response_id):
            return False

        async def give_up(connection: Any) -> bool:
            if await connection.fetchval(_TAKE_LOST, owner, response_id, before) is None:
                return False
            await connection.execute(_FREE_KEY, owner, response_id)
            if ended is None:
                await connection.execute(_DELETE, owner, response_id)
            else:
                await _replace(connection, owner, ended)
            return True

        return await self._pool.call(_in_transaction(give_up))

    async def used(self, owner: str, kept_id: str, at: int) -> None:
        """Mark a turn, and so the chain that leads to it, or a conversation, as used. See `Store.used`."""
        await self._changes(_USED, owner, kept_id, at)

    # --- Conversations ----------------------------------------------------------------------------

    async def create_conversation(
        self, owner: str, conversation: Conversation, items: Sequence[ConversationItem] = ()
    ) -> None:
        """Keep a new conversation and its first items. See `Store.create_conversation`."""
        at = conversation.created_at

        async def create(connection: Any) -> None:
            row = (owner, conversation.id, at, conversation.metadata)
            if _count(await connection.execute(_CREATE, *row)) == 0:
                raise AlreadyKept("it holds a conversation with this id already")
            if items:
                await self._append(connection, owner, Appended(conversation.id, tuple(items), at))

        async def create_again(connection: Any) -> None:
            with suppress(AlreadyKept):  # it was: nobody else can have made this id
                await _in_transaction(create)(connection)

        await self._pool.call(_in_transaction(create), again=create_again)

    async def conversation(self, owner: str, conversation_id: str) -> Conversation | None:
        """One conversation, or None. See `Store.conversation`."""
        rows = await self._rows(_CONVERSATION, owner, conversation_id)
        return Conversation(*rows[0]) if rows else None

    async def set_metadata(self, owner: str, conversation_id: str, metadata: bytes, at: int) -> bool:
        """Replace a conversation's metadata. See `Store.set_metadata`."""
        return await self._changes(_SET_METADATA, owner, conversation_id, metadata, at)

    async def delete_conversation(self, owner: str, conversation_id: str) -> bool:
        """Forget a conversation and its items. See `Store.delete_conversation`."""
        return await self._changes(_DELETE_CONVERSATION, owner, conversation_id)

    async def append(self, owner: str, appended: Appended) -> None:
        """Add items to a conversation's end. See `Store.append`."""

        async def append(connection: Any) -> None:
            await self._append(connection, owner, appended)

        async def append_again(connection: Any) -> None:
            try:
                await _in_transaction(append)(connection)
            except DuplicateItem:
                first = appended.items[0]
                row = await connection.fetchrow(_ITEM, owner, appended.conversation_id, first.id)
                if row is None or row["raw"] != first.raw:
                    raise

        await self._pool.call(_in_transaction(append), again=append_again)

    async def items(
        self,
        owner: str,
        conversation_id: str,
        *,
        limit: int,
        after: str | None = None,
        order: Literal["asc", "desc"] = "asc",
    ) -> ItemPage | None:
        """A page of a conversation's items. See `Store.items`."""
        items = _items(await self._rows(_PAGES[order], owner, conversation_id, after, limit + 1))
        return None if items is None else ItemPage(items[:limit], len(items) > limit)

    async def all_items(self, owner: str, conversation_id: str) -> list[ConversationItem] | None:
        """Every item in the order of their addition. See `Store.all_items`."""
        return _items(await self._rows(_PAGES["asc"], owner, conversation_id, None, None))

    async def item(self, owner: str, conversation_id: str, item_id: str) -> ConversationItem | None:
        """One item, or None. See `Store.item`."""
        rows = await self._rows(_ITEM, owner, conversation_id, item_id)
        return ConversationItem(*rows[0]) if rows else None

    async def delete_item(self, owner: str, conversation_id: str, item_id: str) -> bool:
        """Forget an item; False if there was none. See `Store.delete_item`."""
        return await self._changes(_DELETE_ITEM, owner, conversation_id, item_id)

    async def _append(self, connection: Any, owner: str, appended: Appended) -> None:
        """In a transaction. The conversation's row is taken first, and so whoever adds to it as well waits."""
        whose = (owner, appended.conversation_id)
        if not can_be_id(*whose) or _count(await connection.execute(_TOUCH, *whose, appended.at)) == 0:
            raise UnknownConversation("there is no such conversation")
        ids, raws = [item.id for item in appended.items], [item.raw for item in appended.items]
        if _count(await connection.execute(_ADD_ITEMS, *whose, ids, raws)) < len(ids):
            raise DuplicateItem("the conversation holds an item with this id already")
        if await connection.fetchval(_COUNT_ITEMS, *whose) > self._items_max:
            raise ConversationFull(f"the conversation cannot hold more than {self._items_max} items")

    # --- Looking after it -------------------------------------------------------------------------

    async def purge(self, before: int, limit: int) -> int:
        """Delete what was made and last used before a time. See `Store.purge`."""

        async def purge(connection: Any) -> int:
            await connection.execute(_PURGE_LOCK)  # two at once would take each other's rows
            found = await _purgeable(connection, before, limit)
            await connection.executemany(_PURGE, [(*row, before) for row in found])
            left = await connection.fetchval(_COUNT_LEFT, [row[0] for row in found], [row[1] for row in found])
            turns = len(found) - left
            return turns + _count(await connection.execute(_PURGE_CONVERSATIONS, before, limit - turns))

        return await self._unhurried(purge)

    async def info(self) -> StoreInfo:
        """What it holds. See `Store.info`."""
        row = await self._unhurried(lambda connection: connection.fetchrow(_INFO))
        return StoreInfo(len(MIGRATIONS), *row)

    async def export(self, owner: str | None = None) -> AsyncIterator[tuple[str, StoredTurn]]:
        """Every turn. See `Store.export`."""
        async for row in self._every_row(_EXPORT, owner):
            yield row[0], _turn(row[1:])

    async def conversations(self, owner: str | None = None) -> AsyncIterator[tuple[str, Conversation]]:
        """Every conversation. See `Store.conversations`."""
        async for row in self._every_row(_EXPORT_CONVERSATIONS, owner):
            yield row[0], Conversation(*row[1:])

    async def _every_row(self, sql: str, owner: str | None) -> AsyncIterator[Any]:
        last = ("", "")
        while rows := await self._rows(sql, *last, owner, _EXPORTED_AT_ONCE):
            for row in rows:
                yield tuple(row)
            last = (rows[-1][0], rows[-1][1])

    # --- Asking -----------------------------------------------------------------------------------

    async def _rows(self, sql: str, *parameters: Any) -> list[Any]:
        if not _may_be_known(parameters):
            return []
        return await self._pool.call(lambda connection: connection.fetch(sql, *parameters))

    async def _changes(self, sql: str, *parameters: Any) -> bool:
        """Whether a write found its row."""
        return await self._count_changes(sql, *parameters) > 0

    async def _count_changes(self, sql: str, *parameters: Any) -> int:
        """How many rows a write found."""
        if not _may_be_known(parameters):
            return 0
        return _count(await self._pool.call(lambda connection: connection.execute(sql, *parameters)))

    async def _unhurried(self, work: Callable[[Any], Awaitable[T]]) -> T:
        async def unhurried(connection: Any) -> T:
            await connection.execute(_UNHURRIED)
            return await work(connection)

        return await self._pool.call(_in_transaction(unhurried), seconds_max=_SLOW_CALL_SECONDS_MAX)


def _in_transaction(work: Callable[[Any], Awaitable[T]]) -> Callable[[Any], Awaitable[T]]:
    async def in_transaction(connection: Any) -> T:
        async with connection.transaction():
            return await work(connection)

    return in_transaction


async def _nothing(connection: Any) -> None:
    del connection


async def _put(connection: Any, owner: str, turn: StoredTurn) -> None:
    if _count(await connection.execute(_PUT, *turn.row(owner))) == 0:
        raise AlreadyKept("it holds a turn with this id already")


async def _replace(connection: Any, owner: str, turn: StoredTurn) -> None:
    if _count(await connection.execute(_REPLACE, *turn.row(owner))) == 0:
        raise NotUnfinished("it holds no unfinished turn with this id")


async def _put_key(connection: Any, owner: str, response_id: str, key: Key) -> None:
    if _count(await connection.execute(_PUT_KEY, owner, key.key, response_id, key.body_hash)) == 0:
        raise KeyTaken("this key stands for another turn")


async def _purgeable(connection: Any, before: int, limit: int) -> list[Any]:
    until = before
    while True:
        oldest = await connection.fetchval(_LOOKED_AT, until, LOOKED_AT_ONCE - 1)
        since = _LONG_AGO if oldest is None else oldest
        found = await connection.fetch(_PURGEABLE, before, limit, since, until)
        if found or oldest is None:
            return found
        until = oldest


def _count(said: str) -> int:
    """The rows that a statement changed: PostgreSQL says `UPDATE 3`, or `INSERT 0 3`."""
    return int(said.rpartition(" ")[2])


def _may_be_known(parameters: tuple[Any, ...]) -> bool:
    return can_be_id(*(each for each in parameters if isinstance(each, str)))


def _turn(row: Any) -> StoredTurn:
    return StoredTurn(*row)


def _items(rows: list[Any]) -> list[ConversationItem] | None:
    """The items of a page's rows; None if there is no such conversation, or not what the page follows."""
    if not rows:
        return None
    return [ConversationItem(*row) for row in rows if row[0] is not None]
