"""The server in front of a model server on the network: one that is dead, one that is cut off, one that fails."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine

STOP_SECONDS_MAX = 1.0  # guarantees, "Cancellation"


class ChatServer:
    """A Chat Completions server that speaks until it is cut off, or answers with the status it is given."""

    def __init__(self) -> None:
        self.status = 200
        self.speaking = asyncio.Event()
        self.cut_off = asyncio.Event()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        if self.status != 200:
            return web.json_response({"error": {"message": "No."}}, status=self.status, headers={"retry-after": "7"})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(b'data: {"choices":[{"index":0,"delta":{"content":"word "}}]}\n\n')
                self.speaking.set()
                await asyncio.sleep(0.005)  # a token every 5 ms
        except ConnectionError:
            self.cut_off.set()
            return response

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "m", "object": "model", "created": 0}]})


@asynccontextmanager
async def listening(chat):
    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat.complete)
    app.router.add_get("/v1/models", chat.models)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@pytest.fixture
async def chat():
    return ChatServer()


@pytest.fixture
async def server(start, chat):
    """A server in front of `chat`."""
    async with listening(chat) as url:
        engine = ChatEngine(UpstreamSettings(kind="chat", url=url, name="local"), show_detail=False)
        yield await start(engine=engine)


@pytest.mark.parametrize("transport", ["websocket", "sse", "json"])
async def test_a_gone_client_cuts_the_upstream_off(server, chat, transport):
    """The upstream's own connection is closed within a second of the client's going, which is how it learns to stop.

    Source: guarantees, "Cancellation".
    """
    if transport == "websocket":
        async with server.connect() as client:
            await client.create(model="m")
            await asyncio.wait_for(chat.speaking.wait(), 5)
    else:
        posting = asyncio.ensure_future(server.post(model="m", stream=transport == "sse"))
        await asyncio.wait_for(chat.speaking.wait(), 5)
        posting.cancel()
    await asyncio.wait_for(chat.cut_off.wait(), STOP_SECONDS_MAX)
    await server.idle()


@pytest.mark.parametrize(("status", "code"), [(429, "rate_limit_exceeded"), (503, "server_is_overloaded")])
async def test_an_upstreams_refusal_keeps_its_status_and_retry_after(server, chat, status, code):
    """What the upstream refuses before it accepts is refused to the client with that status, on every transport.

    Source: guarantees, "Upstream errors".
    """
    chat.status = status
    async with server.connect() as client:
        frame = await client.refused(model="m")
        assert (frame["status"], frame["error"]["code"], frame["headers"]) == (status, code, {"retry-after": "7"})
    for stream in (False, True):
        answer = await server.post(model="m", stream=stream)
        assert (answer.status, answer.json["error"]["code"], answer.headers["retry-after"]) == (status, code, "7")


async def test_a_dead_upstream_fails_turns_by_name_and_readiness(start):
    """Nothing listens there: the server runs, says that it is not ready, and turns fail with a 502 that names it.

    Source: guarantees, "Upstream errors".
    """
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        engine = ChatEngine(UpstreamSettings(kind="chat", url=url, name="my-vllm"), show_detail=False)
        server = await start(engine=engine)
        assert (await server.get("/healthz")).status == 200
        ready = await server.get("/readyz")
        assert (ready.status, ready.json["status"]) == (503, "not ready")
        assert "my-vllm" in ready.json["upstreams"]["my-vllm"]
        assert (await server.get("/v1/models")).json["data"] == []
        async with server.connect() as client:
            frame = await client.refused(model="m")
            assert (frame["status"], frame["error"]["code"]) == (502, "upstream_unreachable")
            assert "my-vllm" in frame["error"]["message"]
        answer = await server.post(model="m")
        assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_unreachable")
