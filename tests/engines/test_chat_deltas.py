"""A Chat Completions stream as deltas."""

import json
import time
from pathlib import Path

import pytest

from openline.engines.chat_calls import BadStreamError
from openline.engines.chat_deltas import ChatDeltas, ErrorChunkError
from openline.engines.chat_tools import ToolName
from openline.protocol import sse
from openline.protocol.deltas import (
    CallDelta,
    CallStarted,
    Ended,
    ReasoningDelta,
    RefusalDelta,
    TextDelta,
    Timings,
    Usage,
)

STREAMS = Path(__file__).parent / "chat"
NAMES = {
    "look": ToolName("function_call", "look"),
    "docs__find": ToolName("function_call", "find", "docs"),
    "patch": ToolName("custom_tool_call", "patch"),
}
USAGE = Usage(input_tokens=9, cached_tokens=5, cache_write_tokens=2, output_tokens=4, reasoning_tokens=1)


def new_deltas():
    return ChatDeltas(NAMES, lambda: "call_made")


def played(stream, size):
    """The deltas of a stream that comes in slices of `size` bytes."""
    decoder, deltas, out = sse.Decoder(1 << 20), new_deltas(), []
    for start in range(0, len(stream), size):
        for data in decoder.feed(stream[start : start + size]):
            deltas.feed(data, out)
    for data in decoder.end():
        deltas.feed(data, out)
    deltas.end(out)
    return out


def fed(*chunks, done=True):
    deltas, out = new_deltas(), []
    for chunk in chunks:
        deltas.feed(chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode(), out)
    if done:
        deltas.feed(b"[DONE]", out)
    deltas.end(out)
    return out


def chunk(delta=None, finish=None, **choice):
    return {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish, **choice}]}


def calls(*fragments):
    return chunk({"tool_calls": list(fragments)})


def fragment(index=None, arguments=None, call_id=None, name=None):
    given = {"index": index, "id": call_id, "function": {"name": name, "arguments": arguments}}
    return {key: value for key, value in given.items() if value is not None}


def look(call_id):
    return CallStarted("function_call", call_id, "look")


STREAMED = {
    "text": [TextDelta("Grüß "), TextDelta("dich 👋"), USAGE, Ended()],
    "reasoning": [ReasoningDelta("Hm, "), ReasoningDelta("so."), ReasoningDelta("!"), TextDelta("Yes."), Ended()],
    "parallel": [
        look("call_a"),
        CallDelta('{"a"'),
        CallDelta(":1}"),
        CallStarted("function_call", "call_b", "find", "docs"),
        CallDelta('{"b":2}'),
        USAGE,
        Ended(),
    ],
    "mixed": [
        look("call_a"),
        CallDelta('{"a":'),
        CallDelta("1}"),
        look("call_b"),
        CallDelta('{"b":'),
        CallDelta("2}"),
        look("call_c"),
        CallDelta('{"c"'),
        CallDelta(":3}"),
        Ended(),
    ],
    "custom": [
        CallStarted("custom_tool_call", "call_a", "patch"),
        CallDelta("a"),
        CallDelta('\n"b" é '),
        CallDelta("😀 c"),
        CallDelta("\\"),
        Ended(),
    ],
    "logprobs": [
        TextDelta(
            "Hi",
            [
                {
                    "token": "Hi",
                    "bytes": [72, 105],
                    "logprob": -0.5,
                    "top_logprobs": [
                        {"token": "Hi", "bytes": [72, 105], "logprob": -0.5},
                        {"token": "Yo", "bytes": [], "logprob": -1.5},
                    ],
                }
            ],
        ),
        Ended("max_output_tokens"),
    ],
    "refusal": [RefusalDelta("I will "), RefusalDelta("not."), Ended("content_filter")],
    "call_then_text": [look("call_a"), CallDelta('{"a":1}'), TextDelta("Done."), Ended()],
    "text_inside_a_call": [look("call_a"), CallDelta('{"a"'), CallDelta(":1}"), TextDelta("Wait."), Ended()],
}


def test_every_stream_is_played():
    """No fixture lies about unused."""
    assert {path.stem for path in STREAMS.glob("*.sse")} == set(STREAMED)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", STREAMED)
def test_stream_gives_its_deltas_in_any_slices(name, size, line_end):
    """Whole and one byte at a time."""
    stream = (STREAMS / f"{name}.sse").read_bytes().replace(b"\n", line_end)
    assert played(stream, size) == STREAMED[name]


