"""Model servers with the manners of real ones: what they refuse, what they skip, and the streams they send.

A server here reads a request as the real one does, with its `manners`: functions from a request to a
refusal, or to nothing. What its model gets to see is `Seen`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

from aiohttp import web

TOO_LONG = "This is too long."
STREAMS = Path(__file__).parent.parent / "engines" / "quirks"

Body = dict[str, Any]
Manner = Callable[[Body], str | None]


def streams(name: str) -> list[bytes]:
    """The streams of a fixture, in the order in which they are sent; each ends in `[DONE]`."""
    parts = (STREAMS / f"{name}.sse").read_bytes().split(b"data: [DONE]\n\n")
    return [part + b"data: [DONE]\n\n" for part in parts[:-1]]


# What they refuse, in their own words.


def system_leads(body: Body) -> str | None:
    """Qwen's template: vllm-project/vllm#41114, ggml-org/llama.cpp#20215."""
    late = any(message["role"] in {"system", "developer"} for message in body["messages"][1:])
    return "System message must be at the beginning." if late else None


def no_developer(body: Body) -> str | None:
    """Most templates: vllm-project/vllm#42407. Others skip what they do not know: sgl-project/sglang#40082."""
    known = {"system", "user", "assistant", "tool"}
    return None if {message["role"] for message in body["messages"]} <= known else "Unexpected message role."


def roles_alternate(body: Body) -> str | None:
    """Gemma's template: suitenumerique/conversations#197."""
    roles = [message["role"] for message in body["messages"]]
    roles = roles[1:] if roles[0] == "system" else roles
    if any(role != "user" if even else role == "user" for role, even in zip(roles, cycle([True, False]), strict=False)):
        return "Conversation roles must alternate user/assistant/user/assistant/..."
    return None


def ids_have_nine_characters(body: Body) -> str | None:
    """mistral-common, `_validate_tool_call`: vllm-project/vllm#9019."""
    for message in body["messages"]:
        ids = [call["id"] for call in message.get("tool_calls") or []]
        for call_id in ids + ([message["tool_call_id"]] if message["role"] == "tool" else []):
            if not re.fullmatch(r"[a-zA-Z0-9]{9}", call_id):
                return f"Tool call id was {call_id} but must be a-z, A-Z, 0-9, with a length of 9."
    return None


def no_user_after_tool(body: Body) -> str | None:
    """mistral-common's order of messages: zed-industries/zed#37021."""
    roles = [message["role"] for message in body["messages"]]
    for before, role in pairwise(roles):
        if before == "tool" and role not in {"assistant", "tool"}:
            return f"Unexpected role '{role}' after role 'tool'"
    return None


def images_of_users_only(body: Body) -> str | None:
    """OpenAI: jaseci-labs/jac#6370; vllm-project/vllm#43203."""
    for number, message in enumerate(body["messages"]):
        if message["role"] == "tool" and not isinstance(message["content"], str):
            return (
                f"Invalid 'messages[{number}]'. Image URLs are only allowed for messages with role 'user', but this"
                " message with role 'tool' contains an image URL."
            )
    return None


def no_reasoning(body: Body) -> str | None:
    """Groq: tashfeenahmed/freellmapi#1070. Mistral says it otherwise: charmbracelet/crush#1590."""
    for number, message in enumerate(body["messages"]):
        for name in message.keys() & {"reasoning", "reasoning_content"}:
            return f"'messages.{number}' : for 'role:assistant' the following must be satisfied[(property '{name}' is unsupported)]"
    return None


def reasoning_comes_back(body: Body) -> str | None:
    """DeepSeek's thinking mode: QwenLM/qwen-code#3637."""
    if any("tool_calls" in message and "reasoning_content" not in message for message in body["messages"]):
        return "The `reasoning_content` in the thinking mode must be passed back to the API."
    return None


def no_stream_options(body: Body) -> str | None:
    """Mistral's API: openai/openai-agents-python#442."""
    if "stream_options" in body:
        return '[{"type": "extra_forbidden", "loc": ["body", "stream_options", "include_usage"], "msg": "Extra inputs are not permitted"}]'
    return None


