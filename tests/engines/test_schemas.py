"""Schemas narrowed so that whatever is generated under them is short, and fits the tool's own."""

import pytest

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
        ({"type": "string", "pattern": "^x+$"}, {"type": "string", "pattern": "^x+$"}),
        ({"type": "string", "format": "date"}, {"type": "string", "format": "date"}),
        ({"type": "string", "format": "email"}, {"type": "string", "pattern": "^[a-z]{3,9}$"}),
        ({"enum": ["a", 1]}, {"enum": ["a", 1]}),
        ({"const": {"a": 1}}, {"const": {"a": 1}}),
        ({"type": "integer"}, {"type": "integer", "minimum": 1, "maximum": 9}),
        ({"type": "integer", "maximum": -3}, {"type": "integer", "minimum": -3, "maximum": -3}),
        ({"type": "integer", "minimum": 5, "maximum": 6}, {"type": "integer", "minimum": 5, "maximum": 6}),
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


@pytest.mark.parametrize("parameters", [None, "text", [], {"properties": []}, {"properties": {}}])
def test_what_is_no_schema_is_an_object_without_properties(parameters):
    """Schemas come unchecked from clients."""
    assert bounded(parameters)["properties"] == {}


def test_a_schema_that_holds_itself_ends():
    """A recursive type is cut off at some depth with a constant."""
    node = {"properties": {"next": {"$ref": "#/$defs/Node"}, "self": {"$ref": "#/properties/self"}}}
    assert bounded({"properties": {"node": {"$ref": "#/$defs/Node"}}, "$defs": {"Node": node}})
