"""The scripted engine: deterministic, by rule or out of a transcript."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.config import ConfigError, UpstreamSettings
from openline.engines.engine import EngineRequest
from openline.engines.scripted import ScriptedEngine, SeenProjection, example
from openline.protocol.deltas import CallDelta, CallStarted, Ended, TextDelta, UpstreamEvent, Usage
from openline.protocol.errors import ProtocolError
from openline.protocol.events import Create, SocketCreate, read_input
from openline.protocol.items import Item
from openline.protocol.transcript import Line, write_line
from openline.state.context import EMPTY

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
PATCH = {"type": "custom", "name": "apply_patch"}
USER = {"type": "message", "role": "user", "content": "Hello."}


def engine(**settings):
    return ScriptedEngine(UpstreamSettings(kind="scripted", **settings))


def request(model, *items, **fields):
    body = msgspec.json.encode({"model": model, "input": list(items or [USER]), **fields})
    create = msgspec.json.decode(body, type=Create)
    return EngineRequest(create, body, EMPTY.extend(read_input(create)), model)


async def play(engine, *args, **fields):
    """Every delta of a turn, and the batches they came in."""
    return [delta async for batch in engine.prepare(request(*args, **fields)).stream() for delta in batch]


def call_and_output(number, output="sunny"):
    call_id = f"call_{number}"
    return [
        {"type": "function_call", "call_id": call_id, "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": call_id, "output": output},
    ]


# --- By rule ---------------------------------------------------------------------------------------


async def test_text_is_the_same_every_time():
    """`scripted-text` says the same to the same context, with usage and an end."""
    first, second = [await play(engine(), "scripted-text") for _ in range(2)]
    assert first == second
    assert all(isinstance(delta, TextDelta) for delta in first[:-2])
    assert isinstance(first[-2], Usage)
    assert first[-1] == Ended()


async def test_tools_are_called_so_many_times_and_then_it_answers():
    """`scripted-tools-N` calls until the context holds N calls, each with other arguments; then it quotes the last output."""
    items, calls = [USER], []
    for number in range(3):
        deltas = await play(engine(), "scripted-tools-3", *items, tools=[WEATHER])
        assert isinstance(deltas[0], CallStarted)
        arguments = "".join(delta.text for delta in deltas if isinstance(delta, CallDelta))
        calls.append((deltas[0].call_id, msgspec.json.decode(arguments)))
        items += call_and_output(number, output=f"output {number}")
    assert len({call_id for call_id, _ in calls}) == len({repr(arguments) for _, arguments in calls}) == 3
    assert all(arguments.keys() == {"city"} for _, arguments in calls)
    text = "".join(delta.text for delta in (await play(engine(), "scripted-tools-3", *items, tools=[WEATHER]))[:-2])
    assert text == "Done after 3 tool calls. The last tool said: output 2"


async def test_a_custom_tool_gets_free_text():
    """A custom tool's call has input, not arguments; tools take turns."""
    deltas = await play(engine(), "scripted-tools-3", tools=[PATCH])
    assert deltas[0] == CallStarted("custom_tool_call", "call_0001", "apply_patch")
    second = await play(engine(), "scripted-tools-3", USER, *call_and_output(1), tools=[PATCH, WEATHER])
    assert second[0] == CallStarted("function_call", "call_0002", "get_weather")


@pytest.mark.parametrize("parameters", [None, {}, {"type": "object"}, {"type": "object", "properties": {}}])
async def test_a_tool_without_parameters_gets_an_empty_object(parameters):
    """Arguments are a JSON object, whatever a tool leaves out."""
    deltas = await play(
        engine(), "scripted-tools-3", tools=[{"type": "function", "name": "now", "parameters": parameters}]
    )
    assert "".join(delta.text for delta in deltas if isinstance(delta, CallDelta)) == "{}"


