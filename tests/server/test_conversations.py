"""Conversations over HTTP: made, shown, changed, listed and deleted; and the turns that name one.

Source: Responses API reference, "Conversations", "Conversation items", `conversation`.
"""

from __future__ import annotations

import asyncio
import json
import re

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.conversations import Conversation, ConversationItem
from pydantic import TypeAdapter

from openline.protocol.deltas import Ended, TextDelta
from openline.state.nothing import NothingStore
from openline.state.sqlite import SqliteStore
from server.running import WAIT_SECONDS_MAX, until
from state.stores import conversation as stored_conversation

PATH = "/v1/conversations"
UNKNOWN = "conv_" + "0" * 48
LISTED_ITEM = TypeAdapter(ConversationItem)
CALL = {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "42"}


def message(text, **more):
    return {"role": "user", "content": text, **more}


def text_of(item):
    return "".join(part["text"] for part in item["content"])


async def made(server, *items, **body):
    """The id of a new conversation."""
    answer = await server.request("POST", PATH, json={"items": list(items), **body})
    assert answer.status == 200, answer.body
    return answer.json["id"]


async def listed(server, conversation_id, query="order=asc&limit=100"):
    """A page of its items."""
    answer = await server.get(f"{PATH}/{conversation_id}/items?{query}")
    assert answer.status == 200, answer.body
    return answer.json


async def texts(server, conversation_id):
    """What was said in it, oldest first."""
    return [text_of(item) for item in (await listed(server, conversation_id))["data"]]


async def answered(hand, asking, *texts):
    """What answers a request; and the turn of the engine, which says this."""
    asked = asyncio.ensure_future(asking)
    turn = await hand.next_turn()
    turn.finish(*map(TextDelta, texts))
    return await asked, turn


def read(turn):
    """What the model of a turn reads."""
    items = (json.loads(raw) for raw in turn.input)
    return [item["content"] if isinstance(item["content"], str) else text_of(item) for item in items]


def not_found(conversation_id):
    """The one error for an unknown conversation."""
    message = f"Conversation with id '{conversation_id}' not found."
    return {"error": {"message": message, "type": "invalid_request_error", "param": "conversation", "code": None}}


# --- The conversation itself -----------------------------------------------------------------------


async def test_it_is_made_shown_changed_and_deleted(server):
    """An object with its metadata, which can be replaced; once deleted it is unknown, and so are its items.

    Source: openai-python, `Conversation`.
    """
    created = (await server.request("POST", PATH, json={"metadata": {"topic": "sockets"}})).json
    Conversation.model_validate_json(json.dumps(created), strict=True)
    assert created == {**created, "object": "conversation", "metadata": {"topic": "sockets"}}
    path = f"{PATH}/{created['id']}"
    assert (await server.get(path)).json == created
    changed = {**created, "metadata": {"topic": "ports"}}
    assert (await server.request("POST", path, json={"metadata": {"topic": "ports"}})).json == changed
    assert (await server.request("POST", path, json={"metadata": None})).json == {**created, "metadata": {}}
    await server.request("POST", f"{path}/items", json={"items": [message("Hi.")]})
    deleted = {"id": created["id"], "object": "conversation.deleted", "deleted": True}
    assert (await server.request("DELETE", path)).json == deleted
    for method, suffix in (("GET", ""), ("DELETE", ""), ("GET", "/items")):
        answer = await server.request(method, path + suffix)
        assert (answer.status, answer.json) == (404, not_found(created["id"]))


