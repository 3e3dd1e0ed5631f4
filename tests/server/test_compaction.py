"""Compaction: a conversation is summed up by its model, and the sealed summary stands for all before it.

Source: Responses API reference, "Compact", "context_management", `compaction_trigger`; WebSocket mode guide,
"Compaction"; streaming reference, "Compaction"; docs/adr/0008.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
from contextlib import asynccontextmanager, closing

import pytest
from aiohttp import web
from openai import AsyncOpenAI
from openai.types.responses import CompactedResponse, ResponsesServerEvent
from pydantic import TypeAdapter

from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from openline.engines.responses import ResponsesEngine
from openline.protocol.deltas import CallDelta, CallStarted, Ended, ReasoningDelta, TextDelta, UpstreamEvent, Usage
from openline.protocol.errors import ProtocolError
from openline.state.nothing import NothingStore
from server.closing import Leftovers
from server.hand import Hand
from server.listening import listening
from server.running import running, until
from server.watching import types, watched

LONG = "x" * 1000
TRIGGER = {"type": "compaction_trigger"}
AT_1000 = [{"type": "compaction", "compact_threshold": 1000}]
TOOLS = [{"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}]
SEALED = {"include": ["reasoning.encrypted_content"]}
COMPACTION_EVENTS = ["output_item.added", "compaction.compacting", "output_item.done"]
SERVER_EVENT = TypeAdapter(ResponsesServerEvent)
KEY = "5e" * 32
KEYS = {"keys": {"key-a": "a", "key-b": "b"}}


def user(text):
    return {"type": "message", "role": "user", "content": text}


def assistant(text):
    return {"type": "message", "role": "assistant", "content": text}


def answered(text):
    """A client's next items, behind a turn that called a tool."""
    return [{"type": "function_call_output", "call_id": "call_1", "output": text}]


