"""What must hold after a case. Pure: each function yields one sentence for each thing that does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

from chat_upstream import SHELL_COMMANDS, final_text, planned_calls, text_of
from relay import CREATE, Frame

Json = dict[str, Any]
Said = list[tuple[str, str]]  # a conversation, as roles and texts

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


def listed_problems(result: Json, requests: list[tuple[str, str]]) -> Iterator[str]:
    """Check that Codex asked for the list of models, and found there all that it wants to know."""
    if not any(method == "GET" and path.startswith("/v1/models?client_version=") for method, path in requests):
        yield "on the wire: codex did not ask for the list of models"
    unknown = [text for text in result["warnings"] if "metadata" in text]
    if unknown:
        yield f"codex warned: {quoted(unknown)}"


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
    seen = tool_outputs(requests[-1])
    if not outputs_fit(seen, result["outputs"]):
        yield f"the last request holds the tool outputs {quoted(seen)}, not {quoted(result['outputs'])}"
    ids = [message["tool_call_id"] for message in messages if message["role"] == "tool"]
    if len(set(ids)) != len(ids):
        yield f"a tool output is there twice: {quoted(ids)}"


def compaction_problems(requests: list[Json], refused: list[str], result: Json, rounds: int) -> Iterator[str]:
    """Check that the model saw the whole conversation until it summed it up, then the summary and nothing older.

    `requests` are one a round, one for the summary, which offers no tools, and one for the text.
    """
    yield from refusal_problems(refused)
    sums = [number for number, request in enumerate(requests) if not request.get("tools")]
    if len(requests) != rounds + 2 or len(sums) != 1 or sums[0] in (0, len(requests) - 1):
        yield f"the model was asked {len(requests)} times, not {rounds + 2}; without tools as request {quoted(sums)}"
        return
    asked, after = requests[sums[0]], requests[sums[0] + 1 :]
    yield from growth_problems(requests[: sums[0] + 1])
    yield from growth_problems(after)
    yield from opening_problems(requests[0]["messages"], result)
    yield from opening_problems(after[0]["messages"], result)
    told = [message for message in after[0]["messages"] if final_text(asked).strip() in text_of(message)]
    if [message["role"] for message in told] != ["user"] or told[-1:] != after[0]["messages"][-1:]:
        yield f"behind the summary the model was told {quoted(after[0]['messages'][-1])}"
    old = [message["role"] for message in after[0]["messages"] if message["role"] in ("assistant", "tool")]
    if old:
        yield f"behind the summary there are still {len(old)} messages of before"
    outputs = [*tool_outputs(asked), *tool_outputs(after[-1])]
    if not outputs_fit(outputs, result["outputs"]):
        yield f"the model saw the tool outputs {quoted(outputs)}, not {quoted(result['outputs'])}"


def tool_outputs(request: Json) -> list[str]:
    """Return the texts of a request's tool outputs."""
    return [text_of(message) for message in request["messages"] if message["role"] == "tool"]


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


def transport_problems(
    transport: str, sockets: int, posts: int, responses: int, sockets_wanted: int = 1
) -> Iterator[str]:
    """Check on the wire that the client used the transport that the case is about."""
    if transport == "WebSocket" and (sockets != sockets_wanted or posts):
        yield f"on the wire: {sockets} WebSockets and {posts} HTTP requests, not {sockets_wanted} WebSocket alone"
    if transport == "HTTP" and (sockets or posts != responses):
        yield f"on the wire: {posts} HTTP requests and {sockets} WebSockets, not {responses} requests alone"


def increment_problems(frames: list[Frame], turns: int) -> Iterator[str]:
    """Check that each of the creates continued the response before it on the same socket, and sent nothing twice.

    A client falls back to a full resend without a word: Codex does so when what it got back differs from what it
    keeps, in whatever field.
    """
    creates = sum(event["type"] == CREATE for _, event in frames)
    if creates != turns:
        yield f"on the wire: {creates} creates, not {turns}"
    latest: dict[int, str] = {}
    sent: set[str] = set()
    for socket, event in frames:
        if event["type"] != CREATE:
            latest[socket] = (event.get("response") or {}).get("id", "")
            continue
        parent = event.get("previous_response_id")
        if parent != latest.get(socket):
            yield f"on the wire: a create names {parent} as previous response, not {latest.get(socket)}"
        items = event["input"] if isinstance(event["input"], list) else [event["input"]]
        texts = {json.dumps(item, sort_keys=True) for item in items}
        yield from (f"on the wire: sent twice: {quoted(text)}" for text in texts & sent)
        sent |= texts


