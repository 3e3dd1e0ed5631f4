"""The golden transcripts, played against a running server by each kind of client."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from pathlib import Path
from typing import Any

from openline.config import UpstreamSettings
from openline.engines.engine import Engine, EngineRequest, Generation
from openline.engines.scripted import ScriptedEngine
from openline.protocol.deltas import Delta, UpstreamEvent
from openline.protocol.errors import ERRORS
from openline.protocol.states import TERMINAL_EVENTS
from openline.protocol.transcript import RECONNECT, Line, RecordedTurn, lane_of, read_lines, turns, write_line
from server.running import ENDS, WAIT_SECONDS_MAX, Running, Socket

FOLDER = Path(__file__).parent.parent / "transcripts"
PATHS = sorted(FOLDER.glob("*.jsonl"))

# Ids of the server's making, as `runner.new_id` makes them; call ids are the upstream's and stay. And what it sealed.
_OURS = re.compile(r"\b([a-z]+)_[0-9a-f]{48}(?:i?[0-9a-f]{4})?\b|\boln1\.[\w-]+=*")
KEEPALIVE_SECONDS = 1.0  # where a transcript has one: short for a test, and longer than any pause but the one meant
_TIMES = frozenset({"created_at", "completed_at"})

Frame = dict[str, Any]
Compared = list[tuple[Any, Any]]  # what is expected, what has come


class Placeholders:
    """Stands `resp_1`, `msg_2`, `sealed_1` and 0 for ids, sealed texts and times, so that two runs can be compared.

    What a named lane is the first to tell is counted by itself, and has the name in it: `resp_a1` is the first
    response of lane `a`, however the lanes were mixed.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._counts: Counter[str] = Counter()

    def hide(self, frame: Frame) -> Frame:
        """The same frame with placeholders."""
        lane = lane_of(frame) or ""
        return _mapped(frame, lambda text: _OURS.sub(lambda match: self._name(match, lane), text))

    def reveal(self, frame: Frame) -> Frame:
        """A recorded frame with the ids that this run's server gave."""
        ids = {name: made for made, name in self._names.items()}
        return _mapped(frame, lambda text: ids.get(text, text))

    def _name(self, match: re.Match[str], lane: str) -> str:
        made, prefix = match[0], f"{match[1] or 'sealed'}_{lane}"
        if made not in self._names:
            self._counts[prefix] += 1
            self._names[made] = f"{prefix}{self._counts[prefix]}"
        return self._names[made]


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The same JSON with changed strings, and with 0 for times."""
    match value:
        case dict():
            return {
                key: 0 if key in _TIMES and part is not None else _mapped(part, change) for key, part in value.items()
            }
        case list():
            return [_mapped(part, change) for part in value]
        case str():
            return change(value)
    return value


# --- The files ---------------------------------------------------------------------------------------


def read_transcript(path: Path) -> list[Line]:
    return read_lines(path.read_text(encoding="utf-8"))


def read(path: Path) -> list[RecordedTurn]:
    return list(turns(read_transcript(path)))


def server_frames(path: Path) -> list[Frame]:
    """Everything that the server sends in this transcript."""
    return [line.frame for line in read_transcript(path) if line.dir == "<"]


def needs_a_socket(path: Path) -> bool:
    """Whether HTTP cannot show it: it has lanes, keys, what only a connection remembers, or needs its order kept."""
    lines = read_transcript(path)
    asked = [line.frame for line in lines if line.dir == ">"]
    of_sockets = (each.get("store") is False or lane_of(each) or each.get("idempotency_key") for each in asked)
    return any(of_sockets) or needs_order(lines)


def needs_order(lines: Sequence[Line]) -> bool:
    """Whether the engine has to wait while a turn runs: for what the client says, or the server by itself."""
    running = 0
    for line in lines:
        if line.dir == ">" and running:
            return True
        running += (line.dir == ">" and line.frame["type"] != RECONNECT) - (line.frame["type"] in ENDS)
    return has_keepalives(lines)


def has_keepalives(lines: Iterable[Line]) -> bool:
    """Whether there is an `in_progress` that opens nothing: it says that a silent turn still runs."""
    kinds = Counter(line.frame["type"] for line in lines)
    return kinds["response.in_progress"] > kinds["response.created"]


# --- Playing one -----------------------------------------------------------------------------------------


class Playing:
    """A transcript that is being played, and how far it has come.

    A line's time comes when everything that stands before it in the file has passed. Then the client says it, or the
    engine, where it has to wait for the client. What has passed is counted by direction, lane and type: whatever else
    may be wrong with it is not waited for, but compared.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = read_transcript(path)
        self.keeps_order = needs_order(self.lines)
        self.limits = {"keepalive_seconds": KEEPALIVE_SECONDS} if has_keepalives(self.lines) else {}
        self._passed: Counter[object] = Counter()
        self._moved = asyncio.Condition()

    def engine(self) -> Engine:
        """Who answers as recorded."""
        settings = UpstreamSettings(kind="scripted", url=str(self.path))
        return _PatientEngine(settings, self) if self.keeps_order else ScriptedEngine(settings)

    def is_time_for(self, place: int) -> bool:
        return Counter(map(_kind, self.lines[:place])) <= self._passed

    async def time_for(self, frame: Frame) -> None:
        """Wait for the time of the line that has this frame."""
        place = [line.frame for line in self.lines].index(frame)
        async with self._moved:
            await self._moved.wait_for(lambda: self.is_time_for(place))

    async def has_passed(self, line: Line) -> None:
        async with self._moved:
            self._passed[_kind(line)] += 1
            self._moved.notify_all()


