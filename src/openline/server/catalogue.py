"""The lists of models that clients ask for: OpenAI's, and Codex's own beside it.

Codex asks `GET /models?client_version=…` where its provider has a command for credentials (`auth`), and takes
`models` as a catalogue: how much it may send, when to compact, whether to offer its patch tool. Without an
entry it guesses a context window of 272 000 tokens. An entry has to bring the agent's instructions too, since
Codex sends those of the entry instead of its own.

Source: openai/codex, codex-rs/protocol/src/openai_models.rs, `ModelInfo`; tried with Codex 0.169.0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, Final

import msgspec

from openline.engines.engine import Model

_OUTPUT_TOKENS_MAX: Final = 10_000  # of one tool output, as Codex has it for its own models
_OUTPUT_SHARE: Final = 8  # but never more than this part of the context window
_INSTRUCTIONS: Final = files("openline.server").joinpath("codex_instructions.md").read_text(encoding="utf-8")


class Catalogue(msgspec.Struct, frozen=True):
    """The answer to `GET /v1/models`, and the strong tag that names these bytes (RFC 9110 §8.8.3)."""

    body: bytes
    etag: str


def catalogue(models: Sequence[Model]) -> Catalogue:
    """Both lists in one object; each client reads its own."""
    entries = [codex_entry(model, priority) for priority, model in enumerate(models, start=1)]
    body = msgspec.json.encode({"object": "list", "data": [openai_entry(model) for model in models], "models": entries})
    return Catalogue(body, f'"{hashlib.sha256(body).hexdigest()[:32]}"')


def openai_entry(model: Model) -> dict[str, Any]:
    """A model as OpenAI lists it; `max_model_len` is the name that vLLM and SGLang give the context window."""
    entry = {"id": model.id, "object": "model", "created": model.created, "owned_by": model.owned_by}
    return entry if model.context_window is None else {**entry, "max_model_len": model.context_window}


def codex_entry(model: Model, priority: int) -> dict[str, Any]:
    """A model as Codex lists it; what is not known is left to its defaults.

    Args:
        model: as the upstream tells of it.
        priority: its place in the list; the first one is the default.
    """
    window = model.context_window
    entry: dict[str, Any] = {
        "slug": model.id,
        "display_name": model.id,
        "description": f"Served by {model.owned_by} through Openline.",
        "default_reasoning_level": None,
        "supported_reasoning_levels": [],
        "shell_type": "shell_command",
        "visibility": "list",
        "supported_in_api": True,
        "priority": priority,
        "upgrade": None,
        "base_instructions": _INSTRUCTIONS,
        "supports_reasoning_summaries": False,
        "support_verbosity": False,
        "default_verbosity": None,
        "apply_patch_tool_type": "freeform",
        "truncation_policy": {"mode": "tokens", "limit": _output_tokens_max(window)},
        "supports_parallel_tool_calls": True,
        "experimental_supported_tools": [],
    }
    if window is not None:
        entry |= {"context_window": window, "max_context_window": window}
    if model.images is not None:
        entry["input_modalities"] = ["text", "image"] if model.images else ["text"]
    return entry


def _output_tokens_max(window: int | None) -> int:
    return _OUTPUT_TOKENS_MAX if window is None else max(min(_OUTPUT_TOKENS_MAX, window // _OUTPUT_SHARE), 1)
