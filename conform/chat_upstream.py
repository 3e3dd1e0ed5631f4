"""A Chat Completions server that behaves like a model with a plan, and remembers every request.

The harness puts it behind the server under test. It is deterministic: what it answers depends on the
request alone, so the same client always meets the same model. Like a real one it refuses a conversation
whose tool calls and tool outputs do not fit together.

The plan comes from the request:

* model `calls-N` or `calls-NxM`: N rounds of one (or M parallel) tool calls, taking the offered tools in
  turn, then a text that quotes the last tool output. N and M count since the last user message.
* model `calls-N-lanes-K`: the same, but every answer stops after its first piece until K of them are open.
* any other model: if a shell is among the tools, the five commands of `SHELL_COMMANDS`, one a round, and a
  patch where the client offers `apply_patch`; then the text. Without tools it is the text at once: a summary,
  if that is what it was asked for. In a conversation that begins with one it goes on where that one ends.
* models that end in `-growing` count 10 000 tokens for every tool output, so that a client's limit is reached at
  a known place.

Run it alone to try a client by hand: `python conform/chat_upstream.py --port 9000`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

Json = dict[str, Any]

SHELL_COMMANDS = (
    "printf 'one\\n' > notes.txt && echo created",
    "printf 'two\\n' >> notes.txt && echo appended",
    "ls notes.txt | tee listing.txt",
    "cat notes.txt | tee copy.txt",
    "wc -l notes.txt | tee count.txt",
)
PATCH = "*** Begin Patch\n*** Add File: patched.txt\n+by patch\n*** End Patch\n"
SHELL_TOOLS = ("exec_command", "shell_command", "shell", "local_shell", "bash")
PLAN = re.compile(r"calls-(\d+)(?:x(\d+))?(?:-lanes-(\d+))?")
SUMMARY = re.compile(r"Done after (\d+) calls\.")
GROWING = "-growing"
GROWING_TOKENS = 10_000

REQUESTS_MAX = 100  # of one case; a conversation that loses its context would never end
REQUEST_BYTES_MAX = 64 * 1024 * 1024  # what the server under test takes at most in one message
TOGETHER_SECONDS_MAX = 5  # that an answer waits for the others; a server that runs one turn at a time never brings them
ARGUMENT_PIECE_CHARS = 7  # small enough to cut through names, numbers and escapes


@dataclass(frozen=True)
class Call:
    """One tool call as the model makes it; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass
class ChatUpstream:
    """The server; `requests` holds the body of every answered completion, `refused` the texts of the 400s.

    Requests for at most one token are kept apart in `warmups`: a server may send them to fill the prefix
    cache of the model before the first turn. `together` counts the answers that were given while as many as
    their model's name asks for were open.
    """

    requests: list[Json] = field(default_factory=list)
    warmups: list[Json] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    together: int = 0
    url: str = ""
    _gate: asyncio.Barrier | None = None
    _runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> str:
        """Listen on loopback; return the base URL, which ends in `/v1`."""
        app = web.Application(client_max_size=REQUEST_BYTES_MAX)
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/chat/completions", self._completions)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        assert self._runner.addresses
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self.url

    async def stop(self) -> None:
        """Close the listener and every connection."""
        if self._runner is not None:
            await self._runner.cleanup()

    def forget(self) -> None:
        """Start a new recording: the next case must not see the last one's requests."""
        self.requests, self.warmups, self.refused = [], [], []
        self.together, self._gate = 0, None

    async def _models(self, _request: web.Request) -> web.Response:
        names = ("calls-20", "calls-4x3", "shell")
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "conform"} for name in names]
        return web.json_response({"object": "list", "data": data})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        body: Json = await request.json()
        problem = misfit(body.get("messages", []))
        if len(self.requests) >= REQUESTS_MAX:
            problem = f"This conversation took {REQUESTS_MAX} requests and still has no end."
        if problem:
            self.refused.append(problem)
            error = {"message": problem, "type": "invalid_request_error", "param": "messages", "code": None}
            return web.json_response({"error": error}, status=400)
        warmup = (body.get("max_completion_tokens") or body.get("max_tokens") or 2) <= 1
        (self.warmups if warmup else self.requests).append(body)
        chunks = list(completion_chunks(body))
        if not body.get("stream"):
            return web.json_response(joined(chunks))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for number, chunk in enumerate(chunks):
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            if number == 0:
                await self._wait_for_lanes(body)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _wait_for_lanes(self, body: Json) -> None:
        """Wait until as many answers are open as the model's name asks for; after one that waits in vain, none does."""
        plan = PLAN.fullmatch(body.get("model", ""))
        if plan is None or plan[3] is None:
            return
        self._gate = self._gate or asyncio.Barrier(int(plan[3]))
        with suppress(asyncio.BrokenBarrierError):
            try:
                async with asyncio.timeout(TOGETHER_SECONDS_MAX):
                    await self._gate.wait()
                self.together += 1
            except TimeoutError:
                await self._gate.abort()


