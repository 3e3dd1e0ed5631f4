"""`POST /v1/responses/input_tokens`: what a create would have the model read, counted and not run.

Source: Responses API reference, "Get input token counts".
"""

from __future__ import annotations

import asyncio

import pytest
from openai import AsyncOpenAI

from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from server.hand import Hand

PATH = "/v1/responses/input_tokens"
NOTE = {"type": "function", "name": "note", "parameters": {"type": "object", "properties": {}}, "strict": False}
KEYS = {"keys": {"key-a": "a", "key-b": "b"}}


async def count(server, key=None, **body):
    """A count, of these fields alone."""
    return await server.request("POST", PATH, key=key, json=body)


def kept(server) -> list[bytes]:
    """What SQLite has written; not its file of read marks."""
    return [path.read_bytes() for path in (server.database, server.database.with_name("openline.db-wal"))]


@pytest.mark.parametrize("prefix", ["/v1", "", "/openai/v1"], ids=["v1", "bare", "openai"])
async def test_the_count_is_that_of_the_creates_usage(server, prefix):
    """The answer has two fields; its number is what the same create tells afterwards.

    Source: Responses API reference, "Get input token counts".
    """
    body = {"model": "scripted-text", "input": [{"role": "user", "content": "Count this."}]}
    answer = await server.request("POST", f"{prefix}/responses/input_tokens?beta=true", json=body)
    usage = (await server.post(**body)).json["usage"]
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json == {"object": "response.input_tokens", "input_tokens": usage["input_tokens"]}
    assert usage["input_tokens"] > 0
    assert answer.headers["x-request-id"]
    assert answer.headers["openline-version"]


async def test_a_parents_context_and_model_count(server):
    """With `previous_response_id` the whole conversation is counted, and its model need not be named again.

    Source: Responses API reference, "Get input token counts", table of body fields.
    """
    first = (await server.post(input="One?")).json
    alone = (await count(server, model="scripted-text", input="Two?")).json["input_tokens"]
    behind = (await count(server, input="Two?", previous_response_id=first["id"])).json["input_tokens"]
    second = (await server.post(input="Two?", previous_response_id=first["id"])).json
    assert behind == second["usage"]["input_tokens"] > alone
    assert (await count(server, previous_response_id=second["id"])).json["input_tokens"] > behind


async def test_nothing_runs_and_nothing_is_stored(played, hand):
    """The database and its log have the same bytes as before, and no turn was started."""
    posting = asyncio.ensure_future(played.post(input="One?"))
    (await hand.next_turn()).answer("One.")
    first = (await posting).json
    before = kept(played)
    assert b"One?" in b"".join(before)
    assert (await count(played, input="Two?", previous_response_id=first["id"])).status == 200
    assert kept(played) == before
    assert (hand.is_idle, len(played.registry)) == (True, 0)


async def test_what_another_owner_made_is_unknown(start):
    """Byte for byte the error of an id that nobody was given.

    Source: guarantees, "Owners".
    """
    server = await start(**KEYS)
    response_id = (await server.post(key="key-a")).json["id"]
    assert (await count(server, "key-a", previous_response_id=response_id, input="x")).status == 200
    foreign = await count(server, "key-b", previous_response_id=response_id, input="x")
    nobodys = await count(server, "key-b", previous_response_id="resp_x", input="x")
    assert (foreign.status, foreign.json["error"]["code"]) == (400, "previous_response_not_found")
    assert foreign.body.replace(response_id.encode(), b"resp_x") == nobodys.body


