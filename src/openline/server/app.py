"""The one ASGI app: the hot path is answered here, everything else is routed.

`/v1/responses`, both transports, is a plain ASGI callable, because a framework's
WebSocket and SSE classes cost more than the turn; plain routes go through Starlette.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from typing import Final

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from openline.config import LimitSettings
from openline.engines.router import Router
from openline.protocol.connection import Limits
from openline.protocol.errors import ProtocolError
from openline.server.asgi import Receive, Scope, Send, answer_headers, send_error
from openline.server.guard import Guard
from openline.server.http import create_response
from openline.server.websocket import Socket
from openline.state.store import Store, StoreUnavailable
from openline.turns.registry import Registry

_RESPONSES_PATHS: Final = frozenset({"/v1/responses", "/responses", "/openai/v1/responses"})
_PREFIXES: Final = ("/v1", "", "/openai/v1")


class App:
    """What uvicorn runs.

    Args:
        guard: decides who comes in.
        websocket: whether WebSocket mode is on; without it an upgrade gets 426, at which Codex goes on over HTTP.
    """

    def __init__(
        self, *, guard: Guard, registry: Registry, router: Router, store: Store, limits: LimitSettings, websocket: bool
    ) -> None:
        self._guard = guard
        self._registry = registry
        self._limits = limits
        self._websocket = websocket
        self._lanes = Limits(limits.lanes_named_max, limits.responses_active_max, limits.creates_queued_max)
        self._routes = _routes(Endpoints(guard, router, store))

    def __repr__(self) -> str:
        return f"<App {self._guard!r} {self._registry!r}>"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection or request, as ASGI gives it."""
        kind = scope["type"]
        if kind == "websocket":
            await self._serve_socket(scope, receive, send)
        elif kind == "http" and scope["method"] == "POST" and scope["path"] in _RESPONSES_PATHS:
            await self._create(scope, receive, send)
        else:
            await self._routes(scope, receive, send)

    async def _create(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_request_id()
        try:
            owner = self._guard.admit(scope["headers"])
        except ProtocolError as error:
            await send_error(send, error, request_id)
            return
        await create_response(
            self._registry,
            receive,
            send,
            owner=owner,
            request_id=request_id,
            message_bytes_max=self._limits.message_bytes_max,
            send_buffer_bytes_max=self._limits.send_buffer_bytes_max,
        )

    async def _serve_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = new_request_id()
        await receive()  # websocket.connect
        try:
            owner = self._admit_socket(scope)
        except ProtocolError as error:
            await send_error(send, error, request_id, prefix="websocket.http.response")
            # uvicorn says so twice, for the answer and for the connection; an app that returns before
            # the second it logs as one that never answered.
            await receive()
            await receive()
            return
        try:
            await send({"type": "websocket.accept", "headers": answer_headers(request_id)})
            await Socket(
                self._registry,
                receive,
                send,
                owner=owner,
                request_id=request_id,
                limits=self._lanes,
                send_buffer_bytes_max=self._limits.send_buffer_bytes_max,
            ).serve()
        finally:
            self._guard.disconnect(owner)

    def _admit_socket(self, scope: Scope) -> str:
        if scope["path"] not in _RESPONSES_PATHS:
            raise _no_such_path(scope["path"])
        owner = self._guard.admit(scope["headers"])
        if not self._websocket:
            raise ProtocolError("websocket_disabled", "WebSocket mode is off on this server: use HTTP.")
        self._guard.connect(owner)
        return owner


class Endpoints:
    """The plain HTTP routes."""

    def __init__(self, guard: Guard, router: Router, store: Store) -> None:
        self._guard = guard
        self._router = router
        self._store = store

    async def responses_index(self, request: Request) -> Response:
        """`GET /v1/responses` without an upgrade: there is no list of responses."""
        self._guard.admit(request.headers.raw)
        error = ProtocolError("method_not_allowed", "Only POST, or a WebSocket upgrade, is answered here.")
        error.headers["allow"] = "POST"
        raise error

    async def get_response(self, request: Request) -> Response:
        """`GET /v1/responses/{id}`: a stored response."""
        owner = self._guard.admit(request.headers.raw)
        response_id: str = request.path_params["response_id"]
        turn = await self._store.get(owner, response_id)
        if turn is None:
            raise _no_such_response(response_id)
        return _json_bytes(turn.response)

    async def delete_response(self, request: Request) -> Response:
        """`DELETE /v1/responses/{id}`."""
        owner = self._guard.admit(request.headers.raw)
        response_id: str = request.path_params["response_id"]
        if not await self._store.delete(owner, response_id):
            raise _no_such_response(response_id)
        return _json({"id": response_id, "object": "response", "deleted": True})

    async def list_models(self, request: Request) -> Response:
        """`GET /v1/models`. The empty `models` is for Codex, which asks here for a catalogue of its own."""
        self._guard.admit(request.headers.raw)
        data = [_model(model) for model in await self._router.models()]
        return _json({"object": "list", "data": data, "models": []})

    async def get_model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`."""
        self._guard.admit(request.headers.raw)
        model_id: str = request.path_params["model_id"]
        for model in await self._router.models():
            if model.id == model_id:
                return _json(_model(model))
        raise ProtocolError("model_unknown", f"The model '{model_id}' does not exist.", param="model")

    async def healthz(self, _: Request) -> Response:
        """The process answers."""
        return _json({"status": "ok"})

    async def readyz(self, _: Request) -> Response:
        """Whether a turn could succeed now: every upstream answers, or 503 with what is wrong."""
        found = await self._router.check()
        ready = all(problem is None for problem in found.values())
        upstreams = {name: "ok" if problem is None else problem for name, problem in found.items()}
        return _json({"status": "ready" if ready else "not ready", "upstreams": upstreams}, 200 if ready else 503)


def new_request_id() -> str:
    """What the client sees as `x-request-id` and the log names."""
    return f"req_{secrets.token_hex(12)}"


def _routes(endpoints: Endpoints) -> Starlette:
    routes = [Route("/healthz", endpoints.healthz), Route("/readyz", endpoints.readyz)]
    for prefix in _PREFIXES:
        routes += [
            Route(f"{prefix}/responses", endpoints.responses_index, methods=["GET"]),
            Route(f"{prefix}/responses/{{response_id}}", endpoints.get_response, methods=["GET"]),
            Route(f"{prefix}/responses/{{response_id}}", endpoints.delete_response, methods=["DELETE"]),
            Route(f"{prefix}/models", endpoints.list_models, methods=["GET"]),
            Route(f"{prefix}/models/{{model_id:path}}", endpoints.get_model, methods=["GET"]),
        ]
    handlers = {ProtocolError: _answer_error, StoreUnavailable: _answer_error, 404: _not_found, 405: _wrong_method}
    return Starlette(routes=routes, exception_handlers=handlers)


async def _answer_error(_: Request, error: Exception) -> Response:
    if isinstance(error, StoreUnavailable):
        error = ProtocolError("store_unavailable", f"The store cannot be used now: {error}.")
    assert isinstance(error, ProtocolError), "only these two are routed here"
    response = _json(error.envelope(), error.status)
    response.headers.update(error.headers)
    return response


async def _not_found(request: Request, _: Exception) -> Response:
    return await _answer_error(request, _no_such_path(request.url.path))


async def _wrong_method(request: Request, _: Exception) -> Response:
    path = request.url.path
    methods = {"POST"} if path in _RESPONSES_PATHS else _methods_at(path, request.app.routes)
    message = f"{request.method} is not answered at {path}."
    allowed = {"allow": ", ".join(sorted(methods))}  # RFC 9110 §15.5.6
    return await _answer_error(request, ProtocolError("method_not_allowed", message, headers=allowed))


def _methods_at(path: str, routes: Iterable[BaseRoute]) -> set[str]:
    matching = [route for route in routes if isinstance(route, Route) and route.path_regex.match(path)]
    return {method for route in matching for method in route.methods or ()}


def _no_such_path(path: str) -> ProtocolError:
    return ProtocolError("not_found", f"Nothing is served at '{path}'. The API is under /v1.")


def _no_such_response(response_id: str) -> ProtocolError:
    return ProtocolError("not_found", f"Response with id '{response_id}' not found.")


def _model(model: object) -> dict[str, object]:
    return {**msgspec.to_builtins(model), "object": "model"}


def _json(value: object, status: int = 200) -> Response:
    return _json_bytes(msgspec.json.encode(value), status)


def _json_bytes(body: bytes, status: int = 200) -> Response:
    headers = {name.decode(): value.decode() for name, value in answer_headers(new_request_id())}
    return Response(body, status, headers, "application/json")