def misfit(messages: list[Json]) -> str | None:
    """Say in OpenAI's words why a conversation is invalid, or return None.

    Every tool call wants exactly one output, directly after the message that made the call.
    """
    if not messages:
        return "Invalid 'messages': empty array."
    waiting: list[str] = []
    for number, message in enumerate(messages):
        role = message.get("role")
        if role == "tool":
            if message.get("tool_call_id") not in waiting:
                return (
                    "Invalid parameter: messages with role 'tool' must be a response to a preceding message"
                    f" with 'tool_calls'. (messages.[{number}])"
                )
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            break
        if role not in ("system", "developer", "user", "assistant"):
            return f"Invalid value: {role!r}. (messages.[{number}].role)"
        waiting = [call["id"] for call in message.get("tool_calls") or []]
    if waiting:
        return (
            "An assistant message with 'tool_calls' must be followed by tool messages responding to each"
            f" 'tool_call_id'. The following tool_call_ids did not have response messages: {', '.join(waiting)}"
        )
    return None


def text_of(message: Json) -> str:
    """Return the text of a message whose content is a string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def planned_calls(body: Json) -> list[Call]:
    """Return the tool calls that the model makes now; empty when it is time for text."""
    functions = [tool["function"] for tool in body.get("tools") or [] if tool.get("type") == "function"]
    if not functions or body.get("tool_choice") == "none":
        return []
    messages = body["messages"]
    if plan := PLAN.fullmatch(body.get("model", "")):
        rounds, width = int(plan[1]), int(plan[2] or 1)
        done = rounds_since_last_user(messages)
        return generic_calls(functions, done, width) if done < rounds else []
    return shell_calls(functions, calls_made(messages))


def calls_made(messages: list[Json]) -> int:
    """Count the tool outputs, and those before a summary by what it says."""
    made = 0
    for message in messages:
        if message.get("role") == "tool":
            made += 1
        elif message.get("role") == "user" and (told := SUMMARY.search(text_of(message))):
            made = int(told[1])
    return made


def rounds_since_last_user(messages: list[Json]) -> int:
    """Count the assistant messages with tool calls that follow the last user message."""
    count = 0
    for message in messages:
        if message.get("role") == "user":
            count = 0
        elif message.get("tool_calls"):
            count += 1
    return count


def generic_calls(functions: list[Json], round_done: int, width: int) -> list[Call]:
    """Return `width` calls of the offered tools in turn, with arguments that fit their schemas."""
    calls = []
    for lane in range(width):
        number = round_done * width + lane
        function = functions[number % len(functions)]
        value = example(function.get("parameters") or {}, "value", number)
        calls.append(Call(f"call_{round_done}_{lane}", function["name"], json.dumps(value, ensure_ascii=False)))
    return calls


def example(schema: Json, name: str, number: int, root: Json | None = None) -> Any:
    """Return a value that satisfies a JSON schema and tells which call it belongs to.

    Strings hold characters outside of ASCII, a quote and a line break, so that nothing on the way can
    treat arguments as plain words.
    """
    root = root if root is not None else schema
    if "$ref" in schema:
        return example(resolve(root, schema["$ref"]), name, number, root)
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return example(choices[0], name, number, root)
    if "const" in schema or "enum" in schema:
        return schema["const"] if "const" in schema else schema["enum"][0]
    kind = schema.get("type", "object")
    match kind[0] if isinstance(kind, list) else kind:
        case "object":
            return {key: example(value, key, number, root) for key, value in schema.get("properties", {}).items()}
        case "array":
            return [example(schema.get("items", {"type": "string"}), name, number, root)]
        case plain:
            return plain_example(plain, name, number)


def plain_example(kind: str, name: str, number: int) -> Any:
    """Return a value of a JSON type that has no parts."""
    values = {"integer": number, "number": number + 0.5, "boolean": number % 2 == 0, "null": None}
    return values.get(kind, f'{name}-{number} "né 漢 🛠"\n')


def resolve(root: Json, reference: str) -> Json:
    """Follow a local JSON pointer such as `#/$defs/Point`."""
    node = root
    for step in reference.removeprefix("#/").split("/"):
        node = node[step]
    return node


def shell_calls(functions: list[Json], made: int) -> list[Call]:
    """Return the next step of the shell plan, told by how many tool outputs there are already."""
    by_name = {function["name"].rsplit("__", 1)[-1]: function for function in functions}
    steps: list[tuple[Json, Json]] = []
    if script := by_name.get("exec"):  # one tool that runs JavaScript, which calls the shell
        steps = [(script, {"input": javascript(command)}) for command in SHELL_COMMANDS]
    elif shell := next((by_name[name] for name in SHELL_TOOLS if name in by_name), None):
        steps = [(shell, shell_arguments(shell, command)) for command in SHELL_COMMANDS]
    if patch := by_name.get("apply_patch"):
        steps.append((patch, {"input": PATCH}))
    if made >= len(steps):
        return []
    function, arguments = steps[made]
    return [Call(f"call_{made}", function["name"], json.dumps(arguments))]


def javascript(command: str) -> str:
    """Wrap a command for a tool that takes JavaScript with a `tools` object in scope."""
    return f"const result = await tools.exec_command({{cmd: {json.dumps(command)}}});\ntext(result.output);\n"


def shell_arguments(shell: Json, command: str) -> Json:
    """Put a command line into the property that the shell tool has for it, as a string or as an argv."""
    parameters = shell.get("parameters", {})
    properties = parameters.get("properties", {})
    key = "cmd" if "cmd" in properties else "command"
    others = {name: example(properties[name], name, 0) for name in parameters.get("required", []) if name != key}
    argv = properties.get(key, {}).get("type") == "array"
    return {**others, key: ["bash", "-lc", command] if argv else command}


def final_text(body: Json) -> str:
    """Return the closing answer: how many tool outputs there are, and the last one word for word."""
    outputs = [text_of(message) for message in body["messages"] if message.get("role") == "tool"]
    if not outputs:
        offered = ", ".join(tool.get("function", {}).get("name", "?") for tool in body.get("tools") or [])
        return f"Nothing to do with these tools: {offered or 'none'}."
    return f"Done after {calls_made(body['messages'])} calls. The last output was: {outputs[-1]}"


def completion_chunks(body: Json) -> Iterator[Json]:
    """Yield the chunks of one streamed completion, in the order of the OpenAI API."""
    base = {"id": "chatcmpl-conform", "object": "chat.completion.chunk", "created": 0, "model": body.get("model", "")}

    def chunk(delta: Json, finish_reason: str | None = None) -> Json:
        return {**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}

    calls = planned_calls(body)
    yield chunk({"role": "assistant", "content": None if calls else ""})
    for index, call in enumerate(calls):
        function = {"name": call.name, "arguments": ""}
        yield chunk({"tool_calls": [{"index": index, "id": call.id, "type": "function", "function": function}]})
        for piece in pieces(call.arguments):
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    if not calls:
        for piece in pieces(final_text(body)):
            yield chunk({"content": piece})
    yield chunk({}, "tool_calls" if calls else "stop")
    prompt_tokens = tokens_of(body)
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 7,
        "total_tokens": prompt_tokens + 7,
        "prompt_tokens_details": {"cached_tokens": prompt_tokens // 2},
    }
    yield {**base, "choices": [], "usage": usage}


def tokens_of(body: Json) -> int:
    """Return how long the prompt is, in tokens."""
    if body.get("model", "").endswith(GROWING):
        return GROWING_TOKENS * sum(message.get("role") == "tool" for message in body["messages"])
    return len(json.dumps(body["messages"])) // 4


def joined(chunks: list[Json]) -> Json:
    """Return the unstreamed completion that the chunks add up to."""
    message: Json = {"role": "assistant", "content": None}
    calls: list[Json] = []
    for delta in (chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]):
        if delta.get("content"):
            message["content"] = (message["content"] or "") + delta["content"]
        for part in delta.get("tool_calls", []):
            if "id" in part:
                calls.append({"id": part["id"], "type": "function", "function": dict(part["function"])})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    if calls:
        message["tool_calls"] = calls
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
    return {**chunks[0], "object": "chat.completion", "choices": [choice], "usage": chunks[-1]["usage"]}


def pieces(text: str) -> Iterator[str]:
    """Cut a text into small pieces, without regard for what it means."""
    for start in range(0, len(text), ARGUMENT_PIECE_CHARS):
        yield text[start : start + ARGUMENT_PIECE_CHARS]


async def _serve(port: int) -> None:
    upstream = ChatUpstream()
    print(await upstream.start(port), flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await upstream.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    asyncio.run(_serve(parser.parse_args().port))
