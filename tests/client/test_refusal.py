"""What servers say when they do not take a create, in either transport's form."""

from __future__ import annotations

import json

import pytest

from openline.client.refusal import Refusal, refusal_of_answer, refusal_of_event, retry_after_seconds

ERROR = {"type": "invalid_request_error", "code": "invalid_value", "message": "Not so.", "param": "input"}


def test_an_answer_is_read_by_its_envelope():
    """Responses API reference, "Errors"."""
    headers = {"retry-after": "3", "x-should-retry": "false"}
    found = refusal_of_answer(400, headers, json.dumps({"error": ERROR}).encode())
    assert found == Refusal(400, "invalid_value", "Not so.", "input", 3.0, False)
    error = found.error()
    assert (error.status, error.code, error.param, error.retry_after) == (400, "invalid_value", "input", 3.0)
    assert str(error) == "invalid_value: Not so."


@pytest.mark.parametrize("body", [b"<html>Bad gateway</html>", b"", b"[]", b'{"error": "no"}', b"\xff"])
def test_a_proxys_page_is_shown_as_it_is(body):
    """Whatever stands between: the status counts, and the first words of the body are shown."""
    found = refusal_of_answer(502, {}, body)
    assert (found.status, found.code) == (502, None)
    assert "502" in found.message


def test_a_long_page_is_cut():
    """An error's message has a bound."""
    assert len(refusal_of_answer(502, {}, b"x" * 100_000).message) < 300


def test_an_error_event_is_read_in_every_form():
    """Nested as in WebSocket mode, flat as in server-sent events; headers at either place.

    Source: WebSocket mode guide, "Error frame".
    """
    nested = {"type": "error", "status": 429, "error": {**ERROR, "headers": {"Retry-After": "1.5"}}}
    assert refusal_of_event(nested) == Refusal(429, "invalid_value", "Not so.", "input", 1.5)
    top = {"type": "error", "status": 429, "error": ERROR, "headers": {"retry-after": 2}}
    assert refusal_of_event(top).retry_after == 2
    flat = {**ERROR, "type": "error", "sequence_number": 3}
    assert refusal_of_event(flat) == Refusal(0, "invalid_value", "Not so.", "input")
    assert refusal_of_event({"type": "error"}).message.startswith("the server refused")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "Sun, 29 Nov 2026 10:00:30 GMT", "date": "Sun, 29 Nov 2026 10:00:00 GMT"}, 30),
        ({"retry-after": "Sun, 29 Nov 2026 09:00:00 GMT", "date": "Sun, 29 Nov 2026 10:00:00 GMT"}, 0),
        ({"retry-after": "Sun, 29 Nov 2026 10:00:30 GMT"}, None),
    ],
)
def test_retry_after_in_every_form(headers, seconds):
    """Seconds, milliseconds, or a date, which is taken against the answer's own date: no clock of ours has to be right.

    Source: RFC 9110 §10.2.3.
    """
    assert retry_after_seconds(headers) == seconds
