"""What a model gets to read of a call: the tool's value, or what went wrong, bounded either way.

Source: Responses API reference, "Function tool call output" (`output`: a string, or content parts).
"""

from __future__ import annotations

from typing import Any, Final, cast

import msgspec

from openline.client.wire import Item

_PART_TYPES: Final = frozenset({"input_text", "input_image", "input_file"})
# Of an error's text; the rest seldom says more, and may hold anything.
ERROR_BYTES_MAX: Final = 2000

Content = str | list[Item]


class ToolOutput(msgspec.Struct, frozen=True):
    """The output of a call.

    Attributes:
        content: what the model reads: a text, or content parts as the wire has them.
        is_error: it says why there is no value; the wire has no field for that, so the text says it too.
    """

    content: Content
    is_error: bool = False


def output_of(value: Any, bytes_max: int) -> ToolOutput:
    """A tool's value as the model reads it.

    Args:
        value: a string, content parts, or anything that msgspec encodes, which becomes JSON.
        bytes_max: of the text in UTF-8; more is cut, and the text says so. Content parts that are larger become an error.

    Raises:
        TypeError: the value cannot be JSON; the message says what it is.
    """
    if isinstance(value, str):
        return ToolOutput(cut(value, bytes_max))
    encoded = _encoder.encode(value)
    if not _are_parts(value):
        return ToolOutput(cut(encoded.decode(), bytes_max))
    if len(encoded) > bytes_max:
        return error_output(f"its content parts are {len(encoded)} bytes long, {bytes_max} at most are passed on.")
    return ToolOutput(cast("list[Item]", value))


def error_output(text: str) -> ToolOutput:
    """An error as the model reads it."""
    return ToolOutput("Error: " + cut(text, ERROR_BYTES_MAX), is_error=True)


def cut(text: str, bytes_max: int) -> str:
    """As much of a text as fits, and a word on the rest."""
    encoded = text.encode(errors="replace")  # a lone surrogate is no text, and no server takes it
    if len(encoded) <= bytes_max:
        return encoded.decode()
    note = f"\n[cut: the first {bytes_max} of {len(encoded)} bytes]"
    return encoded[:bytes_max].decode(errors="ignore") + note


_encoder: Final = msgspec.json.Encoder()


def _are_parts(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    items = cast("list[Any]", value)
    return all(isinstance(item, dict) and cast("Item", item).get("type") in _PART_TYPES for item in items)
