"""What an upstream can do, found out by trying: the checks of `openline doctor`, and those of `serve` at its start.

`look` asks what the upstream tells of itself and generates nothing. `examine` goes on with
a handful of short turns through the same engine that serves clients, so what it finds is what
an agent will meet.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any, Final, Literal, cast

import msgspec

from openline.config import ConfigError, ServerKind, UpstreamSettings
from openline.engines.chat import ChatEngine
from openline.engines.engine import Engine, EngineRequest, Model
from openline.engines.opening import load_model, open_engine
from openline.engines.profiles import KINDS
from openline.engines.scripted import ScriptedEngine
from openline.engines.tiny import TOOLS_MODEL, TinyEngine
from openline.protocol.deltas import (
    CallDelta,
    CallStarted,
    Delta,
    Ended,
    ReasoningDelta,
    TextDelta,
    UpstreamEvent,
    Usage,
)
from openline.protocol.errors import ProtocolError
from openline.protocol.events import read_http_create, read_input
from openline.state.context import EMPTY

_TURN_SECONDS_MAX: Final = 90.0  # a model that is still to be loaded takes its time
_AGENT_TOKENS: Final = 32_768  # an agent's instructions and tools take 10 000 of them before it has done anything
_TEXT_TOKENS: Final = 48
_CALL_TOKENS: Final = 400  # models that think do so before they call
_CACHE_TOKENS: Final = 16  # OpenAI's Responses API takes no fewer
_PREFIX_LINES: Final = 150  # about 2000 tokens: long enough to see whether a second reading is faster
_FASTER: Final = 0.6
_MARKUP: Final = re.compile(r"<tool_call|<\|tool|\[TOOL_CALLS\]|<function=|\"arguments\"\s*:")
_THINKING: Final = re.compile(r"<think>|<\|channel\|>", re.IGNORECASE)
_TOOL: Final = {
    "type": "function",
    "name": "get_weather",
    "description": "Returns the weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}

# What to change, by the kind of server; where the kind is not known, all of it.
_TOOL_PARSERS: Final = {
    "vllm": "Start vLLM with --enable-auto-tool-choice and --tool-call-parser NAME.",
    "sglang": "Start SGLang with --tool-call-parser NAME.",
    "llama.cpp": "Start llama-server with --jinja, and a --chat-template-file that has tools.",
    "ollama": "Use a model of which `ollama show` lists tools.",
}
_REASONING_PARSERS: Final = {
    "vllm": "Start vLLM with --reasoning-parser NAME.",
    "sglang": "Start SGLang with --reasoning-parser NAME.",
    "llama.cpp": "Start llama-server with --reasoning-format auto.",
}
_PREFIX_CACHES: Final = {
    "vllm": "vLLM has it with --enable-prefix-caching, and shows it with --enable-prompt-tokens-details.",
    "sglang": "SGLang has it without --disable-radix-cache, and shows it with --enable-cache-report.",
    "llama.cpp": "llama-server has it unless --no-cache-prompt is set.",
}
_OWN_WINDOW: Final = "Set `context_tokens` in [[upstreams]]; above what the model was trained with it does not go."
_WINDOWS: Final = {
    "vllm": "vLLM: --max-model-len.",
    "sglang": "SGLang: --context-length.",
    "llama.cpp": "llama-server: --ctx-size; its slots (--parallel) share it.",
    "ollama": "Ollama: OLLAMA_CONTEXT_LENGTH=64000 in the environment of `ollama serve`.",
    "lmstudio": "LM Studio: the context length with which the model is loaded.",
}

Level = Literal["ok", "warn", "bad"]


class Finding(msgspec.Struct, frozen=True):
    """One thing that was found.

    Attributes:
        check: what was tried.
        level: `bad` breaks turns, `warn` is worth knowing.
        says: what was found.
        remedy: what to do about it; empty where there is nothing to do.
    """

    check: str
    level: Level
    says: str
    remedy: str = ""


class Report(msgspec.Struct):
    """What was found of one upstream.

    Attributes:
        runs_here: it is a model in this process, so that there is no server to be started in another way.
        tried: the model that was tried; empty if none was.
    """

    upstream: str
    url: str
    kind: ServerKind = "generic"
    runs_here: bool = False
    tried: str = ""
    models: list[Model] = []
    findings: list[Finding] = []

    def add(self, check: str, level: Level, says: str, remedy: str = "") -> None:
        """Write down one more finding."""
        self.findings = [*self.findings, Finding(check, level, says, remedy)]

    def remedy(self, remedies: Mapping[str, str]) -> str:
        """Of these the one for this kind of server, or all where it is not known; none for a model in this process."""
        if self.runs_here:
            return ""
        return " ".join(remedies.values()) if self.kind == "generic" else remedies.get(self.kind, "")

    @property
    def is_good(self) -> bool:
        """Whether nothing was found that breaks turns."""
        return all(finding.level != "bad" for finding in self.findings)


async def look(settings: UpstreamSettings, model: str | None = None) -> Report:
    """Ask what it tells of itself; nothing is generated."""
    return await _with_engine(settings, model, examined=False)


async def examine(settings: UpstreamSettings, model: str | None = None) -> Report:
    """Ask it, and try what agents need of it, with one of its models.

    Args:
        settings: the upstream's.
        model: which model to try; if None, the first that it lists, and of the tiny ones that which calls any tool.
    """
    return await _with_engine(settings, model, examined=True)


async def _with_engine(settings: UpstreamSettings, model_id: str | None, *, examined: bool) -> Report:
    runs_here = settings.kind == "gguf"
    report = Report(settings.label, settings.url, "llama.cpp" if runs_here else "generic", runs_here=runs_here)
    engine = open_engine(settings, show_detail=True)
    try:
        model = await _reach(engine, report, model_id)
        if settings.kind == "scripted":
            report.add("engine", "ok", "It follows a script and has no model: there is nothing to try.")
        elif model is not None and examined and _loads(engine, report):
            report.tried = model.id
            await _examine(engine, model, report)
    finally:
        await engine.close()
    return report


# What it tells.


async def _reach(engine: Engine, report: Report, model_id: str | None) -> Model | None:
    """Its models and its kind; the model to try, if there is one."""
    try:
        report.models = list(await engine.models())
    except ProtocolError as error:
        report.add("reachable", "bad", error.message, _remedy_of(error))
        return None
    report.add("reachable", "ok", "Its file is there." if report.runs_here else "It answers.")
    names = ", ".join(model.id for model in report.models[:5]) + (", …" if len(report.models) > 5 else "")
    if not report.models:
        report.add("models", "warn", "It lists none.", "Load or pull a model, or name one with --model.")
    else:
        report.add("models", "ok", names)
    if isinstance(engine, ChatEngine):
        await _tell_kind(engine, report)
    if model_id is None and isinstance(engine, TinyEngine):
        model_id = TOOLS_MODEL  # the first one calls nothing but a shell
    if model_id is None and not report.models:
        return None
    model = next((model for model in report.models if model_id in {None, model.id}), Model(model_id or ""))
    if not isinstance(engine, ScriptedEngine):
        _tell_window(model, report)
    return model


async def _tell_kind(engine: ChatEngine, report: Report) -> None:
    about = await engine.about()
    profile = KINDS[about.kind]
    report.kind = about.kind
    if about.kind == "generic":
        remedy = (
            "Set `profile` in [[upstreams]] if it is one of: "
            + ", ".join(kind for kind in KINDS if kind != "generic")
            + "."
        )
        report.add("kind", "warn", "Not recognised; it is treated as a plain Chat Completions server.", remedy)
    else:
        report.add("kind", "ok", f"{profile.title} {about.version}".strip())


def _tell_window(model: Model, report: Report) -> None:
    window = model.context_window
    if window is None and report.kind == "ollama":
        remedy = f"It tells once the model is loaded: `ollama ps`. By default it is 4096 tokens. {_WINDOWS['ollama']}"
        report.add("context window", "warn", f"'{model.id}' is not loaded, so it is not known.", remedy)
    elif window is None:
        remedy = "Clients guess; tell them what you know, Codex by `model_context_window` in its config.toml."
        report.add("context window", "warn", f"The upstream does not tell that of '{model.id}'.", remedy)
    elif window < _AGENT_TOKENS:
        remedy = _OWN_WINDOW if report.runs_here else report.remedy(_WINDOWS)
        report.add("context window", "warn", f"{window} tokens: short for an agent.", remedy)
    else:
        report.add("context window", "ok", f"{window} tokens")


def _remedy_of(error: ProtocolError) -> str:
    if error.code == "upstream_unreachable":
        return (
            "Start it, or correct its URL. A server in a container must listen on 0.0.0.0 and have its port published."
        )
    if error.code == "upstream_unauthorized":
        return "Put its key into OPENLINE_UPSTREAM_API_KEY, or into the variable that `api_key_env` names."
    return ""


# What it does.


def _loads(engine: Engine, report: Report) -> bool:
    """Load a model that runs in this process first, so that this is not taken for its first turn's time."""
    try:
        load_model(engine)
    except ConfigError as error:
        report.add("loading", "bad", str(error))
        return False
    return True


