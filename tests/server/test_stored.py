"""What can be asked about a response by its id: it itself, its input, its end; and what strangers learn, which is nothing.

Source: Responses API reference, "Get", "Delete", "Cancel", "List input items".
"""

from __future__ import annotations

import asyncio
import json

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import ResponseItem
from pydantic import TypeAdapter

from openline.protocol.deltas import ReasoningDelta, TextDelta
from server.background import begin, begin_streamed, delete, ended
from server.running import read_sse, until

DONE = b"data: [DONE]\n\n"
KEYS = {"key-a": "a", "key-b": "b"}
UNKNOWN = "resp_" + "0" * 48
# Everything that can be asked by an id.
ROUTES = [
    ("GET", ""),
    ("GET", "?stream=true"),
    ("GET", "?stream=true&starting_after=0"),
    ("GET", "/input_items"),
    ("GET", "/input_items?after=msg_x"),
    ("POST", "/cancel"),
    ("DELETE", ""),
]
KINDS = ["runs", "runs unstored", "ended", "ended unstored", "in the foreground", "deleted"]
LISTED_ITEM = TypeAdapter(ResponseItem)

by_route = pytest.mark.parametrize(("method", "suffix"), ROUTES, ids=[f"{method} {path}" for method, path in ROUTES])


async def ask(server, method, response_id, suffix="", **options):
    """The answer, without what differs from request to request."""
    answer = await server.request(method, f"/v1/responses/{response_id}{suffix}", **options)
    headers = sorted((name, value) for name, value in answer.headers.items() if name.lower() != "x-request-id")
    return answer.status, headers, answer.body


async def made(server, hand, kind, **fields):
    """The id of a response of this kind."""
    if kind == "in the foreground":
        posting = asyncio.ensure_future(server.post(**fields))
        (await hand.next_turn()).answer("Hi.")
        return (await posting).json["id"]
    response_id, turn = await begin_streamed(server, hand, "Hi.", store="unstored" not in kind, **fields)
    if "runs" not in kind:
        turn.finish()
        await ended(server, response_id, key=fields.get("key"))
    if kind == "deleted":
        await delete(server, response_id, key=fields.get("key"))
    return response_id


# --- Whose it is


@pytest.mark.parametrize("kind", KINDS)
@by_route
async def test_another_owners_response_is_an_unknown_one(start, hand, method, suffix, kind):
    """Byte for byte the answer to an id that nobody was given, headers too; and nothing happens to the owner's.

    Source: guarantees, "Isolation".
    """
    server = await start(engine=hand, keys=KEYS)
    response_id = await made(server, hand, kind, key="key-a")
    before = await ask(server, "GET", response_id, key="key-a")
    assert before[0] == (404 if kind == "deleted" else 200)
    status, headers, body = await ask(server, method, response_id, suffix, key="key-b")
    expected = await ask(server, method, UNKNOWN, suffix, key="key-b")
    assert status == 404
    assert (status, headers, body.replace(response_id.encode(), UNKNOWN.encode())) == expected
    assert await ask(server, "GET", response_id, key="key-a") == before


@by_route
async def test_no_key_is_no_answer(start, method, suffix):
    """Without a key every route is a 401, whether there is such a response or not."""
    server = await start(keys=KEYS)
    response_id = (await server.post(key="key-a")).json["id"]
    assert await ask(server, method, response_id, suffix) == await ask(server, method, UNKNOWN, suffix)
    assert (await ask(server, method, response_id, suffix))[0] == 401


