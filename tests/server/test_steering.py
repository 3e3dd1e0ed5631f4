"""Steering a response that runs: each outcome as it goes over the wire, and what the engine gets of it.

Source: Mid-turn steering guide; WebSocket mode guide, "Steering"; event order, "Steering".
"""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.responses import ResponsesServerEvent
from pydantic import TypeAdapter
from websockets.exceptions import ConnectionClosed

from openline.protocol.deltas import CallDelta, CallStarted, Ended, ReasoningDelta, TextDelta, UpstreamEvent
from server.closing import Leftovers
from server.late import KERNEL_BYTES, SlowStore, stingy_connection
from server.running import until
from server.watching import Frame, Watched, types, watched

STOP_SECONDS_MAX = 1.0  # guarantees, "Cancellation"
LANES = pytest.mark.parametrize("lane", [{}, {"stream_id": "a"}], ids=["default", "named"])
TOOL = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {}}}
CALL = CallStarted("function_call", "call_1", "look")
OUTPUT = {"type": "function_call_output", "call_id": "call_1", "output": "42"}
OPENED = ["created", "in_progress"]
TEXT_DONE = ["output_text.done", "content_part.done", "output_item.done"]


def words(turn: Any) -> list[str]:
    """The texts of the whole context that the engine got, in order; a call or an output by its type."""
    return [_words(json.loads(raw)) for raw in turn.input]


def _words(item: Frame) -> str:
    content = item.get("content")
    if content is None:
        return item["type"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


async def accepted(socket: Watched, response: Frame, said: Any = "Shorter.") -> Frame:
    """Steer a response; the steer as it was accepted, nothing else in between."""
    await socket.steer(response, said)
    frame = await socket.receive()
    assert frame["type"] == "response.steer.accepted"
    assert frame["steer"].keys() == {"id", "previous_response_id"}
    assert frame["steer"]["previous_response_id"] == response["id"]
    return frame["steer"]


# --- A. It is interrupted at a boundary


@LANES
async def test_a_response_that_has_said_nothing_is_interrupted_at_once(played, hand, lane):
    """The upstream is closed, the response is incomplete with reason `steered`, and its successor starts by itself.

    Source: Mid-turn steering guide, "Outcomes", the first.
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, **lane)
        steer = await accepted(socket, first)
        assert steer["id"].startswith("steer_")
        await asyncio.wait_for(turn.closed.wait(), STOP_SECONDS_MAX)
        (end,) = await socket.rest()
        assert (end["type"], end["response"]["output"]) == ("response.incomplete", [])
        assert end["response"]["incomplete_details"] == {"reason": "steered"}
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "Shorter."]
        successor.answer("Hi.")
        frames = await socket.rest()
        assert types(frames)[:2] == OPENED
        assert types(frames)[-1] == "completed"
        assert frames[-1]["response"]["previous_response_id"] == first["id"]
        assert await socket.is_silent()


async def test_a_response_in_mid_reasoning_finishes_its_item(played, hand):
    """Then it ends, before the message would begin.

    Source: Mid-turn steering guide, "Safe boundary".
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, ReasoningDelta("Let me "))
        await accepted(socket, first)
        turn.give(ReasoningDelta("see."))
        turn.give(TextDelta("Well, "))
        frames = await socket.rest()
        assert types(frames) == [
            "reasoning_text.delta",
            "reasoning_text.done",
            "content_part.done",
            "output_item.done",
            "incomplete",
        ]
        (item,) = frames[-1]["response"]["output"]
        assert (item["type"], item["status"], item["content"][0]["text"]) == ("reasoning", "completed", "Let me see.")
        await asyncio.wait_for(turn.closed.wait(), STOP_SECONDS_MAX)
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "Let me see.", "Shorter."]
        successor.answer("Hi.")
        await socket.rest()


async def test_a_call_does_not_begin_once_the_text_before_it_is_done(played, hand):
    """A call that the client never saw needs no output.

    Source: Mid-turn steering guide, "Safe boundary".
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, TextDelta("I look."))
        await accepted(socket, first)
        turn.give(CALL, CallDelta("{}"))
        frames = await socket.rest()
        assert types(frames) == [*TEXT_DONE, "incomplete"]
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "I look.", "Shorter."]
        successor.answer("Hi.")
        await socket.rest()


def item_events(index: int, item: Frame) -> tuple[UpstreamEvent, UpstreamEvent]:
    """An upstream's item: its beginning and its end."""
    begins = {**item, "status": "in_progress"}
    return (
        UpstreamEvent({"type": "response.output_item.added", "output_index": index, "item": begins}),
        UpstreamEvent({"type": "response.output_item.done", "output_index": index, "item": item}),
    )


def said(text: str) -> Frame:
    content = [{"type": "output_text", "text": text, "annotations": []}]
    return {"type": "message", "id": "msg_up", "role": "assistant", "status": "completed", "content": content}


SEARCH = {"type": "web_search_call", "id": "ws_up", "status": "completed", "action": {"type": "search", "query": "x"}}


