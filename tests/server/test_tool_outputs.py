"""Outputs of tools that come twice: a client that lost its connection does not know whether the first one arrived.

Source: docs/adr/0010; guarantees, "Idempotent turns".
"""

from __future__ import annotations

import asyncio

import pytest

from openline.protocol.deltas import CallDelta, CallStarted
from server.running import Running

USER = {"role": "user", "content": "Look."}


def output(said="42", call_id="call_1", **fields):
    return {"type": "function_call_output", "call_id": call_id, "output": said, **fields}


class Client:
    """Creates over one transport, of whose turns the test plays the engine."""

    def __init__(self, transport, server: Running, socket):
        self._transport = transport
        self._server = server
        self._socket = socket

    async def create(self, **fields):
        """A create's final response, or its error."""
        if self._transport == "websocket":
            last = (await self._socket.turn(**fields))[-1]
            return last.get("response") or last["error"]
        answer = (await self._server.post(**fields)).json
        return answer.get("error") or answer


@pytest.fixture(params=["websocket", "http"])
async def client(request, played):
    async with played.connect() as socket:
        yield Client(request.param, played, socket)


async def called(client, hand, *call_ids, **fields):
    """The id of a response that calls a function as often."""
    asked = asyncio.ensure_future(client.create(input=[USER], **fields))
    turn = await hand.next_turn()
    for call_id in call_ids or ("call_1",):
        turn.give(CallStarted("function_call", call_id, "look"), CallDelta("{}"))
    turn.finish()
    return (await asked)["id"]


async def answered(client, hand, parent, *items):
    """The id of a response that goes on from there, and the items that its engine has read."""
    asked = asyncio.ensure_future(client.create(input=list(items), previous_response_id=parent))
    turn = await hand.next_turn()
    turn.answer("I see.")
    return (await asked)["id"], turn.input


async def test_the_same_output_twice_in_one_input_is_one(client, hand):
    """The model reads it once, in its first place; so does whoever lists the input."""
    parent = await called(client, hand, "call_1", "call_2")
    outputs = [output(), output(call_id="call_2"), output(id="fco_1"), USER]
    response_id, read = await answered(client, hand, parent, *outputs)
    assert [b'"call_1"' in item for item in read[3:]] == [True, False, False]
    listed = (await client._server.get(f"/v1/responses/{response_id}/input_items?order=asc")).json["data"]
    assert [item["type"] for item in listed] == ["function_call_output", "function_call_output", "message"]


async def test_the_same_output_in_a_later_turn_is_dropped(client, hand):
    """However far back its call is; beside what is new, and alone."""
    response_id, read = await answered(client, hand, await called(client, hand), output())
    response_id, read_again = await answered(client, hand, response_id, output(), USER)
    assert len(read_again) == len(read) + 2  # the answer and what is new
    _, read_alone = await answered(client, hand, response_id, output())
    assert len(read_alone) == len(read_again) + 1


@pytest.mark.parametrize("where", ["in one input", "later"])
async def test_a_different_output_is_refused(client, hand, where):
    """400 with a stable code and the field; the engine is not asked."""
    parent = await called(client, hand)
    items = [output(), output("43")]
    if where == "later":
        parent, _ = await answered(client, hand, parent, output())
        items = [output("43")]
    error = await client.create(input=items, previous_response_id=parent)
    assert (error["code"], error["param"], error["type"]) == ("tool_output_conflict", "input", "invalid_request_error")
    assert "call_1" in error["message"]
    assert "43" not in error["message"]
    assert hand.is_idle


async def test_a_whole_conversation_is_compared_too(client, hand):
    """A client that resends everything may have an output in it twice."""
    call = {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"}
    asked = asyncio.ensure_future(client.create(input=[USER, call, output(), output(), USER]))
    turn = await hand.next_turn()
    turn.answer("I see.")
    assert (await asked)["status"] == "completed"
    assert len(turn.input) == 4
    assert (await client.create(input=[USER, call, output(), output("43")]))["code"] == "tool_output_conflict"


async def test_forks_answer_the_same_call_each_for_itself(client, hand):
    """What one branch has said is no output of the other's."""
    parent = await called(client, hand)
    _, one = await answered(client, hand, parent, output("1"))
    _, two = await answered(client, hand, parent, output("2"))
    assert one[:2] == two[:2]
    assert one[2] != two[2]


async def test_an_output_of_a_conversation_is_kept_once(played, hand):
    """What is dropped is not added to the conversation either (Responses API reference, "conversation")."""
    conversation = (await played.request("POST", "/v1/conversations", json={})).json["id"]
    client = Client("http", played, None)
    await called(client, hand, conversation=conversation)
    for _ in range(2):
        asked = asyncio.ensure_future(client.create(input=[output()], conversation=conversation))
        (await hand.next_turn()).answer("I see.")
        assert (await asked)["status"] == "completed"
    items = (await played.get(f"/v1/conversations/{conversation}/items?order=asc")).json["data"]
    kinds = [item["type"] for item in items]
    assert kinds == ["message", "function_call", "function_call_output", "message", "message"]
