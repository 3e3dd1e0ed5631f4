"""Sealed items: closed for the client, opened for the model, and a summary that stands for all before it.

Source: Responses API reference, "Compaction", "Reasoning", `encrypted_content`; docs/adr/0008.
"""

from __future__ import annotations

import json
import logging

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.context import SharedBytes
from openline.protocol.errors import ProtocolError
from openline.protocol.items import item_of
from openline.state.context import EMPTY
from openline.state.conversation import find_anchor
from openline.state.sealed_items import compaction_item, opened, sealed_reasoning
from openline.state.sealing import Seal
from openline.state.sqlite import SqliteStore
from openline.state.store import StoredTurn

SEAL = Seal(bytes(range(32)))
RAW = [{"type": "reasoning_text", "text": "Raw thought."}]
SUMMARY = [{"type": "summary_text", "text": "Thought."}]


def thought(**fields):
    return {"id": "rs_1", "type": "reasoning", "status": "completed", "summary": [], **fields}


def sealed_thought(**fields):
    return sealed_reasoning(thought(**fields), "ada", SEAL)


def summary(text="They wanted soup."):
    return {"id": "cmp_1", **compaction_item(text, "ada", SEAL)}


def user(text):
    return {"type": "message", "role": "user", "content": text}


def assistant(text):
    return {"type": "message", "role": "assistant", "content": text}


def system(text):
    return {"type": "message", "role": "system", "content": text}


def call(call_id, **fields):
    return {"type": "function_call", "call_id": call_id, "name": "f", "arguments": "{}", **fields}


def output(call_id):
    return {"type": "function_call_output", "call_id": call_id, "output": "4"}


def read(*values, owner="ada", seal=SEAL):
    return opened(map(item_of, values), owner, seal)


def context(*turns):
    """A chain of turns, each a list of items."""
    node = EMPTY
    for turn in turns:
        node = node.extend(read(*turn))
    return node


def seen(items):
    """What the model reads: a message as its text, anything else as its type."""
    texts = []
    for item in items:
        value = json.loads(item.raw)
        content = value.get("content", "")
        text = content if isinstance(content, str) else "".join(part["text"] for part in content)
        texts.append(
            text.removeprefix("Summary of the conversation so far, which stands for everything before it:\n\n")
        )
        texts[-1] = texts[-1] if item.type == "message" else item.type
    return texts


# --- Opening and sealing --------------------------------------------------------------------------


def test_a_summary_is_read_as_a_message():
    """The model reads it as words of the user's that say what they are; the client still has it sealed.

    Source: docs/adr/0008: engines and projections see plain messages.
    """
    sealed = summary()
    (item,) = read(sealed)
    assert (item.type, item.sums_up, json.loads(item.wire)) == ("message", True, sealed)
    message = json.loads(item.raw)
    assert message["role"] == "user"
    assert message["content"][0]["text"].endswith("\n\nThey wanted soup.")
    assert "soup" not in sealed["encrypted_content"]


@pytest.mark.parametrize(
    "content", [{"content": RAW}, {"summary": SUMMARY}, {"summary": SUMMARY, "content": RAW}], ids="-".join
)
def test_reasoning_comes_back_whole(content):
    """Summary and raw text are both sealed, whatever a client keeps of the rest of the item.

    Source: Responses API reference, `reasoning.encrypted_content`.
    """
    sealed = sealed_thought(**content)
    assert {**sealed, "encrypted_content": None} == {**thought(**content), "encrypted_content": None}
    bare = {"type": "reasoning", "summary": [], "encrypted_content": sealed["encrypted_content"]}
    for kept, its_id in ((sealed, {"id": "rs_1"}), (bare, {})):
        (item,) = read(kept)
        assert json.loads(item.raw) == {"type": "reasoning", **its_id, "summary": [], **content}
        assert (item.type, item.sums_up, json.loads(item.wire)) == ("reasoning", False, kept)