def words(item):
    """What an item says to a model."""
    content = item.get("content") or item.get("output") or item["type"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    head, _, summary = text.partition(", which stands for everything before it:\n\n")
    return f"[{summary}]" if head.startswith("Summary") else text


def read(turn):
    """What the model of a turn reads, a summary in brackets."""
    return [words(json.loads(raw)) for raw in turn.input]


async def played_by(hand, *answers):
    """Answers the next turns of the engine, in order; the turns."""
    turns = []
    for answer in answers:
        turns.append(await hand.next_turn())
        turns[-1].answer(answer)
    return turns


async def told(asking, hand, *answers):
    """What answers a request, and what the engine had to do for it."""
    answer, turns = await asyncio.gather(asking, played_by(hand, *answers))
    return answer, turns


async def compact(server, key=None, **body):
    """`POST /v1/responses/compact`."""
    return await server.request("POST", "/v1/responses/compact", key=key, json={"model": "m", "input": "Hi.", **body})


def summary_of(response):
    """The one compaction item of an output."""
    (item,) = (item for item in response["output"] if item["type"] == "compaction")
    assert set(item) == {"id", "type", "encrypted_content"}
    assert item["id"].startswith("cmp_")
    return item


def rows(server):
    """What is stored: status and output of each response."""
    with closing(sqlite3.connect(server.database)) as connection:
        found = connection.execute("SELECT status, response FROM turns").fetchall()
    return [(status, json.loads(response)["output"]) for status, response in found]


@pytest.fixture
async def socket(played):
    """A socket to a server that the test plays, whose every message is checked at the end."""
    async with watched(played) as watching:
        yield watching
    for frame in watching.frames:
        if ".compaction." in frame["type"] or frame.get("item", {}).get("type") == "compaction":
            event = SERVER_EVENT.validate_json(json.dumps(frame), strict=True)
            assert event.type == frame["type"]


# --- The trigger ----------------------------------------------------------------------------------


async def test_a_trigger_over_websocket_is_answered_by_a_summary_alone(socket, hand):
    """Added, compacting, done, completed: no other item; its usage is what the summary took.

    Source: streaming reference, "Compaction": none further for a pure trigger.
    """
    first, _ = await told(socket.completed(input=LONG, store=False), hand, "Noted.")
    asking = socket.turn(previous_response_id=first["id"], input=[TRIGGER], store=False)
    frames, (turn,) = await told(asking, hand, "They sent a lot of x.")
    assert types(frames) == ["created", "in_progress", *COMPACTION_EVENTS, "completed"]
    added, compacting, done, completed = frames[2:]
    assert (added["output_index"], added["item"]["encrypted_content"]) == (0, "")
    assert compacting["item_id"] == added["item"]["id"] == done["item"]["id"]
    assert compacting["output_index"] == 0
    assert completed["response"]["output"] == [done["item"]] == [summary_of(completed["response"])]
    assert completed["response"]["usage"]["total_tokens"] == 2
    assert read(turn)[:2] == [LONG, "Noted."]
    assert "x of x" not in json.dumps(frames)


@pytest.mark.parametrize("stream", [True, False], ids=["sse", "json"])
async def test_a_trigger_over_http_is_answered_by_a_summary_alone(played, hand, stream):
    """The same over server-sent events; as JSON the response that they end in.

    Source: streaming reference, "Compaction".
    """
    answer, _ = await told(played.post(input=[user("1"), TRIGGER], stream=stream), hand, "S")
    if stream:
        assert types(answer.events) == ["created", "in_progress", *COMPACTION_EVENTS, "completed"]
    response = answer.events[-1]["response"] if stream else answer.json
    assert response["output"] == [summary_of(response)]
    assert (response["status"], response["usage"]["input_tokens"]) == ("completed", 1)


async def test_a_triggered_summary_is_what_goes_on(socket, hand):
    """The next turn reads the summary, what is new, and nothing that was summed up.

    Source: Responses API reference, "Compaction": the item replaces everything before it.
    """
    first, _ = await told(socket.completed(input="1", store=False), hand, "2")
    asking = socket.completed(previous_response_id=first["id"], input=[user("3"), TRIGGER], store=False)
    second, _ = await told(asking, hand, "S")
    _, (turn,) = await told(socket.turn(previous_response_id=second["id"], input="4", store=False), hand, "5")
    assert read(turn) == ["[S]", "4"]


@pytest.mark.parametrize("items", [[TRIGGER], [TRIGGER, TRIGGER], [{"type": "compaction", "encrypted_content": ""}]])
@pytest.mark.parametrize("instructions", ["Be brief.", None])
async def test_nothing_cannot_be_summed_up(socket, hand, items, instructions):
    """A conversation without an item is refused before it is a response.

    Source: Responses API reference, "Errors".
    """
    error = (await socket.refused(input=[*items, TRIGGER], instructions=instructions))["error"]
    assert (error["code"], error["param"]) == ("missing_required_parameter", "input")
    assert hand.is_idle


async def test_an_unanswered_call_cannot_be_summed_up(socket, hand):
    """The usual error, although its call would be summed up with the rest.

    Source: Responses API reference, "Input items": every call is answered before the next turn.
    """
    await socket.create(input="1", tools=TOOLS, store=False)
    turn = await hand.next_turn()
    turn.finish(CallStarted("function_call", "call_1", "look"), CallDelta("{}"))
    first = (await socket.rest())[-1]["response"]
    error = (await socket.refused(previous_response_id=first["id"], input=[TRIGGER], store=False))["error"]
    assert (error["message"], error["param"]) == ("No tool output found for function call call_1.", "input")


async def test_a_warm_up_is_never_summed_up(socket, hand):
    """It has no output, whatever its length and whatever it asks for.

    Source: WebSocket mode guide, "Warm-up".
    """
    hand.tokens = 1000
    for fields in ({"input": [user(LONG), assistant("2"), user("3"), TRIGGER]}, {"context_management": AT_1000}):
        response = await socket.completed(
            **{"input": [user(LONG), assistant("2"), user("3")], **fields}, generate=False
        )
        assert response["output"] == []
        _, (turn,) = await told(socket.completed(previous_response_id=response["id"], input=[]), hand, "4")
        assert read(turn) == [LONG, "2", "3"]


async def test_a_background_response_is_summed_up_too(played, hand):
    """The same events; and what it was asked is listed as it was sent, not as the model reads it.

    Source: Background mode guide; Responses API reference, "List input items".
    """
    compacted, _ = await told(compact(played), hand, "Secret.")
    sealed = summary_of(compacted.json)
    body = {"input": [sealed, user("2"), TRIGGER], "background": True, "stream": True, "store": False}
    asking = asyncio.ensure_future(played.post(**body))
    turn = await hand.next_turn()
    (running_turn,) = played.registry.held._turns
    listed = (await played.get(f"/v1/responses/{running_turn}/input_items?order=asc")).json["data"]
    turn.answer("S")
    assert listed[0] == sealed
    assert types((await asking).events)[3:] == [*COMPACTION_EVENTS, "completed"]
    assert read(turn)[:2] == ["[Secret.]", "2"]


# --- What the summary is made from ----------------------------------------------------------------


async def test_tools_are_not_offered_to_the_summary_and_instructions_are(socket, hand):
    """The model that sums up is under the create's instructions and can call nothing; a format is not its either.

    Source: docs/adr/0008: in a request of its own, without tools.
    """
    asked = {
        "instructions": "Be brief.",
        "tools": TOOLS,
        "tool_choice": "required",
        "text": {"format": {"type": "json_object"}},
        "max_output_tokens": 16,
        "context_management": AT_1000,
    }
    hand.tokens = 1000
    _, turns = await told(socket.completed(input=[user(LONG), assistant("2"), user("3")], **asked), hand, "S", "4")
    create, body = turns[0].request.create, json.loads(turns[0].request.body)
    assert (create.instructions, create.tools, create.text) == ("Be brief.", None, None)
    assert (create.tool_choice, create.max_output_tokens) == (None, None)
    assert body == {"model": "scripted-text", "instructions": "Be brief."}
    assert read(turns[0])[:-1] == [LONG, "2", "3"]
    assert "Sum this conversation up" in read(turns[0])[-1]
    assert turns[1].request.create.tools is not None


# --- The threshold --------------------------------------------------------------------------------


class Counting(Hand):
    """An engine with a tokenizer of the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0
        self.counted = asyncio.Event()
        self.may_count = asyncio.Event()
        self.may_count.set()
        self.fault: ProtocolError | None = None

    async def count_tokens(self, request):
        self.counted.set()
        await self.may_count.wait()
        if self.fault is not None:
            raise self.fault
        return self.tokens


@pytest.fixture
def hand():
    """An engine that the test plays by hand."""
    return Counting()


async def long_chain(socket, hand, **fields):
    """A conversation of 1000 bytes and more over the socket, and its next turn's create."""
    first, _ = await told(socket.completed(input=LONG, store=False), hand, "2")
    return {
        "previous_response_id": first["id"],
        "input": [user("3")],
        "context_management": AT_1000,
        "store": False,
        **fields,
    }


@pytest.mark.parametrize(("tokens", "summed_up"), [(999, False), (1000, True)])
async def test_at_the_threshold_a_conversation_is_summed_up_before_the_answer(socket, hand, tokens, summed_up):
    """Below it nothing happens; at it the summary is the first item, and the model reads it and the user's last words.

    Source: Responses API reference, "context_management": when rendered tokens pass the threshold; docs/adr/0008.
    """
    create = await long_chain(socket, hand)
    hand.tokens = tokens
    frames, turns = await told(socket.turn(**create), hand, *(["S", "4"] if summed_up else ["4"]))
    items = [item["type"] for item in frames[-1]["response"]["output"]]
    if summed_up:
        assert types(frames)[:5] == ["created", "in_progress", *COMPACTION_EVENTS]
        assert items == ["compaction", "message"]
        assert read(turns[-1]) == ["[S]", "3"]
        assert frames[5]["output_index"] == 1
    else:
        assert items == ["message"]
        assert read(turns[-1]) == [LONG, "2", "3"]
        assert "compaction.compacting" not in types(frames)


async def test_usage_is_the_answers_alone(socket, hand):
    """What the summary took is not in it: clients judge by it how long their conversation is.

    Source: Responses API reference, "usage"; Codex compacts again when it is large.
    """
    create = await long_chain(socket, hand)
    hand.tokens = 1000
    await socket.create(**create)
    (await hand.next_turn()).finish(TextDelta("S"), Usage(input_tokens=1000, output_tokens=50))
    turn = await hand.next_turn()
    turn.accept()
    turn.give(TextDelta("4"), Usage(input_tokens=60, output_tokens=2), Ended())
    turn.end()
    assert (await socket.rest())[-1]["response"]["usage"]["total_tokens"] == 62


async def test_an_engine_that_cannot_count_is_estimated(socket, hand):
    """Four bytes a token, where the upstream has no tokenizer to ask.

    Source: docs/adr/0008.
    """
    hand.fault = ProtocolError("unsupported_parameter", "I cannot count.")
    first, _ = await told(socket.completed(input="x" * 3000, store=False), hand, "2")
    create = {"previous_response_id": first["id"], "context_management": AT_1000, "store": False}
    below, _ = await told(socket.completed(**create, input="3"), hand, "4")
    assert [item["type"] for item in below["output"]] == ["message"]
    create["previous_response_id"] = below["id"]
    above, _ = await told(socket.completed(**create, input="y" * 1000), hand, "S", "5")
    assert [item["type"] for item in above["output"]] == ["compaction", "message"]


async def test_a_short_conversation_is_not_counted(socket, hand):
    """No token is shorter than a byte, so that nobody is asked below as many bytes; nor without a threshold."""
    for management in (AT_1000, [{"type": "compaction"}], [], None):
        items = [user("x" * 300), assistant("2"), user("3")]
        await told(socket.completed(input=items, context_management=management), hand, "4")
    await told(socket.completed(input=[user(LONG), assistant("2"), user("3")]), hand, "4")
    assert not hand.counted.is_set()


async def test_what_has_no_past_is_not_summed_up(socket, hand):
    """The user's last words stay as they are, so that a summary of them alone would only make it longer."""
    hand.tokens = 5000
    response, (turn,) = await told(
        socket.completed(input=[user(LONG), user("2")], context_management=AT_1000), hand, "3"
    )
    assert [item["type"] for item in response["output"]] == ["message"]
    assert read(turn) == [LONG, "2"]


async def test_an_answered_message_is_no_last_word(socket, hand):
    """In a full resend without tools only what stands behind the model's last answer is kept word for word."""
    hand.tokens = 1000
    items = [user(LONG), assistant("2"), user("3"), assistant("4"), user("5")]
    _, turns = await told(socket.completed(input=items, context_management=AT_1000), hand, "S", "6")
    assert read(turns[1]) == ["[S]", "5"]


async def test_a_summary_is_summed_up_again(socket, hand):
    """A window of a summary and a message that has grown too long: the new summary counts, not the old one."""
    compacted, _ = await told(socket.completed(input=[user("1"), TRIGGER]), hand, "S1" * 600)
    hand.tokens = 1000
    create = {"input": [summary_of(compacted), user("2")], "context_management": AT_1000}
    response, turns = await told(socket.completed(**create, store=False), hand, "S2", "3")
    assert read(turns[0])[:-1] == [f"[{'S1' * 600}]", "2"]
    assert read(turns[1]) == ["[S2]", "2"]
    asking = socket.completed(previous_response_id=response["id"], input="4", store=False)
    assert read((await told(asking, hand, "5"))[1][0]) == ["[S2]", "3", "4"]


async def test_a_tool_loop_goes_on_behind_a_summary(socket, hand):
    """Summed up between a call and the next: calls before it are answered or not, they do not haunt what follows.

    Source: Responses API reference, "Compaction"; "Input items": every call has its output.
    """
    await socket.create(input=LONG, tools=TOOLS, store=False)
    (await hand.next_turn()).finish(CallStarted("function_call", "call_1", "look"), CallDelta("{}"))
    first = (await socket.rest())[-1]["response"]
    hand.tokens = 1000
    create = {"context_management": AT_1000, "tools": TOOLS, "store": False}
    await socket.create(previous_response_id=first["id"], input=answered("42"), **create)
    summary = await hand.next_turn()
    summary.answer("S")
    turn = await hand.next_turn()
    turn.finish(CallStarted("function_call", "call_2", "look"), CallDelta("{}"))
    second = (await socket.rest())[-1]["response"]
    assert read(summary)[:-1] == [LONG, "function_call", "42"]
    assert read(turn) == ["[S]"]
    hand.tokens = 0
    items = [{"type": "function_call_output", "call_id": "call_2", "output": "43"}]
    asking = socket.completed(previous_response_id=second["id"], input=items, **create)
    third, (turn,) = await told(asking, hand, "Done.")
    assert read(turn) == ["[S]", "function_call", "43"]
    refused = await socket.refused(previous_response_id=third["id"], input=answered("again"), store=False)
    assert refused["error"]["message"].startswith("No tool call found")


# --- Later turns ----------------------------------------------------------------------------------


async def test_later_turns_on_the_socket_read_the_summary(socket, hand):
    """Chained with `store: false`, from the connection's memory; a fork of what was before reads it all.

    Source: WebSocket mode guide, "Compaction": continue with the latest id and only new input.
    """
    create = await long_chain(socket, hand)
    hand.tokens = 1000
    second, _ = await told(socket.completed(**create, stream_id="a"), hand, "S", "4")
    hand.tokens = 0
    fork = {**create, "input": "F", "stream_id": "b"}
    assert read((await told(socket.completed(**fork), hand, "5"))[1][0]) == [LONG, "2", "F"]
    next_one = {**create, "previous_response_id": second["id"], "input": "6", "stream_id": "a"}
    third, (turn,) = await told(socket.completed(**next_one), hand, "7")
    assert read(turn) == ["[S]", "4", "6"]
    next_one = {**next_one, "previous_response_id": third["id"], "input": "8"}
    assert read((await told(socket.completed(**next_one), hand, "9"))[1][0]) == ["[S]", "4", "6", "7", "8"]


async def test_later_turns_read_the_summary_after_a_restart(tmp_path, hand):
    """Chained over HTTP, from the store, by a server that has started anew, with its key beside the store.

    Source: docs/adr/0008; guarantees, "Durability".
    """
    async with running(tmp_path, engine=hand) as server:
        first, _ = await told(server.post(input=LONG), hand, "2")
        hand.tokens = 1000
        create = {"context_management": AT_1000, "input": "3"}
        second, _ = await told(server.post(**create, previous_response_id=first.json["id"]), hand, "S", "4")
    hand.tokens = 0
    async with running(tmp_path, engine=hand) as server:
        asking = server.post(**create | {"input": "5"}, previous_response_id=second.json["id"])
        third, (turn,) = await told(asking, hand, "6")
        assert read(turn) == ["[S]", "4", "5"]
        assert (await server.get(f"/v1/responses/{second.json['id']}")).json == second.json
        listed = (await server.get(f"/v1/responses/{second.json['id']}/input_items")).json["data"]
        assert [words(item) for item in listed] == ["3"]
        assert b'"S"' not in server.files(), "the store has what the client has"
    assert third.json["status"] == "completed"


@pytest.mark.parametrize("kept", ["all of it", "from the summary on"])
async def test_a_stateless_client_sends_the_summary_again(played, hand, kept):
    """In a full resend, pruned or not, the model reads from the summary on.

    Source: Responses API reference, "Compaction": a stateless client may drop what stands before the latest item.
    """
    items = [user(LONG), assistant("2"), user("3")]
    hand.tokens = 1000
    answer, _ = await told(played.post(input=items, context_management=AT_1000, store=False), hand, "S", "4")
    resent = [*items, *answer.json["output"], user("5")]
    if kept != "all of it":
        resent = resent[resent.index(summary_of(answer.json)) :]
    hand.tokens = 0
    _, (turn,) = await told(played.post(input=resent, context_management=AT_1000, store=False), hand, "6")
    assert read(turn) == ["[S]", "4", "5"]


async def test_a_stored_summary_can_be_named(played, hand):
    """An `item_reference` to it stands for all before it, as the item itself would.

    Source: Responses API reference, "Item reference".
    """
    answer, _ = await told(played.post(input=[user("1"), TRIGGER]), hand, "S")
    named = [assistant("0"), {"type": "item_reference", "id": summary_of(answer.json)["id"]}, user("2")]
    _, (turn,) = await told(played.post(input=named), hand, "3")
    assert read(turn) == ["[S]", "2"]


async def test_a_summary_of_the_connection_can_be_named(socket, hand):
    """Also where nothing is stored, as every item of the context can.

    Source: Responses API reference, "Item reference".
    """
    first, _ = await told(socket.completed(input=[user("1"), TRIGGER], store=False), hand, "S")
    named = {"type": "item_reference", "id": summary_of(first)["id"]}
    asking = socket.completed(previous_response_id=first["id"], input=[named, user("2")], store=False)
    assert read((await told(asking, hand, "3"))[1][0]) == ["[S]", "2"]


# --- POST /v1/responses/compact -------------------------------------------------------------------


async def test_the_endpoint_gives_a_window(played, hand):
    """An object of its own, with one item that stands for all; nothing is stored, and its id names no response.

    Source: Responses API reference, "Compact a response".
    """
    answer, (turn,) = await told(
        compact(played, input=[user("1"), assistant("2"), user("3")], instructions="Be brief.", tools=TOOLS), hand, "S"
    )
    window = answer.json
    assert set(window) == {"id", "object", "created_at", "output", "usage"}
    assert (answer.status, window["object"]) == (200, "response.compaction")
    assert window["output"] == [summary_of(window)]
    assert window["usage"] == {
        "input_tokens": 1,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 1,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 2,
    }
    assert isinstance(window["created_at"], int)
    assert turn.request.create.instructions == "Be brief."
    assert (await played.get(f"/v1/responses/{window['id']}")).status == 404
    chained = await played.post(previous_response_id=window["id"])
    assert chained.json["error"]["code"] == "previous_response_not_found"
    assert rows(played) == []


async def test_the_window_keeps_what_the_system_said(played, hand):
    """In full and in whole items, before the summary: passed back, it is read again.

    Source: Responses API reference, "Compact a response": kept items and a compaction item; docs/adr/0008.
    """
    items = [
        {"role": "system", "content": "I"},
        user("1"),
        assistant("2"),
        {**user("D"), "role": "developer", "id": "m"},
    ]
    answer, _ = await told(compact(played, input=items), hand, "S")
    system, developer, summary = answer.json["output"]
    assert system == {
        "id": system["id"],
        "type": "message",
        "status": "completed",
        "role": "system",
        "content": [{"type": "input_text", "text": "I"}],
    }
    assert (developer["id"], developer["role"], summary["type"]) == ("m", "developer", "compaction")
    assert len({system["id"], developer["id"], summary["id"]}) == 3
    _, (turn,) = await told(played.post(input=[*answer.json["output"], user("3")]), hand, "4")
    assert read(turn) == ["I", "D", "[S]", "3"]


async def test_the_windows_items_have_ids_of_their_own(played, hand):
    """Two that a client sent under one id are two; and what nobody could hold stays as it came.

    Source: Responses API reference, "The compacted response object"; guarantees, "Bad input".
    """
    system = '{"role":"system","content":"I","id":"m","x":1e999}'
    body = f'{{"model":"m","input":[{system},{system},{{"role":"user","content":"1"}}]}}'
    answer, _ = await told(played.request("POST", "/v1/responses/compact", data=body), hand, "S")
    assert (answer.status, answer.body.count(b'"x":1e999')) == (200, 2)
    assert len({item["id"] for item in answer.json["output"]}) == 3


@pytest.mark.parametrize("prefix", ["/v1", "", "/openai/v1"])
async def test_the_endpoint_is_at_every_prefix(played, hand, prefix):
    """As the create is; its query is ignored."""
    body = {"model": "m", "input": "1"}
    path = f"{prefix}/responses/compact?beta=true"
    answer, _ = await told(played.request("POST", path, json=body), hand, "S")
    assert answer.status == 200
    assert answer.headers["x-request-id"].startswith("req_")


async def test_the_endpoint_sums_up_a_stored_chain(played, hand):
    """What stands behind `previous_response_id` is summed up with the rest.

    Source: Responses API reference, "Compact a response", body.
    """
    first, _ = await told(played.post(input="1"), hand, "2")
    _, (turn,) = await told(compact(played, previous_response_id=first.json["id"], input="3"), hand, "S")
    assert read(turn)[:-1] == ["1", "2", "3"]


@pytest.mark.parametrize("missing", ["model", "input"])
async def test_the_endpoint_wants_a_model_and_something_to_sum_up(played, hand, missing):
    """400, and which it is; also with instructions, which are none of the conversation, and behind a parent's model.

    Source: Responses API reference, "Compact a response": `model` is required.
    """
    body = {"model": "m", "input": "1", "instructions": "Be brief."}
    if missing == "model":
        first, _ = await told(played.post(input="1"), hand, "2")
        body["previous_response_id"] = first.json["id"]
    del body[missing]
    answer = await played.request("POST", "/v1/responses/compact", json=body)
    assert (answer.status, answer.json["error"]["param"]) == (400, missing)
    assert answer.json["error"]["code"] == "missing_required_parameter"
    assert hand.is_idle


async def test_the_endpoint_refuses_what_a_create_refuses(start):
    """The guard, the body, the model, the parent: with a create's errors.

    Source: Responses API reference, "Errors".
    """
    server = await start(**KEYS, limits={"message_bytes_max": 5000})
    for body in (
        b"",
        b"[]",
        b'{"model": "m", "input": 5}',
        b'{"model": "gpt-9", "input": "1"}',
        b'{"model": "scripted-text", "input": "1", "previous_response_id": "resp_x"}',
        b'{"model": "scripted-text", "input": "' + b"x" * 6000 + b'"}',
    ):
        refused = await server.request("POST", "/v1/responses/compact", key="key-a", data=body)
        created = await server.request("POST", "/v1/responses", key="key-a", data=body)
        assert (refused.status, refused.body) == (created.status, created.body)
        assert refused.status >= 400
    assert (await compact(server, model="scripted-text")).status == 401


async def test_the_window_begins_a_new_chain(socket, played, hand):
    """Passed back unpruned as input, without a parent.

    Source: WebSocket mode guide, "Compaction": a window, not a chainable id.
    """
    answer, _ = await told(compact(played, input=[user("1"), assistant("2")]), hand, "S")
    window = answer.json["output"]
    asking = socket.completed(input=[*window, user("3")], store=False)
    _, (turn,) = await told(asking, hand, "4")
    assert read(turn) == ["[S]", "3"]


async def test_the_window_goes_on_at_another_server_with_the_key(tmp_path, monkeypatch, hand):
    """Two servers that share nothing but `OPENLINE_SEALING_KEY`.

    Source: docs/adr/0008: it must work on every node.
    """
    monkeypatch.setenv("OPENLINE_SEALING_KEY", KEY)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with running(tmp_path / "a", engine=hand) as one:
        window = (await told(compact(one, input="1"), hand, "S"))[0].json["output"]
    other = Counting()
    async with running(tmp_path / "b", engine=other, store_url="none", store=NothingStore()) as two:
        _, (turn,) = await told(two.post(input=[*window, user("2")]), other, "3")
    assert read(turn) == ["[S]", "2"]
    assert not list(tmp_path.glob("*/*.key"))


@pytest.mark.parametrize("how", ["another key", "another owner", "altered", "another kind"])
@pytest.mark.parametrize("where", ["create", "compact", "socket"])
async def test_a_summary_that_does_not_open_is_refused(tmp_path, hand, how, where):
    """400, and the message says which item; the model is not asked.

    Source: docs/adr/0008; guarantees, "Owners".
    """
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with running(tmp_path / "a", engine=hand, **KEYS) as one:
        (item,) = (await told(compact(one, key="key-a", input="1"), hand, "S"))[0].json["output"]
        if how == "altered":
            item["encrypted_content"] = item["encrypted_content"][:-5] + "AAAA="
        if how == "another kind":
            item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": item["encrypted_content"]}
    folder, key = ("b" if how == "another key" else "a"), ("key-b" if how == "another owner" else "key-a")
    async with running(tmp_path / folder, engine=hand, **KEYS) as two:
        items = [item, user("2")]
        if where == "socket":
            async with two.connect(key=key) as socket:
                error = (await socket.refused(input=items))["error"]
        else:
            asking = two.post(key=key, input=items) if where == "create" else compact(two, key=key, input=items)
            answer = await asking
            assert answer.status == 400
            error = answer.json["error"]
    assert (error["code"], error["param"]) == ("invalid_value", "input")
    assert f"'encrypted_content' of an item of type '{item['type']}'" in error["message"]
    assert hand.is_idle


async def test_the_sdk_compacts(played, hand):
    """openai-python's own method, its types, and its window as the next input.

    Source: openai-python, `responses.compact`.
    """
    async with AsyncOpenAI(base_url=f"{played.url}/v1", api_key="x", max_retries=0) as client:
        window, _ = await told(client.responses.compact(model="m", input="1"), hand, "S")
        CompactedResponse.model_validate_json(window.model_dump_json(warnings="error"), strict=True)
        asking = client.responses.create(model="m", input=[*window.output, {"role": "user", "content": "2"}])
        response, (turn,) = await told(asking, hand, "3")
    assert response.output_text == "3"
    assert read(turn) == ["[S]", "2"]


# --- When the summary fails -----------------------------------------------------------------------

FAULTS = {
    "refused": lambda turn: turn.refuse(),
    "failed": lambda turn: (turn.give(TextDelta("Half a")), turn.refuse("upstream_timeout")),
    "empty": lambda turn: turn.answer(" \n"),
    "calls": lambda turn: turn.finish(CallStarted("function_call", "call_9", "look"), CallDelta("{}")),
    "only thinks": lambda turn: turn.finish(ReasoningDelta("Hm.")),
    "cut": lambda turn: (turn.give(TextDelta("Half a"), Ended("max_output_tokens")), turn.end()),
    "ends": lambda turn: (turn.give(TextDelta("Half a")), turn.end()),
    "broken": lambda turn: turn.finish(UpstreamEvent({"type": "response.failed", "response": {}})),
}
CODES = {"refused": "rate_limit_exceeded", "failed": "upstream_timeout"}
by_fault = pytest.mark.parametrize("fault", FAULTS)


@by_fault
@pytest.mark.parametrize("asked", ["trigger", "threshold"])
async def test_a_summary_that_fails_fails_its_turn(socket, played, hand, fault, asked):
    """One terminal event with the engine's code; the parent is forgotten, as behind every failure.

    A summary that is empty or cut would stand for a conversation that it does not tell.

    Source: WebSocket mode guide, "Failed continuations"; streaming reference, "Failed turn".
    """
    create = await long_chain(socket, hand)
    hand.tokens = 1000
    if asked == "trigger":
        create["input"] = [TRIGGER]
    await socket.create(**create)
    turn = await hand.next_turn()
    turn.accept()
    FAULTS[fault](turn)
    frames = await socket.rest()
    assert types(frames) == ["created", "in_progress", *COMPACTION_EVENTS, "failed"]
    response = frames[-1]["response"]
    assert response["error"]["code"] == CODES.get(fault, "upstream_error")
    assert summary_of(response)["encrypted_content"] == ""
    assert "Half a" not in json.dumps(frames)
    assert await socket.is_silent()
    refused = await socket.refused(previous_response_id=create["previous_response_id"], input="5", store=False)
    assert refused["error"]["code"] == "previous_response_not_found"
    assert turn.closed.is_set()
    assert hand.is_idle
    await played.idle()


@by_fault
async def test_a_summary_that_fails_is_an_error_over_http(played, hand, fault):
    """As JSON and at the endpoint with the error's own status, and nothing is stored of it but that it failed.

    Source: Responses API reference, "Errors".
    """
    for asking in (played.post(input=[user("1"), TRIGGER]), compact(played)):
        posting = asyncio.ensure_future(asking)
        turn = await hand.next_turn()
        turn.accept()
        FAULTS[fault](turn)
        answer = await posting
        code = CODES.get(fault, "upstream_error")
        assert (answer.status, answer.json["error"]["code"]) == (ProtocolError(code, "").status, code)
        assert turn.closed.is_set()
    assert rows(played) == []


async def test_a_response_that_failed_over_its_summary_is_kept_as_failed(played, hand):
    """Streamed with `store: true`: it can be fetched, and not be continued.

    Source: Responses API reference, "Conversation state"; WebSocket mode guide: a failed response is no parent.
    """
    posting = asyncio.ensure_future(played.post(input=[user("1"), TRIGGER], stream=True))
    turn = await hand.next_turn()
    turn.refuse()
    response = (await posting).events[-1]["response"]
    assert (await played.get(f"/v1/responses/{response['id']}")).json == response
    refused = await played.post(previous_response_id=response["id"])
    assert refused.json["error"]["code"] == "previous_response_not_found"


async def test_an_answer_that_fails_behind_a_summary_fails(socket, hand):
    """One terminal event; the summary that was written is in its output."""
    create = await long_chain(socket, hand)
    hand.tokens = 1000
    await socket.create(**create)
    (await hand.next_turn()).answer("S")
    (await hand.next_turn()).refuse()
    frames = await socket.rest()
    assert types(frames) == ["created", "in_progress", *COMPACTION_EVENTS, "failed"]
    assert summary_of(frames[-1]["response"])["encrypted_content"]
    assert frames[-1]["response"]["error"]["code"] == "rate_limit_exceeded"


async def test_events_of_the_summary_itself_are_not_sent(socket, hand):
    """The client sees that it is written, not what: no delta, no reasoning.

    Source: docs/adr/0008: it must not be readable there.
    """
    await socket.create(input=[user("1"), TRIGGER])
    turn = await hand.next_turn()
    turn.finish(ReasoningDelta("Hm, soup."), TextDelta("They want "), TextDelta("soup."))
    frames = await socket.rest()
    assert types(frames) == ["created", "in_progress", *COMPACTION_EVENTS, "completed"]
    assert "soup" not in json.dumps(frames)


# --- Cancel, steer, leave, wait -------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["trigger", "threshold"])
async def test_a_cancelled_summary_ends_its_response_and_stands_for_nothing(socket, played, hand, asked):
    """Incomplete, with reason `cancelled`; who goes on from it goes on from the whole conversation.

    Source: WebSocket mode guide, "Cancelling"; docs/adr/0006, 0008.
    """
    create = await long_chain(socket, hand, store=True)
    hand.tokens = 1000
    if asked == "trigger":
        create["input"] = [user("3"), TRIGGER]
    await socket.create(**create)
    turn = await hand.next_turn()
    turn.give(TextDelta("Half a"))
    await until(lambda: turn.taken == 1)
    await socket.cancel()
    frames = await socket.rest()
    assert types(frames) == ["created", "in_progress", *COMPACTION_EVENTS, "incomplete"]
    response = frames[-1]["response"]
    assert response["incomplete_details"] == {"reason": "cancelled"}
    assert response["usage"] is None
    assert turn.closed.is_set()
    hand.tokens = 0
    for asking in (
        socket.completed(previous_response_id=response["id"], input="5", store=False),
        socket.completed(input=[user(LONG), assistant("2"), user("3"), *response["output"], user("5")]),
    ):
        _, (turn,) = await told(asking, hand, "6")
        assert read(turn) == [LONG, "2", "3", "5"]
    assert hand.is_idle
    await played.idle()


async def test_a_summary_that_was_cut_is_left_out_of_a_stored_chain(played, hand):
    """The same from the store: a background response that was cancelled while its summary was written.

    Source: Background mode guide; docs/adr/0008.
    """
    answer = await played.post(input=[user("1"), TRIGGER], background=True)
    await hand.next_turn()
    cancelled = await played.request("POST", f"/v1/responses/{answer.json['id']}/cancel")
    assert (cancelled.json["status"], summary_of(cancelled.json)["encrypted_content"]) == ("cancelled", "")
    _, (turn,) = await told(played.post(previous_response_id=answer.json["id"], input="2"), hand, "3")
    assert read(turn) == ["1", "2"]


async def test_a_response_is_cancelled_while_its_tokens_are_counted(socket, played, hand):
    """Nothing of it was written, and nothing runs on."""
    create = await long_chain(socket, hand)
    hand.may_count.clear()
    await socket.create(**create)
    await hand.counted.wait()
    await socket.cancel()
    assert types(await socket.rest())[-1] in {"request_cancelled", "incomplete"}
    assert hand.is_idle
    await played.idle()


async def test_a_response_opens_in_time_while_its_tokens_are_counted(start, hand):
    """`created` does not wait for a tokenizer that is slow.

    Source: WebSocket mode guide, "Connection life": created at the latest after 0.25 s.
    """
    server = await start(engine=hand, limits={"created_wait_seconds_max": 0.01})
    async with watched(server) as socket:
        create = await long_chain(socket, hand)
        hand.may_count.clear()
        await socket.create(**create)
        await hand.counted.wait()
        assert types(await socket.until("response.in_progress")) == ["created", "in_progress"]
        hand.may_count.set()
        (await hand.next_turn()).answer("4")
        assert types(await socket.rest())[-1] == "completed"


@pytest.mark.parametrize("transport", ["websocket", "sse", "json", "compact"])
async def test_a_client_that_goes_stops_the_summary(played, hand, transport):
    """Its engine is told at once, and no task is left.

    Source: guarantees, "Cancellation".
    """
    leftovers = Leftovers(played)
    if transport == "websocket":
        async with played.connect() as socket:
            await socket.create(input=[user("1"), TRIGGER])
            turn = await hand.next_turn()
            turn.give(TextDelta("Half a"))
            await until(lambda: turn.taken == 1)
    else:
        asking = (
            compact(played)
            if transport == "compact"
            else played.post(input=[user("1"), TRIGGER], stream=transport == "sse")
        )
        posting = asyncio.ensure_future(asking)
        turn = await hand.next_turn()
        turn.give(TextDelta("Half a"))
        await until(lambda: turn.taken == 1)
        posting.cancel()
    async with asyncio.timeout(1):
        await turn.closed.wait()
    await leftovers.gone()
    assert all(status == "incomplete" for status, _ in rows(played))


async def test_a_response_with_a_threshold_is_not_steered(socket, hand):
    """Not while its summary is written, and not behind it.

    Source: Mid-turn steering guide, "Limits": not for automatic compaction.
    """
    create = await long_chain(socket, hand)
    hand.tokens = 1000
    await socket.create(**create)
    turn = await hand.next_turn()
    (created, *_) = await socket.until("response.compaction.compacting")
    await socket.steer(created["response"])
    failed = (await socket.until("response.steer.failed"))[-1]
    assert failed["error"]["code"] == "steering_not_supported"
    turn.answer("S")
    (await hand.next_turn()).answer("4")
    assert types(await socket.rest())[-1] == "completed"


async def test_a_steered_trigger_completes_and_its_successor_reads_the_summary(socket, hand):
    """A summary is one item, which is finished; what was steered comes behind it.

    Source: Mid-turn steering guide: the current output item finishes; a successor follows.
    """
    first, _ = await told(socket.completed(input="1", store=False), hand, "2")
    await socket.create(previous_response_id=first["id"], input=[TRIGGER], store=False)
    turn = await hand.next_turn()
    (created, *_) = await socket.until("response.compaction.compacting")
    await socket.steer(created["response"], "Shorter.")
    await socket.until("response.steer.accepted")
    assert not turn.closed.is_set()
    turn.answer("S")
    frames = await socket.rest()
    assert types(frames) == ["output_item.done", "completed"]
    assert summary_of(frames[-1]["response"])["encrypted_content"]
    successor = await hand.next_turn()
    successor.answer("3")
    assert types(await socket.rest())[-1] == "completed"
    assert read(successor) == ["[S]", "Shorter."]


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_response_says_that_it_runs_while_its_summary_is_written(start, hand, transport):
    """`in_progress` again, with the summary as it stands: begun, and empty.

    Source: docs/adr/0006.
    """
    server = await start(engine=hand, limits={"keepalive_seconds": 0.02})
    body = {"input": [user("1"), TRIGGER]}
    async with server.connect() as socket:
        if transport == "websocket":
            await socket.create(**body)
            turn = await hand.next_turn()
            await socket.until("response.compaction.compacting")
            again = await socket.receive()
            turn.answer("S")
            await socket.rest()
        else:
            async with server.open_post(**body, stream=True) as answer:
                turn = await hand.next_turn()
                text = b""
                while text.count(b"event: response.in_progress") < 2:
                    text += await answer.content.readany()
                turn.answer("S")
                await answer.read()
            data = text.rpartition(b"data: ")[2].partition(b"\n\n")[0]
            again = json.loads(data)
    assert (again["type"], again["sequence_number"]) == ("response.in_progress", 4)
    (item,) = again["response"]["output"]
    assert (item["type"], item["encrypted_content"]) == ("compaction", "")


async def test_a_server_that_drains_lets_a_summary_end(played, hand):
    """As every running turn may; the socket closes behind it.

    Source: WebSocket mode guide, "Connection life".
    """
    async with played.connect() as socket:
        await socket.create(input=[user("1"), TRIGGER])
        turn = await hand.next_turn()
        await socket.until("response.compaction.compacting")
        draining = asyncio.ensure_future(played.app.drain(asyncio.Event()))
        turn.answer("S")
        assert types(await socket.rest())[-1] == "completed"
        await asyncio.wait_for(draining, 5)


# --- Upstreams ------------------------------------------------------------------------------------


class Model:
    """A model server that keeps every body, and answers as it is told: deltas over chat, an output over responses."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.bodies = []

    async def answer(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        answer = self.answers.pop(0)
        events = _responses(answer) if request.path == "/v1/responses" else _completion(answer)
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return web.Response(text=text, content_type="text/event-stream")


def _completion(delta):
    usage = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
    yield {"choices": [{"index": 0, "delta": delta}]}
    yield {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": usage}


def _responses(output):
    response = {"id": "resp_up", "object": "response", "status": "in_progress", "output": []}
    yield {"type": "response.created", "sequence_number": 0, "response": response}
    usage = {"input_tokens": 7, "output_tokens": 2, "total_tokens": 9}
    ended = {**response, "status": "completed", "output": output, "usage": usage}
    yield {"type": "response.completed", "sequence_number": 1, "response": ended}


@asynccontextmanager
async def in_front_of(tmp_path, kind, model, **upstream):
    """A server in front of a model server of this kind."""
    async with listening(model.answer) as url:
        settings = UpstreamSettings(kind=kind, url=url, models=("*",), **upstream)
        engine = (ChatEngine if kind == "chat" else ResponsesEngine)(settings, show_detail=True)
        async with running(tmp_path, engine=engine) as server:
            yield server


def said(text):
    """An upstream's message as an output item."""
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"id": "msg_up", "type": "message", "status": "completed", "role": "assistant", "content": content}


