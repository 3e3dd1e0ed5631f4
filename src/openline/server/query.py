"""Query parameters, checked as strictly as bodies are.

Source: Responses API reference, "Get a model response", "List input items".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Final, Literal, NamedTuple, get_args

from openline.protocol.errors import ProtocolError
from openline.protocol.events import Include

PAGE_ITEMS_MAX: Final = 100
_INCLUDE: Final = re.compile(r"include(\[\d*\])?\Z", re.ASCII)  # the SDKs write `include[]`
_INCLUDABLE: Final = frozenset(get_args(Include))
_PAGE_ITEMS: Final = 20


class Page(NamedTuple):
    """Which part of a list is wanted.

    Attributes:
        after: the id of the last item that the client has.
    """

    limit: int
    order: Literal["asc", "desc"]
    after: str | None


def page_of(query: Mapping[str, str]) -> Page:
    """`limit`, `order` and `after`.

    Raises:
        ProtocolError: one of them is not what the reference allows.
    """
    limit = whole_number(query, "limit")
    if limit is not None and not 1 <= limit <= PAGE_ITEMS_MAX:
        raise _invalid("limit", str(limit), f"1 to {PAGE_ITEMS_MAX}")
    order = query.get("order", "desc")
    if order not in {"asc", "desc"}:
        raise _invalid("order", order, "'asc' or 'desc'")
    return Page(_PAGE_ITEMS if limit is None else limit, "asc" if order == "asc" else "desc", query.get("after"))


def whole_number(query: Mapping[str, str], name: str) -> int | None:
    """A number from 0 on; None if it is not given.

    Raises:
        ProtocolError: it is something else.
    """
    text = query.get(name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise _invalid(name, text, "a whole number")
    return int(text)


def flag(query: Mapping[str, str], name: str) -> bool:
    """`true` or `false`; false if it is not given.

    Raises:
        ProtocolError: it is something else.
    """
    text = query.get(name, "false").lower()
    if text not in {"true", "false"}:
        raise _invalid(name, text, "'true' or 'false'")
    return text == "true"


def included(query: Iterable[tuple[str, str]]) -> frozenset[str]:
    """What `include` names, however often it is given.

    Raises:
        ProtocolError: one of them is not what a create may include.
    """
    named = frozenset(value for name, value in query if _INCLUDE.match(name))
    for value in sorted(named - _INCLUDABLE):
        raise _invalid("include", value, f"one of {', '.join(sorted(_INCLUDABLE))}")
    return named


def _invalid(name: str, came: str, expected: str) -> ProtocolError:
    return ProtocolError("invalid_value", f"'{name}' is '{came[:64]}': expected {expected}.", param=name)
