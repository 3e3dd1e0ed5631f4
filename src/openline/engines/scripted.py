"""The embedded engine: deterministic, without a model. For the demo, tests, benchmarks and first steps.

By rule: `scripted-text` answers with text; `scripted-tools-N` calls the first offered
tool until the context holds N calls, then answers. Or it plays a transcript: model
`scripted-play` answers the k-th turn of a conversation with the k-th turn that an engine
answered in the recording, on the same lane.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from openline.config import ConfigError, UpstreamSettings
from openline.engines.engine import EngineRequest, Generation, Model
from openline.protocol.deltas import CallDelta, CallStarted, Delta, Ended, TextDelta, UpstreamEvent, Usage
from openline.protocol.errors import ProtocolError, error_of
from openline.protocol.events import SocketCreate
from openline.protocol.items import Item, wrong_type
from openline.protocol.transcript import BadTranscript, RecordedTurn, is_about_steering, lane_of, read_lines, turns

_TOOLS_MODEL: Final = re.compile(r"scripted-tools-([0-9]{1,4})\Z")
_PLAY_MODEL: Final = "scripted-play"
_MODELS: Final = ("scripted-text", "scripted-tools-3", "scripted-tools-20")
# What a client says, as against what a model does: a run of the former begins a turn. So does the output of a hosted
# tool, which looks like a client's.
_CLIENT_ROLES: Final = frozenset({"user", "system", "developer"})
_CLIENT_ITEMS: Final = frozenset(
    {"mcp_approval_response", "compaction_trigger", "additional_tools", "configuration_update"}
)
_BYTES_PER_TOKEN: Final = 4  # a rule of thumb, so that usage grows with the context as a model's would
# What engines refuse with. Any other recorded refusal was the server's own, which it makes again by itself.
_ENGINE_REFUSALS: Final = frozenset(
    {"upstream_unreachable", "upstream_unauthorized", "upstream_error", "upstream_refused", "upstream_timeout"}
    | {"rate_limit_exceeded", "insufficient_quota", "usage_not_included", "server_is_overloaded"}
    | {"context_length_exceeded", "invalid_prompt", "cyber_policy"}
)
# Why a response ends that its client stops; its engine had more to say.
_CLIENTS_REASONS: Final = frozenset({"cancelled", "steered"})
# Of an example, whatever its schema asks for: items of an array; parts inside each other.
_ITEMS_MAX: Final = 4
_DEPTH_MAX: Final = 32

_Batch = list[Delta] | ProtocolError | None  # None: nothing more comes by itself
_Recorded = dict[tuple[str | None, int], RecordedTurn]  # by lane, and by number in its conversation, from 1


class Seen(msgspec.Struct, frozen=True):
    """What the script needs to know of a context."""

    calls: int = 0
    turns: int = 0
    in_input: bool = False
    bytes: int = 0
    last_output: str = ""


class _Head(msgspec.Struct):
    role: str | None = None
    output: Any = None


_head = msgspec.json.Decoder(_Head)


class SeenProjection:
    """Folds a context into `Seen`."""

    key = "scripted"

    def start(self) -> Seen:
        """Nothing yet."""
        return Seen()

    def extend(self, state: Seen, items: Sequence[Item]) -> Seen:
        """Count calls and turns; keep the last tool output, for the answer to quote."""
        calls, count, in_input = state.calls, state.turns, state.in_input
        size, last_output = state.bytes, state.last_output
        for item in items:
            size += len(item.raw)
            head = _head.decode(item.raw)
            is_clients = head.role in _CLIENT_ROLES or item.type in _CLIENT_ITEMS or item.type.endswith("_output")
            calls += item.type in {"function_call", "custom_tool_call"}
            count += is_clients and not in_input
            in_input = is_clients
            if item.type.endswith("_call_output"):
                last_output = head.output if isinstance(head.output, str) else ""
        return Seen(calls, count, in_input, size, last_output)


class ScriptedEngine:
    """Answers by rule or out of a transcript.

    Args:
        settings: `url` is a transcript's path or empty; the two delays are its own.

    Raises:
        ConfigError: the transcript cannot be read.
    """

    def __init__(self, settings: UpstreamSettings) -> None:
        self.name = settings.label
        self._settings = settings
        self._recorded = _read_transcript(settings.url) if settings.url else {}

    def __repr__(self) -> str:
        return f"<ScriptedEngine {self.name} recorded={len(self._recorded)}>"

    def prepare(self, request: EngineRequest) -> Generation:
        """Choose what to play by the model's name.

        Raises:
            ProtocolError: no script has that name, or its transcript has no such turn.
        """
        seen = request.context.project(SeenProjection())
        if request.model == _PLAY_MODEL and self._recorded:
            return _Script(self._recorded_turn(request, seen), self._settings)
        if request.model == "scripted-text":
            batches = _say(_greeting(seen))
        elif match := _TOOLS_MODEL.match(request.model):
            batches = _use_tools(request, seen, int(match[1]))
        else:
            message = f"The requested model '{request.model}' does not exist: expected {', '.join(_MODELS)}."
            raise ProtocolError("model_not_found", message, param="model")
        usage = Usage(input_tokens=_tokens(seen), output_tokens=len(batches))
        return _Script([*batches, [usage, Ended()]], self._settings)

    async def count_tokens(self, request: EngineRequest) -> int:
        """By the rule of thumb that its usage goes by.

        Raises:
            ProtocolError: as `prepare`.
        """
        self.prepare(request)
        return _tokens(request.context.project(SeenProjection()))

    async def models(self) -> Sequence[Model]:
        """The scripts' names."""
        names = (*_MODELS, _PLAY_MODEL) if self._recorded else _MODELS
        return [Model(name, owned_by=self.name) for name in names]

    async def close(self) -> None:
        """Nothing is held."""

    def _recorded_turn(self, request: EngineRequest, seen: Seen) -> list[_Batch]:
        lane = request.create.stream_id if isinstance(request.create, SocketCreate) else None
        recorded = self._recorded.get((lane, seen.turns))
        if recorded is None:
            count = sum(of_lane == lane for of_lane, _ in self._recorded)
            where = "" if lane is None else f" on lane '{lane}'"
            message = f"The transcript has {count} turns{where}: this is turn {seen.turns}."
            raise ProtocolError("invalid_request", message, param="input")
        return _played([line.frame for line in recorded.events])


