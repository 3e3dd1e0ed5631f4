"""What a GGUF file says of its model, read without loading it.

Source: GGUF specification, "File Structure".
"""

from __future__ import annotations

from pathlib import Path
from struct import Struct
from typing import IO, Final

import msgspec

_MAGIC: Final = b"GGUF"
_UINT32: Final = Struct("<I")
_UINT64: Final = Struct("<Q")
_STRING: Final = 8
_ARRAY: Final = 9
# The other types of a value, by their number.
_SCALARS: Final = {
    number: Struct(f"<{code}")
    for number, code in {
        0: "B",
        1: "b",
        2: "H",
        3: "h",
        4: "I",
        5: "i",
        6: "f",
        7: "?",
        10: "Q",
        11: "q",
        12: "d",
    }.items()
}
_KEYS_MAX: Final = 4096
_STRING_BYTES_MAX: Final = 4 * 1024 * 1024  # a chat template is the longest, at some ten thousand
_ARRAY_BYTES_MAX: Final = 1 << 40  # more than any file has: above it a position in the file has no number


class Header(msgspec.Struct, frozen=True):
    """A model's own words about itself.

    Attributes:
        architecture: such as `llama` or `qwen3`; empty if it does not say.
        context_tokens: the context that it was trained with, if it says so.
    """

    architecture: str = ""
    context_tokens: int | None = None


class BadGguf(Exception):  # noqa: N818 - what is wrong with the file
    """It is no GGUF file, or not a whole one; the message says which."""


def read_header(path: Path) -> Header:
    """Read as much of a file's metadata as is needed; they usually stand first.

    Raises:
        BadGguf: it is not a GGUF file, or it ends too early.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            raise BadGguf("it is not a GGUF file: it does not begin with 'GGUF'")
        _read(file, _UINT32)  # the version
        _read(file, _UINT64)  # how many tensors
        return _header(file, min(_read(file, _UINT64), _KEYS_MAX))


def _header(file: IO[bytes], keys: int) -> Header:
    architecture = ""
    for _ in range(keys):
        name = _text(file)
        value = _value(file, _read(file, _UINT32))
        if name == "general.architecture" and isinstance(value, str):
            architecture = value
        elif architecture and name == f"{architecture}.context_length" and isinstance(value, int):
            return Header(architecture, value if value > 0 else None)
    return Header(architecture)


def _value(file: IO[bytes], kind: int) -> object:
    """One value; of an array nothing, as none is asked for."""
    if kind == _STRING:
        return _text(file)
    if kind != _ARRAY:
        return _read(file, _scalar(kind))
    inner, count = _read(file, _UINT32), _read(file, _UINT64)
    if inner == _STRING:
        for _ in range(count):
            _skip(file, _read(file, _UINT64))
    else:
        _skip(file, _scalar(inner).size * count)
    return None


def _skip(file: IO[bytes], count: int) -> None:
    """Go on behind so many bytes, which may be more than there are: the next read tells."""
    if count > _ARRAY_BYTES_MAX:
        raise BadGguf(f"its metadata cannot be read: they have a list of {count} bytes")
    file.seek(count, 1)


def _scalar(kind: int) -> Struct:
    if kind not in _SCALARS:
        raise BadGguf(f"its metadata cannot be read: they have a value of type {kind}")
    return _SCALARS[kind]


def _text(file: IO[bytes]) -> str:
    length = _read(file, _UINT64)
    if length > _STRING_BYTES_MAX:
        raise BadGguf(f"its metadata cannot be read: they have a text of {length} bytes")
    return _bytes(file, length).decode(errors="replace")


def _read(file: IO[bytes], form: Struct) -> int:
    return form.unpack(_bytes(file, form.size))[0]


def _bytes(file: IO[bytes], count: int) -> bytes:
    found = file.read(count)
    if len(found) < count:
        raise BadGguf("it ends inside its metadata: is it a whole file?")
    return found
