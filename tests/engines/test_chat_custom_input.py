"""A custom tool's text, out of arguments that stream."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.engines.chat_calls import InputText


def read(*pieces):
    reader = InputText()
    return "".join([*map(reader.feed, pieces), reader.end()])


@given(
    text=st.text(),
    ascii_only=st.booleans(),
    cuts=st.lists(st.integers(0, 400), max_size=6),
    indent=st.none() | st.just(1),
)
def test_text_comes_out_as_it_was_however_it_is_cut(text, ascii_only, cuts, indent):
    """Escapes and surrogate pairs among it; what JSON can hold and UTF-8 cannot becomes U+FFFD."""
    arguments = json.dumps({"input": text}, ensure_ascii=ascii_only, indent=indent)
    edges = [0, *sorted(cuts), len(arguments)]
    pieces = [arguments[start:end] for start, end in pairwise(edges)]
    assert read(*pieces) == text
    assert read(*arguments) == text


def test_text_streams():
    """It does not wait for its end."""
    reader = InputText()
    assert [reader.feed(piece) for piece in ['{"input":"', "a", "\\", "n", 'b"', "}"]] == ["", "a", "", "\n", "b", ""]


@pytest.mark.parametrize(
    "arguments",
    [
        "*** Begin Patch\n",
        '"ls"',
        '{"command":"ls"}',
        '{"input":3}',
        '{"command":',
        "{}",
        "[1]",
        "[",
        '{"input":{"a":1}}',
    ],
)
def test_arguments_of_another_form_come_through_as_they_are(arguments):
    """The tool may still understand them."""
    assert read(*arguments) == arguments
    assert read(arguments) == arguments


@pytest.mark.parametrize(
    "arguments", ['{"why":"x","input":"ls"}', '{"input" : "ls" , "why":"x"}', '\n{\n"input":"ls"}\n']
)
def test_other_keys_and_blanks_do_not_matter(arguments):
    """Only the text does."""
    assert read(*arguments) == "ls"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"input":"a\nb\tc"}', "a\nb\tc"),
        (r'{"input":"a\ud83d"}', "a\ufffd"),
        (r'{"input":"\ud83dx\ude00"}', "\ufffdx\ufffd"),
        (r'{"input":"\ud83dA"}', "\ufffdA"),
        (r'{"input":"a\qb"}', r"a\qb"),
        (r'{"why":1,"input":"\ud83d"}', "\ufffd"),
    ],
)
def test_sloppy_strings_are_read(arguments, text):
    """Raw line breaks, half pairs, escapes that are none."""
    assert read(*arguments) == text
    read(arguments).encode()


@pytest.mark.parametrize(("cut", "text"), [('{"in', ""), ('{"input":"ab', "ab"), ('{"input":"ab\\u00', "ab"), ("", "")])
def test_cut_arguments_give_what_was_decided(cut, text):
    """A model that was stopped in the middle."""
    assert read(cut) == text