@pytest.mark.parametrize("when", ["between", "inside"])
async def test_an_upstream_of_items_is_interrupted_between_two(played, hand, when):
    """At once where none is open, else as soon as the open one is done.

    Source: Mid-turn steering guide, "Safe boundary".
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand)
        begins, ends = item_events(0, said("One."))
        turn.give(begins)
        await socket.until("response.output_item.added")
        if when == "between":
            turn.give(ends)
            await socket.until("response.output_item.done")
            await accepted(socket, first)
        else:
            await accepted(socket, first)
            turn.give(ends, *item_events(1, said("Two.")))
            assert types([await socket.receive()]) == ["output_item.done"]
        assert types(await socket.rest()) == ["incomplete"]
        await asyncio.wait_for(turn.closed.wait(), STOP_SECONDS_MAX)
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "One.", "Shorter."]
        successor.answer("Hi.")
        await socket.rest()


async def test_hosted_tools_that_run_at_once_all_finish(played, hand):
    """A tool that the upstream runs is no boundary, nor is the end of the one beside it.

    Source: Mid-turn steering guide, "Safe boundary": running hosted tools finish.
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand)
        (begins, ends), (other_begins, other_ends) = item_events(0, SEARCH), item_events(1, SEARCH)
        turn.give(begins, other_begins)
        await socket.until("response.output_item.added")
        await socket.until("response.output_item.added")
        await accepted(socket, first)
        turn.give(other_ends)
        assert types([await socket.receive()]) == ["output_item.done"]
        searching = {"type": "response.web_search_call.searching", "output_index": 0, "item_id": "ws_up"}
        turn.give(UpstreamEvent(searching))
        assert types([await socket.receive()]) == ["web_search_call.searching"]
        turn.give(ends)
        assert types(await socket.rest()) == ["output_item.done", "incomplete"]
        (await hand.next_turn()).answer("Hi.")
        await socket.rest()


# --- B. It completes first


@LANES
async def test_a_message_in_mid_text_finishes_and_its_successor_follows(played, hand, lane):
    """The response keeps its `completed`; nothing of the client's is needed for the successor.

    Source: Mid-turn steering guide, "Outcomes", the second.
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "), **lane)
        await accepted(socket, first)
        turn.give(TextDelta("upon "))
        assert types([await socket.receive()]) == ["output_text.delta"]
        turn.finish(TextDelta("a time."))
        frames = await socket.rest()
        assert types(frames) == ["output_text.delta", *TEXT_DONE, "completed"]
        response = frames[-1]["response"]
        assert (response["incomplete_details"], response["usage"]["total_tokens"]) == (None, 2)
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "Once upon a time.", "Shorter."]
        successor.answer("Hi.")
        frames = await socket.rest()
        assert types(frames)[:2] == OPENED
        assert frames[0]["response"]["previous_response_id"] == first["id"]
        assert await socket.is_silent()


async def test_a_response_that_runs_out_of_tokens_has_a_successor_too(played, hand):
    """It ends as it would have, and a limit is counted for each response by itself.

    Source: Mid-turn steering guide, "Outcomes".
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "), max_output_tokens=16)
        await accepted(socket, first)
        turn.give(Ended("max_output_tokens"))
        turn.end()
        end = (await socket.rest())[-1]["response"]
        assert end["incomplete_details"] == {"reason": "max_output_tokens"}
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "Once ", "Shorter."]
        successor.answer("Hi.")
        assert (await socket.rest())[-1]["response"]["max_output_tokens"] == 16


async def test_several_steers_are_one_successors_input_in_their_order(played, hand):
    """As they were submitted, texts and messages (Mid-turn steering guide, "Outcomes")."""
    parts = [{"type": "input_text", "text": "Second."}]
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "))
        for each in (
            "First.",
            [{"role": "user", "content": parts}, {"type": "message", "role": "user", "content": "Third."}],
        ):
            await accepted(socket, first, each)
        ids = [frame["steer"]["id"] for frame in socket.frames if frame["type"] == "response.steer.accepted"]
        assert len(set(ids)) == 2
        turn.finish(TextDelta("upon."))
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "Once upon.", "First.", "Second.", "Third."]
        successor.answer("Hi.")
        await socket.until("response.completed")
        await socket.until("response.completed")
        assert await socket.is_silent()


async def test_a_successor_can_be_steered_too(played, hand):
    """Each is a response like any other (Mid-turn steering guide, "Outcomes")."""
    async with watched(played) as socket:
        turn, response = await socket.begun(hand)
        chain = [response["id"]]
        for number in range(3):
            await accepted(socket, response, f"Change {number}.")
            assert (await socket.rest())[-1]["response"]["incomplete_details"] == {"reason": "steered"}
            turn = await hand.next_turn()
            turn.accept()
            response = (await socket.until("response.in_progress"))[0]["response"]
            assert response["previous_response_id"] == chain[-1]
            chain.append(response["id"])
        assert words(turn) == ["Hello.", "Change 0.", "Change 1.", "Change 2."]
        turn.finish(TextDelta("Hi."))
        await socket.rest()


SETTINGS: dict[str, Any] = {
    "model": "hand-model",
    "instructions": "Be brief.",
    "tools": [TOOL],
    "tool_choice": {"type": "function", "name": "look"},
    "parallel_tool_calls": False,
    "max_output_tokens": 77,
    "max_tool_calls": 3,
    "metadata": {"run": "7"},
    "temperature": 0.25,
    "top_p": 0.5,
    "text": {"format": {"type": "json_object"}, "verbosity": "low"},
    "reasoning": {"effort": "low"},
    "truncation": "auto",
    "include": ["reasoning.encrypted_content"],
    "service_tier": "flex",
    "prompt_cache_key": "key-1",
    "store": False,
}
OWN = {"id", "created_at", "previous_response_id"}


