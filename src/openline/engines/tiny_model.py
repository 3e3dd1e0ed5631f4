"""A tiny language model with random weights, written on first use: nothing is downloaded.

Its words mean nothing. But it is a real model to llama.cpp: prompts are tokenized, rendered by a chat
template and prefilled, the KV cache fills and is reused, tokens are sampled one by one.

Source: GGUF specification; llama.cpp, architecture `llama`.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from string import ascii_lowercase, digits
from typing import Any, Final

VERSION: Final = 2  # of everything in the file: another one is another file

CONTEXT_TOKENS: Final = 131_072  # tokens are short, so a coding agent's prompt takes 25 000

# Two layers, as the last one needs no more of a prompt than keys and values; one small head, so that a long context
# still takes seconds.
_LAYERS: Final = 2
_WIDTH: Final = 256
_FEED_FORWARD: Final = 2048
_HEAD: Final = 32
_SEED: Final = 7

_END: Final = "<|end|>"
_TURN: Final = "<|turn|>"
_BYTES: Final = 256
# Beside the bytes: pairs of them, so that a prompt has about as many tokens as two thirds of its characters.
_PAIRS: Final = (
    *((" ", letter) for letter in ascii_lowercase),
    *product(ascii_lowercase, repeat=2),
    *product(digits, repeat=2),
    *map(tuple, ('":', '",', '{"', '"}', "},", ": ", ", ")),
)
_VOCABULARY: Final = _BYTES + len(_PAIRS) + 2
_END_TOKEN: Final = _VOCABULARY - 2
_TURN_TOKEN: Final = _VOCABULARY - 1

# Each message begins and ends the same way wherever it stands, so that a longer conversation's prompt begins with
# that of the shorter one, as in the templates of real models. A call's arguments come before its name: that is
# how they were generated.
CHAT_TEMPLATE: Final = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
<|turn|>tools
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|end|>
{%- endif -%}
{%- for message in messages -%}
<|turn|>{{ message.role }}
{{ text(message.content) }}
{%- for call in message.tool_calls or [] %}{% set arguments = call.function.arguments -%}
{{ arguments if arguments is string else arguments | tojson }} {{ call.function.name }}{% endfor -%}
<|end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|turn|>assistant
{% endif -%}"""


def tiny_model_path() -> Path:
    """The model's file in the user's cache, written if it is not there yet: 7 MB, half a second.

    Raises:
        ImportError: `gguf` or `numpy` is not installed.
        OSError: it cannot be written.
    """
    path = cache_folder(os.environ) / f"tiny-{VERSION}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tiny_model(path)
    return path


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Where this user's programs keep what can be made again.

    Source: XDG Base Directory Specification, "XDG_CACHE_HOME", which counts on every system if it is set.
    """
    if named := environ.get("XDG_CACHE_HOME"):
        return Path(named) / "openline"
    if sys.platform == "win32":
        return Path(environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "openline" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "openline"
    return Path.home() / ".cache" / "openline"


def write_tiny_model(path: Path) -> None:
    """Write the model: whole or not at all, the same in every run.

    Raises:
        ImportError: `gguf` or `numpy` is not installed.
        OSError: it cannot be written.
    """
    gguf: Any = importlib.import_module("gguf")
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tiny-", suffix=".gguf")
    os.close(handle)
    try:
        writer = gguf.GGUFWriter(temporary, "llama")
        _add_description(writer)
        _add_vocabulary(writer, gguf.TokenType)
        _add_weights(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _add_description(writer: Any) -> None:
    writer.add_name("Openline tiny, random weights")
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_block_count(_LAYERS)
    writer.add_embedding_length(_WIDTH)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_key_length(_HEAD)
    writer.add_value_length(_HEAD)
    writer.add_rope_dimension_count(_HEAD)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_vocabulary(writer: Any, token_type: Any) -> None:
    """A token for each byte and for each pair, and two that no text contains."""
    names = _byte_names()
    pairs = [[names[ord(character)] for character in pair] for pair in _PAIRS]
    tokens = [*names, *map("".join, pairs), _END, _TURN]
    writer.add_vocab_size(_VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([token_type.NORMAL] * (_VOCABULARY - 2) + [token_type.CONTROL] * 2)
    writer.add_token_merges(list(map(" ".join, pairs)))
    writer.add_bos_token_id(_TURN_TOKEN)
    writer.add_eos_token_id(_END_TOKEN)
    writer.add_add_bos_token(False)


def _byte_names() -> list[str]:
    """How the vocabulary of GPT-2 writes each byte: as itself where it can be seen, else as a letter above 255."""
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(_BYTES)]


def _add_weights(writer: Any) -> None:
    numpy: Any = importlib.import_module("numpy")
    random = numpy.random.default_rng(_SEED)

    def add(name: str, rows: int, columns: int) -> None:
        values = random.standard_normal((rows, columns), dtype=numpy.float32) * columns**-0.5
        writer.add_tensor(f"{name}.weight", values.astype(numpy.float16))

    def add_norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", numpy.ones(_WIDTH, numpy.float32))

    add("token_embd", _VOCABULARY, _WIDTH)
    add("output", _VOCABULARY, _WIDTH)
    add_norm("output_norm")
    for layer in range(_LAYERS):
        block = f"blk.{layer}"
        add_norm(f"{block}.attn_norm")
        add_norm(f"{block}.ffn_norm")
        for part in ("attn_q", "attn_k", "attn_v"):
            add(f"{block}.{part}", _HEAD, _WIDTH)
        add(f"{block}.attn_output", _WIDTH, _HEAD)
        add(f"{block}.ffn_gate", _FEED_FORWARD, _WIDTH)
        add(f"{block}.ffn_up", _FEED_FORWARD, _WIDTH)
        add(f"{block}.ffn_down", _WIDTH, _FEED_FORWARD)
