"""Which open line to a Responses upstream leads to which conversation.

An upstream in WebSocket mode holds what was said on a connection, so a conversation that goes on where it was needs only
what is new. Whether it is the same one is told by what was said and by nothing else: a client of ours may bring an
id, or everything anew. So a line is found by a digest of the whole conversation, as far as the upstream has it.

What must stay true: the owner is part of every look-up, and nothing is left out that the line's other end does not hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any, Final, cast

import msgspec

from openline.client.history import Everything
from openline.client.session import Session
from openline.engines.responses import encoded_item
from openline.protocol.context import SharedBytes
from openline.protocol.items import Item

_DIGEST_BYTES: Final = 16
_OFFSET_BYTES: Final = 8
# What differs between an item as the upstream said it and as a client brings it again, and means nothing.
_MEANINGLESS: Final = frozenset({"id", "status", "annotations", "logprobs"})
_fields: Final = msgspec.json.Decoder(dict[str, Any])
_canonical: Final = msgspec.json.Encoder(order="sorted")


class Said(msgspec.Struct, frozen=True):
    """A conversation in an upstream's form, and where it can be cut.

    Attributes:
        encoded: the inside of an `input` array.
        digests: one behind each item: of everything up to it.
        ends: one for each of these: where it ends in `encoded`.
    """

    encoded: SharedBytes
    digests: SharedBytes
    ends: SharedBytes

    def __len__(self) -> int:
        return len(self.digests) // _DIGEST_BYTES

    def digest(self, count: int) -> bytes:
        """Of its first items."""
        return self.digests.slice(_DIGEST_BYTES * (count - 1), _DIGEST_BYTES * count)

    def first(self, count: int) -> bytes:
        """Its first items, encoded."""
        return self.encoded.slice(0, self._end(count))

    def rest(self, count: int) -> bytes:
        """What stands behind its first items, encoded."""
        return self.encoded.slice(self._end(count), len(self.encoded)).removeprefix(b",")

    def _end(self, count: int) -> int:
        return int.from_bytes(self.ends.slice(_OFFSET_BYTES * (count - 1), _OFFSET_BYTES * count), "big")


class SaidProjection:
    """Folds a context into `Said`."""

    key = "responses+ws"

    def start(self) -> Said:
        """Nothing yet, in buffers of its own: they grow in place, and go with their conversation."""
        return Said(SharedBytes(), SharedBytes(), SharedBytes())

    def extend(self, state: Said, items: Sequence[Item]) -> Said:
        """The items behind. Reasoning is sent, but tells no conversation from another: clients may leave it out."""
        encoded, digests, ends = state.encoded, state.digests, state.ends
        last = state.digest(len(state)) if len(state) else b""
        for item in items:
            raw = encoded_item(item)
            if not raw:
                continue
            encoded = encoded.append(b"," + raw if len(encoded) else raw)
            if item.type == "reasoning":
                continue
            last = digest_behind(last, _fields.decode(item.raw))
            digests = digests.append(last)
            ends = ends.append(len(encoded).to_bytes(_OFFSET_BYTES, "big"))
        return Said(encoded, digests, ends)


def digest_behind(before: bytes, item: dict[str, Any]) -> bytes:
    """The digest of a conversation with one more item; `before` is that without it, empty at the start."""
    meaning = {"type": "message", **_meaning(item)}
    return blake2b(before + _canonical.encode(meaning), digest_size=_DIGEST_BYTES).digest()


def _meaning(value: Any) -> Any:
    """A value without what means nothing; a text alone is the same as a part with that text."""
    if isinstance(value, list):
        return [_meaning(each) for each in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    fields = cast("dict[str, Any]", value)
    meaning = {name: _meaning(each) for name, each in fields.items() if name not in _MEANINGLESS and each is not None}
    content = meaning.get("content")
    if isinstance(content, str):
        kind = "output_text" if meaning.get("role") == "assistant" else "input_text"
        meaning["content"] = [{"type": kind, "text": content}]
    return meaning


class Line(msgspec.Struct):
    """A session with the upstream, and what it was last used for.

    Attributes:
        response_id: the upstream's own id of the latest response on it; None if there is none.
        expiry: closes it, while it waits.
    """

    session: Session
    response_id: str | None = None
    expiry: asyncio.TimerHandle | None = None


class Going(msgspec.Struct, frozen=True):
    """What a turn on a line goes on from; a session asks it as its `Past`.

    Attributes:
        known: how many items of the conversation the other end holds.
        is_stored: never: nothing is stored upstream.
    """

    said: Said
    known: int
    response_id: str | None
    is_stored: bool = False

    @property
    def new(self) -> bytes:
        """The items that the other end does not hold, encoded."""
        return self.said.rest(self.known) if self.known else bytes(self.said.encoded)

    def everything(self) -> Everything:
        """What the other end is taken to hold, for when it does not."""
        return Everything(None, self.said.first(self.known) if self.known else b"")


class Lines:
    """The lines to one upstream.

    Args:
        open_session: makes a session; nothing is sent yet.
        lines_max: how many at once; of those that wait for a conversation to go on, the one that waited longest goes.
        idle_seconds: how long one waits.
    """

    def __init__(self, open_session: Callable[[], Session], *, lines_max: int, idle_seconds: float) -> None:
        self._open_session = open_session
        self._lines_max = lines_max
        self._idle_seconds = idle_seconds
        self._waiting: dict[tuple[str, bytes], Line] = {}  # by owner, and by all that was said; the oldest first
        self._closing: set[asyncio.Task[None]] = set()
        self._busy = 0

    def __repr__(self) -> str:
        return f"<Lines busy={self._busy} waiting={len(self._waiting)}>"

    def take(self, owner: str, said: Said) -> tuple[Line, Going]:
        """The line that has heard the most of a conversation, or a new one; and what it goes on from."""
        self._busy += 1
        for known in range(len(said), 0, -1):
            line = self._waiting.pop((owner, said.digest(known)), None)
            if line is not None:
                _stop_waiting(line)
                return line, Going(said, known, line.response_id)
        while self._waiting and self._busy + len(self._waiting) > self._lines_max:
            self._expire(next(iter(self._waiting)))
        return Line(self._open_session()), Going(said, 0, None)

    def put_back(self, line: Line, owner: str, said: Said, response: dict[str, Any]) -> None:
        """A turn on this line has ended well: it waits for its conversation to go on."""
        self._busy -= 1
        digest = said.digest(len(said)) if len(said) else b""
        output: Any = response.get("output")
        for item in cast("list[Any]", output) if isinstance(output, list) else ():
            if isinstance(item, dict) and cast("dict[str, Any]", item).get("type") != "reasoning":
                digest = digest_behind(digest, cast("dict[str, Any]", item))
        line.response_id = response.get("id")
        key = owner, digest
        if key in self._waiting:  # the same was said twice, on two lines
            self._expire(key)
        self._waiting[key] = line
        line.expiry = asyncio.get_running_loop().call_later(self._idle_seconds, self._expire, key)

    def drop(self, line: Line) -> None:
        """A turn on this line has not ended well: nobody knows what the other end holds."""
        self._busy -= 1
        self._close(line)

    async def close(self) -> None:
        """Close every line that waits; none is busy."""
        for key in list(self._waiting):
            self._expire(key)
        await asyncio.gather(*self._closing)

    def _expire(self, key: tuple[str, bytes]) -> None:
        line = self._waiting.pop(key)
        _stop_waiting(line)
        self._close(line)

    def _close(self, line: Line) -> None:
        closing = asyncio.get_running_loop().create_task(line.session.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


def _stop_waiting(line: Line) -> None:
    if line.expiry is not None:
        line.expiry.cancel()
        line.expiry = None