def compaction_wire_problems(frames: list[Frame], turns: int, *, by_server: bool) -> Iterator[str]:
    """Check that a client sends increments before and behind a summary, and that whose it is to make has made it.

    Without a parent is the first create, the one behind the summary, and the one for it where the client makes it. The
    server's is a compaction item alone, which comes back as it was.
    """
    creates = [event for _, event in frames if event["type"] == CREATE]
    ends = [event for _, event in frames if event["type"] != CREATE]
    fresh = sum(create.get("previous_response_id") is None for create in creates)
    if len(creates) != turns or fresh != (2 if by_server else 3):
        yield f"on the wire: {len(creates)} creates, {fresh} of them without a parent"
    triggers = [at for at, create in enumerate(creates) if items_of(create, "compaction_trigger")]
    if len(triggers) != by_server:
        yield f"on the wire: {len(triggers)} creates ask for a summary"
    for at in triggers:
        made = ends[at]["response"]["output"] if at < len(ends) else []
        if [item["type"] for item in made] != ["compaction"]:
            yield f"on the wire: the summary's response has the output {quoted(made)}"
        elif at + 1 == len(creates) or items_of(creates[at + 1], "compaction")[-1:] != made:
            yield "on the wire: the create behind the summary does not send it"


def items_of(create: Json, item_type: str) -> list[Json]:
    """Return the items of a type in a create's input."""
    items = create["input"] if isinstance(create["input"], list) else []
    return [item for item in items if item.get("type") == item_type]


def warm_up_problems(frames: list[Frame]) -> Iterator[str]:
    """Check that the first create, and no other, asked for no output, and got none."""
    creates = [event for _, event in frames if event["type"] == CREATE]
    silent = [event.get("generate") is False for event in creates]
    if silent != [True] + [False] * (len(creates) - 1):
        yield f"on the wire: `generate` is false in {sum(silent)} of {len(creates)} creates, not in the first alone"
    ends = [event for _, event in frames if event["type"] != CREATE]
    if ends and (ends[0]["type"] != "response.completed" or ends[0]["response"]["output"]):
        yield f"on the wire: the warm-up ended with {quoted(ends[0])}"


def lanes_problems(result: Json, rounds: int) -> Iterator[str]:
    """Check what a client said about its branches: each is a conversation, with tool calls after every prompt."""
    for branch in result["branches"]:
        name, said = branch["name"], branch["said"]
        prompts = [role for role, _ in said].count("user")
        if len(turns_of(said)) != prompts * (rounds + 1):
            yield f"{name}: {len(turns_of(said))} turns, not {prompts * (rounds + 1)}"
        elif not said[-1][1].endswith(said[-2][1]):
            yield f"{name}: the closing text does not quote the last output: {quoted(said[-1][1])}"


def lanes_wire_problems(frames: list[Frame], lanes: int) -> Iterator[str]:
    """Check on the wire that turns of all lanes were open at once, and that each ended on its lane."""
    running: set[str | None] = set()
    most = 0
    for _, event in frames:
        lane = event.get("stream_id")
        if (event["type"] == CREATE) == (lane in running):
            yield f"on the wire: lane {lane} was {'' if lane in running else 'not '}in use at {quoted(event)}"
        running ^= {lane}
        most = max(most, len(running))
    if most != lanes:
        yield f"on the wire: at most {most} lanes were in use at once, not {lanes}"


def lanes_context_problems(requests: list[Json], refused: list[str], together: int, result: Json) -> Iterator[str]:
    """Check that the model saw the whole context of each branch, turn by turn, and answered all lanes at once."""
    yield from refusal_problems(refused)
    if together != len(requests):
        yield f"only {together} of {len(requests)} answers were open at the same time as those of all other lanes"
    seen: list[Json] = []
    for branch in result["branches"]:
        said = [(role, text) for role, text in branch["said"]]
        whole = [request for request in requests if told(request) == said[:-1]]
        if len(whole) != 1:
            yield f"{branch['name']}: {len(whole)} requests hold its whole context: {quoted(said[:-1])}"
            continue
        messages = whole[0]["messages"]
        line = [request for request in requests if request["messages"] == messages[: len(request["messages"])]]
        if len(line) != len(turns_of(said)):
            yield f"{branch['name']}: {len(line)} requests lead up to it, not {len(turns_of(said))}"
        yield from growth_problems(line)
        seen += [request for request in line if request not in seen]
    if len(seen) != len(requests):
        yield f"{len(requests) - len(seen)} requests belong to no branch"


