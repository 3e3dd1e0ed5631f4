"""The seam between a session and the network: what a test or a simulation replaces, and nothing else.

Everything above it waits with the running loop's own time. What it raises says what matters for recovery:
whether the peer can have got anything, and whether trying again makes sense.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any, Protocol, cast

Event = dict[str, Any]  # an event in the wire's own shape
Response = dict[str, Any]  # a response, likewise
Item = dict[str, Any]  # an item, likewise
Headers = Mapping[str, str]  # names in lower case


def as_object(value: object) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


class LineClosed(Exception):  # noqa: N818 - what happened to the line
    """A connection has ended.

    Attributes:
        code: the WebSocket close code; None where there was none, and over HTTP.
        reason: for people; may be empty.
    """

    def __init__(self, code: int | None, reason: str) -> None:
        super().__init__(f"the connection has ended ({code or 'without a close code'}){reason and f': {reason}'}")
        self.code = code
        self.reason = reason


class DialRefused(Exception):  # noqa: N818 - an answer
    """The server, or a proxy before it, answered a WebSocket upgrade with something other than 101.

    Attributes:
        body: as much of the answer's body as came.
    """

    def __init__(self, status: int, headers: Headers, body: bytes) -> None:
        super().__init__(f"the WebSocket upgrade was answered with status {status}")
        self.status = status
        self.headers = headers
        self.body = body


class DialFailed(Exception):  # noqa: N818 - what happened
    """No connection came about: nothing of a request has reached the server.

    Attributes:
        reason: for people.
        reached: there was a connection, and it ended before the WebSocket upgrade was answered.
        is_lasting: trying again will not help: an address that is none, a certificate that is not trusted.
    """

    def __init__(self, reason: str, *, reached: bool = False, is_lasting: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.reached = reached
        self.is_lasting = is_lasting


class Line(Protocol):
    """An open WebSocket. It answers the peer's pings by itself, as long as somebody receives."""

    @property
    def headers(self) -> Headers:
        """Those of the 101."""
        ...

    async def send(self, text: str) -> None:
        """Send one text message.

        Raises:
            LineClosed: the line had ended before: nothing of the message has left. A break in the middle of
                sending raises nothing here; it shows at `receive`.
        """
        ...

    async def receive(self) -> str:
        """The next text message. Safe to cancel: no message is lost.

        Raises:
            LineClosed: the line has ended, and every message before that was given.
        """
        ...

    async def close(self) -> None:
        """Close the line, code 1000; does nothing if it is closed."""
        ...


class Events(Protocol):
    """An HTTP answer: its status and headers are there, its body is still to come."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Headers:
        """The answer's headers."""
        ...

    def events(self) -> AsyncGenerator[bytes, None]:
        """The data of each server-sent event, in order, until the body ends.

        Raises:
            LineClosed: the connection broke before the body's end.
        """
        ...

    async def body(self) -> bytes:
        """The body as a whole, for an answer that is no event stream.

        Raises:
            LineClosed: the connection broke before the body's end, or the body is larger than the dial takes.
        """
        ...

    async def close(self) -> None:
        """Give the answer up; a body that was not read to its end takes its connection with it.

        Whoever waits for its events then gets LineClosed.
        """
        ...


class Dial(Protocol):
    """Reaches one server. Paths are below the base URL, such as `/responses`."""

    async def open_socket(self, headers: Headers) -> Line:
        """A WebSocket to `/responses`.

        Raises:
            DialRefused: the upgrade was answered, but not with 101.
            DialFailed: no answer came.
        """
        ...

    async def post(self, path: str, body: bytes, headers: Headers) -> Events:
        """Post JSON, and wait for the answer's headers.

        Raises:
            DialFailed: there was no connection: nothing was sent.
            LineClosed: the connection broke after some of the request may have left.
        """
        ...

    async def get(self, path: str, headers: Headers) -> Events:
        """Ask for something, and wait for the answer's headers.

        Raises:
            DialFailed: there was no connection.
            LineClosed: it broke before the headers came.
        """
        ...

    async def close(self) -> None:
        """Close every connection."""
        ...
