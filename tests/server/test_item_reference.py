"""Items that a request names instead of sending them again.

Source: Responses API reference, "Input items", `item_reference`.
"""

from __future__ import annotations

import asyncio
import json

import pytest

from openline.protocol.deltas import CallDelta, CallStarted, TextDelta
from openline.turns import references
from server.background import begin_streamed, delete, ended

KEYS = {"key-a": "a", "key-b": "b"}
QUESTION = {"type": "message", "role": "user", "content": "And now?"}
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "42"}

with_type = pytest.mark.parametrize("typed", [True, False], ids=["typed", "untyped"])


def reference(item_id, *, typed=True):
    """A reference to an item; its `type` may be left out."""
    return {"id": item_id} | ({"type": "item_reference"} if typed else {})


def not_found(item_id):
    """The error for an item that is unknown, whatever the reason."""
    return {
        "message": f"Item with id '{item_id}' not found. Items of responses with 'store' false are not kept.",
        "type": "invalid_request_error",
        "param": "input",
        "code": None,
    }


async def posted(server, hand, *deltas, **fields):
    """A response, and what its model was given to read."""
    posting = asyncio.ensure_future(server.post(**fields))
    turn = await hand.next_turn()
    turn.finish(*(deltas or (TextDelta("Fine."),)))
    answer = await posting
    assert answer.status == 200, answer.body
    return answer.json, [json.loads(raw) for raw in turn.input]


async def listed(server, response_id, **options):
    """The items of a response's input, oldest first."""
    return (await server.get(f"/v1/responses/{response_id}/input_items?order=asc", **options)).json["data"]


async def refused(server, items, **options):
    """The error of a create with these items."""
    answer = await server.post(input=items, **options)
    assert answer.status == 404, answer.body
    return answer.json["error"]


# --- What can be named


@with_type
async def test_an_output_item_of_any_stored_response_can_be_named(played, hand, typed):
    """The model reads the item itself, with its id, where the reference stood."""
    first, _ = await posted(played, hand, TextDelta("Forty-two."), CallStarted("custom_tool_call", "call_9", "f"))
    assert [item["id"][:3] for item in first["output"]] == ["msg", "ctc"]
    named = first["output"][0]
    _, read = await posted(played, hand, input=[reference(named["id"], typed=typed), QUESTION])
    assert read == [named, QUESTION]


@with_type
async def test_an_input_item_can_be_named_by_its_listed_id(played, hand, typed):
    """The ids are those of the list of a response's input, whether the client gave them or not."""
    items = [QUESTION, {"role": "user", "content": "Easy."}]
    first, _ = await posted(played, hand, input=items)
    ids = [item["id"] for item in await listed(played, first["id"])]
    _, read = await posted(played, hand, input=[reference(item_id, typed=typed) for item_id in reversed(ids)])
    assert read == items[::-1]


async def test_a_call_and_its_output_can_be_named_together(played, hand):
    """References pair like the items that they stand for."""
    call = (CallStarted("function_call", "call_1", "f"), CallDelta("{}"))
    first, _ = await posted(played, hand, *call)
    called = first["output"][0]
    _, read = await posted(played, hand, input=[reference(called["id"]), OUTPUT])
    assert read == [called, OUTPUT]
    answer = await played.post(input=[reference(called["id"])])
    assert (answer.status, answer.json["error"]["message"]) == (400, "No tool output found for function call call_1.")


async def test_items_of_many_responses_can_be_named_at_once(played, hand):
    """In any order, and any of them more than once."""
    said = [(await posted(played, hand, TextDelta(text)))[0]["output"][0] for text in ("One.", "Two.", "Three.")]
    order = [2, 0, 2, 1, 0]
    _, read = await posted(played, hand, input=[reference(said[index]["id"]) for index in order])
    assert read == [said[index] for index in order]


async def test_an_item_of_the_chain_can_be_named_with_a_parent(played, hand):
    """Behind `previous_response_id` a reference repeats an item of the conversation, the client's own ids too."""
    mine = {**QUESTION, "id": "msg_of_the_client"}
    first, _ = await posted(played, hand, input=[mine])
    named = [reference("msg_of_the_client"), reference(first["output"][0]["id"])]
    _, read = await posted(played, hand, input=named, previous_response_id=first["id"])
    assert read == [mine, first["output"][0], mine, first["output"][0]]


