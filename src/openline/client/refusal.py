"""What a server says when it does not take a create, in either transport's form.

Source: Responses API reference, "Errors"; WebSocket mode guide, "Error frame".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final

import msgspec

from openline.client.errors import Refused
from openline.client.wire import Event, Headers, as_object

_BODY_CHARACTERS_MAX: Final = 200  # of a body that is no error of the API: a proxy's page
_body: Final = msgspec.json.Decoder(dict[str, Any])


class Refusal(msgspec.Struct, frozen=True):
    """An error answer.

    Attributes:
        status: the HTTP status; 0 if an `error` event had none.
        retry_after: seconds; None if it was not said.
        should_retry: what the header `x-should-retry` says; None without it.
    """

    status: int
    code: str | None
    message: str
    param: str | None = None
    retry_after: float | None = None
    should_retry: bool | None = None

    def error(self) -> Refused:
        """The same as what the app gets."""
        return Refused(self.status, self.code, self.message, param=self.param, retry_after=self.retry_after)


def refusal_of_answer(status: int, headers: Headers, body: bytes) -> Refusal:
    """An HTTP answer other than 2xx."""
    try:
        error = as_object(_body.decode(body).get("error"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        error = None
    if error is None:
        said = body[:_BODY_CHARACTERS_MAX].decode("utf-8", "replace").strip()
        error = {"message": f"the server answered with status {status}{said and ': '}{said}"}
    return _refusal(status, error, headers)


def refusal_of_event(event: Event) -> Refusal:
    """An `error` event: nested as in WebSocket mode, or flat as in server-sent events."""
    error = as_object(event.get("error")) or {name: event.get(name) for name in ("code", "message", "param")}
    headers = as_object(event.get("headers")) or as_object(error.get("headers")) or {}
    status: object = event.get("status", event.get("status_code"))
    lower = {name.lower(): str(value) for name, value in headers.items()}
    return _refusal(status if isinstance(status, int) else 0, error, lower)


def _refusal(status: int, error: Mapping[Any, Any], headers: Headers) -> Refusal:
    message, code, param = error.get("message"), error.get("code"), error.get("param")
    should = {"true": True, "false": False}.get(headers.get("x-should-retry", "").lower())
    return Refusal(
        status,
        str(code) if code is not None else None,
        str(message) if message else f"the server refused with status {status}, and gave no reason.",
        str(param) if param is not None else None,
        retry_after_seconds(headers),
        should,
    )


def retry_after_seconds(headers: Headers) -> float | None:
    """When to ask again, in seconds; None if it is not said.

    A date is taken against the answer's own `Date`, so that no clock of ours has to be right.

    Source: RFC 9110 §10.2.3; `retry-after-ms` is OpenAI's.
    """
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        return seconds if seconds >= 0 and math.isfinite(seconds) else None
    try:
        until = parsedate_to_datetime(headers["retry-after"])
        return max(0.0, (until - parsedate_to_datetime(headers["date"])).total_seconds())
    except (KeyError, ValueError, TypeError):
        return None
