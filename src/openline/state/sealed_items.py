"""Items whose content is sealed: summaries and reasoning, closed for the client and opened for the model.

Source: Responses API reference, "Compaction", "Reasoning", `encrypted_content`; docs/adr/0008.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from openline.protocol.errors import ProtocolError
from openline.protocol.fold import Event
from openline.protocol.items import Item
from openline.state.sealing import Seal, Unsealable

COMPACTION: Final = "compaction"
_SEALED: Final = frozenset({COMPACTION, "reasoning"})
_HEAD: Final = "Summary of the conversation so far, which stands for everything before it:\n\n"


class _Sealed(msgspec.Struct):
    id: str | None = None
    encrypted_content: str | None = None


_sealed: Final = msgspec.json.Decoder(_Sealed)
_encoder: Final = msgspec.json.Encoder()


def opened(items: Iterable[Item], owner: str, seal: Seal, *, param: str = "input") -> list[Item]:
    """The items with what we sealed as the model is to read it; what another server sealed stays as it is.

    A summary that was cut before it was written stands for nothing, and is left out.

    Args:
        param: which field of the request they are from.

    Raises:
        ProtocolError: it bears our mark, but was sealed with another key or for another owner, or was altered.
    """
    read = (_opened(item, owner, seal, param) if item.type in _SEALED else item for item in items)
    return [item for item in read if item is not None]


def _opened(item: Item, owner: str, seal: Seal, param: str) -> Item | None:
    try:
        sealed = _sealed.decode(item.raw)
    except msgspec.ValidationError:
        return item  # its engine says what is wrong with it
    text = sealed.encrypted_content
    if text == "" and item.type == COMPACTION:
        return None
    if text is None or not seal.is_ours(text):
        return item
    try:
        content = seal.open(owner, item.type, text)
    except Unsealable:
        message = f"The 'encrypted_content' of an item of type '{item.type}' was altered, or is not of this server."
        raise ProtocolError("invalid_value", message, param=param) from None
    if item.type == COMPACTION:
        message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": _HEAD + content}]}
        return Item(_encoder.encode(message), "message", sealed=item.raw, sums_up=True)
    its_id = {} if sealed.id is None else {"id": sealed.id}
    reasoning: Event = {"type": "reasoning", **its_id, "summary": [], **msgspec.json.decode(content)}
    return Item(_encoder.encode(reasoning), "reasoning", sealed=item.raw)


def compaction_item(summary: str, owner: str, seal: Seal) -> Event:
    """A summary as an output item, without its id."""
    return {"type": COMPACTION, "encrypted_content": seal.close(owner, COMPACTION, summary)}


def sealed_reasoning(item: Event, owner: str, seal: Seal) -> Event:
    """A reasoning item with its content sealed beside it, for a client that keeps nothing else of it.

    What another server sealed stays as it is, unless that is an Openline too: its mark is ours, so it goes inside.
    """
    encrypted: str = item.get("encrypted_content") or ""
    content: dict[str, Any] = {key: item[key] for key in ("summary", "content", "encrypted_content") if item.get(key)}
    if not content or (encrypted and not seal.is_ours(encrypted)):
        return item
    return {**item, "encrypted_content": seal.close(owner, "reasoning", msgspec.json.encode(content).decode())}