async def test_a_chat_upstream_writes_the_summary_and_reads_it_as_a_user_message(tmp_path):
    """The summary's request has no tools; the answer's has the summary, the last words, and the tools again."""
    model = Model({"content": "S"}, {"content": "4"})
    async with in_front_of(tmp_path, "chat", model, profile="generic") as server:
        body = {"input": [user(LONG * 5), assistant("2"), user("3")], "instructions": "Be brief.", "tools": TOOLS}
        response = (await server.post(**body, context_management=AT_1000)).json
    first, second = model.bodies
    assert [item["type"] for item in response["output"]] == ["compaction", "message"]
    assert response["usage"]["total_tokens"] == 9
    assert ("tools" in first, "tools" in second) == (False, True)
    assert first["messages"][0] == second["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [words(message) for message in second["messages"][1:]] == ["[S]", "3"]


@pytest.mark.parametrize("asked", ["trigger", "threshold"])
async def test_a_responses_upstream_is_not_asked_to_compact(tmp_path, asked):
    """Openline does it, at its own threshold: nothing of it is passed on, and its usage is told like any other's.

    Source: docs/adr/0008: the model itself writes the summary, whoever serves it.
    """
    model = Model([said("S")], [said("4")])
    trigger = [TRIGGER] if asked == "trigger" else []
    async with in_front_of(tmp_path, "responses", model) as server:
        body = {"input": [user(LONG * 5), assistant("2"), user("3"), *trigger], "tools": TOOLS, "service_tier": "flex"}
        response = (await server.post(**body, context_management=AT_1000)).json
    usage = response["usage"]
    assert (usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]) == (7, 2, 9)
    assert usage["output_tokens_details"] == {"reasoning_tokens": 0}
    assert set(model.bodies[0]) == {"model", "stream", "store", "input"}
    if asked == "threshold":
        assert [words(item) for item in model.bodies[1]["input"]] == ["[S]", "3"]
        assert "context_management" not in model.bodies[1]
        assert model.bodies[1]["service_tier"] == "flex"
    assert len(model.bodies) == (1 if asked == "trigger" else 2)


