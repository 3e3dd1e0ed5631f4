"""`response.cancel`, an extension that some clients send anyway, and `response.inject`, which is not for this server.

Source: WebSocket mode guide, "Cancelling" and "response.inject"; event order, "Cancelled turn"; docs/adr/0006.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from openai.types.beta import BetaResponsesServerEvent
from pydantic import TypeAdapter

from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from openline.protocol.deltas import CallDelta, CallStarted, ReasoningDelta, TextDelta, Usage
from server.late import KERNEL_BYTES, SlowStore, stingy_connection
from server.listening import listening
from server.running import until
from server.slow_line import SlowLine
from server.watching import Frame, Watched, types, watched

STOP_SECONDS_MAX = 1.0  # guarantees, "Cancellation"
LANES = pytest.mark.parametrize("lane", [{}, {"stream_id": "a"}], ids=["default", "named"])
CALL = CallStarted("function_call", "call_1", "look")
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "42"}


async def goes_on(socket: Watched, hand: Any, **create: Any) -> None:
    """The lane takes the next create."""
    await socket.create(**create)
    (await hand.next_turn()).answer("Hi.")
    assert types(await socket.rest())[-1] == "completed"


def is_cancelled(frame: Frame) -> bool:
    """Whether a terminal event says that its response was cancelled."""
    response = frame["response"]
    assert (frame["type"], response["status"], response["error"]) == ("response.incomplete", "incomplete", None)
    assert response["completed_at"] is None
    return response["incomplete_details"] == {"reason": "cancelled"}


# --- What runs


@pytest.mark.parametrize(
    ("said", "closing", "closed"),
    [
        ([], [], []),
        (
            [TextDelta("Once ")],
            ["output_text.done", "content_part.done", "output_item.done"],
            [{"type": "message", "status": "incomplete"}],
        ),
        (
            [ReasoningDelta("Hm.")],
            ["reasoning_text.done", "content_part.done", "output_item.done"],
            [{"type": "reasoning", "status": "incomplete"}],
        ),
        (
            [CALL, CallDelta('{"a"')],
            ["function_call_arguments.done", "output_item.done"],
            [{"type": "function_call", "status": "incomplete", "arguments": '{"a"'}],
        ),
    ],
    ids=["nothing", "text", "reasoning", "call"],
)
@pytest.mark.parametrize("by", ["id", "lane"])
async def test_a_running_response_is_cancelled(played, hand, said, closing, closed, by):
    """What is open is closed as incomplete, then `response.incomplete` with reason `cancelled`; the upstream stops.

    Source: WebSocket mode guide, "Cancelling".
    """
    async with watched(played) as socket:
        turn, response = await socket.begun(hand, *said)
        await socket.cancel(**({"response_id": response["id"]} if by == "id" else {}))
        frames = await socket.rest()
        assert types(frames) == [*closing, "incomplete"]
        assert is_cancelled(frames[-1])
        output = frames[-1]["response"]["output"]
        assert len(output) == len(closed)
        assert [each | expected for each, expected in zip(output, closed, strict=True)] == output
        await asyncio.wait_for(turn.closed.wait(), STOP_SECONDS_MAX)
        assert await socket.is_silent()
        await goes_on(socket, hand)


@LANES
async def test_a_lane_goes_on_behind_a_cancelled_response(played, hand, lane):
    """What waits in the lane starts, and the other lanes notice nothing (WebSocket mode guide, "Lanes")."""
    async with watched(played) as socket:
        other_turn, other = await socket.begun(hand, TextDelta("Other "), stream_id="other")
        _, response = await socket.begun(hand, TextDelta("Once "), **lane)
        await socket.create(input="Next.", **lane)
        await socket.cancel(response_id=response["id"])
        assert is_cancelled((await socket.rest())[-1])
        turn = await hand.next_turn()
        assert b"Next." in turn.input[0]
        turn.answer("Hi.")
        end = (await socket.rest())[-1]
        assert (types([end]), end.get("stream_id")) == (["completed"], lane.get("stream_id"))
        other_turn.finish(TextDelta("goes on."))
        end = (await socket.rest())[-1]
        assert (end["type"], end["response"]["id"]) == ("response.completed", other["id"])


async def test_the_tokens_that_were_told_count(played, hand):
    """`usage` as far as the upstream has told it, else null (Responses API reference, "usage")."""
    async with watched(played) as socket:
        for told, total in (((Usage(7, output_tokens=2),), 9), ((), None)):
            _, response = await socket.begun(hand, *told, TextDelta("Once "))
            await socket.cancel(response_id=response["id"])
            usage = (await socket.rest())[-1]["response"]["usage"]
            assert (usage and usage["total_tokens"]) == total


@pytest.mark.parametrize("store", [True, False])
async def test_a_cancelled_response_can_be_continued(played, hand, store):
    """With what there was of it, on its connection and, if it is stored, from anywhere.

    Source: WebSocket mode guide, "Continuing": an incomplete response is a parent like any other.
    """
    async with watched(played) as socket:
        _, response = await socket.begun(hand, TextDelta("Once "), store=store)
        await socket.cancel()
        end = (await socket.rest())[-1]["response"]
        await socket.create(previous_response_id=response["id"], input="Go on.", store=store)
        turn = await hand.next_turn()
        assert [b"Once " in turn.input[1], b"Go on." in turn.input[2]] == [True, True]
        turn.answer("upon.")
        assert types(await socket.rest())[-1] == "completed"
    answer = await played.get(f"/v1/responses/{response['id']}")
    assert (answer.status, answer.json if store else None) == ((200, end) if store else (404, None))


async def test_a_call_that_was_cancelled_wants_its_output_all_the_same(played, hand):
    """It is in the output, so it is part of the conversation (Responses API reference, "Function calling")."""
    async with watched(played) as socket:
        for answer, refused in (([], True), ([OUTPUT], False)):
            _, response = await socket.begun(hand, CALL, CallDelta('{"a"'))
            await socket.cancel()
            assert is_cancelled((await socket.rest())[-1])
            following = {"previous_response_id": response["id"], "input": [*answer, {"role": "user", "content": "x"}]}
            if refused:
                error = await socket.refused(**following)
                assert error["error"]["message"] == "No tool output found for function call call_1."
            else:
                await goes_on(socket, hand, **following)


# --- What is not running


@pytest.mark.parametrize("which", ["unknown", "empty", "finished", "another connection's", "cancelled twice"])
async def test_an_id_that_does_not_run_is_ignored(played, hand, which):
    """In silence: a stray `error` would end another turn for clients that route by lane.

    Source: WebSocket mode guide, "Cancelling".
    """
    async with watched(played) as socket, watched(played) as other:
        turn, response = await socket.begun(hand, TextDelta("Once "))
        if which == "finished":
            turn.finish()
            await socket.rest()
        elif which == "cancelled twice":
            for _ in range(3):
                await socket.cancel(response_id=response["id"])
            assert is_cancelled((await socket.rest())[-1])
        ids = {"unknown": "resp_nobody_made", "empty": ""}
        await (other if which == "another connection's" else socket).cancel(response_id=ids.get(which, response["id"]))
        assert await socket.is_silent()
        assert await other.is_silent()
        if which not in {"finished", "cancelled twice"}:
            turn.finish()
            assert types(await socket.rest())[-1] == "completed"
        await goes_on(socket, hand)


async def test_without_an_id_it_is_about_the_default_lane(played, hand):
    """A named lane is cancelled by its response's id only; on an idle default lane there is nothing to cancel.

    Source: WebSocket mode guide, "Cancelling".
    """
    async with watched(played) as socket:
        turn, _ = await socket.begun(hand, TextDelta("Once "), stream_id="a")
        await socket.cancel()
        await socket.cancel(response_id=None)
        assert await socket.is_silent()
        turn.finish()
        assert types(await socket.rest())[-1] == "completed"


@pytest.mark.parametrize("by", ["id", "lane"])
async def test_cancelling_twice_cancels_one_response(played, hand, by):
    """In one burst; the create behind it is another request and goes on (WebSocket mode guide, "Cancelling")."""
    async with watched(played) as socket:
        _, response = await socket.begun(hand, TextDelta("Once "))
        await socket.create(input="Next.")
        cancel = {"type": "response.cancel", **({"response_id": response["id"]} if by == "id" else {})}
        socket.burst(cancel, cancel)
        assert is_cancelled((await socket.rest())[-1])
        (await hand.next_turn()).answer("Hi.")
        assert types(await socket.rest())[-1] == "completed"


# --- What has not started


async def test_a_create_that_waits_for_a_slot_is_refused(start, hand):
    """`request_cancelled`, at once and alone; its parent stays, and later creates of the lane go on.

    Source: WebSocket mode guide, "Cancelling"; "Continuing": a cancellation evicts nothing.
    """
    server = await start(engine=hand, limits={"responses_active_max": 1})
    async with watched(server) as socket:
        turn, parent = await socket.begun(hand, store=False)
        turn.finish(TextDelta("One."))
        await socket.rest()
        busy, _ = await socket.begun(hand, stream_id="a")
        following = {"previous_response_id": parent["id"], "store": False}
        await socket.create(**following, input="Cancelled.")
        await socket.create(**following, input="Not cancelled.")
        await socket.cancel()
        error = await socket.receive()
        assert (error["type"], error["status"], error["error"]["code"]) == ("error", 400, "request_cancelled")
        assert "stream_id" not in error
        assert await socket.is_silent()
        busy.finish()
        assert types(await socket.rest())[-1] == "completed"
        turn = await hand.next_turn()
        assert b"Not cancelled." in turn.input[-1]
        turn.answer("Hi.")
        assert types(await socket.rest())[-1] == "completed"


async def test_a_create_that_has_not_opened_ends_once(played, hand):
    """While its upstream is silent it is opened and ended as cancelled, and its upstream stops (docs/adr/0006)."""
    async with watched(played) as socket:
        await socket.create()
        turn = await hand.next_turn()
        await socket.cancel()
        frames = await socket.rest()
        assert types(frames) == ["created", "in_progress", "incomplete"]
        assert is_cancelled(frames[-1])
        await asyncio.wait_for(turn.closed.wait(), STOP_SECONDS_MAX)
        assert await socket.is_silent()
        await goes_on(socket, hand)


@pytest.mark.parametrize("store", [True, False])
async def test_a_create_and_its_cancel_may_come_in_one_burst(played, hand, store):
    """The create ends once, as cancelled, whichever step it has come to; its parent is still there.

    Source: WebSocket mode guide, "Cancelling"; "Continuing": a cancellation evicts nothing.
    """
    async with watched(played) as socket:
        turn, parent = await socket.begun(hand, store=store)
        turn.finish(TextDelta("One."))
        await socket.rest()
        create = {"type": "response.create", "model": "m", "previous_response_id": parent["id"], "store": store}
        for cancels in range(1, 4):
            socket.burst({**create, "input": "x"}, *[{"type": "response.cancel"}] * cancels)
            frames = await socket.rest()
            assert types(frames) in (["created", "in_progress", "incomplete"], ["request_cancelled"])
            if frames[-1]["type"] == "error":
                assert frames[-1]["status"] == 400
            assert await socket.is_silent()
            if frames[-1]["type"] != "error":
                create["previous_response_id"] = frames[-1]["response"]["id"]
        while not hand.is_idle:
            await asyncio.wait_for((await hand.next_turn()).closed.wait(), STOP_SECONDS_MAX)
        await goes_on(socket, hand, previous_response_id=create["previous_response_id"], store=store)


# --- When it is late


async def test_a_create_that_starts_while_its_client_does_not_read_is_cancelled(start, hand):
    """It has started once it has its slot, whatever is still to be told before it (WebSocket mode guide, "Cancelling")."""
    server = await start(engine=hand, limits={"responses_active_max": 1})
    line = SlowLine(server)
    await line.create()
    turn = await hand.next_turn()
    turn.give(CALL)
    first = (await line.until("response.output_item.added"))[0]["response"]["id"]
    await line.send(type="response.steer", previous_response_id=first, input="Shorter.")
    await line.until("response.steer.accepted")
    turn.finish(CallDelta("{}"))
    await line.until("response.steer.pending")
    await line.create(stream_id="a")
    turn = await hand.next_turn()
    await line.create()  # waits for a slot; the steer has no successor then, and goes back
    line.hold_up("response.completed")
    turn.answer("Hi.")
    await line.until("response.completed")
    await line.send(type="response.cancel")
    await line.is_read()
    line.takes.set()
    frames = await line.rest()
    assert types(frames) == ["steer.failed", "created", "in_progress", "incomplete"]
    assert is_cancelled(frames[-1])
    await line.close()


async def test_a_response_that_is_being_kept_ends_as_it_was(start, hand, tmp_path):
    """It has ended, and only its announcement waits (design, "Keep, then announce")."""
    store = SlowStore(tmp_path / "openline.db")
    server = await start(engine=hand, store=store)
    async with watched(server) as socket:
        turn, response = await socket.begun(hand, TextDelta("Once "))
        turn.finish()
        await store.asked.wait()
        await socket.cancel(response_id=response["id"])
        await socket.cancel()
        assert await socket.is_silent()
        store.fast.set()
        assert types(await socket.rest())[-1] == "completed"
        assert (await server.get(f"/v1/responses/{response['id']}")).json["status"] == "completed"


async def test_a_create_that_looks_for_its_parent_is_refused(start, hand, tmp_path):
    """It is no response yet, so the error is all there is; the parent is found by the next one.

    Source: WebSocket mode guide, "Cancelling"; "Continuing": a cancellation evicts nothing.
    """
    store = SlowStore(tmp_path / "openline.db")
    server = await start(engine=hand, store=store)
    store.fast.set()
    posting = asyncio.ensure_future(server.post())
    (await hand.next_turn()).answer("One.")
    parent = (await posting).json
    store.fast.clear()
    store.asked.clear()
    async with watched(server) as socket:
        await socket.create(previous_response_id=parent["id"])
        await store.asked.wait()
        await socket.cancel()
        assert types(await socket.rest()) == ["request_cancelled"]
        assert hand.is_idle
        store.fast.set()
        await goes_on(socket, hand, previous_response_id=parent["id"])


async def test_a_response_whose_client_does_not_read_is_cancelled(start, hand):
    """Its upstream stops although what it said is not read; all of it is there to be read, and the end behind it.

    Source: WebSocket mode guide, "Cancelling" and "Backpressure".
    """
    server = await start(engine=hand, limits={"send_buffer_bytes_max": 64 * 1024}, kernel_buffer_bytes=KERNEL_BYTES)
    async with watched(server, sock=stingy_connection(server), max_queue=1) as socket:
        turn, response = await socket.begun(hand)
        for _ in range(64):
            turn.give(TextDelta("x" * 32 * 1024))
        (connection,) = server.app._sockets
        await until(lambda: not connection._window.is_open)
        await socket.cancel(response_id=response["id"])
        await asyncio.wait_for(turn.closed.wait(), STOP_SECONDS_MAX)
        frames = await socket.rest()
        assert is_cancelled(frames[-1])
        deltas = "".join(frame["delta"] for frame in frames if frame["type"] == "response.output_text.delta")
        assert frames[-1]["response"]["output"][0]["content"][0]["text"] == deltas
        await goes_on(socket, hand)


async def test_a_chat_upstream_is_cut_off_within_a_second(start):
    """It learns to stop by its connection's end (guarantees, "Cancellation")."""
    requests: list[web.Request] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        requests.append(request)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b'data: {"choices":[{"index":0,"delta":{"content":"word "}}]}\n\n')
        await asyncio.Event().wait()
        return response

    async with listening(answer) as url:
        engine = ChatEngine(UpstreamSettings(kind="chat", url=url, profile="vllm"), show_detail=False)
        server = await start(engine=engine)
        async with watched(server) as socket:
            await socket.create(model="m")
            frames = await socket.until("response.output_text.delta")
            await socket.cancel(response_id=frames[0]["response"]["id"])
            async with asyncio.timeout(STOP_SECONDS_MAX):
                assert is_cancelled((await socket.rest())[-1])
                await until(lambda: requests[0].transport is None)


