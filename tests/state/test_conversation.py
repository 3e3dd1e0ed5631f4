"""The context tree: what a node is the sum of, how forks stay apart, and what `previous_response_id` finds."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.errors import ProtocolError
from openline.protocol.items import Item
from openline.state.cache import Anchor, ConnectionCache
from openline.state.context import EMPTY, ContextNode
from openline.state.conversation import find_anchor
from openline.state.nothing import NothingStore
from openline.state.sealing import Seal
from openline.state.sqlite import SqliteStore
from openline.state.store import StoredTurn

SEAL = Seal(bytes(32))


class Joined:
    """A projection that joins the raw items, and counts how many it was given."""

    key = "joined"

    def __init__(self):
        self.folded = 0

    def start(self):
        return b""

    def extend(self, state, items):
        self.folded += len(items)
        return state + b"".join(item.raw for item in items)


def message(text):
    return Item(msgspec.json.encode({"type": "message", "role": "user", "content": text}), "message")


def call(call_id):
    return Item(b'{"type":"function_call"}', "function_call", call_id)


def output(call_id):
    return Item(b'{"type":"function_call_output"}', "function_call_output", call_id)


# A tree as a list of (which earlier node is the parent, the node's items); and the order to project it in.
TREES = st.lists(
    st.tuples(st.integers(0, 50), st.lists(st.text(max_size=3).map(message), max_size=3)), min_size=1, max_size=30
)


@given(TREES, st.lists(st.integers(0, 50), max_size=30))
def test_projecting_a_node_equals_folding_all_its_items(tree, order):
    """Whatever the tree and the order of asking, a node's projection is the fold of its path from the root.

    Source: design, "A context is a tree of immutable nodes".
    """
    root = ContextNode(None, ())
    nodes = [root]
    for parent, items in tree:
        nodes.append(nodes[parent % len(nodes)].extend(items))
    for index in [*order, *range(len(nodes))]:
        node = nodes[index % len(nodes)]
        expected = b"".join(item.raw for item in node.items())
        assert node.project(Joined()) == expected
        assert node.depth == len(list(node.items()))


def test_a_turn_pays_for_its_own_items_only():
    """Continuing a projected context folds the increment; projecting again folds nothing."""
    parent = EMPTY.extend([message("1"), message("2")])
    parent.project(Joined())
    child = parent.extend([message("3")])
    increment = Joined()
    child.project(increment)
    child.project(increment)
    assert increment.folded == 1


def test_forks_do_not_see_each_other():
    """Two continuations of one node each have its items and their own."""
    trunk = EMPTY.extend([message("trunk")])
    one, two = trunk.extend([message("one")]), trunk.extend([message("two")])
    joined = {name: node.project(Joined()) for name, node in {"trunk": trunk, "one": one, "two": two}.items()}
    assert joined == {
        "trunk": message("trunk").raw,
        "one": message("trunk").raw + message("one").raw,
        "two": message("trunk").raw + message("two").raw,
    }


def test_the_empty_context_keeps_nothing():
    """The root is everybody's, so no upstream's form is kept at it."""
    assert EMPTY.project(Joined()) == b""
    EMPTY.extend([message("1")]).project(Joined())
    assert not EMPTY._states
    assert EMPTY.extend([]) is EMPTY
    assert (EMPTY.depth, list(EMPTY.items())) == (0, [])


def test_a_context_knows_the_calls_that_wait_for_their_output():
    """A call opens, its output closes it; an output of nothing is refused, and the parent is as it was."""
    called = EMPTY.extend([message("Go."), call("call_1"), call("call_2")])
    answered = called.extend([output("call_2"), output("call_1")])
    answered.open_calls.require_none()
    with pytest.raises(ProtocolError, match="No tool output found for function call call_1"):
        called.open_calls.require_none()
    with pytest.raises(ProtocolError, match="No tool call found for function call output with call_id call_9"):
        called.extend([output("call_9")])
    assert len(called.open_calls) == 2


def test_an_output_that_comes_again_adds_nothing():
    """However far back it is, a node has it once; after a summary nothing before it counts (docs/adr/0010)."""
    answered = EMPTY.extend([call("call_1")]).extend([output("call_1")]).extend([message("Go on.")])
    assert answered.extend([output("call_1")]) is answered
    more = answered.extend([output("call_1"), message("More.")])
    assert (more.depth, len(more.own_items)) == (4, 1)
    different = Item(b'{"type":"function_call_output","output":"other"}', "function_call_output", "call_1")
    with pytest.raises(ProtocolError) as raised:
        answered.extend([different])
    assert raised.value.code == "tool_output_conflict"
    summary = Item(b"{}", "message", sums_up=True)
    summed_up = answered.extend([summary, call("call_2"), output("call_2"), output("call_2")])
    assert summed_up.depth == 3
    with pytest.raises(ProtocolError, match="No tool call found"):
        summed_up.extend([output("call_1")])


def test_the_repr_says_what_is_in_it():
    """What an operator sees of a node."""
    node = EMPTY.extend([message("1")]).extend([call("call_1")])
    assert repr(node) == "<ContextNode items=2 own=1 open_calls=1>"


# --- What `previous_response_id` finds ---------------------------------------------------------------


def row(response_id, parent_id, texts, answer, *, chainable=True):
    response = {
        "id": response_id,
        "model": "m",
        "output": [{"type": "message", "role": "assistant", "content": answer}],
    }
    items = b",".join(message(text).raw for text in texts)
    return StoredTurn(
        response_id=response_id,
        parent_id=parent_id,
        created_at=1,
        status="completed",
        chainable=chainable,
        input=b"[" + items + b"]",
        response=msgspec.json.encode(response),
    )


@pytest.fixture
async def store():
    store = SqliteStore(None)
    yield store
    await store.close()


async def test_a_stored_chain_becomes_the_context_it_was(store):
    """Input and output of every turn, oldest first, in the bytes they were kept in.

    Source: Responses API reference, "Conversation state": input(parent), output(parent), input.
    """
    await store.put("ada", row("resp_1", None, ["1", "2"], "3"))
    await store.put("ada", row("resp_2", "resp_1", ["4"], "5"))
    anchor = await find_anchor("ada", "resp_2", None, store, SEAL)
    contents = [msgspec.json.decode(item.raw)["content"] for item in anchor.node.items()]
    assert contents == ["1", "2", "3", "4", "5"]
    assert (anchor.response_id, anchor.model, anchor.stored) == ("resp_2", "m", True)


async def test_the_connection_is_asked_before_the_store(store):
    """What the connection remembers is continued from memory, with what was folded already."""
    await store.put("ada", row("resp_1", None, ["1"], "2"))
    cache = ConnectionCache()
    held = Anchor("resp_1", EMPTY.extend([message("1")]), "m", stored=True)
    cache.keep("ada", None, held)
    assert await find_anchor("ada", "resp_1", cache, store, SEAL) is held
    assert await find_anchor("ada", "resp_1", ConnectionCache(), store, SEAL) is not held


@pytest.mark.parametrize("response_id", ["resp_9", "", "resp_2"])
async def test_what_cannot_be_continued_is_not_found(store, response_id):
    """Unknown, another owner's, unchainable: one error, the same words.

    Source: guarantees, "Owners".
    """
    await store.put("bob", row("resp_9", None, ["1"], "2"))
    await store.put("ada", row("resp_2", None, ["1"], "2", chainable=False))
    for stored in (store, NothingStore()):
        with pytest.raises(ProtocolError) as raised:
            await find_anchor("ada", response_id, ConnectionCache(), stored, SEAL)
        assert raised.value.code == "previous_response_not_found"
        assert raised.value.message == f"Previous response with id '{response_id}' not found."