def _kind(line: Line) -> object:
    return line.dir, lane_of(line.frame), line.frame["type"]


class _PatientEngine(ScriptedEngine):
    """The scripted engine, which accepts at once but says an event at its time only; a failure waits for nothing."""

    def __init__(self, settings: UpstreamSettings, playing: Playing) -> None:
        super().__init__(settings)
        self._playing = playing

    def prepare(self, request: EngineRequest) -> Generation:
        return _Patient(super().prepare(request), self._playing)


class _Patient:
    dropped_tools = ()
    prefills = False

    def __init__(self, generation: Generation, playing: Playing) -> None:
        self._generation = generation
        self._playing = playing

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        async with aclosing(self._generation.stream()) as batches:
            async for batch in batches:
                if batch and isinstance(batch[0], UpstreamEvent):
                    await self._playing.time_for(batch[0].event)
                yield batch


async def over_websocket(server: Running, playing: Playing) -> Compared:
    """Each lane's messages, and how many responses ran at once; how the lanes are mixed is free."""
    expected = [line for line in playing.lines if line.dir == "<"]
    got = [line for line in await _play(server, playing) if line.dir == "<"]
    lanes = {lane_of(line.frame): None for line in (*expected, *got)}
    return [
        *((_on_lane(lane, expected), _on_lane(lane, got)) for lane in lanes),
        (_at_once(expected), _at_once(got)),
    ]


async def _play(server: Running, playing: Playing) -> list[Line]:
    """Everything that passes, in the order in which it does; it ends early where something does not come."""
    hidden, passed = Placeholders(), list[Line]()

    async def passes(line: Line) -> None:
        passed.append(line)
        await playing.has_passed(line)

    async def receive_what_stands_before(place: int) -> None:
        while not playing.is_time_for(place):
            await passes(Line(0.0, "<", hidden.hide(await socket.receive())))

    with suppress(TimeoutError):
        async with AsyncExitStack() as stack:
            socket = await stack.enter_async_context(server.connect(max_queue=None))
            for place, line in enumerate(playing.lines):
                if line.dir == "<":
                    continue
                await receive_what_stands_before(place)
                if line.frame["type"] == RECONNECT:
                    await stack.aclose()
                    socket = await stack.enter_async_context(server.connect(max_queue=None))
                else:
                    await socket.send(**hidden.reveal(line.frame))
                if playing.keeps_order:
                    await _is_read(socket)
                await passes(line)
            await receive_what_stands_before(len(playing.lines))
    return passed


async def _is_read(socket: Socket) -> None:
    """Wait until the server has acted on what was sent: a pong overtakes no message, nor the second one its effect."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        for _ in range(2):
            await (await socket.connection.ping())


def _on_lane(lane: str | None, lines: Iterable[Line]) -> list[Frame]:
    return [line.frame for line in lines if lane_of(line.frame) == lane]


def _at_once(lines: Iterable[Line]) -> int:
    """How many responses ran at the same time, at most."""
    running = most = 0
    for line in lines:
        running += line.frame["type"] == "response.created"
        running -= line.frame["type"] in TERMINAL_EVENTS
        most = max(most, running)
    return most


async def over_sse(server: Running, playing: Playing) -> Compared:
    """Each turn's events, or its refusal."""
    return await _over_http(server, playing, stream=True)


async def over_json(server: Running, playing: Playing) -> Compared:
    """Each turn's final response, or its refusal."""
    return await _over_http(server, playing, stream=False)


async def _over_http(server: Running, playing: Playing, *, stream: bool) -> Compared:
    hidden = Placeholders()
    compared: Compared = []
    for turn in turns(playing.lines):
        create = {key: value for key, value in hidden.reveal(turn.create).items() if key != "type"}
        answer = await server.request("POST", "/v1/responses", json={**create, "stream": stream})
        events = [line.frame for line in turn.events]
        last = events[-1]
        if last["type"] == "error" or (last["type"] == "response.failed" and not stream):
            headers = {name: answer.headers.get(name) for name in last.get("headers", {})}
            compared.append((_refusal(last), (answer.status, hidden.hide(answer.json), headers)))
        elif stream:
            compared.append((events, [hidden.hide(event) for event in answer.events]))
        else:
            compared.append((last["response"], hidden.hide(answer.json)))
    return compared


def _refusal(last: Frame) -> tuple[int, Frame, dict[str, str]]:
    """The HTTP answer that says what this last event says: status, envelope, headers."""
    if last["type"] == "error":
        error = {key: value for key, value in last["error"].items() if key != "headers"}
        return last["status"], {"error": error}, last.get("headers", {})
    failed = last["response"]["error"]
    kind = ERRORS[failed["code"]]
    error = {"message": failed["message"], "type": kind.type, "param": None, "code": kind.wire_code}
    return kind.status, {"error": error}, {}


Play = Callable[[Running, Playing], Awaitable[Compared]]
TRANSPORTS: dict[str, Play] = {"websocket": over_websocket, "sse": over_sse, "json": over_json}


async def record(server: Running, playing: Playing) -> None:
    """Write the transcript anew, with what the server answers to its creates now."""
    passed = await _play(server, playing)
    assert playing.is_time_for(len(playing.lines)), f"of {playing.path.name} came only {passed}"
    text = "".join(f"{write_line(line)}\n" for line in passed)
    playing.path.write_text(text, encoding="utf-8")
