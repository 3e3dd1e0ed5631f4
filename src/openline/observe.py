"""What happens, told to whoever wants to know: one `Hook`, several listeners.

Details never hold content: no input, no output, no tool arguments, no keys.
"""

from __future__ import annotations

import logging
from typing import Any, Final, Protocol

import msgspec

_MODEL_CHARS_MAX: Final = 128
_log: Final = logging.getLogger("openline.turns")


class TurnDetails(msgspec.Struct, frozen=True):
    """One turn, when it has ended.

    Attributes:
        request_id: what the client sees as `x-request-id`; over WebSocket the connection's.
        transport: how the client reads it.
        upstream: the engine's name; empty if the turn never got that far.
        status: the response's final status, or `refused`.
        error_code: why it failed or was refused.
        seconds: from its start to its terminal event.
        first_event_seconds: from its start to `response.created`; None if refused.
        usage: the wire's `usage` object.
    """

    request_id: str
    owner: str
    transport: str
    model: str
    upstream: str
    response_id: str
    status: str
    error_code: str | None
    seconds: float
    first_event_seconds: float | None
    events: int
    usage: dict[str, Any] | None


class Hook(Protocol):
    """Is told what happened. Must return at once and must not raise."""

    def turn_ended(self, details: TurnDetails) -> None:
        """A turn ended, in whichever way."""
        ...


class LogHook:
    """One log line a turn."""

    def turn_ended(self, details: TurnDetails) -> None:
        """Write the line; refused and failed turns are warnings."""
        level = logging.INFO if details.error_code is None else logging.WARNING
        if not _log.isEnabledFor(level):
            return
        usage = details.usage or {}
        _log.log(
            level,
            "turn %s %s owner=%s model=%r upstream=%s over=%s request=%s events=%d seconds=%.3f tokens=%s/%s%s",
            details.response_id or "-",
            details.status,
            details.owner,
            details.model[:_MODEL_CHARS_MAX],  # the client's own words: quoted and cut, so that a line is a line
            details.upstream,
            details.transport,
            details.request_id,
            details.events,
            details.seconds,
            usage.get("input_tokens", 0),
            usage.get("output_tokens", 0),
            f" error={details.error_code}" if details.error_code else "",
        )