class Tried(msgspec.Struct):
    """What one turn brought."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = []
    batches: int = 0
    call_pieces: int = 0
    first_seconds: float = 0.0
    seconds: float = 0.0
    usage: Usage | None = None
    ended: str | None = None
    error: ProtocolError | None = None


async def _examine(engine: Engine, model: Model, report: Report) -> None:
    spoken = await _try(engine, model, "Count from 1 to 12 in digits, with blanks between.", _TEXT_TOKENS)
    if spoken.error is not None:
        report.add("a turn", "bad", spoken.error.message, _remedy_of(spoken.error))
        return
    _tell_streaming(spoken, report)
    await _tell_calls(engine, model, spoken, report)
    await _tell_cache(engine, model, report)


def _tell_streaming(tried: Tried, report: Report) -> None:
    says = f"first piece after {_time(tried.first_seconds)}, {tried.batches} pieces in {_time(tried.seconds)}"
    if tried.batches == 0:
        report.add("streaming", "bad", "The model said nothing.", "Is it a chat model? Try another with --model.")
    elif tried.batches <= 2:
        report.add("streaming", "warn", "The answer came at once.", "Is there a proxy between that holds it back?")
    else:
        report.add("streaming", "ok", says)


async def _tell_calls(engine: Engine, model: Model, spoken: Tried, report: Report) -> None:
    one = await _try(engine, model, "What is the weather in Paris? Use the tool.", _CALL_TOKENS, tools=[_TOOL])
    _tell_reasoning([spoken, one], report)
    if not _tell_call(one, report):
        return
    request = "What is the weather in Paris, and in Rome? Call the tool for both at once, in the same turn."
    two = await _try(engine, model, request, _CALL_TOKENS, tools=[_TOOL], parallel_tool_calls=True)
    if two.error is not None:
        report.add("parallel calls", "bad", two.error.message)
    elif len(two.calls) > 1:
        report.add("parallel calls", "ok", f"{len(two.calls)} calls in one turn")
    else:
        report.add("parallel calls", "warn", "It makes one call a turn.", "Agents work all the same, in more turns.")


def _tell_call(tried: Tried, report: Report) -> bool:
    parser = report.remedy(_TOOL_PARSERS)
    if tried.error is not None:
        report.add("tool call", "bad", tried.error.message)
    elif not tried.calls and _MARKUP.search(tried.text):
        report.add("tool call", "bad", "It came as text: the server does not read this model's calls.", parser)
    elif not tried.calls:
        says = "The model ran out of tokens before it called." if tried.ended else "The model did not call the tool."
        report.add("tool call", "warn", says, f"Try one that is trained for tools. {parser}".strip())
    elif not all(_is_object(arguments) for _, arguments in tried.calls):
        remedy = "Try a larger model, or a better quantization."
        report.add("tool call", "bad", "Its arguments are no JSON object.", remedy)
    else:
        name, arguments = tried.calls[0]
        whole = "its arguments stream" if tried.call_pieces > 1 else "in one piece"
        report.add("tool call", "ok", f"{name}({' '.join(arguments.split())[:40]}), {whole}")
        return True
    return False


def _tell_reasoning(tried: Sequence[Tried], report: Report) -> None:
    if any(_THINKING.search(each.text) for each in tried):
        report.add("reasoning", "warn", "It comes inside the answer's text.", report.remedy(_REASONING_PARSERS))
    elif any(each.reasoning for each in tried):
        report.add("reasoning", "ok", "apart from the answer")
    else:
        report.add("reasoning", "ok", "none came")


async def _tell_cache(engine: Engine, model: Model, report: Report) -> None:
    """Whether a prefix that it has read is read again; new to it the first time, whatever it cached before."""
    lines = (f"{secrets.token_hex(8)} is line {number}." for number in range(_PREFIX_LINES))
    prefix = "Remember these lines.\n" + "\n".join(lines)
    first = await _try(engine, model, "Say yes.", _CACHE_TOKENS, instructions=prefix)
    second = await _try(engine, model, "Say no.", _CACHE_TOKENS, instructions=prefix)
    error = first.error or second.error
    if error is not None:
        level: Level = "warn" if error.code == "context_length_exceeded" else "bad"
        report.add("prefix cache", level, error.message)
        return
    usage = second.usage or Usage()
    times = f"first token after {_time(first.first_seconds)}, then {_time(second.first_seconds)}"
    if usage.cached_tokens:
        report.add("prefix cache", "ok", f"{usage.cached_tokens} of {usage.input_tokens} prompt tokens; {times}")
    elif second.first_seconds < first.first_seconds * _FASTER:
        report.add("prefix cache", "ok", f"by its times: {times}")
    else:
        report.add("prefix cache", "warn", f"No sign of it: {times}.", report.remedy(_PREFIX_CACHES))


# One turn.


async def _try(engine: Engine, model: Model, text: str, tokens_max: int, **fields: Any) -> Tried:
    """Run one turn as a client would; an error is part of what was found."""
    body = msgspec.json.encode({"model": model.id, "input": text, "max_output_tokens": tokens_max, **fields})
    create = read_http_create(body)
    tried = Tried()
    clock = asyncio.get_running_loop().time
    started = clock()
    try:
        async with asyncio.timeout(_TURN_SECONDS_MAX):
            generation = engine.prepare(EngineRequest(create, body, EMPTY.extend(read_input(create)), model.id))
            async with aclosing(generation.stream()) as batches:
                async for batch in batches:
                    told = [_take(tried, delta) for delta in batch]
                    if any(told):
                        tried.batches += 1
                        tried.first_seconds = tried.first_seconds or clock() - started
    except ProtocolError as error:
        tried.error = error
    except TimeoutError:
        tried.error = ProtocolError("upstream_timeout", f"It did not finish in {_TURN_SECONDS_MAX:g} seconds.")
    tried.seconds = clock() - started
    tried.first_seconds = tried.first_seconds or tried.seconds
    return tried


def _take(tried: Tried, delta: Delta) -> bool:
    """Note a delta; whether it is something that the model said."""
    match delta:
        case TextDelta(text):
            tried.text += text
        case ReasoningDelta(text):
            tried.reasoning += text
        case CallStarted(_, _, name):
            tried.calls = [*tried.calls, [name, ""]]
        case CallDelta(text):
            tried.calls[-1][1] += text
            tried.call_pieces += 1
        case Usage():
            tried.usage = delta
            return False
        case Ended(reason):
            tried.ended = reason
            return False
        case UpstreamEvent(event):
            return _take_event(tried, event)
        case _:
            return False
    return True


def _take_event(tried: Tried, event: dict[str, Any]) -> bool:
    """The same, of an upstream that speaks Responses."""
    kind: str = event.get("type", "")
    if kind == "response.output_text.delta":
        tried.text += event["delta"]
    elif kind.startswith("response.reasoning") and kind.endswith(".delta"):
        tried.reasoning += event["delta"]
    elif kind == "response.output_item.added" and event["item"].get("type") == "function_call":
        tried.calls = [*tried.calls, [event["item"].get("name", ""), ""]]
    elif kind == "response.function_call_arguments.delta" and tried.calls:
        tried.calls[-1][1] += event["delta"]
        tried.call_pieces += 1
    else:
        _take_end(tried, cast("dict[str, Any]", event.get("response") or {}))
        return False
    return True


def _take_end(tried: Tried, response: dict[str, Any]) -> None:
    details = cast("dict[str, Any]", response.get("incomplete_details") or {})
    tried.ended = details.get("reason") or tried.ended
    counted = cast("dict[str, Any]", response.get("usage") or {})
    if counted:
        cached = cast("dict[str, Any]", counted.get("input_tokens_details") or {})
        tried.usage = Usage(counted.get("input_tokens", 0), cached.get("cached_tokens", 0))


def _is_object(arguments: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(arguments), dict)
    except msgspec.DecodeError:
        return False


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
