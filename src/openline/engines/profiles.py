"""What model servers and model families take and do differently, as data.

The chat mapping reads the fields of a `Profile` and knows no server by name. What every
server can be given needs no field: fragments without an index, every parallel call as
`index: 0`, whole calls in one chunk, missing ids, `finish_reason: stop` behind calls and missing usage
are read the same way from all of them.

Each row names where it comes from: an issue or pull request of the public repository that it
concerns, or the file in which the server does it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final, Literal

import msgspec

from openline.config import MaxTokensField, ReasoningField, ServerKind, SystemRole, UpstreamSettings


class Profile(msgspec.Struct, frozen=True):
    """One upstream's dialect.

    Attributes:
        title: what people call this kind of server.
        late_system_role: the role of system and developer messages that do not lead.
        joins_users: user messages in a row become one.
        after_tools: what the assistant is made to say between tool outputs and a user message; empty for nothing.
        short_call_ids: call ids are sent as nine letters and digits.
        reasoning_field: the name under which it reads an assistant's earlier reasoning; empty if it takes none.
        max_tokens_field: the name it knows `max_output_tokens` by.
        asks_usage: it counts tokens when `stream_options` asks for it, and does not refuse that.
        tool_choice: which of its forms work: any, the modes without a named tool, or none of them.
        larger_window: how it gets a larger context window, if it does not say when something does not fit; else empty.
        counts_what_it_read: its `prompt_tokens` are of what was left when it had cut the rest away.
    """

    title: str = "a Chat Completions server"
    late_system_role: SystemRole = "system"
    joins_users: bool = False
    after_tools: str = ""
    short_call_ids: bool = False
    reasoning_field: ReasoningField = "reasoning_content"
    max_tokens_field: MaxTokensField = "max_tokens"
    asks_usage: bool = True
    tool_choice: Literal["any", "modes", "none"] = "any"
    larger_window: str = ""
    counts_what_it_read: bool = False

    @property
    def form(self) -> str:
        """Names what of it shapes messages: conversations of equal forms have equal bytes."""
        shape = (self.late_system_role, self.joins_users, self.after_tools, self.short_call_ids, self.reasoning_field)
        return "/".join(map(str, shape))


GENERIC: Final = Profile()

KINDS: Final[Mapping[ServerKind, Profile]] = {
    "generic": GENERIC,
    # vLLM reads `reasoning` alone: chat_utils.py, `_parse_chat_message_content`; vllm-project/vllm#38488, #27752.
    "vllm": Profile("vLLM", reasoning_field="reasoning"),
    "sglang": Profile("SGLang"),
    # A `tool_choice` that is an object is read as "auto": server-common.cpp, `json_value(body, "tool_choice", …)`.
    "llama.cpp": Profile("llama.cpp", tool_choice="modes"),
    # openai/openai.go: messages have `reasoning`, requests have no `tool_choice` (ollama/ollama#8421, #17921).
    # What does not fit is cut: openai/codex#2293, ollama/ollama#17889.
    "ollama": Profile(
        "Ollama",
        reasoning_field="reasoning",
        tool_choice="none",
        larger_window="OLLAMA_CONTEXT_LENGTH=64000 in the environment of `ollama serve`, or num_ctx in the model's Modelfile",
        counts_what_it_read=True,
    ),
    # "Invalid tool_choice type: 'object'": lmstudio-ai/lmstudio-bug-tracker#670.
    # What does not fit is answered by nothing: lmstudio-ai/lmstudio-bug-tracker#2339.
    "lmstudio": Profile(
        "LM Studio", tool_choice="modes", larger_window="the context length with which the model is loaded"
    ),
    # Unknown fields of a message are refused; `max_tokens` is, by its reasoning models.
    "openai": Profile("OpenAI", reasoning_field="", max_tokens_field="max_completion_tokens"),
    # "Extra inputs are not permitted": charmbracelet/crush#1590, BerriAI/litellm#30835; of `stream_options`:
    # openai/openai-agents-python#442, TabbyML/tabby#4082. It counts unasked.
    "mistral": Profile("Mistral", reasoning_field="", asks_usage=False),
    # "property 'reasoning_content' is unsupported": tashfeenahmed/freellmapi#1070, vercel/ai#8057.
    "groq": Profile("Groq", reasoning_field=""),
}

# What a family's chat template wants, whoever serves it.
FAMILIES: Final[Mapping[str, Mapping[str, Any]]] = {
    # "System message must be at the beginning.": vllm-project/vllm#41114, ggml-org/llama.cpp#20215.
    "qwen": {"late_system_role": "user"},
    # "Conversation roles must alternate": suitenumerique/conversations#197, huggingface/text-generation-inference#3198.
    "gemma": {"late_system_role": "user", "joins_users": True},
    # The template reads the first system message and skips later ones: sgl-project/sglang#13167,
    # lmstudio-ai/lmstudio-bug-tracker#2264.
    "gpt-oss": {"late_system_role": "user"},
    # The template takes messages[0] alone for a system message and drops later ones (smg-project/smg#1796,
    # vllm-project/vllm#43590); its own API refuses a second one (can1357/oh-my-pi#954).
    "minimax": {"late_system_role": "user"},
    # "Tool call id was … but must be a-z, A-Z, 0-9, with a length of 9": vllm-project/vllm#9019.
    # "Unexpected role 'user' after role 'tool'": zed-industries/zed#37021; "conversation roles must alternate":
    # charmbracelet/crush#279.
    "mistral": {"late_system_role": "user", "joins_users": True, "after_tools": "Done.", "short_call_ids": True},
}

# How models of a family are called, in names and in the names of architectures (`qwen3moe`, `gptoss`).
_NAMES: Final = (
    ("gpt-oss", re.compile(r"gpt[-_]?oss", re.IGNORECASE)),
    # DeepSeek's distillations carry their base's name, but its own template.
    ("generic", re.compile(r"deepseek", re.IGNORECASE)),
    ("mistral", re.compile(r"(?:mist|mixt|minist|magist|devst|codest|pixt)ral", re.IGNORECASE)),
    ("minimax", re.compile(r"minimax", re.IGNORECASE)),
    ("gemma", re.compile(r"gemma", re.IGNORECASE)),
    ("qwen", re.compile(r"qwen|qwq|qvq", re.IGNORECASE)),
)


def family_of(name: str) -> str:
    """The family of a model, by its name or by the name of its architecture; `generic` if neither says."""
    return next((family for family, pattern in _NAMES if pattern.search(name)), "generic")


@lru_cache(maxsize=256)
def profile_of(kind: ServerKind, model: str, settings: UpstreamOverrides) -> Profile:
    """The profile for one model of an upstream.

    Args:
        kind: of the server, as it was recognised.
        model: everything known of the model's name.
        settings: what the configuration says, which counts before what was recognised.
    """
    family = settings.family or family_of(model)
    fields = {**FAMILIES.get(family, {}), **{name: value for name, value in settings.fields if value is not None}}
    return msgspec.structs.replace(KINDS[settings.profile or kind], **fields)


class UpstreamOverrides(msgspec.Struct, frozen=True):
    """What of an upstream's settings overrules its recognised profile; hashable, as settings are not."""

    profile: ServerKind | None
    family: str | None
    fields: tuple[tuple[str, str | None], ...]


def overrides(settings: UpstreamSettings) -> UpstreamOverrides:
    """Read them out of the settings."""
    names = ("late_system_role", "max_tokens_field", "reasoning_field")
    return UpstreamOverrides(
        settings.profile, settings.family, tuple((name, getattr(settings, name)) for name in names)
    )
