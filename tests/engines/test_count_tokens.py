"""Counting a prompt: what each engine asks its upstream, and what becomes of the answer.

Source: Responses API reference, "Get input token counts".
"""

import json
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import msgspec
import pytest

from engines.fake_upstream import fake_upstream
from local_engine import ask, needs_local, output, request_of
from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from openline.engines.gguf import GgufEngine
from openline.engines.responses import ResponsesEngine
from openline.engines.scripted import ScriptedEngine
from openline.engines.tiny import TinyEngine
from openline.engines.tiny_model import tiny_model_path
from openline.protocol.errors import ProtocolError

NOTE = {"type": "function", "name": "note", "parameters": {"type": "object", "properties": {"t": {"type": "string"}}}}
SAID = [
    {"role": "user", "content": "Note it."},
    {"type": "function_call", "call_id": "call_1", "name": "note", "arguments": '{"t":"it"}'},
    {"type": "function_call_output", "call_id": "call_1", "output": "Noted."},
    {"role": "developer", "content": "Go on."},
]
FIELDS = {"instructions": "Be brief.", "tools": [NOTE], "tool_choice": "required", "reasoning": {"effort": "low"}}
DONE = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """The model is written once, and not into the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENLINE_UPSTREAM_API_KEY", raising=False)


@asynccontextmanager
async def upstream(answers: dict[str, Any], kind: str = "chat", *, content_type: str = "application/json", **settings):
    """An engine before a server that answers these paths, with 200 unless a status stands before; others are 404."""

    async def script(exchange):
        path = exchange.head.split()[1]
        answer = answers.get(path, ("404 Not Found", {"detail": "Not Found"}))
        status, body = answer if isinstance(answer, tuple) else ("200 OK", answer)
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "text/event-stream" if path == "/v1/chat/completions" else content_type
        await exchange.answer(status, body, f"Content-Type: {kind}", "Retry-After: 7")

    make = ResponsesEngine if kind == "responses" else ChatEngine
    async with fake_upstream(script) as fake:
        engine = make(UpstreamSettings(kind=kind, name="gpu-1", url=fake.url, **settings), show_detail=True)
        try:
            yield engine, fake
        finally:
            await engine.close()


def asked(fake, path: str) -> bytes:
    """The body of the one request to a path."""
    (body,) = [exchange.body for exchange in fake.exchanges if exchange.head.startswith(f"POST {path} ")]
    return body


async def refused(engine, request=None) -> ProtocolError:
    with pytest.raises(ProtocolError) as caught:
        await engine.count_tokens(request or request_of(SAID, "m", **FIELDS))
    return caught.value


async def turn_body(engine, fake) -> dict[str, Any]:
    """What a turn of the same request sends."""
    await ask(engine, SAID, model="m", **FIELDS)
    return msgspec.json.decode(asked(fake, "/v1/chat/completions"))


class TestScripted:
    async def test_the_count_is_what_usage_tells(self):
        """By the same rule of thumb, of the whole context."""
        engine = ScriptedEngine(UpstreamSettings(kind="scripted"))
        first = await ask(engine, SAID, model="scripted-text")
        counted = await engine.count_tokens(request_of("More.", "scripted-text", first.context))
        assert counted == (await ask(engine, "More.", model="scripted-text", context=first.context)).tokens > 0

    async def test_an_unknown_script_is_refused_as_in_a_turn(self):
        """There is nothing that would read it."""
        error = await refused(ScriptedEngine(UpstreamSettings(kind="scripted")), request_of("x", "gpt-5"))
        assert error.code == "model_not_found"


class TestResponses:
    async def test_the_upstream_gets_the_whole_context_and_the_fields_that_it_reads(self):
        """OpenAI refuses fields that the endpoint does not know; the parent is ours and its items stand in `input`.

        Source: Responses API reference, "Get input token counts", table of body fields.
        """
        answer = {"object": "response.input_tokens", "input_tokens": 11}
        ours = {"previous_response_id": "resp_ours", "store": True, "stream": True}
        more = {"max_output_tokens": 16, "temperature": 1, "metadata": {"a": "b"}, "vendor_field": 1}
        kept = {"text": {"verbosity": "low"}, "parallel_tool_calls": False, "truncation": "auto", **FIELDS}
        kept["personality"] = "friendly"
        async with upstream({"/v1/responses/input_tokens": answer}, "responses") as (engine, fake):
            first = request_of("Before.", "m")
            assert await engine.count_tokens(request_of(SAID, "m", first.context, **kept, **ours, **more)) == 11
        body = msgspec.json.decode(asked(fake, "/v1/responses/input_tokens"))
        before = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Before."}]}
        assert body == {"model": "m", "input": [before, *SAID], **kept}

    @pytest.mark.parametrize("status", ["404 Not Found", "405 Method Not Allowed"])
    async def test_a_server_without_the_endpoint_is_named(self, status):
        """Many Responses servers have none; a count of our own would be a guess."""
        async with upstream({"/v1/responses/input_tokens": (status, {})}, "responses") as (engine, _):
            error = await refused(engine)
        assert (error.status, error.code, error.param) == (400, "unsupported_parameter", "model")
        assert "'gpu-1' cannot count tokens: it has no /responses/input_tokens" in error.message


class TestChat:
    async def test_vllm_counts_what_a_turn_sends(self):
        """At the root, not below `/v1`; reasoning effort, which a turn has in a field, goes to the template.

        Source: vLLM, entrypoints/serve/tokenize/protocol.py, `TokenizeChatRequest`.
        """
        answers = {"/tokenize": {"count": 3, "max_model_len": 9, "tokens": [1, 2, 3]}, "/v1/chat/completions": DONE}
        async with upstream(answers, profile="vllm") as (engine, fake):
            assert await engine.count_tokens(request_of(SAID, "m", **FIELDS)) == 3
            sent = await turn_body(engine, fake)
        assert msgspec.json.decode(asked(fake, "/tokenize")) == {
            **{name: sent[name] for name in ("model", "messages", "tools")},
            "add_generation_prompt": True,
            "chat_template_kwargs": {"reasoning_effort": "low"},
        }

    async def test_sglang_counts_what_a_turn_sends(self):
        """Its endpoint reads the choice of a tool too.

        Source: SGLang, entrypoints/openai/protocol.py, `TokenizeRequest`.
        """
        answers = {"/tokenize": {"count": 3, "max_model_len": 9, "tokens": [1, 2, 3]}, "/v1/chat/completions": DONE}
        async with upstream(answers, profile="sglang") as (engine, fake):
            assert await engine.count_tokens(request_of(SAID, "m", **FIELDS)) == 3
            sent = await turn_body(engine, fake)
        names = ("model", "messages", "tools", "tool_choice", "reasoning_effort")
        assert msgspec.json.decode(asked(fake, "/tokenize")) == {name: sent[name] for name in names}

    async def test_llama_cpp_counts_what_a_turn_sends(self):
        """Its endpoint takes a turn's body as it is.

        Source: llama.cpp, tools/server/README.md, "POST /v1/chat/completions/input_tokens: Token Counting".
        """
        path = "/v1/chat/completions/input_tokens"
        answers = {path: {"object": "response.input_tokens", "input_tokens": 4}, "/v1/chat/completions": DONE}
        async with upstream(answers, profile="llama.cpp") as (engine, fake):
            assert await engine.count_tokens(request_of(SAID, "m", **FIELDS)) == 4
            await ask(engine, SAID, model="m", **FIELDS)
        assert asked(fake, path) == asked(fake, "/v1/chat/completions")

    async def test_the_server_is_recognised_before_its_first_turn(self, monkeypatch):
        """Also where the configuration does not say what it is; once known it is not asked again, however long ago."""
        monkeypatch.setattr("openline.engines.about.MODELS_SECONDS_MAX", 0.0)
        listed = {"object": "list", "data": [{"id": "Qwen/Qwen3-8B", "owned_by": "vllm"}]}
        answers = {"/v1/models": listed, "/tokenize": {"count": 3}}
        async with upstream(answers) as (engine, fake):
            for _ in range(2):
                assert await engine.count_tokens(request_of(SAID, "Qwen/Qwen3-8B")) == 3
        bodies = [exchange.body for exchange in fake.exchanges if exchange.head.startswith("POST /tokenize ")]
        # In the form that its family takes: a late system message is a user's.
        assert [message["role"] for message in msgspec.json.decode(bodies[0])["messages"]][-1] == "user"
        assert [exchange.head.split()[1] for exchange in fake.exchanges].count("/v1/models") == 1

    @pytest.mark.parametrize(
        ("profile", "title"),
        [
            ("ollama", "Ollama"),
            ("lmstudio", "LM Studio"),
            ("openai", "OpenAI"),
            ("mistral", "Mistral"),
            ("groq", "Groq"),
            ("generic", "a Chat Completions server"),
        ],
    )
    async def test_a_server_that_cannot_count_is_named_and_not_asked(self, profile, title):
        """With what could be done; a count of our own would be a guess.

        Source: ollama/ollama#12031, and the servers' API references, which have no such endpoint.
        """
        async with upstream({}, profile=profile) as (engine, fake):
            error = await refused(engine)
        assert (error.status, error.code, error.param) == (400, "unsupported_parameter", "model")
        assert f"'gpu-1' cannot count tokens: it is {title}, which" in error.message
        assert "set the upstream's `profile`" in error.message
        assert fake.exchanges == []

    @pytest.mark.parametrize("profile", ["vllm", "sglang", "llama.cpp"])
    async def test_a_version_that_cannot_count_is_named(self, profile):
        """An older one, or one that is cut off by a proxy, does not know the path."""
        async with upstream({}, profile=profile) as (engine, _):
            error = await refused(engine)
        assert (error.code, error.param) == ("unsupported_parameter", "model")
        assert "has no endpoint for it" in error.message

    async def test_what_has_no_form_there_is_refused_as_in_a_turn(self):
        """Nothing is asked then."""
        async with upstream({"/tokenize": {"count": 3}}, profile="vllm") as (engine, fake):
            error = await refused(engine, request_of([{"type": "program", "id": "p_1"}], "m"))
            assert error.code == "unsupported_parameter"
            assert (await refused(engine, request_of([], "m"))).code == "missing_required_parameter"
        assert fake.exchanges == []


class TestFaults:
    """Of the request that counts, on an engine of each kind."""

    PATHS = (("/tokenize", "chat"), ("/v1/responses/input_tokens", "responses"))
    by_path = pytest.mark.parametrize(("path", "kind"), PATHS, ids=["chat", "responses"])

    @staticmethod
    def settings(kind: str) -> dict[str, Any]:
        return {"profile": "vllm"} if kind == "chat" else {}

    @by_path
    @pytest.mark.parametrize(
        ("status", "words", "code"),
        [
            ("429 Too Many Requests", "slow down", "rate_limit_exceeded"),
            ("401 Unauthorized", "bad key", "upstream_unauthorized"),
            ("404 Not Found", "The model `m` does not exist.", "model_not_found"),
            ("400 Bad Request", "This model's maximum context length is 9 tokens.", "context_length_exceeded"),
            ("500 Internal Server Error", "broken", "upstream_error"),
            ("302 Found", "", "upstream_error"),
        ],
    )
    async def test_a_refusal_is_the_same_error_as_a_turns(self, path, kind, status, words, code):
        """With its words where the client may see them."""
        answers = {path: (status, {"error": {"message": words}})}
        async with upstream(answers, kind, **self.settings(kind)) as (engine, _):
            error = await refused(engine)
        assert error.code == code
        assert "gpu-1" in error.message
        assert words in error.message
        assert error.headers == ({"retry-after": "7"} if code == "rate_limit_exceeded" else {})

    @by_path
    @pytest.mark.parametrize(
        "answer",
        [
            *(b"", b"<html>Welcome</html>", b"[3]", b"3", b"\xff", b'{"x":' + b"[" * 100_000),
            *({}, {"count": "3"}, {"count": -1}, {"count": True}, {"count": 1.5}, {"count": None}, {"tokens": [1]}),
            *({"input_tokens": [3]}, {"input_tokens": -1}, {"error": "Unexpected endpoint or method."}),
        ],
        ids=lambda answer: repr(answer)[:30],
    )
    async def test_an_answer_without_a_count_is_the_upstreams_error(self, path, kind, answer):
        """Whatever else it is, zero is no answer for it."""
        async with upstream({path: answer}, kind, **self.settings(kind)) as (engine, _):
            error = await refused(engine)
        assert (error.status, error.code) == (502, "upstream_error")
        assert "'gpu-1' answered POST" in error.message
        assert "something other than a count of tokens" in error.message

    @by_path
    async def test_an_answer_has_a_bound(self, path, kind):
        """Servers send every token along."""
        answers = {path: {"count": 1, "input_tokens": 1, "tokens": [1000] * 20_000}}
        async with upstream(answers, kind, event_bytes_max=64 * 1024, **self.settings(kind)) as (engine, _):
            error = await refused(engine)
        assert (error.code, "65536 bytes" in error.message) == ("upstream_error", True)

    @pytest.mark.parametrize("begun", [False, True])
    async def test_an_upstream_that_falls_silent_is_given_up(self, begun):
        """Before its answer, and within it."""

        async def script(exchange):
            if begun:
                await exchange.begin(content_type="application/json")
            await exchange.left()

        async with fake_upstream(script) as fake, AsyncExitStack() as stack:
            bounds = {"connect_seconds_max": 0.05, "first_event_seconds_max": 0.05}
            engine = ChatEngine(UpstreamSettings(url=fake.url, profile="vllm", **bounds), show_detail=True)
            stack.push_async_callback(engine.close)
            error = await refused(engine)
        assert (error.status, error.code) == (504, "upstream_timeout")

    async def test_an_answer_that_is_cut_off_is_no_count(self):
        """Even where the count stands in what has come."""

        async def script(exchange):
            await exchange.begin(content_type="application/json")
            await exchange.send(b'b\r\n{"count":3}\r\n')

        async with fake_upstream(script) as fake, AsyncExitStack() as stack:
            engine = ChatEngine(UpstreamSettings(url=fake.url, profile="vllm"), show_detail=True)
            stack.push_async_callback(engine.close)
            error = await refused(engine)
        assert (error.status, error.code) == (502, "upstream_error")


@needs_local
class TestLocal:
    """Real llama.cpp, with the tiny model: its own usage is the oracle."""

    @pytest.fixture
    async def opened(self, cache):
        async with AsyncExitStack() as stack:

            def open_one(make, **settings):
                engine = make(UpstreamSettings(kind="gguf", **settings), show_detail=True)
                stack.push_async_callback(engine.close)
                return engine

            yield open_one

    @pytest.mark.parametrize(
        ("model", "fields"),
        [
            ("tiny-text", {}),
            ("tiny-text", {"instructions": "Be brief.", "tools": [NOTE]}),
            ("tiny-text", {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"const": 7}}}}),
            ("tiny-tools-2", {"tools": [NOTE]}),
            ("tiny-shell-5", {"tools": [NOTE], "tool_choice": "none"}),
        ],
    )
    async def test_the_tiny_models_count_is_its_usage(self, opened, model, fields):
        """In the first turn and in one that continues it."""
        engine = opened(TinyEngine, url="tiny")
        counted = await engine.count_tokens(request_of("Look.", model, **fields))
        first = await ask(engine, "Look.", model=model, **fields)
        assert counted == first.tokens > 0
        more = output(first.calls[0][0].call_id, "Seen.") if first.calls else "More."
        counted = await engine.count_tokens(request_of(more, model, first.context, **fields))
        assert counted == (await ask(engine, more, model=model, context=first.context, **fields)).tokens > first.tokens

    async def test_an_unknown_rule_is_refused_as_in_a_turn(self, opened):
        """There is nothing that would read it."""
        assert (await refused(opened(TinyEngine, url="tiny"), request_of("x", "gpt-5"))).code == "model_not_found"

    async def test_a_model_files_count_is_its_usage(self, opened):
        """Tools and late developer messages too; the file is loaded if no turn has done it."""
        engine = opened(GgufEngine, url=str(tiny_model_path()))
        counted = await engine.count_tokens(request_of(SAID, "m", **FIELDS))
        assert counted == (await ask(engine, SAID, model="m", max_output_tokens=16, **FIELDS)).tokens > 0

    async def test_more_than_fits_is_counted(self, opened):
        """It is how a client learns by how much."""
        engine = opened(GgufEngine, url=str(tiny_model_path()), context_tokens=256)
        assert await engine.count_tokens(request_of("x" * 4000, "m")) > 256
