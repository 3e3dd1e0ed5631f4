"""The seam to what survives a restart."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, Literal, Protocol

import msgspec

from openline.protocol.errors import ProtocolError

CHAIN_TURNS_MAX: Final = 10_000  # a longer one counts as broken; it also ends a circle, which only damage makes
CONVERSATION_ITEMS_MAX: Final = 10_000  # they are read at once, for a turn's context
# A purge searches turns for leaves in portions, the newest first, as those that have just become old are there. Below
# them may be any number that is old and stays, because something new goes on from it.
LOOKED_AT_ONCE: Final = 2000
UNFINISHED_MAX: Final = 256  # turns that one call of `unfinished` gives; the next call gives more


class StoreUnavailable(Exception):  # noqa: N818 - a state of the store
    """The store cannot be read or written now; the message says why, without content."""


class AlreadyKept(StoreUnavailable):
    """A finished turn, or a conversation, of this id is kept: it stays as it is."""


class KeyTaken(StoreUnavailable):
    """This idempotency key stands for another turn."""


class NotUnfinished(StoreUnavailable):
    """No unfinished turn of this id is there: it was ended or deleted meanwhile."""


class NothingIsKept(StoreUnavailable):
    """This store keeps nothing, on purpose, and so has no conversations."""


class NotAppended(Exception):  # noqa: N818 - a state of the conversation
    """Items were not added to a conversation; the message says why, without content."""


class UnknownConversation(NotAppended):
    """There is no such conversation, or it is another owner's."""


class DuplicateItem(NotAppended):
    """An item's id is taken in this conversation."""


class ConversationFull(NotAppended):
    """It would hold more than `CONVERSATION_ITEMS_MAX` items."""


def store_unavailable(error: StoreUnavailable) -> ProtocolError:
    """What the client is told."""
    return ProtocolError("store_unavailable", f"The store cannot be used now: {error}.", headers={"retry-after": "1"})


def without_secrets(url: str) -> str:
    """A store's SPEC for people: of a server's URL no name, password or options, only where the database is."""
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        return url
    server, mark, more = re.split(r"([/?#]|\Z)", rest, maxsplit=1)
    if "@" in more or "#" in rest:  # a password with a character that should have been escaped may be anywhere
        return f"{scheme}://…"
    path = more.partition("?")[0] if mark == "/" else ""
    return f"{scheme}://{server.rpartition('@')[2]}/{path}"


def can_be_id(*texts: str) -> bool:
    """Whether every store can keep these as ids: no NUL, no lone surrogate. Anything else is unknown without a look."""
    try:
        return not any(b"\0" in text.encode() for text in texts)
    except UnicodeEncodeError:
        return False


class StoredTurn(msgspec.Struct, frozen=True):
    """One turn as a row: its own items and its parent's id, never the history.

    Attributes:
        response_id: ours, unguessable.
        parent_id: the turn it continues, None at a chain's start.
        created_at: Unix seconds.
        status: the response's final status; `queued` or `in_progress` while it is unfinished.
        chainable: whether other turns may continue it by id: not after a failure, nor below an unstored ancestor.
        input: the turn's own input items, a JSON array.
        response: the response object, its output included, as JSON.
        lease_until: Unix seconds, while it is unfinished: until then its process is taken to be alive.
        last_used_at: Unix seconds; None if it was not marked as used since it was made.
    """

    response_id: str
    parent_id: str | None
    created_at: int
    status: str
    chainable: bool
    input: bytes
    response: bytes
    lease_until: int | None = None
    last_used_at: int | None = None

    def row(self, owner: str) -> tuple[Any, ...]:
        """Its columns as every store writes them: the owner, then these fields in their order."""
        return (owner, *msgspec.structs.astuple(self))


class Key(msgspec.Struct, frozen=True):
    """An idempotency key.

    Attributes:
        body_hash: of the create that came with it; with any other one it is refused.
    """

    key: str
    body_hash: bytes


