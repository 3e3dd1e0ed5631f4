"""JSON schemas narrowed to what a small model can be held to: everything short, nothing optional, no open end.

A schema comes unchecked from a client: a part of it that cannot be read counts as a text. So does one with a
`pattern`: llama.cpp reads the simplest ones only, and fails the turn at others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from openline.engines.scripted import example

Schema = dict[str, Any]

_DEPTH_MAX: Final = 16
_PARTS_MAX: Final = 64  # of the whole: a part that refers twice to its like doubles at every depth
_ITEMS_MAX: Final = 16  # of an array and its like, whatever its schema asks for
_CHARACTERS_MAX: Final = 256
_LETTERS: Final = (3, 9)  # of a text, where its schema allows
_SPAN: Final = 8  # between the least and the most of an integer
_SAFE_INTEGER: Final = 2**53
# Bounds of a number that leave it too little room, or none, for a range of whole ones.
_ODD_BOUNDS: Final = ("multipleOf", "exclusiveMinimum", "exclusiveMaximum")
# llama.cpp makes a grammar of these formats; others it takes for any text.
_FORMATS: Final = frozenset({"date", "time", "date-time", "uuid"})


def bounded(parameters: Any) -> Schema:
    """A schema of which every value is short, and which `parameters` accepts too, but for its patterns and depths.

    Args:
        parameters: a tool's JSON schema, of an object.
    """
    whole = _Whole(_dict(parameters))
    return _object(_resolved(whole.root, whole.root), whole, 0)


class _Whole:
    """The schema that a part belongs to, and how many parts may still be made of it."""

    def __init__(self, root: Schema) -> None:
        self.root = root
        self.parts_left = _PARTS_MAX


def _part(schema: Any, whole: _Whole, depth: int) -> Schema:
    if not whole.parts_left:
        return {"const": example(schema, 1, depth)}
    whole.parts_left -= 1
    found = _resolved(_dict(schema), whole.root)
    if "const" in found or _list(found.get("enum")):
        return {key: found[key] for key in ("const", "enum") if key in found}
    if depth >= _DEPTH_MAX or "allOf" in found:
        return {"const": example(found, 1, depth)}
    if variants := _list(found.get("anyOf")) or _list(found.get("oneOf")):
        return _part(variants[0], whole, depth + 1)
    kind: Any = found.get("type", "object" if "properties" in found else "string")
    make = _KINDS.get(str(next(iter(_list(kind)), kind)), _text)
    return make(found, whole, depth)


def _object(schema: Schema, whole: _Whole, depth: int) -> Schema:
    offered = _dict(schema.get("properties"))
    required = _list(schema.get("required")) or list(offered)
    properties = {name: _part(offered[name], whole, depth + 1) for name in offered if name in required}
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _array(schema: Schema, whole: _Whole, depth: int) -> Schema:
    most = _integer_of(schema.get("maxItems"), 1)
    count = max(0, min(_integer_of(schema.get("minItems"), min(most, 1)), _ITEMS_MAX))
    return {
        "type": "array",
        "items": _part(schema.get("items"), whole, depth + 1),
        "minItems": count,
        "maxItems": count,
    }


def _text(schema: Schema, _whole: _Whole, _depth: int) -> Schema:
    if str(schema.get("format")) in _FORMATS:
        return {"type": "string", "format": schema["format"]}
    least = min(_integer_of(schema.get("minLength"), 0), _CHARACTERS_MAX)
    most = _integer_of(schema.get("maxLength"), _LETTERS[1])
    low = max(least, min(_LETTERS[0], most))
    return {"type": "string", "pattern": f"^[a-z]{{{low},{max(low, min(most, _LETTERS[1]))}}}$"}


def _integer(schema: Schema, _whole: _Whole, _depth: int) -> Schema:
    bounds = [schema[name] for name in ("minimum", "maximum") if name in schema]
    if any(name in schema for name in _ODD_BOUNDS) or not all(map(_is_whole, bounds)):
        return {"const": example(schema, 1)}
    most = _integer_of(schema.get("maximum"), _SAFE_INTEGER)
    least = _integer_of(schema.get("minimum"), min(1, most))
    return {"type": "integer", "minimum": least, "maximum": min(most, least + _SPAN)}


def _boolean(_schema: Schema, _whole: _Whole, _depth: int) -> Schema:
    return {"type": "boolean"}


def _null(_schema: Schema, _whole: _Whole, _depth: int) -> Schema:
    return {"type": "null"}


_KINDS: Final[Mapping[str, Callable[[Schema, _Whole, int], Schema]]] = {
    "object": _object,
    "array": _array,
    "string": _text,
    "integer": _integer,
    "number": _integer,
    "boolean": _boolean,
    "null": _null,
}


def _resolved(schema: Schema, root: Schema) -> Schema:
    """What a local `$ref` names; an empty schema where it names nothing."""
    for _ in range(_DEPTH_MAX):
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        found: Any = root
        for step in reference.removeprefix("#").split("/")[1:]:
            found = _dict(found).get(step)
        schema = _dict(found)
    return {}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _SAFE_INTEGER


def _integer_of(value: Any, otherwise: int) -> int:
    """A whole number that a schema names; JSON has no other kind, so 1.0 is one too."""
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise


def _dict(value: Any) -> Schema:
    return cast("Schema", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return cast("list[Any]", value) if isinstance(value, list) else []