def choice_is_text(body: Body) -> str | None:
    """LM Studio: lmstudio-ai/lmstudio-bug-tracker#670."""
    if isinstance(body.get("tool_choice"), dict):
        return "Invalid tool_choice type: 'object'. Supported string values: none, auto, required"
    return None


def no_max_tokens(body: Body) -> str | None:
    """OpenAI's reasoning models."""
    if "max_tokens" in body:
        return (
            "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
        )
    return None


def tools_are_off(body: Body) -> str | None:
    """How vLLM starts by default: vllm-project/vllm#9986."""
    if "tools" in body:
        return '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
    return None


# What the model gets to see.


@dataclass
class Seen:
    """A request as the model sees it.

    Attributes:
        texts: role and text of every message that reaches it.
        reasoning: the earlier reasoning that reaches it.
        calls: ids of its calls, and of the outputs that answer them.
        tools: the names of the tools that it may call, and whether it has to.
    """

    texts: list[tuple[str, str]]
    reasoning: list[str]
    calls: tuple[list[str], list[str]]
    tools: tuple[list[str], Any]


@dataclass
class Reading:
    """How a server reads messages.

    Attributes:
        reasoning: the field in which it looks for earlier reasoning.
        skips_late_system: its template renders a leading system message only.
        choices: the values of `tool_choice` that it understands; others are as if nothing was said.
    """

    reasoning: str = "reasoning_content"
    skips_late_system: bool = False
    choices: Sequence[str] | None = None

    def see(self, body: Body) -> Seen:
        messages = body["messages"]
        if self.skips_late_system:
            messages = messages[:1] + [m for m in messages[1:] if m["role"] not in {"system", "developer"}]
        choice = body.get("tool_choice", "auto")
        if self.choices is not None and choice not in self.choices:
            choice = "auto"
        return Seen(
            [(message["role"], _text(message["content"])) for message in messages if message["content"]],
            [message[self.reasoning] for message in messages if self.reasoning in message],
            (
                [call["id"] for message in messages for call in message.get("tool_calls") or []],
                [message["tool_call_id"] for message in messages if message["role"] == "tool"],
            ),
            ([tool["function"]["name"] for tool in body.get("tools") or []], choice),
        )


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or f"<{part['type']}>" for part in content)


@dataclass
class Quirky:
    """One server: refuses by its manners, else sends its streams in turn, and keeps what it saw.

    A conversation that ends in `TOO_LONG` gets its `refusal`, a status and a body; with 200 inside the stream.
    """

    streams: list[bytes]
    manners: Sequence[Manner] = ()
    reading: Reading = field(default_factory=Reading)
    routes: dict[str, Any] = field(default_factory=dict)
    seen: list[Seen] = field(default_factory=list)
    bodies: list[Body] = field(default_factory=list)
    server: str = ""
    refusal: tuple[int, Body] | None = None
    asked: list[str] = field(default_factory=list)

    async def complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.bodies.append(body)
        for manner in self.manners:
            words = manner(body)
            if words is not None:
                return web.json_response({"error": {"message": words, "type": "BadRequestError"}}, status=400)
        if self.refusal is not None and body["messages"][-1]["content"] == TOO_LONG:
            status, answer = self.refusal
            if status != 200:
                return web.json_response(answer, status=status)
            event = f"event: error\ndata: {json.dumps(answer)}\n\n"
            return web.Response(text=event, content_type="text/event-stream")
        self.seen.append(self.reading.see(body))
        stream = self.streams[min(len(self.seen), len(self.streams)) - 1]
        return web.Response(body=stream, content_type="text/event-stream")

    async def tell(self, request: web.Request) -> web.Response:
        self.asked.append(request.path)
        answer = self.routes.get(request.path)
        if answer is None:
            return web.json_response({"error": "Not found"}, status=404)
        headers = {"Server": self.server} if self.server else None
        return web.json_response(answer, headers=headers)


@asynccontextmanager
async def listening(quirky: Quirky):
    """Its URL, while the block runs."""
    app = web.Application(client_max_size=64 * 1024 * 1024)
    app.router.add_post("/v1/chat/completions", quirky.complete)
    app.router.add_route("*", "/{path:.*}", quirky.tell)
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


def dumps(value: Any) -> str:
    """A value for a failing test's message."""
    return json.dumps(value, ensure_ascii=False, indent=1, default=str)
