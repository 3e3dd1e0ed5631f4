"""A conversation as a tree of immutable nodes.

Continuing adds a node, a fork adds a second one to the same parent. What an upstream
needs is folded from the nodes and kept at them, so a turn pays for its own items only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from openline.protocol.context import Projection
from openline.protocol.items import Item, OpenCalls

S = TypeVar("S")


class ContextNode:
    """A context: its parent's items, then its own. Immutable, whatever continues it.

    Raises:
        ProtocolError: an item answers a call that nobody made.
    """

    __slots__ = ("_parent", "_states", "depth", "open_calls", "own_items")

    def __init__(self, parent: ContextNode | None, own_items: Sequence[Item]) -> None:
        self._parent = parent
        self._states: dict[str, Any] = {}
        self.own_items = own_items
        self.open_calls: OpenCalls = (parent.open_calls if parent else OpenCalls()).after(own_items)
        self.depth: int = (parent.depth if parent else 0) + len(own_items)

    def __repr__(self) -> str:
        return f"<ContextNode items={self.depth} own={len(self.own_items)} open_calls={len(self.open_calls)}>"

    def extend(self, items: Sequence[Item]) -> ContextNode:
        """This context with `items` behind it."""
        return ContextNode(self, items) if items else self

    def items(self) -> Iterator[Item]:
        """Every item, oldest first."""
        for node in self._path_from(lambda _: False):
            yield from node.own_items

    def project(self, projection: Projection[S]) -> S:
        """The context in an upstream's form, folded on from the nearest ancestor that has it."""
        path = self._path_from(lambda node: projection.key in node._states)  # noqa: SLF001 - its own kind
        first = path[0]
        state: S
        if projection.key in first._states:  # noqa: SLF001
            state = first._states[projection.key]  # noqa: SLF001
            path = path[1:]
        else:
            state = projection.start()
        for node in path:
            if node.own_items:  # the root is everybody's, so it keeps nothing
                state = projection.extend(state, node.own_items)
                node._states[projection.key] = state  # noqa: SLF001
        return state

    def _path_from(self, stop: Callable[[ContextNode], bool]) -> list[ContextNode]:
        path: list[ContextNode] = []
        node: ContextNode | None = self
        while node is not None:
            path.append(node)
            if stop(node):
                break
            node = node._parent  # noqa: SLF001
        path.reverse()
        return path


EMPTY: Final = ContextNode(None, ())
