"""What engine and context agree on: how a conversation is folded into an upstream's form.

A context only grows, so whatever an engine needs of it is written as a fold over its
items, and its value is kept at every node of the context tree. A turn that continues
pays for its own items, not for the history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

from openline.protocol.items import Item

S = TypeVar("S")


class Projection(Protocol[S]):
    """A fold over a context's items, one for each form that an upstream wants.

    `extend` must be pure and local: `extend(extend(s, a), b) == extend(s, a + b)`. What a
    form cannot decide yet at the end of `a` belongs into the state, not into the
    bytes. That makes an increment equal to a full resend, byte for byte.
    """

    @property
    def key(self) -> str:
        """Names the form: projections with equal keys give equal states."""
        ...

    def start(self) -> S:
        """The state of an empty context."""
        ...

    def extend(self, state: S, items: Sequence[Item]) -> S:
        """The state once `items` stand behind those folded into `state`.

        Raises:
            ProtocolError: the upstream has no form for one of the items.
        """
        ...


class Context(Protocol):
    """The whole ordered context of one turn, as an engine sees it."""

    def items(self) -> Iterator[Item]:
        """Every item, oldest first."""
        ...

    def project(self, projection: Projection[S]) -> S:
        """The context in an upstream's form; only what is new since the last node is folded."""
        ...


class SharedBytes:
    """An immutable run of bytes that can be continued without being copied.

    It is a shared append-only buffer and an end offset. Appending to the newest one
    grows the buffer in place; appending to an older one (a fork, or the parent of a
    turn that failed) copies its part first, so that nobody's bytes change.
    """

    __slots__ = ("_buffer", "_end")

    def __init__(self, buffer: bytearray | None = None, end: int = 0) -> None:
        self._buffer = bytearray() if buffer is None else buffer
        self._end = end

    def __len__(self) -> int:
        return self._end

    def __bytes__(self) -> bytes:
        return bytes(memoryview(self._buffer)[: self._end])

    def slice(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`, of which neither may be negative."""
        return bytes(memoryview(self._buffer)[start : min(end, self._end)])

    def __repr__(self) -> str:
        return f"<SharedBytes {self._end} of {len(self._buffer)} bytes>"

    def append(self, data: bytes) -> SharedBytes:
        """These bytes and `data` behind them."""
        buffer = self._buffer
        if len(buffer) != self._end:
            buffer = bytearray(memoryview(buffer)[: self._end])
        buffer += data
        return SharedBytes(buffer, self._end + len(data))