async def test_another_servers_summary_is_refused_where_it_cannot_be_read(tmp_path):
    """A chat upstream has no form for it: 400, and the error says what it is.

    Source: guarantees, "Errors": never lost silently.
    """
    item = {"type": "compaction", "encrypted_content": "gAAAAABtheirs"}
    async with in_front_of(tmp_path, "chat", Model(), profile="generic") as server:
        error = (await server.post(input=[item, user("2")])).json["error"]
    assert (error["code"], error["param"]) == ("unsupported_parameter", "input")
    assert "compaction" in error["message"]
    assert "Another server" in error["message"]


async def test_another_servers_summary_is_passed_on_to_a_responses_upstream(tmp_path):
    """Untouched, with all that stands before it; so is one that the upstream writes of itself.

    Source: docs/adr/0008: what another server sealed passes through.
    """
    item = {"type": "compaction", "id": "cmp_1", "encrypted_content": "gAAAAABtheirs"}
    own = {"type": "compaction", "id": "cmp_up", "encrypted_content": "gAAAAABits"}
    model = Model([own, said("3")], [said("5")])
    async with in_front_of(tmp_path, "responses", model) as server:
        first = (await server.post(input=[user("1"), item, user("2")])).json
        await server.post(previous_response_id=first["id"], input="4")
    assert model.bodies[0]["input"] == [user("1"), item, user("2")]
    assert first["output"][0]["encrypted_content"] == "gAAAAABits"
    assert [item.get("encrypted_content") for item in model.bodies[1]["input"]] == [
        None,
        "gAAAAABtheirs",
        None,
        "gAAAAABits",
        None,
        None,
    ]


