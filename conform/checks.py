"""What must hold after a case. Pure: each function yields one sentence for each thing that does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from chat_upstream import SHELL_COMMANDS, planned_calls, text_of

Json = dict[str, Any]

SHELL_OUTPUTS = ("created\n", "appended\n", "notes.txt\n", "one\ntwo\n", "2 notes.txt\n")
SHELL_FILES = {
    "notes.txt": "one\ntwo\n",
    "listing.txt": "notes.txt\n",
    "copy.txt": "one\ntwo\n",
    "count.txt": "2 notes.txt\n",
}
PATCHED_FILES = {"patched.txt": "by patch\n"}
TINY_OUTPUTS = ("created", "appended", "openline-tiny.txt", "one\ntwo", "2")
TINY_FILES = {"openline-tiny.txt": "one\ntwo\n"}

QUOTE_CHARS_MAX = 120  # of a value in a message: enough to recognise it


def loop_problems(result: Json, rounds: int, width: int) -> Iterator[str]:
    """Check what a client said about its own loop."""
    if result["responses"] != rounds + 1:
        yield f"the client saw {result['responses']} responses, not {rounds + 1}"
    if len(result["outputs"]) != rounds * width:
        yield f"the client ran {len(result['outputs'])} tools, not {rounds * width}"
    elif not result["text"].endswith(result["outputs"][-1]):
        yield f"the closing text does not quote the last output: {quoted(result['text'])}"


def shell_problems(result: Json, *, patched: bool) -> Iterator[str]:
    """Check what Codex did in its folder."""
    if result["exit_code"] != 0:
        yield f"codex ended with exit code {result['exit_code']}: {' · '.join(result['errors'][-1:])}"
    if tuple(result["outputs"]) != SHELL_OUTPUTS or any(result["exit_codes"]):
        yield f"codex ran {len(result['outputs'])} commands, with the outputs {quoted(result['outputs'])}"
    expected = SHELL_FILES | (PATCHED_FILES if patched else {})
    if result["files"] != expected:
        yield f"the folder holds {quoted(result['files'])}"
    if not result["text"]:
        yield "codex has no closing message"


def tiny_problems(result: Json, rounds: int) -> Iterator[str]:
    """Check a run with the tiny model: it called as often as its name says, and its words are some."""
    if result.get("responses", rounds + 1) != rounds + 1:
        yield f"the client saw {result['responses']} responses, not {rounds + 1}"
    if len(result["outputs"]) != rounds:
        yield f"the client ran {len(result['outputs'])} tools, not {rounds}"
    if not result["text"]:
        yield "there is no closing text"


def tiny_shell_problems(result: Json) -> Iterator[str]:
    """Check what Codex did in its folder with the tiny model's commands."""
    if result["exit_code"] != 0:
        yield f"codex ended with exit code {result['exit_code']}: {' · '.join(result['errors'][-1:])}"
    if tuple(text.strip() for text in result["outputs"]) != TINY_OUTPUTS or any(result["exit_codes"]):
        yield f"codex ran {len(result['outputs'])} commands, with the outputs {quoted(result['outputs'])}"
    if result["files"] != TINY_FILES:
        yield f"the folder holds {quoted(result['files'])}"


def target_problems(result: Json) -> Iterator[str]:
    """Check a run against a server with a model of its own choosing: tools were called, and an answer came."""
    if not result["outputs"]:
        yield "no tool was called"
    if not result["text"]:
        yield "there is no closing text"
    if result.get("exit_code"):
        yield f"exit code {result['exit_code']}"


def context_problems(requests: list[Json], refused: list[str], result: Json, rounds: int) -> Iterator[str]:
    """Check that the model saw the whole conversation, in order, each time.

    `requests` are the bodies that reached the model, one a round and one for the text.
    """
    yield from refusal_problems(refused)
    if len(requests) != rounds + 1:
        yield f"the model was asked {len(requests)} times, not {rounds + 1}"
    if not requests:
        return
    yield from growth_problems(requests)
    yield from opening_problems(requests[0]["messages"], result)
    messages = requests[-1]["messages"]
    seen = [text_of(message) for message in messages if message["role"] == "tool"]
    if not outputs_fit(seen, result["outputs"]):
        yield f"the last request holds the tool outputs {quoted(seen)}, not {quoted(result['outputs'])}"
    ids = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    if len(set(ids)) != len(ids):
        yield f"a tool output is there twice: {quoted(ids)}"


def refusal_problems(refused: list[str]) -> Iterator[str]:
    """Report what the model could not accept."""
    for text in refused:
        yield f"the model refused a conversation: {text}"


def growth_problems(requests: list[Json]) -> Iterator[str]:
    """Check that each request is the one before, then the calls the model made, then one output for each."""
    for number, (before, after) in enumerate(pairwise(requests), 1):
        old, new = before["messages"], after["messages"]
        if new[: len(old)] != old:
            yield f"request {number + 1} does not begin with request {number}"
            continue
        made = [(call.name, json.loads(call.arguments)) for call in planned_calls(before)]
        told = [
            (call["function"]["name"], json.loads(call["function"]["arguments"]))
            for message in new[len(old) :]
            for call in message.get("tool_calls") or []
        ]
        if told != made:
            yield f"request {number + 1} tells of the calls {quoted(told)}, the model made {quoted(made)}"
        answers = sum(1 for message in new[len(old) :] if message["role"] == "tool")
        if answers != len(made):
            yield f"request {number + 1} brings {answers} new tool outputs, not {len(made)}"


def opening_problems(messages: list[Json], result: Json) -> Iterator[str]:
    """Check the instructions and the prompt at the start of the conversation."""
    leading = [message for message in messages if message["role"] in ("system", "developer")]
    if leading != messages[:1]:
        yield f"the roles begin with {quoted([message['role'] for message in messages[:4]])}: want one leading message"
    elif "instructions" in result and text_of(leading[0]) != result["instructions"]:
        yield f"the instructions arrived as {quoted(text_of(leading[0]))}"
    prompts = [message for message in messages if message["role"] == "user" and text_of(message) == result["prompt"]]
    if len(prompts) != 1:
        yield f"the prompt is there {len(prompts)} times"


def outputs_fit(seen: list[str], outputs: list[str]) -> bool:
    """Compare the outputs the model saw with the client's; Codex wraps its own, and a patch may follow them."""
    if tuple(outputs) != SHELL_OUTPUTS:
        return seen == outputs
    return len(seen) in (len(SHELL_COMMANDS), len(SHELL_COMMANDS) + 1) and all(
        text.endswith(output) for text, output in zip(seen, outputs, strict=False)
    )


def transport_problems(transport: str, sockets: int, posts: int, responses: int) -> Iterator[str]:
    """Check on the wire that the client used the transport that the case is about."""
    if transport == "WebSocket" and (sockets != 1 or posts):
        yield f"on the wire: {sockets} WebSockets and {posts} HTTP requests, not one WebSocket alone"
    if transport == "HTTP" and (sockets or posts != responses):
        yield f"on the wire: {posts} HTTP requests and {sockets} WebSockets, not {responses} requests alone"


def increment_problems(creates: list[bool]) -> Iterator[str]:
    """Check that every create but the first continued a response; a client falls back to a full resend silently.

    Codex does so when what it got back differs from what it keeps, in whatever field.
    """
    if creates and creates != [False] + [True] * (len(creates) - 1):
        yield f"on the wire: only {sum(creates)} of {len(creates)} creates name a previous response"


def quoted(value: object) -> str:
    """Return a value short enough for one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= QUOTE_CHARS_MAX else text[:QUOTE_CHARS_MAX] + "…"
