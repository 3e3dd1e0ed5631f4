"""From a function's signature and docstring to what a model is told of it, and a decoder of what the model answers.

The types are msgspec's: its JSON schema is what the model reads, and its decoder is
what checks the arguments, so the two cannot differ.

Source: Responses API reference, "Function tools"; JSON Schema 2020-12.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, get_type_hints

import docstring_parser
import msgspec
from msgspec import UNSET, Meta, UnsetType

Function = Callable[..., Any]
_DEFINITIONS: Final = "#/$defs/"
_NAMED: Final = frozenset({inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY})


class Signature(msgspec.Struct, frozen=True):
    """What is read of a function.

    Attributes:
        description: its docstring without the part on parameters; empty if it has none.
        parameters: the JSON schema of the object that holds the arguments.
        arguments: the struct that this object is decoded into; what has a default and was left out is `UNSET`.
        given: the parameters of a type that the caller of the tool gives, not the model: name → type.
    """

    description: str
    parameters: dict[str, Any]
    arguments: type[msgspec.Struct]
    given: dict[str, type]


def read_signature(function: Function, name: str, *, given: tuple[type, ...] = ()) -> Signature:
    """Read a function's signature and docstring.

    Args:
        function: each of its parameters has a type that msgspec can decode from JSON, and may be passed by name.
        name: what the tool is called; errors say it.
        given: types of parameters that the model does not see.

    Raises:
        TypeError: a parameter is not of that kind; the message names it.
    """
    written = function
    while isinstance(written, functools.partial):  # which has neither annotations nor a docstring of its own
        written = written.func
    docstring = docstring_parser.parse(inspect.getdoc(written) or "")
    said = {part.arg_name: part.description for part in docstring.params if part.description}
    hints = _type_hints(written, name)
    fields: list[tuple[str, Any] | tuple[str, Any, Any]] = []
    from_caller: dict[str, type] = {}
    for parameter in inspect.signature(function).parameters.values():
        hint = hints.get(parameter.name)
        if hint in given:
            from_caller[parameter.name] = hint
            continue
        _check(parameter, hint, name)
        fields.append(_field(parameter, hint, said.get(parameter.name)))
    # A name that no type of the caller's has: two of one name would get long ones in the schema.
    arguments = msgspec.defstruct("_arguments_of_a_tool", fields, kw_only=True, forbid_unknown_fields=True)
    return Signature(_description(docstring), _schema(arguments), arguments, from_caller)


def _type_hints(function: Function, name: str) -> Mapping[str, Any]:
    # A callable object has its annotations on the method.
    annotated = function if hasattr(function, "__annotations__") else type(function).__call__
    try:
        return get_type_hints(annotated, include_extras=True)
    except NameError as error:
        raise TypeError(
            f"tool '{name}': a type of its signature cannot be found: {error}; import it where the function's module is "
            "read, not only under TYPE_CHECKING."
        ) from None


def _check(parameter: inspect.Parameter, hint: Any, name: str) -> None:
    where = f"tool '{name}', parameter '{parameter.name}'"
    if parameter.kind not in _NAMED:
        kind = str(parameter.kind.description)
        raise TypeError(f"{where} is {kind}: expected one that can be passed by its name, as a model does.")
    if hint is None:
        raise TypeError(f"{where} has no type: expected one, such as `{parameter.name}: str`, for the model to go by.")
    try:
        msgspec.json.schema_components([_optional(hint)])
    except (TypeError, KeyError) as error:
        reason = str(error).strip().rpartition("\n")[2]
        expected = "expected a type that JSON can hold, as msgspec knows it: str, int, list[…], a dataclass, …"
        raise TypeError(f"{where}: {reason}; {expected}") from None


def _field(parameter: inspect.Parameter, hint: Any, said: str | None) -> tuple[str, Any] | tuple[str, Any, Any]:
    if parameter.default is inspect.Parameter.empty:
        return (parameter.name, Annotated[hint, Meta(description=said)] if said else hint)
    # Left out is left out, and the function's own default holds; the model is told of it where JSON can say it.
    extra = _default(parameter.default)
    return (parameter.name, Annotated[_optional(hint), Meta(description=said, extra_json_schema=extra)], UNSET)


def _optional(hint: Any) -> Any:
    return hint | UnsetType if not isinstance(hint, str) else hint


def _default(value: Any) -> dict[str, Any] | None:
    try:
        return {"default": msgspec.json.decode(msgspec.json.encode(value))}
    except (TypeError, ValueError):
        return None


def _schema(arguments: type[msgspec.Struct]) -> dict[str, Any]:
    """The schema of the object itself, which models read, and not a reference to it."""
    (reference,), components = msgspec.json.schema_components([arguments], ref_template=f"{_DEFINITIONS}{{name}}")
    schema: dict[str, Any] = components.pop(reference["$ref"].removeprefix(_DEFINITIONS))
    del schema["title"]
    return {**schema, "$defs": components} if components else schema


def _description(docstring: docstring_parser.Docstring) -> str:
    parts = (docstring.short_description, docstring.long_description)
    return "\n\n".join(part.strip() for part in parts if part and part.strip())
