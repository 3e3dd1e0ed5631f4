"""Who may come in: keys, owners, web pages, hosts; and what a refused upgrade looks like."""

from __future__ import annotations

import re

import pytest
from websockets.exceptions import InvalidStatus

from server.running import until

KEYS = {"keys": {"key-a": "a", "key-b": "b"}}
OPEN_PATHS = {"/healthz", "/readyz"}


async def refused_upgrade(server, path="/v1/responses", **options):
    """The HTTP answer to an upgrade that must not succeed, and its JSON body."""
    with pytest.raises(InvalidStatus) as refused:
        async with server.connect(path, **options):
            pass
    response = refused.value.response
    assert response.headers["content-type"] == "application/json"
    return response


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer key-"},
        {"Authorization": "Bearer key-aa"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic key-a"},
        {"Authorization": "key-a"},
        {"Authorization": "Bearer KEY-A"},
    ],
    ids=str,
)
async def test_without_a_known_key_nothing_is_answered(start, headers):
    """401 with the JSON envelope, before the 101 on WebSocket; only the whole key is a key.

    Source: WebSocket mode guide, "Endpoint and handshake"; guarantees, "Keys".
    """
    server = await start(**KEYS)
    response = await refused_upgrade(server, headers=headers)
    answer = await server.request(
        "POST", "/v1/responses", json={"model": "scripted-text", "input": "x"}, headers=headers
    )
    assert response.status_code == answer.status == 401
    assert response.body == answer.body
    assert answer.json["error"]["code"] == "invalid_api_key"
    assert "key-" not in answer.json["error"]["message"]


async def test_a_known_key_is_let_in(start):
    """The right key works on both transports, whatever the scheme's case."""
    server = await start(**KEYS)
    for headers in ({"Authorization": "Bearer key-a"}, {"Authorization": "bearer key-b"}):
        async with server.connect(headers=headers) as socket:
            await socket.completed()
        answer = await server.request(
            "POST", "/v1/responses", json={"model": "scripted-text", "input": "x"}, headers=headers
        )
        assert answer.status == 200


async def test_without_configured_keys_any_key_is_accepted(server):
    """A server without keys takes whatever bearer a client has to send, and none."""
    for key in (None, "sk-anything"):
        async with server.connect(key=key) as socket:
            await socket.completed()
        assert (await server.post(key=key)).status == 200


async def test_every_route_but_health_needs_a_key(start):
    """Each route that the app has, found by asking the app, refuses without a key.

    Source: guarantees, "Keys": a test lists the routes and fails on a new one without.
    """
    server = await start(**KEYS)
    routes = [(route.path, sorted(route.methods)) for route in server.app._routes.routes]
    assert len(routes) > len(OPEN_PATHS)
    for path, methods in routes:
        for method in methods:
            answer = await server.request(method, re.sub(r"\{.*?\}", "x", path))
            assert (answer.status == 401) == (path not in OPEN_PATHS), (method, path)


@pytest.mark.parametrize("keys", [{}, KEYS], ids=["without keys", "with keys"])
async def test_a_web_page_that_is_not_listed_is_refused(start, keys):
    """An `Origin` not listed gets 403 on both transports, with a valid key too.

    Source: guarantees, "Browsers".
    """
    server = await start(**keys)
    for origin in ("https://evil.example", "null", "http://localhost:3000", ""):
        headers = {"Origin": origin}
        assert (await refused_upgrade(server, key="key-a", headers=headers)).status_code == 403
        for method, path in [("POST", "/v1/responses"), ("GET", "/v1/models"), ("GET", "/v1/responses/resp_x")]:
            answer = await server.request(method, path, key="key-a", headers=headers, data=b"{}")
            assert (answer.status, answer.json["error"]["code"]) == (403, "origin_not_allowed")


