"""The one transcript format: fixtures, scripts, recordings, workloads and the docs' examples.

JSON lines, each `{"t": seconds, "dir": ">" | "<", "frame": {…}}`. `>` goes to the
server, `<` comes from it; `t` counts from the first line. One frame passes on no wire:
`{"type": "openline.reconnect"}`, where the client's connection ends and it opens the next.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal, cast

import msgspec

from openline.protocol.states import TERMINAL_EVENTS

RECONNECT: Final = "openline.reconnect"


class Line(msgspec.Struct, frozen=True):
    """One line: a frame, its direction, and when it passed, in seconds from the first."""

    t: float
    dir: Literal[">", "<"]
    frame: dict[str, Any]


class BadTranscript(Exception):  # noqa: N818 - it says what the file is
    """A line of a transcript cannot be read; the message names the line."""


_line = msgspec.json.Decoder(Line)
_encoder = msgspec.json.Encoder()


def write_line(line: Line) -> str:
    """A line of the file, without its line break."""
    return _encoder.encode(line).decode()


def read_lines(text: str) -> list[Line]:
    """Every line of a transcript, empty lines left out.

    Raises:
        BadTranscript: a line is not of the format.
    """
    lines: list[Line] = []
    # Not `splitlines`: JSON strings may hold the other characters that it breaks at.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            lines.append(_line.decode(line))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            msg = f"Line {number} is not a transcript line: {error}."
            raise BadTranscript(msg) from None
    return lines


class RecordedTurn(msgspec.Struct, frozen=True):
    """One `response.create` of a transcript and the events that answered it, each with its time.

    A successor that started by itself has the create of the response that it continues, without its input. A turn that
    was cut, and read on under its idempotency key, is one turn; what was read again is there once.
    """

    create: dict[str, Any]
    events: list[Line]

    @property
    def response_id(self) -> Any:
        """The id of its response, if it is one."""
        return _at(self.events[0].frame, "response", "id")

    def has_read(self, frame: dict[str, Any]) -> bool:
        """Whether an event comes again, as its create has come again."""
        last = self.events[-1].frame.get("sequence_number") if self.events else None
        number = frame.get("sequence_number")
        is_keyed = self.create.get("idempotency_key") is not None
        return is_keyed and isinstance(last, int) and isinstance(number, int) and number <= last


def lane_of(frame: dict[str, Any]) -> str | None:
    """The lane that a frame names, whichever way it goes; None is the default lane."""
    stream_id = frame.get("stream_id")
    return stream_id if isinstance(stream_id, str) else None


def is_about_steering(frame: dict[str, Any]) -> bool:
    """Whether a frame tells what became of a steer."""
    return str(frame.get("type")).startswith("response.steer.")


def _at(frame: dict[str, Any], *path: str) -> Any:
    """What a frame has at this path; None where it has nothing."""
    found: Any = frame
    for key in path:
        found = cast("dict[str, Any]", found).get(key) if isinstance(found, dict) else None
    return found


class _Lane:
    """What waits on a lane, what runs and what ended last."""

    def __init__(self) -> None:
        self.creates: deque[dict[str, Any]] = deque()  # a client may send the next before the last has ended
        self.running: RecordedTurn | None = None
        self.ended: RecordedTurn | None = None

    def passes_by(self, frame: dict[str, Any]) -> bool:
        """Whether an event of this lane is about a response that does not run, as what comes of a steer may be."""
        target = None if self.running is None else self.running.response_id
        return is_about_steering(frame) and (target is None or target != _at(frame, "steer", "previous_response_id"))

    def begin(self, first: dict[str, Any], keyed: dict[Any, RecordedTurn]) -> RecordedTurn | None:
        """The turn that this event opens: a successor that started by itself, or the answer to the next create.

        A successor goes before what waits, unless that itself continues the response that has ended.

        Args:
            keyed: the turns so far that have an idempotency key.
        """
        parent = _at(first, "response", "previous_response_id")
        asked = self.creates[0].get("previous_response_id") if self.creates else None
        if self.ended is not None and parent is not None and parent == self.ended.response_id != asked:
            return RecordedTurn({**self.ended.create, "previous_response_id": parent, "input": None}, [])
        if not self.creates:
            return None
        turn = RecordedTurn(self.creates.popleft(), [])
        key = turn.create.get("idempotency_key")
        is_keyed = isinstance(key, str) and first.get("type") != "error"
        return keyed.setdefault(key, turn) if is_keyed else turn


def turns(lines: Iterable[Line]) -> Iterator[RecordedTurn]:
    """The turns of a transcript, in the order in which they ended; that is with a terminal event or an `error`.

    Those of different lanes may run at once, those of one lane never do. What comes of a steer belongs to the
    response that it steers, as long as that runs; behind its end it belongs to no turn.

    Source: WebSocket mode guide, "stream_id"; Mid-turn steering guide, "Outcomes".
    """
    lanes: defaultdict[str | None, _Lane] = defaultdict(_Lane)
    keyed: dict[Any, RecordedTurn] = {}
    for line in lines:
        kind, lane = line.frame.get("type"), lanes[lane_of(line.frame)]
        if line.dir == ">":
            if kind == RECONNECT:
                lanes.clear()
            elif kind == "response.create":
                lane.creates.append(line.frame)
            continue
        if lane.passes_by(line.frame):
            continue
        lane.running = turn = lane.running or lane.begin(line.frame, keyed)
        if turn is None:
            continue
        is_end = kind in TERMINAL_EVENTS or kind == "error"
        if not turn.has_read(line.frame):
            turn.events.append(line)
            if is_end:
                yield turn
        if is_end:
            lane.running, lane.ended = None, turn
