"""The one transcript format: fixtures, scripts, recordings, workloads and the docs' examples.

JSON lines, each `{"t": seconds, "dir": ">" | "<", "frame": {…}}`. `>` goes to the
server, `<` comes from it; `t` counts from the first line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

from openline.protocol.states import TERMINAL_EVENTS


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
    """One `response.create` of a transcript and the events that answered it, each with its time."""

    create: dict[str, Any]
    events: list[Line]


def turns(lines: Iterable[Line]) -> Iterator[RecordedTurn]:
    """The turns of a transcript's default lane, in order; a turn ends with its terminal event or an `error`."""
    creates: deque[dict[str, Any]] = deque()  # a client may send the next before the last has ended
    events: list[Line] = []
    for line in lines:
        kind = line.frame.get("type")
        if "stream_id" in line.frame:
            continue
        if line.dir == ">" and kind == "response.create":
            creates.append(line.frame)
        elif line.dir == "<" and creates:
            events.append(line)
            if kind in TERMINAL_EVENTS or kind == "error":
                yield RecordedTurn(creates.popleft(), events)
                events = []