# --- Reasoning that clients hold ------------------------------------------------------------------

RAW = [{"type": "reasoning_text", "text": "Hm."}]
THOUGHT = {"id": "rs_up", "type": "reasoning", "status": "completed", "summary": [], "content": RAW}


def reasoning_of(response):
    """The one reasoning item of an output."""
    (item,) = (item for item in response["output"] if item["type"] == "reasoning")
    return item


@pytest.mark.parametrize("kept", ["whole", "sealed alone"])
@pytest.mark.parametrize(("profile", "field"), [("vllm", "reasoning"), ("generic", "reasoning_content")])
async def test_sealed_reasoning_comes_back_to_a_chat_upstream(tmp_path, kept, profile, field):
    """Stateless, with nothing stored: the model reads what it thought, under the name that its server knows.

    Source: Responses API reference, `reasoning.encrypted_content`: stateless clients send it back unchanged.
    """
    model = Model({"reasoning_content": "Hm.", "content": "2"}, {"content": "4"})
    async with in_front_of(tmp_path, "chat", model, profile=profile) as server:
        first = (await server.post(input="1", store=False, **SEALED)).json
        item = reasoning_of(first)
        assert item["encrypted_content"].startswith("oln1.")
        if kept != "whole":
            item = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": item["encrypted_content"]}
        resent = [user("1"), item, *first["output"][1:], user("3")]
        await server.post(input=resent, store=False, **SEALED)
    assert model.bodies[1]["messages"][1] == {"role": "assistant", "content": "2", field: "Hm."}
    assert "oln1." not in json.dumps(model.bodies)


