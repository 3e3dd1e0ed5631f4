"""What an upstream says when it refuses or fails, as our errors.

One pure function over a few tables: status and words in, a `ProtocolError` out. A
message names the upstream and a remedy where the cause is known. The upstream's own words
are bounded and cleaned of keys, and reach the client only where its operator allows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple, cast

import msgspec

from openline.protocol.errors import ProtocolError

WORDS_CHARS_MAX: Final = 500
RETRY_AFTER_SECONDS_MAX: Final = 3600  # a longer wait is not a client's to sit out

# How servers say that a request is larger than the model's context. Seen in: OpenAI, vLLM,
# SGLang, llama.cpp, Ollama, LM Studio, TGI, Anthropic, Gemini, Bedrock, Mistral, Groq.
_OVERFLOW: Final = re.compile(
    r"context_length_exceeded|exceed_context_size"
    r"|maximum context length|maximum model length|maximum prompt length"
    r"|exceed\w*\W+(?:\w+\W+){0,6}?context (?:size|length|window)|context (?:size|length|window)\W+(?:\w+\W+){0,3}?exceeded"
    r"|context length (?:is|of) only|maximum input length"
    r"|(?:longer|greater) than the (?:model'?s )?context (?:length|window)|exceeded max context length"
    r"|when (?:the )?context (?:the )?overflows|reached context length|n_keep \(\d+\) >=? n_ctx"
    r"|`inputs` (?:tokens|must have less)"
    r"|prompt is too long|input is too long|reduce the length of (?:the|your) (?:messages|prompt|input)"
    r"|input token count\W.{0,40}exceeds the maximum"
    r"|input length \(\d+ tokens\) exceeds the maximum allowed length",
    re.IGNORECASE,
)
_NO_MODEL: Final = re.compile(
    r"model_not_found|no such model|unknown model|invalid model name|no models? (?:is |are )?loaded|try pulling it first"
    r"|\bmodel\b.{0,200}?(?:does not exist|doesn't exist|not found|not loaded|not available|is not supported)",
    re.IGNORECASE | re.DOTALL,
)
_NO_QUOTA: Final = re.compile(
    r"insufficient_quota|quota_exceeded|billing|insufficient (?:balance|credits)", re.IGNORECASE
)

# How servers were started, or what they run, decides whether they take tools. vLLM (vllm-project/vllm#9986),
# llama.cpp (server-common.cpp), SGLang, Ollama (server/routes.go).
_TOOLS_OFF: Final = re.compile(
    r"requires --enable-auto-tool-choice|--tool-call-parser (?:to be set|is (?:required|not set))"
    r"|param requires --jinja|does not support tools",
    re.IGNORECASE,
)
# A chat template, or what checks messages before it, does not take their order, roles or ids.
_TEMPLATE: Final = re.compile(
    r"system message must be at the beginning|roles must alternate|unexpected role|system role (?:is )?not supported"
    r"|unexpected message role|roles? (?:are|is) supported|tool call id was|jinja (?:exception|template)|TemplateError",
    re.IGNORECASE,
)
# Strict servers name the field that they do not know; DeepSeek names the one that it misses.
_REASONING: Final = re.compile(
    r"reasoning_content\W.{0,80}(?:unsupported|not permitted|must be passed back)"
    r"|extra_forbidden.{0,200}\breasoning|reasoning is not supported",
    re.IGNORECASE | re.DOTALL,
)
_NO_IMAGES: Final = re.compile(
    r"image input is not supported|image_url.{0,60}not supported|does not support (?:images?|vision|multimodal)"
    r"|is not a multimodal model|no multimodal|image urls are only allowed",
    re.IGNORECASE,
)
# A schema that the server makes no grammar of: llama.cpp (common/json-schema-to-grammar.cpp, src/llama-grammar.cpp),
# vLLM (v1/structured_output/backend_xgrammar.py).
_NO_GRAMMAR: Final = re.compile(
    r"failed to parse grammar|json schema (?:error|conversion failed)|json schema contains features not supported",
    re.IGNORECASE,
)

# OpenAI and Groq: "Please try again in 1.242s", "20ms", "6m0s"; others: "in 20 seconds".
_TIME: Final = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s?(ms|[smh])")
_TRY_AGAIN_IN: Final = re.compile(rf"try again in ((?:{_TIME.pattern})+)", re.IGNORECASE)
_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}

# Keys in the forms that servers echo them: a header's value, a known prefix, a field, a URL, a JWT.
_KEYS: Final = re.compile(
    r"(?i:bearer)\s+[^\s\"',;]+"
    r"|\b(?:sk|pk|rk|ak|hf|gsk|xai|ghp|glpat|nvapi|olk)[-_][\w*.\-]{6,}"
    r"|\bAIza[\w-]{20,}|\beyJ[\w-]{8,}(?:\.[\w-]*){0,2}"
    r"|(?i:api[_-]?key|authorization|token|secret|password)[\"']?\s*[:=]\s*[\"']?(?:(?i:bearer|basic)\s+)?[^\s\"',;]+"
    r"|(?<=://)[^\s/@]+@"
)
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069]+")
_TAG: Final = re.compile(r"<(?:script|style)\b.*?</(?:script|style)>|<[^>]*>", re.IGNORECASE | re.DOTALL)
# An echo of the request is noticed if it has a piece of this length; ours start at every `_ECHO_STEP`th character.
_ECHO_CHARS: Final = 12
_ECHO_STEP: Final = 4
_ECHO_BYTES_MAX: Final = 4 * 1024 * 1024


class Answer(NamedTuple):
    """What an upstream answered instead of a generation.

    Attributes:
        status: its HTTP status; for an error inside a stream the one it names, or 500.
        words: its own message, bounded, without keys and control characters; empty if it gave none.
        names: its `code` and `type`, cleaned like its words.
    """

    status: int
    words: str
    names: str


class NoEndpointError(ProtocolError):
    """The upstream does not know the path that it was asked at."""


class _Kind(NamedTuple):
    code: str
    says: str
    param: str | None = None
    passes: bool = False  # whether trying again is the remedy


_OVERFLOWS: Final = _Kind(
    "context_length_exceeded",
    "the conversation is longer than the model's context window. Shorten or compact it, or use a model with a larger one.",
    "input",
)
_MODEL_UNKNOWN: Final = _Kind(
    "model_not_found", "it does not serve this model. `GET /v1/models` lists those it serves.", "model"
)
_UNAUTHORIZED: Final = _Kind(
    "upstream_unauthorized",
    "it does not accept this server's key. Its operator sets the key in the variable that `api_key_env` names.",
)
_WRONG_PATH: Final = _Kind(
    "upstream_error",
    "it has no such endpoint. The upstream's `url` must be its API's root, which usually ends in /v1.",
)
_REDIRECTED: Final = _Kind(
    "upstream_error", "redirects are not followed. Set the upstream's `url` to where it really is."
)
_NO_CREDIT: Final = _Kind("insufficient_quota", "its quota is used up.")
_RATE: Final = _Kind("rate_limit_exceeded", "too many requests.", passes=True)
_OVERLOADED: Final = _Kind("server_is_overloaded", "it is overloaded or still loading.", passes=True)
_REFUSED: Final = _Kind("upstream_refused", "it refused the request.")
_FAILED: Final = _Kind("upstream_error", "it failed.")

_NO_TOOLS: Final = _Kind(
    "upstream_refused",
    "it takes no tools as it runs now. vLLM wants --enable-auto-tool-choice and --tool-call-parser NAME, SGLang"
    " --tool-call-parser NAME, llama.cpp --jinja; Ollama a model of which `ollama show` lists tools.",
    "tools",
)
_REFUSED_ORDER: Final = _Kind(
    "upstream_refused",
    "its model's chat template does not take these messages. Set the upstream's `profile` and `family`"
    ' if they were not recognised, or `late_system_role` to "user".',
    "input",
)
_REFUSED_REASONING: Final = _Kind(
    "upstream_refused",
    "it takes an assistant's earlier reasoning in another form. Set the upstream's `reasoning_field`"
    ' to "reasoning_content", "reasoning" or "".',
    "input",
)
_REFUSED_IMAGE: Final = _Kind("upstream_refused", "its model does not look at images. Send text only.", "input")
_REFUSED_SCHEMA: Final = _Kind(
    "upstream_refused",
    "it cannot hold its output to a JSON schema of the request, of `text.format` or of a tool. Simplify the schema: its"
    " patterns, references and bounds.",
)
# What its words mean, in the order in which they are looked for.
_OF_WORDS: Final = (
    (_TOOLS_OFF, _NO_TOOLS),
    (_REASONING, _REFUSED_REASONING),
    (_TEMPLATE, _REFUSED_ORDER),
    (_NO_IMAGES, _REFUSED_IMAGE),
    (_NO_GRAMMAR, _REFUSED_SCHEMA),
)

_OF_STATUS: Final[Mapping[int, _Kind]] = {
    401: _UNAUTHORIZED,
    402: _NO_CREDIT,
    403: _UNAUTHORIZED,
    404: _WRONG_PATH,
    405: _WRONG_PATH,
    429: _RATE,
    503: _OVERLOADED,
    529: _OVERLOADED,
}

_STATUS_OF_NAME: Final[Mapping[str, int]] = {
    "rate_limit_exceeded": 429,
    "rate_limit_error": 429,
    "insufficient_quota": 429,
    "server_is_overloaded": 503,
    "overloaded_error": 529,
    "unavailable_error": 503,
    "invalid_api_key": 401,
    "authentication_error": 401,
    "invalid_request_error": 400,
    "BadRequestError": 400,
}


def read_answer(status: int, body: bytes, *, secret: str = "") -> Answer:
    """An upstream's error body, read as far as we can.

    Args:
        status: the HTTP status, or 0 for an error inside a stream.
        body: JSON in one of the usual shapes, HTML or plain text.
        secret: this upstream's key, to be taken out of its words.
    """
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        parsed = _TAG.sub(" ", body[: 16 * 1024].decode("utf-8", "replace"))
    error = _error_in(parsed)
    message = error.get("message") or error.get("detail") or ""
    if not isinstance(message, str):
        message = msgspec.json.encode(message).decode()
    words = without_secrets(message, secret)
    names = " ".join(str(error[key]) for key in ("code", "type", "error_type") if error.get(key) is not None)
    return Answer(status or _status_in(error), words, without_secrets(names, secret))


def refusal(answer: Answer, headers: Mapping[str, str], *, label: str, show_words: bool, now: float) -> ProtocolError:
    """The error that our client gets for an upstream's answer.

    When it may try again stands in the message too: Codex reads it there, where a response fails that has begun.

    Args:
        answer: what `read_answer` made of it.
        headers: its HTTP headers; of these only `retry-after` travels on.
        label: what people call the upstream.
        show_words: whether the upstream's own words may be shown to the client.
        now: Unix time in seconds.
    """
    kind = kind_of(answer)
    message = f"Upstream '{label}' answered {answer.status}: {kind.says}"
    seconds = retry_after(headers, answer.words, now) if answer.status in {429, 503, 529} else None
    if kind.passes:
        message += " Try again later." if seconds is None else f" Please try again in {seconds}s."
    if answer.words:
        message += f" It said: {answer.words}" if show_words else " Its words are in the server's log."
    make = NoEndpointError if kind is _WRONG_PATH else ProtocolError
    retry = {} if seconds is None else {"retry-after": str(seconds)}
    return make(kind.code, message, param=kind.param, headers=retry)


def kind_of(answer: Answer) -> _Kind:
    """Which of our errors an answer is; the words decide before the status does."""
    status, words = answer.status, f"{answer.names} {answer.words}"
    if 300 <= status < 400:
        return _REDIRECTED
    if status not in {401, 429} and _OVERFLOW.search(words):
        return _OVERFLOWS
    if status in {400, 422, 500}:
        for pattern, kind in _OF_WORDS:
            if pattern.search(words):
                return kind
    if "model_not_found" in answer.names or (status in {400, 404, 422, 500} and _NO_MODEL.search(words)):
        return _MODEL_UNKNOWN
    if status == 429 and _NO_QUOTA.search(words):
        return _NO_CREDIT
    return _OF_STATUS.get(status) or (_REFUSED if 400 <= status < 500 else _FAILED)


def retry_after(headers: Mapping[str, str], words: str, now: float) -> int | None:
    """In how many whole seconds to try again, up to an hour; None if it is not told or makes no sense.

    Args:
        headers: of these `retry-after`, in seconds or as a date, which counts from the answer's own `date`.
        words: where hosted servers say it too, and inside a stream only there: "Please try again in 1.2s".
        now: Unix time in seconds, for a server that does not tell its own.

    Source: RFC 9110 §10.2.3, §5.6.7.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        seconds = float(value)
    elif (at := _unix_time(value)) is not None:
        sent = _unix_time(headers.get("date", ""))
        seconds = max(0.0, at - (now if sent is None else sent))
    elif match := _TRY_AGAIN_IN.search(words):
        seconds = sum(float(count) * _UNITS[unit] for count, unit in _TIME.findall(match[1].lower()))
    else:
        return None
    return min(math.ceil(seconds), RETRY_AFTER_SECONDS_MAX)


