"""Conversations on the lanes of one socket with the stock `openai` package for Python.

`openai.lib.responses_websocket` routes the events of a socket to lanes. Three lanes run a tool loop each, at the same
time. Then the first conversation goes on twice at once: on its own lane, and forked, on the second one. The third
lane goes on meanwhile.

Prints one JSON line that says what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

import openai
from openai.lib.responses_websocket import (
    AsyncResponsesWebSocketLane,
    AsyncResponsesWebSocketSession,
    ResponsesWebSocketLimits,
)
from openai.types.responses import Response

INSTRUCTIONS = "You test a server. Use the tools."
PROMPT = "Call the tools one after another, then say what the last one answered."
LANES = ("north", "south.1", "East_2-b")
TERMINAL = ("response.completed", "response.failed", "response.incomplete")
LIMITS = ResponsesWebSocketLimits(
    max_lanes=len(LANES) + 1,
    max_events_per_lane=10_000,
    max_events=10_000,
    max_bytes_per_lane=64 * 1024 * 1024,
    max_bytes=64 * 1024 * 1024,
)


def function_tool(name: str, description: str, properties: dict[str, Any]) -> dict[str, Any]:
    """Describe a tool that takes exactly these properties."""
    parameters = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {"type": "function", "name": name, "description": description, "parameters": parameters, "strict": True}


TOOLS = [
    function_tool("add", "Add two whole numbers.", {"a": {"type": "integer"}, "b": {"type": "integer"}}),
    function_tool("note", "Write a note down.", {"text": {"type": "string"}}),
]


@dataclass
class Branch:
    """A conversation: all that was said in it, and the response that ends it."""

    name: str
    said: list[tuple[str, str]] = field(default_factory=list)
    latest: str | None = None

    def fork(self, name: str) -> Branch:
        """Return another one with the same past."""
        return Branch(name, [*self.said], self.latest)


class Line:
    """One lane, and the tool loops on it."""

    def __init__(self, name: str, lane: AsyncResponsesWebSocketLane, model: str) -> None:
        self.name = name
        self.lane = lane
        self.common = {"model": model, "instructions": INSTRUCTIONS, "tools": TOOLS, "store": False}
        self.outputs: list[str] = []
        self.responses = 0
        self.in_progress = asyncio.Event()

    async def talk(self, branch: Branch) -> None:
        """Ask, run the tools that were called, ask again, until there are no calls."""
        prompt = f"{branch.name}: {PROMPT}"
        branch.said.append(("user", prompt))
        new: list[dict[str, Any]] = [{"role": "user", "content": prompt}]
        while new:
            parent = {"previous_response_id": branch.latest} if branch.latest else {}
            response = await self.turn({"type": "response.create", "input": new, **parent, **self.common})
            branch.latest = response.id
            new = self.answers(branch, response)
        branch.said.append(("assistant", response.output_text))

    async def turn(self, create: Any) -> Response:
        """Send one create and collect its response; each event must be of this lane, and numbered without a gap."""
        self.in_progress.clear()
        await self.lane.send(create)
        expected = 0
        while True:
            event: Any = await self.lane.recv()
            assert event.stream_id == self.name, event.to_json(indent=None)
            assert event.type != "error", event.to_json(indent=None)
            assert event.sequence_number == expected, event.to_json(indent=None)
            expected += 1
            if event.type == "response.in_progress":
                self.in_progress.set()
            if event.type in TERMINAL:
                self.responses += 1
                return await self.lane.get_final_response()

    def answers(self, branch: Branch, response: Response) -> list[dict[str, Any]]:
        """Run the tools that a response called; return their outputs as input items."""
        assert response.status == "completed", response.to_json(indent=None)
        items = []
        for call in (item for item in response.output if item.type == "function_call"):
            output = f"{branch.name}: {tool_output(call.name, json.loads(call.arguments))}"
            self.outputs.append(output)
            branch.said.append(("tool", output))
            items.append({"type": "function_call_output", "call_id": call.call_id, "output": output})
        return items


def tool_output(name: str, arguments: dict[str, Any]) -> str:
    """Do what the tool promises."""
    return f"sum: {arguments['a'] + arguments['b']}" if name == "add" else f"noted: {arguments['text']}"


async def converse(lines: list[Line]) -> list[Branch]:
    """Hold all conversations; return them."""
    north, south, east = lines
    first, second, third = (Branch(line.name) for line in lines)
    await at_once(north.talk(first), south.talk(second), east.talk(third))
    forked = first.fork("forked")

    async def go_on() -> None:
        # With `store: false` only the latest response of a lane is kept: the fork must have got hold of it.
        await south.in_progress.wait()
        await north.talk(first)

    south.in_progress.clear()
    await at_once(south.talk(forked), go_on(), east.talk(third))
    return [first, second, third, forked]


async def at_once(*talks: Coroutine[Any, Any, None]) -> None:
    """Run all at the same time; the first that fails ends the others."""
    async with asyncio.TaskGroup() as group:
        for talk in talks:
            group.create_task(talk)


async def run(base_url: str, model: str) -> dict[str, Any]:
    """Open the socket and its lanes; return the result."""
    client = openai.AsyncOpenAI(base_url=base_url, api_key="conform", max_retries=0)
    async with (
        client,
        client.responses.connect(websocket_connection_options={"max_size": None}) as connection,
        AsyncResponsesWebSocketSession(connection, limits=LIMITS) as session,
    ):
        lines = [Line(name, session.lane(name), model) for name in LANES]
        stray = asyncio.create_task(session.default.recv())
        try:
            branches = await converse(lines)
            assert not stray.done(), f"an event came on no lane: {stray.result().to_json()}"
        finally:
            stray.cancel()
    return {
        "client": f"openai {openai.__version__}",
        "responses": sum(line.responses for line in lines),
        "outputs": [output for line in lines for output in line.outputs],
        "text": branches[-1].said[-1][1],
        "branches": [{"name": branch.name, "said": branch.said} for branch in branches],
    }


def main() -> None:
    """Run the lanes and print the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=("ws",), required=True)
    args = parser.parse_args()
    print(json.dumps(asyncio.run(run(args.base_url, args.model))))


if __name__ == "__main__":
    main()
