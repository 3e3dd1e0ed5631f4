"""An upstream's refusals as our errors."""

import json
import re
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.engines.upstream_errors import (
    WORDS_CHARS_MAX,
    Answer,
    read_answer,
    refusal,
    retry_after,
    without_echo,
    without_secrets,
)
from openline.protocol.errors import ERRORS

NOW = datetime(2026, 11, 25, 5, 13, 45, tzinfo=UTC).timestamp()


def told(status, body, headers=None, *, show_words=True, secret=""):
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
    answer = read_answer(status, body, secret=secret)
    return refusal(answer, headers or {}, label="gpu-1", show_words=show_words, now=NOW)


def error(message, **fields):
    return {"error": {"message": message, **fields}}


OVERFLOWS = {
    "OpenAI": (400, error("Your input exceeds the context window of this model.", code="context_length_exceeded")),
    "vLLM": (
        400,
        error("This model's maximum context length is 4096 tokens. However, you requested 9000 tokens.", code=400),
    ),
    "vLLM 0.16": (400, error("You passed 1015 input tokens. However, the model's context length is only 1024 tokens.")),
    "vLLM, old": (
        400,
        {"object": "error", "message": "The prompt is longer than the maximum model length of 512", "code": 400},
    ),
    "SGLang": (
        400,
        {"message": "The input (9 tokens) is longer than the model's context length (8 tokens).", "code": 400},
    ),
    "SGLang, length": (
        400,
        error("Input length (9000 tokens) exceeds the maximum allowed length (4090 tokens). Use a shorter input."),
    ),
    "oMLX": (400, {"error": "Prompt too long: 51587 tokens exceeds max context window of 32768 tokens"}),
    "llama.cpp, sizes": (
        400,
        error("request (7946 tokens) exceeds the available context size (4096 tokens), try increasing it", code=400),
    ),
    "SGLang, requested": (400, error("Requested token count exceeds the model's maximum context length of 8 tokens.")),
    "llama.cpp": (400, error("the request exceeds the available context size, try increasing it", code=400)),
    "llama.cpp, type": (500, error("no", type="exceed_context_size_error")),
    "llama-cpp-python": (500, error("Requested tokens (600) exceed context window of 512")),
    "Ollama": (400, error("the input length exceeds the context length")),
    "Ollama, prompt": (400, {"error": "prompt too long; exceeded max context length by 3 tokens"}),
    "LM Studio": (400, {"error": "Trying to keep the first 10136 tokens when context the overflows. However, …"}),
    "LM Studio, kept": (400, {"error": "Cannot truncate prompt with n_keep (15028) >= n_ctx (7424)"}),
    "TGI": (
        422,
        {"error": "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096", "error_type": "v"},
    ),
    "Anthropic": (400, error("prompt is too long: 210000 tokens > 200000 maximum", type="invalid_request_error")),
    "Gemini": (400, [error("The input token count (9) exceeds the maximum number of tokens allowed (8).", code=400)]),
    "Groq": (413, error("Please reduce the length of the messages or completion.")),
    "Bedrock": (400, {"message": "Input is too long for requested model."}),
}


@pytest.mark.parametrize("server", OVERFLOWS)
def test_too_long_a_context_has_one_code_whatever_the_server_calls_it(server):
    """Clients compact on `context_length_exceeded` and on nothing else."""
    status, body = OVERFLOWS[server]
    got = told(status, body)
    assert (got.code, got.status, got.param) == ("context_length_exceeded", 400, "input")


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (401, error("Invalid key"), "upstream_unauthorized"),
        (403, b"<html><body>Forbidden</body></html>", "upstream_unauthorized"),
        (404, error("The model `x` does not exist.", type="NotFoundError"), "model_not_found"),
        (404, error("model 'x' not found, try pulling it first"), "model_not_found"),
        (403, error("No access", code="model_not_found"), "model_not_found"),
        (400, error("Invalid model name passed in model=x"), "model_not_found"),
        (404, {"detail": "Not Found"}, "upstream_error"),
        (405, b"", "upstream_error"),
        (429, error("slow down"), "rate_limit_exceeded"),
        (429, error("You exceeded your current quota", type="insufficient_quota"), "insufficient_quota"),
        (402, error("Insufficient balance"), "insufficient_quota"),
        (429, error("This model's maximum context length …"), "rate_limit_exceeded"),
        (503, error("Loading model", type="unavailable_error"), "server_is_overloaded"),
        (529, b"", "server_is_overloaded"),
        (400, error("bad temperature"), "upstream_refused"),
        (422, {"detail": [{"loc": ["body", "tools"], "msg": "no"}]}, "upstream_refused"),
        (500, b"Internal Server Error", "upstream_error"),
        (504, b"", "upstream_error"),
        (301, b"", "upstream_error"),
        (307, b"", "upstream_error"),
        (0, error("no"), "upstream_error"),
        (0, {"code": "rate_limit_exceeded", "message": "slow down"}, "rate_limit_exceeded"),
        (0, error("no", code=400), "upstream_refused"),
        (0, error("no", type="overloaded_error"), "server_is_overloaded"),
        (0, "just text", "upstream_error"),
        (0, [], "upstream_error"),
    ],
)
def test_status_and_words_decide_the_code(status, body, code):
    """The words before the status, where they are clear."""
    got = told(status, body)
    assert got.code == code
    assert got.message.startswith(f"Upstream 'gpu-1' answered {status or ''}")


