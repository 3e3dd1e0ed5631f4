"""What a tool returns, as the model reads it."""

from dataclasses import dataclass
from typing import Any

import pytest

from openline.client.tool_outputs import ERROR_BYTES_MAX, ToolOutput, cut, error_output, output_of

TEXT_PART = {"type": "input_text", "text": "a page"}
IMAGE_PART = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}


@dataclass
class Weather:
    degrees: int


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("as it is", "as it is"),
        ("", ""),
        (None, "null"),
        (3, "3"),
        (True, "true"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        (Weather(3), '{"degrees":3}'),
        ([], "[]"),
        ([TEXT_PART, IMAGE_PART], [TEXT_PART, IMAGE_PART]),
        ([TEXT_PART, "no part"], '[{"type":"input_text","text":"a page"},"no part"]'),
        ([{"type": "other"}], '[{"type":"other"}]'),
    ],
)
def test_a_value_is_a_text_json_or_content_parts(value: Any, content: Any):
    """Strings and content parts go as they are, everything else as JSON.

    Source: Responses API reference, "Function tool call output".
    """
    assert output_of(value, 1000) == ToolOutput(content)


def test_what_cannot_be_json_is_named():
    """The tool has returned something that no model could read."""
    with pytest.raises(TypeError, match="object"):
        output_of(object(), 1000)


def test_an_output_is_cut_at_its_bound_and_says_so():
    """At the bound it is whole; a character that does not fit whole is left out."""
    assert output_of("x" * 100, 100).content == "x" * 100
    assert output_of("x" * 101, 100).content == "x" * 100 + "\n[cut: the first 100 of 101 bytes]"
    assert output_of({"text": "x" * 100}, 20).content == '{"text":"xxxxxxxxxxx\n[cut: the first 20 of 111 bytes]'
    assert cut("ää", 3) == "ä\n[cut: the first 3 of 4 bytes]"


def test_content_parts_over_the_bound_are_an_error():
    """Half a picture is none."""
    size = len('[{"type":"input_text","text":"a page"}]')
    assert output_of([TEXT_PART], size) == ToolOutput([TEXT_PART])
    refused = output_of([TEXT_PART], size - 1)
    assert refused.is_error
    assert refused.content == f"Error: its content parts are {size} bytes long, {size - 1} at most are passed on."


def test_an_error_is_bounded():
    """An exception's text may be as long as a page."""
    told = error_output("x" * (ERROR_BYTES_MAX + 1))
    assert told.is_error
    assert isinstance(told.content, str)
    assert told.content.startswith("Error: xxx")
    assert len(told.content) < ERROR_BYTES_MAX + 100


def test_a_lone_surrogate_does_not_reach_the_server():
    """It is no Unicode text: file names that are not UTF-8 have them in Python."""
    assert output_of("a\udcffb", 100).content == "a?b"
