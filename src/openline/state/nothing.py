"""The store that keeps nothing: `--store none`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Literal

from openline.state.store import (
    Appended,
    Conversation,
    ConversationItem,
    ItemPage,
    Key,
    KeyedTurn,
    NothingIsKept,
    StoredTurn,
    StoreInfo,
    UnknownConversation,
)


class NothingStore:
    """Takes every turn and forgets it, so a response lives as long as its connection."""

    def __repr__(self) -> str:
        return "<NothingStore>"

    async def open(self) -> None:
        """There is nothing to open."""

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
        """Accept the turn; it is not kept. A conversation that it would belong to is unknown."""
        del turn, events, key, replaces
        if appends is not None:
            await self.append(owner, appends)

    async def get(self, owner: str, response_id: str) -> StoredTurn | None:
        """None: every id is unknown."""
        del owner, response_id

    async def of_key(self, owner: str, key: str) -> KeyedTurn | None:
        """None: every key is unknown, but to the process that runs its turn."""
        del owner, key

    async def chain(self, owner: str, response_id: str) -> list[StoredTurn] | None:
        """None."""
        del owner, response_id

    async def events(self, owner: str, response_id: str) -> bytes | None:
        """None."""
        del owner, response_id

    async def delete(self, owner: str, response_id: str) -> bool:
        """False."""
        del owner, response_id
        return False

    async def renew(self, turns: Sequence[tuple[str, str]], until: int) -> int:
        """There is nothing to renew, and nobody else who could end a turn."""
        del until
        return len(turns)

    async def unfinished(self, now: int) -> list[tuple[str, StoredTurn]]:
        """None are."""
        del now
        return []

    async def give_up(self, owner: str, response_id: str, before: int, ended: StoredTurn | None) -> bool:
        """False."""
        del owner, response_id, before, ended
        return False

    async def used(self, owner: str, kept_id: str, at: int) -> None:
        """There is nothing to mark."""

    async def create_conversation(
        self, owner: str, conversation: Conversation, items: Sequence[ConversationItem] = ()
    ) -> None:
        """Refuse: a conversation that is forgotten at once is none."""
        del owner, conversation, items
        raise NothingIsKept("it keeps nothing (--store none), and so it has no conversations")

    async def conversation(self, owner: str, conversation_id: str) -> Conversation | None:
        """None."""
        del owner, conversation_id

    async def set_metadata(self, owner: str, conversation_id: str, metadata: bytes, at: int) -> bool:
        """False."""
        del owner, conversation_id, metadata, at
        return False

    async def delete_conversation(self, owner: str, conversation_id: str) -> bool:
        """False."""
        del owner, conversation_id
        return False

    async def append(self, owner: str, appended: Appended) -> None:
        """Refuse: every conversation is unknown."""
        del owner, appended
        raise UnknownConversation("there is no such conversation")

    async def items(
        self,
        owner: str,
        conversation_id: str,
        *,
        limit: int,
        after: str | None = None,
        order: Literal["asc", "desc"] = "asc",
    ) -> ItemPage | None:
        """None."""
        del owner, conversation_id, limit, after, order

    async def all_items(self, owner: str, conversation_id: str) -> list[ConversationItem] | None:
        """None."""
        del owner, conversation_id

    async def item(self, owner: str, conversation_id: str, item_id: str) -> ConversationItem | None:
        """None."""
        del owner, conversation_id, item_id

    async def delete_item(self, owner: str, conversation_id: str, item_id: str) -> bool:
        """False."""
        del owner, conversation_id, item_id
        return False

    async def purge(self, before: int, limit: int) -> int:
        """0."""
        del before, limit
        return 0

    async def info(self) -> StoreInfo:
        """Nothing at all."""
        return StoreInfo()

    async def export(self, owner: str | None = None) -> AsyncIterator[tuple[str, StoredTurn]]:
        """No row."""
        del owner
        for row in ():
            yield row

    async def conversations(self, owner: str | None = None) -> AsyncIterator[tuple[str, Conversation]]:
        """None."""
        del owner
        for row in ():
            yield row

    async def close(self) -> None:
        """Nothing to let go of."""