async def test_a_successor_inherits_every_setting(played, hand):
    """Tools, instructions, limits, metadata and all, and fields that only the upstream knows.

    Source: Mid-turn steering guide, "Outcomes": automatic successors inherit the response's settings.
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, **SETTINGS, vendor={"x": 1})
        await accepted(socket, first)
        await socket.rest()
        successor = await hand.next_turn()
        successor.accept()
        second = (await socket.until("response.in_progress"))[0]["response"]
        assert {key: value for key, value in second.items() if key not in OWN} == {
            key: value for key, value in first.items() if key not in OWN
        }
        assert second["id"] != first["id"]
        for name in set(turn.request.create.__struct_fields__) - {"input", "previous_response_id"}:
            assert getattr(successor.request.create, name) == getattr(turn.request.create, name)
        assert json.loads(successor.request.body)["vendor"] == {"x": 1}
        successor.finish(TextDelta("Hi."))
        await socket.rest()


# --- C. It waits for the client


def call_of(kind: str) -> tuple[Frame, Frame, Frame | None]:
    """An item that waits for the client, its stub, and what answers it."""
    call = {"id": "item_up", "call_id": "call_1", "status": "completed"}
    return {
        "function": (
            {**call, "type": "function_call", "name": "look", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "call_1", "name": "look"},
            {"output": "42"},
        ),
        "custom": (
            {**call, "type": "custom_tool_call", "name": "patch", "input": "x"},
            {"type": "custom_tool_call_output", "call_id": "call_1"},
            {"output": "42"},
        ),
        "computer": (
            {**call, "type": "computer_call", "action": {"type": "screenshot"}, "pending_safety_checks": []},
            {"type": "computer_call_output", "call_id": "call_1"},
            {"output": {"type": "computer_screenshot", "image_url": "data:x"}},
        ),
        "shell": (
            {**call, "type": "shell_call", "action": {"commands": ["ls"]}},
            {"type": "shell_call_output", "call_id": "call_1"},
            {"output": []},
        ),
        "apply_patch": (
            {**call, "type": "apply_patch_call", "operation": {"type": "delete_file", "path": "a"}},
            {"type": "apply_patch_call_output", "call_id": "call_1"},
            {"status": "completed"},
        ),
        "local_shell": (
            {**call, "type": "local_shell_call", "action": {"type": "exec", "command": ["ls"], "env": {}}},
            {"type": "local_shell_call_output", "call_id": "call_1"},
            {"output": "42"},
        ),
        "tool_search": (
            {**call, "type": "tool_search_call", "arguments": {}, "execution": "client"},
            {"type": "tool_search_output", "call_id": "call_1", "execution": "client"},
            {"tools": []},
        ),
        "mcp_approval": (
            {"type": "mcp_approval_request", "id": "mcpr_up", "name": "f", "arguments": "{}", "server_label": "s"},
            {"type": "mcp_approval_response"},
            {"approve": True},
        ),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["function", "custom", "computer", "shell", "apply_patch", "local_shell", "tool_search", "mcp_approval"],
)
@LANES
async def test_a_response_that_waits_for_the_client_says_so_once_a_steer(played, hand, kind, lane):
    """`response.steer.pending` behind `response.completed`, with a stub that the client fills and sends.

    Source: Mid-turn steering guide, "Outcomes", the third.
    """
    item, stub, filling = call_of(kind)
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, **lane)
        begins, ends = item_events(0, item)
        turn.give(begins)
        await socket.until("response.output_item.added")
        steers = [await accepted(socket, first, text) for text in ("One.", "Two.")]
        turn.give(ends)
        assert types([await socket.receive()]) == ["output_item.done"]
        turn.finish()
        completed, *pending = [await socket.receive() for _ in range(3)]
        assert types([completed, *pending]) == ["completed", "steer.pending", "steer.pending"]
        assert [frame["steer"] for frame in pending] == steers
        if kind == "mcp_approval":
            stub = {**stub, "approval_request_id": completed["response"]["output"][0]["id"]}
        for frame in pending:
            assert (frame["reason"], frame["required_input"]) == ("waiting_for_required_input", [stub])
        assert await socket.is_silent()
        answer = {**stub, **filling}
        answer.pop("name", None)
        await socket.create(previous_response_id=first["id"], input=[answer], **lane)
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", item["type"], "One.", "Two.", stub["type"]]
        successor.answer("Hi.")
        frames = await socket.rest()
        assert frames[0]["response"]["previous_response_id"] == first["id"]
        assert types(frames)[-1] == "completed"


async def test_an_explicit_create_keeps_its_own_settings(played, hand):
    """It brings the steers along and nothing else of the response's.

    Source: Mid-turn steering guide, "Outcomes": that create keeps its own settings.
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, CALL, **{**SETTINGS, "tool_choice": "auto"})
        await accepted(socket, first)
        turn.finish(CallDelta("{}"))
        await socket.until("response.steer.pending")
        own = {"model": "hand-model", "instructions": "At length.", "metadata": {"run": "8"}, "store": False}
        answer = [OUTPUT, {"role": "user", "content": "And now?"}]
        await socket.create(previous_response_id=first["id"], input=answer, **own)
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "function_call", "Shorter.", "function_call_output", "And now?"]
        successor.answer("Hi.")
        response = (await socket.rest())[-1]["response"]
        assert {key: response[key] for key in own} == own
        assert (response["tools"], response["max_output_tokens"], response["temperature"]) == ([], None, 1.0)


@pytest.mark.parametrize("when", ["steered first", "create first"])
async def test_a_create_that_is_there_already_takes_the_steers(played, hand, when):
    """Where the client's create came first there is nothing to wait for, so no `pending`.

    Source: Mid-turn steering guide, "Outcomes": `pending` may be skipped.
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, CALL)
        for step in ("steer", "create") if when == "steered first" else ("create", "steer"):
            if step == "steer":
                await accepted(socket, first)
            else:
                await socket.create(previous_response_id=first["id"], input=[OUTPUT], metadata={"by": "client"})
        turn.finish(CallDelta("{}"))
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "function_call", "Shorter.", "function_call_output"]
        successor.answer("Hi.")
        assert types(await socket.rest())[-1] == "completed"
        frames = await socket.rest()
        assert types(frames)[:2] == OPENED
        assert frames[-1]["response"]["metadata"] == {"by": "client"}
        assert await socket.is_silent()


async def test_a_create_that_is_there_already_takes_the_steers_of_an_interrupted_response(played, hand):
    """The explicit create stands for the automatic one: there is one successor, not two."""
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, ReasoningDelta("Hm."))
        await socket.create(previous_response_id=first["id"], input="And this?")
        await accepted(socket, first)
        turn.give(TextDelta("Well"))
        assert types(await socket.rest())[-1] == "incomplete"
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "Hm.", "Shorter.", "And this?"]
        successor.answer("Hi.")
        assert types(await socket.rest())[-1] == "completed"
        assert await socket.is_silent()
        assert hand.is_idle


async def test_a_successor_goes_before_what_else_waits_in_its_lane(played, hand):
    """A create that does not continue the response waits for the whole of its chain.

    Source: Mid-turn steering guide: a terminal event does not prove that the lane is idle.
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "))
        await socket.create(input="Something else.")
        await accepted(socket, first)
        turn.finish(TextDelta("upon."))
        for expected in (["Hello.", "Once upon.", "Shorter."], ["Something else."]):
            turn = await hand.next_turn()
            assert words(turn) == expected
            turn.answer("Hi.")
        for _ in range(3):
            assert types(await socket.rest())[-1] == "completed"


