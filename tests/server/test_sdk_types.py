"""What openai-python makes of the golden transcripts: its types are the oracle of what the server emits.

The SDK builds its objects without validating; here they are validated, and strictly.
"""

from __future__ import annotations

import json
import re
from collections import Counter

import msgspec
import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponsesServerEvent, ResponseStreamEvent
from pydantic import TypeAdapter

from openline.protocol.errors import ERRORS
from openline.protocol.states import TERMINAL_EVENTS
from openline.protocol.transcript import is_about_steering, lane_of
from server.golden import PATHS, read, server_frames

SOCKET_EVENT = TypeAdapter(ResponsesServerEvent)
STREAM_EVENT = TypeAdapter(ResponseStreamEvent)

# What OpenAI's API reference and the Open Responses schema require of a response, together.
RESPONSE_KEYS = {
    *("id", "object", "created_at", "completed_at", "status", "incomplete_details", "model", "previous_response_id"),
    *("instructions", "output", "error", "tools", "tool_choice", "truncation", "parallel_tool_calls", "text", "top_p"),
    *("presence_penalty", "frequency_penalty", "top_logprobs", "temperature", "reasoning", "usage"),
    *("max_output_tokens", "max_tool_calls", "store", "background", "service_tier", "metadata"),
    *("safety_identifier", "prompt_cache_key"),
}
NUMBERS = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs", "created_at")

# Codes of a failed response that Codex acts on, or that name the upstream's fault. The SDK lists only OpenAI's own,
# as a closed set; it reads the others as plain strings.
OTHER_CODES = {kind.wire_code for kind in ERRORS.values()} - {"server_error", "rate_limit_exceeded", "invalid_prompt"}
OTHER_REASONS = {"cancelled"}  # of an incomplete response, likewise

# What an item goes through between `added` and `done`, by its type: the ends of its events' types.
TEXT = r"content_part\.added (output_text\.(delta|annotation\.added) )*output_text\.done content_part\.done "
REFUSAL = r"content_part\.added (refusal\.delta )*refusal\.done content_part\.done "
SUMMARY = r"_summary_part\.added (_summary_text\.delta )*_summary_text\.done _summary_part\.done "
RAW = r"content_part\.added (_text\.delta )*_text\.done content_part\.done "
STEPS = {
    "message": f"({TEXT}|{REFUSAL})*",
    "reasoning": f"({SUMMARY})*({RAW})*",
    "function_call": r"(_arguments\.delta )*_arguments\.done ",
    "custom_tool_call": r"(_input\.delta )*_input\.done ",
    "web_search_call": r"\.in_progress \.searching \.completed ",
    "file_search_call": r"\.in_progress \.searching \.completed ",
    "code_interpreter_call": r"\.in_progress (_code\.delta )*_code\.done \.interpreting \.completed ",
    "image_generation_call": r"\.in_progress \.generating (\.partial_image )*\.completed ",
    "mcp_list_tools": r"\.in_progress \.(completed|failed) ",
    "mcp_call": r"\.in_progress (_arguments\.delta )*_arguments\.done \.(completed|failed) ",
    "mcp_approval_request": "",
    "shell_call": r"(_command\.added (_command\.delta )*_command\.done )*",
    "shell_call_output": r"((_content\.delta )*_content\.done )*",
    "apply_patch_call": "",
    "compaction": r"(\.compacting )?",
}
# The same for an item that was cut, where that is not only shorter.
CUT_STEPS = {
    "code_interpreter_call": r"\.in_progress (_code\.delta )*_code\.done ",
    "image_generation_call": r"\.in_progress (\.generating (\.partial_image )*)?",
    "mcp_call": r"\.in_progress (_arguments\.delta )*_arguments\.done ",
}

