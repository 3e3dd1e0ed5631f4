"""Which server is behind a URL, from what it answers; and what clients learn of its models from that."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from openline.config import UpstreamSettings
from openline.engines.about import MODELS_SECONDS_MAX, Inquiry, read_models
from openline.engines.chat import ChatEngine
from openline.engines.upstream import Upstream
from server.quirky import Quirky, listening, streams
from server.running import running, until


def rows(*models: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": [{"object": "model", "created": 1790000000, **model} for model in models]}


# What each server answers, as far as it tells: (routes, `Server` header, kind, version, window, known as, images).
SERVERS = {
    # vllm/entrypoints/openai/models/protocol.py, `ModelCard`
    "vLLM": (
        {
            "/v1/models": rows(
                {"id": "local", "owned_by": "vllm", "root": "Qwen/Qwen3-32B", "parent": None, "max_model_len": 40960}
            ),
            "/version": {"version": "0.19.1"},
        },
        "uvicorn",
        ("vllm", "0.19.1", 40960, "Qwen/Qwen3-32B", None),
    ),
    # sglang/srt/entrypoints/openai/protocol.py, `ModelCard`
    "SGLang": (
        {"/v1/models": rows({"id": "m", "owned_by": "sglang", "root": "m", "max_model_len": 131072})},
        "uvicorn",
        ("sglang", "", 131072, "m", None),
    ),
    # llama.cpp, tools/server/README.md, "GET /props", "GET /v1/models"
    "llama.cpp": (
        {
            "/v1/models": rows({"id": "gpt-4", "owned_by": "llamacpp", "meta": {"n_ctx_train": 131072}}),
            "/props": {
                "default_generation_settings": {"n_ctx": 8192, "params": {}},
                "total_slots": 1,
                "model_path": "/models/gemma-3-12b-it-Q4_K_M.gguf",
                "modalities": {"vision": True, "audio": False},
                "build_info": "b7012-4882f0d7",
            },
        },
        "llama.cpp",
        ("llama.cpp", "b7012-4882f0d7", 8192, "/models/gemma-3-12b-it-Q4_K_M.gguf", True),
    ),
    # ollama, docs/api.md, "List running models"; openai/openai.go, `ToListCompletion`
    "Ollama, loaded": (
        {
            "/v1/models": rows({"id": "mistral-small:latest", "owned_by": "library"}),
            "/api/version": {"version": "0.32.9"},
            "/api/ps": {"models": [{"name": "mistral-small:latest", "context_length": 4096}]},
            "/api/show": {
                "details": {"family": "mistral3"},
                "model_info": {"mistral3.context_length": 131072},
                "capabilities": ["completion", "vision", "tools"],
            },
        },
        "",
        ("ollama", "0.32.9", 4096, "mistral3", True),
    ),
    "Ollama, not loaded": (
        {
            "/v1/models": rows({"id": "mine", "owned_by": "jane"}),
            "/api/version": {"version": "0.32.9"},
            "/api/ps": {"models": []},
            "/api/show": {
                "details": {"family": "gptoss"},
                "parameters": "num_ctx                        65536\ntemperature                    1",
                "model_info": {"gptoss.context_length": 131072},
                "capabilities": ["completion", "tools"],
            },
        },
        "",
        ("ollama", "0.32.9", 65536, "gptoss", False),
    ),
    # LM Studio, REST API v0, "GET /api/v0/models"
    "LM Studio": (
        {
            "/v1/models": rows({"id": "qwen2-vl-7b-instruct", "owned_by": "organization_owner"}),
            "/api/v0/models": {
                "data": [
                    {
                        "id": "qwen2-vl-7b-instruct",
                        "type": "vlm",
                        "arch": "qwen2_vl",
                        "state": "loaded",
                        "max_context_length": 32768,
                        "loaded_context_length": 4096,
                    }
                ]
            },
        },
        "",
        ("lmstudio", "", 4096, "qwen2_vl", True),
    ),
    "by its own path": (
        {
            "/v1/models": rows({"id": "m", "owned_by": "me"}),
            "/get_model_info": {"model_path": "/m", "is_generation": True},
        },
        "",
        ("sglang", "", None, "", None),
    ),
    "a gateway": (
        {"/v1/models": rows({"id": "m", "owned_by": "openai", "context_length": 200000})},
        "gateway",
        ("generic", "", 200000, "", None),
    ),
}


@asynccontextmanager
async def inquiry(quirky: Quirky, **settings: Any):
    async with listening(quirky) as url:
        configured = UpstreamSettings(url=url, **settings)
        upstream = Upstream(configured, show_detail=True)
        asking = Inquiry(upstream, configured)
        try:
            yield asking
        finally:
            await asking.close()
            await upstream.close()


@pytest.mark.parametrize("name", SERVERS)
async def test_server_is_recognised_by_what_it_answers(name):
    """Its kind, its version, and what it tells of the model: the window that it really has, not the one it could have."""
    routes, header, expected = SERVERS[name]
    async with inquiry(Quirky([], routes=routes, server=header)) as asking:
        about = await asking.ask()
    model = next(iter(about.models.values()))
    assert (about.kind, about.version, model.context_window, model.known_as, model.images) == expected


async def test_answers_are_kept_for_a_few_seconds():
    """Balancers and agents ask often; the upstream is asked once, also by many at once.

    Source: the constant `MODELS_SECONDS_MAX`.
    """
    quirky = Quirky([], routes=SERVERS["vLLM"][0])
    async with inquiry(quirky) as asking:
        await asking.ask()
        await asking.ask()
        assert quirky.asked.count("/v1/models") == 1
        asking._answered_at -= MODELS_SECONDS_MAX
        await asking.ask()
    assert quirky.asked.count("/v1/models") == 2


async def test_configured_profile_is_not_asked_for():
    """The operator knows; only what that kind tells of its models is asked."""
    quirky = Quirky([], routes={"/v1/models": rows({"id": "m"})})
    async with inquiry(quirky, profile="sglang") as asking:
        assert (await asking.ask()).kind == "sglang"
    assert quirky.asked == ["/v1/models"]


@pytest.mark.parametrize("value", [-1, 0, "4096", None, 1e9, [], True])
def test_window_of_a_wrong_type_is_none(value):
    """An upstream's list is not ours to fail on."""
    body = msgspec.json.encode(rows({"id": "m", "max_model_len": value}))
    assert read_models(body)[0].context_window is None


