"""What a client may send, and how each wrong message is refused."""

from __future__ import annotations

import json
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types.responses import ResponseIncludable

from openline.protocol import steering
from openline.protocol.connection import Connection, Limits
from openline.protocol.errors import ProtocolError
from openline.protocol.events import (
    Create,
    Processed,
    Refused,
    SocketCreate,
    Steer,
    SteerRefused,
    read_client_event,
    read_http_create,
    read_input,
)


def create(**fields: Any) -> str:
    return json.dumps({"type": "response.create", **fields})


def refusal_at_once(message: str | bytes) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        read_client_event(message)
    return caught.value


def refusal_in_lane(message: str | bytes) -> Refused:
    with pytest.raises(Refused) as caught:
        read_client_event(message)
    return caught.value


# --- The order of checks


NOT_JSON = '{"type":"x","stream_id":"!","model":5'
WRONG_TYPE = '{"type":"x","stream_id":"!","model":5}'
WRONG_LANE = '{"type":"response.create","stream_id":"!","model":5}'
WRONG_FIELD = '{"type":"response.create","stream_id":"a","model":5}'


@pytest.mark.parametrize(
    ("message", "code", "param"),
    [
        (NOT_JSON, "invalid_json", None),
        (WRONG_TYPE, "unknown_event_type", "type"),
        (WRONG_LANE, "invalid_stream_id", "stream_id"),
    ],
)
def test_checks_come_in_order_and_the_first_that_fails_answers(message, code, param):
    """JSON, then `type`, then `stream_id` (WebSocket mode guide, "stream_id", order of checks)."""
    error = refusal_at_once(message)
    assert (error.code, error.param, error.status, error.stream_id) == (code, param, 400, None)


def test_the_rest_is_checked_last_and_refused_in_its_lane():
    """Once the lane is known, the refusal takes its place in it (WebSocket mode guide, "stream_id")."""
    refused = refusal_in_lane(WRONG_FIELD)
    assert (refused.stream_id, refused.error.code, refused.error.param) == ("a", "invalid_type", "model")


@pytest.mark.parametrize("place", [0, 1, 2])
def test_order_of_checks_is_not_the_order_of_keys(place):
    """JSON objects have no order (RFC 8259 §4)."""
    keys = ['"model":5', '"stream_id":"!"']
    keys.insert(place, '"type":"response.create"')
    assert refusal_at_once("{" + ",".join(keys) + "}").code == "invalid_stream_id"


@pytest.mark.parametrize(
    "message",
    ["", " ", "nope", "{", '{"type":"response.create"}x', '{"type":"response.create"', "[]", "3", '"x"', "null"],
)
def test_what_is_not_a_json_object_is_invalid_json(message):
    """Each message is one JSON object (WebSocket mode guide, "Framing")."""
    assert refusal_at_once(message).code == "invalid_json"


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity", "1e", "01", "+1", "'x'"])
@pytest.mark.parametrize("field", ["temperature", "unknown"])
def test_what_python_would_read_but_json_has_not_is_refused(field, constant):
    """NaN and its like are no JSON, in a field we do not read neither (RFC 8259 §6)."""
    assert refusal_at_once(f'{{"type":"response.create","{field}":{constant}}}').code == "invalid_json"


@pytest.mark.parametrize("value", [r'"\ud800"', r'"\udc00\ud800"', r'"\ud800x"', r'"\q"', '"a\nb"'])
@pytest.mark.parametrize("before", ['"model":', '"input":[{"type":"message","x":', '"unknown":'])
def test_lone_surrogates_and_bad_escapes_are_refused(before, value):
    """Nobody behind us could encode them, so they end here, in raw parts too (RFC 8259 §8.2)."""
    assert refusal_at_once('{"type":"response.create",' + before + value).code == "invalid_json"


@pytest.mark.parametrize("field", ["model", "unknown"])
def test_bytes_that_are_not_utf8_are_refused(field):
    """A binary message is read as UTF-8, the parts that stay raw too (WebSocket mode guide, "Framing")."""
    message = f'{{"type":"response.create","{field}":"'.encode() + b'\xff"}'
    assert refusal_at_once(message).code == "invalid_json"


