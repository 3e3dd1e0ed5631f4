"""A tool: a Python function that a model may call, sync or async.

Its signature and docstring say what the model is told of it; `@openline.tool(…)` says the rest.

Source: Responses API reference, "Function tools", "Function call output".
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, TypeVar, cast, overload

import msgspec
from msgspec import UNSET

from openline.client.errors import OpenlineError
from openline.client.tool_schema import Function, Signature, read_signature
from openline.client.wire import Item

F = TypeVar("F", bound=Function)

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")  # what OpenAI takes as a function's name
_NOT_BOUND_YET: Final = frozenset({"self", "cls"})  # a method, whose signature is read where it is given to a run
_TOLD: Final = "__openline_tool__"


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a tool, as the model made it. A tool gets it by a parameter of this type, which the model does not see.

    Attributes:
        session_id: of the conversation.
        turn: the number of the turn in it that made the call, from 1.
        call_id: the wire's, unique within its turn.
        arguments: as plain JSON values; empty if the model wrote none that can be read.
    """

    session_id: str
    turn: int
    call_id: str
    name: str
    arguments: dict[str, Any]

    @property
    def key(self) -> str:
        """The same when the call is run again, and no other call's: what another service takes as an idempotency key."""
        return f"{self.session_id}/{self.turn}/{self.call_id}"


class ToolOptions(msgspec.Struct, frozen=True):
    """What `tool` notes on a function.

    Attributes:
        idempotent: running it twice does what running it once does, so that a call whose outcome is unknown is run again.
        timeout_seconds: None is `run_tools`' own.
        name: empty is the function's.
        description: empty is the docstring's.
    """

    idempotent: bool = False
    timeout_seconds: float | None = None
    name: str = ""
    description: str = ""


class Tool(msgspec.Struct, frozen=True):
    """A function, with what the model is told of it."""

    name: str
    function: Function
    options: ToolOptions
    signature: Signature

    @property
    def wire(self) -> Item:
        """The tool as a create has it.

        Not `strict`, whose subset of JSON Schema knows no defaults: the arguments are checked here in any case.
        """
        return {
            "type": "function",
            "name": self.name,
            "description": self.options.description or self.signature.description,
            "parameters": self.signature.parameters,
            "strict": False,
        }

    @property
    def is_async(self) -> bool:
        """Whether calling it gives a coroutine; everything else is run in a thread."""
        call = getattr(self.function, "__call__", None)  # noqa: B004 - of an object that is called, its method
        return inspect.iscoroutinefunction(self.function) or inspect.iscoroutinefunction(call)

    def keywords(self, call: ToolCall, arguments: str) -> dict[str, Any]:
        """What the function is called with.

        Args:
            arguments: JSON, as the model wrote it; none at all counts as no arguments.

        Raises:
            WrongArguments: they are not what the schema asks for.
        """
        try:
            decoded = msgspec.json.decode(arguments or "{}", type=self.signature.arguments)
        except msgspec.ValidationError as error:
            raise WrongArguments(_in_words(error)) from None
        except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
            raise WrongArguments(f"the arguments are not JSON: {error}") from None
        given = dict.fromkeys(self.signature.given, call)
        fields = self.signature.arguments.__struct_fields__
        return given | {name: value for name in fields if (value := getattr(decoded, name)) is not UNSET}


class WrongArguments(Exception):  # noqa: N818 - what the model did
    """The arguments of a call are not what its tool takes; the message is for the model."""


@overload
def tool(function: F, /) -> F: ...
@overload
def tool(
    *, idempotent: bool = False, timeout_seconds: float | None = None, name: str = "", description: str = ""
) -> Callable[[F], F]: ...
def tool(
    function: F | None = None,
    /,
    *,
    idempotent: bool = False,
    timeout_seconds: float | None = None,
    name: str = "",
    description: str = "",
) -> F | Callable[[F], F]:
    """Say of a function more than its signature does. It stays the function that it is.

    Args:
        idempotent: running it twice does what running it once does. After a crash, a call whose outcome nobody noted is
            then run again by itself.
        timeout_seconds: how long a call may take; `run_tools`' `tool_seconds_max` unless given.
        name: what the model knows it by; the function's own unless given.
        description: what the model is told of it; the docstring's unless given.

    Raises:
        TypeError: the signature has a parameter that a model cannot pass; the message names it.
        ValueError: the name or the time is none.
    """
    if timeout_seconds is not None and not timeout_seconds > 0:
        raise ValueError(f"timeout_seconds is {timeout_seconds}: expected more than 0.")
    options = ToolOptions(idempotent, timeout_seconds, name, description)

    def note(function: F) -> F:
        setattr(function, _TOLD, options)
        if next(iter(inspect.signature(function).parameters), "") not in _NOT_BOUND_YET:
            as_tool(function)  # what is wrong with it shows where it is written
        return function

    return note if function is None else note(function)


def as_tool(function: Function) -> Tool:
    """The tool that a function is.

    Raises:
        TypeError: the signature has a parameter that a model cannot pass; the message names it.
        ValueError: it has no name that a model could call it by.
    """
    options: ToolOptions = getattr(function, _TOLD, ToolOptions())
    name = options.name or getattr(function, "__name__", "")
    if not _NAME.match(name):
        raise ValueError(
            f"the name of tool {name or function!r} is no tool's: expected 1 to 64 letters, digits, '_' and '-'; "
            "give it one with @tool(name=…)."
        )
    return Tool(name, function, options, read_signature(function, name, given=(ToolCall,)))


def is_noted(function: Function) -> bool:
    """Whether `tool` was used on it."""
    return hasattr(function, _TOLD)


class Toolbox(msgspec.Struct, frozen=True):
    """The tools of a run.

    Attributes:
        tools: by name; these are run here.
        hosted: as the wire has them; these the server runs.
    """

    tools: Mapping[str, Tool]
    hosted: tuple[Item, ...] = ()

    @property
    def wire(self) -> list[Item]:
        """All of them, as a create has them."""
        return [*(each.wire for each in self.tools.values()), *self.hosted]

    def is_idempotent(self, name: str) -> bool:
        """Whether a call of this name may simply be run again."""
        return name in self.tools and self.tools[name].options.idempotent


def toolbox(given: Iterable[Function | Item]) -> Toolbox:
    """The tools out of functions, and of dicts for those that the server runs.

    Raises:
        TypeError: as `as_tool`.
        ValueError: likewise.
        OpenlineError: two have the same name.
    """
    tools: dict[str, Tool] = {}
    hosted: list[Item] = []
    for each in given:
        if isinstance(each, dict):
            hosted.append(cast("Item", each))
            continue
        made = as_tool(each)
        if made.name in tools:
            raise OpenlineError(f"tools: two are called '{made.name}'; give one another name with @tool(name=…).")
        tools[made.name] = made
    return Toolbox(tools, tuple(hosted))


def _in_words(error: msgspec.ValidationError) -> str:
    """A decoder's message as a model reads it: the field first."""
    says, _, path = str(error).partition(" - at `$")
    field = path.strip("`").lstrip(".")
    says = says[:1].lower() + says[1:]
    return f"argument '{field}': {says}" if field else says