@pytest.mark.parametrize(
    "fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [{"type": "web_search"}]}]
)
async def test_without_a_tool_to_call_it_answers(fields):
    """No tool offered, none allowed, or none that a client runs."""
    assert isinstance((await play(engine(), "scripted-tools-20", **fields))[0], TextDelta)


async def test_an_unknown_script_is_no_model():
    """The error names the models that there are."""
    for model in ("gpt-5", "scripted-play", "scripted-tools-", "scripted-tools-99999"):
        with pytest.raises(ProtocolError, match="scripted-text") as raised:
            engine().prepare(request(model))
        assert (raised.value.code, raised.value.param) == ("model_not_found", "model")


async def test_usage_grows_with_the_context():
    """A longer context has more input tokens, as a model's would."""
    short, long = [
        next(delta for delta in deltas if isinstance(delta, Usage))
        for deltas in (await play(engine(), "scripted-text"), await play(engine(), "scripted-text", *[USER] * 9))
    ]
    assert short.input_tokens < long.input_tokens


async def test_delays_are_kept():
    """The time before the first delta and between deltas is what was set."""
    started = time.monotonic()
    deltas = await play(engine(first_delta_seconds=0.02, delta_seconds=0.001), "scripted-text")
    assert time.monotonic() - started >= 0.02 + 0.001 * (len(deltas) - 2)


async def test_accepting_comes_before_any_delay():
    """The upstream's acceptance is an empty batch, at once."""
    stream = engine(first_delta_seconds=60).prepare(request("scripted-text")).stream()
    assert await asyncio.wait_for(anext(stream), 1) == []
    await stream.aclose()


def test_models_are_listed():
    """`scripted-play` is a model only where there is something to play."""
    ids = [model.id for model in asyncio.run(engine().models())]
    assert ids == ["scripted-text", "scripted-tools-3", "scripted-tools-20"]


ITEMS = st.lists(
    st.sampled_from(
        [
            Item(b'{"type":"message","role":"user","content":"x"}', "message"),
            Item(b'{"role":"assistant","content":"x"}', "message"),
            Item(b'{"type":"function_call","call_id":"c"}', "function_call", "c"),
            Item(b'{"type":"function_call_output","call_id":"c","output":"o"}', "function_call_output", "c"),
            Item(b'{"type":"reasoning"}', "reasoning"),
        ]
    ),
    max_size=12,
)


@given(ITEMS, ITEMS)
def test_what_it_sees_of_a_context_is_a_fold(one, two):
    """Two increments are seen as their sum is, so a chain plays as a full resend does.

    Source: design, "A context is a tree of immutable nodes".
    """
    seen = SeenProjection()
    assert seen.extend(seen.extend(seen.start(), one), two) == seen.extend(seen.start(), one + two)


# --- Arguments out of a JSON schema ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, "item-07"),
        ({}, "item-07"),
        ({"const": [1]}, [1]),
        ({"enum": ["a", "b", "c"]}, "b"),
        ({"type": "integer"}, 7),
        ({"type": "integer", "minimum": 100}, 100),
        ({"type": "integer", "maximum": 5}, 5),
        ({"type": "boolean"}, True),
        ({"type": "null"}, None),
        ({"type": ["string", "null"]}, "item-07"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, 7),
        ({"type": "array", "items": {"type": "integer"}}, [7]),
        ({"type": "array", "minItems": 3}, ["item-07", "item-08", "item-09"]),
        ({"properties": {"a": {"type": "null"}}}, {"a": None}),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"]}, {"b": "item-07"}),
        ({"type": "object", "properties": {"a": True}}, {"a": "item-07"}),
    ],
    ids=str,
)
def test_an_example_is_what_its_schema_accepts(schema, expected):
    """A value for each kind of schema, made from the call's number."""
    assert example(schema, 7) == expected


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 10**9},
        {"type": "integer", "minimum": "none"},
        {"type": "array", "items": [{"type": "integer"}]},
        {"type": "object", "properties": {"a": 5}, "required": "a"},
        {"anyOf": [True]},
        {"type": 5},
        {"type": []},
        {"enum": "abc"},
    ],
    ids=str,
)
def test_an_odd_schema_still_gives_some_json(schema):
    """What a client sends as a schema is not checked, so it must neither break the engine nor cost it its memory."""
    assert len(msgspec.json.encode(example(schema, 1))) < 10_000


