"""What cannot be read is refused with a code and the field's name, on every transport, and harms nothing else."""

from __future__ import annotations

import json

import pytest

GOOD = {"model": "scripted-text", "input": "Hello."}
MESSAGE = {"type": "message", "role": "user", "content": "Hello."}

# name → (what the create has in place of, or beside, its good fields; code; param)
BAD_CREATES = {
    "model of a wrong type": ({"model": 5}, "invalid_type", "model"),
    "no model": ({"model": None}, "missing_required_parameter", "model"),
    "unknown model": ({"model": "nobody-serves-this"}, "model_not_found", "model"),
    "no input": ({"input": None}, "missing_required_parameter", "input"),
    "empty input without a parent": ({"input": []}, "missing_required_parameter", "input"),
    "input of a wrong type": ({"input": 5}, "invalid_type", "input"),
    "item that is no object": ({"input": [MESSAGE, "Hello."]}, "invalid_type", "input[1]"),
    "item that is nothing": ({"input": [{}]}, "missing_required_parameter", "input[0].type"),
    "item of a wrong type": ({"input": [{"type": 5}]}, "invalid_type", "input[0].type"),
    "output without its call": ({"input": [{"type": "function_call_output"}]}, "missing_required_parameter", None),
    "temperature of a wrong type": ({"temperature": "hot"}, "invalid_type", "temperature"),
    "temperature out of range": ({"temperature": 3}, "invalid_value", "temperature"),
    "tool that is no object": ({"tools": ["get_weather"]}, "invalid_type", "tools[0]"),
    "too much metadata": ({"metadata": {str(n): "" for n in range(17)}}, "invalid_value", "metadata"),
    "unknown truncation": ({"truncation": "sometimes"}, "invalid_value", "truncation"),
    "conversation": ({"conversation": 5}, "invalid_type", "conversation"),
    "include": ({"include": ["everything"]}, "invalid_value", "include[0]"),
    "prompt template": ({"prompt": {"id": "pmpt_1"}}, "unsupported_parameter", "prompt"),
    "multi-agent": ({"multi_agent": {"enabled": True}}, "unsupported_parameter", "multi_agent"),
    "unknown parent": ({"previous_response_id": "resp_x"}, "previous_response_not_found", "previous_response_id"),
}
# name → (the text of a message; code; param)
BAD_MESSAGES = {
    "nothing": ("", "invalid_json", None),
    "half an object": ('{"type":', "invalid_json", None),
    "no object": ("[]", "invalid_json", None),
    "NaN": ('{"type":"response.create","model":"m","input":"x","temperature":NaN}', "invalid_json", None),
    "no type": ('{"model":"m"}', "missing_required_parameter", "type"),
    "type of a wrong type": ('{"type":5}', "unknown_event_type", "type"),
    "unknown type": ('{"type":"response.append"}', "unknown_event_type", "type"),
    "empty stream_id": ('{"type":"response.create","stream_id":""}', "invalid_stream_id", "stream_id"),
    "bad stream_id": ('{"type":"response.create","stream_id":"a b"}', "invalid_stream_id", "stream_id"),
    "binary that is not UTF-8": (b'{"type":"\xff"}', "invalid_json", None),
}


@pytest.mark.parametrize(("fields", "code", "param"), BAD_CREATES.values(), ids=BAD_CREATES)
async def test_bad_create_over_websocket_leaves_the_socket_usable(server, fields, code, param):
    """An `error` with status 400, code and param; then the same socket completes a turn.

    Source: WebSocket mode guide, "Error frame": request-scoped errors never close the socket.
    """
    async with server.connect() as socket:
        frame = await socket.refused(**GOOD | fields)
        assert (frame["status"], frame["error"]["code"]) == (400, code)
        assert param is None or frame["error"]["param"] == param
        assert "stream_id" not in frame
        await socket.completed()


