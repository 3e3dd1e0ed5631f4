"""The real server on a real socket, in the test's event loop, and the clients that talk to it.

Nothing of it is replaced but uvicorn's signal handlers and its wait for them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
from websockets.asyncio.client import ClientConnection, connect

from openline.config import (
    Config,
    KeySettings,
    LimitSettings,
    ResumeSettings,
    ServerSettings,
    StoreSettings,
    UpstreamSettings,
)
from openline.engines.engine import Engine
from openline.engines.router import Router, Upstream
from openline.engines.scripted import ScriptedEngine
from openline.observe import LogHook
from openline.protocol.states import TERMINAL_EVENTS
from openline.server.runner import Server, bind, build, uvicorn_config
from openline.state.opening import open_store
from openline.state.store import Store

WAIT_SECONDS_MAX = 5.0
ENDS = TERMINAL_EVENTS | {"error"}


class Answer(NamedTuple):
    """A whole HTTP answer."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[dict[str, Any]]:
        return read_sse(self.body)


class Socket:
    """A WebSocket client's end."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def send(self, **frame: Any) -> None:
        await self.connection.send(json.dumps(frame))

    async def create(self, **frame: Any) -> None:
        await self.send(**{"type": "response.create", "model": "scripted-text", "input": "Hello.", **frame})

    async def receive(self) -> dict[str, Any]:
        """The next message, which must be one JSON object in a text message."""
        async with asyncio.timeout(WAIT_SECONDS_MAX):
            text = await self.connection.recv()
        assert isinstance(text, str), "a server sends text messages only"
        frame = json.loads(text)
        assert isinstance(frame, dict)
        return frame

    async def until(self, *types: str) -> list[dict[str, Any]]:
        """Every message up to the first of these types."""
        frames = [await self.receive()]
        while frames[-1]["type"] not in types:
            frames.append(await self.receive())
        return frames

    async def rest(self) -> list[dict[str, Any]]:
        """What is left of the running turn."""
        return await self.until(*ENDS)

    async def answer_to(self, frame: dict[str, Any]) -> list[dict[str, Any]]:
        """Everything that answers one frame."""
        await self.send(**frame)
        return await self.rest()

    async def turn(self, **frame: Any) -> list[dict[str, Any]]:
        """One create and everything that answers it."""
        await self.create(**frame)
        return await self.rest()

    async def completed(self, **frame: Any) -> dict[str, Any]:
        """One create's response, which must complete."""
        last = (await self.turn(**frame))[-1]
        assert last["type"] == "response.completed", last
        return last["response"]

    async def refused(self, **frame: Any) -> dict[str, Any]:
        """One create's error, which must come without any other event."""
        frames = await self.turn(**frame)
        assert [frame["type"] for frame in frames] == ["error"], frames
        return frames[0]

    async def is_silent(self) -> bool:
        """Whether the server has sent nothing: a pong overtakes no message."""
        for _ in range(2):
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                await (await self.connection.ping())
        try:
            async with asyncio.timeout(0.005):
                message = await self.connection.recv()
        except TimeoutError:
            return True
        raise AssertionError(f"not silent: {message!r}")