async def test_over_websocket_the_connections_own_chain_can_be_named(played, hand):
    """With `store: false` the items of the parent are in memory, and nowhere else."""
    async with played.connect() as socket:
        await socket.create(store=False, input=[{**QUESTION, "id": "msg_1"}])
        (await hand.next_turn()).answer("Unstored.")
        first = (await socket.rest())[-1]["response"]
        named = [reference(first["output"][0]["id"], typed=False), reference("msg_1")]
        await socket.create(store=False, previous_response_id=first["id"], input=named)
        turn = await hand.next_turn()
        ids = [json.loads(raw)["id"] for raw in turn.input]
        assert (ids[0], ids[1]) == (ids[3], ids[2]) == ("msg_1", first["output"][0]["id"])
        turn.answer("Fine.")
        second = (await socket.rest())[-1]["response"]
        frame = await socket.refused(store=False, input=named, stream_id="other")  # without its parent
        assert (frame["status"], frame["error"]) == (404, not_found(first["output"][0]["id"]))
        assert (await refused(played, named)) == not_found(first["output"][0]["id"])
        await socket.create(store=False, previous_response_id=second["id"], input=named)
        (await hand.next_turn()).answer("Still usable.")
        assert (await socket.rest())[-1]["type"] == "response.completed"


async def test_items_of_one_that_runs_can_be_named_once_they_are_kept(played, hand):
    """The input from its start on, the output from its end on."""
    response_id, turn = await begin_streamed(played, hand, "One.", input=[QUESTION])
    asked = (await listed(played, response_id))[0]["id"]
    said = (await played.get(f"/v1/responses/{response_id}")).json["output"][0]["id"]
    assert (await posted(played, hand, input=[reference(asked)]))[1] == [QUESTION]
    assert await refused(played, [reference(said)]) == not_found(said)
    turn.finish()
    await ended(played, response_id)
    assert (await posted(played, hand, input=[reference(said)]))[1][0]["id"] == said


async def test_what_was_named_is_kept_itself(played, hand):
    """A response does not depend on the one whose item it named: continued, listed and named again without it."""
    first, _ = await posted(played, hand, TextDelta("Forty-two."))
    named = first["output"][0]
    second, _ = await posted(played, hand, input=[reference(named["id"])])
    await delete(played, first["id"])
    assert (await listed(played, second["id"])) == [named]
    _, read = await posted(played, hand, previous_response_id=second["id"], input=[QUESTION])
    assert read[0] == named
    assert await refused(played, [reference(named["id"])]) == not_found(named["id"])


async def test_sealed_items_are_opened_where_they_are_named(server):
    """A summary that is named stands for everything before it, as one that is sent does.

    Source: docs/adr/0008.
    """
    trigger = {"type": "compaction_trigger"}
    summing = (await server.post(input=[QUESTION, trigger])).json
    (summary,) = [item for item in summing["output"] if item["type"] == "compaction"]
    sent = (await server.post(input=[summary, QUESTION])).json
    named = (await server.post(input=[reference(summary["id"]), QUESTION])).json
    assert named["usage"]["input_tokens"] == sent["usage"]["input_tokens"]
    assert (await listed(server, named["id"]))[0]["encrypted_content"] == summary["encrypted_content"]


# --- What cannot


@pytest.mark.parametrize(
    "item_id",
    ["msg_x", "msg_" + "0" * 52, "msg_" + "0" * 48 + "i0000", "resp_" + "0" * 48, "é", "x" * 300],
    ids=lambda item_id: item_id[:8],
)
async def test_an_unknown_item_is_404(server, item_id):
    """Over HTTP and over WebSocket, streamed or not, with the same words.

    Source: Responses API reference, "Errors".
    """
    expected = not_found(item_id[:256])
    for stream in (True, False):
        assert await refused(server, [QUESTION, reference(item_id)], stream=stream) == expected
    async with server.connect() as socket:
        frame = await socket.refused(input=[reference(item_id, typed=False)])
        assert (frame["status"], frame["error"]) == (404, expected)
        await socket.completed()