async def test_a_tool_that_cannot_be_read_is_the_clients_mistake():
    """A tool whose fields have wrong types is refused by name."""
    tools = [WEATHER, {"type": "function", "name": 5}]
    with pytest.raises(ProtocolError) as raised:
        engine().prepare(request("scripted-tools-3", tools=tools))
    assert (raised.value.status, raised.value.param) == (400, "tools[1].name")


# --- Out of a transcript -------------------------------------------------------------------------------


def created(number):
    return {"type": "response.created", "sequence_number": 0, "response": {"id": f"resp_{number}"}}


def completed(number):
    return {
        "type": "response.completed",
        "sequence_number": 1,
        "response": {"id": f"resp_{number}", "status": "completed"},
    }


def create(**fields):
    return {"type": "response.create", "model": "m", "input": "x", **fields}


@pytest.fixture
def recorded(tmp_path):
    """An engine that plays these turns: each a create and the frames that answered it."""
    path = tmp_path / "talk.jsonl"

    def record(*turns, **settings):
        lines = [
            write_line(Line(0.0, direction, frame))
            for asked, *frames in turns
            for direction, frame in [(">", asked), *(("<", frame) for frame in frames)]
        ]
        path.write_text("\n".join(lines), encoding="utf-8")
        return engine(url=str(path), **settings)

    return record


ANSWER = {"type": "message", "role": "assistant", "content": "x"}


async def test_the_kth_turn_is_answered_by_the_kth_recorded_one(recorded):
    """Which turn it is follows from the context, so it plays the same over any transport, chained or resent."""
    player = recorded((create(), created(1), completed(1)), (create(), created(2), completed(2)))
    for items, number in [([USER], 1), ([USER, USER], 1), ([USER, ANSWER, USER], 2)]:
        deltas = await play(player, "scripted-play", *items)
        assert deltas == [UpstreamEvent(created(number)), UpstreamEvent(completed(number))]
    with pytest.raises(ProtocolError, match="The transcript has 2 turns: this is turn 3"):
        player.prepare(request("scripted-play", USER, ANSWER, USER, ANSWER, USER))
    assert "scripted-play" in [model.id for model in await player.models()]


def on_lane(lane, number, **fields):
    """A recorded turn of a named lane."""
    return tuple({**frame, "stream_id": lane} for frame in (create(**fields), created(number), completed(number)))


async def answer_on(lane, player, *items):
    """The id of the recorded response that this lane's client gets."""
    asked = request("scripted-play", *items)
    asked = msgspec.structs.replace(asked, create=SocketCreate(model="scripted-play", stream_id=lane))
    (first, *_), *_ = [batch async for batch in player.prepare(asked).stream() if batch]
    return first.event["response"]["id"]


async def test_a_lane_is_answered_by_its_own_turns(recorded):
    """Conversations on two lanes are told apart, and a fork goes on from the turn of the other lane that it continues."""
    player = recorded(
        on_lane("a", 1),
        on_lane("b", 2),
        on_lane("c", 3, previous_response_id="resp_1"),
        on_lane("a", 4, previous_response_id="resp_1"),
    )
    again = (USER, ANSWER, USER)
    for lane, items, number in [("b", [USER], 2), ("a", [USER], 1), ("a", again, 4), ("c", again, 3)]:
        assert await answer_on(lane, player, *items) == f"resp_{number}"
    with pytest.raises(ProtocolError, match="The transcript has 1 turns on lane 'b': this is turn 2"):
        await answer_on("b", player, *again)