@pytest.mark.parametrize("body", [b"", b"{}", b'{"items":null,"metadata":null}'])
async def test_nothing_is_needed_to_make_one(server, body):
    """A conversation may begin empty, and without a body."""
    created = (await server.request("POST", PATH, data=body)).json
    assert created["metadata"] == {}
    assert re.fullmatch("conv_[0-9a-f]{48}", created["id"])
    nothing = {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert await listed(server, created["id"]) == nothing


@pytest.mark.parametrize("prefix", ["/v1", "", "/openai/v1"], ids=["v1", "bare", "openai"])
async def test_every_prefix_serves_it(server, prefix):
    """The routes answer wherever the create does."""
    conversation_id = (await server.request("POST", f"{prefix}/conversations")).json["id"]
    assert (await server.get(f"{prefix}/conversations/{conversation_id}")).status == 200
    assert (await server.get(f"{prefix}/conversations/{conversation_id}/items")).status == 200


async def test_a_store_that_keeps_nothing_has_none(start):
    """It says so, and does not ask to try again.

    Source: README, "What is remembered", `--store none`.
    """
    server = await start(store=NothingStore())
    answer = await server.request("POST", PATH, json={})
    assert (answer.status, answer.headers.get("retry-after")) == (400, None)
    assert "--store none" in answer.json["error"]["message"]


# --- Its items -------------------------------------------------------------------------------------


async def test_items_are_added_listed_fetched_and_deleted(server):
    """Each under an id of ours, so that two that a client gave the same can stand in one conversation."""
    conversation_id = await made(server, message("One", id="msg_mine"), message("Two", id="msg_mine"))
    path = f"{PATH}/{conversation_id}"
    added = (await server.request("POST", f"{path}/items", json={"items": [message("Three"), CALL]})).json
    page = await listed(server, conversation_id)
    assert page["data"][2:] == added["data"]
    assert (added["first_id"], added["last_id"]) == (added["data"][0]["id"], added["data"][1]["id"])
    assert [item["type"] for item in page["data"]] == ["message", "message", "message", "function_call"]
    ids = [item["id"] for item in page["data"]]
    assert len({*ids, "msg_mine"}) == 5
    assert (await server.get(f"{path}/items/{ids[1]}")).json == page["data"][1]
    assert (await server.request("DELETE", f"{path}/items/{ids[1]}")).json == (await server.get(path)).json
    assert [item["id"] for item in (await listed(server, conversation_id))["data"]] == [ids[0], *ids[2:]]
    for method in ("GET", "DELETE"):
        answer = await server.request(method, f"{path}/items/{ids[1]}")
        assert answer.status == 404
        assert answer.json["error"]["message"] == f"Conversation item with id '{ids[1]}' not found."


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("limit", [None, 1, 7, 20, 25, 26, 100])
async def test_pages_add_up_to_the_whole(server, order, limit):
    """From each page's last id on, until `has_more` is false: every item once, in order, `limit` (20) at a time.

    Source: Responses API reference, "List items".
    """
    conversation_id = await made(server, *(message(str(number)) for number in range(20)))
    more = {"items": [message(str(number)) for number in range(20, 26)]}
    await server.request("POST", f"{PATH}/{conversation_id}/items", json=more)
    query = f"order={order}" + (f"&limit={limit}" if limit else "")
    page = await listed(server, conversation_id, query)
    found = page["data"]
    while page["has_more"]:
        assert len(page["data"]) == (limit or 20)
        page = await listed(server, conversation_id, f"{query}&after={page['last_id']}")
        assert page["first_id"] == page["data"][0]["id"]
        found += page["data"]
    numbers = [int(text_of(item)) for item in found]
    assert numbers == sorted(range(26), reverse=order == "desc")


@pytest.mark.parametrize(
    "item",
    [
        message("Hi."),
        {"type": None, "role": "user", "content": "Hi."},
        {"type": "message", "role": "developer", "content": "Be brief."},
        {"role": "assistant", "content": "Hi there."},
        {"role": "user", "content": [{"type": "input_image", "image_url": "data:,x", "detail": "auto"}]},
        {"type": "message", "role": "user", "content": "Hi.", "id": None, "status": None},
        CALL,
        OUTPUT,
        {"type": "custom_tool_call", "call_id": "call_2", "name": "g", "input": "x"},
        {"type": "reasoning", "summary": [], "encrypted_content": "x"},
    ],
    ids=lambda item: f"{item.get('type')} {item.get('role')}",
)
async def test_items_have_what_the_sdk_requires(server, item):
    """What clients may leave out is filled in wherever an item is shown: content as parts, `status`, `id`.

    Source: openai-python, `ConversationItem`.
    """
    conversation_id = await made(server)
    path = f"{PATH}/{conversation_id}/items"
    (added,) = (await server.request("POST", path, json={"items": [item]})).json["data"]
    item_type = LISTED_ITEM.validate_json(json.dumps(added), strict=True)
    assert item_type.id == added["id"]
    assert (await listed(server, conversation_id))["data"] == [added]
    assert (await server.get(f"{path}/{added['id']}")).json == added


# --- What is refused -------------------------------------------------------------------------------


TOO_MANY = {"items": [message("x")] * 21}


@pytest.mark.parametrize(
    ("suffix", "body", "code", "param"),
    [
        ("", b"[]", "invalid_type", None),
        ("", b"{", "invalid_json", None),
        ("", b'{"items":[{"role":"user","content":"\xff"}]}', "invalid_json", None),
        ("", b'{"items":[{"role":"user","content":"\\ud800"}]}', "invalid_json", None),
        ("", b'{"items":[{"role":"user","content":NaN}]}', "invalid_json", None),
        ("", {"items": "Hi."}, "invalid_type", "items"),
        ("", {"items": [message("x"), 5]}, "invalid_type", "items[1]"),
        ("", {"items": [{"content": "x"}]}, "missing_required_parameter", "items[0].type"),
        ("", {"items": [message("x"), {"type": "item_reference", "id": "msg_1"}]}, "invalid_value", "items[1]"),
        ("", {"items": [{"id": "msg_1"}]}, "invalid_value", "items[0]"),
        ("", TOO_MANY, "invalid_value", "items"),
        ("", {"metadata": {str(number): "" for number in range(17)}}, "invalid_value", "metadata"),
        ("", {"metadata": {"k" * 65: ""}}, "invalid_value", "metadata"),
        ("", {"metadata": {"k": "v" * 513}}, "invalid_value", "metadata[*]"),
        ("/{id}", {}, "missing_required_parameter", "metadata"),
        ("/{id}", {"metadata": 5}, "invalid_type", "metadata"),
        ("/{id}/items", {}, "missing_required_parameter", "items"),
        ("/{id}/items", {"items": []}, "invalid_value", "items"),
        ("/{id}/items", TOO_MANY, "invalid_value", "items"),
    ],
)
async def test_a_bad_body_is_named(server, suffix, body, code, param):
    """400 in the envelope with the field at fault, and nothing is changed.

    Source: Responses API reference, "Errors"; guarantees, "Bad input".
    """
    conversation_id = await made(server, message("There."), metadata={"a": "b"})
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await server.request("POST", PATH + suffix.format(id=conversation_id), data=data)
    assert (answer.status, answer.json["error"]["code"], answer.json["error"]["param"]) == (400, code, param)
    assert await texts(server, conversation_id) == ["There."]
    assert (await server.get(f"{PATH}/{conversation_id}")).json["metadata"] == {"a": "b"}


@pytest.mark.parametrize("depth", [50, 300, 900, 2000])
@pytest.mark.parametrize("where", ["added", "in a turn"])
async def test_a_deep_item_is_listed_or_was_refused(server, depth, where):
    """What is taken can be listed and read by a turn; what is nested too deeply was refused before.

    Source: guarantees, "Bad input".
    """
    await odd_item(server, "[" * depth + "]" * depth, where)


@pytest.mark.parametrize("where", ["added", "in a turn"])
@pytest.mark.parametrize("field", ["content", "status", "x"])
async def test_a_number_beyond_all_bounds_fails_nothing(server, field, where):
    """Items are read no further than they must be: one that no reader could hold stays what it is, its engine's.

    Source: guarantees, "Bad input".
    """
    await odd_item(server, "1e999", where, field)


async def odd_item(server, value, where, field="x"):
    """Bring an item with such a field into a conversation."""
    conversation_id = await made(server)
    item = f'{{"role":"user","content":"Hi.","{field}":{value}}}'
    if where == "added":
        path, body = f"{PATH}/{conversation_id}/items", f'{{"items":[{item}]}}'
    else:
        path, body = "/v1/responses", f'{{"model":"scripted-text","conversation":"{conversation_id}","input":[{item}]}}'
    answer = await server.request("POST", path, data=body)
    if answer.status != 200:
        assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_json")
        return
    assert len((await listed(server, conversation_id))["data"]) == (1 if where == "added" else 2)
    assert (await server.post(conversation=conversation_id, input="Go on.")).status == 200


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("order=up", "order"),
        ("after=x", "after"),
        ("include[]=x", "include"),
    ],
)
async def test_a_bad_query_parameter_is_named(server, query, param):
    """As of every list.

    Source: Responses API reference, "List items".
    """
    conversation_id = await made(server, message("x"))
    answer = await server.get(f"{PATH}/{conversation_id}/items?{query}")
    assert (answer.status, answer.json["error"]["param"]) == (400, param)


