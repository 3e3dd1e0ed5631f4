"""The engine for upstreams that speak Responses: what they get, and what becomes of what they send.

Source: Responses API reference, "Create a response"; streaming reference.
"""

import asyncio
import itertools
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from openline.config import UpstreamSettings
from openline.engines.engine import EngineRequest
from openline.engines.responses import ItemsProjection, ResponsesEngine
from openline.protocol.builder import Builder
from openline.protocol.deltas import UpstreamEvent
from openline.protocol.errors import ProtocolError
from openline.protocol.events import read_http_create, read_input
from openline.protocol.items import item_of
from openline.protocol.response import opening_response
from openline.state.context import EMPTY

MESSAGE = {"type": "message", "id": "msg_up", "status": "completed", "role": "assistant"}
PART = {"type": "output_text", "text": "Hi", "annotations": []}
AT = {"item_id": "msg_up", "output_index": 0, "content_index": 0}
TURN: list[dict[str, Any]] = [
    {"type": "response.created", "response": {"id": "resp_up"}},
    {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": {**MESSAGE, "status": "in_progress", "content": []},
    },
    {"type": "response.content_part.added", **AT, "part": {**PART, "text": ""}},
    {"type": "response.output_text.delta", **AT, "delta": "Hi", "logprobs": [], "vendor": {"kept": 1}},
    {"type": "response.vendor_event", **AT, "note": "unknown"},
    {"type": "response.output_text.done", **AT, "text": "Hi", "logprobs": []},
    {"type": "response.content_part.done", **AT, "part": PART},
    {"type": "response.output_item.done", "output_index": 0, "item": {**MESSAGE, "content": [PART]}},
    {
        "type": "response.completed",
        "response": {
            "id": "resp_up",
            "status": "completed",
            "output": [{**MESSAGE, "content": [PART]}],
            "usage": {"input_tokens": 5, "output_tokens": 1, "total_tokens": 6, "vendor_tokens": 9},
            "service_tier": "flex",
            "vendor_field": "kept",
        },
    },
]


def sse(events: list[dict[str, Any]], *, done: bool) -> bytes:
    numbered = [{**event, "sequence_number": 7 + number} for number, event in enumerate(events)]
    text = b"".join(b"data: " + msgspec.json.encode(event) + b"\n\n" for event in numbered)
    return text + (b"data: [DONE]\n\n" if done else b"")