def test_text_that_has_no_utf8_is_refused():
    """A `str` of Python can hold what no wire can."""
    assert refusal_at_once(create()[:-1] + ',"model":"\ud800"}').code == "invalid_json"


@pytest.mark.parametrize("depth", [10_000, 1_000_000])
@pytest.mark.parametrize("field", ["input", "text", "unknown"])
def test_deep_nesting_is_refused(field, depth):
    """Everything has a limit; the reader's is its recursion."""
    error = refusal_at_once(f'{{"type":"response.create","{field}":' + "[" * depth + "]" * depth + "}")
    assert (error.code, error.message) == ("invalid_json", "The message is nested too deeply to be read.")


@pytest.mark.parametrize("event_type", ["response.append", "response.processed.x", "Response.create", "", "x" * 10_000])
def test_unknown_type_is_refused_and_named(event_type):
    """`invalid_request_error` with `param: "type"`, and the socket stays open (WebSocket mode guide, "Client events")."""
    error = refusal_at_once(json.dumps({"type": event_type}))
    assert (error.code, error.param) == ("unknown_event_type", "type")
    assert f"'{event_type[:64]}'" in error.message
    assert len(error.message) < 150


@pytest.mark.parametrize("value", ["5", "{}", "[]", "true", "1e999", "1" * 5000])
def test_type_that_is_no_string_is_unknown(value):
    """Any other type is an unknown one (WebSocket mode guide, "Client events")."""
    assert refusal_at_once(f'{{"type":{value}}}').code == "unknown_event_type"


@pytest.mark.parametrize("message", ["{}", '{"type":null}', '{"stream_id":"!"}'])
def test_missing_type_is_named(message):
    """`param: "type"` (WebSocket mode guide, "Client events")."""
    error = refusal_at_once(message)
    assert (error.code, error.param) == ("missing_required_parameter", "type")


@pytest.mark.parametrize("stream_id", ["", "a b", "ä", "a\n", "a" * 257, 5, ["a"], True, {}, "a/b", '"', "\x00"])
def test_bad_stream_id_is_refused_without_naming_a_lane(stream_id):
    """1 to 256 of `[A-Za-z0-9_.-]`; the frame is the documented one, without `stream_id`.

    Source: WebSocket mode guide, "stream_id" and "Errors to handle".
    """
    message = (
        "The 'stream_id' field must be a non-empty string with at most 256 characters and may only contain letters, numbers, "
        "underscores, hyphens, and periods."
    )
    error = {"type": "invalid_request_error", "code": "invalid_stream_id", "message": message, "param": "stream_id"}
    frame = refusal_at_once(create(stream_id=stream_id)).frame()
    assert frame == {"type": "error", "status": 400, "error": error}


@pytest.mark.parametrize("stream_id", ["a", "A.b-c_9", "-", "a" * 256])
def test_stream_id_names_the_lane(stream_id):
    """1 to 256 of `[A-Za-z0-9_.-]` (WebSocket mode guide, "stream_id")."""
    assert read_client_event(create(stream_id=stream_id)).stream_id == stream_id


# --- What is tolerated


NULLABLE = [field for field in SocketCreate.__struct_fields__ if field != "stream"]


@pytest.mark.parametrize("field", NULLABLE)
def test_null_is_as_if_left_out(field):
    """`null` means omitted, for every field (Responses API reference, "Create a response")."""
    assert read_client_event(create(**{field: None})) == read_client_event(create())
    assert getattr(read_client_event(create()), field) is None


def test_defaults_are_openais():
    """A bare create generates and stores, on the default lane (Responses API reference, "Create a response")."""
    bare = read_client_event(create())
    assert (bare.generates, bare.stores, bare.stream_id) == (True, True, None)


@pytest.mark.parametrize("value", [True, False, None, "yes", 1, {}, []])
def test_stream_has_no_meaning_on_a_socket(value):
    """Codex and the Agents SDKs always send it: any value is accepted (WebSocket mode guide, "response.create")."""
    assert isinstance(read_client_event(create(stream=value)), SocketCreate)