async def test_a_listed_web_page_is_let_in(start):
    """An `Origin` that the operator lists may use the server."""
    server = await start(server={"allowed_origins": ("https://app.example",)})
    headers = {"Origin": "https://app.example"}
    async with server.connect(headers=headers) as socket:
        await socket.completed()
    assert (await server.get("/v1/models", headers=headers)).status == 200
    assert (await refused_upgrade(server, headers={"Origin": "https://app.example.evil"})).status_code == 403


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8484", "127.0.0.1.evil.example", "192.168.0.7", "[", "a@b:c"]
)
async def test_on_loopback_a_foreign_host_is_refused(server, host):
    """A server on loopback answers to loopback names only, so that no DNS name can be pointed at it.

    Source: guarantees, "Browsers".
    """
    answer = await server.request("POST", "/v1/responses", headers={"Host": host}, data=b"{}")
    assert (answer.status, answer.json["error"]["code"]) == (403, "host_not_allowed")
    assert (await server.get("/v1/models", headers={"Host": host})).status == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:8484", "127.0.0.1", "127.9.9.9:1", "[::1]:8484", "LOCALHOST"])
async def test_on_loopback_every_loopback_name_is_answered(server, host):
    """Whatever a client on this machine calls it."""
    assert (await server.get("/v1/models", headers={"Host": host})).status == 200


async def test_with_keys_any_host_is_answered(start):
    """Behind a reverse proxy the `Host` is the proxy's; a key is what protects then."""
    server = await start(**KEYS)
    answer = await server.get("/v1/models", key="key-a", headers={"Host": "llm.example"})
    assert answer.status == 200


async def test_an_upgrade_is_426_where_websocket_is_off(start):
    """With WebSocket mode off an upgrade gets 426, at which Codex goes on over HTTP at once.

    Source: WebSocket mode guide, "Endpoint and handshake".
    """
    server = await start(server={"websocket": False}, **KEYS)
    response = await refused_upgrade(server, key="key-a")
    assert response.status_code == 426
    assert b"websocket_disabled" in response.body
    assert (await refused_upgrade(server)).status_code == 401
    assert (await server.post(key="key-a")).status == 200


async def test_an_upgrade_elsewhere_is_404(server):
    """There is one place for WebSocket mode."""
    assert (await refused_upgrade(server, "/v1/chat/completions")).status_code == 404


async def test_an_owner_holds_so_many_sockets_and_no_more(start):
    """One socket too many gets 429 with `retry-after`; another owner is unaffected, and a closed one makes room.

    Source: WebSocket mode guide, "Endpoint and handshake".
    """
    server = await start(limits={"connections_per_owner_max": 1}, **KEYS)
    async with server.connect(key="key-a") as socket:
        response = await refused_upgrade(server, key="key-a")
        assert (response.status_code, response.headers["retry-after"]) == (429, "10")
        async with server.connect(key="key-b") as other:
            await other.completed()
        await socket.completed()
    await until(lambda: server.app._guard._connections.total() == 0)
    async with server.connect(key="key-a") as socket:
        await socket.completed()


async def test_the_upgrade_names_server_and_request(server):
    """The 101 carries `openline-version` and `x-request-id`, and selects no subprotocol.

    Source: WebSocket mode guide, "Endpoint and handshake".
    """
    async with server.connect() as socket:
        headers = socket.connection.response.headers
    assert headers["x-request-id"].startswith("req_")
    assert headers["openline-version"]
    assert "sec-websocket-protocol" not in headers


async def test_codex_s_handshake_is_accepted(server):
    """Neither `OpenAI-Beta` nor any of Codex's own headers refuses an upgrade.

    Source: WebSocket mode guide, "Endpoint and handshake".
    """
    headers = {
        "OpenAI-Beta": "responses_websockets=2026-02-06, something_else=v9",
        "session-id": "0198",
        "originator": "codex_cli_rs",
        "x-codex-turn-state": "opaque",
        "x-responsesapi-include-timing-metrics": "true",
    }
    async with server.connect(headers=headers, key="any") as socket:
        await socket.completed()