class KeyedTurn(msgspec.Struct, frozen=True):
    """What an idempotency key stands for."""

    body_hash: bytes
    turn: StoredTurn


class Conversation(msgspec.Struct, frozen=True):
    """A conversation, without its items.

    Attributes:
        id: ours, unguessable.
        created_at: Unix seconds.
        metadata: a JSON object.
        last_used_at: Unix seconds; of a new one it is the time of its creation.
    """

    id: str
    created_at: int
    metadata: bytes
    last_used_at: int | None = None


class ConversationItem(msgspec.Struct, frozen=True):
    """An item of a conversation.

    Attributes:
        id: unique in its conversation.
        raw: the item as JSON.
    """

    id: str
    raw: bytes


class Appended(msgspec.Struct, frozen=True):
    """Items that go to a conversation's end, all of them or none.

    Attributes:
        at: Unix seconds; the conversation counts as used then.
    """

    conversation_id: str
    items: tuple[ConversationItem, ...]
    at: int


class ItemPage(msgspec.Struct, frozen=True):
    """Some of a conversation's items.

    Attributes:
        has_more: whether there are others behind the last one, in the order that was asked for.
    """

    items: list[ConversationItem]
    has_more: bool


class StoreInfo(msgspec.Struct, frozen=True):
    """What a store holds.

    Attributes:
        schema: the version of its tables.
        unfinished: of the turns, those with a lease.
        bytes: on the disk, indexes and free space included.
        oldest: of the turns, by their time of creation, in Unix seconds; None if there are none.
    """

    schema: int = 0
    owners: int = 0
    turns: int = 0
    unfinished: int = 0
    conversations: int = 0
    items: int = 0
    bytes: int = 0
    oldest: int | None = None
    newest: int | None = None