async def test_sealed_reasoning_comes_back_to_a_responses_upstream(tmp_path):
    """As reasoning with its content, where that server seals nothing itself.

    Source: Responses API reference, `reasoning.encrypted_content`.
    """
    model = Model([THOUGHT, said("2")], [said("4")])
    async with in_front_of(tmp_path, "responses", model) as server:
        first = (await server.post(input="1", store=False, **SEALED)).json
        await server.post(input=[user("1"), *first["output"], user("3")], store=False, **SEALED)
    item = reasoning_of(first)
    assert item["content"] == RAW
    sent = model.bodies[1]["input"][1]
    assert sent == {"type": "reasoning", "id": item["id"], "summary": [], "content": RAW}


async def test_an_upstreams_own_seal_is_untouched(tmp_path):
    """It is the upstream's to open, with the client's word that it wants it.

    Source: Responses API reference, `reasoning.encrypted_content`.
    """
    theirs = {**THOUGHT, "content": [], "encrypted_content": "gAAAAABits"}
    model = Model([theirs, said("2")], [said("4")])
    async with in_front_of(tmp_path, "responses", model) as server:
        first = (await server.post(input="1", store=False, **SEALED)).json
        await server.post(input=[user("1"), *first["output"], user("3")], store=False, **SEALED)
    assert model.bodies[0]["include"] == ["reasoning.encrypted_content"]
    assert reasoning_of(first)["encrypted_content"] == "gAAAAABits"
    assert model.bodies[1]["input"][1]["encrypted_content"] == "gAAAAABits"