by_transcript = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def validated(frame, oracle):
    """The frame as the SDK's type, strictly; nothing of it may be lost."""
    response = frame.get("response", {})
    error, details = response.get("error"), response.get("incomplete_details")
    if error is not None and error["code"] in OTHER_CODES:
        frame = {**frame, "response": {**response, "error": {**error, "code": "server_error"}}}
    if details is not None and details["reason"] in OTHER_REASONS:
        frame = {**frame, "response": {**response, "incomplete_details": {"reason": "max_output_tokens"}}}
    event = oracle.validate_json(json.dumps(frame), strict=True)
    assert event.model_dump(mode="json", by_alias=True, exclude_unset=True, warnings="error") == frame
    return event


@by_transcript
def test_sdk_types_accept_every_websocket_event(path):
    """Every message validates strictly as the SDK's server event, and nothing of it is lost.

    Source: openai-python, `ResponsesServerEvent`.
    """
    for frame in server_frames(path):
        validated(frame, SOCKET_EVENT)


@by_transcript
def test_sdk_types_accept_every_stream_event(path):
    """Every event of the HTTP stream validates strictly as the SDK's stream event; an `error` is a status there.

    Steering is for sockets only. Source: openai-python, `ResponseStreamEvent`.
    """
    for frame in server_frames(path):
        if frame["type"] != "error" and not is_about_steering(frame):
            validated(frame, STREAM_EVENT)


@by_transcript
def test_every_response_has_every_required_key(path):
    """The union of the keys that the two specifications require is in each response, numbers as numbers.

    Source: Responses API reference, "The response object"; Open Responses, `ResponseResource`.
    """
    for frame in server_frames(path):
        if "response" in frame:
            response = frame["response"]
            assert response.keys() >= RESPONSE_KEYS
            assert all(isinstance(response[key], int | float) for key in NUMBERS)
            assert response["reasoning"].keys() >= {"effort", "summary"}


@by_transcript
def test_sdk_accumulator_accepts_every_turn(path):
    """The SDK's stream helper takes every turn: its rules on ids, indexes, parts and unfinished items hold.

    Source: openai-python, `ResponseStreamState`.
    """
    for turn in read(path):
        frames = [line.frame for line in turn.events]
        events = [frame for frame in frames if frame["type"] != "error" and not is_about_steering(frame)]
        state = ResponseStreamState(input_tools=omit, text_format=omit)
        for frame in events:
            state.handle_event(validated(frame, STREAM_EVENT))
        if events and events[-1]["type"] == "response.completed":
            accumulated = state._completed_response
            assert accumulated.id == events[-1]["response"]["id"]
            assert [item.type for item in accumulated.output] == [
                item["type"] for item in events[-1]["response"]["output"]
            ]


@by_transcript
def test_events_follow_the_canonical_order(path):
    """Numbers run from 0 without a gap; one terminal event, last; each item and part is added, then done, once.

    Source: Streaming reference, "Event order".
    """
    for turn in read(path):
        frames = [line.frame for line in turn.events]
        if frames[0]["type"] == "error":
            assert len(frames) == 1
            continue
        types = [frame["type"] for frame in frames]
        assert [frame["sequence_number"] for frame in frames] == list(range(len(frames)))
        assert types[:2] == ["response.created", "response.in_progress"]
        assert [kind in TERMINAL_EVENTS for kind in types] == [False] * (len(types) - 1) + [True]
        last = frames[-1]["response"]
        assert {frame["response"]["id"] for frame in frames if "response" in frame} == {last["id"]}
        done = [frame["item"] for frame in frames if frame["type"] == "response.output_item.done"]
        added = [frame["item"] for frame in frames if frame["type"] == "response.output_item.added"]
        assert last["output"] == done
        assert [item["id"] for item in added] == [item["id"] for item in done]
        assert types.count("response.content_part.added") == types.count("response.content_part.done")
        # An incomplete item is the last one, and then the response is not complete either.
        incomplete = [item for item in done if item.get("status") == "incomplete"]
        assert incomplete in ([], done[-1:])
        assert not incomplete or last["status"] != "completed"


