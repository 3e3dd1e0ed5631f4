"""Turns and conversations in SQLite.

What must stay true: owner is part of every primary key, and of every query's WHERE but those of the whole store
(leases, retention, counting, export).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, Literal

from openline.state.migrations import MIGRATIONS
from openline.state.sqlite_file import LOCK_WAIT_SECONDS_MAX, WRITES_QUEUED_MAX, SqliteFile, Statement
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

_EXPORTED_AT_ONCE: Final = 50
_LONG_AGO: Final = -(2**63)
_KEY_TAKEN: Final = KeyTaken("this key stands for another turn")
_NOT_UNFINISHED: Final = NotUnfinished("it holds no unfinished turn with this id")
_TURN_KEPT_ALREADY: Final = AlreadyKept("it holds a turn with this id already")
_CONVERSATION_KEPT_ALREADY: Final = AlreadyKept("it holds a conversation with this id already")
_UNKNOWN_CONVERSATION: Final = UnknownConversation("there is no such conversation")
_DUPLICATE_ITEM: Final = DuplicateItem("the conversation holds an item with this id already")

# --- Turns ----------------------------------------------------------------------------------------

_PUT: Final = """
INSERT INTO turns (
    owner, response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (owner, response_id) DO UPDATE SET
    parent_id = excluded.parent_id, created_at = excluded.created_at, status = excluded.status,
    chainable = excluded.chainable, input = excluded.input, response = excluded.response,
    lease_until = excluded.lease_until, last_used_at = excluded.last_used_at
WHERE turns.lease_until IS NOT NULL
"""
_REPLACE: Final = """
UPDATE turns SET
    parent_id = ?3, created_at = ?4, status = ?5, chainable = ?6, input = ?7, response = ?8, lease_until = ?9,
    last_used_at = ?10
WHERE owner = ?1 AND response_id = ?2 AND lease_until IS NOT NULL
"""
_PUT_KEY: Final = """
INSERT INTO keys (owner, key, response_id, body_hash) VALUES (?, ?, ?, ?)
ON CONFLICT (owner, key) DO UPDATE SET body_hash = excluded.body_hash WHERE keys.response_id = excluded.response_id
"""
_PUT_EVENTS: Final = """
INSERT INTO events (owner, response_id, events) VALUES (?, ?, ?)
ON CONFLICT (owner, response_id) DO UPDATE SET events = excluded.events
"""
_GET: Final = """
SELECT response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
FROM turns WHERE owner = ? AND response_id = ?
"""
_OF_KEY: Final = """
SELECT k.body_hash, t.response_id, t.parent_id, t.created_at, t.status, t.chainable, t.input, t.response, t.lease_until,
    t.last_used_at
FROM keys AS k JOIN turns AS t ON t.owner = ?1 AND t.response_id = k.response_id WHERE k.owner = ?1 AND k.key = ?2
"""
# From the node to the root; where an ancestor is missing, another owner's or unchainable, it ends early. It is not
# sorted here, because SQLite would sort whole rows: that doubles the time. Read at some 4 µs a turn.
_CHAIN: Final = """
WITH RECURSIVE path (
    depth, response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
) AS (
    SELECT 0, response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
    FROM turns WHERE owner = ?1 AND response_id = ?2 AND chainable
    UNION ALL
    SELECT depth + 1, t.response_id, t.parent_id, t.created_at, t.status, t.chainable, t.input, t.response,
        t.lease_until, t.last_used_at
    FROM path JOIN turns AS t ON t.owner = ?1 AND t.response_id = path.parent_id AND t.chainable
    LIMIT ?3
)
SELECT response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at, depth
FROM path
"""
_depth: Final = itemgetter(9)
_EVENTS: Final = "SELECT events FROM events WHERE owner = ? AND response_id = ?"
_DELETE: Final = "DELETE FROM turns WHERE owner = ? AND response_id = ?"
_RENEW: Final = "UPDATE turns SET lease_until = ? WHERE owner = ? AND response_id = ? AND lease_until IS NOT NULL"
_UNFINISHED: Final = """
SELECT owner, response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at
FROM turns WHERE lease_until < ? ORDER BY lease_until LIMIT ?
"""
_REQUIRE_LOST: Final = """
UPDATE turns SET lease_until = lease_until WHERE owner = ? AND response_id = ? AND lease_until < ?
"""
_FREE_KEY: Final = "DELETE FROM keys WHERE owner = ? AND response_id = ?"
_USED: Final = """
UPDATE turns SET last_used_at = max(coalesce(last_used_at, created_at), ?3) WHERE owner = ?1 AND response_id = ?2
"""

# --- Conversations --------------------------------------------------------------------------------

_CREATE: Final = """
INSERT INTO conversations (owner, conversation_id, created_at, last_used_at, metadata) VALUES (?, ?, ?, ?, ?)
ON CONFLICT DO NOTHING
"""
_CONVERSATION: Final = """
SELECT conversation_id, created_at, metadata, last_used_at FROM conversations WHERE owner = ? AND conversation_id = ?
"""
_SET_METADATA: Final = """
UPDATE conversations SET metadata = ?3, last_used_at = max(last_used_at, ?4) WHERE owner = ?1 AND conversation_id = ?2
"""
_DELETE_CONVERSATION: Final = "DELETE FROM conversations WHERE owner = ? AND conversation_id = ?"
_TOUCH: Final = """
UPDATE conversations SET last_used_at = max(last_used_at, ?3) WHERE owner = ?1 AND conversation_id = ?2
"""
_ADD_ITEM: Final = """
INSERT INTO items (owner, conversation_id, item_id, raw) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING
"""
# Changes nothing but the count of changed rows, which is what says that there is room.
_REQUIRE_ROOM: Final = """
UPDATE conversations SET last_used_at = last_used_at WHERE owner = ?1 AND conversation_id = ?2
AND (SELECT count(*) FROM items WHERE owner = ?1 AND conversation_id = ?2) <= ?3
"""
# A conversation without items is one row without an item, an unknown one is no row. So is one without `after`.
_ITEMS: Final = """
SELECT i.item_id, i.raw
FROM conversations AS c
LEFT JOIN items AS at ON at.owner = ?1 AND at.conversation_id = ?2 AND at.item_id = ?3
LEFT JOIN items AS i ON i.owner = ?1 AND i.conversation_id = ?2 AND i.position {beyond} coalesce(at.position, {edge})
WHERE c.owner = ?1 AND c.conversation_id = ?2 AND (?3 IS NULL OR at.position IS NOT NULL)
ORDER BY i.position {direction} LIMIT ?4
"""
_PAGES: Final = {
    "asc": _ITEMS.format(beyond=">", edge=0, direction="ASC"),
    "desc": _ITEMS.format(beyond="<", edge=2**63 - 1, direction="DESC"),
}
_ITEM: Final = "SELECT item_id, raw FROM items WHERE owner = ? AND conversation_id = ? AND item_id = ?"
_DELETE_ITEM: Final = "DELETE FROM items WHERE owner = ? AND conversation_id = ? AND item_id = ?"

# --- The whole store ------------------------------------------------------------------------------

# The oldest of so many turns, the newest first, that were used before a time.
_LOOKED_AT: Final = """
SELECT coalesce(last_used_at, created_at) FROM turns WHERE coalesce(last_used_at, created_at) < ?
ORDER BY coalesce(last_used_at, created_at) DESC LIMIT 1 OFFSET ?
"""
# Leaves that nobody used, and from each on its ancestors, as long as nothing else continues them: children come first.
_PURGEABLE: Final = """
WITH RECURSIVE tail (owner, response_id, parent_id) AS (
    SELECT * FROM (
        SELECT leaf.owner, leaf.response_id, leaf.parent_id FROM turns AS leaf
        WHERE coalesce(leaf.last_used_at, leaf.created_at) >= ?3 AND coalesce(leaf.last_used_at, leaf.created_at) < ?4
        AND leaf.lease_until IS NULL AND NOT EXISTS (
            SELECT 1 FROM turns AS child WHERE child.owner = leaf.owner AND child.parent_id = leaf.response_id
        )
        LIMIT ?2
    )
    UNION ALL
    SELECT parent.owner, parent.response_id, parent.parent_id
    FROM tail JOIN turns AS parent ON parent.owner = tail.owner AND parent.response_id = tail.parent_id
    WHERE coalesce(parent.last_used_at, parent.created_at) < ?1 AND parent.lease_until IS NULL AND NOT EXISTS (
        SELECT 1 FROM turns AS child WHERE child.owner = parent.owner AND child.parent_id = parent.response_id
        AND child.response_id <> tail.response_id
    )
    LIMIT ?2
)
SELECT owner, response_id FROM tail
"""
# Checked again, because it was continued or used meanwhile, perhaps.
_PURGE: Final = """
DELETE FROM turns
WHERE owner = ? AND response_id = ? AND coalesce(last_used_at, created_at) < ?
AND NOT EXISTS (SELECT 1 FROM turns AS child WHERE child.owner = turns.owner AND child.parent_id = turns.response_id)
"""
_PURGE_CONVERSATIONS: Final = """
DELETE FROM conversations
WHERE rowid IN (SELECT rowid FROM conversations WHERE last_used_at < ? ORDER BY last_used_at LIMIT ?)
"""
_INFO: Final = """
SELECT
    (SELECT count(*) FROM (SELECT owner FROM turns UNION SELECT owner FROM conversations)),
    (SELECT count(*) FROM turns),
    (SELECT count(*) FROM turns WHERE lease_until IS NOT NULL),
    (SELECT count(*) FROM conversations),
    (SELECT count(*) FROM items),
    (SELECT page_count * page_size FROM pragma_page_count, pragma_page_size),
    (SELECT min(created_at) FROM turns),
    (SELECT max(created_at) FROM turns)
"""
_EXPORT: Final = """
SELECT owner, response_id, parent_id, created_at, status, chainable, input, response, lease_until, last_used_at, rowid
FROM turns WHERE rowid > ?1 AND (?2 IS NULL OR owner = ?2) ORDER BY rowid LIMIT ?3
"""
_EXPORT_CONVERSATIONS: Final = """
SELECT owner, conversation_id, created_at, metadata, last_used_at, rowid
FROM conversations WHERE rowid > ?1 AND (?2 IS NULL OR owner = ?2) ORDER BY rowid LIMIT ?3
"""


class SqliteStore:
    """A `Store` in one SQLite file, or in memory.

    A caller that is cancelled while it waits for a write only stops waiting: the
    write keeps its place and is committed.

    Args:
        path: the file; None is a database in memory.
        make: whether it is made, readable by its user alone, if there is none.
        writes_queued_max: how many writes may wait for the writer; one more is refused.
        chain_turns_max: a longer chain counts as broken.
        conversation_items_max: how many items a conversation may hold.
        lock_wait_seconds_max: how long a write waits for another program's lock.

    Raises:
        StoreUnavailable: it cannot be opened, is another program's, or a newer version wrote it.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        make: bool = True,
        writes_queued_max: int = WRITES_QUEUED_MAX,
        chain_turns_max: int = CHAIN_TURNS_MAX,
        conversation_items_max: int = CONVERSATION_ITEMS_MAX,
        lock_wait_seconds_max: float = LOCK_WAIT_SECONDS_MAX,
    ) -> None:
        self._chain_turns_max = chain_turns_max
        self._items_max = conversation_items_max
        self._file = SqliteFile(
            path, make=make, writes_queued_max=writes_queued_max, lock_wait_seconds_max=lock_wait_seconds_max
        )

    def __repr__(self) -> str:
        return f"<SqliteStore {self._file!r}>"

    async def open(self) -> None:
        """It is open since it was made. See `Store.open`."""

    async def close(self) -> None:
        """Commit what waits and let go of the file. See `Store.close`."""
        await self._file.close()

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
        kept = (_REPLACE, _NOT_UNFINISHED) if replaces else (_PUT, _TURN_KEPT_ALREADY)
        statements = [Statement(kept[0], turn.row(owner), kept[1])]
        if key is not None:
            statements.append(Statement(_PUT_KEY, (owner, key.key, turn.response_id, key.body_hash), _KEY_TAKEN))
        if events is not None:
            statements.append(Statement(_PUT_EVENTS, (owner, turn.response_id, events)))
        if appends is not None:
            statements += self._appending(owner, appends)
        await self._file.write(*statements)

    async def get(self, owner: str, response_id: str) -> StoredTurn | None:
        """One turn, or None. See `Store.get`."""
        rows = self._file.read(_GET, (owner, response_id))
        return _turn(rows[0]) if rows else None

    async def of_key(self, owner: str, key: str) -> KeyedTurn | None:
        """The turn that an idempotency key stands for, or None. See `Store.of_key`."""
        rows = self._file.read(_OF_KEY, (owner, key))
        return KeyedTurn(rows[0][0], _turn(rows[0][1:])) if rows else None

    async def chain(self, owner: str, response_id: str) -> list[StoredTurn] | None:
        """The turns from the chain's start to this one. See `Store.chain`."""
        rows = self._file.read(_CHAIN, (owner, response_id, self._chain_turns_max))
        rows.sort(key=_depth, reverse=True)
        turns = [_turn(row) for row in rows]
        return turns if turns and turns[0].parent_id is None else None

    async def events(self, owner: str, response_id: str) -> bytes | None:
        """The stream of events that was kept with a turn, or None. See `Store.events`."""
        rows = self._file.read(_EVENTS, (owner, response_id))
        return rows[0][0] if rows else None

    async def delete(self, owner: str, response_id: str) -> bool:
        """Forget a turn; False if there was none. See `Store.delete`."""
        return await self._changes(_DELETE, owner, response_id)

    async def renew(self, turns: Sequence[tuple[str, str]], until: int) -> int:
        """Extend the leases of unfinished turns. See `Store.renew`."""
        return await self._file.write(*(Statement(_RENEW, (until, *turn)) for turn in turns))

    async def unfinished(self, now: int) -> list[tuple[str, StoredTurn]]:
        """Turns whose lease has ended. See `Store.unfinished`."""
        return [(row[0], _turn(row[1:])) for row in self._file.read(_UNFINISHED, (now, UNFINISHED_MAX))]

    async def give_up(self, owner: str, response_id: str, before: int, ended: StoredTurn | None) -> bool:
        """End an unfinished turn that nobody runs any more. See `Store.give_up`."""
        which = (owner, response_id)
        if not can_be_id(*which):
            return False
        ending = Statement(_DELETE, which) if ended is None else Statement(_REPLACE, ended.row(owner))
        try:
            await self._file.write(
                Statement(_REQUIRE_LOST, (*which, before), _NOT_UNFINISHED), Statement(_FREE_KEY, which), ending
            )
        except NotUnfinished:
            return False
        return True

    async def used(self, owner: str, kept_id: str, at: int) -> None:
        """Mark a turn, and so the chain that leads to it, or a conversation, as used. See `Store.used`."""
        if can_be_id(owner, kept_id):
            which = (owner, kept_id, at)
            await self._file.write(Statement(_USED, which), Statement(_TOUCH, which))

    # --- Conversations ----------------------------------------------------------------------------

    async def create_conversation(
        self, owner: str, conversation: Conversation, items: Sequence[ConversationItem] = ()
    ) -> None:
        """Keep a new conversation and its first items. See `Store.create_conversation`."""
        at = conversation.created_at
        row = (owner, conversation.id, at, at, conversation.metadata)
        appending = self._appending(owner, Appended(conversation.id, tuple(items), at)) if items else []
        await self._file.write(Statement(_CREATE, row, _CONVERSATION_KEPT_ALREADY), *appending)

    async def conversation(self, owner: str, conversation_id: str) -> Conversation | None:
        """One conversation, or None. See `Store.conversation`."""
        rows = self._file.read(_CONVERSATION, (owner, conversation_id))
        return Conversation(*rows[0]) if rows else None

    async def set_metadata(self, owner: str, conversation_id: str, metadata: bytes, at: int) -> bool:
        """Replace a conversation's metadata. See `Store.set_metadata`."""
        return await self._changes(_SET_METADATA, owner, conversation_id, metadata, at)

    async def delete_conversation(self, owner: str, conversation_id: str) -> bool:
        """Forget a conversation and its items. See `Store.delete_conversation`."""
        return await self._changes(_DELETE_CONVERSATION, owner, conversation_id)

    async def append(self, owner: str, appended: Appended) -> None:
        """Add items to a conversation's end. See `Store.append`."""
        if not can_be_id(appended.conversation_id):
            raise UnknownConversation(*_UNKNOWN_CONVERSATION.args)
        await self._file.write(*self._appending(owner, appended))

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
        items = _items(self._file.read(_PAGES[order], (owner, conversation_id, after, limit + 1)))
        return None if items is None else ItemPage(items[:limit], len(items) > limit)

    async def all_items(self, owner: str, conversation_id: str) -> list[ConversationItem] | None:
        """Every item in the order of their addition. See `Store.all_items`."""
        return _items(self._file.read(_PAGES["asc"], (owner, conversation_id, None, -1)))

    async def item(self, owner: str, conversation_id: str, item_id: str) -> ConversationItem | None:
        """One item, or None. See `Store.item`."""
        rows = self._file.read(_ITEM, (owner, conversation_id, item_id))
        return ConversationItem(*rows[0]) if rows else None

    async def delete_item(self, owner: str, conversation_id: str, item_id: str) -> bool:
        """Forget an item; False if there was none. See `Store.delete_item`."""
        return await self._changes(_DELETE_ITEM, owner, conversation_id, item_id)

    def _appending(self, owner: str, appended: Appended) -> list[Statement]:
        whose = (owner, appended.conversation_id)
        full = ConversationFull(f"the conversation cannot hold more than {self._items_max} items")
        return [
            Statement(_TOUCH, (*whose, appended.at), _UNKNOWN_CONVERSATION),
            *(Statement(_ADD_ITEM, (*whose, item.id, item.raw), _DUPLICATE_ITEM) for item in appended.items),
            Statement(_REQUIRE_ROOM, (*whose, self._items_max), full),
        ]

    # --- Looking after it -------------------------------------------------------------------------

    async def purge(self, before: int, limit: int) -> int:
        """Delete what was made and last used before a time. See `Store.purge`."""
        found = await self._purgeable(before, limit)
        purging = [Statement(_PURGE, (owner, response_id, before)) for owner, response_id in found]
        turns = await self._file.write(*purging) if purging else 0
        if turns == limit:
            return turns
        return turns + await self._file.write(Statement(_PURGE_CONVERSATIONS, (before, limit - turns)))

    async def _purgeable(self, before: int, limit: int) -> list[Any]:
        """What can go. The search may go over all that is old, and so not on the thread that others wait for."""
        until = before
        while True:
            oldest = await self._file.read_apart(_LOOKED_AT, (until, LOOKED_AT_ONCE - 1))
            since = oldest[0][0] if oldest else _LONG_AGO
            found = await self._file.read_apart(_PURGEABLE, (before, limit, since, until))
            if found or not oldest:
                return found
            until = since

    async def info(self) -> StoreInfo:
        """What it holds. See `Store.info`."""
        ((owners, turns, unfinished, conversations, items, size, oldest, newest),) = await self._file.read_apart(
            _INFO, ()
        )
        return StoreInfo(
            schema=len(MIGRATIONS),
            owners=owners,
            turns=turns,
            unfinished=unfinished,
            conversations=conversations,
            items=items,
            bytes=size,
            oldest=oldest,
            newest=newest,
        )

    async def export(self, owner: str | None = None) -> AsyncIterator[tuple[str, StoredTurn]]:
        """Every turn. See `Store.export`."""
        async for row in self._every_row(_EXPORT, owner):
            yield row[0], _turn(row[1:])

    async def conversations(self, owner: str | None = None) -> AsyncIterator[tuple[str, Conversation]]:
        """Every conversation. See `Store.conversations`."""
        async for row in self._every_row(_EXPORT_CONVERSATIONS, owner):
            yield row[0], Conversation(*row[1:-1])

    async def _every_row(self, sql: str, owner: str | None) -> AsyncIterator[Any]:
        row_id = 0
        while rows := await self._file.read_apart(sql, (row_id, owner, _EXPORTED_AT_ONCE)):
            for row in rows:
                yield row
            row_id = rows[-1][-1]

    async def _changes(self, sql: str, *parameters: Any) -> bool:
        """Whether a write found its row."""
        if not can_be_id(*(each for each in parameters if isinstance(each, str))):
            return False
        return await self._file.write(Statement(sql, parameters)) > 0


def _turn(row: Any) -> StoredTurn:
    return StoredTurn(
        response_id=row[0],
        parent_id=row[1],
        created_at=row[2],
        status=row[3],
        chainable=bool(row[4]),
        input=row[5],
        response=row[6],
        lease_until=row[7],
        last_used_at=row[8],
    )


def _items(rows: list[Any]) -> list[ConversationItem] | None:
    """The items of a page's rows; None if there is no such conversation, or not what the page follows."""
    if not rows:
        return None
    return [ConversationItem(*row) for row in rows if row[0] is not None]
