"""What model servers do differently, through the whole server: each quirk with its upstream's stream and its next turn.

Every case is a conversation of two turns with a server of certain manners. With the profile both turns complete, the
client gets what the model said, and the model sees everything that it should. A case with a `needs` does not
hold without it, which is tested too. The others are held by the mapping itself, whatever the upstream.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from server.quirky import (
    TOO_LONG,
    Quirky,
    Reading,
    Seen,
    choice_is_text,
    ids_have_nine_characters,
    images_of_users_only,
    listening,
    no_developer,
    no_max_tokens,
    no_reasoning,
    no_stream_options,
    no_user_after_tool,
    reasoning_comes_back,
    roles_alternate,
    streams,
    system_leads,
    tools_are_off,
)
from server.running import running

LOOK = {"type": "function", "name": "look", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}}
TALK = {"type": "function", "name": "talk", "parameters": {"type": "object", "properties": {}}}
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AA"}
GENERIC = {"profile": "generic", "family": "generic"}


def user(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "user", "content": text}


def developer(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "developer", "content": text}


def call(call_id: str, arguments: str = '{"n": 0}') -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": "look", "arguments": arguments}


def output(call_id: str, value: Any = "seen") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": value}


@dataclass
class Case:
    """One quirk.

    Attributes:
        stream: the fixture with the upstream's streams, one a turn.
        source: where the quirk is known from.
        needs: what of the settings, or of the model's name, makes it hold; nothing if the mapping does.
        model: its name, from which the family is recognised.
        manners: what the upstream refuses.
        reading: how it reads what it does not refuse.
        asked: fields of both creates.
        first: the input of the first turn.
        then: the input of the second one; an output for every call of the first by default.
        says: what the client gets in the first turn: texts, and the arguments of calls.
        sees: about what the model sees in the second turn.
    """

    stream: str
    source: str
    sees: Any
    needs: dict[str, str] | None = None
    model: str = "local"
    manners: tuple[Any, ...] = ()
    reading: Reading = field(default_factory=Reading)
    asked: dict[str, Any] = field(default_factory=dict)
    first: list[dict[str, Any]] = field(default_factory=lambda: [user("Look.")])
    then: list[dict[str, Any]] | None = None
    says: list[str] = field(default_factory=lambda: ["One moment."])


def sees_text(role: str, text: str):
    def check(seen: Seen) -> None:
        assert (role, text) in seen.texts

    return check


def sees_reasoning(seen: Seen) -> None:
    assert seen.reasoning == ["I should look."]


def sees_pairs(seen: Seen) -> None:
    calls, outputs = seen.calls
    assert calls == outputs
    assert len(set(calls)) == len(calls) > 0


def sees_tools(names: list[str], choice: str):
    def check(seen: Seen) -> None:
        assert seen.tools == (names, choice)

    return check


TOOLS = {"tools": [LOOK, TALK]}
LATE = [developer("Be brief."), user("And now?")]

CASES = {
    "Qwen refuses a late system message": Case(
        "vllm_text",
        "vllm-project/vllm#41114, ggml-org/llama.cpp#20215",
        sees_text("user", "Be brief."),
        needs={"family": "qwen"},
        model="Qwen/Qwen3.5-27B",
        manners=(system_leads,),
        asked={"instructions": "You help."},
        then=LATE,
    ),
    "gpt-oss skips a late system message": Case(
        "gpt_oss_text",
        "sgl-project/sglang#13167, lmstudio-ai/lmstudio-bug-tracker#2264",
        sees_text("user", "Be brief."),
        needs={"family": "gpt-oss"},
        model="openai/gpt-oss-20b",
        reading=Reading(skips_late_system=True),
        asked={"instructions": "You help."},
        then=LATE,
    ),
    "MiniMax drops a late system message": Case(
        "vllm_text",
        "smg-project/smg#1796, vllm-project/vllm#43590",
        sees_text("user", "Be brief."),
        needs={"family": "minimax"},
        model="MiniMaxAI/MiniMax-M2",
        reading=Reading(skips_late_system=True),
        asked={"instructions": "You help."},
        then=LATE,
    ),
    "templates know no developer": Case(
        "vllm_text",
        "vllm-project/vllm#42407, sgl-project/sglang#40082, ai-dynamo/dynamo#10206",
        sees_text("system", "You help.\n\nBe kind."),
        manners=(no_developer, system_leads),
        asked={"instructions": "You help."},
        first=[developer("Be kind."), user("Look.")],
        then=[user("And now?")],
    ),
    "Gemma wants roles to alternate": Case(
        "llamacpp_text",
        "suitenumerique/conversations#197",
        sees_text("user", "Be brief.\n\nAnd now?"),
        needs={"family": "gemma"},
        model="gemma-3-12b-it",
        manners=(roles_alternate,),
        asked={"instructions": "You help."},
        first=[user("Hello."), user("Look.")],
        then=LATE,
    ),
    "Mistral wants ids of nine characters": Case(
        "mistral_calls",
        "vllm-project/vllm#9019, anomalyco/opencode#1680",
        sees_pairs,
        needs={"family": "mistral"},
        model="devstral-small-2507",
        manners=(ids_have_nine_characters,),
        asked=TOOLS,
        first=[user("Look."), call("call_0fypS1hVX7"), output("call_0fypS1hVX7")],
        says=['{"n": 1}'],
    ),
    "Mistral takes no user message after a tool's": Case(
        "mistral_calls",
        "zed-industries/zed#37021",
        sees_text("user", "Wait."),
        needs={"family": "mistral"},
        model="mistral-small3.2:24b",
        manners=(no_user_after_tool,),
        asked=TOOLS,
        then=[output("D681PevKs"), user("Wait.")],
        says=['{"n": 1}'],
    ),
    "Ollama gives parallel calls one index": Case(
        "ollama_index_zero", "ollama/ollama#15457", sees_pairs, asked=TOOLS, says=['{"n":1}', '{"n":2}']
    ),
    "Ollama gave calls no index": Case(
        "ollama_no_index", "ollama/ollama#7881", sees_pairs, asked=TOOLS, says=['{"n":1}', '{"n":2}']
    ),
    "calls without ids, each in one chunk, ended by stop, without usage": Case(
        "no_ids", "ml-explore/mlx-lm#1375, Blaizzy/mlx-vlm#990", sees_pairs, asked=TOOLS, says=['{"n":1}', '{"n":2}']
    ),
    "calls without ids or indices": Case(
        "no_ids_no_index", "ml-explore/mlx-lm#1375", sees_pairs, asked=TOOLS, says=['{"n":1}', '{"n":2}']
    ),
    "SGLang numbers calls by their tools' places, then as they come": Case(
        "sglang_tool_positions", "sgl-project/sglang#6310", sees_pairs, asked=TOOLS, says=["{}", '{"n": 1}']
    ),
    "SGLang gives two calls of one tool one index": Case(
        "sglang_one_tool_twice",
        "sgl-project/sglang#38198, sgl-project/sglang#25073",
        sees_pairs,
        asked=TOOLS,
        says=['{"n": 1}', '{"n": 2}'],
    ),
    "vLLM ends a forced call by stop": Case(
        "vllm_forced_call",
        "vllm-project/vllm#9209, vllm-project/vllm#25054",
        sees_pairs,
        asked=TOOLS,
        says=['{"n": 1}'],
    ),
    "vLLM reads `reasoning`": Case(
        "vllm_reasoning",
        "vllm-project/vllm#38488",
        sees_reasoning,
        needs={"profile": "vllm"},
        reading=Reading(reasoning="reasoning"),
        asked=TOOLS,
        says=["I should look.", '{"n": 1}'],
    ),
    "Ollama reads `reasoning`": Case(
        "ollama_reasoning",
        "ollama/ollama, openai/openai.go, `Message`",
        sees_reasoning,
        needs={"profile": "ollama"},
        reading=Reading(reasoning="reasoning"),
        asked=TOOLS,
        says=["I should look.", '{"n":1}'],
    ),
    "DeepSeek wants `reasoning_content` back": Case(
        "deepseek_reasoning",
        "QwenLM/qwen-code#3637",
        sees_reasoning,
        manners=(reasoning_comes_back,),
        asked=TOOLS,
        says=["I should look.", '{"n": 1}'],
    ),
    "Groq takes no reasoning": Case(
        "groq_text",
        "tashfeenahmed/freellmapi#1070",
        sees_text("user", "And now?"),
        needs={"profile": "groq"},
        manners=(no_reasoning,),
        then=[user("And now?")],
        says=["Easy.", "One moment."],
    ),
    "Mistral's API takes no reasoning": Case(
        "deepseek_reasoning",
        "charmbracelet/crush#1590, BerriAI/litellm#30835",
        sees_pairs,
        needs={"profile": "mistral"},
        manners=(no_reasoning,),
        asked=TOOLS,
        says=["I should look.", '{"n": 1}'],
    ),
    "Mistral's API counts tokens unasked": Case(
        "mistral_calls",
        "openai/openai-agents-python#442, TabbyML/tabby#4082",
        sees_pairs,
        needs={"profile": "mistral"},
        manners=(no_stream_options,),
        asked=TOOLS,
        says=['{"n": 1}'],
    ),
    "images are taken from users only": Case(
        "vllm_forced_call",
        "jaseci-labs/jac#6370, vllm-project/vllm#43203",
        sees_text("user", "Output of tool call chatcmpl-tool-5f3a:<image_url>"),
        manners=(images_of_users_only,),
        asked=TOOLS,
        then=[output("chatcmpl-tool-5f3a", [{"type": "input_text", "text": "A screenshot."}, IMAGE])],
        says=['{"n": 1}'],
    ),
    "LM Studio knows no named tool": Case(
        "lmstudio_calls",
        "lmstudio-ai/lmstudio-bug-tracker#670",
        sees_tools(["look"], "required"),
        needs={"profile": "lmstudio"},
        manners=(choice_is_text,),
        asked={**TOOLS, "tool_choice": {"type": "function", "name": "look"}},
        says=['{"n":1}'],
    ),
    "llama.cpp takes a named tool for auto": Case(
        "llamacpp_calls",
        "ggml-org/llama.cpp, tools/server/server-common.cpp, `oaicompat_chat_params_parse`",
        sees_tools(["look"], "required"),
        needs={"profile": "llama.cpp"},
        reading=Reading(choices=("auto", "none", "required")),
        asked={**TOOLS, "tool_choice": {"type": "function", "name": "look"}},
        says=['{"n":1}'],
    ),
    "Ollama calls tools although there are to be none": Case(
        "ollama_text",
        "ollama/ollama#8421, ollama/ollama#17921",
        sees_tools([], "auto"),
        needs={"profile": "ollama"},
        reading=Reading(choices=()),
        asked={**TOOLS, "tool_choice": "none"},
        then=[user("And now?")],
        says=["Hello."],
    ),
    "OpenAI's reasoning models know `max_completion_tokens`": Case(
        "vllm_text",
        "Chat Completions reference, `max_tokens`",
        sees_text("user", "And now?"),
        needs={"profile": "openai"},
        manners=(no_max_tokens,),
        asked={"max_output_tokens": 500},
        then=[user("And now?")],
    ),
}


@asynccontextmanager
async def served(folder: Any, quirky: Quirky, **settings: Any):
    """The server in front of this upstream."""
    async with listening(quirky) as url:
        engine = ChatEngine(UpstreamSettings(name="up", url=url, **settings), show_detail=True)
        async with running(folder, engine=engine) as server:
            yield server


def said(response: dict[str, Any]) -> list[str]:
    """The texts, the reasoning and the arguments of a response, in order."""
    return [
        item["arguments"] if item["type"] == "function_call" else "".join(part["text"] for part in item["content"])
        for item in response["output"]
    ]


def answers(response: dict[str, Any]) -> list[dict[str, Any]]:
    return [output(item["call_id"]) for item in response["output"] if item["type"] == "function_call"]


async def hold(case: Case, folder: Any, settings: dict[str, Any]) -> None:
    """Play the case, over a WebSocket by increments, and check it."""
    quirky = Quirky(streams(case.stream), case.manners, case.reading)
    async with served(folder, quirky, **settings) as server, server.connect() as line:
        asked = {"model": case.model, "store": False, **case.asked}
        first = await line.completed(**asked, input=case.first)
        assert said(first) == case.says
        then = case.then or answers(first)
        last = await line.completed(**asked, input=then, previous_response_id=first["id"])
        assert last["output"]
        case.sees(quirky.seen[-1])
        resent = await server.post(**asked, input=[*case.first, *first["output"], *then])
        assert resent.status == 200, resent.body
        assert quirky.bodies[-1] == quirky.bodies[-2], "a full resend is the same to the upstream"


@pytest.mark.parametrize("name", CASES)
async def test_upstream_is_understood(tmp_path, name):
    """Both turns complete and everything arrives, the family being told by the model's name."""
    case = CASES[name]
    await hold(case, tmp_path, {"profile": "generic"} | {k: v for k, v in (case.needs or {}).items() if k == "profile"})


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.needs])
async def test_quirk_is_real(tmp_path, name):
    """Without its profile each of these cases breaks: a turn fails, or something does not arrive."""
    with pytest.raises(AssertionError):
        await hold(CASES[name], tmp_path, GENERIC)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.needs])
