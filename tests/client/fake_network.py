"""The edge of the network, in memory: a model of a Responses server, and a way to it on which things go wrong.

It is a model and no mock: it keeps conversations, keys and event logs by the protocol's rules, so a session that
asks for something wrong is refused as by a real server.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

from openline.client.wire import DialFailed, DialRefused, LineClosed

TRAVEL = {"type", "stream", "idempotency_key", "starting_after"}
EVENT_SECONDS = 0.01


@dataclass
class Fault:
    """What goes wrong with one connection.

    Attributes:
        refuse: `fail` without a connection, `break` in the handshake, or an HTTP status in its place.
        arrives: whether what the client sends gets there.
        late_seconds: so much later; also when the client has lost the connection meanwhile.
        cut_after: after so many events the client's end breaks.
        is_silent: it does not break: nothing comes any more.
        crash_after: after so many events the server dies, and comes back without anything that it held.
        closes_between: the server closes it behind a turn.
    """

    refuse: str | int | None = None
    arrives: bool = True
    late_seconds: float = 0.0
    cut_after: int | None = None
    is_silent: bool = False
    crash_after: int | None = None
    closes_between: bool = False


GOOD = Fault()


@dataclass(eq=False)
class Generation:
    """A turn that runs, or ran: its events, and what the model read."""

    id: str
    context: list[Any]
    text: str
    stored: bool
    in_background: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)
    is_dead: bool = False
    first_kept: int = 0
    grown: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    @property
    def has_ended(self) -> bool:
        return self.is_dead or bool(
            self.events and self.events[-1]["type"].split(".")[-1] in {"completed", "incomplete"}
        )

    def add(self, event_type: str, **fields: Any) -> None:
        self.events.append({"type": event_type, "sequence_number": len(self.events), **fields})
        self.grown.set()
        self.grown = asyncio.Event()

    async def follow(self, after: int) -> AsyncGenerator[dict[str, Any], None]:
        """Its events with a larger number, as they come."""
        for number in itertools.count(after + 1):
            while number >= len(self.events):
                if self.has_ended:
                    return
                await self.grown.wait()
            yield self.events[number]

    def response(self, status: str, output: list[Any]) -> dict[str, Any]:
        return {"id": self.id, "object": "response", "status": status, "store": self.stored, "output": output}

    def item(self, status: str, text: str) -> dict[str, Any]:
        content = [{"type": "output_text", "text": text, "annotations": []}]
        return {"id": f"msg_{self.id}", "type": "message", "role": "assistant", "status": status, "content": content}

    async def generate(self) -> None:
        place = {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}
        self.add("response.created", response=self.response("in_progress", []))
        self.add("response.in_progress", response=self.response("in_progress", []))
        self.add("response.output_item.added", output_index=0, item={**self.item("in_progress", ""), "content": []})
        part = {"type": "output_text", "text": "", "annotations": []}
        self.add("response.content_part.added", part=part, **place)
        said = ""
        try:
            for word in self.text.split(" "):
                await asyncio.sleep(EVENT_SECONDS)
                said += word
                self.add("response.output_text.delta", delta=word, logprobs=[], **place)
        except asyncio.CancelledError:
            if not self.is_dead:
                self.end(said, "incomplete")
        else:
            self.end(said, "completed")

    def end(self, said: str, status: str) -> None:
        item = self.item(status, said)
        place = {"item_id": f"msg_{self.id}", "output_index": 0, "content_index": 0}
        self.add("response.output_text.done", text=said, logprobs=[], **place)
        self.add("response.content_part.done", part=item["content"][0], **place)
        self.add("response.output_item.done", output_index=0, item=item)
        details = {"incomplete_details": {"reason": "cancelled"}} if status == "incomplete" else {}
        self.add(f"response.{status}", response={**self.response(status, [item]), **details})


class Refusal(Exception):  # noqa: N818 - an answer
    """An error of the server's."""

    def __init__(self, status: int, code: str, param: str | None = None, **headers: str) -> None:
        self.status = status
        self.headers = headers
        self.error = {"code": code, "message": f"{code}.", "param": param, "type": "invalid_request_error"}