def test_a_client_cannot_alter_what_was_thought():
    """What stands in the clear beside the seal is not read.

    Source: docs/adr/0008: it must not be changeable there.
    """
    altered = {**sealed_thought(content=RAW), "content": [{"type": "reasoning_text", "text": "Obey."}]}
    (item,) = read(altered)
    assert json.loads(item.raw)["content"] == RAW


@pytest.mark.parametrize("content", [{}, {"content": []}, {"content": None}, {"encrypted_content": ""}])
def test_reasoning_without_content_is_not_sealed(content):
    """Nothing to keep, so no field that would say otherwise."""
    assert sealed_thought(**content) == thought(**content)


@pytest.mark.parametrize("content", [{}, {"content": RAW}, {"summary": SUMMARY}])
def test_what_another_server_sealed_stays_as_it_is(content):
    """An upstream's own `encrypted_content` goes to the client and comes back untouched, beside whatever it stands.

    Source: docs/adr/0008: an upstream may be able to read it.
    """
    theirs = thought(encrypted_content="gAAAAABtheirs", **content)
    assert sealed_reasoning(theirs, "ada", SEAL) == theirs
    (item,) = read(theirs)
    assert (json.loads(item.raw), item.sealed) == (theirs, None)
    compaction = {"type": "compaction", "encrypted_content": "gAAAAABtheirs"}
    (item,) = read(compaction)
    assert (json.loads(item.raw), item.type, item.sums_up) == (compaction, "compaction", False)


def test_what_another_openline_sealed_is_sealed_again():
    """Behind an upstream that is an Openline too, its seal bears our mark: it travels inside of ours, and comes back.

    Source: docs/adr/0008: what another server sealed passes through.
    """
    inner = sealed_reasoning(thought(content=RAW), "gateway", Seal(bytes(32)))
    outer = sealed_reasoning(inner, "ada", SEAL)
    (item,) = read(outer)
    assert json.loads(item.raw) == {key: value for key, value in inner.items() if key != "status"}


@pytest.mark.parametrize("item_type", ["compaction", "reasoning"])
@pytest.mark.parametrize("how", ["key", "owner", "kind", "altered", "nothing"])
def test_a_seal_that_does_not_open_is_refused(item_type, how):
    """Another key, another owner, another kind of item, altered, or never sealed: 400, and what it is about.

    Source: docs/adr/0008: what bears our mark and does not open is refused.
    """
    sealed = (summary() if item_type == "compaction" else sealed_thought(content=RAW))["encrypted_content"]
    other = sealed_thought(content=RAW) if item_type == "compaction" else summary()
    texts = {"kind": other["encrypted_content"], "altered": sealed[:-4] + "AAAA", "nothing": "oln1."}
    item = {"type": item_type, "encrypted_content": texts.get(how, sealed)}
    with pytest.raises(ProtocolError) as raised:
        read(item, owner="bob" if how == "owner" else "ada", seal=Seal(bytes(32)) if how == "key" else SEAL)
    error = raised.value
    assert (error.status, error.code, error.param) == (400, "invalid_value", "input")
    assert f"'encrypted_content' of an item of type '{item_type}'" in error.message


def test_a_summary_that_was_never_written_stands_for_nothing():
    """A response that was cut while its summary was written has an empty one in its output: the model reads on without.

    Source: event order, "Cancelled turn"; docs/adr/0008.
    """
    assert seen(read(user("1"), {"type": "compaction", "id": "cmp_1", "encrypted_content": ""}, user("2"))) == [
        "1",
        "2",
    ]


def test_an_item_that_cannot_be_read_is_its_engines_to_refuse():
    """A field of another type is no seal."""
    broken = {"type": "reasoning", "encrypted_content": 5}
    (item,) = read(broken)
    assert json.loads(item.raw) == broken


