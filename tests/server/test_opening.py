"""When `response.created` leaves, and what a turn ends with before and after it."""

from __future__ import annotations

import asyncio

import pytest

from openline.protocol.deltas import TextDelta
from openline.protocol.errors import ProtocolError
from server.running import WAIT_SECONDS_MAX, read_sse

SILENT = {"created_wait_seconds_max": 30.0}  # longer than any test
HASTY = {"created_wait_seconds_max": 0.01}
GONE = ProtocolError("upstream_error", "Upstream 'hand' closed the connection.")


async def opening(socket):
    """The first two events of a turn."""
    return [(await socket.receive())["type"] for _ in range(2)]


async def test_created_leaves_when_the_upstream_accepts(start, hand):
    """`response.created` and `response.in_progress` leave with the upstream's acceptance, before any output.

    Source: WebSocket mode guide, "Connection life"; event order, "Plain text turn".
    """
    server = await start(engine=hand, limits=SILENT)
    async with server.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        assert await socket.is_silent()
        turn.accept()
        assert await opening(socket) == ["response.created", "response.in_progress"]


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_created_leaves_in_time_although_the_upstream_is_silent(start, hand, transport):
    """A silent upstream holds `response.created` up for `created_wait_seconds_max` and no longer.

    Source: WebSocket mode guide, "Connection life": at the latest after 0.25 s.
    """
    server = await start(engine=hand)
    assert server.config.limits.created_wait_seconds_max == 0.25
    started = asyncio.get_running_loop().time()
    if transport == "websocket":
        async with server.connect() as socket:
            await socket.create()
            assert await opening(socket) == ["response.created", "response.in_progress"]
    else:
        async with server.open_post(stream=True) as answer:
            assert answer.status == 200
            assert (await answer.content.readline()).startswith(b"event: response.created")
    # Less than a scheduler's hiccup above it; a wait for the output would never end.
    assert 0.2 <= asyncio.get_running_loop().time() - started < 2


async def test_failure_after_created_is_response_failed(start, hand):
    """Once `response.created` was sent, an upstream's refusal can only be `response.failed`, and `error` never follows.

    Source: WebSocket mode guide, "Turn lifecycle", hard rules.
    """
    server = await start(engine=hand, limits=HASTY)
    async with server.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        await opening(socket)
        turn.refuse(headers={"retry-after": "7"})
        failed = await socket.receive()
        assert failed["type"] == "response.failed"
        assert failed["response"]["status"] == "failed"
        assert failed["response"]["error"] == {"code": "rate_limit_exceeded", "message": "Not now."}
        assert await socket.is_silent()


async def test_failure_after_created_ends_the_stream_with_response_failed(start, hand):
    """The same over HTTP: status 200 has been sent, so the stream ends in `response.failed` and `[DONE]`."""
    server = await start(engine=hand, limits=HASTY)
    async with server.open_post(stream=True) as answer:
        (await hand.next_turn()).refuse()
        events = read_sse(await answer.read())
    assert [event["type"] for event in events] == ["response.created", "response.in_progress", "response.failed"]


async def test_refusal_before_created_is_an_error_frame(start, hand):
    """Before `response.created` a refusal is one `error` and no `response.*` event at all.

    Source: WebSocket mode guide, "Turn lifecycle".
    """
    server = await start(engine=hand, limits=SILENT)
    async with server.connect() as socket:
        await socket.create()
        (await hand.next_turn()).refuse("upstream_unreachable")
        frame = await socket.receive()
        assert (frame["type"], frame["status"]) == ("error", 502)
        assert await socket.is_silent()


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
async def test_refusal_before_created_is_an_http_status(start, hand, stream):
    """Before the first event a refusal is its own status, with `retry-after`, streamed or not.

    Source: Responses API reference, "Errors".
    """
    server = await start(engine=hand, limits=SILENT)
    posting = asyncio.ensure_future(server.post(stream=stream))
    (await hand.next_turn()).refuse(headers={"retry-after": "7"})
    answer = await posting
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    assert answer.json["error"]["code"] == "rate_limit_exceeded"


async def test_plain_post_gets_the_real_status_however_late(start, hand):
    """A POST that does not stream has shown nothing yet: a failure in mid-answer is its status.

    Source: Responses API reference, "Errors".
    """
    server = await start(engine=hand, limits=HASTY)
    posting = asyncio.ensure_future(server.post())
    turn = await hand.next_turn()
    turn.give(TextDelta("Once upon a"))
    turn.fail(GONE)
    answer = await posting
    assert (answer.status, answer.json["error"]["code"]) == (502, "upstream_error")