@pytest.mark.parametrize("behind", ["call", "text"])
async def test_a_response_is_not_interrupted_once_the_client_has_a_call(played, hand, behind):
    """Parallel calls all come, and a text behind them too; then it waits for all outputs.

    Source: Mid-turn steering guide, "Safe boundary" and "Outcomes", the third.
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, CALL, CallDelta("{"))
        await accepted(socket, first)
        turn.give(CallDelta("}"))
        if behind == "call":
            turn.give(CallStarted("custom_tool_call", "call_2", "patch"), CallDelta("x"))
        else:
            turn.give(TextDelta("I look."))
        turn.finish()
        frames = await socket.until("response.steer.pending")
        assert types(frames)[-2:] == ["completed", "steer.pending"]
        output = [item["type"] for item in frames[-2]["response"]["output"]]
        assert output == ["function_call", "custom_tool_call" if behind == "call" else "message"]
        stubs = [stub["type"] for stub in frames[-1]["required_input"]]
        assert stubs == ["function_call_output", "custom_tool_call_output"][: 2 if behind == "call" else 1]


# --- D. It is refused, and nothing else changes


async def refused(socket: Watched, target: str, **fields: Any) -> Frame:
    """What answers a steer that cannot be applied."""
    await socket.send(**{"type": "response.steer", "previous_response_id": target, "input": "Shorter.", **fields})
    frame = await socket.receive()
    assert frame["type"] == "response.steer.failed", frame
    assert frame["error"].keys() == {"type", "code", "message"}
    assert frame["error"]["type"] == "invalid_request_error"
    assert frame["steer"] == {"input": fields.get("input", "Shorter."), "previous_response_id": target}
    return frame


@pytest.mark.parametrize("target", ["resp_nobody_made", "", "resp_" + "0" * 48, "x" * 5000])
async def test_an_unknown_response_cannot_be_steered(server, target):
    """`response_not_found`, with the input, and without a lane: it has none.

    Source: Mid-turn steering guide, codes.
    """
    async with watched(server) as socket:
        frame = await refused(socket, target)
        assert frame["error"]["code"] == "response_not_found"
        assert (frame["sequence_number"], "stream_id" in frame) == (0, False)
        await socket.completed()


async def test_another_connections_response_cannot_be_steered(played, hand):
    """A response runs on the connection that asked for it, whoever owns it (Mid-turn steering guide, codes)."""
    async with watched(played) as socket, watched(played) as other:
        turn, first = await socket.begun(hand, TextDelta("Once "))
        assert (await refused(other, first["id"]))["error"]["code"] == "response_not_found"
        turn.finish()
        assert types(await socket.rest())[-1] == "completed"
        assert await socket.is_silent()


@LANES
async def test_a_response_that_has_ended_cannot_be_steered(server, lane):
    """`response_already_completed` for a lane's latest, in its lane and behind its numbers.

    Source: Mid-turn steering guide, codes.
    """
    async with watched(server) as socket:
        first = await socket.completed(**lane)
        for _ in range(2):
            frame = await refused(socket, first["id"])
            assert (frame["error"]["code"], frame.get("stream_id")) == (
                "response_already_completed",
                lane.get("stream_id"),
            )
        second = await socket.completed(previous_response_id=first["id"], **lane)
        assert (await refused(socket, second["id"]))["error"]["code"] == "response_already_completed"


BAD_INPUT: dict[str, Any] = {
    "null": None,
    "number": 7,
    "boolean": False,
    "object": {"role": "user", "content": "x"},
    "empty array": [],
    "text in an array": ["x"],
    "assistant": [{"type": "message", "role": "assistant", "content": "x"}],
    "developer": [{"type": "message", "role": "developer", "content": "x"}],
    "tool output": [OUTPUT],
    "unknown part": [{"role": "user", "content": [{"type": "input_audio", "data": "x"}]}],
    "extra key": [{"role": "user", "content": "x", "id": "msg_1"}],
    "no content": [{"role": "user"}],
}


@LANES
async def test_input_that_is_no_message_of_the_users_is_refused(played, hand, lane):
    """`invalid_input`, in the response's own numbers; the response goes on as if nothing had come.

    Source: Mid-turn steering guide, "response.steer", `input`.
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "), **lane)
        for given in BAD_INPUT.values():
            frame = await refused(socket, first["id"], input=given)
            assert (frame["error"]["code"], frame.get("stream_id")) == ("invalid_input", lane.get("stream_id"))
        turn.finish(TextDelta("upon."))
        assert types(await socket.rest()) == ["output_text.delta", *TEXT_DONE, "completed"]
        assert await socket.is_silent()
        assert hand.is_idle


@pytest.mark.parametrize("extra", [{"stream_id": "a"}, {"stream_id": None}, {"model": "m"}, {"id": "steer_1"}])
@LANES
async def test_a_steer_has_no_other_keys(played, hand, extra, lane):
    """Not even the lane's name: it is the target's (Mid-turn steering guide, "response.steer")."""
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "), **lane)
        assert (await refused(socket, first["id"], **extra))["error"]["code"] == "invalid_input"
        turn.finish()
        assert types(await socket.rest())[-1] == "completed"
        frame = await refused(socket, first["id"], **extra)
        assert frame["error"]["code"] == "invalid_input"


