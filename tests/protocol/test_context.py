"""Bytes that many nodes share."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.context import SharedBytes


@given(st.lists(st.tuples(st.integers(0, 1000), st.binary(max_size=20)), max_size=40))
def test_every_node_keeps_its_own_bytes(appends):
    """Whichever node is continued, and however often, no other node's bytes change (a fork copies, a tip grows)."""
    nodes = [(SharedBytes(), b"")]
    for place, data in appends:
        node, plain = nodes[place % len(nodes)]
        nodes.append((node.append(data), plain + data))
        assert [(bytes(node), len(node)) for node, _ in nodes] == [(plain, len(plain)) for _, plain in nodes]


def test_continuing_the_newest_does_not_copy():
    """A turn late in a chain costs its own items, not the history."""
    parent = SharedBytes().append(b"history")
    child = parent.append(b" and more")
    assert child._buffer is parent._buffer
    assert (bytes(parent), bytes(child)) == (b"history", b"history and more")


def test_continuing_an_older_one_copies_its_part():
    """A fork gets a buffer of its own, with nothing of the branch it left."""
    parent = SharedBytes().append(b"history")
    parent.append(b", first branch")
    fork = parent.append(b", second")
    assert fork._buffer is not parent._buffer
    assert bytes(fork) == bytes(fork._buffer) == b"history, second"


def test_shared_bytes_say_their_state():
    """The `repr` tells the part from the whole, and shows none of it."""
    parent = SharedBytes().append(b"secret")
    parent.append(b"12")
    assert repr(parent) == "<SharedBytes 6 of 8 bytes>"