async def test_a_refusal_and_a_warm_up_are_no_turns_of_their_conversation(recorded):
    """What comes behind them on a lane, or continues a warm-up on another, counts on from the turn before."""
    error = {"type": "error", "status": 400, "error": {"code": "previous_response_not_found", "message": "No."}}
    player = recorded(
        (create(), created(1), completed(1)),
        (create(previous_response_id="resp_x"), error),
        (create(generate=False, previous_response_id="resp_1"), created(2), completed(2)),
        on_lane("c", 3, previous_response_id="resp_2", input=[]),
        (create(previous_response_id="resp_2"), created(4), completed(4)),
    )
    for lane, number in [("c", 3), (None, 4)]:
        assert await answer_on(lane, player, USER, ANSWER, USER) == f"resp_{number}"


@pytest.mark.parametrize("kind", ["web_search_call", "mcp_list_tools", "mcp_approval_request", "compaction", "new"])
async def test_a_hosted_tools_items_begin_no_turn(recorded, kind):
    """Only what the client says begins one: what else stands in a context is the model's, known or not."""
    player = recorded((create(), created(1), completed(1)), (create(), created(2), completed(2)))
    reasoning, approval = {"type": "reasoning"}, {"type": "mcp_approval_response", "approve": True}
    context = (USER, reasoning, {"type": kind}, ANSWER, approval)
    assert (await play(player, "scripted-play", *context))[0] == UpstreamEvent(created(2))


async def test_turns_that_no_engine_answered_are_not_played(recorded):
    """Warm-ups and the server's own refusals are the server's to make again."""
    error = {"type": "error", "status": 400, "error": {"code": "previous_response_not_found", "message": "No."}}
    orphan = {"type": "error", "status": 400, "error": {"code": None, "message": "No tool call found."}}
    player = recorded(
        (create(generate=False), created(1), completed(1)),
        (create(prompt_cache_options={"prewarm": True}), created(2), completed(2)),
        (create(previous_response_id="resp_x"), error),
        (create(), orphan),
        (create(), created(5), completed(5)),
    )
    assert (await play(player, "scripted-play"))[0] == UpstreamEvent(created(5))


async def test_a_recorded_refusal_is_made_again(recorded):
    """An upstream's refusal comes before it accepts, with its code, param and headers."""
    headers = {"retry-after": "7"}
    error = {"code": "rate_limit_exceeded", "message": "Not now.", "param": "input", "headers": headers}
    player = recorded((create(), {"type": "error", "status": 429, "error": error, "headers": headers}))
    with pytest.raises(ProtocolError) as raised:
        await play(player, "scripted-play")
    assert raised.value.frame() == {
        "type": "error",
        "status": 429,
        "headers": headers,
        "error": {**error, "type": "rate_limit_error"},
    }


async def test_a_recorded_failure_is_made_again(recorded):
    """An upstream's failure comes after it accepted, where it came in the recording."""
    failed = {"type": "response.failed", "response": {"error": {"code": "upstream_error", "message": "Gone."}}}
    stream = recorded((create(), created(1), failed)).prepare(request("scripted-play")).stream()
    assert await anext(stream) == []
    assert await anext(stream) == [UpstreamEvent(created(1))]
    with pytest.raises(ProtocolError, match="Gone"):
        await anext(stream)


MESSAGE = {"type": "message", "id": "msg_1", "status": "in_progress", "role": "assistant", "content": []}


def added(**item):
    return {"type": "response.output_item.added", "output_index": 0, "item": {**MESSAGE, **item}}


def done(**item):
    return {"type": "response.output_item.done", "output_index": 0, "item": {**MESSAGE, **item}}


def incomplete(reason):
    response = {"id": "resp_1", "status": "incomplete", "incomplete_details": {"reason": reason}}
    return {"type": "response.incomplete", "response": response}


DELTA = {"type": "response.output_text.delta", "output_index": 0, "content_index": 0, "delta": "x"}
TEXT_DONE = {"type": "response.output_text.done", "output_index": 0, "content_index": 0, "text": "x"}
FAILED = {"type": "response.failed", "response": {"error": {"code": "upstream_error", "message": "Gone."}}}