async def test_a_steer_without_input_is_refused(played, hand):
    """Null is what comes back (Mid-turn steering guide, "response.steer")."""
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "))
        await socket.send(type="response.steer", previous_response_id=first["id"])
        frame = await socket.receive()
        assert (frame["error"]["code"], frame["steer"]["input"]) == ("invalid_input", None)
        turn.finish()
        await socket.rest()


@pytest.mark.parametrize("target", [{}, {"previous_response_id": None}, {"previous_response_id": 7}])
async def test_a_steer_without_a_target_is_an_error(server, target):
    """There is no response that an event could be about; the socket stays usable."""
    async with watched(server) as socket:
        await socket.send(type="response.steer", input="Shorter.", **target)
        frame = await socket.receive()
        assert (frame["type"], frame["status"], frame["error"]["param"]) == ("error", 400, "previous_response_id")
        await socket.completed()


async def test_so_many_steers_may_wait(start, hand):
    """`too_many_pending_steers` over all lanes of a connection; a successor makes room.

    Source: Mid-turn steering guide, codes.
    """
    server = await start(engine=hand, limits={"steers_pending_max": 2})
    async with watched(server) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "))
        other_turn, other = await socket.begun(hand, TextDelta("Once "), stream_id="a")
        await accepted(socket, first)
        await accepted(socket, other)
        for response in (first, other):
            assert (await refused(socket, response["id"]))["error"]["code"] == "too_many_pending_steers"
        turn.finish()
        successor = await hand.next_turn()
        assert words(successor)[-1] == "Shorter."
        await socket.until("response.completed")
        await accepted(socket, other, "More.")
        successor.answer("Hi.")
        assert types(await socket.rest())[-1] == "completed"
        other_turn.finish()
        successor = await hand.next_turn()
        assert words(successor) == ["Hello.", "Once ", "Shorter.", "More."]
        successor.answer("Hi.")
        for _ in range(2):
            assert types(await socket.rest())[-1] == "completed"


async def test_so_many_bytes_of_steers_may_wait(start, hand):
    """One alone always may, so that no message that may be sent is too large to steer with."""
    server = await start(engine=hand, limits={"steers_pending_bytes_max": 100})
    async with watched(server) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "))
        await accepted(socket, first, "x" * 500)
        assert (await refused(socket, first["id"], input="y"))["error"]["code"] == "too_many_pending_steers"
        turn.finish()
        turn = await hand.next_turn()
        turn.accept()
        await socket.until("response.completed")
        second = (await socket.until("response.in_progress"))[0]["response"]
        turn.give(TextDelta("Once "))
        await socket.until("response.output_text.delta")
        await accepted(socket, second, "x" * 50)
        await accepted(socket, second, "y" * 46)
        assert (await refused(socket, second["id"], input="z"))["error"]["code"] == "too_many_pending_steers"
        turn.finish()
        (await hand.next_turn()).answer("Hi.")
        await socket.rest()
        await socket.rest()


# --- E. It was accepted, and there is no successor: the input goes back


async def given_back(socket: Watched, *steers: Frame, said: Any = "Shorter.") -> list[Frame]:
    """The events by which accepted steers come back, in their order, with their ids."""
    frames = [await socket.receive() for _ in steers]
    assert types(frames) == ["steer.failed"] * len(steers)
    for frame, steer in zip(frames, steers, strict=True):
        assert frame["error"]["code"] == "successor_creation_failed"
        assert frame["steer"] == {**steer, "input": said}
    return frames


@pytest.mark.parametrize("begins", [TextDelta("Once "), CALL], ids=["text", "call"])
@LANES
async def test_a_failed_responses_steers_go_back(played, hand, begins, lane):
    """Each with its id and its input, behind the end of the response, which nobody can continue.

    Source: Mid-turn steering guide, "Outcomes", the fourth; event order, "Steering".
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, begins, **lane)
        steers = [await accepted(socket, first) for _ in range(2)]
        turn.refuse()
        assert types(await socket.rest())[-1] == "failed"
        await given_back(socket, *steers)
        assert await socket.is_silent()
        await socket.create(**lane)
        turn = await hand.next_turn()
        assert words(turn) == ["Hello."]
        turn.answer("Hi.")
        assert types(await socket.rest())[-1] == "completed"


@LANES
async def test_a_cancelled_responses_steers_go_back(played, hand, lane):
    """Who cancels wants no successor (WebSocket mode guide, "Cancelling")."""
    async with watched(played) as socket:
        _, first = await socket.begun(hand, TextDelta("Once "), **lane)
        steer = await accepted(socket, first)
        await socket.cancel(response_id=first["id"])
        assert (await socket.rest())[-1]["response"]["incomplete_details"] == {"reason": "cancelled"}
        await given_back(socket, steer)
        assert await socket.is_silent()
        assert hand.is_idle


@LANES
@pytest.mark.parametrize("elsewhere", ["afresh", "from another"])
async def test_steers_go_back_when_their_lane_goes_on_without_them(played, hand, elsewhere, lane):
    """The next create of the lane decides; one that continues something else does not bring them along.

    Source: Mid-turn steering guide, "Outcomes", the fourth.
    """
    async with watched(played) as socket:
        turn, other = await socket.begun(hand, stream_id="other")
        turn.finish(TextDelta("Other."))
        await socket.rest()
        turn, first = await socket.begun(hand, CALL, **lane)
        steer = await accepted(socket, first)
        turn.finish()
        await socket.until("response.steer.pending")
        parent = {"previous_response_id": other["id"]} if elsewhere == "from another" else {}
        await socket.create(input="Something else.", **parent, **lane)
        await given_back(socket, steer)
        turn = await hand.next_turn()
        assert words(turn) == [*(["Hello.", "Other."] if parent else []), "Something else."]
        turn.answer("Hi.")
        assert types(await socket.rest())[-1] == "completed"
        await socket.create(previous_response_id=first["id"], input=[OUTPUT], **lane)
        turn = await hand.next_turn()
        assert words(turn) == ["Hello.", "function_call", "function_call_output"]
        turn.answer("Hi.")
        await socket.rest()


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"temperature": "hot"}, "invalid_type"),
        ({"background": True}, "unsupported_parameter"),
        ({"input": []}, None),
        ({"input": [{**OUTPUT, "call_id": "call_9"}]}, None),
    ],
    ids=["bad field", "unsupported", "unanswered call", "answer to no call"],
)
@LANES
async def test_steers_go_back_when_their_create_is_refused(played, hand, fields, code, lane):
    """The create gets its error, then each steer comes back; the lane goes on, and nothing is applied twice.

    Source: Mid-turn steering guide, "Outcomes", the fourth.
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, CALL, **lane)
        steer = await accepted(socket, first)
        turn.finish()
        await socket.until("response.steer.pending")
        await socket.create(**{"previous_response_id": first["id"], "input": [OUTPUT], **fields, **lane})
        error = await socket.receive()
        assert (error["type"], error["error"]["code"], error.get("stream_id")) == (
            "error",
            code,
            lane.get("stream_id"),
        )
        await given_back(socket, steer)
        await socket.create(previous_response_id=first["id"], input=[OUTPUT], **lane)
        turn = await hand.next_turn()
        assert words(turn) == ["Hello.", "function_call", "function_call_output"]
        turn.answer("Hi.")
        assert types(await socket.rest())[-1] == "completed"


