"""Ids of items, which tell where the item is, so that a reference to one needs no index.

An item of a response has the response's own random part in its id, and its place behind it. Clients
take ids as they are; a response's id is no secret to whom its items were sent.

Source: Responses API reference, "Item reference"; docs/adr/0007.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Final, NamedTuple

_WORD: Final = re.compile(r"[a-z]{1,9}(?![a-z])")  # an id has at most 64 characters; some clients count
_PLACE: Final = re.compile(r"[a-z]+_([0-9a-f]{48})(i?)([0-9a-f]{4,8})\Z")
# The prefixes are convention; clients do not read them, people do.
_PREFIXES: Final = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
    "custom_tool_call": "ctc",
    "compaction": "cmp",
    "web_search_call": "ws",
    "mcp_call": "mcp",
}


class Place(NamedTuple):
    """Where an item is: which response, in its input or its output, and the how-manieth there."""

    response_id: str
    in_input: bool
    number: int


def prefix_of(item_type: str) -> str:
    """What the ids of items of a type begin with."""
    word = _WORD.match(item_type)
    return _PREFIXES.get(item_type) or (word[0] if word else "item")


def output_item_ids(response_id: str) -> Callable[[str], str]:
    """Makes the ids of a response's output items, one after the other, each with a prefix."""
    numbers = itertools.count()
    own = response_id.partition("_")[2]
    return lambda prefix: f"{prefix}_{own}{next(numbers):04x}"


def input_item_id(item_type: str, response_id: str, index: int) -> str:
    """The id of an input item that came without one."""
    return f"{prefix_of(item_type)}_{response_id.partition('_')[2]}i{index:04x}"


def place_of(item_id: str) -> Place | None:
    """Where an item is by its id; None if the id was not made here."""
    match = _PLACE.match(item_id)
    return Place(f"resp_{match[1]}", bool(match[2]), int(match[3], 16)) if match else None
