"""What one connection remembers: the latest response of each of its lanes.

In memory only, and gone with the connection, so that `store: false` and zero retention
work. Every call takes the owner first.

Source: WebSocket mode guide, "Connection-local cache".
"""

from __future__ import annotations

import msgspec

from openline.state.context import ContextNode


class Anchor(msgspec.Struct, frozen=True):
    """A response that can be continued.

    Attributes:
        response_id: its id.
        node: the context up to and including its output.
        model: the model the client named, inherited by a create that names none.
        stored: whether it, and all before it, can be read from the store by this id.
    """

    response_id: str
    node: ContextNode
    model: str
    stored: bool


class ConnectionCache:
    """The latest response of each lane; at most one a lane, so it is bounded by the lanes."""

    def __init__(self) -> None:
        self._latest: dict[tuple[str, str | None], Anchor] = {}

    def __repr__(self) -> str:
        return f"<ConnectionCache responses={len(self._latest)}>"

    def get(self, owner: str, response_id: str) -> Anchor | None:
        """The response, whichever lane it is the latest of; None if it is not held."""
        for (whose, _), anchor in self._latest.items():
            if whose == owner and anchor.response_id == response_id:
                return anchor
        return None

    def keep(self, owner: str, stream_id: str | None, anchor: Anchor) -> None:
        """A lane's turn ended in `anchor`; what was its latest before is let go."""
        self._latest[owner, stream_id] = anchor

    def evict_failed(self, owner: str, stream_id: str | None, previous_response_id: str | None) -> None:
        """A turn that continued `previous_response_id` on this lane failed.

        The parent goes if it was this lane's own; a failed fork of another lane's
        response does not touch it.

        Source: WebSocket mode guide, "Failed continuations".
        """
        anchor = self._latest.get((owner, stream_id))
        if anchor is not None and anchor.response_id == previous_response_id:
            del self._latest[owner, stream_id]