def events(*frames):
    return [UpstreamEvent(frame) for frame in frames]


@pytest.mark.parametrize("reason", ["cancelled", "steered"])
async def test_what_a_client_has_ended_goes_on_until_it_does_so_again(recorded, reason):
    """The server makes that end by itself; a client that does not gets a timeout instead, in the end."""
    player = recorded((create(), created(1), incomplete(reason)), idle_seconds_max=0.001)
    stream = player.prepare(request("scripted-play")).stream()
    assert [await anext(stream), await anext(stream)] == [[], events(created(1))]
    with pytest.raises(ProtocolError, match="ended this response") as raised:
        await anext(stream)
    assert raised.value.code == "upstream_timeout"


@pytest.mark.parametrize("end", [incomplete("max_output_tokens"), incomplete("cancelled"), FAILED], ids=str)
async def test_what_closes_a_cut_item_is_not_played(recorded, end):
    """The server makes it by itself; of what was whole before, the upstream has said the end."""
    whole = {"type": "reasoning", "id": "rs_1"}
    before = (created(1), added(), done(status="completed"), {**added(), "item": whole}, {**done(), "item": whole})
    cut = (TEXT_DONE, done(status="incomplete"))
    player = recorded((create(), *before, added(), DELTA, *cut, end), idle_seconds_max=0.001)
    said = []
    with suppress(ProtocolError):
        async for batch in player.prepare(request("scripted-play")).stream():
            said += batch
    played = events(*before, added(), DELTA)
    assert said == (played + events(end) if end == incomplete("max_output_tokens") else played)


async def test_an_item_that_failed_by_itself_is_played_to_its_end(recorded):
    """Where the response completed, nothing was cut."""
    frames = (created(1), added(type="mcp_call"), done(type="mcp_call", status="failed"), completed(1))
    assert await play(recorded((create(), *frames)), "scripted-play") == events(*frames)


async def test_what_became_of_a_steer_is_the_servers_to_say(recorded):
    """The item's end and the response's come at once: else the response would be interrupted between them."""
    steer = {"type": "response.steer.accepted", "steer": {"id": "steer_1", "previous_response_id": "resp_1"}}
    player = recorded((create(), created(1), added(), steer, done(status="completed"), completed(1)))
    batches = [batch async for batch in player.prepare(request("scripted-play")).stream()]
    assert batches == [[], events(created(1)), events(added()), events(done(status="completed"), completed(1))]


async def test_a_successor_is_the_next_turn_of_its_conversation(recorded):
    """It has no create of the client's in the recording, nor when it is played."""
    second = {"id": "resp_2", "previous_response_id": "resp_1"}
    frames = [{"type": kind, "response": second} for kind in ("response.created", "response.completed")]
    player = recorded((create(), created(1), completed(1), *frames))
    assert await play(player, "scripted-play", USER, ANSWER, USER) == events(*frames)


async def test_scripts_give_way_to_each_other():
    """A long script on one lane starves no other, with no delay between deltas either."""
    heard = []

    async def hear(name):
        stream = engine().prepare(request("scripted-text")).stream()
        while await anext(stream, None) is not None:
            heard.append(name)

    await asyncio.gather(hear("a"), hear("b"))
    assert heard == ["a", "b"] * (len(heard) // 2)


def test_a_transcript_that_cannot_be_read_is_named(tmp_path):
    """A missing or broken file is an error of the configuration, by its path and line."""
    with pytest.raises(ConfigError, match=r"scripted:.*nowhere\.jsonl"):
        engine(url=str(tmp_path / "nowhere.jsonl"))
    broken = tmp_path / "broken.jsonl"
    for text in ('{"t":0,"dir":"?","frame":{}}', "{", "\ud83d"):
        broken.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ConfigError, match=r"scripted:.*broken\.jsonl"):
            engine(url=str(broken))