@pytest.mark.parametrize("include", [None, [], ["message.output_text.logprobs"]])
@pytest.mark.parametrize("kind", ["chat", "responses"])
async def test_reasoning_is_not_sealed_unasked(tmp_path, kind, include):
    """No field at all, on no event.

    Source: Responses API reference, "include".
    """
    model = Model({"reasoning_content": "Hm.", "content": "2"} if kind == "chat" else [THOUGHT, said("2")])
    async with in_front_of(tmp_path, kind, model) as server:
        answer = await server.post(input="1", stream=True, include=include)
    assert reasoning_of(answer.events[-1]["response"])["content"] == RAW
    assert b"encrypted_content" not in answer.body


@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize("chained", ["on the socket", "from the store"])
async def test_nothing_that_we_sealed_reaches_an_upstream(tmp_path, kind, chained):
    """A chain over a socket's memory or the store, with seals in its items and a summary in its midst.

    Source: docs/adr/0008: sealed items are opened where a request is bound.
    """
    thinks = {"reasoning_content": "Hm.", "content": "2"} if kind == "chat" else [THOUGHT, said("2")]
    plain = {"content": "S"} if kind == "chat" else [said("S")]
    model = Model(thinks, plain, thinks, thinks)
    async with in_front_of(tmp_path, kind, model, **({"profile": "vllm"} if kind == "chat" else {})) as server:
        parent = None
        async with server.connect() as socket:
            for items in ([user("1")], [user("3"), TRIGGER], [user("4")], [user("5")]):
                if chained == "from the store":
                    posted = await server.post(input=items, previous_response_id=parent, **SEALED)
                    response = posted.json
                else:
                    response = await socket.completed(input=items, previous_response_id=parent, store=False, **SEALED)
                assert "oln1." in json.dumps(response)
                parent = response["id"]
    assert len(model.bodies) == 4
    assert "oln1." not in json.dumps(model.bodies)
    thoughts = [json.dumps(body).count("Hm.") for body in model.bodies]
    assert thoughts == [0, 1, 0, 1], "it read what it had thought, as far as it was not summed up"


