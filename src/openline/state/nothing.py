"""The store that keeps nothing: `--store none`."""

from __future__ import annotations

from openline.state.store import StoredTurn


class NothingStore:
    """Takes every turn and forgets it, so a response lives as long as its connection."""

    def __repr__(self) -> str:
        return "<NothingStore>"

    async def put(self, owner: str, turn: StoredTurn) -> None:
        """Accept the turn; it is not kept."""

    async def get(self, owner: str, response_id: str) -> StoredTurn | None:  # noqa: ARG002 - every id is unknown
        """None."""
        return None

    async def chain(self, owner: str, response_id: str) -> list[StoredTurn] | None:  # noqa: ARG002
        """None."""
        return None

    async def delete(self, owner: str, response_id: str) -> bool:  # noqa: ARG002
        """False."""
        return False

    async def close(self) -> None:
        """Nothing to let go of."""