@pytest.mark.parametrize("failure", ["error", "end", "defect"])
async def test_a_failed_turn_closes_its_open_items(played, hand, failure, caplog):
    """What was open when a turn failed is closed as incomplete, and the response says why in the client's terms.

    Source: event order, "Failed turn".
    """
    async with played.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.give(TextDelta("Once upon a"))
        if failure == "end":
            turn.end()
        else:
            turn.fail(GONE if failure == "error" else RuntimeError("a secret of the server"))
        frames = await socket.rest()
    types = [frame["type"] for frame in frames]
    assert types[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.failed",
    ]
    response = frames[-1]["response"]
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "Once upon a"
    expected = {"error": "upstream_error", "end": "upstream_error", "defect": "server_error"}
    assert response["error"]["code"] == expected[failure]
    assert "secret" not in response["error"]["message"]
    if failure == "defect":  # the one error that belongs into the log
        assert [record.name for record in caplog.get_records("call") if record.levelname == "ERROR"] == [
            "openline.turns"
        ]
        caplog.clear()


async def test_in_progress_comes_after_the_parent_was_bound(played, hand):
    """A fork whose `response.in_progress` has come is safe from what its parent's lane does next.

    Source: WebSocket mode guide, "Fork".
    """
    async with played.connect() as socket:
        await socket.create(input="Trunk.", store=False)
        (await hand.next_turn()).answer("One.")
        trunk = (await socket.rest())[-1]["response"]
        await socket.create(input="Fork.", previous_response_id=trunk["id"], stream_id="fork", store=False)
        fork = await hand.next_turn()
        fork.accept()
        await socket.until("response.in_progress")
        await socket.create(input="On.", previous_response_id=trunk["id"], store=False)  # evicts the trunk
        (await hand.next_turn()).answer("Two.")
        await socket.rest()
        fork.answer("Fork's end.")
        last = (await socket.rest())[-1]
        assert (last["type"], last["stream_id"]) == ("response.completed", "fork")


async def test_warm_up_is_answered_without_the_engine(played, hand):
    """`generate: false` asks nothing of the model: empty output, complete usage, and an id that can be chained.

    Source: WebSocket mode guide, "Warm-up".
    """
    async with played.connect() as socket:
        frames = await socket.turn(generate=False, input="Context.")
        types = [frame["type"] for frame in frames]
        assert types == ["response.created", "response.in_progress", "response.completed"]
        warm = frames[-1]["response"]
        assert (warm["output"], warm["usage"]["total_tokens"]) == ([], 0)
        await socket.create(input=[], previous_response_id=warm["id"])
        turn = await hand.next_turn()
        assert b"Context." in turn.input[0]
        turn.answer("Ready.")
        assert (await socket.rest())[-1]["type"] == "response.completed"


async def test_upstream_sees_the_whole_context_and_not_the_old_instructions(played, hand):
    """The engine gets every item in order although the client sent the increment; `instructions` are this turn's own.

    Source: WebSocket mode guide, "Continuing"; Responses API reference, `instructions`.
    """
    async with played.connect() as socket:
        await socket.create(input="One?", instructions="Be brief.")
        (await hand.next_turn()).answer("One.")
        first = (await socket.rest())[-1]["response"]
        await socket.create(input="Two?", previous_response_id=first["id"])
        turn = await hand.next_turn()
        texts = [item.split(b'"text":"')[1].split(b'"')[0] for item in turn.input]
        assert texts == [b"One?", b"One.", b"Two?"]
        assert turn.request.create.instructions is None
        turn.answer("Two.")
        await asyncio.wait_for(socket.rest(), WAIT_SECONDS_MAX)


async def test_dropped_tools_are_named_in_a_header(played, hand):
    """Tools that the upstream cannot do are named in a response header on HTTP, streamed or not."""
    hand.dropped_tools = ("web_search", "mcp")
    for stream in (False, True):
        posting = asyncio.ensure_future(played.post(stream=stream))
        (await hand.next_turn()).answer("Without them.")
        assert (await posting).headers["openline-dropped-tools"] == "web_search,mcp"
