"""A model whose answers prove what it was shown: it calls tools as often as its task says, then names all that it has read.

A conversation that lost a word, or got somebody else's, ends in another answer. Who talks to it works out the same
answer from what was said, so that nothing needs to be looked up inside the server.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import re
from collections import Counter
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, Final

import msgspec

from openline.engines.engine import EngineRequest, Model
from openline.protocol.deltas import CallDelta, CallStarted, Delta, Ended, TextDelta, Usage
from openline.protocol.errors import ProtocolError

NAME: Final = "witness"
_TASK: Final = re.compile(r"task (\S+): (\d+) calls")
_DELTA_SECONDS_MAX: Final = 2.0
_PAUSE_SECONDS_MAX: Final = 40.0  # now and then: a model that thinks
_PAUSE_CHANCE: Final = 0.05


def task(name: str, calls: int) -> str:
    """What a user asks for: so many tool calls, in rounds, then the answer."""
    return f"task {name}: {calls} calls"


class Said(msgspec.Struct, frozen=True):
    """What the model says next: calls, or a text."""

    calls: tuple[tuple[str, str], ...] = ()  # call id and arguments
    text: str = ""


def says(items: Iterable[dict[str, Any]]) -> Said:
    """What the model says to a conversation: a pure function of its items."""
    read = [words_of(item) for item in items]
    found = next((found for words in reversed(read) if (found := _TASK.search(words))), None)
    assert found is not None, "every conversation has a task"
    name, wanted = found[1], int(found[2])
    made = sum(words.startswith(f"call {name}-") for words in read)
    if made < wanted:
        count = min(wanted - made, 1 + made % 2)  # alone, and two in parallel
        return Said(tuple((f"call_{name}-{made + n}", f'{{"line":"{name}-{made + n}"}}') for n in range(count)))
    return Said(text=f"{name} has read {len(read)} items: {hashlib.sha256('|'.join(read).encode()).hexdigest()[:24]}.")


def words_of(item: dict[str, Any]) -> str:
    """An item as the model reads it, without the ids that are only the server's."""
    match item.get("type", "message"):
        case "function_call":
            return f"call {item['call_id'].removeprefix('call_')} {item['arguments']}"
        case "function_call_output":
            return f"output {item['call_id'].removeprefix('call_')} {item['output']}"
    content = item["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return f"{item['role']} {text}"


class Witness:
    """The engine. It refuses now and then, and thinks for a while now and then.

    Args:
        seed: of the times that it takes.

    Attributes:
        process: which process of the server asks it now.
        generations: how often a process had a conversation answered, by its number and by what was said.
        working: generations that run.
    """

    name = "witness"

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.process = 0
        self.generations: Counter[tuple[int, str]] = Counter()
        self.of_key: Counter[tuple[int, str | None]] = Counter()
        self.working = 0

    def prepare(self, request: EngineRequest) -> _Answer:
        items = [msgspec.json.decode(item.raw) for item in request.context.items()]
        return _Answer(self, items, request.create.idempotency_key, self._random)

    def begin(self, items: Iterable[dict[str, Any]], key: str | None) -> None:
        """A generation begins: of one key no process begins two.

        Source: guarantees, "Idempotent turns".
        """
        self.working += 1
        self.generations[self.process, conversation_key(items)] += 1
        self.of_key[self.process, key] += 1
        assert self.of_key[self.process, key] == 1, f"a second generation of {key}"

    async def count_tokens(self, request: EngineRequest) -> int:
        return request.context.depth

    async def models(self) -> Sequence[Model]:
        return [Model(NAME)]

    async def close(self) -> None:
        """Nothing is held."""


def conversation_key(items: Iterable[dict[str, Any]]) -> str:
    """A conversation, by all that was said in it."""
    return "|".join(map(words_of, items))


class _Answer:
    dropped_tools: Sequence[str] = ()
    prefills = False

    def __init__(self, engine: Witness, items: list[dict[str, Any]], key: str | None, rng: random.Random) -> None:
        self._engine = engine
        self._items = items
        self._key = key
        self._random = rng

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        await self._think()
        if self._random.random() < 0.02:
            raise ProtocolError("rate_limit_exceeded", "Not now.", headers={"retry-after": "1"})
        self._engine.begin(self._items, self._key)
        try:
            yield ()
            said = says(self._items)
            for call_id, arguments in said.calls:
                yield [CallStarted("function_call", call_id, "note")]
                for piece in _pieces(arguments):
                    await self._think()
                    yield [CallDelta(piece)]
            for piece in _pieces(said.text):
                await self._think()
                yield [TextDelta(piece)]
            yield [Usage(input_tokens=len(self._items), output_tokens=1), Ended()]
        finally:
            self._engine.working -= 1

    async def _think(self) -> None:
        longest = _PAUSE_SECONDS_MAX if self._random.random() < _PAUSE_CHANCE else _DELTA_SECONDS_MAX
        await asyncio.sleep(self._random.random() * longest)


def _pieces(text: str, size: int = 12) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]
