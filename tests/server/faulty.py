"""A server in front of upstreams at which everything can be wrong, and how a turn ends there, as its client sees it."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp

from engines.fake_upstream import FakeUpstream, fake_upstream
from engines.faults import BOUNDS, CANARY, KEY, Fault, Faulty
from openline.config import UpstreamSettings
from openline.engines.opening import open_router
from openline.protocol.errors import ERRORS
from openline.protocol.states import TERMINAL_EVENTS
from server.running import ENDS, Running, Socket, read_sse, running, until

KINDS = ("chat", "responses")
TRANSPORTS = ("websocket", "sse", "json")
TLS = Path(__file__).parent / "tls"
CLIENT_KEY = "client-key"
# Far above every bound of time that a turn can meet in these tests, even on a busy machine.
TURN_SECONDS_MAX = 30.0
NO_TIMEOUT = aiohttp.ClientTimeout(total=None)  # but for that


@dataclass
class End:
    """How a turn ended.

    Attributes:
        code: of its error; None if it completed.
        status: of its refusal; None if it was none.
        retry_after: the header of its refusal.
        message: of its error.
        text: all that the client got.
    """

    code: str | None
    status: int | None = None
    retry_after: str | None = None
    message: str = ""
    text: str = ""


class Footprint(NamedTuple):
    """How many there are in this process, those of clients and upstreams included."""

    tasks: int
    descriptors: int


def footprint() -> Footprint:
    return Footprint(len(asyncio.all_tasks()), len(list(Path("/proc/self/fd").iterdir())))


@dataclass
class Scene:
    """A server whose models are called like the kinds of upstreams, and some like faults of whole upstreams."""

    server: Running
    scripts: dict[str, Faulty]
    upstreams: list[FakeUpstream]
    numbers: Any = field(default_factory=itertools.count)

    def line(self, transport: str) -> Any:
        """What a turn needs of a connection: a socket, or nothing."""
        return self.server.connect(key=CLIENT_KEY) if transport == "websocket" else nullcontext()

    async def turn(self, kind: str, name: str, transport: str, line: Socket | None) -> tuple[End, int]:
        """One turn that meets a fault; its end, and how many requests the upstream got for it."""
        turn_id = f"{kind}-{next(self.numbers)}"
        end = await self.ask(kind, f"fault={name} turn={turn_id}", transport, line)
        return end, self.scripts[kind].sent[turn_id] if kind in self.scripts else 0

    async def ask(self, model: str, text: str, transport: str, line: Socket | None) -> End:
        """One turn."""
        create = {"model": model, "store": False, "input": text}
        async with asyncio.timeout(TURN_SECONDS_MAX):
            if line is not None:
                return end_of(await next_turn(line, create))
            return await self._post({**create, "stream": transport == "sse"})

    async def _post(self, create: dict[str, Any]) -> End:
        answer = await self.server.request("POST", "/v1/responses", key=CLIENT_KEY, json=create, timeout=NO_TIMEOUT)
        text = answer.body.decode()
        if answer.status != 200:
            error = answer.json["error"]
            assert set(error) == {"message", "type", "param", "code"}
            return End(error["code"], answer.status, answer.headers.get("retry-after"), error["message"], text)
        if create["stream"]:
            return end_of(read_sse(answer.body))
        assert answer.json["status"] in {"completed", "incomplete"}
        return End(None, text=text)

    async def nothing_is_left(self, before: Footprint) -> None:
        """No turn, no task and no descriptor: neither of a client's connection nor of one to an upstream."""
        await self.server.http.close()
        await self.server.idle()
        for upstream in self.upstreams:
            upstream.hang_up()
        try:
            await until(lambda: footprint() == before)
        except TimeoutError:
            raise AssertionError(f"{footprint()} are left, of {before}") from None


