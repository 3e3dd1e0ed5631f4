"""A network between clients and the server: it delays, cuts, and tells one side of it long before the other.

A connection is two pipes. Each keeps its order, as TCP does; two connections do not keep theirs. What was under way when
a connection was cut is lost. Clients reach it by the `Dial` seam, the server by ASGI. Everything that the server says
passes here, and is checked here.

Source: guarantees, "Network chaos", "Determinism".
"""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from openline.protocol import sse
from openline.protocol.states import TERMINAL_EVENTS
from openline.server import frames
from simulation.world import World

OWNERS: Final = ("zora", "quill")  # their names stand in all that they say, and in nothing else
_HALF_OPEN_SECONDS_MAX: Final = 60.0  # how long the server may take to see that its client is gone: its ping timeout
_NOTICE_SECONDS_MAX: Final = 5.0
_SHORT_SECONDS_MAX: Final = 0.05
_LONG_SECONDS_MAX: Final = 3.0
_LONG_CHANCE: Final = 0.05
_EVENT_BYTES_MAX: Final = 64 * 1024 * 1024


class Pipe:
    """One direction of a connection.

    Args:
        delay: seconds until the next message arrives, asked for each.
        deliver: takes what arrives.
    """

    def __init__(self, delay: Callable[[], float], deliver: Callable[[Any], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._delay = delay
        self._deliver = deliver
        self._arrives_at = 0.0
        self._under_way: list[asyncio.TimerHandle] = []
        self.is_cut = False

    def put(self, message: Any) -> None:
        if self.is_cut:
            return
        # One behind the other: timers of the same time may fire in any order.
        self._arrives_at = max(self._arrives_at + 1e-6, self._loop.time() + self._delay())
        self._under_way.append(self._loop.call_at(self._arrives_at, self._arrive, message))

    def cut(self) -> None:
        """What is under way is lost, and nothing comes any more."""
        self.is_cut = True
        for handle in self._under_way:
            handle.cancel()

    def _arrive(self, message: Any) -> None:
        self._under_way.pop(0)
        self._deliver(message)


class Connection:
    """One connection to the server, as both ends see it.

    Args:
        scope: of the ASGI connection that it becomes.
        lost: what the client's end hears when it is cut.
    """

    def __init__(self, network: Network, scope: dict[str, Any], lost: Any) -> None:
        self.to_client: asyncio.Queue[Any] = asyncio.Queue()
        self.is_over = False
        self._network = network
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._told = Told(network.world, owner_of(scope))
        self._to_server: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        kind: str = scope["type"]
        self._gone = {"type": f"{kind}.disconnect", "code": 1006}
        if kind == "websocket":  # it has arrived whole, or there would be no connection
            self._to_server.put_nowait({"type": "websocket.connect"})
        self._up = Pipe(network.delay, self._to_server.put_nowait)
        self._down = Pipe(network.delay, self.to_client.put_nowait)
        self._serving = network.world.serve(scope, self._to_server.get, self._send)
        self._serving.add_done_callback(self._served)
        network.connections.append(self)

    def send(self, message: dict[str, Any]) -> None:
        """Towards the server."""
        self._network.note("up", message)
        self._up.put(message)

    def close(self) -> None:
        """The client leaves properly; the server hears of it behind all that was sent."""
        self._up.put(self._gone)
        self._end()

    def cut(self, *, server_notices_after: float, client_notices_after: float) -> None:
        """Both directions break; each end finds out in its own time."""
        if self.is_over:
            return
        self._up.cut()
        self._down.cut()
        self._end()
        self._loop.call_later(server_notices_after, self._to_server.put_nowait, self._gone)
        self._loop.call_later(client_notices_after, self.to_client.put_nowait, self._lost)

    async def _send(self, message: dict[str, Any]) -> None:
        if self._network.world.is_up:
            try:
                self._told.check(message)
            except AssertionError as wrong:
                self._network.is_broken(wrong)
        self._network.note("down", message)
        if message["type"] == frames.CUT:
            self.cut(server_notices_after=0, client_notices_after=self._network.notice())
        else:
            self._down.put(message)
        if message["type"] == "websocket.http.response.body":
            for _ in range(2):  # uvicorn says so twice: for the answer, and for the connection
                self._to_server.put_nowait(self._gone)
        await asyncio.sleep(0)

    def _served(self, task: asyncio.Task[None]) -> None:
        if task.cancelled():  # its process died
            self.cut(server_notices_after=0, client_notices_after=self._network.notice())
        elif (error := task.exception()) is not None:
            self._network.is_broken(error)

    def _end(self) -> None:
        self.is_over = True
        if self in self._network.connections:
            self._network.connections.remove(self)


class Told:
    """What the server says on one connection, checked as it is said.

    Source: guarantees, "Owners", "Durability", "Order".
    """

    def __init__(self, world: World, owner: str) -> None:
        self._world = world
        self._others = [name.encode() for name in OWNERS if name != owner]
        self._decoder = sse.Decoder(_EVENT_BYTES_MAX)
        self._running: str | None = None  # the id of the response that is being told, on the one lane

    def check(self, message: Mapping[str, Any]) -> None:
        body: bytes = message.get("body", b"")
        for event in message.get("events", ()):
            self._check_event(event)
        for event in self._decoder.feed(body) if body.startswith(b"event: ") else ():
            self._check_event(event)
        assert not any(name in body for name in self._others), "somebody else's words"

    def _check_event(self, raw: bytes) -> None:
        assert not any(name in raw for name in self._others), "somebody else's words"
        if raw == sse.DONE_DATA:
            return
        event = msgspec.json.decode(raw)
        response = event.get("response") or {}
        if self._running is not None and response:
            assert response["id"] == self._running, "two turns at once on a lane"
        self._running = None if event["type"] in TERMINAL_EVENTS else response.get("id", self._running)
        if event["type"] in TERMINAL_EVENTS and response["store"] and response["status"] != "failed":
            assert self._world.is_committed(response["id"]), "acknowledged, and not on the disk"


class Network:
    """Every connection that there is.

    Args:
        seed: of its delays and cuts.

    Attributes:
        broken: fails with what the server did wrong on a connection, or died of there, unless it was killed.
    """

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self.connections: list[Connection] = []
        self.cuts = 0
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._random = random.Random(seed)
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        """Of all that was sent, and when."""
        return self._digest.hexdigest()

    def note(self, direction: str, message: Mapping[str, Any]) -> None:
        told = message.get("events"), message.get("body"), message.get("text")  # headers have ids of the server's own
        self._digest.update(f"{asyncio.get_running_loop().time():.6f} {direction} {message['type']} {told}".encode())

    def is_broken(self, error: BaseException) -> None:
        if not self.broken.done():
            self.broken.set_exception(error)

    def delay(self) -> float:
        """Mostly a short time, now and then a long one."""
        is_long = self._random.random() < _LONG_CHANCE
        return self._random.random() * (_LONG_SECONDS_MAX if is_long else _SHORT_SECONDS_MAX)

    def notice(self) -> float:
        """How long it takes an end to see that the other one is gone."""
        return self._random.random() * _NOTICE_SECONDS_MAX

    def cut_one(self) -> None:
        """Break one of the connections; the server may think for a minute that its client is there."""
        if self.connections:
            self.cuts += 1
            is_half_open = self._random.random() < 0.5
            self._random.choice(self.connections).cut(
                server_notices_after=self._random.random() * _HALF_OPEN_SECONDS_MAX if is_half_open else self.notice(),
                client_notices_after=self.notice(),
            )


def owner_of(scope: Mapping[str, Any]) -> str:
    """Whose connection it is: here a key is its owner's name."""
    return next(value for name, value in scope["headers"] if name == b"authorization").decode().removeprefix("Bearer ")