@by_transcript
def test_deltas_add_up_to_what_is_done(path):
    """The deltas of a text, joined, are the text of its `done` event, of its part and of its item.

    Source: Streaming reference, "Event order".
    """
    for turn in read(path):
        joined: dict[tuple[object, ...], str] = {}
        for frame in (line.frame for line in turn.events):
            kind, _, step = frame["type"].rpartition(".")
            where = (kind, *(frame.get(f"{of}_index") for of in ("output", "content", "summary", "command")))
            if step == "delta":
                joined[where] = joined.get(where, "") + _said(frame["delta"])
            elif step == "done" and where in joined:
                keys = ("text", "refusal", "arguments", "input", "code", "command", "output")
                assert joined.pop(where) == _said(next(frame[key] for key in keys if key in frame))
        assert not joined


def _said(text):
    """A text; of a shell's output, what it wrote."""
    match text:
        case list():
            return "".join(map(_said, text))
        case dict():
            return text.get("stdout", "") + text.get("stderr", "")
    return text


@by_transcript
def test_items_go_through_their_steps(path):
    """Between `added` and `done` an item of each type has exactly its own events, in their order, one item at a time.

    What the response says of itself may stand between them: that it still runs, and what became of a steer.

    Source: Streaming reference, "Event order".
    """
    for turn in read(path):
        item, steps = None, ""
        for frame in (line.frame for line in turn.events):
            kind = frame["type"].removeprefix("response.")
            if kind == "output_item.added":
                assert item is None
                item, steps = frame["item"]["type"], ""
            elif kind == "output_item.done":
                may_be_cut = item in CUT_STEPS and frame["item"]["status"] != "completed"
                patterns = [STEPS[item], *([CUT_STEPS[item]] if may_be_cut else [])]
                assert any(re.fullmatch(pattern, steps) for pattern in patterns), steps
                item = None
            elif item is not None and kind != "in_progress" and not is_about_steering(frame):
                steps += kind.removeprefix(item) + " "
        assert item is None


@by_transcript
def test_every_event_answers_a_create_of_its_lane(path):
    """`stream_id` is on every event of a named lane and on none of the default lane, so none is left over.

    Only what becomes of a steer may come when its response has ended, and what a client reads again under its key.
    Source: WebSocket mode guide, "Server events"; docs/adr/0009.
    """
    in_turns = sum(len(turn.events) for turn in read(path))
    assert in_turns + len(behind_the_end(path)) + len(read_again(path)) == len(server_frames(path))


def read_again(path):
    """What has come a second time, on the same lane or another: word for word what came at first."""
    known = [
        without_lane(line.frame) for turn in read(path) for line in turn.events if "idempotency_key" in turn.create
    ]
    came = Counter(msgspec.json.encode(without_lane(frame)) for frame in server_frames(path))
    return [frame for frame in known for _ in range(came[msgspec.json.encode(frame)] - 1)]


def without_lane(frame):
    return {key: value for key, value in frame.items() if key != "stream_id"}


def behind_the_end(path):
    """What became of steers whose response does not run."""
    in_turns = [line.frame for turn in read(path) for line in turn.events]
    return [frame for frame in server_frames(path) if is_about_steering(frame) and frame not in in_turns]


@by_transcript
def test_what_comes_behind_the_end_is_counted_on(path):
    """It has the next numbers of its response, on that one's lane, or 0 if nobody knows such a response.

    Source: Mid-turn steering guide, `sequence_number`.
    """
    next_numbers = {turn.response_id: len(turn.events) for turn in read(path)}
    lanes = {turn.response_id: lane_of(turn.create) for turn in read(path)}
    for frame in behind_the_end(path):
        target = frame["steer"]["previous_response_id"]
        assert (frame["sequence_number"], lane_of(frame)) == (next_numbers.get(target, 0), lanes.get(target))
        next_numbers[target] = next_numbers.get(target, 0) + (target in lanes)
