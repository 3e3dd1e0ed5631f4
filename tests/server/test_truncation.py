"""`truncation`: what becomes of a conversation that is too long for its model.

Source: Responses API reference, "truncation": `auto` drops items from the start of the conversation, `disabled` fails
with 400 `context_length_exceeded`.
"""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.deltas import TextDelta
from openline.protocol.items import OpenCalls, item_of
from openline.state.context import EMPTY
from openline.turns.truncate import without_oldest
from server.watching import types


def user(text):
    return {"type": "message", "role": "user", "content": text}


def assistant(text):
    return {"type": "message", "role": "assistant", "content": text}


def system(text):
    return {"type": "message", "role": "system", "content": text}


def call(call_id):
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}"}


def output(call_id):
    return {"type": "function_call_output", "call_id": call_id, "output": call_id}


HISTORY = [system("I"), user("1"), assistant("2"), user("3"), assistant("4"), user("5"), assistant("6"), user("7")]


def read(items):
    """What a model reads: messages as their texts, anything else as its type."""
    values = [json.loads(item.raw) for item in items]
    return [value.get("content", value["type"]) for value in values]


async def refusing(hand, times):
    """Takes the next turns and says that each is too long; the one after them."""
    turns = [await hand.next_turn()]
    for _ in range(times):
        turns[-1].refuse("context_length_exceeded")
        turns.append(await hand.next_turn())
    return turns


async def test_auto_leaves_out_the_oldest_turns_until_it_fits(played, hand):
    """One answer, from half of what was said, and half of that; the system's words and the last turn stay.

    Source: Responses API reference, "truncation".
    """
    posting = asyncio.ensure_future(played.post(input=HISTORY, truncation="auto", stream=True))
    turns = await refusing(hand, 2)
    turns[-1].answer("8")
    events = (await posting).events
    assert [read(turn.request.context.items()) for turn in turns] == [
        ["I", "1", "2", "3", "4", "5", "6", "7"],
        ["I", "5", "6", "7"],
        ["I", "7"],
    ]
    assert types(events).count("created") == 1
    assert events[-1]["response"]["truncation"] == "auto"
    assert all(turn.closed.is_set() for turn in turns)


async def test_what_was_left_out_is_not_forgotten(played, hand):
    """The next turn is given the whole conversation again: a larger model, or a summary, may want it."""
    posting = asyncio.ensure_future(played.post(input=HISTORY, truncation="auto"))
    (await refusing(hand, 1))[-1].answer("8")
    first = (await posting).json
    posting = asyncio.ensure_future(played.post(input="9", previous_response_id=first["id"]))
    turn = await hand.next_turn()
    turn.answer("10")
    await posting
    assert read(turn.request.context.items())[:-2] == [item["content"] for item in HISTORY]


@pytest.mark.parametrize("truncation", ["disabled", None])
async def test_without_auto_a_conversation_that_is_too_long_fails(played, hand, truncation):
    """400 `context_length_exceeded`, and the model is asked once.

    Source: Responses API reference, "truncation": `disabled` is the default.
    """
    posting = asyncio.ensure_future(played.post(input=HISTORY, truncation=truncation))
    (await hand.next_turn()).refuse("context_length_exceeded")
    answer = await posting
    assert (answer.status, answer.json["error"]["code"]) == (400, "context_length_exceeded")
    assert hand.is_idle


async def test_a_last_turn_that_is_too_long_fails(played, hand):
    """When nothing more can be left out the error is the upstream's."""
    posting = asyncio.ensure_future(played.post(input=[user("1"), assistant("2"), user("3")], truncation="auto"))
    turns = await refusing(hand, 1)
    turns[-1].refuse("context_length_exceeded")
    assert (await posting).json["error"]["code"] == "context_length_exceeded"
    assert read(turns[-1].request.context.items()) == ["3"]
    assert hand.is_idle


async def test_an_answer_that_has_begun_is_not_begun_again(played, hand):
    """What fails behind its first item fails: the client has read it."""
    async with played.connect() as socket:
        await socket.create(input=HISTORY, truncation="auto")
        turn = await hand.next_turn()
        turn.give(TextDelta("Once"))
        turn.refuse("context_length_exceeded")
        assert types(await socket.rest())[-1] == "failed"
    assert hand.is_idle


async def test_another_error_is_not_tried_again(played, hand):
    """Only a context that is too long becomes shorter."""
    posting = asyncio.ensure_future(played.post(input=HISTORY, truncation="auto"))
    (await hand.next_turn()).refuse("rate_limit_exceeded")
    assert (await posting).status == 429
    assert hand.is_idle


async def test_behind_a_summary_the_answer_is_truncated_too(played, hand):
    """The summary stays; what is left out stands behind it."""
    window = [user("0"), {"type": "compaction_trigger"}]
    posting = asyncio.ensure_future(played.post(input=window))
    (await hand.next_turn()).answer("S")
    first = (await posting).json
    items = [user("1"), assistant("2"), user("3")]
    body = {"input": items, "previous_response_id": first["id"], "truncation": "auto"}
    posting = asyncio.ensure_future(played.post(**body))
    turns = await refusing(hand, 1)
    turns[-1].answer("4")
    await posting
    summary, *rest = read(turns[-1].request.context.items())
    assert summary[0]["text"].endswith("S")
    assert rest == ["3"]


async def test_a_cancelled_retry_ends_its_response(played, hand):
    """As every running turn."""
    async with played.connect() as socket:
        await socket.create(input=HISTORY, truncation="auto")
        turns = await refusing(hand, 1)
        turns[-1].give(TextDelta("Once"))
        await socket.until("response.output_text.delta")
        await socket.send(type="response.cancel")
        assert types(await socket.rest())[-1] == "incomplete"
        await turns[-1].closed.wait()
    assert hand.is_idle


# --- What is left out -----------------------------------------------------------------------------

TURNS = st.lists(
    st.one_of(
        st.just([user("u")]),
        st.just([system("s")]),
        st.just([assistant("a" * 9)]),
        st.builds(lambda n: [call(f"c{n}"), output(f"c{n}")], st.integers(0, 99)),
        st.builds(lambda n: [call(f"p{n}"), call(f"q{n}"), output(f"q{n}"), output(f"p{n}")], st.integers(0, 99)),
    ),
    max_size=12,
)


@given(TURNS)
def test_it_becomes_shorter_and_stays_whole(turns):
    """From the start, to its end: no call without its output, no output without its call, nothing of the system's gone.

    Source: Responses API reference, "truncation"; "Input items".
    """
    items = [item_of(value) for turn in turns for value in turn]
    context = EMPTY.extend(items)
    sizes = [context.bytes]
    while (context := without_oldest(context)) is not None:
        left = list(context.items())
        OpenCalls().after(left).require_none()
        assert [item for item in left if b'"system"' in item.raw] == [item for item in items if b'"system"' in item.raw]
        said = [item for item in left if b'"system"' not in item.raw]
        assert said == [item for item in items if b'"system"' not in item.raw][-len(said) :]
        sizes.append(context.bytes)
    assert sizes == sorted(set(sizes), reverse=True)


def test_an_open_call_keeps_its_place():
    """One that is answered later is not parted from its output: what is cut off ends before it, or behind both."""
    waiting = {**call("c1"), "async": True}
    items = [user("1"), waiting, assistant("2"), user("3"), output("c1"), user("4")]
    context = without_oldest(EMPTY.extend([item_of(value) for value in items]))
    assert context is not None
    assert read(context.items()) == ["4"]
