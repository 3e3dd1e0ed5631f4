"""Which profile an upstream and its model have."""

import pytest

from openline.config import UpstreamSettings
from openline.engines.profiles import FAMILIES, KINDS, family_of, overrides, profile_of

NAMES = {
    "Qwen/Qwen3.5-27B": "qwen",
    "qwen3moe": "qwen",
    "QwQ-32B": "qwen",
    "gpt-oss:20b": "gpt-oss",
    "gptoss": "gpt-oss",
    "google/gemma-3-12b-it": "gemma",
    "mistralai/Mistral-Small-3.2-24B": "mistral",
    "mixtral:8x7b": "mistral",
    "ministral-8b": "mistral",
    "magistral-small": "mistral",
    "devstral": "mistral",
    "codestral-latest": "mistral",
    "MiniMaxAI/MiniMax-M2": "minimax",
    "minimax-m2": "minimax",
    "pixtral-12b": "mistral",
    "DeepSeek-R1-Distill-Qwen-7B": "generic",
    "llama3.3:70b": "generic",
    "gpt-5.5": "generic",
    "": "generic",
}


@pytest.mark.parametrize("name", NAMES)
def test_family_is_told_by_the_name(name):
    """Of the model or of its architecture, whoever packed it."""
    assert family_of(name) == NAMES[name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_kind_and_family_go_together(kind, family):
    """The server says how it reads, the family what its template takes; neither undoes the other."""
    profile = profile_of(kind, family, overrides(UpstreamSettings()))
    for field, value in FAMILIES[family].items():
        assert getattr(profile, field) == value
    for field in ("title", "reasoning_field", "max_tokens_field", "tool_choice", "asks_usage", "larger_window"):
        assert getattr(profile, field) == getattr(KINDS[kind], field)


def test_configuration_overrules_what_was_recognised():
    """Each field by itself; `profile` and `family` the whole."""
    settings = UpstreamSettings(late_system_role="developer", reasoning_field="")
    profile = profile_of("vllm", "qwen3", overrides(settings))
    assert (profile.title, profile.late_system_role, profile.reasoning_field) == ("vLLM", "developer", "")
    settings = UpstreamSettings(profile="ollama", family="mistral")
    profile = profile_of("vllm", "qwen3", overrides(settings))
    assert (profile.title, profile.short_call_ids, profile.counts_what_it_read) == ("Ollama", True, True)


def test_forms_differ_where_bytes_may():
    """Kinds that put a conversation alike share its encoding."""
    assert KINDS["llama.cpp"].form == KINDS["generic"].form
    assert KINDS["vllm"].form != KINDS["generic"].form
