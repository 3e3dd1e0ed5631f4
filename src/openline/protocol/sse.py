"""Server-sent events: both directions, whole or byte by byte.

Source: WHATWG HTML, "Server-sent events"; Responses streaming reference: the `event`
field equals the event's `type`, and the stream ends with `data: [DONE]`.
"""

from __future__ import annotations

from typing import Final

DONE: Final = b"data: [DONE]\n\n"
_TYPE_AT: Final = len('{"type":"')
DONE_DATA: Final = b"[DONE]"


def encode(event: bytes) -> bytes:
    """One event, framed: `event: <type>`, `data: <json>`, an empty line.

    Args:
        event: its JSON as the builder's events are encoded: on one line, `type` its first key.
    """
    return b"event: %b\ndata: %b\n\n" % (event[_TYPE_AT : event.index(b'"', _TYPE_AT)], event)


class TooLong(Exception):  # noqa: N818 - it says what the line is
    """A peer sent an event larger than the decoder's bound."""


class Decoder:
    """Takes a stream's bytes in any slices and gives the data of whole events.

    Args:
        event_bytes_max: the most bytes the lines of one event's data may have; above it `feed` raises.
    """

    def __init__(self, event_bytes_max: int) -> None:
        self._event_bytes_max = event_bytes_max
        self._rest: list[bytes] = []  # the unfinished line, in the slices it came in
        self._rest_bytes = 0
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._is_too_long = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of every event that `chunk` completes, in order; an event without data is none.

        Raises:
            TooLong: an event is larger than `event_bytes_max`; where whole ones came before it, the next call says so.
        """
        events: list[bytes] = []
        if self._is_too_long:
            chunk = b""
        head, newline, tail = chunk.rpartition(b"\n")
        if newline:
            lines = b"".join((*self._rest, head)).split(b"\n")
            self._rest, self._rest_bytes = [], 0
        else:
            lines = []
        if tail:
            self._rest.append(tail)
            self._rest_bytes += len(tail)
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line:
                self._field(line)
                if self._data_bytes > self._event_bytes_max:
                    break  # what comes behind it is never read
            elif self._data:
                events.append(b"\n".join(self._data) if len(self._data) > 1 else self._data[0])
                self._data.clear()
                self._data_bytes = 0
        self._is_too_long |= self._rest_bytes + self._data_bytes > self._event_bytes_max
        if self._is_too_long and not events:
            msg = f"An event is larger than {self._event_bytes_max} bytes."
            raise TooLong(msg)
        return events

    def end(self) -> list[bytes]:
        """What stands unfinished when the stream ends: servers that forget the last empty line are understood."""
        return self.feed(b"\n\n")

    def _field(self, line: bytes) -> None:
        # Comments begin with a colon; `event`, `id` and `retry` tell us nothing that the JSON does not.
        if line.startswith(b"data:"):
            self._data.append(line[6:] if line[5:6] == b" " else line[5:])
            self._data_bytes += len(line)