async def test_profile_can_be_configured(tmp_path, name):
    """Where nothing tells, the operator does."""
    case = CASES[name]
    case = Case(**{**vars(case), "model": "local"})
    await hold(case, tmp_path, {**GENERIC, **(case.needs or {})})


async def test_missing_usage_is_null(tmp_path):
    """A server that counts nothing fails no turn, and nothing is counted in its place.

    Source: Chat Completions reference, "stream_options".
    """
    async with served(tmp_path, Quirky(streams("no_ids")), **GENERIC) as server:
        assert (await server.post(model="local", **TOOLS)).json["usage"] is None


async def test_vllm_without_its_tool_flags_names_them(tmp_path):
    """The remedy is on the server's command line.

    Source: vllm-project/vllm#9986.
    """
    quirky = Quirky(streams("vllm_text"), (tools_are_off,))
    async with served(tmp_path, quirky, profile="vllm") as server:
        answer = await server.post(model="local", **TOOLS)
        assert (answer.status, answer.json["error"]["param"]) == (400, "tools")
        assert "--enable-auto-tool-choice and --tool-call-parser" in answer.json["error"]["message"]
        assert (await server.post(model="local")).status == 200


# Each server's own words, in the way in which it says them.
OVERFLOWS = {
    "vLLM": (
        "vllm",
        400,
        "This model's maximum context length is 4096 tokens. However, your request has 9000 input tokens.",
    ),
    "SGLang": ("sglang", 400, "The input (9000 tokens) is longer than the model's context length (4096 tokens)."),
    "llama.cpp": (
        "llama.cpp",
        400,
        "request (9000 tokens) exceeds the available context size (4096 tokens), try increasing it",
    ),
    "Ollama": ("ollama", 400, "the input length exceeds the context length"),
    "LM Studio": ("lmstudio", 400, "Cannot truncate prompt with n_keep (9000) >= n_ctx (4096)"),
    "LM Studio, in its stream": (
        "lmstudio",
        200,
        "Trying to keep the first 9000 tokens when context the overflows. However, the model is loaded with less.",
    ),
    "OpenAI": ("openai", 400, "Your input exceeds the context window of this model. Please adjust your input."),
    "Mistral": ("mistral", 400, "Prompt contains 9000 tokens, too large for model with 4096 maximum context length"),
    "Groq": ("groq", 413, "Please reduce the length of the messages or completion."),
}