async def test_it_is_behind_the_same_guard(start):
    """Without a key, with a wrong one, and for a foreign page."""
    server = await start(**KEYS)
    assert (await count(server, model="scripted-text", input="x")).status == 401
    assert (await count(server, "key-c", model="scripted-text", input="x")).status == 401
    headers = {"Origin": "http://evil.example"}
    answer = await server.request("POST", PATH, key="key-a", json={}, headers=headers)
    assert (answer.status, answer.json["error"]["code"]) == (403, "origin_not_allowed")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"\xff", b'{"input": 5}', b'{"tools": {}}', b'{"truncation": "maybe"}'),
        b'{"model": "scripted-text"}',
        b'{"model": "scripted-text", "input": []}',
        b'{"input": "Hello."}',
        b'{"model": "gpt-9", "input": "Hello."}',
        b'{"model": "scripted-text", "input": [{"type": "message"}, 5]}',
        b'{"model": "scripted-text", "input": "Hello.", "previous_response_id": "resp_x"}',
        b'{"model": "scripted-text", "input": "Hello.", "previous_response_id": "resp_x", "conversation": "conv_x"}',
        b'{"model": "scripted-tools-3", "input": "Hello.", "tools": [5]}',
        b'{"model": "scripted-text", "input": [{"type": "item_reference", "id": "msg_x"}]}',
        b'{"model": "scripted-text", "input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": ""}]}',
    ],
    ids=lambda body: repr(body)[:60],
)
async def test_what_a_create_is_refused_for_is_refused_here(server, body):
    """With the same status and the same error.

    Source: Responses API reference, "Errors".
    """
    counted = await server.request("POST", PATH, data=body)
    created = await server.request("POST", "/v1/responses", data=body)
    assert counted.status >= 400
    assert (counted.status, counted.json) == (created.status, created.json)


async def test_a_body_above_the_limit_is_413(start):
    """Whether its length is declared or not; the connection answers the next request.

    Source: Responses API reference, "Errors".
    """
    server = await start(limits={"message_bytes_max": 2000})

    async def pieces():
        yield b'{"model": "scripted-text", "input": "' + b"x" * 3000 + b'"}'

    for answer in (await count(server, input="x" * 3000), await server.request("POST", PATH, data=pieces())):
        assert (answer.status, answer.json["error"]["code"]) == (413, "message_too_big")
    assert (await count(server, model="scripted-text", input="x")).status == 200


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_a_wrong_method_is_told_what_is_right(server, method):
    """The path is answered to POST.

    Source: RFC 9110 §15.5.6.
    """
    answer = await server.request(method, PATH)
    assert (answer.status, "POST" in answer.headers["allow"]) == (405, True)


async def test_the_openai_sdk_counts(start):
    """`client.responses.input_tokens.count` works with every field that it knows.

    Source: openai-python, `InputTokens.count`.
    """
    server = await start(**KEYS)
    first = (await server.post(key="key-a")).json
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="key-a", max_retries=0) as client:
        counted = await client.responses.input_tokens.count(
            model="scripted-text",
            input="How much is this?",
            previous_response_id=first["id"],
            instructions="Be brief.",
            tools=[NOTE],
            tool_choice="auto",
            parallel_tool_calls=True,
            text={"format": {"type": "text"}},
            reasoning={"effort": "low"},
            truncation="auto",
            personality="friendly",
            conversation=None,
        )
    assert counted.object == "response.input_tokens"
    assert counted.input_tokens > first["usage"]["input_tokens"]


async def test_an_upstream_that_does_not_count_is_named(start):
    """A 400 that says what could be done, and no guess."""
    settings = UpstreamSettings(kind="chat", url="http://127.0.0.1:9/v1", name="box", profile="ollama")
    server = await start(engine=ChatEngine(settings, show_detail=False))
    answer = await count(server, model="m", input="x")
    assert (answer.status, answer.json["error"]["code"]) == (400, "unsupported_parameter")
    assert "'box' cannot count tokens: it is Ollama" in answer.json["error"]["message"]


class Slow(Hand):
    """Never done with counting."""

    def __init__(self):
        super().__init__()
        self.counting = asyncio.Event()
        self.stopped = asyncio.Event()

    async def count_tokens(self, request):
        self.counting.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()


async def test_a_gone_client_stops_its_count(start):
    """Nobody waits for it then.

    Source: guarantees, "Cancellation".
    """
    engine = Slow()
    server = await start(engine=engine)
    counting = asyncio.ensure_future(count(server, model="m", input="x"))
    await asyncio.wait_for(engine.counting.wait(), 5)
    counting.cancel()
    await asyncio.wait_for(engine.stopped.wait(), 1)