class TestCalls:
    def test_whole_call_in_one_chunk(self):
        """Ollama and Gemini send them so."""
        got = fed(calls(fragment(0, "{}", "c1", "look"), fragment(1, "{}", "c2", "look")), chunk(finish="tool_calls"))
        assert got == [look("c1"), CallDelta("{}"), look("c2"), CallDelta("{}"), Ended()]

    def test_repeated_id_and_name_do_not_begin_another_call(self):
        """Some servers put them into every chunk."""
        got = fed(
            calls(fragment(0, '{"a"', "c1", "look")), calls(fragment(0, ":1}", "c1", "look")), chunk(finish="stop")
        )
        assert got == [look("c1"), CallDelta('{"a"'), CallDelta(":1}"), Ended()]

    def test_calls_without_an_index_are_told_apart_by_id(self):
        """The id is the next best."""
        got = fed(
            calls(fragment(None, '{"a"', "c1", "look")),
            calls(fragment(None, ":1}", "c1")),
            calls(fragment(None, "{}", "c2", "look")),
            chunk(finish="stop"),
        )
        assert got == [look("c1"), CallDelta('{"a"'), CallDelta(":1}"), look("c2"), CallDelta("{}"), Ended()]

    def test_calls_without_index_and_id_are_told_apart_by_place(self):
        """And get ids of ours."""
        got = fed(
            calls(fragment(None, '{"a"', None, "look")),
            calls(fragment(None, ":1}")),
            calls(fragment(None, "{}", None, "look")),
            chunk(finish="stop"),
        )
        made = look("call_made")
        assert got == [made, CallDelta('{"a"'), CallDelta(":1}"), made, CallDelta("{}"), Ended()]
        assert fed(calls(fragment(None, "{}", None, "look"), fragment(None, "{}", None, "look")))[:4] == [
            *(made, CallDelta("{}")),
            *(made, CallDelta("{}")),
        ]

    def test_another_id_at_the_same_index_begins_another_call(self):
        """Gemini gives every parallel call the index 0."""
        got = fed(calls(fragment(0, "{}", "c1", "look")), calls(fragment(0, "{}", "c2", "look")), chunk(finish="stop"))
        assert got == [look("c1"), CallDelta("{}"), look("c2"), CallDelta("{}"), Ended()]

    def test_two_calls_never_share_an_id(self):
        """Their outputs could not be told apart; the upstream gets ours back, in both places."""
        got = fed(
            calls(fragment(0, '{"a"', "c1", "look"), fragment(1, "{}", "c1", "look")),
            calls(fragment(0, ":1}", "c1", "look")),
            calls(fragment(1, "", "c1", "look")),
            chunk(finish="stop"),
        )
        assert got == [look("c1"), CallDelta('{"a"'), CallDelta(":1}"), look("call_made"), CallDelta("{}"), Ended()]

    @pytest.mark.parametrize("is_indexed", [True, False])
    def test_a_call_costs_as_much_behind_many_as_behind_few(self, is_indexed):
        """A model that repeats itself makes thousands; the server has other turns to serve."""

        def cost(count):
            many = [calls(fragment(n if is_indexed else None, "{}", f"c{n}", "look")) for n in range(count)]
            started = time.process_time()
            assert len(fed(*many, chunk(finish="stop"))) == 2 * count + 1
            return (time.process_time() - started) / count

        assert cost(30_000) < 5 * cost(3_000)

    def test_unfinished_calls_come_out_at_the_end_in_order(self):
        """A model that was stopped in its second call had begun both."""
        got = fed(
            calls(fragment(0, '{"a', "c1", "look")), calls(fragment(1, '{"b', "c2", "look")), chunk(finish="length")
        )
        assert got == [look("c1"), CallDelta('{"a'), look("c2"), CallDelta('{"b'), Ended("max_output_tokens")]

    def test_name_may_come_behind_the_id(self):
        """Nothing goes out before it."""
        got = fed(calls(fragment(0, None, "c1")), calls(fragment(0, "{}", None, "look")), chunk(finish="stop"))
        assert got == [look("c1"), CallDelta("{}"), Ended()]

    def test_call_without_a_name_is_an_error(self):
        """An agent would wait for what was lost."""
        with pytest.raises(BadStreamError):
            fed(calls(fragment(0, "{}", "c1")), chunk(finish="stop"))
        assert fed(calls(fragment(0, None, "c1")), chunk(finish="length")) == [Ended("max_output_tokens")]

    def test_tool_without_parameters_gets_an_empty_object(self):
        """Clients parse the arguments; those of a call that was cut stay as they are."""
        assert fed(calls(fragment(0, "", "c1", "look")), chunk(finish="stop"))[1] == CallDelta("{}")
        assert fed(calls(fragment(0, "", "c1", "look")), chunk(finish="length"))[1:] == [Ended("max_output_tokens")]

    def test_arguments_may_come_as_an_object(self):
        """A few servers parse them themselves."""
        assert fed(calls(fragment(0, {"a": 1}, "c1", "look")))[1] == CallDelta('{"a":1}')

    def test_fragment_of_a_closed_call_is_left_out(self):
        """It was complete when the next one came."""
        got = fed(
            calls(fragment(0, "{}", "c1", "look")),
            calls(fragment(1, '{"b"', "c2", "look")),
            calls(fragment(0, "x")),
            calls(fragment(1, ":1}")),
        )
        assert got == [look("c1"), CallDelta("{}"), look("c2"), CallDelta('{"b"'), CallDelta(":1}"), Ended()]

    def test_unknown_name_passes(self):
        """The client's tool loop answers for it."""
        assert fed(calls(fragment(0, "{}", "c1", "made_up")))[0] == CallStarted("function_call", "c1", "made_up")

    def test_fragment_without_a_function_changes_nothing(self):
        """Some servers send one to close."""
        assert fed(calls(fragment(0, "{}", "c1", "look")), calls({"index": 0}), chunk(finish="stop"))[2:] == [Ended()]