@pytest.mark.parametrize("store", [True, False])
@LANES
async def test_a_successor_that_its_upstream_refuses_is_told_by_its_steers_alone(played, hand, store, lane):
    """The client sent no create, so no `error` stands for it: others would take that for the end of their own turn.

    The response can still be continued, by a create that brings the input along.

    Source: Mid-turn steering guide, "Outcomes", the fourth; WebSocket mode guide, "Turn lifecycle", hard rules.
    """
    async with watched(played) as socket:
        _, first = await socket.begun(hand, store=store, **lane)
        steer = await accepted(socket, first)
        assert types(await socket.rest()) == ["incomplete"]
        (await hand.next_turn()).refuse("rate_limit_exceeded")
        (frame,) = await given_back(socket, steer)
        assert "Not now." in frame["error"]["message"]
        assert await socket.is_silent()
        await socket.create(previous_response_id=first["id"], input="Again.", **lane)
        turn = await hand.next_turn()
        assert words(turn) == ["Hello.", "Again."]
        turn.answer("Hi.")
        assert types(await socket.rest())[-1] == "completed"


async def test_a_successor_that_fails_has_taken_its_steers(played, hand):
    """Its `response.created` is the commit point: from there on they are in a response (Mid-turn steering guide)."""
    async with watched(played) as socket:
        _, first = await socket.begun(hand)
        await accepted(socket, first)
        await socket.rest()
        turn = await hand.next_turn()
        turn.accept()
        await socket.until("response.in_progress")
        turn.refuse()
        assert types(await socket.rest()) == ["failed"]
        assert await socket.is_silent()


async def test_a_successor_waits_for_a_slot_and_can_be_cancelled_there(start, hand):
    """It counts as one of the connection's responses; cancelled before it starts, its steers go back and no error comes.

    Source: WebSocket mode guide, "Limits" and "Cancelling".
    """
    server = await start(engine=hand, limits={"responses_active_max": 1})
    async with watched(server) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "))
        steer = await accepted(socket, first)
        await socket.create(stream_id="a", input="Also.")
        turn.finish()
        assert types(await socket.rest())[-1] == "completed"
        busy = await hand.next_turn()
        assert words(busy) == ["Also."]
        await socket.cancel()
        await given_back(socket, steer)
        busy.answer("Hi.")
        assert types(await socket.rest())[-1] == "completed"
        assert await socket.is_silent()
        assert hand.is_idle
        await socket.create(previous_response_id=first["id"], input="Go on.")
        turn = await hand.next_turn()
        assert words(turn) == ["Hello.", "Once ", "Go on."]
        turn.answer("Hi.")
        await socket.rest()


async def test_steers_go_back_when_the_create_that_would_take_them_is_cancelled(start, hand):
    """A create that waited for a slot had them in its keeping, so that no `pending` was told."""
    server = await start(engine=hand, limits={"responses_active_max": 1})
    async with watched(server) as socket:
        turn, first = await socket.begun(hand, CALL)
        steer = await accepted(socket, first)
        await socket.create(stream_id="a", input="Also.")
        await socket.create(previous_response_id=first["id"], input=[OUTPUT])
        turn.finish()
        assert types(await socket.rest())[-1] == "completed"
        busy = await hand.next_turn()
        await socket.cancel()
        assert types([await socket.receive()]) == ["request_cancelled"]
        await given_back(socket, steer)
        busy.answer("Hi.")
        await socket.rest()
        assert await socket.is_silent()


@pytest.mark.parametrize("how", ["close", "abort"])
@pytest.mark.parametrize("when", ["accepted", "pending", "successor"])
async def test_a_connection_takes_its_steers_with_it(played, hand, how, when):
    """They wait on their connection only; nothing is left of them, and the next connection knows of none.

    Source: Mid-turn steering guide: the queue lives on its connection.
    """
    left = Leftovers(played)
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, CALL if when == "pending" else TextDelta("Once "))
        await accepted(socket, first)
        if when != "accepted":
            turn.finish()
            await socket.until("response.steer.pending" if when == "pending" else "response.completed")
        if when == "successor":
            turn = await hand.next_turn()
        if how == "abort":
            socket.connection.transport.abort()
        else:
            await socket.connection.close()
        await asyncio.wait_for(turn.closed.wait(), STOP_SECONDS_MAX)
    await left.gone()
    assert hand.is_idle
    async with watched(played) as socket:
        assert (await refused(socket, first["id"]))["error"]["code"] == "response_not_found"