class Store(Protocol):
    """Keeps turns and conversations. Every call about one takes the owner first: another owner's id is an unknown id.

    When a call that writes returns, it has been committed. Every call raises `StoreUnavailable` if the store
    cannot be used; of a turn, a conversation or items then nothing was kept, unless the message says that this is not
    known: docs/adr/0012.
    """

    async def open(self) -> None:
        """Make sure that it can be used, and is on the newest schema. Every other call does this if it must.

        Raises:
            StoreUnavailable: it cannot be used now.
        """
        ...

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
        """Keep a turn, and all that comes with it, or nothing of it. An unfinished one of its id is replaced.

        Args:
            events: its stream of events, in whatever form; None leaves what was kept with the unfinished one.
            appends: items for a conversation of the same owner.
            key: stands for this turn from now on, as long as the turn is kept.
            replaces: an unfinished one of its id must be there.

        Raises:
            AlreadyKept: a finished turn of this id is there.
            KeyTaken: the key stands for another turn of the owner's.
            NotUnfinished: there is no unfinished turn to replace.
            NotAppended: the items could not be added to their conversation.
            StoreUnavailable: it could not be committed.
        """
        ...

    async def get(self, owner: str, response_id: str) -> StoredTurn | None:
        """One turn, or None."""
        ...

    async def of_key(self, owner: str, key: str) -> KeyedTurn | None:
        """The turn that an idempotency key stands for, finished or not, or None."""
        ...

    async def chain(self, owner: str, response_id: str) -> list[StoredTurn] | None:
        """The turns from the chain's start to this one, in one query; None if one is missing or not chainable."""
        ...

    async def events(self, owner: str, response_id: str) -> bytes | None:
        """The stream of events that was kept with a turn, or None."""
        ...

    async def delete(self, owner: str, response_id: str) -> bool:
        """Forget a turn, its events and its key; False if there was none. Its children lose their chain."""
        ...

    async def renew(self, turns: Sequence[tuple[str, str]], until: int) -> int:
        """Extend the leases of unfinished turns; those that have finished, or are not there, stay as they are.

        Args:
            turns: an owner and a response id each.
            until: Unix seconds.

        Returns:
            How many were unfinished.
        """
        ...

    async def unfinished(self, now: int) -> list[tuple[str, StoredTurn]]:
        """At most `UNFINISHED_MAX` turns, each with its owner, whose lease ended before `now`, in Unix seconds."""
        ...

    async def give_up(self, owner: str, response_id: str, before: int, ended: StoredTurn | None) -> bool:
        """End an unfinished turn that nobody runs any more, and free its key.

        Args:
            before: Unix seconds, at which its lease must have ended; a lease that was renewed is left alone.
            ended: stands in its place then; None forgets it.

        Returns:
            Whether there was such a turn.
        """
        ...

    async def used(self, owner: str, kept_id: str, at: int) -> None:
        """Mark a turn, and so the chain that leads to it, or a conversation, as used. A write: not for every turn.

        Args:
            kept_id: a response's or a conversation's; an unknown one is marked nowhere.
            at: Unix seconds.
        """
        ...

    # --- Conversations ----------------------------------------------------------------------------

    async def create_conversation(
        self, owner: str, conversation: Conversation, items: Sequence[ConversationItem] = ()
    ) -> None:
        """Keep a new conversation and its first items.

        Raises:
            AlreadyKept: there is one of this id.
            NotAppended: the items are too many, or two have the same id.
            NothingIsKept: this store has no conversations.
            StoreUnavailable: it could not be committed.
        """
        ...

    async def conversation(self, owner: str, conversation_id: str) -> Conversation | None:
        """One conversation, or None."""
        ...

    async def set_metadata(self, owner: str, conversation_id: str, metadata: bytes, at: int) -> bool:
        """Replace a conversation's metadata, a JSON object; it counts as used then. False if there is no such one."""
        ...

    async def delete_conversation(self, owner: str, conversation_id: str) -> bool:
        """Forget a conversation and its items; False if there was none. Turns that belonged to it stay."""
        ...

    async def append(self, owner: str, appended: Appended) -> None:
        """Add items to a conversation's end.

        Raises:
            NotAppended: there is no such conversation, it would hold too many, or an id is taken.
            StoreUnavailable: it could not be committed.
        """
        ...

    async def items(
        self,
        owner: str,
        conversation_id: str,
        *,
        limit: int,
        after: str | None = None,
        order: Literal["asc", "desc"] = "asc",
    ) -> ItemPage | None:
        """A page of a conversation's items, in the order of their addition or against it.

        Args:
            limit: how many at most.
            after: the id of the item that the page follows.

        Returns:
            None if there is no such conversation, or `after` names none of its items.
        """
        ...

    async def all_items(self, owner: str, conversation_id: str) -> list[ConversationItem] | None:
        """Every item in the order of their addition, in one query; None if there is no such conversation."""
        ...

    async def item(self, owner: str, conversation_id: str, item_id: str) -> ConversationItem | None:
        """One item, or None."""
        ...

    async def delete_item(self, owner: str, conversation_id: str, item_id: str) -> bool:
        """Forget an item; False if there was none."""
        ...

    # --- Looking after it -------------------------------------------------------------------------

    async def purge(self, before: int, limit: int) -> int:
        """Delete turns and conversations that were made and last used before a time.

        A turn goes only when nothing continues it any more, so whatever is still used keeps its whole chain.
        Unfinished turns stay.

        Args:
            before: Unix seconds.
            limit: how many at most, so that others can write in between: call it until it gives 0.

        Returns:
            How many were deleted.
        """
        ...

    async def info(self) -> StoreInfo:
        """What it holds. It counts every row."""
        ...

    def export(self, owner: str | None = None) -> AsyncIterator[tuple[str, StoredTurn]]:
        """Every turn, each with its owner, in no order that can be relied on; what is put meanwhile may be left out.

        Args:
            owner: whose; None is everybody's.
        """
        ...

    def conversations(self, owner: str | None = None) -> AsyncIterator[tuple[str, Conversation]]:
        """Every conversation without its items, in the same way as `export` gives turns."""
        ...

    async def close(self) -> None:
        """Commit what waits and let go of the file or the connections. Safe to call twice; what comes later is refused."""
        ...
