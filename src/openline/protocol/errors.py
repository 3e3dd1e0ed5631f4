"""Every error that Openline answers with: one table, one exception.

The table says which HTTP status and which `type` belong to a stable `code`.
A message names the field, what came, and what was expected; it never holds a
secret and never the text of another request.

Source: Responses API reference, "Errors"; WebSocket mode guide, "Errors".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

MESSAGE_CHARS_MAX: Final = 1000
PARAM_CHARS_MAX: Final = 256


class ErrorKind(NamedTuple):
    """How a code goes out: its HTTP status, the wire's `type`, and the wire's `code` (null for some)."""

    status: int
    type: str
    wire_code: str | None


_INVALID: Final = "invalid_request_error"
_SERVER: Final = "server_error"

# Codes whose wire form differs from their name here carry it as `wire_code`;
# OpenAI sends null where clients match on the message or on the status alone.
ERRORS: Final[dict[str, ErrorKind]] = {
    # The request as such.
    "invalid_json": ErrorKind(400, _INVALID, "invalid_json"),
    "invalid_request": ErrorKind(400, _INVALID, None),
    "invalid_type": ErrorKind(400, _INVALID, "invalid_type"),
    "invalid_value": ErrorKind(400, _INVALID, "invalid_value"),
    "missing_required_parameter": ErrorKind(400, _INVALID, "missing_required_parameter"),
    "unsupported_parameter": ErrorKind(400, _INVALID, "unsupported_parameter"),
    "unknown_event_type": ErrorKind(400, _INVALID, "unknown_event_type"),
    "request_cancelled": ErrorKind(400, _INVALID, "request_cancelled"),
    "message_too_big": ErrorKind(413, _INVALID, "message_too_big"),
    # What it refers to.
    "previous_response_not_found": ErrorKind(400, _INVALID, "previous_response_not_found"),
    "model_not_found": ErrorKind(400, _INVALID, "model_not_found"),
    "model_unknown": ErrorKind(404, _INVALID, "model_not_found"),
    "not_found": ErrorKind(404, _INVALID, None),
    "tool_output_conflict": ErrorKind(400, _INVALID, "tool_output_conflict"),
    "method_not_allowed": ErrorKind(405, _INVALID, "method_not_allowed"),
    "context_length_exceeded": ErrorKind(400, _INVALID, "context_length_exceeded"),
    "invalid_prompt": ErrorKind(400, _INVALID, "invalid_prompt"),
    "cyber_policy": ErrorKind(400, _INVALID, "cyber_policy"),
    # WebSocket mode.
    "invalid_stream_id": ErrorKind(400, _INVALID, "invalid_stream_id"),
    "websocket_stream_limit_reached": ErrorKind(400, _INVALID, "websocket_stream_limit_reached"),
    "websocket_connection_limit_reached": ErrorKind(400, _INVALID, "websocket_connection_limit_reached"),
    "websocket_disabled": ErrorKind(426, _INVALID, "websocket_disabled"),
    "resume_window_exceeded": ErrorKind(409, _INVALID, "resume_window_exceeded"),
    # Idempotency keys.
    "idempotency_key_reused": ErrorKind(409, _INVALID, "idempotency_key_reused"),
    "idempotency_key_in_use": ErrorKind(409, _INVALID, "idempotency_key_in_use"),
    # Who asks.
    "invalid_api_key": ErrorKind(401, _INVALID, "invalid_api_key"),
    "origin_not_allowed": ErrorKind(403, _INVALID, "origin_not_allowed"),
    "host_not_allowed": ErrorKind(403, _INVALID, "host_not_allowed"),
    # Load.
    "rate_limit_exceeded": ErrorKind(429, "rate_limit_error", "rate_limit_exceeded"),
    "insufficient_quota": ErrorKind(429, "insufficient_quota", "insufficient_quota"),
    "usage_not_included": ErrorKind(429, "rate_limit_error", "usage_not_included"),
    "server_is_overloaded": ErrorKind(503, _SERVER, "server_is_overloaded"),
    "connection_limit_exceeded": ErrorKind(429, "rate_limit_error", "connection_limit_exceeded"),
    # What stands behind us. An upstream that refuses our key is our operator's
    # fault, never the client's, so its 401 does not travel as a 401.
    "upstream_unreachable": ErrorKind(502, _SERVER, "upstream_unreachable"),
    "upstream_unauthorized": ErrorKind(502, _SERVER, "upstream_unauthorized"),
    "upstream_error": ErrorKind(502, _SERVER, "upstream_error"),
    "upstream_refused": ErrorKind(400, _INVALID, "upstream_refused"),
    "upstream_timeout": ErrorKind(504, _SERVER, "upstream_timeout"),
    # Ourselves.
    "store_unavailable": ErrorKind(503, _SERVER, "store_unavailable"),
    "internal_error": ErrorKind(500, _SERVER, "server_error"),
}


class ProtocolError(Exception):
    """A request, or a turn, that ends in an error the client is told about.

    Args:
        code: a key of `ERRORS`.
        message: what came and what was expected; safe to show to the client.
        param: path of the field at fault, such as `input[0].content`.
        headers: HTTP headers that belong to the answer, such as `retry-after`.
        stream_id: the lane to name in the frame, where the error is about a lane.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
        stream_id: str | None = None,
    ) -> None:
        # What a client sent stands in some messages, and may be as long as its request.
        self.message = message if len(message) <= MESSAGE_CHARS_MAX else f"{message[: MESSAGE_CHARS_MAX - 1]}…"
        super().__init__(self.message)
        self.code = code
        self.param = param[:PARAM_CHARS_MAX] if param is not None else None
        self.headers = headers or {}
        self.stream_id = stream_id

    @property
    def kind(self) -> ErrorKind:
        """The row of `ERRORS` for this error's code."""
        return ERRORS[self.code]

    @property
    def status(self) -> int:
        """The HTTP status that belongs to this error."""
        return self.kind.status

    def envelope(self) -> dict[str, Any]:
        """The body of an HTTP error: `{"error": {message, type, param, code}}`, all four keys always there.

        Source: Responses API reference, "Errors".
        """
        kind = self.kind
        return {"error": {"message": self.message, "type": kind.type, "param": self.param, "code": kind.wire_code}}

    def frame(self, stream_id: str | None = None) -> dict[str, Any]:
        """The `error` event of WebSocket mode.

        `status` is always there: Codex ignores a frame without it and waits for its
        idle timeout. Headers go out twice, because Codex reads them at the top level
        and the OpenAI SDKs read them inside `error`.

        Args:
            stream_id: the lane, when it is known and has a name.

        Source: WebSocket mode guide, "Error frame".
        """
        frame: dict[str, Any] = {"type": "error", "status": self.status}
        lane = stream_id if stream_id is not None else self.stream_id
        if lane is not None:
            frame["stream_id"] = lane
        error: dict[str, Any] = self.envelope()["error"]
        if self.headers:
            error["headers"] = self.headers
            frame["headers"] = self.headers
        frame["error"] = error
        return frame

    def failure(self) -> dict[str, Any]:
        """The `error` object of a failed response: `{code, message}`.

        Source: Responses API reference, "The response object".
        """
        return {"code": self.kind.wire_code or _SERVER, "message": self.message}


def previous_response_not_found(response_id: str) -> ProtocolError:
    """The one error for an id that is unknown, evicted, unchainable, or another owner's: byte for byte the same."""
    return ProtocolError(
        "previous_response_not_found",
        f"Previous response with id '{response_id}' not found.",
        param="previous_response_id",
    )


def request_cancelled() -> ProtocolError:
    """The one error for a create that was cancelled before it became a response."""
    return ProtocolError("request_cancelled", "The request was cancelled before it started.")


def error_of(error: Mapping[str, Any]) -> ProtocolError:
    """A peer's error object, `{code, message, …}`, as ours; a code that we do not know is an upstream's failure."""
    code: object = error.get("code")
    known = isinstance(code, str) and code in ERRORS
    return ProtocolError(str(code) if known else "upstream_error", str(error.get("message") or "The upstream failed."))


def failure_of(error: Mapping[str, Any]) -> ProtocolError:
    """What `ProtocolError.failure` was made of, as far as it tells."""
    codes = (code for code, kind in ERRORS.items() if kind.wire_code == error.get("code"))
    return ProtocolError(next(codes, "internal_error"), str(error.get("message")))
