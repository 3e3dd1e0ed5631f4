"""What makes two creates the same, for a key."""

from __future__ import annotations

import json
import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.errors import ERRORS, ProtocolError, failure_of
from openline.protocol.idempotency import body_hash, key_reused, not_held

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
BODIES = st.dictionaries(st.text(max_size=6), JSON, max_size=6)
TRAVELS = {
    "type": "response.create",
    "stream": True,
    "stream_id": "a",
    "stream_options": {"include_obfuscation": False},
    "starting_after": 7,
    "idempotency_key": "k",
}


def shuffled(value, order):
    """The same JSON with the fields of every object in another order."""
    if isinstance(value, list):
        return [shuffled(each, order) for each in value]
    if not isinstance(value, dict):
        return value
    names = list(value)
    order.shuffle(names)
    return {name: shuffled(value[name], order) for name in names}


@given(BODIES, st.integers(0, 1000))
def test_neither_order_nor_spelling_makes_another_body(body, seed):
    """Fields in any order, any white space, escapes or not, text or bytes: the digest is of what it says (docs/adr/0009)."""
    encoded = msgspec.json.encode(body)
    again = json.dumps(shuffled(body, random.Random(seed)), indent=3)
    assert body_hash(encoded) == body_hash(again) == body_hash(again.encode())
    assert len(body_hash(encoded)) == 32


@given(BODIES, st.sets(st.sampled_from(sorted(TRAVELS))))
def test_how_it_travels_makes_no_other_body(body, names):
    """A client may go from a socket to HTTP, change its lane, and say from where on it reads (docs/adr/0009)."""
    for name in TRAVELS:
        body.pop(name, None)
    travelling = {**body, **{name: TRAVELS[name] for name in names}}
    assert body_hash(msgspec.json.encode(travelling)) == body_hash(msgspec.json.encode(body))


@given(BODIES, BODIES)
def test_two_bodies_that_differ_have_two_digests(one, other):
    """Whatever the model would read or the server would do must be the same (docs/adr/0009)."""
    for name in TRAVELS:
        one.pop(name, None)
        other.pop(name, None)
    same = msgspec.json.encode(one, order="sorted") == msgspec.json.encode(other, order="sorted")
    assert (body_hash(msgspec.json.encode(one)) == body_hash(msgspec.json.encode(other))) == same


@pytest.mark.parametrize("field", ["input", "model", "store", "background", "metadata", "nobody_knows_this"])
def test_every_other_field_counts(field):
    """Also one that nobody here reads: an upstream may."""
    assert body_hash(b"{}") != body_hash(json.dumps({field: "a"})) != body_hash(json.dumps({field: "b"}))


def test_the_same_name_further_inside_counts():
    """Only the create's own fields say how it travels."""
    inside = [json.dumps({"input": [{"stream": value}]}) for value in (True, False)]
    assert body_hash(inside[0]) != body_hash(inside[1])


@pytest.mark.parametrize(
    "unread", [b'{"x":"\\ud800"}', b'{"x":1e999}', b'{"x":' + b"[" * 5000 + b"]" * 5000 + b"}", b'{"x":"\xff"}']
)
def test_what_nobody_else_has_read_is_refused_if_it_is_no_json(unread):
    """A part that the decoder of creates has skipped (G11)."""
    with pytest.raises(ProtocolError) as raised:
        body_hash(unread)
    assert (raised.value.code, raised.value.status) == ("invalid_json", 400)


def test_the_refusals_name_the_key_and_what_to_do():
    """409 with a stable code: nothing was generated (docs/adr/0009)."""
    reused, lost = key_reused("key-1"), not_held("key-1", 5)
    assert [(error.status, error.code, error.param) for error in (reused, lost)] == [
        (409, "idempotency_key_reused", "idempotency_key"),
        (409, "resume_window_exceeded", "starting_after"),
    ]
    assert all("'key-1'" in error.message and "send the " in error.message for error in (reused, lost))


@pytest.mark.parametrize("code", sorted(ERRORS))
def test_a_failure_can_be_told_again(code):
    """What a failed response says is enough to answer with the same status, but where codes share a name."""
    error = ProtocolError(code, "What came.")
    again = failure_of(error.failure())
    assert again.message == error.message
    assert again.failure() == error.failure()
    unique = [each for each, kind in ERRORS.items() if kind.wire_code == error.kind.wire_code]
    assert len(unique) > 1 or again.status == error.status