@pytest.mark.parametrize("place", ["output", "input"])
async def test_another_owners_item_is_an_unknown_one(start, place):
    """The same words as for an id that nobody was given.

    Source: guarantees, "Isolation".
    """
    server = await start(keys=KEYS)
    first = (await server.post(key="key-a")).json
    items = first["output"] if place == "output" else await listed(server, first["id"], key="key-a")
    named = [reference(items[0]["id"])]
    assert (await server.post(key="key-a", input=named)).status == 200
    assert await refused(server, named, key="key-b") == not_found(items[0]["id"])
    async with server.connect(key="key-b") as socket:
        assert (await socket.refused(input=named))["error"] == not_found(items[0]["id"])


@pytest.mark.parametrize("change", ["prefix", "number", "longer number", "beyond", "other half"])
async def test_only_the_very_id_names_an_item(server, change):
    """An id that was made up out of another's parts is unknown."""
    first = (await server.post(input=[QUESTION, QUESTION])).json
    said = first["output"][0]["id"]
    changed = {
        "prefix": said.replace("msg_", "fc_"),
        "number": said[:-4] + "0001",
        "longer number": said[:-4] + "00000000",
        "beyond": said[:-4] + "i0002",
        "other half": said[:-4] + "ffffffff",
    }[change]
    assert await refused(server, [reference(changed)]) == not_found(changed)


async def test_an_item_of_an_unstored_response_is_unknown(server):
    """Nothing of it was kept, so nothing can be named: also while a background response is still held."""
    for fields in ({}, {"background": True}):
        response = (await server.post(store=False, **fields)).json
        response = await ended(server, response["id"]) if fields else response
        said = response["output"][0]["id"]
        assert await refused(server, [reference(said)]) == not_found(said)


@pytest.mark.parametrize("item", [{"type": "item_reference"}, {"type": "item_reference", "id": None}, {"id": ""}])
async def test_a_reference_without_an_id_is_refused(server, item):
    """The field is named with its place.

    Source: Responses API reference, "Errors".
    """
    error = (await server.post(input=[QUESTION, item])).json["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", "input[1].id")


async def test_references_bring_no_more_than_a_message_may(server, monkeypatch):
    """A short reference to a long item, many times over, is refused as if all of it had been sent.

    Source: guarantees, "Bounds".
    """
    monkeypatch.setattr(references, "REFERENCED_BYTES_MAX", 100_000)
    first = (await server.post(input="x" * 10_000)).json
    (item,) = await listed(server, first["id"])
    named = reference(item["id"])
    assert (await server.post(input=[named] * 9)).status == 200
    answer = await server.post(input=[named] * 11)
    assert (answer.status, answer.json["error"]["code"]) == (413, "message_too_big")
    assert answer.json["error"]["param"] == "input"


async def test_references_look_into_a_bounded_number_of_responses(server, monkeypatch):
    """As many as a chain may have turns; each of them is read once, however many of its items are named.

    Source: guarantees, "Bounds".
    """
    monkeypatch.setattr(references, "REFERENCED_RESPONSES_MAX", 3)
    said = [(await server.post()).json["output"][0]["id"] for _ in range(4)]
    assert (await server.post(input=[reference(item_id) for item_id in said[:3] * 5])).status == 200
    answer = await server.post(input=[reference(item_id) for item_id in said])
    assert (answer.status, answer.json["error"]["code"], answer.json["error"]["param"]) == (
        400,
        "invalid_value",
        "input",
    )


async def test_a_store_that_cannot_be_read_is_no_unknown_item(server):
    """503, so that the client tries again; what needs no store goes on.

    Source: guarantees, "Store failures".
    """
    said = (await server.post()).json["output"][0]["id"]
    await server.registry.parts.store.close()
    answer = await server.post(store=False, input=[reference(said)])
    assert (answer.status, answer.json["error"]["code"]) == (503, "store_unavailable")
    assert (await server.post(store=False)).status == 200