@by_route
@pytest.mark.parametrize(
    "written",
    ["resp_x", "%00", "%ED%A0%80", "%F0%9F%98%80", "'%20OR%201=1", "..%20", "x" * 4000],
    ids=lambda name: name[:12],
)
async def test_an_id_may_be_any_text(server, method, suffix, written):
    """What cannot be an id is an unknown one: 404 in the envelope, whatever stands in the path."""
    status, _, body = await ask(server, method, written, suffix)
    assert status == 404
    assert json.loads(body)["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("prefix", ["/v1", "", "/openai/v1"], ids=["v1", "bare", "openai"])
async def test_every_prefix_serves_every_route(server, prefix):
    """The routes answer wherever the create does."""
    response_id = (await begin(server))["id"]
    response = await ended(server, response_id)
    path = f"{prefix}/responses/{response_id}"
    assert (await server.get(path)).json == response
    assert (await server.get(f"{path}/input_items")).json["object"] == "list"
    assert (await server.request("POST", f"{path}/cancel")).json == response
    assert (await server.request("DELETE", path)).json["deleted"] is True


# --- Query parameters


@pytest.mark.parametrize(
    ("suffix", "query", "param"),
    [
        *(("", f"stream={value}", "stream") for value in ("1", "yes", "", "null")),
        *(("", f"include_obfuscation={value}", "include_obfuscation") for value in ("0", "")),
        *((suffix, f"{name}=x", "include") for suffix in ("", "/input_items") for name in ("include", "include[]")),
        *(
            ("", f"stream=true&starting_after={value}", "starting_after")
            for value in ("-1", "x", "", "1.5", "1e3", "%2B1", "%D9%A1", "9" * 16)
        ),
        ("", "starting_after=0", "starting_after"),
        ("", "stream=false&starting_after=0", "starting_after"),
        *(("/input_items", f"limit={value}", "limit") for value in ("0", "101", "-1", "x", "", "1.0", "9" * 16)),
        *(("/input_items", f"order={value}", "order") for value in ("up", "ASC", "")),
        *(("/input_items", f"after={value}", "after") for value in ("msg_x", "", "%00", "x" * 2000)),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else None,
)
async def test_a_bad_query_parameter_is_named(server, suffix, query, param):
    """400 `invalid_value` with the parameter's name, for a response that is there.

    Source: Responses API reference, "Errors".
    """
    response_id = (await server.post()).json["id"]
    answer = await server.get(f"/v1/responses/{response_id}{suffix}?{query}")
    error = answer.json["error"]
    assert (answer.status, error["code"], error["param"]) == (400, "invalid_value", param)
    assert f"'{param}'" in error["message"]
    assert len(answer.body) < 500


async def test_what_a_query_may_say(server):
    """Flags in either case, and parameters that have no effect here, are taken."""
    response = (await server.post()).json
    for query in ("stream=false", "stream=False&include_obfuscation=TRUE", "include[]=message.output_text.logprobs"):
        assert (await server.get(f"/v1/responses/{response['id']}?{query}")).json == response
    query = "limit=100&order=asc&include[]=reasoning.encrypted_content&before=y"
    answer = await server.get(f"/v1/responses/{response['id']}/input_items?{query}")
    assert answer.status == 200


@pytest.mark.parametrize("kind", KINDS[:-1])
async def test_reasoning_is_sealed_where_that_is_asked_for(start, hand, kind):
    """For a client that goes on without the store: it sends the item back, and the model reads what it had thought.

    What was sealed when it was made stays as it is, and without `include` nothing is.

    Source: Responses API reference, "Get a model response", `include`; docs/adr/0008.
    """
    server = await start(engine=hand)
    response_id, ids = await reasoned(server, hand, kind)
    path = f"/v1/responses/{response_id}"
    assert "encrypted_content" not in (await server.get(path)).json["output"][0]
    for name in ("include[]", "include", "include[0]"):
        response = (await server.get(path, params={name: "reasoning.encrypted_content"})).json
        assert [item["id"] for item in response["output"]] == ids
        assert response["output"][0]["encrypted_content"].startswith("oln1.")
    item = {"type": "reasoning", "summary": [], "encrypted_content": response["output"][0]["encrypted_content"]}
    posting = asyncio.ensure_future(server.post(input=[item, message("Go on.")], store=False))
    turn = await hand.next_turn()
    assert b"Hm." in turn.input[0]
    turn.answer("Yes.")
    assert (await posting).status == 200


async def reasoned(server, hand, kind):
    """The id of a response of this kind that has thought first, and the ids of its items."""
    begun = begin(server, store="unstored" not in kind) if kind != "in the foreground" else server.post()
    asked = asyncio.ensure_future(begun)
    turn = await hand.next_turn()
    turn.give(ReasoningDelta("Hm."), TextDelta("Hi."))
    await until(lambda: turn.taken == 1)
    if "runs" not in kind:
        turn.finish()
    answer = await asked
    response_id = answer["id"] if isinstance(answer, dict) else answer.json["id"]
    if "runs" not in kind:
        await server.idle()
    return response_id, [item["id"] for item in (await server.get(f"/v1/responses/{response_id}")).json["output"]]


async def test_what_was_sealed_is_not_sealed_again(start, hand):
    """It opens once, whoever asks how often."""
    server = await start(engine=hand)
    sealed = ["reasoning.encrypted_content"]
    posting = asyncio.ensure_future(server.post(include=sealed))
    (await hand.next_turn()).finish(ReasoningDelta("Hm."), TextDelta("Hi."))
    response = (await posting).json
    got = await server.get(f"/v1/responses/{response['id']}", params={"include[]": sealed})
    assert got.json == response


# --- Input items


def message(text, **more):
    return {"role": "user", "content": [{"type": "input_text", "text": text}], **more}


CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "42"}


async def listed(server, response_id, query="order=asc&limit=100", **options):
    """A page of the items of a response's input."""
    answer = await server.get(f"/v1/responses/{response_id}/input_items?{query}", **options)
    assert answer.status == 200, answer.body
    return answer.json


@pytest.mark.parametrize("kind", KINDS[:-1])
async def test_the_input_is_listed_as_it_was_sent(start, hand, kind):
    """Each item with its type and an id, in the order asked for: the latest first unless it says otherwise.

    The same for what runs, what has ended and what is not stored.

    Source: Responses API reference, "The input item list".
    """
    server = await start(engine=hand)
    items = [message("One", id="msg_mine"), CALL, OUTPUT, message("Two")]
    response_id = await made(server, hand, kind, input=items)
    whole = await listed(server, response_id)
    data = whole["data"]
    assert [item["type"] for item in data] == ["message", "function_call", "function_call_output", "message"]
    for item, sent in zip(data, items, strict=True):
        assert sent.items() <= item.items()
    assert data[0]["id"] == "msg_mine"
    assert len({item["id"] for item in data}) == 4
    assert all(len(item["id"]) <= 64 for item in data)
    assert (whole["object"], whole["has_more"]) == ("list", False)
    assert (whole["first_id"], whole["last_id"]) == (data[0]["id"], data[-1]["id"])
    assert (await listed(server, response_id, "order=desc"))["data"] == data[::-1]
    assert (await listed(server, response_id, ""))["data"] == data[::-1]


async def test_ids_stay_the_same(start, hand):
    """Asked again, while it runs, from memory and out of the store: an item has one id."""
    server = await start(engine=hand, resume={"seconds": 0.05})
    response_id, turn = await begin_streamed(server, hand, "Hi.", input=[message("One"), CALL, OUTPUT])
    first = await listed(server, response_id)
    turn.finish()
    await ended(server, response_id)
    assert await listed(server, response_id) == first
    await until(lambda: server.registry.held.get("local", response_id) is None)
    assert await listed(server, response_id) == first


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [None, 1, 3, 7, 20, 25, 26, 100])
async def test_pages_add_up_to_the_whole(server, order, limit):
    """From each page's last id on, until `has_more` is false: every item once, in order, `limit` (20) at a time.

    Source: Responses API reference, "List input items".
    """
    response_id = (await server.post(input=[message(str(number)) for number in range(26)])).json["id"]
    whole = (await listed(server, response_id, f"order={order}&limit=100"))["data"]
    query = f"order={order}" + (f"&limit={limit}" if limit else "")
    page = await listed(server, response_id, query)
    found = page["data"]
    while page["has_more"]:
        assert len(page["data"]) == (limit or 20)
        page = await listed(server, response_id, f"{query}&after={page['last_id']}")
        assert page["first_id"] == page["data"][0]["id"]
        found += page["data"]
    assert found == whole
    assert len(found) == 26
    behind = await listed(server, response_id, f"{query}&after={page['last_id']}")
    assert behind == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


