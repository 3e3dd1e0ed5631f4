"""Schemas narrowed so that whatever is generated under them is short, and fits the tool's own."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.engines.schemas import bounded


def narrowed(part):
    """One property's schema, narrowed."""
    return bounded({"type": "object", "properties": {"x": part}, "required": ["x"]})["properties"]["x"]


@pytest.mark.parametrize(
    ("offered", "narrow"),
    [
        ({"type": "string"}, {"type": "string", "pattern": "^[a-z]{3,9}$"}),
        ({"type": "string", "minLength": 20}, {"type": "string", "pattern": "^[a-z]{20,20}$"}),
        ({"type": "string", "maxLength": 2}, {"type": "string", "pattern": "^[a-z]{2,2}$"}),
        ({"type": "string", "pattern": "[0-9]+"}, {"type": "string", "pattern": "^[a-z]{3,9}$"}),
        ({"type": "string", "minLength": 1e300, "maxLength": -1}, {"type": "string", "pattern": "^[a-z]{256,256}$"}),
        ({"type": "string", "format": ["date"]}, {"type": "string", "pattern": "^[a-z]{3,9}$"}),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        ({"type": "string", "format": "email"}, {"type": "string", "pattern": "^[a-z]{3,9}$"}),
        ({"enum": ["a", 1]}, {"enum": ["a", 1]}),
        ({"const": {"a": 1}}, {"const": {"a": 1}}),
        ({"type": "integer"}, {"type": "integer", "minimum": 1, "maximum": 9}),
        ({"type": "integer", "maximum": -3}, {"type": "integer", "minimum": -3, "maximum": -3}),
        ({"type": "integer", "minimum": 5, "maximum": 6}, {"type": "integer", "minimum": 5, "maximum": 6}),
        ({"type": "integer", "minimum": 2**53}, {"type": "integer", "minimum": 2**53, "maximum": 2**53}),
        ({"type": "integer", "minimum": 2**53 + 1}, {"const": 2**53 + 1}),
        ({"type": "number", "minimum": 0.5, "maximum": 0.7}, {"const": 0.7}),
        ({"type": "number", "multipleOf": 0.5}, {"const": 1}),
        ({"type": "boolean"}, {"type": "boolean"}),
        ({"type": ["null", "string"]}, {"type": "null"}),
        ({"anyOf": [{"type": "null"}, {"type": "string"}]}, {"type": "null"}),
        ({"allOf": [{"type": "string"}]}, {"const": "item-01"}),
        (True, {"type": "string", "pattern": "^[a-z]{3,9}$"}),
        ({"type": "unheard-of"}, {"type": "string", "pattern": "^[a-z]{3,9}$"}),
        (
            {"type": "array", "items": {"type": "boolean"}, "minItems": 2},
            {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
        ),
        (
            {"type": "array", "items": {"type": "boolean"}, "maxItems": 9},
            {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 1},
        ),
        (
            {"type": "array", "items": {"type": "boolean"}, "minItems": -1},
            {"type": "array", "items": {"type": "boolean"}, "minItems": 0, "maxItems": 0},
        ),
        (
            {"type": "array", "items": {"type": "boolean"}, "minItems": 1000},
            {"type": "array", "items": {"type": "boolean"}, "minItems": 16, "maxItems": 16},
        ),
    ],
)
def test_every_kind_of_value_gets_an_end(offered, narrow):
    """Nothing of unbounded length is left, and what the client bounded already stays within its bounds."""
    assert narrowed(offered) == narrow


def test_only_what_is_required_is_generated():
    """An optional property costs tokens and says nothing."""
    schema = {"properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}}, "required": ["b", "missing"]}
    assert bounded(schema) == {
        "type": "object",
        "properties": {"b": {"type": "boolean"}},
        "required": ["b"],
        "additionalProperties": False,
    }


def test_references_are_followed():
    """SDKs that make schemas out of classes put the parts into `$defs`."""
    schema = {
        "properties": {"point": {"$ref": "#/$defs/Point"}, "lost": {"$ref": "#/$defs/Nowhere"}},
        "$defs": {"Point": {"properties": {"x": {"type": "integer", "maximum": 0}}}},
    }
    properties = bounded(schema)["properties"]
    assert properties["point"]["properties"]["x"] == {"type": "integer", "minimum": 0, "maximum": 0}
    assert properties["lost"]["type"] == "string"
    assert bounded({"$ref": "#/$defs/P", "$defs": {"P": {"properties": {"x": {"type": "null"}}}}})["required"] == ["x"]


@pytest.mark.parametrize("parameters", [None, "text", [], {"properties": []}, {"properties": {}}])
def test_what_is_no_schema_is_an_object_without_properties(parameters):
    """Schemas come unchecked from clients."""
    assert bounded(parameters)["properties"] == {}


@pytest.mark.parametrize("branches", [1, 2, 8])
def test_a_schema_that_holds_itself_ends(branches):
    """A recursive type is cut off with constants, before it has doubled at every depth."""
    node = {"properties": {str(number): {"$ref": "#/$defs/Node"} for number in range(branches)}}
    narrow = bounded({"properties": {"node": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": node}})
    assert 100 < len(msgspec.json.encode(narrow)) < 20_000


# What narrowing looks at, and names of properties.
KEYWORDS = st.sampled_from(
    ["type", "properties", "required", "items", "minItems", "maxItems", "minimum", "maximum", "minLength"]
) | st.sampled_from(["maxLength", "format", "enum", "const", "anyOf", "oneOf", "allOf", "$ref", "$defs", "x"])
WORDS = st.sampled_from(["object", "array", "string", "integer", "number", "null", "date", "x", "#", "#/$defs/x"])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | WORDS
PARTS = st.recursive(LEAVES, lambda parts: st.lists(parts, max_size=3) | st.dictionaries(KEYWORDS, parts), max_leaves=9)


@given(PARTS, st.dictionaries(KEYWORDS, PARTS))
def test_whatever_a_client_sends_becomes_a_schema_of_an_object(defined, part):
    """Schemas come unchecked from clients: none of them is an error of ours."""
    narrow = bounded({"$defs": {"x": defined}, "properties": {"x": part, "y": defined}})
    assert list(narrow["properties"]) == ["x", "y"]
    assert msgspec.json.encode(narrow)