async def test_a_turn_recognises_its_upstream_without_waiting_for_it(tmp_path):
    """The first turn goes out in the generic form, a later one in the recognised form, history included."""
    quirky = Quirky(streams("vllm_reasoning"), routes=SERVERS["vLLM"][0])
    async with listening(quirky) as url:
        engine = ChatEngine(UpstreamSettings(url=url), show_detail=True)
        async with running(tmp_path, engine=engine) as server, server.connect() as line:
            first = await line.completed(model="local", input="Look.", store=False)
            await until(lambda: engine._inquiry.about.kind == "vllm")
            call = next(item for item in first["output"] if item["type"] == "function_call")
            output = {"type": "function_call_output", "call_id": call["call_id"], "output": "seen"}
            await line.completed(model="local", input=[output], previous_response_id=first["id"], store=False)
    assert quirky.bodies[1]["messages"][1]["reasoning"] == "I should look."


async def test_an_upstream_that_tells_nothing_does_not_fail_turns(tmp_path):
    """Recognition is a help, not a condition."""
    quirky = Quirky(streams("vllm_text"))
    async with listening(quirky) as url:
        engine = ChatEngine(UpstreamSettings(url=url), show_detail=True)
        async with running(tmp_path, engine=engine) as server:
            assert (await server.post(model="local")).status == 200
            assert (await server.get("/v1/models")).json == {"object": "list", "data": [], "models": []}


class TestCatalogue:
    @pytest.fixture
    async def server(self, tmp_path):
        async with listening(Quirky([], routes=SERVERS["llama.cpp"][0], server="llama.cpp")) as url:
            engine = ChatEngine(UpstreamSettings(url=url), show_detail=True)
            async with running(tmp_path, engine=engine) as server:
                yield server

    async def test_both_lists_carry_the_real_window(self, server):
        """OpenAI's `data` and Codex's `models`, in one answer.

        Source: openai/codex, codex-rs/protocol/src/openai_models.rs, `ModelInfo`.
        """
        listed = (await server.get("/v1/models?client_version=0.169.0")).json
        assert (listed["data"][0]["id"], listed["data"][0]["max_model_len"]) == ("gpt-4", 8192)
        entry = listed["models"][0]
        assert (entry["slug"], entry["context_window"], entry["input_modalities"]) == ("gpt-4", 8192, ["text", "image"])
        assert entry["truncation_policy"] == {"mode": "tokens", "limit": 1024}

    async def test_entry_has_every_field_that_codex_requires(self, server):
        """One that lacks a field makes Codex refuse the whole list; found by leaving them out one by one.

        Source: Codex CLI 0.169.0; older versions require `base_instructions` and `supports_reasoning_summaries` too.
        """
        required = {
            "slug",
            "display_name",
            "supported_reasoning_levels",
            "shell_type",
            "visibility",
            "supported_in_api",
        }
        required |= {"priority", "base_instructions", "support_verbosity", "truncation_policy"}
        required |= {"experimental_supported_tools", "supports_reasoning_summaries", "supports_parallel_tool_calls"}
        (entry,) = (await server.get("/v1/models")).json["models"]
        assert required <= entry.keys()
        assert "apply_patch" in entry["base_instructions"]

    async def test_etag_saves_sending_the_list_again(self, server):
        """It is strong, names these bytes, and `If-None-Match` is answered by 304 without a body.

        Source: RFC 9110 §8.8.3, §13.1.2.
        """
        first = await server.get("/v1/models")
        etag = first.headers["etag"]
        assert etag.startswith('"')
        for known in (etag, f'"other", W/{etag}', "*"):
            again = await server.get("/v1/models", headers={"If-None-Match": known})
            assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)
        assert (await server.get("/v1/models", headers={"If-None-Match": '"other"'})).body == first.body
