"""A steer in mid-turn on every engine: what its upstream gets for the successor is the whole conversation.

Source: Mid-turn steering guide, "Outcomes"; Chat Completions reference, "messages"; Responses API reference, "input".
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from local_engine import needs_local
from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from openline.engines.responses import ResponsesEngine
from openline.engines.tiny import TinyEngine
from server.listening import listening
from server.running import until
from server.watching import Frame, Watched, types, watched

STOP_SECONDS_MAX = 1.0  # guarantees, "Cancellation"
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
CUT = {"reason": "steered"}


class Upstream:
    """A model server that streams each of its answers in pieces, all but the first when the test says so."""

    def __init__(self, *answers: tuple[list[Frame], ...]) -> None:
        self._answers = list(answers)
        self.bodies: list[Any] = []
        self.requests: list[web.Request] = []
        self._may_go_on = asyncio.Semaphore(0)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.json())
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        first, *rest = self._answers.pop(0)
        await response.write(_sse(first))
        for piece in rest:
            await self._may_go_on.acquire()
            await response.write(_sse(piece))
        return response

    def go_on(self) -> None:
        """Send the next piece."""
        self._may_go_on.release()

    async def cut_off(self) -> None:
        """Wait until its first connection was closed by the other side."""
        async with asyncio.timeout(STOP_SECONDS_MAX):
            await until(lambda: self.requests[0].transport is None)


def _sse(events: list[Frame]) -> bytes:
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()


@asynccontextmanager
async def steered(start, kind, upstream):
    """A socket to a server in front of an upstream of this kind."""
    async with listening(upstream.answer) as url:
        make = ChatEngine if kind == "chat" else ResponsesEngine
        settings = UpstreamSettings(kind=kind, url=url, profile="sglang" if kind == "chat" else None)
        server = await start(engine=make(settings, show_detail=True))
        async with watched(server) as socket:
            yield socket


async def steer(socket: Watched, behind: str, said: str = "Shorter.", **create: Any) -> Frame:
    """Ask, and steer behind an event of this type; the response that was steered."""
    await socket.create(model="m", tools=[TOOL], **create)
    frames = await socket.until(behind)
    await socket.steer(frames[0]["response"], said)
    assert (await socket.receive())["type"] == "response.steer.accepted"
    return frames[0]["response"]


# --- Chat Completions


def chunk(**delta: Any) -> Frame:
    return {"choices": [{"index": 0, "delta": delta}]}


def called(*ids: str) -> list[Frame]:
    return [
        chunk(tool_calls=[{"index": index, "id": each, "function": {"name": "look", "arguments": "{}"}}])
        for index, each in enumerate(ids)
    ]


CHAT_END: list[Frame] = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}]
CHAT_HI = ([chunk(content="Hi."), *CHAT_END],)


async def test_a_chat_upstream_gets_the_whole_conversation(start):
    """A text finishes, and stands before the user's message (Chat Completions reference, "messages")."""
    upstream = Upstream(([chunk(content="Once ")], [chunk(content="upon."), *CHAT_END]), CHAT_HI)
    async with steered(start, "chat", upstream) as socket:
        await steer(socket, "response.output_text.delta")
        upstream.go_on()
        assert types(await socket.rest())[-1] == "completed"
        assert types(await socket.rest())[-1] == "completed"
    assert upstream.bodies[1]["messages"] == [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Once upon."},
        {"role": "user", "content": "Shorter."},
    ]
    assert upstream.bodies[1]["tools"] == upstream.bodies[0]["tools"]


async def test_a_chat_upstream_is_cut_off_behind_its_reasoning(start):
    """Its connection is closed at the boundary, and its reasoning stays part of the conversation."""
    pieces = [chunk(reasoning_content="Hm.")], [chunk(content="Well")], [chunk(content=", ")]
    upstream = Upstream(pieces, CHAT_HI)
    async with steered(start, "chat", upstream) as socket:
        await steer(socket, "response.reasoning_text.delta")
        upstream.go_on()
        assert (await socket.rest())[-1]["response"]["incomplete_details"] == CUT
        await upstream.cut_off()
        assert types(await socket.rest())[-1] == "completed"
    assert upstream.bodies[1]["messages"] == [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "", "reasoning_content": "Hm."},
        {"role": "user", "content": "Shorter."},
    ]