def _played(frames: Sequence[dict[str, Any]]) -> list[_Batch]:
    """What the engine said of a recorded turn; the rest the server says again by itself."""
    *said, last = (frame for frame in frames if not is_about_steering(frame))
    if last["type"] != "response.completed":
        while said and _closes_what_was_cut(said[-1]):
            said.pop()
    batches: list[_Batch] = [[UpstreamEvent(frame)] for frame in said]
    end = _end(last)
    if said and isinstance(end, list) and any(map(is_about_steering, frames)):
        # In one read with the end of its last item, else it would be interrupted between the two.
        batches[-1] = [UpstreamEvent(said[-1]), *end]
        return batches
    return [*batches, end]


def _closes_what_was_cut(frame: dict[str, Any]) -> bool:
    is_whole = "item" in frame and frame["item"].get("status", "completed") == "completed"
    return frame["type"].endswith(".done") and not is_whole


def _end(frame: dict[str, Any]) -> _Batch:
    """A recorded end: a failure happens again, and what the client has ended goes on until it does so again."""
    if frame["type"] == "error":
        recorded: dict[str, Any] = frame["error"]
        error = error_of(recorded)
        error.param, error.headers = recorded.get("param"), dict(recorded.get("headers") or {})
        return error
    response: dict[str, Any] = frame["response"]
    if frame["type"] == "response.failed":
        return error_of(response.get("error") or {})
    details: dict[str, Any] = response.get("incomplete_details") or {}
    return None if details.get("reason") in _CLIENTS_REASONS else [UpstreamEvent(frame)]


def _was_engines(turn: RecordedTurn) -> bool:
    """Whether an engine answered this turn: not a warm-up, and not a refusal of the server's own."""
    options: dict[str, Any] = turn.create.get("prompt_cache_options") or {}
    if turn.create.get("generate") is False or options.get("prewarm") is True:
        return False
    last = turn.events[-1].frame
    error: dict[str, Any] = last.get("error") or {}
    return last["type"] != "error" or error.get("code") in _ENGINE_REFUSALS


class _Script:
    """Batches to play, in order, with the upstream's delays; an error among them ends it, and so does silence."""

    dropped_tools: Sequence[str] = ()
    prefills = False

    def __init__(self, batches: Sequence[_Batch], settings: UpstreamSettings) -> None:
        self._batches = batches
        self._settings = settings

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        """Accept, wait as long as a model would, play."""
        refused = self._batches[0]
        if isinstance(refused, ProtocolError):
            raise refused
        yield []
        await asyncio.sleep(self._settings.first_delta_seconds)
        for batch in self._batches:
            if batch is None:
                await asyncio.sleep(self._settings.idle_seconds_max)
                raise ProtocolError("upstream_timeout", "The client ended this response when it was recorded.")
            if isinstance(batch, ProtocolError):
                raise batch
            yield batch
            await asyncio.sleep(self._settings.delta_seconds)  # even none lets other lanes go on


def _read_transcript(path: str) -> _Recorded:
    try:
        return _numbered(turns(read_lines(Path(path).read_text(encoding="utf-8"))))
    except OSError as error:
        raise ConfigError(f"--upstream scripted:{path}: {error.strerror}.") from None
    except (BadTranscript, UnicodeDecodeError) as error:
        raise ConfigError(f"--upstream scripted:{path}: {error}") from None