def turns_of(said: Said) -> Said:
    """Return what stands for the turns of a conversation: each made one call, or closed with a text."""
    return [(role, text) for role, text in said if role != "user"]


def told(request: Json) -> Said:
    """Return the conversation that the model was told, without instructions and calls."""
    spoken = [(message["role"], text_of(message)) for message in request["messages"]]
    return [(role, text) for role, text in spoken if text and role not in ("system", "developer")]


def suite_problems(result: Json, tests: tuple[str, ...]) -> Iterator[str]:
    """Check that every test ran, and report what the suite said of those that failed."""
    for name in tests:
        found = [test for test in result["tests"] if test["id"] == name]
        if [test["status"] for test in found] != ["passed"]:
            said = [error for test in found for error in test.get("errors") or [test["status"]]]
            yield f"{name}: {' · '.join(said) or 'did not run'}"


def suite_transport_problems(transport: str, sockets: int, posts: int, tests: int) -> Iterator[str]:
    """Check on the wire that each test used its transport; some open two sockets."""
    if transport == "WebSocket" and (sockets < tests or posts):
        yield f"on the wire: {sockets} WebSockets and {posts} HTTP requests, for {tests} tests"
    if transport == "HTTP" and (sockets or not posts):
        yield f"on the wire: {sockets} WebSockets and {posts} HTTP requests, for {tests} tests"


def suite_context_problems(requests: list[Json], refused: list[str], result: Json) -> Iterator[str]:
    """Check that the model saw the whole conversation of each response; the suite itself accepts lost history."""
    yield from refusal_problems(refused)
    seen = [contents(request["messages"]) for request in requests]
    whole: dict[str | None, Said] = {}  # conversations by the id of the response that ends them
    for test, request, response in suite_turns(result["tests"]):
        said = contents(messages_of(request["input"]))
        if response.get("status") == "completed":
            conversation = whole.get(request.get("previous_response_id"), []) + said
            whole[response["id"]] = conversation + contents(messages_of(response["output"]))
            if conversation not in seen:
                yield f"{test}: the model never saw the whole conversation {quoted(conversation)}"
        elif response.get("type") == "error" and said and any(other[-len(said) :] == said for other in seen):
            yield f"{test}: what the server refused reached the model: {quoted(said)}"


def suite_turns(tests: list[Json]) -> Iterator[tuple[str, Json, Json]]:
    """Yield name, request and response of each turn of the tests that passed, but those that begin by compacting."""
    for test in tests:
        request, response = test.get("request"), test.get("response")
        if test["status"] == "passed":
            turns = zip(request, response, strict=True) if isinstance(request, list) else [(request, response)]
            yield from ((test["id"], asked, answer) for asked, answer in turns if "input" in asked)


def messages_of(items: str | list[Json]) -> list[Json]:
    """Return the messages among the items of a request or a response."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    return [item for item in items if item.get("type", "message") == "message"]


def contents(messages: list[Json]) -> Said:
    """Return the roles and contents of messages, images included, whichever API they are written for.

    Messages of one role in a row count as one: the server joins those of the assistant for models that want it so.
    """
    turns = groupby(messages, key=lambda message: message["role"])
    said = [
        (role, [part for message in turn for part in parts_of(message.get("content") or "")]) for role, turn in turns
    ]
    return [(role, "\n".join(parts)) for role, parts in said]


def parts_of(content: str | list[Json]) -> list[str]:
    """Return the texts and the images' addresses in a content."""
    if isinstance(content, str):
        return [content]
    images = [part.get("image_url") for part in content]
    addresses = [image["url"] if isinstance(image, dict) else image for image in images]
    return [address or part.get("text", "") for part, address in zip(content, addresses, strict=True)]


def quoted(value: object) -> str:
    """Return a value short enough for one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= QUOTE_CHARS_MAX else text[:QUOTE_CHARS_MAX] + "…"