async def test_a_chat_upstream_that_has_said_nothing_is_cut_off_at_once(start):
    """It learns to stop by its connection's end, within a second (guarantees, "Cancellation")."""
    upstream = Upstream(([chunk(role="assistant", content="")], [chunk(content="x")]), CHAT_HI)
    async with steered(start, "chat", upstream) as socket:
        await steer(socket, "response.in_progress")
        assert (await socket.rest())[-1]["response"]["incomplete_details"] == CUT
        await upstream.cut_off()
        assert types(await socket.rest())[-1] == "completed"
    assert upstream.bodies[1]["messages"] == [
        {"role": "user", "content": "Hello."},
        {"role": "user", "content": "Shorter."},
    ]


@pytest.mark.parametrize("calls", [["call_1"], ["call_1", "call_2"]])
async def test_a_chat_upstream_gets_the_steer_behind_the_tools_outputs(start, calls):
    """Real servers refuse a user's message between a call and its output (Chat Completions reference, "messages")."""
    upstream = Upstream((called(*calls[:1]), [*called(*calls)[1:], *CHAT_END]), CHAT_HI)
    async with steered(start, "chat", upstream) as socket:
        first = await steer(socket, "response.function_call_arguments.delta")
        upstream.go_on()
        await socket.until("response.steer.pending")
        outputs = [{"type": "function_call_output", "call_id": each, "output": "42"} for each in calls]
        await socket.create(model="m", previous_response_id=first["id"], input=outputs)
        assert types(await socket.rest())[-1] == "completed"
    messages = upstream.bodies[1]["messages"]
    roles = [message["role"] for message in messages]
    assert roles == ["user", "assistant", *["tool"] * len(calls), "user"]
    assert [message["tool_call_id"] for message in messages if message["role"] == "tool"] == calls
    assert messages[-1]["content"] == "Shorter."


# --- Responses


def message(text: str, index: int = 0) -> list[Frame]:
    item = {"type": "message", "id": f"msg_up{index}", "role": "assistant", "status": "completed"}
    part = {"type": "output_text", "text": text, "annotations": []}
    at = {"output_index": index, "item_id": item["id"], "content_index": 0}
    return [
        {"type": "response.output_item.added", "output_index": index, "item": {**item, "content": []}},
        {"type": "response.content_part.added", **at, "part": {**part, "text": ""}},
        {"type": "response.output_text.delta", **at, "delta": text, "logprobs": []},
        {"type": "response.output_text.done", **at, "text": text, "logprobs": []},
        {"type": "response.content_part.done", **at, "part": part},
        {"type": "response.output_item.done", "output_index": index, "item": {**item, "content": [part]}},
    ]


def completed() -> Frame:
    usage = {"input_tokens": 1, "output_tokens": 1, "total_tokens": 2}
    return {"type": "response.completed", "response": {"id": "resp_up", "output": [], "usage": usage}}


@pytest.mark.parametrize("then", ["completes", "goes on"])
async def test_a_responses_upstream_gets_the_whole_conversation(start, then):
    """Its items as they went to the client, then the steer as it came; what it begins behind a boundary is cut.

    Source: Responses API reference, "input".
    """
    first = message("One.")
    rest = [completed()] if then == "completes" else message("Two.", 1)
    upstream = Upstream((first[:3], [*first[3:], *rest]), ([*message("Hi."), completed()],))
    async with steered(start, "responses", upstream) as socket:
        await steer(socket, "response.output_text.delta", vendor={"x": 1})
        upstream.go_on()
        end = (await socket.rest())[-1]["response"]
        assert end["incomplete_details"] == (None if then == "completes" else CUT)
        assert types(await socket.rest())[-1] == "completed"
    body = upstream.bodies[1]
    (question, answer, steering) = body.pop("input")
    assert (question["content"][0]["text"], answer) == ("Hello.", end["output"][0])
    assert steering["content"] == [{"type": "input_text", "text": "Shorter."}]
    upstream.bodies[0].pop("input")
    assert body == upstream.bodies[0]  # with fields that only the upstream knows, and no `previous_response_id`
    assert "previous_response_id" not in body


