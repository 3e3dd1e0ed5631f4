"""A session with a Responses server that is not ours, over real sockets."""

from __future__ import annotations

import pytest

from client.plain_server import PlainServer
from openline import ConnectionLost, connect

TOOLS = [{"type": "function", "name": "f", "parameters": {}}]


@pytest.fixture
async def plain():
    """A server without extensions, with WebSocket mode."""
    async with PlainServer().run() as server:
        yield server


@pytest.mark.parametrize("transport", ["auto", "websocket", "http"])
async def test_a_conversation_works_without_extensions(plain, transport):
    """Increments over the socket, and nothing in the frames that such a server does not know."""
    async with connect(plain.url, api_key="sk-test", model="m", transport=transport) as session:
        events = [event async for event in session.create(input="Hello.", store=False)]
        assert events == plain.events
        assert session.has_extensions is False
        second = await session.create(input="More.", store=False).response()
    assert second["id"] == "resp_2"
    first_sent, second_sent = plain.asked
    assert set(first_sent) <= {"type", "stream", "model", "store", "input"}
    if transport == "websocket":
        assert second_sent["previous_response_id"] == "resp_1"
        assert len(second_sent["input"]) == 1
    else:
        assert [item.get("role") for item in second_sent["input"]] == ["user", "assistant", "user"]
    assert all(headers["authorization"] == "Bearer sk-test" for headers in plain.headers)


@pytest.mark.parametrize("status", [426, 403, 404, 500])
async def test_a_server_without_sockets_is_served_over_http(plain, status):
    """Whatever it says to the upgrade; the turn is asked for once."""
    plain.upgrades = status
    async with connect(plain.url, model="m") as session:
        await session.create(input="Hello.", tools=TOOLS).response()
        assert session.transport == "http"
    assert len(plain.asked) == 1


@pytest.mark.parametrize("transport", ["websocket", "http"])
@pytest.mark.parametrize("cut_after", range(10))
async def test_a_cut_turn_is_told_and_not_asked_for_again(plain, transport, cut_after):
    """What had come is there; the create is not sent twice, for nobody can say whether it runs."""
    plain.cut_after = cut_after
    async with connect(plain.url, model="m", transport=transport) as session:
        stream = session.create(input="Hello.")
        events = [await anext(stream) for _ in range(cut_after)]
        with pytest.raises(ConnectionLost, match="nobody can say") as lost:
            await anext(stream)
        assert events == plain.events[:cut_after]
        assert (lost.value.response or {}).get("id") == (events[0]["response"]["id"] if events else None)
        plain.cut_after = None
        assert (await session.create(input="Again.").response())["status"] == "completed"
    assert len(plain.asked) == 2


@pytest.mark.parametrize("transport", ["websocket", "http"])
async def test_a_cut_turn_is_asked_for_again_where_the_app_takes_that(plain, transport):
    """The second `response.created` says that what came before it is void."""
    plain.cut_after = 5
    async with connect(plain.url, model="m", transport=transport) as session:
        stream = session.create(input="Hello.", on_lost="restart")
        events = []
        async for event in stream:
            events.append(event)
            if len(events) == 5:
                plain.cut_after = None
        assert stream.restarts == 1
    assert [event["type"] for event in events].count("response.created") == 2
    assert events[-1]["response"]["id"] == "resp_2"