async def test_a_body_above_the_limit_is_413(start):
    """And it is not waited for where its length is said.

    Source: guarantees, "Oversize".
    """
    server = await start(limits={"message_bytes_max": 2000})
    assert (await server.request("POST", PATH, json={"items": [message("x" * 3000)]})).status == 413
    reader, writer = await asyncio.open_connection(*server.address.split(":"))
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        assert (await reader.readline()).split()[1] == b"413"
    writer.close()


async def test_more_than_it_can_hold_is_refused(start):
    """All of a request's items or none, and a turn that would overfill it fails without leaving a part of itself."""
    server = await start(store=SqliteStore(None, conversation_items_max=21))
    conversation_id = await made(server, *(message(str(number)) for number in range(20)))
    answer = await server.request("POST", f"{PATH}/{conversation_id}/items", json={"items": [message("x")] * 2})
    assert (answer.status, answer.json["error"]["param"]) == (400, "items")
    assert "cannot hold more than 21 items" in answer.json["error"]["message"]
    answer = await server.post(conversation=conversation_id)
    assert (answer.status, answer.json["error"]["param"]) == (400, "conversation")
    assert len((await listed(server, conversation_id))["data"]) == 20


# --- Turns of a conversation -----------------------------------------------------------------------


@pytest.mark.parametrize("named", ["text", "object"])
async def test_a_turn_reads_it_all_and_adds_its_own(played, hand, named):
    """Its items come first, input and output are added behind; the response names it.

    Source: Responses API reference, "conversation".
    """
    conversation_id = await made(played, message("1"))
    naming = conversation_id if named == "text" else {"id": conversation_id}
    for asked, said, before in (("2", "3", ["1"]), ("4", "5", ["1", "2", "3"])):
        answer, turn = await answered(hand, played.post(conversation=naming, input=asked), said)
        assert read(turn) == [*before, asked]
        assert answer.json["conversation"] == {"id": conversation_id}
    assert await texts(played, conversation_id) == ["1", "2", "3", "4", "5"]
    (said,) = answer.json["output"]
    assert (await listed(played, conversation_id))["data"][-1] == said


