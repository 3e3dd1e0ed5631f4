"""A warm-up's prefix on its way to the upstream's cache.

Source: WebSocket mode guide, "Warm-up": a create with `generate: false` prepares state and produces nothing.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from server.listening import listening
from server.running import running

ASKED = {"model": "m", "instructions": "Be brief.", "store": False}
TURN = 'data: {"choices": [{"delta": {"content": "Hi"}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


class SlowModel:
    """A Chat Completions server that prefills until it is cut off, and answers everything else at once."""

    def __init__(self) -> None:
        self.prefills: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.turns: list[dict[str, Any]] = []
        self.cut_off = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if body.get("max_tokens") != 1:
            self.turns.append(body)
            return web.Response(text=TURN, content_type="text/event-stream")
        self.prefills.put_nowait(body)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(b": still reading\n\n")
                await asyncio.sleep(0.005)
        except ConnectionError:
            self.cut_off.set()
            return response


@asynccontextmanager
async def served(folder: Any, model: SlowModel, **upstream: Any):
    async with listening(model.answer) as url:
        engine = ChatEngine(UpstreamSettings(kind="chat", url=url, **upstream), show_detail=True)
        async with running(folder, engine=engine) as server:
            yield server


async def test_the_prefix_is_read_in_the_background_and_left_when_the_turn_comes(tmp_path):
    """The warm-up is answered at once; its prefix is what the next turn begins with; that turn is not queued behind it."""
    model = SlowModel()
    async with served(tmp_path, model) as server, server.connect() as line:
        warm = await line.completed(**ASKED, input="Hello.", generate=False)
        assert warm["output"] == []
        prefill = await asyncio.wait_for(model.prefills.get(), 5)
        await line.completed(**ASKED, input="Go on.", previous_response_id=warm["id"])
        await asyncio.wait_for(model.cut_off.wait(), 1)
    (turn,) = model.turns
    assert turn["messages"][: len(prefill["messages"])] == prefill["messages"]
    assert json.dumps(prefill["messages"]).count("Hello.") == 1


async def test_a_closed_socket_ends_the_prefill(tmp_path):
    """What nobody will continue is not worth reading."""
    model = SlowModel()
    async with served(tmp_path, model) as server:
        async with server.connect() as line:
            await line.completed(**ASKED, input="Hello.", generate=False)
            await asyncio.wait_for(model.prefills.get(), 5)
        await asyncio.wait_for(model.cut_off.wait(), 1)
        await server.idle()


@pytest.mark.parametrize("upstream", [{"warmup": "none"}, {"warmup": "auto", "name": "elsewhere"}])
async def test_without_prefill_the_upstream_hears_nothing_of_a_warm_up(tmp_path, upstream):
    """`warmup = "none"` is obeyed; a warm-up of nothing has no prefix to read."""
    model = SlowModel()
    async with served(tmp_path, model, **upstream) as server, server.connect() as line:
        asked = ASKED if upstream["warmup"] == "none" else {"model": "m", "store": False}
        warm = await line.completed(**asked, input=[], generate=False)
        await server.idle()
        await line.completed(**asked, input="Go.", previous_response_id=warm["id"])
    assert model.prefills.empty()
    assert len(model.turns) == 1


@pytest.mark.parametrize(
    ("url", "warmup", "prefills"),
    [
        ("http://127.0.0.1:8000/v1", "auto", True),
        ("http://localhost:8000/v1", "auto", True),
        ("https://api.example.com/v1", "auto", False),
        ("https://api.example.com/v1", "prefill", True),
        ("http://127.0.0.1:8000/v1", "none", False),
    ],
)
def test_only_an_upstream_on_this_machine_prefills_unasked(url, warmup, prefills):
    """A hosted one would be paid for it."""
    assert UpstreamSettings(url=url, warmup=warmup).prefills is prefills