def test_upstreams_401_is_never_the_clients():
    """Its key is the operator's."""
    assert told(401, b"").status == 502


REMEDIES = {
    "vLLM without its tool flags (vllm-project/vllm#9986)": (
        400,
        error('"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'),
        "--enable-auto-tool-choice",
    ),
    "llama.cpp without --jinja": (500, error("tools param requires --jinja flag", code=500), "--jinja"),
    "Ollama with a model without tools": (
        400,
        error("registry.ollama.ai/library/phi4:14b does not support tools"),
        "`ollama show`",
    ),
    "Qwen's template (vllm-project/vllm#41114)": (
        400,
        error("System message must be at the beginning."),
        "`late_system_role`",
    ),
    "Gemma's template (suitenumerique/conversations#197)": (
        400,
        error("Conversation roles must alternate user/assistant/user/assistant/..."),
        "`family`",
    ),
    "Mistral's ids (vllm-project/vllm#9019)": (
        400,
        {"object": "error", "message": "Tool call id was call_1 but must be a-z, A-Z, 0-9, with a length of 9."},
        "`family`",
    ),
    "Mistral's order (zed-industries/zed#37021)": (
        400,
        {"object": "error", "message": "Unexpected role 'user' after role 'tool'"},
        "`family`",
    ),
    "Mistral's fields (charmbracelet/crush#1590)": (
        422,
        {"detail": [{"type": "extra_forbidden", "loc": ["body", "messages", 3, "assistant", "reasoning_content"]}]},
        "`reasoning_field`",
    ),
    "Groq's fields (tashfeenahmed/freellmapi#1070)": (
        400,
        error("'messages.1' : (property 'reasoning_content' is unsupported)"),
        "`reasoning_field`",
    ),
    "DeepSeek's thinking (QwenLM/qwen-code#3637)": (
        400,
        error("The `reasoning_content` in the thinking mode must be passed back to the API."),
        "`reasoning_field`",
    ),
    "llama.cpp, a bound of 20 000 items": (
        400,
        error("Failed to initialize samplers: failed to parse grammar"),
        "Simplify the schema",
    ),
    "llama.cpp, a reference to nothing": (
        400,
        error("Automatic parser generation failed: JSON schema error at #/properties/a: cannot resolve $ref #/nope"),
        "Simplify the schema",
    ),
    "vLLM, a schema of too much": (
        400,
        error("The provided JSON schema contains features not supported by xgrammar."),
        "Simplify the schema",
    ),
    "llama.cpp with a text model": (500, error("image input is not supported - hint: mmproj"), "Send text only"),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_known_refusals_have_a_remedy(case):
    """What to change stands in the message, whether or not the upstream's own words may be shown."""
    status, body, remedy = REMEDIES[case]
    got = told(status, body, show_words=False)
    assert (got.code, got.status) == ("upstream_refused", 400)
    assert remedy in got.message


def test_redirect_says_that_it_is_not_followed():
    """The key would go elsewhere."""
    assert "redirects are not followed" in told(302, b"").message


def test_words_are_shown_only_where_that_is_allowed():
    """Else they are in the log."""
    assert "bad temperature" in told(400, error("bad temperature")).message
    hidden = told(400, error("bad temperature"), show_words=False).message
    assert "bad temperature" not in hidden
    assert "server's log" in hidden


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 7 "}, 7),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "0.2"}, 1),
        ({"retry-after": "86400"}, 3600),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "1\r\nx: y"}, None),
        ({"retry-after": "9" * 100}, None),
        ({"retry-after": "Wed, 25 Nov 2026 05:13:55 GMT"}, 10),
        ({"retry-after": "Wednesday, 25-Nov-26 05:13:55 GMT"}, 10),
        ({"retry-after": "Wed Nov 25 05:13:55 2026"}, 10),
        ({"retry-after": "Wed, 25 Nov 2026 05:13:35 GMT"}, 0),
        ({"retry-after": "Wed, 25 Nov 2099 05:13:35 GMT"}, 3600),
        ({"retry-after": "Wed, 99 Nov 2026 05:13:35 GMT"}, None),
        ({"retry-after": "Wed, 25 Nov 2026 06:13:55 GMT", "date": "Wed, 25 Nov 2026 06:13:45 GMT"}, 10),
        ({}, None),
    ],
)
def test_retry_after_is_whole_seconds_up_to_an_hour(headers, seconds):
    """RFC 9110 §10.2.3 allows seconds and a date; whose clock a date is by, the answer's own `date` says."""
    assert retry_after(headers, "", NOW) == seconds


