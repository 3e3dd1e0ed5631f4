"""docs/reference/create.md says of every field of a create what becomes of it: each word of it is tried here.

Source: Responses API reference, "Create a response"; WebSocket mode guide, "response.create".
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from openai.types.responses.responses_client_event_param import ResponseCreate

from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from openline.engines.responses import ResponsesEngine
from openline.engines.slots import wanted
from openline.protocol.deltas import ReasoningDelta, TextDelta
from openline.protocol.events import Create, HttpCreate, SocketCreate
from server.hand import Hand
from server.listening import listening
from server.running import running
from server.watching import types

PAGE = (Path(__file__).parent.parent / "docs" / "reference" / "create.md").read_text(encoding="utf-8")
ROWS = {field: fates.split(", ") for field, fates in re.findall(r"^\| `(\w+)` \| ([\w, ]+) \|", PAGE, re.MULTILINE)}
FATES = {"acts", "passed on", "echoed", "refused", "accepted"}

# What the SDK's event type does not have: of Open Responses, of the beta for several agents, of Codex, of ours.
MORE = {"presence_penalty", "frequency_penalty", "multi_agent", "client_metadata", "idempotency_key", "starting_after"}
OF_SOCKETS = {"type", "stream_id"}
OF_EARLIER = {"previous_response_id", "conversation", "starting_after"}  # about something that has to be there
TOOL = {"type": "function", "name": "f", "description": None, "parameters": {"type": "object"}, "strict": None}

# A value of each field that is not its default, and beside it what it needs to be taken.
SAMPLES = {
    "model": "scripted-text",
    "input": "Hello.",
    "instructions": "Be brief.",
    "store": False,
    "background": True,
    "background_options": {"completion_window": "2h"},
    "stream": True,
    "stream_options": {"include_obfuscation": True},
    "generate": False,
    "tools": [TOOL],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "max_tool_calls": 3,
    "max_output_tokens": 77,
    "temperature": 0.25,
    "top_p": 0.5,
    "top_logprobs": 2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "text": {"format": {"type": "json_object"}, "verbosity": "low"},
    "reasoning": {"effort": "high", "summary": "auto"},
    "include": ["code_interpreter_call.outputs"],
    "truncation": "auto",
    "context_management": [{"type": "compaction", "compact_threshold": 5000}],
    "metadata": {"a": "b"},
    "prompt_cache_key": "k",
    "prompt_cache_options": {"mode": "explicit"},
    "prompt_cache_retention": "24h",
    "service_tier": "flex",
    "safety_identifier": "s",
    "user": "u",
    "moderation": {"model": "m"},
    "access_programs": {"cyber": "standard"},
    "image": {"context_compression": "disabled"},
    "multi_agent": {"enabled": True},
    "client_metadata": {"a": "b"},
    "idempotency_key": "key-1",
    "prompt": {"id": "p"},
}
BESIDE = {"tool_choice": {"tools": [TOOL]}, "parallel_tool_calls": {"tools": [TOOL]}}
BASE = {"model": "m", "input": "Hello."}

# What a Chat Completions upstream gets, under its own names.
OVER_CHAT = {
    "model": {"model": "scripted-text"},
    "instructions": {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]},
    "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
    "tool_choice": {"tool_choice": "required"},
    "parallel_tool_calls": {"parallel_tool_calls": False},
    "max_output_tokens": {"max_tokens": 77},
    "temperature": {"temperature": 0.25},
    "top_p": {"top_p": 0.5},
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.25},
    "text": {"response_format": {"type": "json_object"}, "verbosity": "low"},
    "reasoning": {"reasoning_effort": "high"},
    "user": {"user": "u"},
}


def fields_that(*words):
    """The fields of whose line one of the words is said."""
    return sorted(field for field, fates in ROWS.items() if set(words) & set(fates))


# --- The table and the code -----------------------------------------------------------------------


def test_every_field_has_a_line():
    """Every field that is documented, and every one that is read; and no other.

    Source: openai-python, `ResponseCreate`: the event's type, which has the body's fields too.
    """
    documented = set(ResponseCreate.__annotations__) | MORE
    read = {*Create.__struct_fields__, *HttpCreate.__struct_fields__, *SocketCreate.__struct_fields__}
    assert set(ROWS) == documented
    assert read <= documented


def test_every_line_says_something_that_is_tried():
    """The words are the five that the page explains, and none is without its test."""
    said = {fate.removesuffix(" over WebSocket") for fates in ROWS.values() for fate in fates}
    assert said == FATES
    assert all(f"* **{fate}**: " in PAGE for fate in FATES)
    assert set(fields_that("acts")) == set(ACTS)
    assert set(fields_that("passed on")) == set(OVER_CHAT)
    assert set(SAMPLES) == set(ROWS) - OF_SOCKETS - OF_EARLIER


# --- Echoed, refused, accepted ---------------------------------------------------------------------


@pytest.fixture
async def server(tmp_path):
    """A server with the scripted engine."""
    async with running(tmp_path) as server:
        yield server


async def create(server, **body):
    """A create over HTTP, without anything that is not asked for."""
    return await server.request("POST", "/v1/responses", json={"model": "scripted-text", "input": "Hello.", **body})


@pytest.mark.parametrize("field", sorted(set(fields_that("echoed")) - OF_SOCKETS))
async def test_what_is_echoed_is_in_the_response(server, field):
    """With the value that was sent.

    Source: Responses API reference, "The response object".
    """
    if field == "previous_response_id":
        value = (await create(server)).json["id"]
        echoed = value
    elif field == "conversation":
        value = (await server.request("POST", "/v1/conversations", json={})).json["id"]
        echoed = {"id": value}
    else:
        value = echoed = SAMPLES[field]
    response = (await create(server, **BESIDE.get(field, {}), **{field: value})).json
    assert response[field] == echoed


@pytest.mark.parametrize("field", sorted(set(ROWS) - set(fields_that("echoed", "refused")) - OF_SOCKETS - OF_EARLIER))
async def test_what_is_not_echoed_is_not_in_the_response(server, field):
    """Nobody is told that something was done that was not."""
    answer = await create(server, **{field: SAMPLES[field]})
    assert answer.status == 200
    response = answer.events[-1]["response"] if field == "stream" else answer.json
    assert field not in response


@pytest.mark.parametrize("field", fields_that("refused"))
async def test_what_is_refused_is_named(server, field):
    """400 with the field as `param`, over either transport."""
    answer = await create(server, **{field: SAMPLES[field]})
    assert (answer.status, answer.json["error"]["param"]) == (400, field)
    async with server.connect() as socket:
        assert (await socket.refused(**{field: SAMPLES[field]}))["error"]["param"] == field


@pytest.mark.parametrize("field", fields_that("refused over WebSocket"))
async def test_what_is_refused_over_websocket_is_named(server, field):
    """As an error frame; over HTTP it is taken."""
    async with server.connect() as socket:
        error = await socket.refused(**{field: SAMPLES[field]})
    assert (error["status"], error["error"]["param"]) == (400, field)
    assert (await create(server, **{field: SAMPLES[field]})).status == 200


@pytest.mark.parametrize("field", fields_that("accepted", "accepted over WebSocket"))
async def test_what_is_accepted_changes_nothing(server, field):
    """A create with it has the events of one without it."""
    async with server.connect() as socket:
        with_it = await socket.turn(**{field: SAMPLES[field]})
        without_it = await socket.turn()
    assert types(with_it) == types(without_it)
    assert set(with_it[-1]["response"]) == set(without_it[-1]["response"])


async def test_other_fields_are_accepted(server):
    """Vendors' own, over either transport.

    Source: Responses API reference, "Create a response", unknown fields.
    """
    assert "\nOther fields at the top level are accepted.\n" in PAGE
    answer = await create(server, nobody_knows_this=[1])
    assert answer.status == 200
    assert "nobody_knows_this" not in answer.json
    async with server.connect() as socket:
        await socket.completed(nobody_knows_this=[1])


# --- Passed on ------------------------------------------------------------------------------------


class Upstream:
    """A model server that keeps what it was sent, and says a word."""

    def __init__(self) -> None:
        self.body = {}

    async def answer(self, request: web.Request) -> web.Response:
        self.body = await request.json()
        if request.path == "/v1/responses":
            ended = {"id": "resp_up", "object": "response", "status": "completed", "output": []}
            events = [{"type": "response.completed", "sequence_number": 0, "response": ended}]
        else:
            events = [{"choices": [{"index": 0, "delta": {"content": "Hi."}, "finish_reason": "stop"}]}]
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return web.Response(text=text, content_type="text/event-stream")


@asynccontextmanager
async def in_front_of(tmp_path, kind, upstream):
    """A server in front of it."""
    async with listening(upstream.answer) as url:
        settings = UpstreamSettings(kind=kind, url=url, profile="generic" if kind == "chat" else None)
        engine = (ChatEngine if kind == "chat" else ResponsesEngine)(settings, show_detail=True)
        async with running(tmp_path, engine=engine) as server:
            yield server


async def test_what_is_passed_on_is_what_a_chat_upstream_gets(tmp_path):
    """Under its names, and nothing of any other field.

    Source: Chat Completions reference, "Create chat completion".
    """
    upstream = Upstream()
    async with in_front_of(tmp_path, "chat", upstream) as server:
        for field in sorted(set(SAMPLES) - {"input", "background"} - set(fields_that("refused"))):
            await create(server, **BASE, **BESIDE.get(field, {}))
            plain = upstream.body
            body = {**BASE, **BESIDE.get(field, {}), field: SAMPLES[field]}
            await create(server, **body)
            more = {name: value for name, value in upstream.body.items() if plain.get(name) != value}
            if field == "tools":
                more.pop("tool_choice", None)
            assert more == OVER_CHAT.get(field, {}), field


async def test_a_responses_upstream_gets_all_that_is_not_ours(tmp_path):
    """Every field as it was sent, but those that the page names.

    Source: README, "What stands behind it": fields that Openline does not know travel through.
    """
    _, _, listed = PAGE.partition("but those that Openline does itself:")
    ours = set(re.findall(r"`(\w+)`", listed.partition(". It gets")[0]))
    upstream = Upstream()
    sent = {
        field: SAMPLES[field] for field in set(SAMPLES) - {"stream", "background", "generate", "prompt", "multi_agent"}
    }
    async with in_front_of(tmp_path, "responses", upstream) as server:
        await create(server, **sent, nobody_knows_this=[1])
    got = upstream.body
    assert set(got) == {*(set(sent) - ours), "nobody_knows_this", "input", "store", "stream"}
    assert all(got[field] == value for field, value in sent.items() if field not in ours)
    assert (got["store"], got["stream"], got["nobody_knows_this"]) == (False, True, [1])
    assert ours <= set(ROWS)


# --- Acts -----------------------------------------------------------------------------------------

ACTS = {}


def acts(field):
    """Marks what is tried for a field."""

    def mark(trial):
        ACTS[field] = trial
        return trial

    return mark


async def answered(hand, asking, text="Hi."):
    """What answers a request, and the turn that the engine had."""
    asked = asyncio.ensure_future(asking)
    turn = await hand.next_turn()
    turn.answer(text)
    return await asked, turn


@acts("model")
async def model_is_routed(server, hand):
    answer, turn = await answered(hand, create(server, model="other"))
    assert turn.request.model == "other"
    _, turn = await answered(hand, create(server, model=None, previous_response_id=answer.json["id"]))
    assert turn.request.model == "other"


@acts("input")
async def input_is_read(server, hand):
    _, turn = await answered(hand, create(server, input="Read this."))
    assert b"Read this." in turn.input[0]


@acts("previous_response_id")
async def parent_is_read(server, hand):
    first, _ = await answered(hand, create(server, input="1"), "2")
    _, turn = await answered(hand, create(server, input="3", previous_response_id=first.json["id"]))
    assert len(turn.input) == 3


@acts("conversation")
async def conversation_is_read(server, hand):
    conversation = (await server.request("POST", "/v1/conversations", json={})).json["id"]
    await answered(hand, create(server, input="1", conversation=conversation), "2")
    _, turn = await answered(hand, create(server, input="3", conversation={"id": conversation}))
    assert len(turn.input) == 3


@acts("store")
async def store_is_heeded(server, hand):
    for stores in (True, False):
        answer, _ = await answered(hand, create(server, store=stores))
        assert ((await server.get(f"/v1/responses/{answer.json['id']}")).status == 200) is stores


@acts("background")
async def background_goes_on(server, hand):
    queued = (await create(server, background=True)).json
    assert queued["status"] == "queued"
    (await hand.next_turn()).answer("Hi.")
    await server.idle()
    assert (await server.get(f"/v1/responses/{queued['id']}")).json["status"] == "completed"


@acts("stream")
async def stream_is_events(server, hand):
    for streams, form in ((True, "text/event-stream"), (False, "application/json")):
        answer, _ = await answered(hand, create(server, stream=streams))
        assert answer.headers["content-type"].startswith(form)


@acts("type")
async def type_is_read(server, hand):
    async with server.connect() as socket:
        await socket.send(type="response.created", model="m", input="Hello.")
        assert (await socket.receive())["error"]["param"] == "type"
    assert hand.is_idle


@acts("stream_id")
async def lane_is_on_every_event(server, hand):
    async with server.connect() as socket:
        frames, _ = await answered(hand, socket.turn(stream_id="a"))
    assert {frame["stream_id"] for frame in frames} == {"a"}


@acts("generate")
async def warm_up_says_nothing(server, hand):
    assert (await create(server, generate=False)).json["output"] == []
    assert hand.is_idle


@acts("prompt_cache_options")
async def prewarm_says_nothing(server, hand):
    assert (await create(server, prompt_cache_options={"prewarm": True})).json["output"] == []
    assert hand.is_idle


@acts("prompt_cache_key")
async def conversations_are_told_apart(server, hand):
    _, one = await answered(hand, create(server, prompt_cache_key="a"))
    _, same = await answered(hand, create(server, prompt_cache_key="a"))
    _, other = await answered(hand, create(server, prompt_cache_key="b"))
    assert wanted(one.request) == wanted(same.request) != wanted(other.request)


@acts("include")
async def reasoning_is_sealed(server, hand):
    for asked in (True, False):
        include = ["reasoning.encrypted_content"] if asked else []
        posting = asyncio.ensure_future(create(server, include=include))
        (await hand.next_turn()).finish(ReasoningDelta("Hm."), TextDelta("Hi."))
        assert ("encrypted_content" in (await posting).json["output"][0]) is asked
    assert (await create(server, include=["everything"])).json["error"]["param"].startswith("include")


@acts("truncation")
async def oldest_turns_are_left_out(server, hand):
    items = [{"role": role, "content": text} for role, text in (("user", "1"), ("assistant", "2"), ("user", "3"))]
    posting = asyncio.ensure_future(create(server, input=items, truncation="auto"))
    (await hand.next_turn()).refuse("context_length_exceeded")
    turn = await hand.next_turn()
    turn.answer("4")
    assert (await posting).json["status"] == "completed"
    assert len(turn.input) == 1


@acts("context_management")
async def conversation_is_summed_up(server, hand):
    items = [{"role": role, "content": "x" * 600} for role in ("user", "assistant", "user")]
    posting = asyncio.ensure_future(
        create(server, input=items, context_management=[{"type": "compaction", "compact_threshold": 1000}])
    )
    for text in ("A summary.", "An answer."):
        (await hand.next_turn()).answer(text)
    assert [item["type"] for item in (await posting).json["output"]] == ["compaction", "message"]


@acts("idempotency_key")
async def key_is_of_one_turn(server, hand):
    first, _ = await answered(hand, create(server, idempotency_key="k"))
    assert (await create(server, idempotency_key="k")).json == first.json
    assert hand.is_idle


@acts("starting_after")
async def rest_is_read(server, hand):
    first, _ = await answered(hand, create(server, idempotency_key="k", stream=True))
    rest = await create(server, idempotency_key="k", stream=True, starting_after=3)
    assert rest.events == first.events[4:]


@pytest.mark.parametrize("field", fields_that("acts"))
async def test_what_acts_does_so(tmp_path, field):
    """A small thing each; what there is more to say about it is in the field's own tests."""
    hand = Hand()
    async with running(tmp_path, engine=hand) as server:
        await ACTS[field](server, hand)


def test_a_sample_is_no_default():
    """Else an echo would prove nothing."""
    plain = msgspec.to_builtins(HttpCreate())
    assert all(plain.get(field) != value for field, value in SAMPLES.items())