async def test_a_seal_on_the_wire_is_the_seal_in_the_end(played, hand):
    """`output_item.done`, the final response and the store have the same: Codex compares items for equality.

    Source: WebSocket mode guide, "Continuing": item JSON must round-trip unchanged.
    """
    posting = asyncio.ensure_future(played.post(stream=True, **SEALED))
    (await hand.next_turn()).finish(ReasoningDelta("Hm."), TextDelta("2"))
    events = (await posting).events
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    response = events[-1]["response"]
    assert done == response["output"]
    assert (await played.get(f"/v1/responses/{response['id']}")).json["output"] == done
    assert done[0]["encrypted_content"].startswith("oln1.")
    added = next(event["item"] for event in events if event["type"] == "response.output_item.added")
    assert "encrypted_content" not in added


async def test_a_conversation_goes_on_from_its_summary(played, hand):
    """A conversation keeps every item, and its turns are read from the last summary on.

    Source: Responses API reference, "conversation"; docs/adr/0008.
    """
    conversation = (await played.request("POST", "/v1/conversations", json={})).json["id"]
    await told(played.post(conversation=conversation, input="1"), hand, "2")
    await told(played.post(conversation=conversation, input=[user("3"), TRIGGER]), hand, "S")
    _, (turn,) = await told(played.post(conversation=conversation, input="4"), hand, "5")
    assert read(turn) == ["[S]", "4"]
    listed = (await played.get(f"/v1/conversations/{conversation}/items?order=asc")).json["data"]
    assert [item["type"] for item in listed] == [*["message"] * 3, "compaction", *["message"] * 2]