@pytest.mark.parametrize(
    ("words", "seconds"),
    [
        ("Rate limit reached. Please try again in 1.242s. Visit …", 2),
        ("try again in 20ms", 1),
        ("Please try again in 6m0s.", 360),
        ("Please try again in 1h2m.", 3600),
        ("Try again in 20 seconds", 20),
        ("Try again in a while", None),
        ("try again in " + "9" * 50 + "s", None),
    ],
)
def test_seconds_to_wait_are_read_out_of_an_upstreams_words(words, seconds):
    """Inside a stream there is no header; hosted servers say there when to come back."""
    assert retry_after({}, words, NOW) == seconds
    error = told(0, {"code": "rate_limit_exceeded", "message": words}, show_words=False)
    assert error.headers == ({} if seconds is None else {"retry-after": str(seconds)})


def test_a_message_says_when_to_try_again_as_codex_reads_it():
    """Of a response that fails Codex has only the message; its pattern takes the first number before `s`.

    Source: openai/codex, codex-rs/codex-api/src/sse/responses.rs, `try_parse_retry_after`.
    """
    message = told(429, error("Please try again in 90s"), {"retry-after": "7"}).message
    assert re.search(r"(?i)try again in\s*(\d+(?:\.\d+)?)\s*(s|ms|seconds?)", message).groups() == ("7", "s")
    assert "Try again later." in told(429, b"").message
    assert "again" not in told(400, error("no"), {"retry-after": "7"}).message


@pytest.mark.parametrize(("status", "passes"), [(429, True), (503, True), (500, False), (400, False)])
def test_retry_after_travels_with_load_errors(status, passes):
    """Where trying again is the remedy."""
    assert (told(status, b"", {"retry-after": "7"}).headers == {"retry-after": "7"}) is passes


@pytest.mark.parametrize(
    "text",
    [
        "Incorrect API key provided: sk-proj-CANARY123456",
        "Authorization: Bearer CANARY123456 is wrong",
        'bad {"api_key": "CANARY123456"}',
        "http://user:CANARY123456@host/ said no",
        "token=CANARY123456",
        "jwt eyJhbGciOiJ.CANARY123456.x",
        "key CANARY123456 unknown",
    ],
)
def test_keys_are_taken_out(text):
    """Those that look like one, and the upstream's own in any place."""
    secret = "CANARY123456" if text.startswith("key ") else ""
    assert "CANARY123456" not in without_secrets(text, secret)
    assert "CANARY123456" not in told(401, error(text), secret=secret).message


@given(text=st.text())
def test_words_are_bounded_and_on_one_line(text):
    """They go into logs and terminals."""
    words = without_secrets(text * 100, "")
    assert len(words) <= WORDS_CHARS_MAX
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 or char in "\u2028\u202e" for char in words)


def test_html_is_read_as_its_text():
    """Proxies answer with pages."""
    body = b"<html><style>x{}</style><h1>502 Bad Gateway</h1></html>"
    assert read_answer(502, body) == Answer(502, "502 Bad Gateway", "")


@given(echo=st.text(st.characters(min_codepoint=32, codec="utf-8"), min_size=16), before=st.text(max_size=30))
def test_what_repeats_the_request_is_taken_out(echo, before):
    """A refusal that quotes the prompt must not bring it into the log."""
    request = json.dumps({"content": echo}, ensure_ascii=False).encode()
    left = without_echo(f"{before} {echo} end", request)
    assert not any(echo[start : start + 16] in left for start in range(len(echo) - 15) if len(set(echo)) > 4)


def test_words_of_the_servers_own_stay():
    """Names of fields are shorter than what counts as an echo."""
    request = json.dumps({"messages": [{"content": "my secret plan for tonight"}], "temperature": 3}).encode()
    words = "temperature must be at most 2, but input was 'my secret plan for tonight'"
    left = without_echo(words, request)
    assert left.startswith("temperature must be at most 2, but input was")
    assert "secret" not in left
    assert "tonight" not in left


def test_echo_of_a_request_too_large_to_compare_is_left_out_whole():
    """The loop is not held up by a log line."""
    assert "secret" not in without_echo("secret", b"x" * (5 * 1024 * 1024))


@given(status=st.integers(0, 599), body=st.binary())
def test_any_body_becomes_an_error_of_the_table(status, body):
    """Nothing an upstream sends can raise anything else."""
    got = told(status, body)
    assert got.code in ERRORS
    assert got.status >= 400
