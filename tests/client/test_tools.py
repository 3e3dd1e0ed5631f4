"""A Python function becomes a tool: what the model is told of it, and what it is called with."""

from __future__ import annotations

import enum
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import pytest
from openai.types.responses import FunctionToolParam
from pydantic import TypeAdapter

from openline.client.errors import OpenlineError
from openline.client.tools import Tool, ToolCall, WrongArguments, as_tool, tool, toolbox

if TYPE_CHECKING:
    from decimal import Decimal


class Color(enum.Enum):
    RED = "red"


@dataclass
class Place:
    """Where something is."""

    city: str
    street: str = ""


def search(word: str, folder: str = ".", *, places: list[Place] | None = None, kind: Literal["a", "b"] = "a") -> str:
    """Find a word.

    It looks into every file.

    Args:
        word: what to look for,
            letter by letter.
        folder: where.

    Returns:
        The lines.
    """
    return f"{word} {folder} {places} {kind}"


def call(**arguments: Any) -> ToolCall:
    return ToolCall("sess_1", 2, "call_1", "search", arguments)


def keywords(of: Tool, arguments: str) -> dict[str, Any]:
    return of.keywords(call(), arguments)


class TestSchema:
    def test_the_model_is_told_what_signature_and_docstring_say(self):
        """Types and defaults from the one, descriptions from the other; the result is of no concern to the model."""
        assert as_tool(search).wire == {
            "type": "function",
            "name": "search",
            "description": "Find a word.\n\nIt looks into every file.",
            "strict": False,
            "parameters": {
                "type": "object",
                "properties": {
                    "word": {"type": "string", "description": "what to look for,\nletter by letter."},
                    "folder": {"type": "string", "description": "where.", "default": "."},
                    "places": {
                        "anyOf": [{"type": "array", "items": {"$ref": "#/$defs/Place"}}, {"type": "null"}],
                        "default": None,
                    },
                    "kind": {"enum": ["a", "b"], "default": "a"},
                },
                "required": ["word"],
                "additionalProperties": False,
                "$defs": {
                    "Place": {
                        "title": "Place",
                        "description": "Where something is.",
                        "type": "object",
                        "properties": {"city": {"type": "string"}, "street": {"type": "string", "default": ""}},
                        "required": ["city"],
                    }
                },
            },
        }

    def test_the_wire_is_what_the_sdk_takes(self):
        """Source: `openai.types.responses.FunctionToolParam`."""
        TypeAdapter(FunctionToolParam).validate_python(as_tool(search).wire)

    @pytest.mark.parametrize(
        "docstring",
        [
            "Find.\n\nArgs:\n    word: what to look for",
            "Find.\n\nParameters\n----------\nword : str\n    what to look for",
            "Find.\n\n:param word: what to look for",
        ],
        ids=["google", "numpy", "sphinx"],
    )
    def test_docstrings_of_every_usual_style_are_read(self, docstring: str):
        """Google, NumPy and Sphinx."""

        def find(word: str) -> str:
            return word

        find.__doc__ = docstring
        wire = as_tool(find).wire
        assert wire["description"] == "Find."
        assert wire["parameters"]["properties"]["word"]["description"] == "what to look for"

    def test_bounds_of_a_type_are_told_and_kept(self):
        """`Annotated` with msgspec's `Meta` says more than a type, and keeps what the docstring says."""

        def wait(seconds: Annotated[int, msgspec.Meta(ge=1, le=5)]) -> None:
            """Wait.

            Args:
                seconds: how long.
            """

        made = as_tool(wait)
        told = made.wire["parameters"]["properties"]["seconds"]
        assert told == {"type": "integer", "minimum": 1, "maximum": 5, "description": "how long."}
        with pytest.raises(WrongArguments, match="argument 'seconds': expected `int` <= 5"):
            keywords(made, '{"seconds": 9}')

    def test_a_function_without_parameters_takes_an_empty_object(self):
        """Models send `{}` then, and some nothing at all."""

        def now() -> str:
            return ""

        made = as_tool(now)
        assert made.wire["parameters"] == {
            "type": "object",
            "properties": {},
            "required": [],
            "additionalProperties": False,
        }
        assert keywords(made, "{}") == keywords(made, "") == {}

    def test_options_overrule_what_the_function_says(self):
        """Name and description; the function stays the function that it is."""
        noted = tool(name="find-it", description="Finds.")(search)
        assert noted is search
        try:
            wire = as_tool(search).wire
            assert (wire["name"], wire["description"]) == ("find-it", "Finds.")
        finally:
            del search.__openline_tool__  # pyright: ignore[reportFunctionMemberAccess]

    def test_methods_and_partials_are_tools(self):
        """A bound method without its `self`, a partial without what it already has."""

        class Folder:
            @tool(idempotent=True)
            def read(self, name: str) -> str:
                """Read a file."""
                return name

            @tool
            async def write(self, name: str) -> None:
                """Write one."""

        read = as_tool(Folder().read)
        assert list(read.wire["parameters"]["properties"]) == ["name"]
        assert (read.options.idempotent, read.is_async, as_tool(Folder().write).is_async) == (True, False, True)
        found = as_tool(tool(name="found")(functools.partial(search, "x")))
        assert found.wire["description"].startswith("Find a word.")
        assert list(found.wire["parameters"]["properties"]) == ["folder", "places", "kind"]

    def test_objects_with_an_async_call_are_async(self):
        """`__call__` is what is looked at."""

        class Ask:
            __name__ = "ask"

            async def __call__(self, word: str) -> str:
                return word

        assert as_tool(Ask()).is_async

    @pytest.mark.parametrize(
        ("signature", "says"),
        [
            ("word", "parameter 'word' has no type"),
            ("word: str, /", "parameter 'word' is positional-only"),
            ("*words: str", "parameter 'words' is variadic positional"),
            ("**words: str", "parameter 'words' is variadic keyword"),
            ("word: object()", "parameter 'word'"),
            ("word: Tool", "parameter 'word'"),
        ],
    )
    def test_what_a_model_cannot_pass_is_refused_where_it_is_written(self, signature: str, says: str):
        """The error names tool and parameter, and says what was expected."""
        scope: dict[str, Any] = {"tool": tool, "Tool": Color.__class__}
        with pytest.raises(TypeError, match=says) as raised:
            exec(f"@tool\ndef look({signature}): ...", scope)
        assert "tool 'look'" in str(raised.value)
        assert "expected" in str(raised.value)

    def test_a_type_that_is_only_imported_for_the_checker_is_named(self):
        """Otherwise a NameError would come out of the depths."""

        def pay(amount: Decimal) -> None: ...

        with pytest.raises(TypeError, match=r"tool 'pay'.*'Decimal' is not defined.*TYPE_CHECKING"):
            as_tool(pay)

    @pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a.b", "ä"])
    def test_a_name_that_no_server_takes_is_refused(self, name: str):
        """1 to 64 letters, digits, `_`, `-`, as OpenAI has it."""

        def look(word: str) -> None: ...

        look.__name__ = name
        with pytest.raises(ValueError, match=r"1 to 64 letters.*@tool\(name=…\)"):
            as_tool(look)
        look.__name__ = "x" * 64
        assert as_tool(look).name == "x" * 64

    @pytest.mark.parametrize("seconds", [0, -1, float("nan")])
    def test_a_time_limit_is_more_than_nothing(self, seconds: float):
        """The decorator says so where it stands."""
        with pytest.raises(ValueError, match="timeout_seconds"):
            tool(timeout_seconds=seconds)