@pytest.mark.parametrize("name", OVERFLOWS)
async def test_overflow_has_one_code_whatever_the_server_says(tmp_path, name):
    """Clients compact at it; the connection goes on with the compacted conversation.

    Source: `upstream_errors.py`, `_OVERFLOW`; lmstudio-ai/lmstudio-bug-tracker#2322, #546;
    anomalyco/opencode#11141.
    """
    profile, status, words = OVERFLOWS[name]
    quirky = Quirky(streams("vllm_text"), refusal=(status, {"error": {"message": words}}))
    async with served(tmp_path, quirky, profile=profile) as server, server.connect() as line:
        first = await line.completed(model="local", input="Hello.", store=False)
        last = (await line.turn(model="local", input=TOO_LONG, previous_response_id=first["id"], store=False))[-1]
        error = last["response"]["error"] if last["type"] == "response.failed" else last["error"]
        assert error["code"] == "context_length_exceeded"
        assert await line.completed(model="local", input="In short.", store=False)


LONG = " ".join(f"{number} bottles of beer on the wall." for number in range(3000))
LISTED = {"object": "list", "data": [{"id": "qwen3-coder:30b", "object": "model", "owned_by": "library"}]}


def loaded(window: int) -> dict[str, Any]:
    """What Ollama tells of a model in memory."""
    return {"/v1/models": LISTED, "/api/ps": {"models": [{"name": "qwen3-coder:30b", "context_length": window}]}}