@asynccontextmanager
async def upstream(answer: Any):
    """A Responses server on a real socket; `answer(request)` answers each POST."""
    app = web.Application()
    app.router.add_post("/v1/responses", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    engine = ResponsesEngine(UpstreamSettings(kind="responses", url=f"http://127.0.0.1:{port}/v1"), show_detail=True)
    try:
        yield engine
    finally:
        await engine.close()
        await runner.cleanup()


def request_for(body: dict[str, Any], context: Any = None) -> EngineRequest:
    encoded = msgspec.json.encode(body)
    create = read_http_create(encoded)
    return EngineRequest(create, encoded, (context or EMPTY).extend(read_input(create)), "upstream-model")


async def run(engine: ResponsesEngine, request: EngineRequest) -> tuple[list[dict[str, Any]], Builder]:
    """The events that our builder makes of the upstream's, up to where they stop."""
    ids = itertools.count()
    opening = opening_response(request.create, response_id="resp_ours", model="asked", created_at=1)
    builder = Builder(opening, lambda prefix: f"{prefix}_ours{next(ids)}")
    events = builder.open()
    async with aclosing(engine.prepare(request).stream()) as batches:
        async for deltas in batches:
            events += builder.apply(deltas)
    return events, builder


async def collect(engine: ResponsesEngine, types: list[str]) -> None:
    """The types of the events that a turn brings, for as long as it brings some."""
    async with aclosing(engine.prepare(request_for({"model": "m", "input": "Hello"})).stream()) as batches:
        async for deltas in batches:
            types.extend(delta.event["type"] for delta in deltas if isinstance(delta, UpstreamEvent))


@pytest.mark.parametrize("done", [True, False], ids=["with [DONE]", "ends at the terminal event"])
async def test_ids_and_numbers_are_ours_and_the_rest_travels_through(done: bool):
    """An upstream's unknown events and fields reach the client; its ids and sequence numbers do not."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=sse(TURN, done=done), content_type="text/event-stream")

    async with upstream(answer) as engine:
        events, builder = await run(engine, request_for({"model": "m", "input": "Hello"}))
    events += builder.finish(2)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert b"_up" not in msgspec.json.encode(events)
    by_type = {event["type"]: event for event in events}
    assert by_type["response.output_text.delta"]["vendor"] == {"kept": 1}
    assert by_type["response.vendor_event"]["note"] == "unknown"
    final = by_type["response.completed"]["response"]
    assert (final["id"], final["model"], final["vendor_field"], final["service_tier"]) == (
        "resp_ours",
        "asked",
        "kept",
        "flex",
    )
    assert final["usage"]["input_tokens_details"] == {"cached_tokens": 0, "cache_write_tokens": 0}
    assert final["usage"]["vendor_tokens"] == 9
    assert final["output"][0]["content"][0]["text"] == "Hi"


def test_the_upstream_gets_the_whole_context_and_is_told_to_keep_nothing():
    """What was asked goes on, unknown fields included; what concerns only the client's connection does not."""
    first = EMPTY.extend([item_of({"type": "message", "role": "user", "content": "one"})])
    body = {
        "type": "response.create",
        "model": "asked",
        "input": [{"role": "user", "content": "two"}],
        "previous_response_id": "resp_1",
        "store": True,
        "stream": False,
        "stream_id": "lane",
        "client_metadata": {"x": "y"},
        "temperature": 0.5,
        "top_p": None,
        "vendor_knob": [1, 2],
    }
    engine = ResponsesEngine(UpstreamSettings(kind="responses", url="http://127.0.0.1:9/v1"), show_detail=True)
    sent = msgspec.json.decode(engine.prepare(request_for(body, first)).body)
    contents = [item["content"] for item in sent.pop("input")]
    assert contents == ["one", "two"]
    assert sent == {
        "model": "upstream-model",
        "stream": True,
        "store": False,
        "temperature": 0.5,
        "vendor_knob": [1, 2],
    }


@pytest.mark.parametrize(
    ("included", "sent"),
    [
        (["message.output_text.logprobs", "openline.timings"], ["message.output_text.logprobs"]),
        (["openline.timings"], []),
    ],
)
def test_our_own_value_of_include_stays_here(included: list[str], sent: list[str]):
    """Another server would refuse it (docs/adr/0004)."""
    engine = ResponsesEngine(UpstreamSettings(kind="responses", url="http://127.0.0.1:9/v1"), show_detail=True)
    body = engine.prepare(request_for({"model": "m", "input": "Hello", "include": included})).body
    assert msgspec.json.decode(body)["include"] == sent


REASONING = {"type": "reasoning", "id": "rs_1", "summary": []}
ITEMS = [
    item_of({"type": "message", "role": "user", "content": "hello"}),
    item_of({**MESSAGE, "content": [PART]}),
    item_of({**REASONING, "content": [{"type": "reasoning_text", "text": "hm"}]}),
    item_of({**REASONING, "encrypted_content": "sealed"}),
    item_of(REASONING),
    item_of({"type": "item_of_a_vendor", "id": "x"}),
]


def test_sealed_reasoning_goes_back_without_an_id_and_empty_reasoning_stays_here():
    """Sealed reasoning is bound to an id that only its upstream knows; a bare id finds nothing where nothing is stored."""
    projection = ItemsProjection()
    state = projection.extend(projection.start(), ITEMS)
    sent = msgspec.json.decode(b"[%b]" % bytes(state))
    assert sent[2]["id"] == "rs_1"
    assert sent[3] == {"type": "reasoning", "summary": [], "encrypted_content": "sealed"}
    assert [item["type"] for item in sent[4:]] == ["item_of_a_vendor"]


@given(st.lists(st.lists(st.sampled_from(ITEMS), max_size=4), max_size=6))
def test_increments_equal_a_full_resend(turns: list[list[Any]]):
    """However a context was split into turns, its bytes are those of sending it whole."""
    projection = ItemsProjection()
    node = EMPTY
    for turn in turns:
        node = node.extend(turn)
        node.project(projection)
    whole = projection.extend(projection.start(), [item for turn in turns for item in turn])
    assert bytes(node.project(projection)) == bytes(whole)


FAILURES = [
    ({"type": "error", "code": "rate_limit_exceeded", "message": "slow down"}, "rate_limit_exceeded"),
    ({"type": "error", "error": {"type": "server_error", "code": None, "message": "oops"}}, "upstream_error"),
    (
        {"type": "response.failed", "response": {"error": {"code": "context_length_exceeded", "message": "too long"}}},
        "context_length_exceeded",
    ),
    ({"type": "response.failed", "response": {}}, "upstream_error"),
]


@pytest.mark.parametrize(("event", "code"), FAILURES)
async def test_an_upstreams_failure_becomes_our_code(event: dict[str, Any], code: str):
    """An upstream that fails in mid-stream, in either of the ways it can say so, fails our turn with our code."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=sse([*TURN[:4], event], done=False), content_type="text/event-stream")

    types: list[str] = []
    async with upstream(answer) as engine:
        with pytest.raises(ProtocolError) as raised:
            await collect(engine, types)
    assert raised.value.code == code
    assert types == [event["type"] for event in TURN[:4]], "what came before it goes out, although it came in one read"


@pytest.mark.parametrize("behind", [TURN[-1], TURN[3], FAILURES[0][0], {"type": 5}])
async def test_what_follows_the_terminal_event_belongs_to_nothing(behind: dict[str, Any]):
    """The turn has ended as it said, whatever else the same read brings."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=sse([*TURN, behind], done=True), content_type="text/event-stream")

    types: list[str] = []
    async with upstream(answer) as engine:
        await collect(engine, types)
    assert types == [event["type"] for event in TURN]


@pytest.mark.parametrize("count", range(len(TURN)))
async def test_a_stream_that_ends_early_has_not_ended_the_response(count: int):
    """Wherever the upstream hangs up before its terminal event, the turn can tell that it did not finish."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=sse(TURN[:count], done=False), content_type="text/event-stream")

    async with upstream(answer) as engine:
        _, builder = await run(engine, request_for({"model": "m", "input": "Hello"}))
    assert builder.ended is None


async def test_an_event_that_is_not_json_is_an_upstream_error():
    """What an upstream sends is not trusted to be JSON."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(body=b"data: {nonsense\n\n", content_type="text/event-stream")

    async with upstream(answer) as engine:
        with pytest.raises(ProtocolError, match="not JSON") as raised:
            await run(engine, request_for({"model": "m", "input": "Hello"}))
    assert raised.value.code == "upstream_error"


async def test_closing_the_stream_stops_the_upstream():
    """An upstream learns from its connection that nobody wants the rest, within a second."""
    gone = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(sse(TURN[:1], done=False))
                await asyncio.sleep(0.01)
        except (ConnectionError, asyncio.CancelledError):
            gone.set()
            raise

    async with upstream(answer) as engine:
        async with aclosing(engine.prepare(request_for({"model": "m", "input": "Hello"})).stream()) as batches:
            await anext(batches)
            await anext(batches)
        await asyncio.wait_for(gone.wait(), 1)
