"""The upstream's view: what it gets when a client sends increments, against what a full resend would have made.

Source: WebSocket mode guide, "Continuing"; the context of a turn is its parent's input, the parent's output,
then its own input.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from server.listening import listening
from server.running import running

KINDS = ("text", "reasoning", "calls", "custom", "namespace", "reasoning and call")
TOOLS = [
    {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
    {"type": "custom", "name": "patch", "description": "Applies a patch."},
    {"type": "namespace", "name": "fs", "description": "Files.", "tools": [{"type": "function", "name": "list"}]},
]


class Model:
    """A Chat Completions server that follows a plan of answers, one a turn, and keeps every body it was sent."""

    def __init__(self, plan: list[str]) -> None:
        self.plan = plan
        self.bodies: list[bytes] = []

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        self.bodies.append(body)
        messages = json.loads(body)["messages"]
        turn = sum(message["role"] == "assistant" for message in messages)
        kind = self.plan[turn % len(self.plan)]
        chunks = [*_chunks(kind, turn), {"choices": [{"delta": {}, "finish_reason": "stop"}]}]
        text = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        return web.Response(text=text, content_type="text/event-stream")


def _chunks(kind: str, turn: int) -> list[dict[str, Any]]:
    """What the model streams in a turn of this kind; its call ids depend on nothing but the turn."""
    deltas: list[dict[str, Any]] = []
    if "reasoning" in kind:
        deltas += [{"reasoning_content": "I "}, {"reasoning_content": f"think {turn}."}]
    if kind in {"text", "reasoning"}:
        deltas += [{"content": "Answer "}, {"content": f"{turn} “ü”."}]
    calls = {
        "calls": [("look", '{"n": 1}'), ("look", '{"n": 2}')],
        "reasoning and call": [("look", '{"n": 3}')],
        "custom": [("patch", '{"input": "*** a \\"patch\\"\\n"}')],
        "namespace": [("fs__list", "{}")],
    }.get(kind, [])
    for index, (name, arguments) in enumerate(calls):
        function = {"name": name, "arguments": arguments}
        call = {"index": index, "id": f"call_{turn}_{index}", "type": "function", "function": function}
        deltas.append({"tool_calls": [call]})
    return [{"choices": [{"delta": delta}]} for delta in deltas]


def outputs_of(response: dict[str, Any], steers: int) -> list[dict[str, Any]]:
    """The client's next input: an output for every call, else the user's next message; steers come before it."""
    kinds = {"function_call": "function_call_output", "custom_tool_call": "custom_tool_call_output"}
    calls = [item for item in response["output"] if item["type"] in kinds]
    answered = [{"type": kinds[call["type"]], "call_id": call["call_id"], "output": "done"} for call in calls]
    said = [{"type": "message", "role": "user", "content": f"Steer {number}."} for number in range(steers)]
    return [*said, *(answered or [{"type": "message", "role": "user", "content": "Go on."}])]


def unanswered(messages: list[dict[str, Any]]) -> list[str]:
    """The calls that something stands behind other than their outputs."""
    open_calls: set[str] = set()
    broken: list[str] = []
    for message in messages:
        if message["role"] == "tool":
            open_calls.discard(message["tool_call_id"])
        else:
            broken += open_calls
            open_calls = {call["id"] for call in message.get("tool_calls", ())}
    return broken


@asynccontextmanager
async def served(folder: Any, model: Model) -> AsyncIterator[Any]:
    async with listening(model.answer) as url:
        engine = ChatEngine(UpstreamSettings(kind="chat", url=url), show_detail=True)
        async with running(folder, engine=engine) as server:
            yield server


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(st.sampled_from(KINDS), min_size=2, max_size=6),
    fork_at=st.integers(0, 5),
    steers=st.lists(st.integers(0, 2), min_size=6, max_size=6),
)
async def test_every_body_of_a_chain_equals_a_full_resend(
    tmp_path_factory: Any, plan: list[str], fork_at: int, steers: list[int]
):
    """Byte for byte: text, reasoning, parallel, custom and namespaced calls, steers, and beside a fork of the chain."""
    model = Model(plan)
    async with served(tmp_path_factory.mktemp("chain"), model) as server:
        history: list[dict[str, Any]] = []
        increments: list[bytes] = []
        resends: list[bytes] = []
        items: list[dict[str, Any]] = [{"type": "message", "role": "user", "content": "Begin."}]
        asked = {"model": "m", "tools": TOOLS, "instructions": "Be brief.", "store": False}
        parent: dict[str, Any] = {}
        async with server.connect() as line:
            for turn in range(len(plan)):
                history += items
                if turn == fork_at and parent:
                    await line.completed(**asked, **parent, input=items, stream_id="fork")
                response = await line.completed(**asked, **parent, input=items)
                increments.append(model.bodies[-1])
                answer = await server.post(**asked, input=history)
                assert answer.status == 200, answer.body
                resends.append(model.bodies[-1])
                parent = {"previous_response_id": response["id"]}
                history += response["output"]
                items = outputs_of(response, steers[turn])
        assert increments == resends
        assert [unanswered(json.loads(body)["messages"]) for body in increments] == [[]] * len(plan)
