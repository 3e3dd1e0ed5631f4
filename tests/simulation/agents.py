"""Agents that keep their own books: what they said, what they were told, and what that must come to.

Each holds a conversation through the real client. It works out what the model must say from its own books alone, so a
lost item, a doubled one, or somebody else's shows in the first answer behind it.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, Final

import msgspec

from openline.client.errors import ConnectionLost, Refused, TurnFailed
from openline.client.session import Session
from openline.client.wire import Event, Response
from openline.protocol.states import TERMINAL_EVENTS
from simulation.model import Said, conversation_key, says, task

_PARAMETERS: Final = {"type": "object", "properties": {"line": {"type": "string"}}}
_TOOLS: Final = [{"type": "function", "name": "note", "parameters": _PARAMETERS}]
_CALLS_MAX: Final = 5
_PASSING: Final = frozenset({"rate_limit_exceeded", "store_unavailable", "server_is_overloaded"})


class Books:
    """What everybody was told.

    Attributes:
        acknowledged: the stored responses whose end was seen, by their id, each with its owner.
        lost: how often an agent was told that a turn of this conversation is lost, by what that said.
        ran: how often each tool call was run.
        ended: turns that ended well.
    """

    def __init__(self) -> None:
        self.acknowledged: dict[str, tuple[str, Response]] = {}
        self.lost: Counter[str] = Counter()
        self.ran: Counter[str] = Counter()
        self.ended = 0


class Agent:
    """One conversation of one owner.

    Args:
        name: stands in all that it asks for, and so in all that it may be told.
        stores: whether its responses are stored.
        seed: of what it asks for.
    """

    def __init__(self, name: str, owner: str, session: Session, books: Books, *, stores: bool, seed: int) -> None:
        self.name = name
        self.owner = owner
        self._session = session
        self._books = books
        self._stores = stores
        self._random = random.Random(seed)
        self._said: list[dict[str, Any]] = []  # the whole conversation, by these books

    async def work(self, tasks: int) -> None:
        """Have some tasks done, each a loop of tool calls."""
        for number in range(tasks):
            new = [{"role": "user", "content": task(f"{self.name}.{number}", self._random.randrange(_CALLS_MAX))}]
            while new:
                new = await self._turn(new)

    async def _turn(self, new: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A turn, and what is to be said next; a turn that is lost, or refused for a while, is asked for again."""
        asked = [*self._said, *new]
        response = None
        while response is None:
            try:
                response = await self._answer(new)
            except ConnectionLost:
                self._books.lost[conversation_key(asked)] += 1
            except (Refused, TurnFailed) as error:
                if error.code not in _PASSING:
                    raise
        assert _read(response) == says(asked), f"{self.name} asked {asked!r}"
        self._said = [*asked, *response["output"]]
        return [self._run(item) for item in response["output"] if item["type"] == "function_call"]

    async def _answer(self, new: list[dict[str, Any]]) -> Response:
        stream = self._session.create(input=new, tools=_TOOLS, store=self._stores)
        events = [event async for event in stream]
        check_order(events)
        response = await stream.response()
        assert events[-1]["response"] == response
        assert response["status"] == "completed", response
        self._books.ended += 1
        if self._stores:
            self._books.acknowledged[response["id"]] = (self.owner, response)
        return response

    def _run(self, call: dict[str, Any]) -> dict[str, Any]:
        """Run a tool: it leaves a mark, and running it twice leaves two."""
        self._books.ran[call["call_id"]] += 1
        line = msgspec.json.decode(call["arguments"])["line"]
        return {"type": "function_call_output", "call_id": call["call_id"], "output": f"noted {line}"}


def _read(response: Response) -> Said:
    """A response in the model's words."""
    calls = [(item["call_id"], item["arguments"]) for item in response["output"] if item["type"] == "function_call"]
    texts = [part["text"] for item in response["output"] if item["type"] == "message" for part in item["content"]]
    return Said(tuple(calls), "".join(texts))


def check_order(events: list[Event]) -> None:
    """One response, every event once and in order, one end.

    Source: guarantees, "Resume", "Order".
    """
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[0]["type"] == "response.created"
    assert [event["type"] in TERMINAL_EVENTS for event in events] == [*[False] * (len(events) - 1), True]
    ids = {event["response"]["id"] for event in events if "response" in event}
    assert len(ids) == 1, ids