class TestSilentCut:
    async def test_turn_fails_where_ollama_read_a_part_only(self, tmp_path):
        """It counts 2050 tokens of a prompt of many times that, and says nothing.

        Source: openai/codex#2293, ollama/ollama#17889.
        """
        async with served(tmp_path, Quirky(streams("ollama_text")), profile="ollama") as server:
            async with server.connect() as line:
                last = (await line.turn(model="m", input=LONG))[-1]
            assert last["type"] == "response.failed"
            assert last["response"]["error"]["code"] == "context_length_exceeded"
            assert "OLLAMA_CONTEXT_LENGTH" in last["response"]["error"]["message"]

    async def test_turn_fails_where_lm_studio_answers_nothing(self, tmp_path):
        """It sends a whole stream without a word, and counts more tokens than it has room for.

        Source: lmstudio-ai/lmstudio-bug-tracker#2339.
        """
        row = {"id": "qwen3-coder", "type": "llm", "arch": "qwen3moe", "loaded_context_length": 32768}
        routes = {"/v1/models": {"data": [{"id": "qwen3-coder"}]}, "/api/v0/models": {"data": [row]}}
        async with served(tmp_path, Quirky(streams("lmstudio_silent"), routes=routes), profile="lmstudio") as server:
            await server.get("/v1/models")  # from here on the window is known
            async with server.connect() as line:
                last = (await line.turn(model="qwen3-coder"))[-1]
            assert last["response"]["error"]["code"] == "context_length_exceeded"
            assert "the context length with which the model is loaded" in last["response"]["error"]["message"]

    async def test_only_ollamas_count_tells_of_a_cut(self, tmp_path):
        """Another's may be of what was not in its cache."""
        async with served(tmp_path, Quirky(streams("ollama_text")), profile="lmstudio") as server:
            assert (await server.post(model="m", input=LONG)).status == 200

    async def test_an_answer_of_nothing_is_one_where_there_was_room(self, tmp_path):
        """Models do say nothing at times."""
        async with served(tmp_path, Quirky(streams("lmstudio_silent")), profile="lmstudio") as server:
            assert (await server.post(model="qwen3-coder")).json["output"] == []

    async def test_generic_profile_takes_the_answer(self, tmp_path):
        """Without the profile the answer to half a conversation counts."""
        async with served(tmp_path, Quirky(streams("ollama_text")), **GENERIC) as server:
            assert (await server.post(model="m", input=LONG)).status == 200

    async def test_what_cannot_fit_is_not_sent(self, tmp_path):
        """Once the model is loaded, Ollama tells its window; the list of models shows it too."""
        quirky = Quirky(streams("ollama_text"), routes=loaded(4096))
        async with served(tmp_path, quirky, profile="ollama") as server:
            (listed,) = (await server.get("/v1/models")).json["data"]
            assert listed["max_model_len"] == 4096
            answer = await server.post(model="qwen3-coder:30b", input=LONG)
            assert (answer.status, answer.json["error"]["code"]) == (400, "context_length_exceeded")
            assert "4096 tokens" in answer.json["error"]["message"]
            assert quirky.bodies == []
            assert (await server.post(model="qwen3-coder:30b", input="Hello.")).status == 200

    @pytest.mark.parametrize("text", ["x" * 100_000, " " * 100_000, "-" * 50_000 + "=" * 50_000])
    async def test_runs_of_one_character_are_no_proof(self, tmp_path, text):
        """A tokenizer makes few tokens of them."""
        async with served(tmp_path, Quirky(streams("ollama_text")), profile="ollama") as server:
            assert (await server.post(model="m", input=text)).status == 200

    async def test_nearly_full_window_is_warned_of(self, tmp_path, caplog):
        """Above it nothing would tell."""
        quirky = Quirky(streams("ollama_text"), routes=loaded(2100))
        async with served(tmp_path, quirky, profile="ollama") as server:
            await server.get("/v1/models")
            assert (await server.post(model="qwen3-coder:30b", input="word " * 1000)).status == 200
        assert "nearly its whole context window of 2100" in caplog.text
