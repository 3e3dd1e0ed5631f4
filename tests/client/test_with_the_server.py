"""A session with the real server, over real sockets."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager

import pytest

from openline import ClientSettings, ConnectionLost, Refused, TurnFailed, connect
from openline.protocol.deltas import TextDelta
from openline.protocol.errors import ProtocolError
from server.running import Running, until

TOOLS = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]
over = pytest.mark.parametrize("transport", ["websocket", "http"])
stored = pytest.mark.parametrize("store", [True, False], ids=["stored", "unstored"])


@asynccontextmanager
async def session_with(server: Running, **options):
    """A session, and a limit on how long all that is done with it may take."""
    options = {"model": "scripted-text", **options}
    async with asyncio.timeout(10), connect(f"{server.url}/v1", **options) as session:
        yield session


def said(turn):
    """What the engine read, without the instructions."""
    return [json.loads(item) for item in turn.input]


@over
@stored
async def test_a_conversation_is_the_same_over_either_transport(played, hand, transport, store):
    """Increments and full resends give the model the same items."""
    async with session_with(played, transport=transport) as session:
        for number in range(3):
            asked = asyncio.ensure_future(session.create(input=f"Question {number}.", store=store).response())
            turn = await hand.next_turn()
            if number == 2 and transport == "websocket":
                session._connections._socket._line._socket._response.connection.transport.abort()
            turn.answer(f"Answer {number}.")
            response = await asked
            assert response["output"][0]["content"][0]["text"] == f"Answer {number}."
            texts = [item["content"][0]["text"] for item in said(turn)]
            expected = [text for at in range(number) for text in (f"Question {at}.", f"Answer {at}.")]
            assert texts == [*expected, f"Question {number}."]
        assert session.has_extensions
        assert len(session.history) == 6
    assert hand.is_idle


@over
async def test_events_come_as_they_are_made_and_the_response_is_their_fold(played, hand, transport):
    """Each is there before the next is made."""
    async with session_with(played, transport=transport) as session:
        stream = session.create(input="Hello.")
        first = asyncio.ensure_future(anext(stream))
        turn = await hand.next_turn()
        turn.accept()
        assert (await first)["type"] == "response.created"
        assert stream.response_id
        turn.give(TextDelta("One "))
        types = [(await anext(stream))["type"] for _ in range(4)]
        assert types[-1] == "response.output_text.delta"
        turn.finish(TextDelta("two."))
        rest = [event async for event in stream]
        assert rest[-1]["response"] == await stream.response()
        assert stream.is_ended


@over
async def test_what_the_server_refuses_is_told_with_everything_that_it_says(server, transport):
    """Status, code, field and words."""
    async with session_with(server, transport=transport) as session:
        with pytest.raises(Refused) as refused:
            await session.create(input="Hello.", temperature=7).response()
        assert (refused.value.status, refused.value.param) == (400, "temperature")
        with pytest.raises(Refused) as refused:
            await session.create(input=[{"type": "function_call_output", "call_id": "no", "output": ""}]).response()
        assert "No tool call found" in refused.value.message
        assert (await session.create(input="Hello.").response())["status"] == "completed"


@over
async def test_a_key_that_is_not_known_is_refused(start, transport):
    """And a good one is taken."""
    server = await start(keys={"good": "team"})
    async with session_with(server, transport=transport, api_key="bad") as session:
        with pytest.raises(Refused, match="invalid_api_key") as refused:
            await session.create(input="Hello.").response()
        assert refused.value.status == 401
    async with session_with(server, transport=transport, api_key="good") as session:
        assert (await session.create(input="Hello.").response())["status"] == "completed"


@over
async def test_a_turn_that_failed_is_told_and_the_conversation_goes_on_as_before(played, hand, transport):
    """The response as it ended is there; what was asked is not part of the conversation."""
    async with session_with(played, transport=transport) as session:
        asked = asyncio.ensure_future(session.create(input="First.", store=False).response())
        (await hand.next_turn()).answer("Yes.")
        await asked
        asked = asyncio.ensure_future(session.create(input="Second.", store=False).response())
        turn = await hand.next_turn()
        turn.accept()
        turn.give(TextDelta("Half"))
        turn.fail(ProtocolError("upstream_error", "It broke."))
        with pytest.raises(TurnFailed, match="It broke") as failed:
            await asked
        assert failed.value.response["output"][0]["content"][0]["text"] == "Half"
        asked = asyncio.ensure_future(session.create(input="Third.", store=False).response())
        turn = await hand.next_turn()
        turn.answer("Yes.")
        await asked
        assert [item["content"][0]["text"] for item in said(turn)] == ["First.", "Yes.", "Third."]


async def test_a_server_without_websocket_mode_is_served_over_http(start):
    """It answers the upgrade with 426: HTTP at once, and the turn with tools is taken there."""
    server = await start(server={"websocket": False})
    async with session_with(server, model="scripted-tools-1") as session:
        response = await session.create(input="Hello.", tools=TOOLS).response()
        assert response["output"][-1]["type"] == "function_call"
        assert session.transport == "http"


async def test_an_overloaded_upstream_is_asked_again(played, hand):
    """What was refused before `response.created` did not run; the session asks twice more."""
    settings = ClientSettings(backoff_seconds=0.01)
    async with session_with(played, settings=settings, transport="websocket") as session:
        asked = asyncio.ensure_future(session.create(input="Hello.").response())
        for _ in range(2):
            (await hand.next_turn()).refuse("server_is_overloaded")
        (await hand.next_turn()).answer("Yes.")
        assert (await asked)["status"] == "completed"


async def test_the_end_of_a_connection_between_turns_is_not_seen(start):
    """The server ends its connections after a while; the next turn opens another, and sends everything."""
    server = await start(limits={"connection_seconds_max": 0.05})
    async with session_with(server, transport="websocket") as session:
        for number in range(3):
            await session.create(input="Hello.", store=False).response()
            first = session._connections._socket
            await until(lambda first=first: not first.is_open)
            assert len(session.history) == 2 * (number + 1)


@over
async def test_cancelling_stops_the_upstream(played, hand, transport):
    """The turn ends as incomplete, with what was said, on both sides; nothing of it runs on."""
    async with session_with(played, transport=transport) as session:
        async for event in (stream := session.create(input="Hello.", store=False)):
            if event["type"] == "response.created":
                turn = await hand.next_turn()
                turn.give(TextDelta("Half"))
            if event["type"] == "response.output_text.delta":
                break
        response = await stream.response()
        assert response["incomplete_details"] == {"reason": "cancelled"}
        await asyncio.wait_for(turn.closed.wait(), 5)
        await played.idle()
        asked = asyncio.ensure_future(session.create(input="Go on.", store=False).response())
        turn = await hand.next_turn()
        turn.answer("Yes.")
        await asked
        assert [item["content"][0]["text"] for item in said(turn)] == ["Hello.", "Half", "Go on."]


async def test_a_background_turn_that_another_client_cancels_ends(played, hand):
    """No event says that, so the session asks."""
    async with session_with(played) as session:
        stream = session.create(input="Hello.", background=True)
        first = asyncio.ensure_future(anext(stream))
        turn = await hand.next_turn()
        turn.accept()
        turn.give(TextDelta("Half"))
        await first
        await played.request("POST", f"/v1/responses/{stream.response_id}/cancel")
        events = [event async for event in stream]
        assert not any(event["type"].endswith(("completed", "incomplete", "failed")) for event in events)
        assert (await stream.response())["status"] == "cancelled"


@over
async def test_a_detached_turn_is_taken_up_by_another_session(played, hand, transport):
    """Every event from the first on, one generation, and the conversation goes on behind it."""
    async with session_with(played, transport=transport) as session:
        stream = session.create(input="Hello.", idempotency_key="mine", store=False)
        stream.detach()
        first = asyncio.ensure_future(anext(stream))
        turn = await hand.next_turn()
        turn.accept()
        await first
        await stream.aclose()
        with pytest.raises(ConnectionLost, match="by its idempotency key"):
            await stream.response()
    async with session_with(played, transport=transport) as session:
        stream = session.create(input="Hello.", idempotency_key="mine", resume=True, store=False)
        first = asyncio.ensure_future(anext(stream))
        turn.finish(TextDelta("Yes."))
        events = [await first, *[event async for event in stream]]
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        asked = asyncio.ensure_future(session.create(input="More.", store=False).response())
        turn = await hand.next_turn()
        turn.answer("Yes.")
        await asked
        assert len(said(turn)) == 3
    assert hand.is_idle