# --- A cancel and a steer


async def test_a_steer_behind_a_cancel_does_not_undo_it(played, hand):
    """In one burst: the response ends as cancelled, and the steer goes back (Mid-turn steering guide, "Outcomes")."""
    async with watched(played) as socket:
        _, response = await socket.begun(hand)
        steer = {"type": "response.steer", "previous_response_id": response["id"], "input": "Shorter."}
        socket.burst({"type": "response.cancel", "response_id": response["id"]}, steer)
        frames = await socket.until("response.steer.failed")
        end = next(frame for frame in frames if frame["type"] == "response.incomplete")
        assert is_cancelled(end)
        assert frames[-1]["error"]["code"] in {"successor_creation_failed", "response_already_completed"}
        assert await socket.is_silent()
        assert hand.is_idle


async def test_a_cancel_behind_a_steer_goes_before_it(played, hand):
    """Who cancels wants nothing more, a successor neither (WebSocket mode guide, "Cancelling")."""
    async with watched(played) as socket:
        _, response = await socket.begun(hand)
        steer = {"type": "response.steer", "previous_response_id": response["id"], "input": "Shorter."}
        socket.burst(steer, {"type": "response.cancel"})
        frames = await socket.until("response.steer.failed")
        assert types(frames) == ["steer.accepted", "incomplete", "steer.failed"]
        assert is_cancelled(frames[1])
        assert frames[2]["error"]["code"] == "successor_creation_failed"
        assert await socket.is_silent()
        assert hand.is_idle