def _unix_time(date: str) -> float | None:
    """An HTTP date as Unix time."""
    try:
        parsed = parsedate_to_datetime(date)
        # RFC 9110 §5.6.7 knows one zone only; a date without it would be read as the machine's.
        return (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError, IndexError, TypeError):
        return None


def without_secrets(text: str, secret: str) -> str:
    """Text of a foreign server made fit to show and to log: keys and control characters out, bounded."""
    text = text[: 8 * WORDS_CHARS_MAX]
    if secret:
        text = text.replace(secret, "[redacted]")
    text = _KEYS.sub("[redacted]", _CONTROL.sub(" ", text))
    return text.strip()[:WORDS_CHARS_MAX]


def without_echo(words: str, request: bytes) -> str:
    """Words without what they repeat of the request, because they go into a log and the request must not.

    Source: guarantees, "Secrets and zero retention".
    """
    if len(request) > _ECHO_BYTES_MAX:
        return "[left out: the request is too large to compare with]"
    echoed = bytearray(len(words))
    for start in range(0, len(words) - _ECHO_CHARS + 1, _ECHO_STEP):
        piece = words[start : start + _ECHO_CHARS]
        if msgspec.json.encode(piece)[1:-1] in request:
            echoed[start : start + _ECHO_CHARS] = b"\1" * _ECHO_CHARS
    # The ends of an echo lie between two steps: what touches one goes with it, up to the next blank.
    for match in re.finditer(r"\S+", words):
        if any(echoed[match.start() : match.end()]):
            echoed[match.start() : match.end()] = b"\1" * (match.end() - match.start())
    out = "".join("\0" if hidden else char for char, hidden in zip(words, echoed, strict=True))
    return re.sub(r"\0[\0 ]*", "[request] ", out).strip()


def _error_in(parsed: object) -> dict[str, Any]:
    """The object that holds `message`, in any of the shapes that servers use."""
    if isinstance(parsed, list):  # Gemini wraps it
        parsed = next(iter(cast("list[object]", parsed)), None)
    if not isinstance(parsed, dict):
        return {"message": parsed} if parsed else {}
    found = cast("dict[str, Any]", parsed)
    error = found.get("error")
    if isinstance(error, dict):
        return cast("dict[str, Any]", error)
    return {**found, "message": error} if isinstance(error, str) and error else found


def _status_in(error: dict[str, Any]) -> int:
    """The status of an error that came without one: inside a stream it has a number or only a name."""
    for value in (error.get("status_code"), error.get("code"), error.get("type")):
        if isinstance(value, str):
            value = int(value) if value.isascii() and value.isdigit() else _STATUS_OF_NAME.get(value)
        if isinstance(value, int) and 400 <= value <= 599:
            return value
    return 500