@pytest.mark.parametrize(
    "fields",
    [
        {"client_metadata": {"x-codex-window-id": "w"}},
        {"access_programs": [], "image": {}, "moderation": None},
        {"stream_options": {"include_obfuscation": False, "other": 1}},
        {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}},
        {"vendor:field": [{"deep": {"er": 1}}], "": ""},
        {"reasoning": None, "input": [], "background": False, "multi_agent": {"enabled": False}},
    ],
)
def test_unknown_and_harmless_fields_are_tolerated(fields):
    """Unknown top-level fields are ignored (Responses API reference, "Create a response")."""
    assert isinstance(read_client_event(create(**fields)), SocketCreate)


@pytest.mark.parametrize("fields", [{}, {"response_id": "resp_1"}, {"response_id": 5, "stream_id": "!"}])
def test_codex_acknowledgement_is_accepted(fields):
    """`response.processed` is answered by nothing (WebSocket mode guide, "Client events")."""
    assert read_client_event(json.dumps({"type": "response.processed", **fields})) == Processed()


def test_binary_message_is_read_as_text_is():
    """UTF-8 JSON in a binary message is accepted (WebSocket mode guide, "Framing")."""
    text = create(model="modèle", stream_id="a")
    assert read_client_event(text.encode()) == read_client_event(text)


@pytest.mark.parametrize(
    ("fields", "generates"),
    [
        ({"generate": False}, False),
        ({"generate": True}, True),
        ({"prompt_cache_options": {"prewarm": True}}, False),
        ({"prompt_cache_options": {"prewarm": True}, "generate": True}, False),
        ({"prompt_cache_options": {"prewarm": False}}, True),
        ({"prompt_cache_options": {}}, True),
    ],
)
def test_warm_up_is_asked_for_in_two_ways(fields, generates):
    """`generate: false`, or `prompt_cache_options.prewarm` (WebSocket mode guide, "Warm-up")."""
    assert read_client_event(create(**fields)).generates is generates


# --- What is refused in its lane


WRONG = [
    ({"model": 5}, "invalid_type", "model"),
    ({"input": 5}, "invalid_type", "input"),
    ({"input": {}}, "invalid_type", "input"),
    ({"tools": {}}, "invalid_type", "tools"),
    ({"tool_choice": 1}, "invalid_type", "tool_choice"),
    ({"store": "true"}, "invalid_type", "store"),
    ({"generate": 0}, "invalid_type", "generate"),
    ({"previous_response_id": 1}, "invalid_type", "previous_response_id"),
    ({"include": ["reasoning.encrypted_content", 5]}, "invalid_type", "include[1]"),
    ({"include": ["a"]}, "invalid_value", "include[0]"),
    ({"text": "json"}, "invalid_type", "text"),
    ({"temperature": "hot"}, "invalid_type", "temperature"),
    ({"temperature": 2.1}, "invalid_value", "temperature"),
    ({"top_p": -0.1}, "invalid_value", "top_p"),
    ({"top_logprobs": 21}, "invalid_value", "top_logprobs"),
    ({"top_logprobs": 1.5}, "invalid_type", "top_logprobs"),
    ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    ({"truncation": "some"}, "invalid_value", "truncation"),
    ({"prompt_cache_options": {"prewarm": 1}}, "invalid_type", "prompt_cache_options.prewarm"),
    ({"stream_options": {"include_obfuscation": "no"}}, "invalid_type", "stream_options.include_obfuscation"),
    ({"metadata": []}, "invalid_type", "metadata"),
    ({"metadata": {"k": 5}}, "invalid_type", "metadata[*]"),
    ({"metadata": {"k": None}}, "invalid_type", "metadata[*]"),
    ({"metadata": {"k" * 65: "v"}}, "invalid_value", "metadata"),
    ({"metadata": {"k": "v" * 513}}, "invalid_value", "metadata[*]"),
    ({"metadata": {str(n): "" for n in range(17)}}, "invalid_value", "metadata"),
    ({"conversation": 5}, "invalid_type", "conversation"),
    ({"conversation": {}}, "missing_required_parameter", "conversation.id"),
    ({"conversation": "conv_1", "previous_response_id": "resp_1"}, "invalid_request", "previous_response_id"),
    ({"prompt": {"id": "pmpt_1"}}, "unsupported_parameter", "prompt"),
    ({"multi_agent": {"enabled": True}}, "unsupported_parameter", "multi_agent"),
]