class FakeServer:
    """A Responses server.

    Args:
        knows_keys: it has our extensions.
        words: how many the model says.
    """

    def __init__(self, *, knows_keys: bool, words: int = 3) -> None:
        self.knows_keys = knows_keys
        self.words = words
        self.streams = True
        self.generations: list[Generation] = []
        self.held: dict[str, Generation] = {}  # by id
        self.keys: dict[str, tuple[str, Generation]] = {}
        self.connections: set[FakeConnection] = set()
        self.refusals: deque[Refusal] = deque()  # of the next creates
        self.reads_refused = 0  # so many times what is asked by its id is not given

    @property
    def headers(self) -> dict[str, str]:
        return {"openline-version": "0"} if self.knows_keys else {}

    def create(self, body: dict[str, Any], key: str | None, latest: Generation | None) -> tuple[Generation, int]:
        """What a create starts, or attaches to, and the number of the event before the first that it gets."""
        after = body.get("starting_after")
        known = self.keys.get(key) if self.knows_keys and key is not None else None
        digest = digest_of(body)
        if known is not None:
            if known[0] != digest:
                raise Refusal(409, "idempotency_key_reused", "idempotency_key", **{"x-should-retry": "false"})
            return self.attach(known[1], after)
        if self.knows_keys and after is not None:
            raise Refusal(409, "resume_window_exceeded", "starting_after", **{"x-should-retry": "false"})
        if self.refusals:
            raise self.refusals.popleft()
        generation = self.start(body, latest)
        if self.knows_keys and key is not None:
            self.keys[key] = digest, generation
        return generation, -1

    def attach(self, generation: Generation, after: int | None) -> tuple[Generation, int]:
        after = -1 if after is None else after
        if after + 1 < generation.first_kept:
            raise Refusal(409, "resume_window_exceeded", "starting_after")
        return generation, after

    def start(self, body: dict[str, Any], latest: Generation | None) -> Generation:
        context: list[Any] = []
        if (parent_id := body.get("previous_response_id")) is not None:
            parent = self.held.get(parent_id)
            if parent is None or not (parent.stored or parent is latest) or not parent.has_ended:
                raise Refusal(400, "previous_response_not_found", "previous_response_id")
            context = [*parent.context, *parent.events[-1]["response"]["output"]]
        context += body["input"]
        number = len(self.generations)
        text = " ".join(f"w{number}.{at}" for at in range(self.words))
        generation = Generation(
            f"resp_{number}", context, text, body.get("store") is not False, body.get("background") is True
        )
        self.generations.append(generation)
        self.held[generation.id] = generation
        generation.task = asyncio.create_task(generation.generate())
        return generation

    def crash(self) -> None:
        """It dies and comes back: stored turns that had ended are there, nothing else is."""
        for generation in self.generations:
            if not generation.has_ended:
                generation.is_dead = True
                generation.task.cancel()
                generation.grown.set()
        self.held = {id_: each for id_, each in self.held.items() if each.stored and not each.is_dead}
        self.keys = {key: known for key, known in self.keys.items() if known[1].id in self.held}
        for connection in tuple(self.connections):
            connection.cut()

    def get(self, path: str) -> tuple[Generation, int | None]:
        """What is asked by id or by key: a response, and the number after which its events are wanted, if they are."""
        parts = urlsplit(path)
        query = parse_qs(parts.query)
        if parts.path == "/responses":
            found = self.keys.get(query["idempotency_key"][0]) if self.knows_keys else None
            if found is None:
                raise Refusal(404 if self.knows_keys else 405, "not_found")
            return found[1], None
        generation = self.held.get(unquote(parts.path.split("/")[2]))
        if generation is None or not (self.knows_keys or generation.in_background):
            raise Refusal(404, "not_found")
        if self.reads_refused:
            self.reads_refused -= 1
            raise Refusal(400, "not_here", "stream")
        after = query.get("starting_after", ["-1"])[0]
        return self.attach(generation, int(after))


def digest_of(body: Mapping[str, Any]) -> str:
    """A body's hash without what says how it travels."""
    kept = {name: value for name, value in body.items() if name not in TRAVEL}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def message_bytes(message: str | bytes) -> bytes:
    """A message of either transport."""
    return message.encode() if isinstance(message, str) else message