class TestEnds:
    @pytest.mark.parametrize(
        ("finish", "reason"),
        [
            ("stop", None),
            ("tool_calls", None),
            ("function_call", None),
            ("eos", None),
            ("length", "max_output_tokens"),
            ("content_filter", "content_filter"),
        ],
    )
    def test_finish_reason_says_how_it_ended(self, finish, reason):
        """A word that nobody knows is an end like any other."""
        assert fed(chunk({"content": "a"}, finish))[-1] == Ended(reason)

    @pytest.mark.parametrize("finish", ["error", "abort"])
    def test_generation_that_broke_off_is_an_error(self, finish):
        """It did not finish."""
        with pytest.raises(BadStreamError):
            fed(chunk({"content": "a"}, finish))

    def test_done_behind_an_answer_is_an_end(self):
        """Some servers forget `finish_reason`."""
        assert fed(chunk({"content": "a"})) == [TextDelta("a"), Ended()]

    @pytest.mark.parametrize(("chunks", "done"), [([chunk({"content": "a"})], False), ([], False), ([], True)])
    def test_stream_without_an_end_is_an_error(self, chunks, done):
        """An answer that was cut looks like a short one otherwise."""
        with pytest.raises(BadStreamError):
            fed(*chunks, done=done)

    def test_usage_comes_before_the_end(self):
        """Although upstreams send it behind `finish_reason`, or with it."""
        usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "prompt_tokens_details": None}}
        got = fed(chunk({"content": "a"}, "stop"), usage)
        assert got[1:] == [Usage(input_tokens=3, output_tokens=2), Ended()]

    def test_the_engines_times_come_with_the_usage(self):
        """As llama.cpp tells them (tools/server/README.md, "timings")."""
        timings = {"prompt_n": 1, "prompt_ms": 2.5, "predicted_n": 3, "predicted_ms": 4, "cache_n": 5}
        got = fed(chunk({"content": "a"}, "stop"), {"choices": [], "usage": {}, "timings": timings})
        assert got[1] == Usage(timings=Timings(prompt_ms=2.5, predicted_ms=4))

    @pytest.mark.parametrize("timings", [None, [], "fast", {"prompt_ms": "2"}, {"queue": 1.0}])
    def test_what_others_mean_by_timings_is_left_alone(self, timings):
        """The field is no part of Chat Completions: anything may stand there."""
        got = fed(chunk({"content": "a"}, "stop"), {"choices": [], "usage": {}, "timings": timings})
        assert got[1] == Usage()


class TestChunks:
    @pytest.mark.parametrize(
        "data", [b"{", b"[]", b"x", b'{"choices":{}}', b'{"choices":[{"delta":{"content":"\xff"}}]}']
    )
    def test_what_is_no_chunk_is_an_error(self, data):
        """Half a character among it; nothing of it is quoted."""
        with pytest.raises(BadStreamError) as caught:
            fed(data)
        assert "\\xff" not in str(caught.value)

    @pytest.mark.parametrize(
        "data", [b'{"error":{"message":"no","code":500}}', b'{"error":"no"}', b'{"object":"error","message":"no"}']
    )
    def test_error_inside_the_stream_is_handed_on(self, data):
        """In every shape that servers use."""
        with pytest.raises(ErrorChunkError) as caught:
            fed(chunk({"content": "a"}), data)
        assert caught.value.data == data

    def test_chunks_that_say_nothing_give_nothing(self):
        """Roles, empty texts, nulls, unknown fields, other choices."""
        silent = [
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": ""}]},
            {"choices": None, "x": 1},
            {"choices": [{"index": 1, "delta": {"content": "other"}}]},
            {"choices": [{"index": None, "delta": None, "error": None}], "error": None, "usage": None},
        ]
        assert fed(*silent, chunk(finish="stop")) == [Ended()]

    def test_whole_completion_is_understood(self):
        """From a server that ignores `stream`."""
        message = {
            "role": "assistant",
            "content": "a",
            "reasoning_content": "r",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}},
                {"id": "c2", "type": "function", "function": {"name": "look", "arguments": "{}"}},
            ],
        }
        completion = {
            "object": "chat.completion",
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}],
            "usage": {"prompt_tokens": 1, "completion_tokens": 2},
        }
        assert fed(completion, done=False) == [
            ReasoningDelta("r"),
            TextDelta("a"),
            *(look("c1"), CallDelta("{}")),
            *(look("c2"), CallDelta("{}")),
            Usage(input_tokens=1, output_tokens=2),
            Ended(),
        ]

    def test_logprobs_of_a_chunk_without_tokens_are_empty(self):
        """As the wire wants them."""
        assert fed(chunk({"content": "a"}, "stop", logprobs={"content": None}))[0] == TextDelta("a", [])