async def test_pages_end_although_ids_were_sent_twice(server):
    """A client may send an id twice; each item is listed once, and paging does not go round in a circle."""
    items = [message(text, id=item_id) for text, item_id in (("A", "msg_1"), ("B", "msg_2"), ("C", "msg_1"), ("D", ""))]
    response_id = (await server.post(input=items)).json["id"]
    page = await listed(server, response_id, "order=asc&limit=1")
    found = page["data"]
    for _ in range(3):
        assert page["has_more"]
        page = await listed(server, response_id, f"order=asc&limit=1&after={page['last_id']}")
        found += page["data"]
    assert not page["has_more"]
    assert [item["content"][0]["text"] for item in found] == ["A", "B", "C", "D"]
    assert found == (await listed(server, response_id))["data"]


async def test_only_its_own_input_is_listed(server):
    """What it continues was another response's input."""
    first = (await server.post(input="One?")).json["id"]
    second = (await server.post(input="Two?", previous_response_id=first)).json["id"]
    (item,) = (await listed(server, second))["data"]
    assert item["content"] == [{"type": "input_text", "text": "Two?"}]
    third = (await server.post(input=[], previous_response_id=second)).json["id"]
    assert (await listed(server, third))["data"] == []


async def test_sealed_items_are_listed_as_they_were_sent(server):
    """What a client holds sealed for the model is told to nobody in clear.

    Source: docs/adr/0008.
    """
    summing = (await server.post(input=[message("One?"), {"type": "compaction_trigger"}])).json
    (summary,) = [item for item in summing["output"] if item["type"] == "compaction"]
    for fields in ({}, {"background": True}, {"background": True, "store": False}):
        response_id = (await server.post(input=[summary, message("Two?")], **fields)).json["id"]
        item = (await listed(server, response_id))["data"][0]
        assert (item["type"], item["encrypted_content"]) == ("compaction", summary["encrypted_content"])


