"""Items as lists show them: each with an id, and with what clients may leave out.

Source: Responses API reference, "The input item list", "Items".
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from openline.protocol.ids import input_item_id

_NULL: Final = msgspec.Raw(b"null")


class _Head(msgspec.Struct):
    type: str | None = None
    id: str | None = None
    role: str | None = None
    status: msgspec.Raw = _NULL
    content: msgspec.Raw = _NULL


_head: Final = msgspec.json.Decoder(_Head)
_fields: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])  # not read further, however deep they are
_text: Final = msgspec.json.Decoder(str)


def listed_input(raws: Iterable[bytes | msgspec.Raw], response_id: str) -> list[dict[str, Any]]:
    """A response's input items, each with its type, its content as parts, and its status.

    One that came without an id, or with another's, gets one that tells its place: whoever pages on from an id that
    two have would go round in a circle.
    """
    items: list[dict[str, Any]] = []
    taken: set[str] = set()
    for index, raw in enumerate(raws):
        head = _head.decode(raw)
        item_id = head.id
        if not item_id or item_id in taken:
            item_id = input_item_id(head.type or "message", response_id, index)
        taken.add(item_id)
        items.append(_listed(raw, head, item_id))
    return items


def listed_item(raw: bytes | msgspec.Raw, item_id: str) -> dict[str, Any]:
    """An item that somebody sent, under an id of ours, with its type, its content as parts, and its status."""
    return _listed(raw, _head.decode(raw), item_id)


def _listed(raw: bytes | msgspec.Raw, head: _Head, item_id: str) -> dict[str, Any]:
    item_type = head.type or "message"
    item: dict[str, Any] = {**_fields.decode(raw), "type": item_type, "id": item_id}
    if item_type == "message" and bytes(head.content).startswith(b'"'):
        item["content"] = [_part(_text.decode(head.content), head.role)]
    if bytes(head.status) == b"null" and item_type.endswith(("message", "_call", "_output")):
        item["status"] = "completed"
    return item


def _part(text: str, role: str | None) -> dict[str, Any]:
    if role == "assistant":
        return {"type": "output_text", "text": text, "annotations": []}
    return {"type": "input_text", "text": text}
