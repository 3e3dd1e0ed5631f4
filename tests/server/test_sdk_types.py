"""What openai-python makes of the golden transcripts: its types are the oracle of what the server emits.

The SDK builds its objects without validating; here they are validated, and strictly.
"""

from __future__ import annotations

import json

import pytest
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import ResponsesServerEvent, ResponseStreamEvent
from pydantic import TypeAdapter

from openline.protocol.errors import ERRORS
from openline.protocol.states import TERMINAL_EVENTS
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

by_transcript = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def validated(frame, oracle):
    """The frame as the SDK's type, strictly; nothing of it may be lost."""
    error = frame.get("response", {}).get("error")
    if error is not None and error["code"] in OTHER_CODES:
        frame = {**frame, "response": {**frame["response"], "error": {**error, "code": "server_error"}}}
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

    Source: openai-python, `ResponseStreamEvent`.
    """
    for frame in server_frames(path):
        if frame["type"] != "error":
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
        events = [line.frame for line in turn.events if line.frame["type"] != "error"]
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
            where = (kind, frame.get("output_index"), frame.get("content_index"), frame.get("summary_index"))
            if step == "delta":
                joined[where] = joined.get(where, "") + frame["delta"]
            elif step == "done" and where in joined:
                text = next(frame[key] for key in ("text", "refusal", "arguments", "input") if key in frame)
                assert joined.pop(where) == text
        assert not joined
