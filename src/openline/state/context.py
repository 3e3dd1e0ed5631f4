"""A conversation as a tree of immutable nodes.

Continuing adds a node, a fork adds a second one to the same parent. What an upstream
needs is folded from the nodes and kept at them, so a turn pays for its own items only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec

from openline.protocol.context import Projection
from openline.protocol.items import Item, OpenCalls, answers_in, without_repeats

S = TypeVar("S")


_SYSTEM_ROLES: Final = frozenset({"system", "developer"})
_SYSTEM_ITEMS: Final = frozenset({"additional_tools", "configuration_update"})


class _Message(msgspec.Struct):
    role: object = None


_message: Final = msgspec.json.Decoder(_Message)


class ContextNode:
    """A context: its parent's items, then its own. Immutable, whatever continues it.

    An item that sums up stands for all before it but what the system said, and but messages that a client has
    put before it with nothing of a model's or a tool's: these it has kept on purpose (Codex does so).

    Attributes:
        own_items: all that its turn brought, also what a later one of them sums up.
        bytes: of the items that the model reads.
        depth: how many those are.

    Raises:
        ProtocolError: an item answers a call that nobody made.
    """

    __slots__ = ("_parent", "_read_items", "_states", "bytes", "depth", "open_calls", "own_items")

    def __init__(self, parent: ContextNode | None, own_items: Sequence[Item]) -> None:
        self.own_items = self._read_items = own_items
        start = _summary_at(own_items)
        if start is not None:
            kept = own_items[:start]
            if not all(map(is_asked, kept)):
                kept = [*filter(is_system, kept)]
            self._read_items = [*filter(is_system, parent.items() if parent else ()), *kept, *own_items[start:]]
            parent = None
        self._parent = parent
        self._states: dict[str, Any] = {}
        self.open_calls: OpenCalls = (parent.open_calls if parent else OpenCalls()).after(self._read_items)
        self.depth: int = (parent.depth if parent else 0) + len(self._read_items)
        self.bytes: int = (parent.bytes if parent else 0) + sum(len(item.raw) for item in self._read_items)

    def __repr__(self) -> str:
        return f"<ContextNode items={self.depth} own={len(self.own_items)} open_calls={len(self.open_calls)}>"

    def extend(self, items: Sequence[Item]) -> ContextNode:
        """This context with `items` behind it, without the tool outputs that it has already.

        Raises:
            ProtocolError: an output differs from the one that its call has, or answers a call that nobody made.
        """
        if any(item.call_id is not None for item in items):
            items = self._without_repeats(items)
        return ContextNode(self, items) if items else self

    def _without_repeats(self, items: Sequence[Item]) -> Sequence[Item]:
        start = _summary_at(items)
        if start is None:
            return without_repeats(items, self.open_calls, lambda: answers_in(self.items()))
        # Nothing before the summary is read any more.
        return [*items[:start], *without_repeats(items[start:], OpenCalls(), dict)]

    def items(self) -> Iterator[Item]:
        """Every item, oldest first."""
        for node in self._path_from(lambda _: False):
            yield from node._read_items  # noqa: SLF001 - its own kind

    def last_words(self) -> list[Item]:
        """The messages at its end, which nobody has answered yet."""
        words: list[Item] = []
        node: ContextNode | None = self
        while node is not None:
            for item in reversed(node._read_items):  # noqa: SLF001 - its own kind
                if not is_asked(item):
                    return words[::-1]
                words.append(item)
            node = node._parent  # noqa: SLF001
        return words[::-1]

    def summed_up(self, summary: Sequence[Item]) -> ContextNode:
        """This context with a summary in its place, and the user's last words behind it as they are."""
        return self.extend([*summary, *(item for item in self.last_words() if not is_system(item))])

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
            if node._read_items:  # noqa: SLF001 - the root is everybody's, so it keeps nothing
                state = projection.extend(state, node._read_items)  # noqa: SLF001
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


def is_system(item: Item) -> bool:
    """Whether it is no part of what was said, but says how."""
    return item.type in _SYSTEM_ITEMS or (item.type == "message" and _role(item) in _SYSTEM_ROLES)


def is_asked(item: Item) -> bool:
    """Whether it is a message for the model, and nothing that a model or a tool has said."""
    return is_system(item) or (item.type == "message" and not item.sums_up and _role(item) != "assistant")


def _role(item: Item) -> object:
    return _message.decode(item.raw).role


def _summary_at(items: Sequence[Item]) -> int | None:
    """Where the last item is that stands for all before it."""
    return next((index for index in range(len(items) - 1, -1, -1) if items[index].sums_up), None)


EMPTY: Final = ContextNode(None, ())
