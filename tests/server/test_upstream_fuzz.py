"""Bytes of an upstream that no table of faults names: good answers, broken in any way.

Source: guarantees, "Upstream faults".
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from itertools import pairwise
from typing import Any, Self

import msgspec
import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.fake_upstream import chunked, head
from engines.faults import FAULTS, KEY, WIRES, Fault, Play, event_of
from openline.protocol.errors import ERRORS
from protocol.spoiled import CHANGES as SPOILED
from protocol.spoiled import Change, changed
from server.faulty import KINDS, TRANSPORTS, Scene, scene

CODES = {kind.wire_code for kind in ERRORS.values()} - {ERRORS["internal_error"].wire_code}
HEADS = {
    "chunked": head("200 OK", "Content-Type: text/event-stream", "Transfer-Encoding: chunked"),
    "until its end": head("200 OK", "Content-Type: text/event-stream", "Connection: close"),
}


class World:
    """One server for all examples, and an upstream that answers with the bytes of the current one."""

    def __init__(self, folder: Any) -> None:
        self._folder = folder
        self._runner = asyncio.Runner(loop_factory=uvicorn.Config("", loop="auto", log_config=None).get_loop_factory())
        self._stack = AsyncExitStack()
        self.pieces: list[bytes] = []

    def __enter__(self) -> Self:
        self.scene: Scene = self._runner.run(self._stack.enter_async_context(scene(self._folder)))
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._stack.aclose())
        self._runner.close()

    async def script(self, play: Play) -> None:
        for piece in self.pieces:
            await play.exchange.send(piece)
            await asyncio.sleep(0)

    def turn(self, kind: str, transport: str, name: str = "fuzz") -> str | None:
        """The code in which a turn ends; None if it does well."""
        return self._runner.run(self._turn(kind, transport, name))

    async def _turn(self, kind: str, transport: str, name: str) -> str | None:
        async with self.scene.line(transport) as line:
            end, _ = await self.scene.turn(kind, name, transport, line)
        return end.code


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patch, World(tmp_path_factory.mktemp("fuzz")) as world:
        patch.setenv("OPENLINE_UPSTREAM_API_KEY", KEY)
        patch.setitem(FAULTS, "fuzz", Fault(world.script))
        yield world


def answer(kind: str, framing: str, events: list[bytes]) -> bytes:
    body = [event_of(event) for event in events]
    if framing == "chunked":
        body = [*map(chunked, body), b"0\r\n\r\n"]
    return HEADS[framing] + b"".join(body)


def mutated(stream: bytes, changes: list[tuple[str, float, float, bytes]]) -> bytes:
    """A stream with some of its bytes lost, doubled, moved or replaced; places are fractions of its length."""
    for how, at, to, some in changes:
        begin, end = sorted((int(at * len(stream)), int(to * len(stream))))
        match how:
            case "cut":
                stream = stream[:end]
            case "lose":
                stream = stream[:begin] + stream[end:]
            case "double":
                stream = stream[:end] + stream[begin:end] + stream[end:]
            case "insert":
                stream = stream[:begin] + some + stream[begin:]
            case "replace":
                stream = stream[:begin] + some + stream[begin + len(some) :]
            case _:
                stream = (
                    stream[:begin]
                    + bytes(byte ^ 1 << (byte & 7) for byte in stream[begin : begin + 1])
                    + stream[begin + 1 :]
                )
    return stream


fractions = st.floats(0, 1)
TELLING = [
    b"\r\n",
    b"\n",
    b"\n\n",
    b"{",
    b"}",
    b'"',
    b"[DONE]",
    b"null",
    b"-1",
    b"\xff",
    b"\0",
    b"1e999",
    b"data: ",
    b"0\r\n\r\n",
]
CHANGES = st.tuples(
    st.sampled_from(["cut", "lose", "double", "insert", "replace", "flip"]),
    fractions,
    fractions,
    st.sampled_from(TELLING) | st.binary(min_size=1, max_size=8),
)


def broken(events: list[bytes], changes: list[Change]) -> list[bytes]:
    """The same of encoded events; `[DONE]` is none."""
    decoded = [event if event == b"[DONE]" else msgspec.json.decode(event) for event in events]
    return [event if isinstance(event, bytes) else msgspec.json.encode(event) for event in changed(decoded, changes)]


EXAMPLES = pytest.mark.parametrize("examples", [80, pytest.param(4000, marks=pytest.mark.long)])
TURNS = {
    "kind": st.sampled_from(KINDS),
    "transport": st.sampled_from(TRANSPORTS),
    "framing": st.sampled_from(sorted(HEADS)),
}


@EXAMPLES
def test_whatever_bytes_come_the_turn_ends_once(world, examples):
    """Bits flipped; pieces cut, lost, doubled, replaced; and the network cuts where it likes."""

    @settings(max_examples=examples)
    @given(**TURNS, changes=st.lists(CHANGES, max_size=4), cuts=st.lists(fractions, max_size=6))
    def example(kind, transport, framing, changes, cuts):
        stream = mutated(answer(kind, framing, WIRES[kind].events), changes)
        places = [0, *sorted(int(cut * len(stream)) for cut in cuts), len(stream)]
        world.pieces = [stream[begin:end] for begin, end in pairwise(places) if begin < end]
        assert world.turn(kind, transport) in ({None, *CODES} if changes else {None})
        assert world.turn(kind, transport, "good") is None

    example()


@EXAMPLES
def test_whatever_events_come_the_turn_ends_once(world, examples):
    """Each is JSON; fields are missing or of any type, events are lost, doubled, or in another order."""

    @settings(max_examples=examples)
    @given(**TURNS, changes=SPOILED)
    def example(kind, transport, framing, changes):
        world.pieces = [answer(kind, framing, broken(WIRES[kind].events, changes))]
        assert world.turn(kind, transport) in {None, *CODES}

    example()
