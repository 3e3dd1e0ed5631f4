"""The one ASGI app: the hot path is answered here, everything else is routed.

`/v1/responses`, both transports, is a plain ASGI callable, because a framework's
WebSocket and SSE classes cost more than the turn; plain routes go through Starlette.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from openline.config import LimitSettings
from openline.engines.router import Router
from openline.protocol.connection import Limits
from openline.protocol.errors import ProtocolError
from openline.server import cors, frames
from openline.server.asgi import ClientGone, Receive, Scope, Send, error_headers, send_error
from openline.server.catalogue import catalogue, openai_entry
from openline.server.compacting import Compacting
from openline.server.conversations import Conversations
from openline.server.guard import Guard, header
from openline.server.http import create_response
from openline.server.plain import RouteList, json_answer, json_bytes_answer, new_request_id
from openline.server.stored import StoredResponses
from openline.server.tokens import InputTokens
from openline.server.websocket import Socket, SocketLimits
from openline.state.store import Store, StoreUnavailable, store_unavailable
from openline.turns.registry import Registry

_RESPONSES_PATHS: Final = frozenset({"/v1/responses", "/responses", "/openai/v1/responses"})
_HURRIED_SECONDS_MAX: Final = 0.5  # the same as the last words, for an operator who does not want to wait
_PREFIXES: Final = ("/v1", "", "/openai/v1")
_log: Final = logging.getLogger("openline.server")


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
        self._socket_limits = _socket_limits(limits)
        self._sockets: set[Socket] = set()
        self._clients = 0  # open sockets, and requests that are not answered yet
        self._no_clients = asyncio.Event()
        self._no_clients.set()
        self._draining = False
        endpoints = Endpoints(guard, router, is_draining=lambda: self._draining)
        more = registry.parts, limits.message_bytes_max
        groups = (
            Compacting(guard, *more).routes(),
            InputTokens(guard, *more).routes(),
            Conversations(guard, *more).routes(),
            StoredResponses(guard, registry, store).routes(),
        )
        self._routes = _routes(endpoints, groups)

    def __repr__(self) -> str:
        return f"<App {self._guard!r} {self._registry!r}>"

    async def drain(self, hurry: asyncio.Event) -> None:
        """Start nothing any more, and wait until what runs has ended, was read, and every socket is closed.

        What takes longer than `drain_seconds_max` is cancelled, and still gets its terminal event.

        Args:
            hurry: once it is set, what still runs is cancelled at once; it is set at the end if a client is left.

        Source: WebSocket mode guide, "Connection life".
        """
        self._draining = True
        for socket in list(self._sockets):
            socket.retire(_shutting_down(), self._limits.drain_seconds_max)
        ended = asyncio.ensure_future(self._ended())
        hurried = asyncio.ensure_future(hurry.wait())
        first = asyncio.FIRST_COMPLETED
        await asyncio.wait({ended, hurried}, timeout=self._limits.drain_seconds_max, return_when=first)
        await self._registry.close()
        await asyncio.wait({ended, hurried}, timeout=frames.LAST_WORDS_SECONDS_MAX, return_when=first)
        if hurry.is_set():
            await asyncio.wait({ended}, timeout=_HURRIED_SECONDS_MAX)
        if not ended.done():
            hurry.set()  # who has not read by now does not
        ended.cancel()
        hurried.cancel()

    async def _ended(self) -> None:
        await self._registry.ended()
        await self._no_clients.wait()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection or request, as ASGI gives it."""
        self._clients += 1
        self._no_clients.clear()
        try:
            await self._serve(scope, receive, send)
        finally:
            self._clients -= 1
            if not self._clients:
                self._no_clients.set()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        kind = scope["type"]
        origin = self._guard.listed_origin(scope["headers"])
        if kind == "http" and origin is not None:
            send = cors.answering(send, origin)
            if scope["method"] == "OPTIONS":
                await cors.answer_preflight(scope, send)
                return
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
            self._require_open()
        except ProtocolError as error:
            await send_error(send, error, request_id)
            return
        await create_response(
            self._registry,
            receive,
            send,
            owner=owner,
            request_id=request_id,
            idempotency_key=header(scope["headers"], b"idempotency-key"),
            content_length=int(header(scope["headers"], b"content-length") or 0),
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
        limits = self._socket_limits
        socket = Socket(self._registry, receive, send, owner=owner, request_id=request_id, limits=limits)
        self._sockets.add(socket)
        try:
            await socket.serve()
        finally:
            self._sockets.discard(socket)
            self._guard.disconnect(owner)

    def _admit_socket(self, scope: Scope) -> str:
        if scope["path"] not in _RESPONSES_PATHS:
            raise _no_such_path(scope["path"])
        owner = self._guard.admit(scope["headers"])
        if not self._websocket:
            raise ProtocolError("websocket_disabled", "WebSocket mode is off on this server: use HTTP.")
        self._require_open()
        self._guard.connect(owner)
        return owner

    def _require_open(self) -> None:
        if self._draining:
            raise _shutting_down()


class Endpoints:
    """The plain HTTP routes."""

    def __init__(self, guard: Guard, router: Router, *, is_draining: Callable[[], bool]) -> None:
        self._guard = guard
        self._is_draining = is_draining
        self._router = router

    def routes(self) -> RouteList:
        """Below `/v1`."""
        return [
            ("GET", "/models", self.list_models),
            ("GET", "/models/{model_id:path}", self.get_model),
        ]

    async def list_models(self, request: Request) -> Response:
        """`GET /v1/models`: OpenAI's list and Codex's, with a tag to ask by whether they are still the same."""
        self._guard.admit(request.headers.raw)
        listed = catalogue(await self._router.models())
        if _is_known(listed.etag, request.headers.get("if-none-match", "")):
            response = json_bytes_answer(b"", 304)
            del response.headers["content-type"]
        else:
            response = json_bytes_answer(listed.body)
        response.headers["etag"] = listed.etag
        return response

    async def get_model(self, request: Request) -> Response:
        """`GET /v1/models/{id}`."""
        self._guard.admit(request.headers.raw)
        model_id: str = request.path_params["model_id"]
        for model in await self._router.models():
            if model.id == model_id:
                return json_answer(openai_entry(model))
        raise ProtocolError("model_unknown", f"The model '{model_id}' does not exist.", param="model")

    async def healthz(self, _: Request) -> Response:
        """The process answers."""
        return json_answer({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """Whether a turn could succeed now: every upstream answers, or 503 with what is wrong."""
        if self._is_draining():
            return json_answer({"status": "shutting down"}, 503)
        found = await self._router.check()
        ready = all(problem is None for problem in found.values())
        answer: dict[str, object] = {"status": "ready" if ready else "not ready"}
        if self._may_see_upstreams(request):
            answer["upstreams"] = {name: problem or "ok" for name, problem in found.items()}
        return json_answer(answer, 200 if ready else 503)

    def _may_see_upstreams(self, request: Request) -> bool:
        # A load balancer asks without a key; where the models run is not for everybody.
        try:
            self._guard.admit(request.headers.raw)
        except ProtocolError:
            return False
        return True


def _socket_limits(limits: LimitSettings) -> SocketLimits:
    lanes = Limits(
        limits.lanes_named_max,
        limits.responses_active_max,
        limits.creates_queued_max,
        limits.creates_queued_bytes_max,
    )
    return SocketLimits(
        lanes,
        limits.send_buffer_bytes_max,
        limits.connection_seconds_max,
        limits.age_grace_seconds_max,
        limits.steers_pending_max,
        limits.steers_pending_bytes_max,
    )


def _shutting_down() -> ProtocolError:
    message = "The server is shutting down: connect again."
    return ProtocolError("server_is_overloaded", message, headers={"retry-after": "1"})


def _routes(endpoints: Endpoints, groups: Iterable[RouteList]) -> Starlette:
    routes = [Route("/healthz", endpoints.healthz), Route("/readyz", endpoints.readyz)]
    for prefix in _PREFIXES:
        for method, path, endpoint in chain(endpoints.routes(), *groups):
            routes.append(Route(f"{prefix}{path}", endpoint, methods=[method]))
    handlers = {
        ProtocolError: _answer_error,
        StoreUnavailable: _answer_error,
        ClientGone: _gone,
        Exception: _answer_defect,
        404: _not_found,
        405: _wrong_method,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect would go where the client's `Host` says, before the guard
    return app


async def _answer_error(_: Request, error: Exception) -> Response:
    if isinstance(error, StoreUnavailable):
        error = store_unavailable(error)
    assert isinstance(error, ProtocolError), "only these two are routed here"
    response = json_answer(error.envelope(), error.status)
    response.headers.update(error_headers(error))
    return response


async def _answer_defect(_: Request, __: Exception) -> Response:
    """In the envelope as every error; what it was goes up to uvicorn, which logs its traceback."""
    request_id = new_request_id()
    _log.error("a request failed, request=%s", request_id)
    message = f"The server failed. Its log has more under request {request_id}."
    response = json_answer(ProtocolError("internal_error", message).envelope(), 500)
    response.headers["x-request-id"] = request_id
    return response


async def _gone(_: Request, __: Exception) -> Response:
    """A client that left before its body was whole: nobody reads this."""
    return Response()


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


def _is_known(etag: str, if_none_match: str) -> bool:
    """Whether a client has this already.

    Source: RFC 9110 §13.1.2: the comparison is weak, so that a proxy may have marked ours as such.
    """
    return any(tag.strip().removeprefix("W/") in {etag, "*"} for tag in if_none_match.split(","))