@pytest.mark.parametrize("how", ["json", "sse", "websocket", "background"])
async def test_every_transport_adds_to_it(played, hand, how):
    """However the turn is read, what was said is in the conversation before its end is told."""
    conversation_id = await made(played)
    fields = {"conversation": conversation_id, "input": "1"}
    if how == "websocket":
        async with played.connect() as socket:
            await answered(hand, socket.completed(**fields), "2")
    else:
        more = {"json": {}, "sse": {"stream": True}, "background": {"background": True}}[how]
        await answered(hand, played.post(**fields, **more), "2")
        await played.idle()
    assert await texts(played, conversation_id) == ["1", "2"]


async def test_an_unstored_turn_adds_to_the_conversation_that_it_names(played, hand):
    """`store: false` is about the response; a conversation is kept, and so is what a client says in it.

    Source: docs/reference/create.md, `store`.
    """
    conversation_id = await made(played)
    answer, _ = await answered(hand, played.post(conversation=conversation_id, input="1", store=False), "2")
    assert (await played.get(f"/v1/responses/{answer.json['id']}")).status == 404
    assert await texts(played, conversation_id) == ["1", "2"]


@pytest.mark.parametrize("end", ["refused", "failed", "cut off", "cancelled"])
async def test_what_has_not_ended_well_adds_nothing_of_itself(played, hand, end):
    """A turn that fails leaves the conversation as it was; one that was cut off, or stopped, has said what it said."""
    conversation_id = await made(played, message("1"))
    async with played.connect() as socket:
        asking = asyncio.ensure_future(socket.turn(conversation=conversation_id, input="2"))
        turn = await hand.next_turn()
        if end == "refused":
            turn.refuse()
        else:
            turn.give(TextDelta("3"))
            await until(lambda: turn.taken == 1)
            if end == "failed":
                turn.refuse()
            elif end == "cut off":
                turn.give(Ended("max_output_tokens"))
                turn.end()
            else:
                await socket.send(type="response.cancel")
        await asking
    said = [] if end in {"refused", "failed"} else ["2", "3"]
    assert await texts(played, conversation_id) == ["1", *said]