async def test_a_responses_upstream_gets_the_steer_before_the_outputs(start):
    """In the order in which the conversation has them (Mid-turn steering guide: steers are prepended)."""
    call = {"type": "function_call", "id": "fc_up", "call_id": "call_1", "name": "look", "arguments": "{}"}
    begins = {"type": "response.output_item.added", "output_index": 0, "item": {**call, "arguments": ""}}
    ends = {"type": "response.output_item.done", "output_index": 0, "item": {**call, "status": "completed"}}
    upstream = Upstream(([begins], [ends, completed()]), ([*message("Hi."), completed()],))
    async with steered(start, "responses", upstream) as socket:
        first = await steer(socket, "response.output_item.added")
        upstream.go_on()
        await socket.until("response.steer.pending")
        output = {"type": "function_call_output", "call_id": "call_1", "output": "42"}
        await socket.create(model="m", previous_response_id=first["id"], input=[output])
        assert types(await socket.rest())[-1] == "completed"
    assert [item["type"] for item in upstream.bodies[1]["input"]] == [
        "message",
        "function_call",
        "message",
        "function_call_output",
    ]


# --- In this process


async def test_the_script_is_steered(start):
    """Its successor is the conversation's second turn, and reads all of the first."""
    server = await start(upstream={"delta_seconds": 0.02})
    async with watched(server) as socket:
        await socket.create()
        frames = await socket.until("response.output_text.delta")
        await socket.steer(frames[0]["response"])
        await socket.until("response.steer.accepted")
        first, second = [(await socket.rest())[-1]["response"] for _ in range(2)]
    assert second["previous_response_id"] == first["id"]
    assert "in turn 2 of the conversation" in second["output"][0]["content"][0]["text"]
    assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"]


async def test_the_scripts_calls_wait_for_the_client(start):
    """The output of its call comes with the steer (Mid-turn steering guide, "Outcomes", the third)."""
    server = await start(upstream={"delta_seconds": 0.02})
    async with watched(server) as socket:
        await socket.create(model="scripted-tools-3", tools=[TOOL])
        frames = await socket.until("response.function_call_arguments.delta")
        first = frames[0]["response"]
        await socket.steer(first)
        pending = (await socket.until("response.steer.pending"))[-1]
        (stub,) = pending["required_input"]
        answer = {"type": stub["type"], "call_id": stub["call_id"], "output": "42"}
        end = await socket.completed(model="scripted-text", previous_response_id=first["id"], input=[answer])
    assert "in turn 2 of the conversation" in end["output"][0]["content"][0]["text"]


@pytest.fixture
def tiny(tmp_path_factory, monkeypatch):
    """The tiny model's engine, loaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    engine = TinyEngine(UpstreamSettings(kind="gguf", url="tiny"), show_detail=True)
    engine.load()
    return engine


@needs_local
async def test_a_model_in_this_process_is_steered(start, tiny):
    """Its successor's prompt is the whole conversation, most of which its cache has already."""
    server = await start(engine=tiny)
    async with watched(server) as socket:
        await socket.create(model="tiny-text", instructions="Be brief. " * 50)
        frames = await socket.until("response.output_text.delta")
        await socket.steer(frames[0]["response"])
        await socket.until("response.steer.accepted")
        first, second = [(await socket.rest())[-1]["response"] for _ in range(2)]
    assert (first["status"], second["status"]) == ("completed", "completed")
    assert second["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens"] > first["usage"]["total_tokens"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] > 0.9 * first["usage"]["input_tokens"]