def _numbered(recorded: Iterable[RecordedTurn]) -> _Recorded:
    """The turns that an engine answered, by their lane and their number in the conversation.

    A fork goes on counting from the turn that it continues. What continues nothing brings its whole conversation
    along, so it goes on from its lane's latest turn.
    """
    numbered: _Recorded = {}
    of_response: dict[Any, int] = {}
    of_lane: dict[str | None, int] = {}
    for turn in recorded:
        lane = lane_of(turn.create)
        number = of_response.get(turn.create.get("previous_response_id"), of_lane.get(lane, 0))
        if _was_engines(turn):
            number += 1
            numbered.setdefault((lane, number), turn)
        of_lane[lane] = number
        response: dict[str, Any] = turn.events[-1].frame.get("response") or {}
        if "id" in response:
            of_response[response["id"]] = number
    return numbered


def _tokens(seen: Seen) -> int:
    return seen.bytes // _BYTES_PER_TOKEN


def _greeting(seen: Seen) -> str:
    return f"This is the scripted engine, in turn {seen.turns} of the conversation. It repeats no model's words."


def _say(text: str) -> list[list[Delta]]:
    words = re.findall(r"\S+\s*", text)
    return [[TextDelta(word)] for word in words]


def _use_tools(request: EngineRequest, seen: Seen, calls_wanted: int) -> list[list[Delta]]:
    offered = [_read_tool(raw, index) for index, raw in enumerate(request.create.tools or ())]
    tools = [tool for tool in offered if tool.type in {"function", "custom"}]
    if not tools or request.create.tool_choice == "none" or seen.calls >= calls_wanted:
        quoted = f" The last tool said: {seen.last_output[:200]}" if seen.last_output else ""
        return _say(f"Done after {seen.calls} tool calls.{quoted}")
    tool = tools[seen.calls % len(tools)]
    call_id = f"call_{seen.calls + 1:04d}"
    if tool.type == "custom":
        return [[CallStarted("custom_tool_call", call_id, tool.name)], [CallDelta(f"call {seen.calls + 1}")]]
    arguments = msgspec.json.encode(example({"type": "object", **_dict(tool.parameters)}, seen.calls + 1)).decode()
    half = len(arguments) // 2
    return [
        [CallStarted("function_call", call_id, tool.name)],
        [CallDelta(arguments[:half])],
        [CallDelta(arguments[half:])],
    ]


class _Tool(msgspec.Struct):
    type: str
    name: str = ""
    parameters: Any = None


_tool = msgspec.json.Decoder(_Tool)


def _read_tool(raw: msgspec.Raw, index: int) -> _Tool:
    try:
        return _tool.decode(raw)
    except msgspec.ValidationError as error:
        raise wrong_type(error, under=f"tools[{index}]") from None


def example(schema: Any, number: int, depth: int = 0) -> Any:
    """A value that a JSON schema accepts, the same for the same number.

    A schema comes unchecked from a client: a part of it that cannot be read counts as a
    string, and arrays stay short.

    Args:
        schema: a tool's `parameters`, or a part of them.
        number: which call it is; it shows in strings and integers, so that calls differ.
        depth: how far inside the parameters this part stands.
    """
    found = _dict(schema)
    if "const" in found:
        return found["const"]
    if choices := _list(found.get("enum")):
        return choices[number % len(choices)]
    if variants := _list(found.get("anyOf")) or _list(found.get("oneOf")):
        return example(variants[0], number, depth + 1) if depth < _DEPTH_MAX else None
    kind = found.get("type", "object" if "properties" in found else "string")
    make = _EXAMPLES.get(str(next(iter(_list(kind)), kind)), _example_string)
    return make(found, number, depth) if depth < _DEPTH_MAX else None


def _example_object(schema: Mapping[str, Any], number: int, depth: int) -> Any:
    properties = _dict(schema.get("properties"))
    names = _list(schema.get("required")) or properties
    return {name: example(part, number, depth + 1) for name, part in properties.items() if name in names}


def _example_array(schema: Mapping[str, Any], number: int, depth: int) -> Any:
    least = schema.get("minItems", 1)
    # Arrays in arrays multiply, so those further inside have one item.
    most = _ITEMS_MAX if depth < _ITEMS_MAX else 1
    count = min(least, most) if isinstance(least, int) else 1
    return [example(schema.get("items"), number + index, depth + 1) for index in range(count)]


def _example_number(schema: Mapping[str, Any], number: int, _: int) -> Any:
    least, most = schema.get("minimum"), schema.get("maximum")
    value = max(number, least) if isinstance(least, int | float) else number
    return min(value, most) if isinstance(most, int | float) else value


def _example_string(_: Mapping[str, Any], number: int, __: int) -> Any:
    return f"item-{number:02d}"


def _example_boolean(_: Mapping[str, Any], number: int, __: int) -> Any:
    return number % 2 == 1


def _example_null(*_: object) -> Any:
    return None


_EXAMPLES: Final[Mapping[str, Callable[[Mapping[str, Any], int, int], Any]]] = {
    "object": _example_object,
    "array": _example_array,
    "integer": _example_number,
    "number": _example_number,
    "boolean": _example_boolean,
    "null": _example_null,
}


def _dict(value: Any) -> dict[str, Any]:
    """An object; empty if it is none."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    """An array; empty if it is none."""
    return cast("list[Any]", value) if isinstance(value, list) else []
