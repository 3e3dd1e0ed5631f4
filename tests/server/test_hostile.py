"""What a careless or hostile peer sends, and what must not come of it.

Source: the guarantees on input, origins and secrets; RFC 9110; WHATWG Fetch, "CORS protocol".
"""

from __future__ import annotations

import json
import logging
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from openline.config import ConfigError, UpstreamSettings, load
from openline.engines.chat import ChatEngine
from openline.engines.responses import ResponsesEngine
from server.listening import listening
from server.running import running

PAGE = "https://page.example"
CHAT = 'data: {"choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


@asynccontextmanager
async def in_front_of(folder: Any, kind: str, stream: str):
    """A server whose upstream answers everything with this event stream."""

    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=stream, content_type="text/event-stream")

    async with listening(answer) as url:
        settings = UpstreamSettings(kind=kind, url=url, profile="generic")
        make = ChatEngine if kind == "chat" else ResponsesEngine
        async with running(folder, engine=make(settings, show_detail=True)) as server:
            yield server


@pytest.mark.parametrize("tool_type", ["web\r\nX-Injected: 1", "web\0", "w" * 20_000, "wéb"])
async def test_a_tool_type_that_is_no_header_value_does_not_break_the_answer(tmp_path, tool_type):
    """Dropped tools are named in a header, and their types are whatever a client wrote."""
    async with in_front_of(tmp_path, "chat", CHAT) as server:
        answer = await server.post(model="m", tools=[{"type": tool_type}])
    assert answer.status == 200
    assert answer.headers["openline-dropped-tools"] == "?"
    assert "x-injected" not in answer.headers


BROKEN_ITEMS = [
    {"id": "x", "status": "completed"},
    {"type": "function_call_output", "id": "x", "call_id": "call_of_nobody", "output": "?"},
    {"type": "function_call", "id": "x", "call_id": {"not": "a string"}, "name": "f", "arguments": ""},
    {"type": ["function_call"]},
]


@pytest.mark.parametrize("item", BROKEN_ITEMS)
@pytest.mark.parametrize("store", [True, False])
async def test_an_upstreams_broken_item_fails_the_turn(tmp_path, item, store):
    """Whatever an upstream sends, a turn ends with one terminal event, and is never stored as completed."""
    events = [
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": {"status": "completed", "output": [item]}},
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    async with in_front_of(tmp_path, "responses", stream) as server:
        async with server.connect() as line:
            last = (await line.turn(model="m", store=store))[-1]
        assert last["type"] == "response.failed"
        assert last["response"]["error"]["code"] == "upstream_error"
        kept = await server.get(f"/v1/responses/{last['response']['id']}")
        assert kept.status == 404 or kept.json["status"] == "failed"
        plain = await server.post(model="m", store=store)
        assert (plain.status, plain.json["error"]["code"]) == (502, "upstream_error")
        events = (await server.post(model="m", store=store, stream=True)).events
        assert [event["type"] for event in events].count("response.failed") == 1


async def test_a_models_name_cannot_write_log_lines_of_its_own(server, caplog):
    """A log line is one line, whatever the client called its model, and not longer for it."""
    caplog.set_level(logging.INFO, "openline.turns")
    await server.post(model="x\n2026-01-01 turn resp_forged completed owner=admin" + "y" * 100_000)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "openline.turns"]
    assert "\n" not in line
    assert len(line) < 1000


@pytest.mark.parametrize(
    "create",
    [
        {"previous_response_id": "r" * 1_000_000},
        {"model": "m" * 1_000_000},
        {"input": [{"type": "function_call_output", "call_id": "c" * 1_000_000, "output": ""}]},
        {"input": [{"type": "t" * 1_000_000}], "model": "m"},
    ],
)
async def test_an_error_is_not_as_long_as_what_it_is_about(server, create):
    """Errors name what came, cut to what a person reads."""
    assert len((await server.post(**create)).body) < 4096


async def test_many_allowed_tools_do_not_cost_their_product(tmp_path):
    """The two lists of `tool_choice` and `tools` are the client's; together they must not stop the server."""
    tools = [{"type": "function", "name": f"f{n}"} for n in range(4000)]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f3999"}] * 20_000}
    async with in_front_of(tmp_path, "chat", CHAT) as server:
        assert (await server.post(model="m", tools=tools, tool_choice=choice)).status == 200


async def test_a_body_that_says_it_is_too_large_is_not_waited_for(start):
    """413 comes before the bytes."""
    server = await start(limits={"message_bytes_max": 1000})
    answer = await server.request("POST", "/v1/responses", headers={"Content-Length": "1001"}, data=b"x" * 1001)
    assert (answer.status, answer.json["error"]["code"]) == (413, "message_too_big")


async def test_a_slash_too_many_is_not_redirected_to_the_clients_host(server):
    """A `Location` made of the `Host` header would send the request, and its key, where a client was told to say."""
    answer = await server.request("POST", "/v1/responses/", json={})
    assert answer.status in {404, 405}
    assert "location" not in answer.headers


async def test_a_page_that_is_listed_may_read_answers(start):
    """Browsers ask first, and then want to be told that the page may read; errors included."""
    server = await start(server={"allowed_origins": (PAGE,)})
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type"
    preflight = await server.request("OPTIONS", "/v1/responses", headers=asked)
    assert preflight.status == 204
    assert preflight.headers["access-control-allow-headers"] == "authorization,content-type"
    for path in ("/v1/models", "/v1/responses/resp_1"):
        answer = await server.get(path, headers={"Origin": PAGE})
        assert answer.headers["access-control-allow-origin"] == PAGE


async def test_a_page_that_is_not_listed_gets_no_such_headers(start):
    """Only the listed ones are told anything."""
    server = await start(server={"allowed_origins": (PAGE,)})
    answer = await server.request("OPTIONS", "/v1/responses", headers={"Origin": "https://other.example"})
    assert "access-control-allow-origin" not in answer.headers
    assert answer.status in {403, 405}


async def test_readiness_does_not_tell_strangers_where_the_models_run(start):
    """A load balancer asks without a key; it learns whether, not where."""
    server = await start(keys={"secret-key": "team"})
    assert (await server.get("/readyz")).json == {"status": "ready"}
    assert "upstreams" in (await server.get("/readyz", key="secret-key")).json


def test_one_key_does_not_go_to_several_upstreams():
    """The default key is meant for one server; the others would learn it."""
    environ = {"OPENLINE_UPSTREAM_API_KEY": "sk-for-one"}
    two = ["chat:http://gpu-box/v1", "responses:https://api.openai.com/v1"]
    with pytest.raises(ConfigError, match="api_key_env") as raised:
        load(None, environ, {"upstream": two})
    assert "sk-for-one" not in str(raised.value)
    assert len(load(None, environ, {"upstream": two[:1]}).upstreams) == 1
    assert len(load(None, {}, {"upstream": two}).upstreams) == 2
