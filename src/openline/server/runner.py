"""Builds the server out of its configuration and runs it until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import ssl
import time
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack, suppress
from types import FrameType
from typing import Final

import uvicorn

from openline.config import Config, ConfigError, is_loopback
from openline.engines.opening import load_models, open_router
from openline.engines.router import Router
from openline.observe import Hook, LogHook
from openline.server.app import App
from openline.server.frames import EventsProtocol
from openline.server.guard import Guard
from openline.state.opening import start_store
from openline.state.retention import retain
from openline.state.sealing import open_seal
from openline.state.store import Store
from openline.turns.bind import Parts
from openline.turns.leases import keep_leases
from openline.turns.registry import Registry

_log: Final = logging.getLogger("openline.server")
_BACKLOG: Final = 2048
_FLUSH_SECONDS_MAX: Final = 5  # all has been said by then; this is for slow clients to take it
_CUT_SECONDS_MAX: Final = 1  # for tasks to see that their client was cut
_KEEP_ALIVE_SECONDS: Final = 75  # as nginx; an agent whose tool runs for a minute comes back on the same connection


def new_id(prefix: str) -> str:
    """An unguessable id: 192 random bits, as ids are all that tells one response from another's."""
    return f"{prefix}_{secrets.token_hex(24)}"


def bind(config: Config) -> socket.socket:
    """The socket to listen on.

    Raises:
        ConfigError: the address cannot be used, or is open to others while no key is configured.
    """
    host, port = config.server.host, config.server.port
    if not config.keys and not is_loopback(host):
        remedy = "set OPENLINE_API_KEY or add [[keys]], or listen on 127.0.0.1"
        raise ConfigError(f"server.host is '{host}', which others can reach, and no key is configured: {remedy}.")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, proto)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a host name"
        raise ConfigError(f"server.host is '{host}': {reason}.") from None
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"server.port {port} on {host} cannot be used: {error.strerror}. Choose another with --port."
        ) from None
    return listening


def run(config: Config, listening: socket.socket, on_started: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        listening: what `bind` gave.
        on_started: called once connections are accepted.

    Raises:
        ConfigError: the store, an upstream or the TLS files cannot be used.
    """
    loop_factory = uvicorn.Config(_no_app, loop="auto", log_config=None).get_loop_factory()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_serve(config, listening, on_started))


async def _serve(config: Config, listening: socket.socket, on_started: Callable[[], None]) -> None:
    _raise_descriptor_limit()
    async with AsyncExitStack() as stack:  # what is opened last closes first
        store = await start_store(config.store)
        stack.push_async_callback(store.close)
        router = open_router(config.upstreams, show_detail=not config.keys)
        stack.push_async_callback(router.close)
        app, registry = build(config, router, store, LogHook())
        for work in (
            router.check(),  # so that the first turn has its upstream's form already
            keep_leases(registry.held, registry.parts),
            retain(store, config.store.retain_days, time.time),
        ):
            stack.callback(asyncio.ensure_future(work).cancel)
        stack.push_async_callback(registry.close)
        load_models(router)
        await Server(uvicorn_config(config, app), on_started, app.drain).serve(sockets=[listening])


def build(
    config: Config,
    router: Router,
    store: Store,
    hook: Hook,
    *,
    unix_time: Callable[[], float] = time.time,
    new_id: Callable[[str], str] = new_id,
) -> tuple[App, Registry]:
    """The app over its three seams, and the registry of its turns, to be closed before them.

    Args:
        unix_time: the wall clock, in seconds.
        new_id: makes an unguessable id with a prefix.

    Raises:
        ConfigError: the sealing key cannot be used.
    """
    limits = config.limits
    seal = open_seal(config.store.url, config.store.sealing_key_file, os.environ.get("OPENLINE_SEALING_KEY", ""))
    parts = Parts(
        router=router,
        store=store,
        hook=hook,
        unix_time=unix_time,
        new_id=new_id,
        created_wait_seconds_max=limits.created_wait_seconds_max,
        keepalive_seconds=limits.keepalive_seconds,
        resume=config.resume,
        seal=seal,
    )
    registry = Registry(parts)
    guard = Guard(
        config.keys,
        allowed_origins=config.server.allowed_origins,
        loopback_only=is_loopback(config.server.host) and not config.keys,
        connections_per_owner_max=config.limits.connections_per_owner_max,
    )
    websocket = config.server.websocket
    app = App(guard=guard, registry=registry, router=router, store=store, limits=config.limits, websocket=websocket)
    return app, registry


class Server(uvicorn.Server):
    """A uvicorn server that says when it accepts connections, and that lets what runs end before it stops.

    uvicorn itself closes every socket at the signal, in mid-turn too.

    Args:
        on_started: called once connections are accepted.
        drain: waits for what has to end first, until its event says to hurry.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        on_started: Callable[[], None],
        drain: Callable[[asyncio.Event], Coroutine[object, object, None]],
    ) -> None:
        super().__init__(config)
        self._on_started = on_started
        self._drain = drain
        self._draining: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start listening, then say so."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._on_started()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A first signal drains, a second one cancels what still runs, a third one waits for nothing; exit code 0."""
        del sig, frame
        self._signals += 1
        if self._loop is None:  # nothing runs yet; uvicorn looks once it has started
            self.should_exit = True
        elif self._signals == 1:
            self._loop.call_soon_threadsafe(self._start_drain)
        elif self._signals == 2:
            self._loop.call_soon_threadsafe(self._hurry.set)
        else:
            self.should_exit = self.force_exit = True

    def _start_drain(self) -> None:
        self._draining = asyncio.ensure_future(self._drain(self._hurry))
        self._draining.add_done_callback(self._drained)

    def _drained(self, draining: asyncio.Task[None]) -> None:
        self.should_exit = True
        if not draining.cancelled() and (error := draining.exception()) is not None:
            _log.error("draining failed", exc_info=error)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close every connection; a client that has not read by then what was written for it is cut."""
        cutting = asyncio.ensure_future(self._cut_later())
        await super().shutdown(sockets)
        cutting.cancel()
        self._cut()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=_CUT_SECONDS_MAX)

    async def _cut_later(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_SECONDS_MAX):
                await self._hurry.wait()
        self._cut()

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def uvicorn_config(config: Config, app: App) -> uvicorn.Config:
    """uvicorn, set up as this server needs it.

    Raises:
        ConfigError: the TLS files cannot be used.
    """
    server, limits = config.server, config.limits
    options = uvicorn.Config(
        app,
        http="auto",
        ws=EventsProtocol,
        ws_max_size=limits.message_bytes_max,
        ws_ping_interval=limits.ping_seconds,
        ws_ping_timeout=limits.pong_seconds_max,
        ws_per_message_deflate=server.deflate,
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nothing reads a client's address
        date_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_FLUSH_SECONDS_MAX + _CUT_SECONDS_MAX,
        ssl_certfile=server.tls_cert or None,
        ssl_keyfile=server.tls_key or None,
    )
    try:
        options.load()
    except (OSError, ssl.SSLError) as error:
        message = f"server.tls_cert '{server.tls_cert}' and server.tls_key '{server.tls_key}' cannot be used: {error}."
        raise ConfigError(message) from None
    return options


async def _no_app(*_: object) -> None:
    """Stands in: uvicorn wants an app before it tells which event loop it would take."""


def _raise_descriptor_limit() -> None:
    """As many sockets as the system lets us have; Windows has no such limit to raise."""
    try:
        import resource  # noqa: PLC0415 - not on Windows
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