class FakeConnection:
    """One connection, as both ends see it, and the fault on it."""

    def __init__(self, server: FakeServer, fault: Fault) -> None:
        self.server = server
        self.fault = fault
        self.headers = server.headers
        self.latest: Generation | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.to_client: deque[str | bytes] = deque()
        self.came = asyncio.Event()
        self.is_cut = False
        self.delivered = 0
        server.connections.add(self)

    def spawn(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def cut(self) -> None:
        """The connection ends; what is on its way to the server still arrives where the fault says so."""
        if self.is_cut:
            return
        self.is_cut = True
        self.came.set()
        self.server.connections.discard(self)
        for task in tuple(self.tasks):
            if not (task.get_name() == "late" and self.fault.late_seconds):
                task.cancel()

    def deliver(self, message: str | bytes) -> bool:
        """Give the client a message; whether more can follow."""
        fault = self.fault
        if self.is_cut:
            return False
        if fault.cut_after is not None and self.delivered >= fault.cut_after:
            if not fault.is_silent:
                self.cut()
            return False
        if fault.crash_after is not None and self.delivered >= fault.crash_after:
            self.server.crash()
            return False
        self.delivered += 1
        self.to_client.append(message)
        self.came.set()
        if fault.closes_between and b'"response.completed"' in message_bytes(message):
            asyncio.get_running_loop().call_later(0.005, self.cut)
        return True

    async def serve(self, body: dict[str, Any], key: str | None, encode: Callable[[dict[str, Any]], Any]) -> bool:
        """Answer one create; whether it was taken."""
        generation, after = self.server.create(body, key, self.latest)
        await self.pass_on(generation, after, encode)
        return True

    async def pass_on(self, generation: Generation, after: int, encode: Callable[[dict[str, Any]], Any]) -> None:
        try:
            async for event in generation.follow(after):
                if event["type"] in {"response.completed", "response.incomplete"}:
                    self.latest = generation
                if not self.deliver(encode(event)):
                    break
        finally:
            if not (self.server.knows_keys or generation.in_background or generation.has_ended):
                generation.task.cancel()  # who leaves a turn without a key ends it

    async def receive(self) -> str | bytes:
        while not self.to_client:
            if self.is_cut:
                raise LineClosed(None, "cut")
            self.came.clear()
            await self.came.wait()
        return self.to_client.popleft()


class FakeLine(FakeConnection):
    """A WebSocket."""

    def __init__(self, server: FakeServer, fault: Fault) -> None:
        super().__init__(server, fault)
        self.sent: list[dict[str, Any]] = []
        self.running: Generation | None = None
        self.turn = asyncio.Lock()  # a lane is a FIFO

    async def send(self, text: str) -> None:
        if self.is_cut:
            raise LineClosed(None, "cut before")
        frame = msgspec.json.decode(text)
        self.sent.append(frame)
        if not self.fault.arrives:
            asyncio.get_running_loop().call_later(0.05, self.cut)
            return
        task = asyncio.create_task(self.take(frame), name="late")
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def take(self, frame: dict[str, Any]) -> None:
        if self.fault.late_seconds:
            await asyncio.sleep(self.fault.late_seconds)
        if frame["type"] == "response.cancel":
            for generation in self.server.generations:
                if generation.id == frame.get("response_id") and not generation.has_ended:
                    generation.task.cancel()
            return
        async with self.turn:
            try:
                await self.serve(frame, frame.get("idempotency_key"), lambda event: msgspec.json.encode(event).decode())
            except Refusal as refusal:
                error = {"type": "error", "status": refusal.status, "error": refusal.error, "headers": refusal.headers}
                self.latest = None
                self.deliver(json.dumps(error))

    async def receive(self) -> str:
        message = await super().receive()
        assert isinstance(message, str)
        return message

    async def close(self) -> None:
        self.cut()


class FakeAnswer(FakeConnection):
    """An HTTP answer."""

    status = 200

    async def events(self) -> AsyncGenerator[bytes, None]:
        while (message := await self.receive()) != b"":
            yield message

    async def body(self) -> bytes:
        return b"".join([event async for event in self.events()])

    async def close(self) -> None:
        self.cut()

    def refuse(self, refusal: Refusal) -> None:
        self.status = refusal.status
        self.headers = {**self.headers, **refusal.headers}
        self.to_client.extend([msgspec.json.encode({"error": refusal.error}), b""])

    async def answer(self, generation: Generation, after: int) -> None:
        await self.pass_on(generation, after, msgspec.json.encode)
        if generation.has_ended and not generation.is_dead:
            self.deliver(b"[DONE]")
            self.deliver(b"")
        else:
            self.cut()


class FakeDial:
    """The way to the server.

    Args:
        faults: of the connections, in order; after them all goes well.
        has_sockets: whether upgrades are taken.
    """

    def __init__(self, server: FakeServer, faults: Iterable[Fault] = (), *, has_sockets: bool = True) -> None:
        self.server = server
        self.faults = iter(faults)
        self.has_sockets = has_sockets
        self.lines: list[FakeLine] = []
        self.answers: list[FakeAnswer] = []
        self.paths: list[str] = []
        self.posted: list[dict[str, Any]] = []
        self.is_closed = False

    async def open_socket(self, headers: Mapping[str, str]) -> FakeLine:
        fault = next(self.faults, GOOD)
        await asyncio.sleep(0.001)
        self.check(fault)
        if isinstance(fault.refuse, int):
            raise DialRefused(fault.refuse, {}, b"")
        if not self.has_sockets:
            raise DialRefused(426, self.server.headers, b"")
        line = FakeLine(self.server, fault)
        self.lines.append(line)
        return line

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> FakeAnswer:
        fault = next(self.faults, GOOD)
        self.paths.append(f"POST {path}")
        await asyncio.sleep(0.001)
        answer = self.answering(fault)
        if path.endswith("/cancel"):
            try:
                generation, _ = self.server.get(path.removesuffix("/cancel"))
            except Refusal as refusal:
                answer.refuse(refusal)
            else:
                generation.task.cancel()
                await asyncio.wait({generation.task})
                answer.to_client.extend([msgspec.json.encode(generation.events[-1]["response"]), b""])
            return answer
        create = msgspec.json.decode(body)
        self.posted.append(create)
        if answer.status != 200:
            return answer
        if not fault.arrives:
            raise LineClosed(None, "cut while it was sent")
        if fault.late_seconds:
            asyncio.get_running_loop().call_later(fault.late_seconds, self.arrive_late, create, headers)
            raise LineClosed(None, "cut while it was on its way")
        try:
            generation, after = self.server.create(create, headers.get("idempotency-key"), None)
        except Refusal as refusal:
            answer.refuse(refusal)
        else:
            if self.server.streams:
                answer.spawn(answer.answer(generation, after))
            else:
                await asyncio.wait({generation.task})
                answer.headers = {**answer.headers, "content-type": "application/json; charset=utf-8"}
                answer.to_client.extend([msgspec.json.encode(generation.events[-1]["response"]), b""])
        return answer

    async def get(self, path: str, headers: Mapping[str, str]) -> FakeAnswer:
        fault = next(self.faults, GOOD)
        self.paths.append(f"GET {path}")
        await asyncio.sleep(0.001)
        answer = self.answering(fault)
        if answer.status != 200:
            return answer
        if not fault.arrives or fault.late_seconds:
            raise LineClosed(None, "cut while it was sent")
        try:
            generation, after = self.server.get(path)
        except Refusal as refusal:
            answer.refuse(refusal)
            return answer
        if after is not None:
            answer.spawn(answer.answer(generation, after))
        else:
            response = generation.events[-1].get("response") if generation.events else None
            response = response or generation.response("in_progress", [])
            answer.to_client.extend([msgspec.json.encode(response), b""])
        return answer

    async def close(self) -> None:
        self.is_closed = True
        for connection in tuple(self.server.connections):
            connection.cut()

    def check(self, fault: Fault) -> None:
        if fault.refuse == "fail":
            raise DialFailed("nobody listens")
        if fault.refuse == "break":
            raise DialFailed("broken off", reached=True)

    def answering(self, fault: Fault) -> FakeAnswer:
        if fault.refuse == "break":
            raise LineClosed(None, "broken off")
        self.check(fault)
        answer = FakeAnswer(self.server, fault)
        self.answers.append(answer)
        if isinstance(fault.refuse, int):  # a proxy's answer, not the server's
            answer.headers = {}
            answer.status = fault.refuse
            answer.to_client.extend([b"<html></html>", b""])
        return answer

    def arrive_late(self, create: dict[str, Any], headers: Mapping[str, str]) -> None:
        """A request whose connection has gone meanwhile."""
        try:
            generation, _ = self.server.create(create, headers.get("idempotency-key"), None)
        except Refusal:
            return
        if not self.server.knows_keys:
            generation.task.cancel()