@asynccontextmanager
async def scene(
    folder: Path, *, keep_alive: bool = False, created_wait_seconds_max: float = 60.0, **bounds: float
) -> AsyncIterator[Scene]:
    """With a key, so that clients are strangers.

    Args:
        keep_alive: whether upstreams take more than one request on a connection.
        created_wait_seconds_max: the server's; so long that a slow refusal is still one, unless it is said otherwise.
        bounds: of the upstreams, beside `BOUNDS`.
    """
    async with AsyncExitStack() as stack:
        scripts = {kind: Faulty(kind) for kind in KINDS}
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(TLS / "localhost.pem", TLS / "localhost.key")
        chat, responses, untrusted = [
            await stack.enter_async_context(fake_upstream(scripts[kind], keep_alive=keep_alive, ssl=context))
            for kind, context in (("chat", None), ("responses", None), ("chat", tls))
        ]
        closed = stack.enter_context(socket.socket())
        closed.bind(("127.0.0.1", 0))
        urls = {
            "chat": chat.url,
            "responses": responses.url,
            "untrusted": untrusted.url,
            "no-tls": chat.url.replace("http:", "https:"),
            "refused": f"http://127.0.0.1:{closed.getsockname()[1]}/v1",
            "unknown-host": "http://nowhere.invalid/v1",
        }
        settings = [
            UpstreamSettings(
                kind="responses" if name == "responses" else "chat",
                url=url,
                models=(name,),
                profile="generic",
                **{**BOUNDS, **bounds},
            )
            for name, url in urls.items()
        ]
        router = open_router(settings, show_detail=False)
        limits = {"created_wait_seconds_max": created_wait_seconds_max}
        server = await stack.enter_async_context(
            running(folder, engine=router, keys={CLIENT_KEY: "team"}, limits=limits)
        )
        yield Scene(server, scripts, [chat, responses, untrusted])


async def next_turn(line: Socket, create: dict[str, Any]) -> list[dict[str, Any]]:
    """As `Socket.turn`, which does not wait for as long as a stall may take."""
    await line.create(**create)
    frames = [json.loads(await line.connection.recv())]
    while frames[-1]["type"] not in ENDS:
        frames.append(json.loads(await line.connection.recv()))
    return frames


def end_of(events: list[dict[str, Any]]) -> End:
    """Of a stream: there is exactly one end, and it is the last event."""
    assert [event["type"] in ENDS for event in events] == [False] * (len(events) - 1) + [True]
    last, text = events[-1], repr(events)
    if last["type"] == "error":
        assert len(events) == 1
        headers = last.get("headers", {})
        assert headers == last["error"].get("headers", {})
        return End(last["error"]["code"], last["status"], headers.get("retry-after"), last["error"]["message"], text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert last["type"] in TERMINAL_EVENTS
    response = last["response"]
    assert (response["error"] is not None) == (response["status"] == "failed")
    if response["error"] is None:
        return End(None, text=text)
    return End(response["error"]["code"], message=response["error"]["message"], text=text)


def differences(fault: Fault, transport: str, end: End, sent: int, *, pooled: bool = False) -> list[str]:
    """What of an end is not as the fault says.

    Args:
        pooled: whether its connection to the upstream may have been used before.
    """
    refused = None if fault.code is None else ERRORS[fault.code].status
    begun = None if transport != "json" else refused
    statuses = {None: {begun, refused}, True: {begun}, False: {refused}}[fault.begun]
    wrong = []
    if end.code != fault.code or end.status not in statuses:
        wrong.append(f"ended as {end.code} with status {end.status}, not {fault.code} with {statuses}: {end.message}")
    if end.status is not None and end.retry_after != fault.retry_after:
        wrong.append(f"retry-after is {end.retry_after}, not {fault.retry_after}")
    if fault.retry_after is not None and f"try again in {fault.retry_after}s" not in end.message:
        wrong.append(f"the message does not say when to try again: {end.message}")
    if sent not in ({fault.sent, fault.on_pooled or fault.sent} if pooled else {fault.sent}):
        wrong.append(f"the upstream got {sent} requests, not {fault.sent}")
    if CANARY in end.text or KEY in end.text:
        wrong.append(f"the upstream's words came through: {end.text[:500]}")
    return wrong