@pytest.mark.parametrize(
    "item",
    [
        {"role": "user", "content": "Hi."},
        {"type": None, "role": "user", "content": "Hi."},
        {"type": "message", "role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": "Hi there."},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:,x", "detail": "auto"}]},
        {"type": "message", "role": "user", "content": "Hi.", "id": None, "status": None},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
    ],
    ids=lambda item: f"{item.get('type')} {item.get('role')}",
)
async def test_listed_items_have_what_the_sdk_requires(server, item):
    """What clients may leave out is filled in: content as parts, `status`, `id`.

    Source: openai-python, `ResponseItem`.
    """
    response_id = (await server.post(input=[item, message("Go on.")])).json["id"]
    found = (await listed(server, response_id))["data"][0]
    read = LISTED_ITEM.validate_json(json.dumps(found), strict=True)
    assert read.model_dump(mode="json", exclude_unset=True, warnings="error") == found


async def test_listed_calls_have_what_the_sdk_requires(server):
    """Calls and their outputs too.

    Source: openai-python, `ResponseItem`.
    """
    custom = [
        {"type": "custom_tool_call", "call_id": "call_2", "name": "g", "input": "x"},
        {"type": "custom_tool_call_output", "call_id": "call_2", "output": "y"},
    ]
    response_id = (await server.post(input=[CALL, OUTPUT, *custom])).json["id"]
    for item in (await listed(server, response_id))["data"]:
        LISTED_ITEM.validate_json(json.dumps(item), strict=True)
        assert item["status"] == "completed"