@pytest.mark.parametrize(("fields", "code", "param"), WRONG)
def test_wrong_field_is_named_and_refused_in_its_lane(fields, code, param):
    """`param` is the field's path, the status 400 (Responses API reference, "Errors")."""
    refused = refusal_in_lane(create(stream_id="a", **{"previous_response_id": "resp_0", **fields}))
    assert (refused.error.code, refused.error.param, refused.error.status) == (code, param, 400)
    assert refused.stream_id == "a"
    assert f"'{param}'" in str(refused)


@pytest.mark.parametrize(("fields", "code", "param"), WRONG)
def test_wrong_field_is_named_over_http_too(fields, code, param):
    """One body, two transports, the same refusals (Responses API reference, "Create a response")."""
    with pytest.raises(ProtocolError) as caught:
        read_http_create(json.dumps(fields).encode())
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {f"{n:064}": "v" * 512 for n in range(16)}},
        {"temperature": 0, "top_p": 1, "top_logprobs": 20, "max_output_tokens": 1},
        {"temperature": 2, "truncation": "auto"},
    ],
)
def test_value_at_its_limit_is_accepted(fields):
    """Limits include their bound (Responses API reference, "Create a response")."""
    assert isinstance(read_client_event(create(**fields)), SocketCreate)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" * 400])
def test_number_out_of_range_is_a_wrong_value_of_its_field(number):
    """It is JSON, but no value that the field can have (RFC 8259 §6)."""
    refused = refusal_in_lane(f'{{"type":"response.create","temperature":{number}}}')
    assert (refused.error.code, refused.error.param) == ("invalid_value", "temperature")


@pytest.mark.parametrize(("parent", "known"), [("resp_0", "resp_0"), (None, None), (5, None), ([], None)])
def test_refusal_tells_the_parent_it_named(parent, known):
    """A same-lane continuation that fails evicts its parent (WebSocket mode guide, "Continuation")."""
    refused = refusal_in_lane(create(previous_response_id=parent, model=5))
    assert refused.previous_response_id == known


def test_unsupported_field_tells_the_parent_too():
    """The same for a create that is well formed but asks too much (WebSocket mode guide, "Continuation")."""
    refused = refusal_in_lane(create(previous_response_id="resp_0", background=True))
    assert (refused.previous_response_id, refused.stream_id) == ("resp_0", None)


# --- Steering, cancelling, injecting


def client_event(kind: str, **fields: Any) -> Any:
    return read_client_event(json.dumps({"type": f"response.{kind}", **fields}))


def steer_refusal(**fields: Any) -> SteerRefused:
    with pytest.raises(SteerRefused) as caught:
        client_event("steer", **fields)
    return caught.value


def test_steer_has_three_keys_and_its_input_stays_as_it_came():
    """`type`, `previous_response_id` and `input` (Mid-turn steering guide, "response.steer")."""
    steer = read_client_event('{"type":"response.steer","previous_response_id":"resp_1","input": [ {"a":1} ]}')
    assert isinstance(steer, Steer)
    assert (steer.previous_response_id, bytes(steer.input)) == ("resp_1", b'[ {"a":1} ]')


@pytest.mark.parametrize(
    "extra",
    [{"stream_id": "a"}, {"stream_id": None}, {"model": "m"}, {"metadata": {}}, {"response_id": "resp_1"}],
    ids=lambda extra: next(iter(extra)),
)
def test_steer_with_a_key_of_its_own_is_refused_with_its_input(extra):
    """The lane is the target's, so even its name is refused (Mid-turn steering guide, "response.steer")."""
    refused = steer_refusal(previous_response_id="resp_1", input=["x"], **extra)
    assert (refused.code, refused.steer.previous_response_id) == ("invalid_input", "resp_1")
    assert json.loads(bytes(refused.steer.input)) == ["x"]
    assert next(iter(extra)) in refused.message


