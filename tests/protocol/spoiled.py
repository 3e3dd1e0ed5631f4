"""Streams of events that are JSON, and not what they should be, or not where."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from hypothesis import strategies as st

ODD: list[Any] = [..., None, True, False, -1, 0, 7, 10**30, 1e308, "", "x", "message", "response.completed", "\0"]
ODD += [[], [None], [[[]]], {}, {"type": "x"}, {"type": []}, {"id": {}}]
# How an event is changed; where, as two fractions; and what is put there, an ellipsis for nothing.
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["double", "swap", "lose", *["spoil"] * 5]),
        st.floats(0, 1),
        st.floats(0, 1),
        st.sampled_from(ODD),
    ),
    max_size=4,
)
Change = tuple[str, float, float, Any]


def changed(events: Sequence[Any], changes: Sequence[Change]) -> list[Any]:
    """The events, one after the other lost, doubled, moved, or spoiled; what is no object stays whole."""
    events = list(events)
    for how, at, place, value in changes:
        index = int(at * (len(events) - 1))
        match how:
            case "double":
                events.insert(index, events[index])
            case "swap":
                other = int(place * (len(events) - 1))
                events[index], events[other] = events[other], events[index]
            case "lose":
                del events[index : index + len(events[1:2])]  # the last one stays
            case _:
                events[index] = spoiled(events[index], place, value)
    return events


def spoiled(event: Any, at: float, value: Any) -> Any:
    """An event of which one value is another, or is not there."""
    count = len(list(_places(event)))
    return spoiled_at(event, int(at * (count - 1)), value) if count else event


def every(event: Any, value: Any) -> Iterator[Any]:
    """The event once for each of its values, which is another there."""
    for number, _ in enumerate(_places(event)):
        yield spoiled_at(event, number, value)


def spoiled_at(event: Any, number: int, value: Any) -> Any:
    """An event of which this value is another, or is not there."""
    event = copy.deepcopy(event)
    inside, key = next(islice(_places(event), number, None))
    if value is ...:
        del inside[key]
    else:
        inside[key] = copy.deepcopy(value)
    return event


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Everything inside, as its holder and its key."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