def test_nothing_of_it_is_logged(caplog):
    """Not what is sealed, not what does not open.

    Source: guarantees, "Secrets": no content in the log.
    """
    caplog.set_level(logging.DEBUG)
    sealed = summary("Soup.")
    read(sealed)
    with pytest.raises(ProtocolError) as raised:
        read(sealed, owner="bob")
    assert "Soup" not in caplog.text + str(raised.value)
    assert sealed["encrypted_content"] not in caplog.text + str(raised.value)


# --- A summary in a context -----------------------------------------------------------------------


def test_a_context_is_read_from_its_last_summary_on():
    """What stands before it is read no more, in the same turn or an earlier one; a fork before it has it all.

    Source: Responses API reference, "Compaction": the item replaces everything before it.
    """
    before = context([user("1"), assistant("2")], [user("3")])
    behind = before.extend(read(summary("S1"), assistant("4"))).extend(read(user("5")))
    again = behind.extend(read(user("6"), summary("S2"), summary("S3"), user("7")))
    assert seen(before.items()) == ["1", "2", "3"]
    assert seen(behind.items()) == ["S1", "4", "5"]
    assert seen(again.items()) == ["S3", "7"]
    assert [node.depth for node in (before, behind, again)] == [3, 3, 2]
    assert again.bytes == sum(len(item.raw) for item in again.items())
    assert len(again.own_items) == 4, "what the client sent is all kept"


class Joined:
    """A projection that joins the raw items."""

    key = "joined"

    def start(self):
        return SharedBytes()

    def extend(self, state, items):
        return state.append(b"".join(item.raw for item in items))


TEXT = st.text("ab", min_size=1, max_size=2)
ITEMS = st.one_of(*(st.builds(make, TEXT) for make in (user, assistant, system, summary)))


@given(st.lists(st.lists(ITEMS, max_size=4), max_size=5))
def test_what_is_read_is_what_the_rule_says(turns):
    """Whatever stands where: all behind the last summary, and before it what the system said, and a client's window.

    Source: docs/adr/0008.
    """
    node, expected = EMPTY, []
    for turn in turns:
        node.project(Joined())
        node = node.extend(read(*turn))
        at = max((index for index, item in enumerate(turn) if item["type"] == "compaction"), default=None)
        if at is not None:
            said = [item for item in turn[:at] if item.get("role") not in {"user", "system"}]
            kept = turn[:at] if not said else [item for item in turn[:at] if item.get("role") == "system"]
            expected = [item for item in expected if item.get("role") == "system"]
            turn = [*kept, *turn[at:]]
        expected = [*expected, *turn]
    assert seen(node.items()) == seen(read(*expected))
    assert bytes(node.project(Joined())) == b"".join(item.raw for item in node.items())
    assert (node.depth, node.bytes) == (len(expected), sum(len(item.raw) for item in node.items()))


def test_what_the_system_said_stays():
    """Instructions that came as items are no part of what is summed up: wherever they stood, they are read in full.

    Source: docs/adr/0008; openai/codex: its own instructions are items of role `developer`.
    """
    developer = {"type": "message", "role": "developer", "content": "D"}
    tools = {"type": "additional_tools", "role": "developer", "tools": []}
    before = context([system("S1"), user("1"), tools], [assistant("2"), developer, user("3")])
    assert seen(before.extend(read(summary("S"), user("4"))).items()) == ["S1", "additional_tools", "D", "S", "4"]
    again = before.extend(read(summary("S"), user("4"))).extend(read(summary("T")))
    assert seen(again.items()) == ["S1", "additional_tools", "D", "T"]


def test_what_a_client_kept_before_a_summary_is_read():
    """Messages of the user's before a summary, without a model's or a tool's among them, are a window, not a history.

    Source: openai/codex, remote compaction: the user's messages, then the compaction item.
    """
    window = [system("I"), user("1"), user("2"), summary("S")]
    assert seen(context([*window, user("3")]).items()) == ["I", "1", "2", "S", "3"]
    for said in (assistant("A"), call("call_1"), thought(content=RAW), summary("Old")):
        assert seen(context([user("0"), said, *window, user("3")]).items()) == ["I", "S", "3"]
    assert seen(context([user("0")], [*window, user("3")]).items()) == ["I", "1", "2", "S", "3"]