def test_refused_steer_without_an_input_gives_null_back():
    """There is nothing else to give (Mid-turn steering guide, "response.steer.failed")."""
    assert bytes(steer_refusal(previous_response_id="resp_1", more=1).steer.input) == b"null"


@pytest.mark.parametrize("target", [{}, {"previous_response_id": None}, {"previous_response_id": 7}])
@pytest.mark.parametrize("extra", [{}, {"stream_id": "a"}])
def test_steer_without_a_target_is_an_error(target, extra):
    """An event about a response has to name one (Mid-turn steering guide, "response.steer.failed")."""
    error = refusal_at_once(json.dumps({"type": "response.steer", "input": "x", **target, **extra}))
    assert (error.code, error.param) == ("missing_required_parameter", "previous_response_id")


def test_message_of_a_refused_steer_is_bounded():
    """A key is the client's, and may be long."""
    assert len(steer_refusal(previous_response_id="resp_1", input="x", **{"k" * 50_000: 1}).message) <= 1000


@pytest.mark.parametrize(
    ("fields", "response_id"), [({}, None), ({"response_id": None}, None), ({"response_id": "resp_1"}, "resp_1")]
)
def test_cancel_may_name_its_response(fields, response_id):
    """Without an id it is what the default lane is at; other keys are ignored (WebSocket mode guide, "Cancelling")."""
    assert client_event("cancel", **fields, event_id="e").response_id == response_id


def test_inject_keeps_its_input():
    """To give it back (WebSocket mode guide, "response.inject")."""
    inject = client_event("inject", response_id="resp_1", input=[{"type": "x"}])
    assert (inject.response_id, json.loads(bytes(inject.input))) == ("resp_1", [{"type": "x"}])


@pytest.mark.parametrize("kind", ["cancel", "inject"])
@pytest.mark.parametrize("value", [7, True, [], {}])
def test_id_of_a_wrong_type_is_an_error_that_names_it(kind, value):
    """No lane can be told by it (Responses API reference, "Errors")."""
    error = refusal_at_once(json.dumps({"type": f"response.{kind}", "response_id": value}))
    assert (error.code, error.param, error.status) == ("invalid_type", "response_id", 400)


@pytest.mark.parametrize("kind", ["steer", "cancel", "inject"])
@pytest.mark.parametrize("message", ['{"type":"response.%s","a":}', '{"type":"response.%s"', "[%s]"])
def test_message_that_is_no_json_is_told_so_whatever_it_wants(kind, message):
    """JSON comes first (WebSocket mode guide, "stream_id", order of checks)."""
    assert refusal_at_once(message % kind).code == "invalid_json"


# --- Over HTTP


def test_http_body_is_a_create_with_stream():
    """`stream` has its meaning there, `type` and `stream_id` have none (Responses API reference, "Create a response")."""
    body = read_http_create(b'{"model":"m","stream":true,"type":"x","stream_id":"!"}')
    assert (body.model, body.stream) == ("m", True)


@pytest.mark.parametrize(
    ("value", "named"), [("conv_1", "conv_1"), ({"id": "conv_1"}, "conv_1"), ({"id": "c", "x": 1}, "c"), (None, None)]
)
def test_a_conversation_is_named_by_a_text_or_an_object(value, named):
    """A string or `{id}`, over both transports (Responses API reference, "Create a response", `conversation`)."""
    for read in (
        read_http_create(json.dumps({"conversation": value}).encode()),
        read_client_event(create(conversation=value)),
    ):
        assert read.conversation_id == named


def test_a_conversation_does_not_stand_beside_a_parent():
    """One of them says what came before (Responses API reference, "Create a response", `previous_response_id`)."""
    body = json.dumps({"conversation": {"id": "conv_1"}, "previous_response_id": "resp_1"}).encode()
    with pytest.raises(ProtocolError) as caught:
        read_http_create(body)
    assert (caught.value.code, caught.value.param) == ("invalid_request", "previous_response_id")
    for nothing in ({"conversation": None}, {"previous_response_id": None}):
        assert read_http_create(json.dumps({**json.loads(body), **nothing}).encode())