async def test_turns_at_once_read_the_same_and_add_one_after_the_other(played, hand):
    """Neither reads the other's, and what each added stays together.

    Source: docs/http.md, "Conversations".
    """
    conversation_id = await made(played, message("1"))
    asking = [asyncio.ensure_future(played.post(conversation=conversation_id, input=text)) for text in ("a", "b")]
    turns = [await hand.next_turn(), await hand.next_turn()]
    for turn in turns:
        turn.answer(f"to {read(turn)[-1]}")
    await asyncio.gather(*asking)
    assert sorted(read(turn) for turn in turns) == [["1", "a"], ["1", "b"]]
    first, *rest = await texts(played, conversation_id)
    assert first == "1"
    assert rest in (["a", "to a", "b", "to b"], ["b", "to b", "a", "to a"])


async def test_one_that_is_deleted_under_a_turn_fails_it(played, hand):
    """Nothing is said to be added to what is not there, and it does not come back."""
    conversation_id = await made(played)
    asking = asyncio.ensure_future(played.post(conversation=conversation_id, input="1"))
    turn = await hand.next_turn()
    await played.request("DELETE", f"{PATH}/{conversation_id}")
    turn.answer("2")
    answer = await asking
    assert (answer.status, answer.json["error"]["param"]) == (400, "conversation")
    assert (await played.get(f"{PATH}/{conversation_id}")).status == 404


async def test_in_the_background_it_is_kept_as_failed_for_that_reason(start, hand):
    """What its client polls says why, from memory and out of the store; it is not taken for lost with its process.

    Source: Background mode guide; docs/adr/0007.
    """
    server = await start(engine=hand, resume={"seconds": 0.05})
    conversation_id = await made(server)
    response_id = (await server.post(conversation=conversation_id, input="1", background=True)).json["id"]
    turn = await hand.next_turn()
    await server.request("DELETE", f"{PATH}/{conversation_id}")
    turn.answer("2")
    await server.idle()
    failed = (await server.get(f"/v1/responses/{response_id}")).json
    assert failed["status"] == "failed"
    assert "there is no such conversation" in failed["error"]["message"]
    await until(lambda: server.registry.held.get("local", response_id) is None)
    assert (await server.get(f"/v1/responses/{response_id}")).json == failed


async def test_a_call_is_answered_in_the_next_turn(played, hand):
    """A tool loop needs nothing but the outputs; without them the turn is refused."""
    conversation_id = await made(played, message("1"), CALL)
    answer = await played.post(conversation=conversation_id, input="2")
    assert (answer.status, answer.json["error"]["param"]) == (400, "input")
    answer, turn = await answered(hand, played.post(conversation=conversation_id, input=[OUTPUT]), "3")
    assert [json.loads(raw)["type"] for raw in turn.input[-2:]] == ["function_call", "function_call_output"]
    assert answer.status == 200


async def test_its_items_can_be_named(played, hand):
    """By `item_reference`, in a turn of the conversation."""
    conversation_id = await made(played, message("1"))
    (item,) = (await listed(played, conversation_id))["data"]
    reference = {"type": "item_reference", "id": item["id"]}
    _, turn = await answered(hand, played.post(conversation=conversation_id, input=[reference]), "2")
    assert read(turn) == ["1", "1"]
    assert await texts(played, conversation_id) == ["1", "1", "2"]