# --- When it is late


@pytest.mark.parametrize("end", ["answered", "call", "failed"])
@LANES
async def test_a_response_that_is_being_kept_can_still_be_steered(start, hand, tmp_path, end, lane):
    """Its end is decided and not announced: the steer is accepted, and a successor follows if one can.

    Source: Mid-turn steering guide, "Outcomes"; design, "Keep, then announce".
    """
    store = SlowStore(tmp_path / "openline.db")
    server = await start(engine=hand, store=store)
    async with watched(server) as socket:
        turn, first = await socket.begun(hand, CALL if end == "call" else TextDelta("Once "), **lane)
        if end == "failed":
            turn.refuse()
        else:
            turn.finish()
        await store.asked.wait()
        await socket.steer(first)
        accepted_last = await socket.until("response.steer.accepted")
        closing = ["function_call_arguments.done", "output_item.done"] if end == "call" else TEXT_DONE
        assert types(accepted_last) == [*closing, "steer.accepted"]
        store.fast.set()
        ended = await socket.receive()
        if end == "answered":
            assert types([ended]) == ["completed"]
            successor = await hand.next_turn()
            assert words(successor) == ["Hello.", "Once ", "Shorter."]
            successor.answer("Hi.")
            assert types(await socket.rest())[-1] == "completed"
        elif end == "call":
            assert types([ended, await socket.receive()]) == ["completed", "steer.pending"]
        else:
            assert types([ended]) == ["failed"]
            await given_back(socket, accepted_last[-1]["steer"])


async def test_a_response_whose_end_is_not_read_yet_cannot_be_steered(start, hand):
    """The refusal comes behind the terminal event, in the response's numbers, as does one that finds its input bad.

    Source: Mid-turn steering guide, codes.
    """
    server = await start(engine=hand, kernel_buffer_bytes=KERNEL_BYTES)
    async with watched(server, sock=stingy_connection(server), max_queue=1) as socket:
        turn, first = await socket.begun(hand, stream_id="a")
        turn.finish(TextDelta("x" * 512 * 1024))  # more than the transport takes, less than may wait
        await server.idle()
        for given in ("Shorter.", [], "Longer."):
            await socket.steer(first, given)
        frames = await socket.rest()
        assert frames[-1]["type"] == "response.completed"
        late = [await socket.receive() for _ in range(3)]
        assert types(late) == ["steer.failed"] * 3
        assert [frame["error"]["code"] for frame in late] == ["response_already_completed"] * 3
        assert [frame["steer"]["input"] for frame in late] == ["Shorter.", [], "Longer."]
        assert (await refused(socket, first["id"]))["stream_id"] == "a"
        turn, _ = await socket.begun(hand, previous_response_id=first["id"], input="Go on.", stream_id="a")
        turn.finish()
        assert types(await socket.rest())[-1] == "completed"


@pytest.mark.parametrize("running", [True, False], ids=["running", "ended"])
async def test_a_client_that_does_not_read_cannot_have_steer_upon_steer_refused(start, hand, running):
    """Refusals give the input back, and what waits for a client is bounded: it is not listened to until it reads.

    Source: WebSocket mode guide, "Backpressure".
    """
    server = await start(engine=hand, limits={"send_buffer_bytes_max": 128 * 1024}, kernel_buffer_bytes=KERNEL_BYTES)
    async with server.connect(sock=stingy_connection(server), max_queue=1) as socket:
        turn, first = await Watched(socket).begun(hand)
        text = TextDelta("x" * 100 * 1024)
        if running:
            turn.give(text)
            await until(lambda: turn.taken == 2)
        else:
            turn.finish(text)
            await server.idle()
        sent = 0

        async def flood() -> None:
            nonlocal sent
            for _ in range(128):
                await socket.send(type="response.steer", previous_response_id=first["id"], input=["y" * 128 * 1024])
                sent += 1

        flooding = asyncio.ensure_future(flood())
        before = None
        while before != sent:
            before = sent
            await asyncio.wait([flooding], timeout=0.25)
        assert not flooding.done()
        socket.connection.transport.abort()
        with suppress(ConnectionClosed):
            await flooding
    await server.idle()


# --- Several lanes, and the store


async def test_two_lanes_are_steered_at_once(played, hand):
    """Each on its own, whatever the order of their ends (WebSocket mode guide, "Lanes")."""
    async with watched(played) as socket:
        turns = {}
        for lane in ("a", "b"):
            turns[lane] = await socket.begun(hand, TextDelta(f"{lane}1"), stream_id=lane, input=f"{lane}0")
        for lane in ("b", "a", "b"):
            await accepted(socket, turns[lane][1], f"{lane}2")
        for lane in ("b", "a"):
            turns[lane][0].finish()
        successors = [await hand.next_turn(), await hand.next_turn()]
        assert [words(turn) for turn in successors] == [["b0", "b1", "b2", "b2"], ["a0", "a1", "a2"]]
        for turn in reversed(successors):
            turn.answer("Hi.")
        ends: list[Frame] = []
        while len(ends) < 4:
            ends.append((await socket.rest())[-1])
        assert types(ends) == ["completed"] * 4
        parents = {(end["stream_id"], end["response"]["previous_response_id"]) for end in ends[2:]}
        assert parents == {(lane, turns[lane][1]["id"]) for lane in ("a", "b")}


async def test_a_fork_does_not_take_its_parents_steers(played, hand):
    """They wait for the lane of the response that was steered (Mid-turn steering guide, "Outcomes")."""
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, CALL, stream_id="a")
        await accepted(socket, first)
        turn.finish()
        await socket.until("response.steer.pending")
        answer = {"previous_response_id": first["id"], "input": [OUTPUT]}
        for lane, steered in ((None, []), ("fork", []), ("a", ["Shorter."])):
            await socket.create(**answer, **({"stream_id": lane} if lane else {}))
            turn = await hand.next_turn()
            assert words(turn) == ["Hello.", "function_call", *steered, "function_call_output"]
            turn.answer("Hi.")
            assert types(await socket.rest())[-1] == "completed"