@pytest.mark.parametrize("background", [True, False, None])
def test_background_is_for_http(background):
    """Accepted over HTTP; over WebSocket it is refused by name (Background mode guide; WebSocket mode guide, "response.create")."""
    assert read_http_create(json.dumps({"background": background}).encode()).background is background
    if background:
        error = refusal_in_lane(create(background=True)).error
        assert (error.code, error.param, error.status) == ("unsupported_parameter", "background", 400)
    else:
        assert isinstance(read_client_event(create(background=background)), SocketCreate)


def test_what_may_be_included_is_what_the_reference_lists():
    """Every documented value, and the one of our own (Responses API reference, "Create a response", `include`)."""
    values = [*get_args(ResponseIncludable), "openline.timings"]
    assert read_http_create(json.dumps({"include": values}).encode()).include == values
    for value in ("", "everything", "Reasoning.encrypted_content", "reasoning"):
        with pytest.raises(ProtocolError) as caught:
            read_http_create(json.dumps({"include": [values[0], value]}).encode())
        assert (caught.value.code, caught.value.param, caught.value.status) == ("invalid_value", "include[1]", 400)


@pytest.mark.parametrize("key", ["k", "a b", "!~", "9f6c/2=1", "x" * 255])
def test_an_idempotency_key_is_what_a_header_can_hold(key):
    """From the socket, from the body, from the header, or from both where they agree (docs/adr/0009)."""
    body = json.dumps({"idempotency_key": key}).encode()
    for read in (
        read_client_event(create(idempotency_key=key)),
        read_http_create(body),
        read_http_create(b"{}", key),
        read_http_create(body, key),
    ):
        assert read.idempotency_key == key


@pytest.mark.parametrize("key", ["", " k", "k ", "a\tb", "a\n", "a\0", "ké", "\x7f", "x" * 256])
def test_any_other_key_is_refused(key):
    """It says what is expected, and does not repeat what came (docs/adr/0009)."""
    errors = [refusal_in_lane(create(idempotency_key=key)).error]
    for body, header in ((json.dumps({"idempotency_key": key}).encode(), None), (b"{}", key)):
        with pytest.raises(ProtocolError) as caught:
            read_http_create(body, header)
        errors.append(caught.value)
    assert {(error.code, error.param, error.status) for error in errors} == {("invalid_value", "idempotency_key", 400)}
    assert len({error.message for error in errors}) == 1


def test_two_different_keys_are_refused():
    """Nobody knows which of them is meant (docs/adr/0009)."""
    with pytest.raises(ProtocolError) as caught:
        read_http_create(b'{"idempotency_key":"a"}', "b")
    assert (caught.value.code, caught.value.param) == ("invalid_value", "idempotency_key")


@pytest.mark.parametrize("number", [0, 7, 2**70])
def test_a_place_in_a_turn_stands_beside_its_key(number):
    """Any number from 0 on; left out it is the beginning (docs/adr/0009)."""
    assert read_client_event(create(idempotency_key="k", starting_after=number)).starting_after == number
    assert read_http_create(json.dumps({"starting_after": number}).encode(), "k").starting_after == number
    error = refusal_in_lane(create(starting_after=number)).error
    assert (error.code, error.param) == ("invalid_value", "starting_after")
    assert "idempotency_key" in error.message


@pytest.mark.parametrize(("number", "code"), [(-1, "invalid_value"), (1.5, "invalid_type"), ("1", "invalid_type")])
def test_a_place_is_a_whole_number(number, code):
    """Checked as every other field is (Responses API reference, "Errors")."""
    error = refusal_in_lane(create(idempotency_key="k", starting_after=number)).error
    assert (error.code, error.param) == (code, "starting_after")


@pytest.mark.parametrize(
    "body",
    [b"", b"nope", b'{"model":"\xff"}', b'{"unknown":"\xff"}', b'{"input":' + b"[" * 10**5 + b"]" * 10**5 + b"}"],
)
def test_http_body_that_is_not_json_is_refused(body):
    """Malformed JSON is a 400 (Responses API reference, "Errors")."""
    with pytest.raises(ProtocolError) as caught:
        read_http_create(body)
    assert caught.value.code == "invalid_json"