async def test_sealed_reasoning_is_listed_as_it_was_sent(server):
    """What is sealed for the model is shown to nobody in clear; an altered one is refused where a turn reads it.

    Source: docs/adr/0008.
    """
    summing = [message("One?"), {"type": "compaction_trigger"}]
    (summary,) = (await server.post(input=summing)).json["output"]
    conversation_id = await made(server, summary)
    (item,) = (await listed(server, conversation_id))["data"]
    assert item["encrypted_content"] == summary["encrypted_content"]
    assert (await server.post(conversation=conversation_id, input="Two?")).status == 200
    sealed = summary["encrypted_content"]
    altered = {**summary, "encrypted_content": sealed[:-5] + ("A" if sealed[-5] != "A" else "B") + sealed[-4:]}
    answer = await server.post(conversation=await made(server, altered), input="Two?")
    assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize("fields", [{"conversation": UNKNOWN}, {"conversation": {"id": UNKNOWN}}])
async def test_an_unknown_one_is_404(server, fields):
    """On every transport, before anything runs."""
    answer = await server.post(**fields)
    assert (answer.status, answer.json) == (404, not_found(UNKNOWN))
    async with server.connect() as socket:
        error = await socket.refused(**fields)
    assert (error["status"], error["error"]) == (404, not_found(UNKNOWN)["error"])


async def test_it_cannot_stand_beside_a_parent(server):
    """One of the two says what came before.

    Source: Responses API reference, "previous_response_id".
    """
    parent = (await server.post()).json["id"]
    answer = await server.post(conversation=await made(server), previous_response_id=parent)
    assert (answer.status, answer.json["error"]["param"]) == (400, "previous_response_id")


async def test_a_response_of_a_conversation_is_not_continued_by_its_id(server):
    """It goes on in the conversation, which has what came before; by its id alone nobody would find that."""
    conversation_id = await made(server, message("1"))
    response = (await server.post(conversation=conversation_id)).json
    assert (await server.get(f"/v1/responses/{response['id']}")).json == response
    answer = await server.post(previous_response_id=response["id"])
    assert (answer.status, answer.json["error"]["code"]) == (400, "previous_response_not_found")


async def test_a_turn_marks_it_as_used(start, hand):
    """When it begins, not only when it ends: what nobody has used for long must not be deleted under a turn.

    Source: README, `store.retain_days`.
    """
    store = SqliteStore(None)
    await store.create_conversation("local", stored_conversation("conv_1", at=1))
    server = await start(engine=hand, store=store)
    asking = asyncio.ensure_future(server.post(conversation="conv_1", input="1"))
    turn = await hand.next_turn()
    assert await store.purge(1_760_000_000, 100) == 0
    turn.answer("2")
    assert (await asking).status == 200
    assert await texts(server, "conv_1") == ["1", "2"]


# --- The SDK ---------------------------------------------------------------------------------------


async def test_the_sdk_keeps_a_conversation(server):
    """Made, used, listed page by page, changed, deleted; and told what is not there."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="local", max_retries=0) as client:
        conversation = await client.conversations.create(
            items=[{"type": "message", "role": "user", "content": "One"}], metadata={"a": "b"}
        )
        response = await client.responses.create(
            model="scripted-text", input="Two", conversation=conversation.id, store=False
        )
        items = [item async for item in client.conversations.items.list(conversation.id, order="asc", limit=1)]
        assert [item.role for item in items] == ["user", "user", "assistant"]
        assert [item.content[0].text for item in items] == ["One", "Two", response.output_text]
        item = await client.conversations.items.retrieve(items[0].id, conversation_id=conversation.id)
        assert item == items[0]
        await client.conversations.items.delete(items[0].id, conversation_id=conversation.id)
        updated = await client.conversations.update(conversation.id, metadata=None)
        assert updated.metadata == {}
        assert (await client.conversations.delete(conversation.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.conversations.retrieve(conversation.id)
