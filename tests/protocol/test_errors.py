"""The error table, the HTTP envelope and the `error` frame."""

from __future__ import annotations

import http

import pytest

from openline.protocol.errors import ERRORS, ProtocolError, error_of, previous_response_not_found

# WebSocket mode guide, "Error frame", and Responses API reference, "Errors": what clients match on.
DOCUMENTED = {
    "previous_response_not_found": 400,
    "invalid_stream_id": 400,
    "websocket_stream_limit_reached": 400,
    "model_not_found": 400,
    "context_length_exceeded": 400,
    "missing_required_parameter": 400,
    "invalid_value": 400,
    "invalid_api_key": 401,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "server_is_overloaded": 503,
}


@pytest.mark.parametrize("code", ERRORS)
def test_envelope_has_all_four_keys(code):
    """`param` and `code` may be null, but they are there (Responses API reference, "Errors")."""
    error = ProtocolError(code, "What came.").envelope()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["message"], error["param"]) == ("What came.", None)


@pytest.mark.parametrize("code", ERRORS)
def test_every_row_is_an_http_error_and_its_type_agrees(code):
    """Codex takes a frame for a failure only by a status that is not 2xx (WebSocket mode guide, "Error frame")."""
    kind = ERRORS[code]
    assert 400 <= http.HTTPStatus(kind.status) < 600
    assert (kind.type == "server_error") == (kind.status >= 500)


@pytest.mark.parametrize(("code", "status"), DOCUMENTED.items())
def test_documented_codes_go_out_under_their_name_and_status(code, status):
    """These are stable, because clients decide by them (WebSocket mode guide, "Error frame")."""
    assert (ERRORS[code].status, ERRORS[code].wire_code) == (status, code)


@pytest.mark.parametrize("code", ERRORS)
def test_frame_always_carries_its_status(code):
    """Codex ignores a frame without `status` and waits for its idle timeout (WebSocket mode guide, "Error frame")."""
    error = ProtocolError(code, "What came.", param="input")
    assert error.frame() == {"type": "error", "status": error.status, **error.envelope()}


def test_frame_names_only_a_named_lane():
    """`stream_id` is there when the lane is known and has a name (WebSocket mode guide, "Error frame")."""
    error = ProtocolError("invalid_value", "What came.")
    assert "stream_id" not in error.frame(None)
    assert error.frame("a")["stream_id"] == "a"


def test_frame_names_the_lane_that_the_error_itself_is_about():
    """The lane limit echoes the id that was one too many (WebSocket mode guide, "stream_id")."""
    assert ProtocolError("websocket_stream_limit_reached", "33.", stream_id="z").frame()["stream_id"] == "z"


def test_frame_has_its_headers_in_both_places():
    """Codex reads them at top level, the OpenAI SDKs inside `error` (WebSocket mode guide, "Error frame")."""
    frame = ProtocolError("server_is_overloaded", "Full.", headers={"retry-after": "1"}).frame()
    assert frame["headers"] == frame["error"]["headers"] == {"retry-after": "1"}


def test_headers_stay_out_of_the_http_envelope():
    """Over HTTP they are headers (Responses API reference, "Errors")."""
    error = ProtocolError("rate_limit_exceeded", "Slow down.", headers={"retry-after": "7"})
    assert set(error.envelope()["error"]) == {"message", "type", "param", "code"}


def test_previous_response_not_found_is_exact():
    """Clients match on it and resend in full (WebSocket mode guide, "Error frame")."""
    assert previous_response_not_found("resp_abc").frame("main") == {
        "type": "error",
        "status": 400,
        "stream_id": "main",
        "error": {
            "type": "invalid_request_error",
            "code": "previous_response_not_found",
            "message": "Previous response with id 'resp_abc' not found.",
            "param": "previous_response_id",
        },
    }


@pytest.mark.parametrize("code", ERRORS)
def test_failure_has_a_code_that_is_a_string(code):
    """A failed response's `error` is `{code, message}`, neither null (Responses API reference, "The response object")."""
    failure = ProtocolError(code, "It broke.").failure()
    assert failure == {"code": ERRORS[code].wire_code or "server_error", "message": "It broke."}


def test_error_reads_as_its_message():
    """Where it is logged, the sentence for the client is there too."""
    assert str(ProtocolError("invalid_value", "'temperature' is 3.")) == "'temperature' is 3."


@pytest.mark.parametrize("code", ERRORS)
def test_error_that_a_peer_tells_is_ours_again(code):
    """What was recorded or relayed keeps its code and its sentence (the design, one transcript format)."""
    error = error_of({"code": code, "message": "It broke.", "type": "x"})
    assert (error.code, error.message, error.param) == (code, "It broke.", None)


@pytest.mark.parametrize("code", [None, 5, [], "their_own_code"])
def test_code_that_we_do_not_know_is_an_upstreams_failure(code):
    """A peer's own words never become a code of ours."""
    error = error_of({"code": code})
    assert (error.code, error.message) == ("upstream_error", "The upstream failed.")