@pytest.mark.parametrize("store", [True, False])
async def test_a_successor_is_a_parent_like_any_other(played, hand, store):
    """Its steers are its own input: they come again with every continuation, out of the store as well.

    Source: WebSocket mode guide, "Continuing".
    """
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, TextDelta("One."), store=store)
        await accepted(socket, first)
        turn.finish()
        (await hand.next_turn()).answer("Two.")
        await socket.rest()
        second = (await socket.rest())[-1]["response"]
        assert second["store"] == store
        await socket.create(previous_response_id=second["id"], input="Three?", store=store)
        turn = await hand.next_turn()
        assert words(turn) == ["Hello.", "One.", "Shorter.", "Two.", "Three?"]
        turn.answer("Three.")
        await socket.rest()
    if not store:
        assert b"Shorter." not in played.files()
        return
    assert (await played.get(f"/v1/responses/{second['id']}")).json == second
    kept = (await played.get(f"/v1/responses/{first['id']}")).json
    assert (kept["id"], kept["status"]) == (first["id"], "completed")
    posting = asyncio.ensure_future(played.post(previous_response_id=second["id"], input="Three?"))
    turn = await hand.next_turn()
    assert words(turn) == ["Hello.", "One.", "Shorter.", "Two.", "Three?"]
    turn.answer("Three.")
    assert (await posting).status == 200


async def test_an_interrupted_response_is_kept_as_it_ended(played, hand):
    """Stored, readable, and a parent: incomplete with reason `steered` (Mid-turn steering guide, "Outcomes")."""
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, ReasoningDelta("Hm."))
        await accepted(socket, first)
        turn.give(TextDelta("Well"))
        end = (await socket.rest())[-1]["response"]
        assert (await played.get(f"/v1/responses/{first['id']}")).json == end
        (await hand.next_turn()).answer("Hi.")
        await socket.rest()
    posting = asyncio.ensure_future(played.post(previous_response_id=first["id"], input="Another way?"))
    turn = await hand.next_turn()
    assert words(turn) == ["Hello.", "Hm.", "Another way?"]
    turn.answer("So.")
    assert (await posting).status == 200


async def test_a_stored_response_is_steered_by_its_latest_turn(played, hand):
    """A conversation that came out of the store has all of it in its successor too (WebSocket mode guide)."""
    posting = asyncio.ensure_future(played.post(input="Zero?"))
    (await hand.next_turn()).answer("Zero.")
    stored = (await posting).json
    async with watched(played) as socket:
        _, first = await socket.begun(hand, previous_response_id=stored["id"], input="One?")
        await accepted(socket, first)
        turn = await hand.next_turn()
        assert words(turn) == ["Zero?", "Zero.", "One?", "Shorter."]
        turn.answer("Hi.")
        await socket.rest()
        await socket.rest()


# --- What it is not for


async def test_a_response_that_sums_itself_up_cannot_be_steered(played, hand):
    """`steering_not_supported`, and the response goes on (Mid-turn steering guide, "Limits")."""
    threshold = [{"type": "compaction", "compact_threshold": 100_000}]
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "), context_management=threshold)
        assert (await refused(socket, first["id"]))["error"]["code"] == "steering_not_supported"
        turn.finish()
        assert types(await socket.rest())[-1] == "completed"
        assert hand.is_idle


# --- As OpenAI's own client reads it


SERVER_EVENT = TypeAdapter(ResponsesServerEvent)


@LANES
async def test_sdk_types_read_every_steering_event(played, hand, lane):
    """Each validates strictly, and nothing of it is lost (openai-python, `ResponsesServerEvent`)."""
    message = [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Shorter."}]}]
    async with watched(played) as socket:
        turn, first = await socket.begun(hand, CALL, **lane)
        await accepted(socket, first, message)
        turn.finish()
        await socket.until("response.steer.pending")
        await socket.create(**lane)  # which goes on without it
        await socket.until("response.steer.failed")
        turn = await hand.next_turn()
        turn.accept()
        second = (await socket.until("response.in_progress"))[0]["response"]
        await accepted(socket, second)
        await socket.until("response.incomplete")
        (await hand.next_turn()).answer("Hi.")
        third = (await socket.rest())[-1]["response"]
        await refused(socket, third["id"], input=message)
        await refused(socket, "resp_nobody_made")
        assert {kind for kind in types(socket.frames) if "steer" in kind} == {
            "steer.accepted",
            "steer.pending",
            "steer.failed",
        }
    for frame in socket.frames:
        event = SERVER_EVENT.validate_json(json.dumps(frame), strict=True)
        assert event.type == frame["type"]
        assert event.model_dump(mode="json", by_alias=True, exclude_unset=True, warnings="error") == frame


async def test_the_sdks_own_client_steers(played, hand):
    """With its own method, and its own events (openai-python, `connection.response.steer`)."""
    async with (
        AsyncOpenAI(base_url=f"{played.url}/v1", api_key="local") as client,
        client.responses.connect() as line,
    ):
        await line.response.create(model="m", input="Hello.", stream_id="a")
        turn = await hand.next_turn()
        turn.give(ReasoningDelta("Hm."))
        seen: list[str] = []
        response_ids: list[str] = []
        async for event in line:
            seen.append(event.type)
            if event.type == "response.created":
                response_ids.append(event.response.id)
            elif event.type == "response.reasoning_text.delta":
                await line.response.steer(previous_response_id=response_ids[0], input="Shorter.")
            elif event.type == "response.steer.accepted":
                turn.give(TextDelta("Well"))
                (await hand.next_turn()).answer("Hi.")
            elif event.type == "response.completed":
                break
        assert event.response.output_text == "Hi."
        assert event.stream_id == "a"
    assert (len(response_ids), "response.incomplete" in seen) == (2, True)