def test_http_body_that_is_no_object_is_refused():
    """There is no field to name then (Responses API reference, "Errors")."""
    with pytest.raises(ProtocolError) as caught:
        read_http_create(b"[]")
    assert (caught.value.code, caught.value.param) == ("invalid_type", None)


# --- Input


def test_string_input_is_one_user_message():
    """A string stands for one user message (Responses API reference, "Create a response")."""
    (item,) = read_input(Create(input="hi"))
    assert json.loads(item.raw) == {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": "hi"}],
    }


@pytest.mark.parametrize("fields", [{}, {"input": None}, {"input": []}])
def test_input_may_be_empty(fields):
    """After a warm-up Codex sends `input: []` (WebSocket mode guide, "response.create")."""
    assert read_input(read_client_event(create(**fields))) == []


def test_items_stay_the_bytes_they_came_as():
    """Nothing is encoded again that we do not read (Responses API reference, "Items")."""
    raw = '{"role" : "user",  "content":"\\u00e4 ä"}'
    (item,) = read_input(read_client_event(f'{{"type":"response.create","input":[ {raw} ]}}'))
    assert item.raw == raw.encode()


@pytest.mark.parametrize(
    ("items", "code", "param"),
    [
        ([{"role": "user"}, 1], "invalid_type", "input[1]"),
        ([{}], "missing_required_parameter", "input[0].type"),
        ([{"role": "user"}, {"type": 5}], "invalid_type", "input[1].type"),
    ],
)
def test_bad_item_is_named_by_its_place(items, code, param):
    """`param` is a path such as `input[0].content` (Responses API reference, "Errors")."""
    with pytest.raises(ProtocolError) as caught:
        read_input(read_client_event(create(input=items)))
    assert (caught.value.code, caught.value.param) == (code, param)


# --- Anything at all


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_frames = st.dictionaries(st.sampled_from([*SocketCreate.__struct_fields__, "x"]), _json, max_size=6).map(
    lambda fields: {"type": "response.create", **fields}
)
_others = st.builds(
    lambda kind, fields: {"type": f"response.{kind}", **fields},
    st.sampled_from(["steer", "cancel", "inject", "processed"]),
    st.dictionaries(st.sampled_from(["previous_response_id", "response_id", "input", "stream_id"]), _json, max_size=3),
)
_messages = st.one_of(
    st.text(),
    st.binary(),
    _json.map(json.dumps),
    _frames.map(json.dumps),
    _others.map(json.dumps),
    _frames.map(lambda frame: json.dumps(frame, ensure_ascii=False).encode("utf-8", "surrogatepass")),
    st.tuples(_frames.map(json.dumps), st.integers(0, 80)).map(lambda cut: cut[0][: cut[1]]),
)


@given(st.lists(_messages, max_size=4))
@example(["\ud800"])
@example(['{"type":"response.create","model":' + "1" * 5000 + "}"])
def test_no_message_breaks_the_connection(messages):
    """Whatever comes, the answer is an error with its code, and the socket stays usable (WebSocket mode guide, "Failure matrix")."""
    connection = Connection(Limits())
    answers: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    for message in messages:
        try:
            connection.receive(message)
        except ProtocolError as error:
            answers.append(error.frame())
        except SteerRefused as refused:
            failed.append(json.loads(msgspec.json.encode(steering.failed(refused))))
        while (turn := connection.next_turn()) is not None:
            if isinstance(turn, Refused):
                answers.append(turn.error.frame(turn.stream_id))
            else:
                connection.end_turn(turn.create.stream_id)
    assert {answer["status"] for answer in answers} <= {400}
    assert {answer["error"]["code"] for answer in failed} <= {"invalid_input"}
    connection.receive(create(model="m", stream_id="still-usable"))
    assert connection.next_turn().create.model == "m"


@given(st.one_of(st.binary(), _json.map(json.dumps).map(str.encode), _frames.map(json.dumps).map(str.encode)))
def test_no_http_body_raises_anything_but_a_protocol_error(body):
    """Whatever comes, the answer is the envelope with a 4xx (Responses API reference, "Errors")."""
    statuses: list[int] = []
    try:
        read_input(read_http_create(body))
    except ProtocolError as error:
        statuses.append(error.status)
    assert set(statuses) <= {400}
