"""The paths that are served, and the plain HTTP answers."""

from __future__ import annotations

import pytest

from openline.state.nothing import NothingStore

PREFIXES = ["/v1", "", "/openai/v1"]
by_prefix = pytest.mark.parametrize("prefix", PREFIXES, ids=["v1", "bare", "openai"])


@by_prefix
async def test_every_prefix_serves_both_transports(server, prefix):
    """The API answers under three prefixes, whatever query parameters a client adds.

    Source: WebSocket mode guide, "Endpoint and handshake".
    """
    path = f"{prefix}/responses?api-version=preview&beta=true"
    async with server.connect(path) as socket:
        response = await socket.completed()
    answer = await server.request("POST", path, json={"model": "scripted-text", "input": "x"})
    assert answer.status == 200
    assert (
        await server.get(f"{prefix}/responses/{response['id']}?include[]=message.output_text.logprobs")
    ).json == response
    assert (await server.request("DELETE", f"{prefix}/responses/{response['id']}")).status == 200
    assert (await server.get(f"{prefix}/responses/{response['id']}")).status == 404


@by_prefix
async def test_models_are_listed_and_found(server, prefix):
    """The list has OpenAI's shape and beside it Codex's, of the same models; each of them is found by id.

    Source: Responses API reference, "Models".
    """
    listed = (await server.get(f"{prefix}/models?client_version=0.50.0")).json
    assert listed["object"] == "list"
    assert [model["slug"] for model in listed["models"]] == [model["id"] for model in listed["data"]]
    assert {model["id"] for model in listed["data"]} >= {"scripted-text", "scripted-tools-20"}
    for model in listed["data"]:
        assert model.keys() == {"id", "object", "created", "owned_by"}
        assert (await server.get(f"{prefix}/models/{model['id']}")).json == model


async def test_an_unknown_model_is_404(server):
    """`GET /v1/models/{id}` of a model that nobody serves; slashes are part of a name.

    Source: Responses API reference, "Errors".
    """
    for model in ("nobody", "org/model"):
        answer = await server.get(f"/v1/models/{model}")
        assert (answer.status, answer.json["error"]["code"]) == (404, "model_not_found")
        assert model in answer.json["error"]["message"]


async def test_get_without_upgrade_is_405(server):
    """There is no list of responses: 405, with what is allowed.

    Source: WebSocket mode guide, "Disagreements and silences", row 19.
    """
    answer = await server.get("/v1/responses")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.json["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(("method", "path"), [("PUT", "/v1/responses"), ("POST", "/v1/models"), ("PATCH", "/healthz")])
async def test_a_wrong_method_is_405_in_the_envelope(server, method, path):
    """What a path does not do is refused in the API's own form, with what it does."""
    answer = await server.request(method, path)
    assert (answer.status, answer.json["error"]["code"]) == (405, "method_not_allowed")
    assert answer.headers["allow"]


@pytest.mark.parametrize("path", ["/", "/v1/chat/completions", "/v2/responses", "/v1/responses/a/b"])
async def test_an_unknown_path_is_404_in_the_envelope(server, path):
    """What is not served is refused in the API's own form."""
    answer = await server.get(path)
    assert answer.status == 404
    assert answer.json["error"].keys() == {"message", "type", "param", "code"}


async def test_an_unknown_response_is_404(server):
    """Reading and deleting what is not there.

    Source: Responses API reference, "Errors".
    """
    for method in ("GET", "DELETE"):
        answer = await server.request(method, "/v1/responses/resp_x")
        assert answer.status == 404
        assert answer.json["error"]["message"] == "Response with id 'resp_x' not found."


async def test_a_body_above_the_limit_is_413(start):
    """A body larger than `message_bytes_max` is refused; the connection answers the next request.

    Source: Responses API reference, "Errors".
    """
    server = await start(limits={"message_bytes_max": 2000})
    answer = await server.post(input="x" * 3000)
    assert (answer.status, answer.json["error"]["code"]) == (413, "message_too_big")
    assert (await server.post()).status == 200


async def test_the_server_is_healthy_and_ready(server):
    """`/healthz` says that the process answers, `/readyz` that its upstreams do."""
    assert (await server.get("/healthz")).json == {"status": "ok"}
    answer = await server.get("/readyz")
    assert (answer.status, answer.json) == (200, {"status": "ready", "upstreams": {"scripted": "ok"}})


async def test_every_answer_has_a_request_id_and_the_version(server):
    """Good or bad, each answer names the request for the log, and the server that has the extensions."""
    answers = [
        await server.get("/healthz"),
        await server.get("/v1/models"),
        await server.get("/nowhere"),
        await server.post(),
        await server.post(stream=True),
        await server.post(input=5),
    ]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert len(set(ids)) == len(ids)
    assert all(answer.headers["openline-version"] for answer in answers)


async def test_the_event_stream_is_not_held_back_by_proxies(server):
    """The stream's type is `text/event-stream`, and caches and nginx are told to leave it alone.

    Source: WHATWG HTML, "Server-sent events".
    """
    answer = await server.post(stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.events[-1]["type"] == "response.completed"


async def test_plain_json_answer_is_the_whole_response(server):
    """Without `stream` a create is answered by the final response and nothing else."""
    answer = await server.post()
    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    assert (answer.json["object"], answer.json["status"]) == ("response", "completed")


async def test_a_defect_is_told_in_the_envelope(start, caplog):
    """500 with the id that the log names, and nothing of what went wrong.

    Source: guarantees, "Bad input": no internal text.
    """

    class Broken(NothingStore):
        async def conversation(self, owner, conversation_id):
            raise RuntimeError("secret-detail")

    server = await start(store=Broken())
    answer = await server.get("/v1/conversations/conv_x")
    assert (answer.status, answer.json["error"]["code"]) == (500, "server_error")
    assert b"secret-detail" not in answer.body
    request_id = answer.headers["x-request-id"]
    assert request_id in answer.json["error"]["message"]
    assert f"a request failed, request={request_id}" in caplog.messages
    assert "secret-detail" in caplog.text, "the operator has the traceback"
    caplog.clear()
