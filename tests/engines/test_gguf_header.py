"""The head of a GGUF file, read without loading the model."""

import struct

import pytest

from openline.engines.gguf_header import BadGguf, Header, read_header


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def key(name, kind, value):
    return text(name) + struct.pack("<I", kind) + value


def strings(*values):
    return struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values))


def gguf(*pairs):
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(pairs)) + b"".join(pairs)


ARCHITECTURE = key("general.architecture", 8, text("llama"))
WINDOW = key("llama.context_length", 4, struct.pack("<I", 8192))
TOKENS = key("tokenizer.ggml.tokens", 9, strings("a", "b", ""))
SCORES = key("tokenizer.ggml.scores", 9, struct.pack("<IQ3f", 6, 3, 0, 0, 0))


@pytest.fixture
def header_of(tmp_path):
    def read(content):
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return read_header(path)

    return read


@pytest.mark.parametrize(
    ("pairs", "header"),
    [
        ((ARCHITECTURE, WINDOW), Header("llama", 8192)),
        ((ARCHITECTURE, TOKENS, SCORES, WINDOW), Header("llama", 8192)),
        ((ARCHITECTURE, key("llama.context_length", 10, struct.pack("<Q", 7))), Header("llama", 7)),
        ((ARCHITECTURE, key("qwen3.context_length", 4, struct.pack("<I", 7))), Header("llama", None)),
        ((ARCHITECTURE, key("general.ok", 7, b"\x01")), Header("llama", None)),
        ((), Header("", None)),
    ],
)
def test_architecture_and_context_are_found(header_of, pairs, header):
    """Wherever they stand, and whatever stands between."""
    assert header_of(gguf(*pairs)) == header


def test_a_file_cut_anywhere_is_said_to_be_cut(header_of):
    """Never another error, however little of it there is."""
    whole = gguf(ARCHITECTURE, TOKENS, SCORES, WINDOW)
    for length in range(4, len(whole)):
        with pytest.raises(BadGguf, match="ends inside its metadata"):
            header_of(whole[:length])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a GGUF file"),
        (b"hello world", "not a GGUF file"),
        (gguf(key("x", 99, b"")), "a value of type 99"),
        (gguf(key("x", 9, struct.pack("<IQ", 9, 1))), "a value of type 9"),
        (gguf(key("x", 8, struct.pack("<Q", 1 << 60))), "a text of"),
        (gguf(key("x", 9, struct.pack("<IQ", 6, 1 << 62))), "a list of"),
        (gguf(key("x", 9, struct.pack("<IQQ", 8, 1, (1 << 64) - 1))), "a list of"),
    ],
)
def test_what_cannot_be_read_is_named(header_of, content, says):
    """A wrong file, and one that is broken or of a later format."""
    with pytest.raises(BadGguf, match=says):
        header_of(content)