class Running:
    """A server that runs, and ways to reach it."""

    def __init__(self, config: Config, database: Path) -> None:
        self.config = config
        self.database = database
        self.address = ""
        self.registry: Any = None
        self.app: Any = None
        self.http: aiohttp.ClientSession

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    @asynccontextmanager
    async def run(
        self, engine: Engine | Router, store: Store | None, kernel_buffer_bytes: int | None
    ) -> AsyncIterator[Running]:
        config = self.config
        listening = bind(config)
        if kernel_buffer_bytes is not None:  # connections inherit it
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, kernel_buffer_bytes)
        host, port = listening.getsockname()[:2]
        self.address = f"{host}:{port}"
        store = store or open_store(config.store.url)
        settings = config.upstreams[0] if config.upstreams else UpstreamSettings(kind="scripted")
        router = engine if isinstance(engine, Router) else Router([Upstream(settings, engine)])
        self.app, self.registry = build(config, router, store, LogHook())
        options = uvicorn_config(config, self.app)
        server = Server(options, lambda: None, self.app.drain)
        server.lifespan = options.lifespan_class(options)
        await server.startup([listening])
        timeout = aiohttp.ClientTimeout(total=WAIT_SECONDS_MAX)
        try:
            async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as self.http:
                yield self
        finally:
            await _stop(server, listening)
            await self.registry.close()
            await router.close()
            await store.close()

    @asynccontextmanager
    async def connect(self, path: str = "/v1/responses", **options: Any) -> AsyncIterator[Socket]:
        """A WebSocket of the `websockets` library; `key` is sent as a bearer token."""
        headers = {**_authorization(options.pop("key", None)), **options.pop("headers", {})}
        compression = "deflate" if options.pop("offer_deflate", False) else None
        async with connect(
            f"ws://{self.address}{path}",
            additional_headers=headers,
            compression=compression,
            max_size=None,
            ping_interval=None,
            close_timeout=1,
            proxy=None,
            **options,
        ) as connection:
            yield Socket(connection)

    async def request(self, method: str, path: str, **options: Any) -> Answer:
        """Any request and its whole answer; `key` is sent as a bearer token."""
        headers = {**_authorization(options.pop("key", None)), **options.pop("headers", {})}
        async with self.http.request(
            method, self.url + path, headers=headers, allow_redirects=False, **options
        ) as answer:
            return Answer(answer.status, answer.headers, await answer.read())

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.request("GET", path, **options)

    async def post(self, path: str = "/v1/responses", key: str | None = None, **body: Any) -> Answer:
        """A create over HTTP."""
        body = {"model": "scripted-text", "input": "Hello.", **body}
        return await self.request("POST", path, key=key, json=body)

    @asynccontextmanager
    async def open_post(self, **body: Any) -> AsyncIterator[aiohttp.ClientResponse]:
        """A create over HTTP whose answer the test reads piece by piece, or not at all."""
        body = {"model": "scripted-text", "input": "Hello.", **body}
        async with self.http.post(f"{self.url}/v1/responses", json=body) as answer:
            yield answer

    async def idle(self) -> None:
        """Wait until no turn runs."""
        await until(lambda: len(self.registry) == 0)

    def files(self) -> bytes:
        """Every byte of the database and of SQLite's files beside it."""
        return b"".join(path.read_bytes() for path in self.database.parent.glob(f"{self.database.name}*"))


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(WAIT_SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 - that is what it is for
            await asyncio.sleep(0.001)


def make_config(database: Path, **sections: Any) -> Config:
    """A configuration: `server`, `limits`, `resume` and `upstreams` as in the file, `keys` as {key: owner}."""
    keys = [
        KeySettings(owner=owner, sha256=hashlib.sha256(key.encode()).hexdigest())
        for key, owner in sections.get("keys", {}).items()
    ]
    return Config(
        server=ServerSettings(**{"port": 0, **sections.get("server", {})}),
        limits=LimitSettings(**sections.get("limits", {})),
        resume=ResumeSettings(**sections.get("resume", {})),
        store=StoreSettings(sections.get("store_url", f"sqlite:{database}")),
        upstreams=(UpstreamSettings(kind="scripted", **sections.get("upstream", {})),),
        keys=tuple(keys),
    )


@asynccontextmanager
async def running(
    folder: Path,
    *,
    engine: Engine | Router | None = None,
    store: Store | None = None,
    kernel_buffer_bytes: int | None = None,
    **sections: Any,
) -> AsyncIterator[Running]:
    """A server with a SQLite file in `folder`, and the scripted engine unless the test brings its own, or several."""
    database = folder / "openline.db"
    config = make_config(database, **sections)
    server = Running(config, database)
    async with server.run(engine or ScriptedEngine(config.upstreams[0]), store, kernel_buffer_bytes):
        yield server


async def _stop(server: Server, listening: socket.socket) -> None:
    """Stop listening and cut whatever a test has left open; uvicorn's own shutdown has fixed waits."""
    for listener in server.servers:
        listener.close()
    listening.close()
    state = server.server_state
    for connection in list(state.connections):
        connection.transport.abort()
    await until(lambda: not state.connections and not state.tasks)


def _authorization(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


_SSE_EVENT = re.compile(rb"event: ([\w.:/-]+)\ndata: (\{.*\})\n\n")


def read_sse(body: bytes) -> list[dict[str, Any]]:
    """A whole event stream, strictly: `event` equals `type`, and `[DONE]` stands at the end and only there.

    Source: Responses streaming reference.
    """
    assert body.endswith(b"data: [DONE]\n\n"), body[-80:]
    rest = body.removesuffix(b"data: [DONE]\n\n")
    events = []
    while rest:
        match = _SSE_EVENT.match(rest)
        assert match, rest[:200]
        event = msgspec.json.decode(match[2])
        assert event["type"] == match[1].decode()
        events.append(event)
        rest = rest[match.end() :]
    return events
