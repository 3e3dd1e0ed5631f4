"""What makes two creates the same: the digest that an idempotency key is kept with.

Source: docs/adr/0009.
"""

from __future__ import annotations

import hashlib
from typing import Any, Final

import msgspec

from openline.protocol.errors import ProtocolError

# What only says how a create travels: a client may fall back from a socket to HTTP with the same key.
_TRAVELS: Final = ("type", "stream", "stream_id", "stream_options", "starting_after", "idempotency_key")
_fields: Final = msgspec.json.Decoder(dict[str, Any])
_encoder: Final = msgspec.json.Encoder(order="sorted")


def body_hash(body: str | bytes) -> bytes:
    """The SHA-256 of a create, whatever the order of its fields, its white space, and the way that it came.

    Args:
        body: the create as JSON, which was read before.

    Raises:
        ProtocolError: a part of it that nobody else has read is no JSON.
    """
    try:
        fields = _fields.decode(body)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        text = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ProtocolError("invalid_json", f"The message is not valid JSON: {text}.") from None
    for name in _TRAVELS:
        fields.pop(name, None)
    return hashlib.sha256(_encoder.encode(fields)).digest()


def key_reused(key: str) -> ProtocolError:
    """The one error for a key that stands for another create."""
    message = f"The idempotency key '{key}' was used with another body: send the same one again, or use a new key."
    return ProtocolError("idempotency_key_reused", message, param="idempotency_key")


def not_held(key: str, starting_after: int) -> ProtocolError:
    """The one error for events that nobody can give any more; nothing was generated."""
    message = (
        f"The events after {starting_after} of the turn with the idempotency key '{key}' are not held: "
        "send the create again without 'starting_after'."
    )
    return ProtocolError("resume_window_exceeded", message, param="starting_after")