class TestArguments:
    def test_they_are_decoded_into_the_types_of_the_signature(self):
        """Dataclasses too; what was left out is left to the function's default."""
        assert keywords(as_tool(search), '{"word": "x", "places": [{"city": "Rome"}]}') == {
            "word": "x",
            "places": [Place("Rome")],
        }

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ('{"word": 3}', "argument 'word': expected `str`, got `int`"),
            ('{"word": "x", "kind": "c"}', "argument 'kind': invalid enum value 'c'"),
            ('{"word": "x", "places": [{"city": 1}]}', "argument 'places[0].city': expected `str`, got `int`"),
            ("{}", "object missing required field `word`"),
            ('{"word": "x", "words": "y"}', "object contains unknown field `words`"),
            ("[]", "expected `object`, got `array`"),
            ('{"word": ', "the arguments are not JSON: Input data was truncated"),
            ("word", "the arguments are not JSON"),
        ],
    )
    def test_what_is_wrong_with_them_names_the_field(self, arguments: str, says: str):
        """The model reads it, and can mend its call."""
        with pytest.raises(WrongArguments) as raised:
            keywords(as_tool(search), arguments)
        assert says in str(raised.value)

    def test_a_parameter_of_type_tool_call_gets_the_call(self):
        """The model does not see it; its key is the same when the call is run again, and no other call's."""

        def pay(amount: int, this: ToolCall) -> str:
            return f"{amount} {this.key}"

        made = as_tool(pay)
        assert list(made.wire["parameters"]["properties"]) == ["amount"]
        given = made.keywords(call(amount=1), '{"amount": 1}')
        assert given == {"amount": 1, "this": call(amount=1)}
        assert pay(**given) == "1 sess_1/2/call_1"


class TestToolbox:
    def test_dicts_are_the_servers_own_tools(self):
        """They are passed on, and not run here."""
        box = toolbox([search, {"type": "web_search"}])
        assert box.wire == [as_tool(search).wire, {"type": "web_search"}]
        assert list(box.tools) == ["search"]

    def test_two_tools_of_one_name_are_refused(self):
        """A call could not say which of them it means."""
        with pytest.raises(OpenlineError, match="two are called 'search'"):
            toolbox([search, search])

    def test_only_what_says_so_is_idempotent(self):
        """An unknown name is not."""
        box = toolbox([search])
        assert not box.is_idempotent("search")
        assert not box.is_idempotent("nothing")