# --- Wrong fields, and what this server has no use for


@pytest.mark.parametrize("kind", ["cancel", "inject"])
@pytest.mark.parametrize("value", [7, True, [], {}, 1.5])
async def test_an_id_of_a_wrong_type_is_an_error_and_the_socket_goes_on(played, hand, kind, value):
    """It names the field and no lane; nothing that runs is touched (WebSocket mode guide, "Error frame")."""
    async with watched(played) as socket:
        turn, _ = await socket.begun(hand, TextDelta("Once "))
        await socket.send(type=f"response.{kind}", response_id=value)
        frame = await socket.receive()
        assert (frame["type"], frame["status"], "stream_id" in frame) == ("error", 400, False)
        assert (frame["error"]["code"], frame["error"]["param"]) == ("invalid_type", "response_id")
        turn.finish()
        assert types(await socket.rest())[-1] == "completed"


INJECTED = [{"type": "function_call_output", "call_id": "call_1", "output": "42"}]


@pytest.mark.parametrize("which", ["running", "unknown"])
async def test_an_injection_is_refused_with_its_input(played, hand, which):
    """`response.inject.failed`, `response_not_found`: no response here takes items while it runs.

    Source: WebSocket mode guide, "response.inject" and "Multi-agent".
    """
    async with watched(played) as socket:
        turn, response = await socket.begun(hand, TextDelta("Once "))
        target = response["id"] if which == "running" else "resp_nobody_made"
        await socket.send(type="response.inject", response_id=target, input=INJECTED)
        frame = await socket.receive()
        assert frame["type"] == "response.inject.failed"
        assert (frame["response_id"], frame["input"]) == (target, INJECTED)
        assert frame["error"]["code"] == "response_not_found"
        event = TypeAdapter(BetaResponsesServerEvent).validate_json(json.dumps(frame), strict=True)
        assert event.type == frame["type"]
        turn.finish()
        assert types(await socket.rest())[-1] == "completed"