@pytest.mark.parametrize("stream", [False, True], ids=["json", "sse"])
@pytest.mark.parametrize(("fields", "code", "param"), BAD_CREATES.values(), ids=BAD_CREATES)
async def test_bad_create_over_http_gets_status_and_envelope(server, fields, code, param, stream):
    """The real status and the JSON envelope with its four keys, streamed or not.

    Source: Responses API reference, "Errors".
    """
    answer = await server.post(**GOOD | fields, stream=stream)
    assert (answer.status, answer.headers["content-type"]) == (400, "application/json")
    error = answer.json["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert param is None or error["param"] == param
    assert answer.headers["x-request-id"].startswith("req_")


async def test_both_transports_refuse_with_the_same_words(server):
    """The error of a bad create is the same object over WebSocket and HTTP, word for word."""
    async with server.connect() as socket:
        for name, (fields, _, _) in BAD_CREATES.items():
            frame = await socket.refused(**GOOD | fields)
            answer = await server.post(**GOOD | fields)
            assert frame["error"] == answer.json["error"], name


@pytest.mark.parametrize(("message", "code", "param"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
async def test_bad_message_leaves_the_socket_usable(server, message, code, param):
    """A message that is no client event gets an `error` that names no lane, and the socket goes on.

    Source: WebSocket mode guide, "Client events".
    """
    async with server.connect() as socket:
        await socket.connection.send(message)
        frame = await socket.receive()
        assert (frame["type"], frame["status"]) == ("error", 400)
        assert (frame["error"]["code"], frame["error"]["param"]) == (code, param)
        assert "stream_id" not in frame
        await socket.completed()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model":"\xff"}', b"null", b"[" * 100_000])
async def test_bad_body_gets_400(server, body):
    """A body that is no JSON object is refused, however deep it is."""
    answer = await server.request("POST", "/v1/responses", data=body)
    assert answer.status == 400
    assert answer.json["error"]["code"] in {"invalid_json", "invalid_type"}


async def test_a_deeply_nested_message_is_refused(server):
    """Nesting beyond what the decoder takes is invalid JSON and not an accident.

    Source: guarantees, "Bad input".
    """
    async with server.connect() as socket:
        await socket.connection.send('{"type":"response.create","model":"m","input":' + "[" * 100_000)
        assert (await socket.receive())["error"]["code"] == "invalid_json"
        await socket.completed()


async def test_unknown_top_level_fields_are_tolerated(server):
    """Vendor extras such as Codex's `client_metadata` do not refuse a create.

    Source: WebSocket mode guide, "response.create".
    """
    extras = {"client_metadata": {"a": "b"}, "access_programs": {}, "nobody_knows_this": [1, {"deep": None}]}
    async with server.connect() as socket:
        await socket.completed(**extras, stream=True, background=False, stream_id=None)
    assert (await server.post(**extras)).status == 200


async def test_background_over_websocket_says_so(server):
    """`background: true` is refused over WebSocket, by name.

    Source: WebSocket mode guide, "response.create".
    """
    async with server.connect() as socket:
        frame = await socket.refused(background=True)
        assert frame["error"]["message"] == "'background' is not supported over WebSocket: use HTTP."


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (
            [{"type": "function_call_output", "call_id": "call_X", "output": "42"}],
            "No tool call found for function call output with call_id call_X.",
        ),
        (
            [
                MESSAGE,
                {"type": "function_call", "call_id": "call_X", "name": "f", "arguments": "{}"},
            ],
            "No tool output found for function call call_X.",
        ),
        (
            [{"type": "custom_tool_call_output", "call_id": "call_X", "output": "42"}],
            "No tool call found for custom tool call output with call_id call_X.",
        ),
    ],
    ids=["orphan output", "unanswered call", "orphan custom output"],
)
async def test_tool_calls_and_outputs_must_pair(server, items, message):
    """An output without its call, and a call without its output, are refused with the words that clients know.

    Source: WebSocket mode guide, "Continuing".
    """
    expected = {"message": message, "type": "invalid_request_error", "param": "input", "code": None}
    async with server.connect() as socket:
        assert (await socket.refused(input=items))["error"] == expected
    answer = await server.post(input=items)
    assert (answer.status, json.loads(answer.body)) == (400, {"error": expected})