@pytest.mark.parametrize("depth", [50, 300, 900, 2000])
async def test_a_deep_item_is_listed_or_was_refused(server, depth):
    """What a create takes can be listed and continued; what is nested too deeply was refused before.

    Source: guarantees, "Bad input".
    """
    items = f'[{{"role":"user","content":"Hi.","x":{"[" * depth}{"]" * depth}}}]'
    body = f'{{"model":"scripted-text","input":{items}}}'
    answer = await server.request("POST", "/v1/responses", data=body)
    if answer.status == 200:
        assert len((await listed(server, answer.json["id"]))["data"]) == 1
        assert (await server.post(previous_response_id=answer.json["id"])).status == 200
    else:
        assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_json")


@pytest.mark.parametrize("field", ["status", "content", "x"])
async def test_a_number_beyond_all_bounds_is_listed(server, field):
    """Items are read no further than they must be: what a create takes can be listed.

    Source: guarantees, "Bad input".
    """
    body = f'{{"model":"scripted-text","input":[{{"role":"user","{field}":1e999}}]}}'
    answer = await server.request("POST", "/v1/responses", data=body)
    page = await server.get(f"/v1/responses/{answer.json['id']}/input_items")
    assert page.status == 200
    assert f'"{field}":1e999'.encode() in page.body


# --- The SDK


@pytest.fixture
async def client(server):
    """The stock client."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="local", max_retries=0) as sdk:
        yield sdk


async def test_the_sdk_polls_follows_lists_and_deletes(client):
    """`retrieve`, `retrieve(stream=True, starting_after=…)`, `input_items.list`, `cancel` and `delete` of openai-python.

    Source: openai-python, `client.responses`.
    """
    items = [message(str(number)) for number in range(45)]
    stream = await client.responses.create(model="scripted-text", input=items, background=True, stream=True)
    events = [event async for event in stream]
    response = events[-1].response
    assert [event.type for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    for after in (0, 7, len(events) - 1):
        resumed = await client.responses.retrieve(response.id, stream=True, starting_after=after)
        assert [event.model_dump() async for event in resumed] == [event.model_dump() for event in events[after + 1 :]]
    polled = await client.responses.retrieve(response.id)
    assert (polled.status, polled.output_text) == ("completed", response.output_text)
    found = [item async for item in client.responses.input_items.list(response.id, order="asc", limit=20)]
    assert [item.content[0].text for item in found] == [str(number) for number in range(45)]
    assert (await client.responses.cancel(response.id)).status == "completed"
    await client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.cancel, client.responses.delete):
        with pytest.raises(openai.NotFoundError):
            await call(response.id)


async def test_the_sdk_begins_and_cancels(start, hand):
    """A background response of openai-python: queued, in progress, cancelled.

    Source: openai-python, `client.responses.cancel`.
    """
    server = await start(engine=hand)
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="local", max_retries=0) as client:
        response = await client.responses.create(model="m", input="Count.", background=True)
        assert response.status == "queued"
        turn = await hand.next_turn()
        assert (await client.responses.retrieve(response.id)).status == "in_progress"
        cancelled = await client.responses.cancel(response.id)
        assert (cancelled.status, cancelled.completed_at) == ("cancelled", None)
        assert turn.closed.is_set()
        assert (await client.responses.retrieve(response.id)) == cancelled


async def test_the_sdk_is_told_what_is_no_longer_kept(start):
    """A conflict, which the SDK's own retries do not make worse.

    Source: docs/adr/0007.
    """
    server = await start(resume={"bytes_max": 1})
    cut = await server.post(background=True, stream=True)
    response_id = read_sse(cut.body.removesuffix(DONE) + DONE)[0]["response"]["id"]
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="local", max_retries=0) as client:
        with pytest.raises(openai.ConflictError) as raised:
            await client.responses.retrieve(response_id, stream=True, starting_after=0)
    assert raised.value.code == "resume_window_exceeded"