def test_a_context_with_a_summary_in_its_place():
    """What the system said once, the summary, and the user's last words.

    Source: docs/adr/0008: the user's last messages stay in full behind the summary.
    """
    node = context([system("I"), user("1"), assistant("2")], [user("3"), system("4"), user("5")])
    assert seen(node.summed_up(read(summary("S"))).items()) == ["I", "4", "S", "3", "5"]


def test_calls_before_a_summary_wait_no_more():
    """Neither an answered call nor an open one is asked for behind it; a call behind it is.

    Source: Responses API reference, "Compaction".
    """
    cut = context([user("1"), call("call_1"), call("call_2")], [summary()])
    cut.open_calls.require_none()
    with pytest.raises(ProtocolError, match="No tool call found for function call output with call_id call_1"):
        cut.extend(read(output("call_1")))
    with pytest.raises(ProtocolError, match="No tool output found for function call call_3"):
        cut.extend(read(call("call_3"))).open_calls.require_none()


@pytest.mark.parametrize(
    ("turns", "words"),
    [
        ([[user("1"), user("2")]], ["1", "2"]),
        ([[user("1")], [user("2")], []], ["1", "2"]),
        ([[user("1"), assistant("2"), user("3"), system("4"), user("5")]], ["3", "4", "5"]),
        ([[user("1"), call("a"), output("a"), user("2")]], ["2"]),
        ([[user("1"), call("a")], [output("a")]], []),
        ([[user("1"), assistant("2")], [user("3")]], ["3"]),
        ([[user("1"), assistant("2")]], []),
        ([[summary(), user("1")]], ["1"]),
        ([[summary()]], []),
        ([[user("1"), summary()], [user("2")]], ["2"]),
        ([[user("1"), thought(content=RAW)]], []),
        ([], []),
    ],
)
def test_the_last_words_are_what_nobody_has_answered(turns, words):
    """The user's messages behind the last item that a model or a tool brought; a summary is no word of the user's.

    Source: docs/adr/0008: the user's last messages stay in full behind the summary.
    """
    assert seen(context(*turns).last_words()) == words


# --- A summary in the store -----------------------------------------------------------------------


@pytest.fixture
async def store():
    store = SqliteStore(None)
    yield store
    await store.close()


async def put(store, response_id, parent_id, items, answer):
    response = {"id": response_id, "model": "m", "output": answer}
    turn = StoredTurn(
        response_id=response_id,
        parent_id=parent_id,
        created_at=1,
        status="completed",
        chainable=True,
        input=msgspec.json.encode(items),
        response=msgspec.json.encode(response),
    )
    await store.put("ada", turn)


async def test_a_stored_chain_is_read_from_its_last_summary_on(store):
    """After a restart as before it; seals are opened.

    Source: Responses API reference, "Conversation state" and "Compaction".
    """
    await put(store, "resp_1", None, [user("1")], [assistant("2")])
    await put(store, "resp_2", "resp_1", [user("3")], [summary("S"), sealed_thought(content=RAW), assistant("4")])
    anchor = await find_anchor("ada", "resp_2", None, store, SEAL)
    assert seen(anchor.node.items()) == ["S", "reasoning", "4"]
    assert json.loads(list(anchor.node.items())[1].raw)["content"] == RAW


async def test_a_stored_chain_without_its_key_is_refused(store):
    """The error names what the client sent, which is the chain and no item of it.

    Source: docs/adr/0008, "Consequences": the key is needed to continue a stored chain across a compaction.
    """
    await put(store, "resp_1", None, [user("1")], [summary()])
    with pytest.raises(ProtocolError) as raised:
        await find_anchor("ada", "resp_1", None, store, Seal(bytes(32)))
    assert (raised.value.status, raised.value.param) == (400, "previous_response_id")
