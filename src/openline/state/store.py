"""The seam to what survives a restart."""

from __future__ import annotations

from typing import Protocol

import msgspec

from openline.protocol.errors import ProtocolError


class StoreUnavailable(Exception):  # noqa: N818 - a state of the store
    """The store cannot be read or written now; the message says why, without content."""


def store_unavailable(error: StoreUnavailable) -> ProtocolError:
    """What the client is told."""
    return ProtocolError("store_unavailable", f"The store cannot be used now: {error}.", headers={"retry-after": "1"})


class StoredTurn(msgspec.Struct, frozen=True):
    """One turn as a row: its own items and its parent's id, never the history.

    Attributes:
        response_id: ours, unguessable.
        parent_id: the turn it continues, None at a chain's start.
        created_at: Unix seconds.
        status: the response's final status.
        chainable: whether other turns may continue it by id: not after a failure, nor below an unstored ancestor.
        input: the turn's own input items, a JSON array.
        response: the response object, its output included, as JSON.
    """

    response_id: str
    parent_id: str | None
    created_at: int
    status: str
    chainable: bool
    input: bytes
    response: bytes


class Store(Protocol):
    """Keeps turns. Every call takes the owner first: another owner's id is an unknown id."""

    async def put(self, owner: str, turn: StoredTurn) -> None:
        """Keep a turn; when this returns it has been committed.

        Raises:
            StoreUnavailable: it could not be committed; nothing was kept.
        """
        ...

    async def get(self, owner: str, response_id: str) -> StoredTurn | None:
        """One turn, or None.

        Raises:
            StoreUnavailable: the store cannot be read.
        """
        ...

    async def chain(self, owner: str, response_id: str) -> list[StoredTurn] | None:
        """The turns from the chain's start to this one, in one query; None if one is missing or not chainable.

        Raises:
            StoreUnavailable: the store cannot be read.
        """
        ...

    async def delete(self, owner: str, response_id: str) -> bool:
        """Forget a turn; False if there was none. Its children lose their chain.

        Raises:
            StoreUnavailable: the store cannot be written.
        """
        ...

    async def close(self) -> None:
        """Commit what waits and let go of the file or the connections."""
        ...
