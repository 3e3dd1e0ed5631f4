"""The golden transcripts, played against a running server by each kind of client."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from openline.protocol.errors import ERRORS
from openline.protocol.transcript import Line, RecordedTurn, read_lines, turns, write_line
from server.running import Running

FOLDER = Path(__file__).parent.parent / "transcripts"
PATHS = sorted(FOLDER.glob("*.jsonl"))

# Ids of the server's making, as `runner.new_id` makes them; call ids are the upstream's and stay.
_OUR_ID = re.compile(r"\b([a-z]+)_[0-9a-f]{48}\b")
_TIMES = frozenset({"created_at", "completed_at"})

Frame = dict[str, Any]


class Placeholders:
    """Stands `resp_1`, `msg_2` and 0 for ids and times, so that two runs can be compared."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._counts: dict[str, int] = {}

    def hide(self, value: Any) -> Any:
        """The same JSON with placeholders."""
        match value:
            case dict():
                return {
                    key: 0 if key in _TIMES and part is not None else self.hide(part) for key, part in value.items()
                }
            case list():
                return [self.hide(part) for part in value]
            case str():
                return _OUR_ID.sub(self._hide_id, value)
        return value

    def reveal(self, create: Frame) -> Frame:
        """A recorded create with the id that this run's server gave."""
        ids = {name: made for made, name in self._names.items()}
        parent = create.get("previous_response_id")
        return {**create, "previous_response_id": ids.get(parent, parent)} if parent else create

    def _hide_id(self, match: re.Match[str]) -> str:
        made, prefix = match[0], match[1]
        if made not in self._names:
            self._counts[prefix] = self._counts.get(prefix, 0) + 1
            self._names[made] = f"{prefix}_{self._counts[prefix]}"
        return self._names[made]


def read(path: Path) -> list[RecordedTurn]:
    return list(turns(read_lines(path.read_text(encoding="utf-8"))))


def server_frames(path: Path) -> list[Frame]:
    """Everything that the server sends in this transcript."""
    return [line.frame for turn in read(path) for line in turn.events]


def needs_one_connection(path: Path) -> bool:
    """Whether a turn of it continues a response that only its connection remembers."""
    return any(turn.create.get("store") is False for turn in read(path))


async def over_websocket(server: Running, path: Path) -> list[tuple[Any, Any]]:
    """Each turn as (expected, got): its messages."""
    hidden = Placeholders()
    async with server.connect() as socket:
        return [
            (
                [line.frame for line in turn.events],
                hidden.hide(await socket.answer_to(hidden.reveal(turn.create))),
            )
            for turn in read(path)
        ]


async def over_sse(server: Running, path: Path) -> list[tuple[Any, Any]]:
    """Each turn as (expected, got): its events, or its refusal."""
    return await _over_http(server, path, stream=True)


async def over_json(server: Running, path: Path) -> list[tuple[Any, Any]]:
    """Each turn as (expected, got): its final response, or its refusal."""
    return await _over_http(server, path, stream=False)


async def _over_http(server: Running, path: Path, *, stream: bool) -> list[tuple[Any, Any]]:
    hidden = Placeholders()
    compared = []
    for turn in read(path):
        create = {key: value for key, value in hidden.reveal(turn.create).items() if key != "type"}
        answer = await server.request("POST", "/v1/responses", json={**create, "stream": stream})
        events = [line.frame for line in turn.events]
        last = events[-1]
        if last["type"] == "error" or (last["type"] == "response.failed" and not stream):
            headers = {name: answer.headers.get(name) for name in last.get("headers", {})}
            compared.append((_refusal(last), (answer.status, hidden.hide(answer.json), headers)))
        elif stream:
            compared.append((events, hidden.hide(answer.events)))
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


Play = Callable[[Running, Path], Awaitable[list[tuple[Any, Any]]]]
TRANSPORTS: dict[str, Play] = {"websocket": over_websocket, "sse": over_sse, "json": over_json}


async def record(server: Running, path: Path) -> None:
    """Write the transcript anew, with what the server answers to its creates now."""
    lines = []
    for turn, (_, got) in zip(read(path), await over_websocket(server, path), strict=True):
        lines.append(Line(0.0, ">", turn.create))
        lines += [Line(0.0, "<", frame) for frame in got]
    path.write_text("".join(f"{write_line(line)}\n" for line in lines), encoding="utf-8")  # noqa: ASYNC240 - a tool
