"""The server against `lane_model`: creates, forks, steers, cancels, failures and closes, in whatever order hypothesis thinks of.

The app with its sockets, registry, memory and stores is the real one. At its edges a socket is two queues, the engine says
what the schedule tells it to, the clock stands until the schedule turns it, and the disk commits unless it is stalled.

Source: guarantees, "Connection-local state", "Order", "Cancellation", "Owners".
"""

from __future__ import annotations

import asyncio
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, note, settings
from hypothesis import strategies as st

from openline.config import UpstreamSettings
from openline.engines.engine import EngineRequest
from openline.engines.router import Router, Upstream
from openline.protocol.deltas import CallDelta, CallStarted, Ended, TextDelta
from openline.protocol.errors import previous_response_not_found
from openline.protocol.states import TERMINAL_EVENTS
from openline.server import frames
from openline.server.runner import build
from openline.state.opening import open_store
from openline.state.store import Store
from server import lane_model as model
from server.hand import Hand, HandTurn
from server.lane_model import Connection, Item, Lane, Turn, Words
from server.running import make_config

OWNERS = ("ann", "ann", "bob")  # of the sockets that are open at any time
ACCEPTANCE_SECONDS_MAX = 0.25
CONFIG = make_config(
    Path("unused"),
    store_url="sqlite::memory:",
    keys={owner: owner for owner in OWNERS},
    limits={
        "lanes_named_max": model.NAMED_MAX,
        "responses_active_max": model.ACTIVE_MAX,
        "creates_queued_max": model.QUEUED_MAX,
        "steers_pending_max": model.STEERS_MAX,
        "created_wait_seconds_max": ACCEPTANCE_SECONDS_MAX,
        "keepalive_seconds": 1e9,
        "connection_seconds_max": 1e9,
    },
)


# --- The edges of the server ----------------------------------------------------------------------


class Loop(asyncio.SelectorEventLoop):
    """An event loop that runs until nothing moves any more, by a clock that stands still."""

    now = 0.0

    def time(self) -> float:
        return self.now

    def pass_time(self) -> None:
        self.now += ACCEPTANCE_SECONDS_MAX

    def settle(self) -> None:
        for _ in range(1000):
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:
                return
        raise AssertionError("it does not come to rest")


class Disk:
    """The real store, behind a disk that can be stalled."""

    def __init__(self, store: Store) -> None:
        self.statuses: dict[str, str] = {}  # of all that was committed, by id
        self._store = store
        self._stalled = False
        self.writes: list[tuple[str, Any, dict[str, Any], asyncio.Future[None]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def put(self, owner: str, turn: Any, **rest: Any) -> None:
        written = asyncio.get_running_loop().create_future()
        self.writes.append((owner, turn, rest, written))
        await written

    def stall(self, stalled: bool) -> None:
        self._stalled = stalled

    def commit_next(self, loop: Loop) -> bool:
        """Commit the write that has waited longest; False if none can be."""
        if self._stalled or not self.writes:
            return False
        owner, turn, rest, written = self.writes.pop(0)
        loop.run_until_complete(self._store.put(owner, turn, **rest))
        self.statuses[turn.response_id] = turn.status
        if not written.done():
            written.set_result(None)
        return True


class Engine(Hand):
    """An engine in the schedule's hand, which reads the prefix of warm-ups too."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[HandTurn] = []

    def prepare(self, request: EngineRequest) -> HandTurn:
        turn = super().prepare(request)
        turn.prefills = True
        return turn

    @property
    def running(self) -> list[HandTurn]:
        while not self.is_idle:
            self._started.append(self._turns.get_nowait())
        self._started = [turn for turn in self._started if not turn.closed.is_set()]
        return self._started


class Hook:
    def turn_ended(self, details: object) -> None:
        """Nobody listens."""


class Names:
    """The model's names of responses: the number of the create, and a stroke for each time it went on by itself."""

    def __init__(self) -> None:
        self.by_id = {"resp_unknown": "unknown"}

    def name(self, number: str, parent_id: str | None) -> str:
        """The name of the response to a create, or of what went on by itself behind such a response."""
        parent = self.by_id.get(parent_id or "", "")
        return f"{parent}'" if parent.rstrip("'") == number else number

    def id(self, name: str) -> str:
        return next(response_id for response_id, known in self.by_id.items() if known == name)


class Line:
    """A client's end of a socket: it turns events into the model's words, and checks how they follow each other."""

    def __init__(self, names: Names, loop: Loop, app: Any, owner: str) -> None:
        self.running: dict[Lane, str] = {}  # the id of what was created there and has not ended
        self.latest: dict[Lane, str] = {}  # the name of what ended there last
        self.unanswered: dict[str, list[str]] = {}  # the calls of responses, by name
        self.is_gone = False
        self._names = names
        self._numbers: Counter[str] = Counter()  # of the next event about a response
        self._unread: list[dict[str, Any]] = []
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        headers = [(b"authorization", f"Bearer {owner}".encode())]
        scope = {"type": "websocket", "path": "/v1/responses", "headers": headers}
        self.serving = loop.create_task(app(scope, self._inbox.get, self._read))

    def send(self, event_type: str, **fields: Any) -> None:
        text = msgspec.json.encode({"type": event_type, **fields}).decode()
        self._inbox.put_nowait({"type": "websocket.receive", "text": text})

    def close(self) -> None:
        self.is_gone = True
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": 1005})

    async def _read(self, message: dict[str, Any]) -> None:
        if self.is_gone:
            raise OSError
        self._unread.append(message)

    def read(self) -> list[tuple[Lane, Words]]:
        """What it was told since the last time, lane by lane; a socket that broke off says why."""
        if self.serving.done():
            assert self.serving.result() is None
            assert self.is_gone, "the server ended a connection"
        messages, self._unread = self._unread, []
        told: list[tuple[Lane, Words]] = []
        for message in messages:
            assert message["type"] in {"websocket.accept", frames.MESSAGE}, message
            for raw in message.get("events", ()):
                event = msgspec.json.decode(raw)
                lane = event.get("stream_id")
                assert lane is not None or "stream_id" not in event
                words = self._words(lane, event)
                told += [(lane, words)] if words is not None else []
        return told

    def _words(self, lane: Lane, event: dict[str, Any]) -> Words | None:
        kind = event["type"].removeprefix("response.").replace(".", " ")
        if kind == "error":
            return self._error(event["error"])
        if kind.startswith("steer "):
            return self._steer(kind, event)
        if kind == "created":
            assert lane not in self.running, "turns of a lane were interleaved"
            self.running[lane] = event["response"]["id"]
        assert lane in self.running, "nothing runs there"
        response_id = self.running[lane]
        self._count(response_id, event)
        if kind == "created":
            parent_id = event["response"]["previous_response_id"]
            name = self._names.name(event["response"]["metadata"]["number"], parent_id)
            self._names.by_id[response_id] = name
            return (kind, name, self._names.by_id.get(parent_id))
        if event["type"] not in TERMINAL_EVENTS:
            return None
        assert event["response"]["id"] == response_id
        del self.running[lane]
        name = self.latest[lane] = self._names.by_id[response_id]
        output = [read_item(item) for item in event["response"]["output"]]
        self.unanswered[name] = model.unanswered(output)
        return (how_it_ended(event["response"]), name, output)

    def _count(self, response_id: str, event: dict[str, Any]) -> None:
        assert event["sequence_number"] == self._numbers[response_id]
        self._numbers[response_id] += 1

    def _error(self, error: dict[str, Any]) -> Words:
        if error["code"] == "previous_response_not_found":  # byte for byte the same, whatever the reason
            asked_for = error["message"].split("'")[1]
            assert asked_for in self._names.by_id
            assert error == previous_response_not_found(asked_for).frame()["error"]
        return ("error", error["code"], error["param"])

    def _steer(self, kind: str, event: dict[str, Any]) -> Words:
        response_id = event["steer"]["previous_response_id"]
        name = self._names.by_id[response_id]
        if kind == "steer failed" and event["error"]["code"] == "response_not_found":
            assert event["sequence_number"] == 0
        else:
            self._count(response_id, event)
        if kind == "steer failed":
            return (kind, event["error"]["code"], name, event["steer"]["input"] or "")
        if kind == "steer pending":
            return (kind, name, [stub["call_id"] for stub in event["required_input"]])
        return (kind, name)


def read_item(item: dict[str, Any]) -> Item:
    """An item in the model's words."""
    if item.get("type") == "function_call":
        return ("call", item["call_id"])
    if item.get("type") == "function_call_output":
        return ("answer", item["call_id"])
    content = item["content"]
    text = content if isinstance(content, str) else "".join(part["text"] for part in content)
    return ("user" if item["role"] == "user" else "text", text)


def how_it_ended(response: dict[str, Any]) -> str:
    if response["status"] == "failed":
        return f"failed: {response['error']['code']}"
    details = response["incomplete_details"]
    return f"incomplete: {details['reason']}" if details else response["status"]


# --- The server and its model, side by side ---------------------------------------------------------


@dataclass
class Rules:
    """The model: every connection that there was, and their store."""

    store: model.Store
    connections: list[Connection] = field(default_factory=list)

    def of_turn(self, name: str, deed: str, *words: str) -> None:
        """Something happens to a turn, if that still runs."""
        for connection in self.connections:
            for turn in list(connection.running.values()):
                if turn.name == name and not turn.ending:
                    getattr(connection, deed)(turn, *words)

    def read(self, is_slow: bool) -> None:
        for connection in self.connections:
            connection.read(is_slow)

    def accept_all(self) -> None:
        for connection in self.connections:
            for turn in connection.running.values():
                if not turn.ending:
                    connection.accept(turn)


class Move(NamedTuple):
    """What a step of a schedule comes to, where the server is now; and the same by the model."""

    words: str
    done: Callable[[], object] = lambda: None
    ruled: Callable[[Rules], object] = lambda _: None


class World:
    """A server, its clients, and the model of it all."""

    def __init__(self, store_url: str) -> None:
        self.loop = Loop()
        self.disk = Disk(open_store(store_url))
        self.engine = Engine()
        self.router = Router([Upstream(UpstreamSettings(kind="scripted"), self.engine)])
        self.app, self.registry = build(CONFIG, self.router, self.disk, Hook())
        self.names = Names()
        self.possible = [Rules(model.Store(keeps=store_url != "none"))]  # where the model can be: mostly one
        self.lines: list[Line] = []  # every one that there was, as the model's connections
        self.open = [self.connect(owner) for owner in OWNERS]  # the numbers of those that are open
        self.maker: dict[str, int] = {}  # the number of a create's line, by the create's own
        self.trace: list[str] = []
        self._counter = 0
        self._settle()

    def connect(self, owner: str) -> int:
        self.lines.append(Line(self.names, self.loop, self.app, owner))
        for rules in self.possible:
            rules.connections.append(Connection(owner, rules.store))
        return len(self.lines) - 1

    def count(self) -> str:
        """A number that was never given before."""
        self._counter += 1
        return str(self._counter)

    def make(self, *moves: Move) -> None:
        """Make the moves at once: the server must come to where the model comes, in one order or the other."""
        self.trace += ["  +  ".join(each.words for each in moves)] if moves[0].words else []
        for each in moves:
            each.done()
        self._settle()
        got = self._got()
        expected: list[dict[object, Any]] = []
        still_possible: list[Rules] = []
        for rules in itertools.chain.from_iterable(self._after(rules, moves) for rules in self.possible):
            expected.append(self._expected(rules))
            if got == expected[-1] and rules not in still_possible:
                still_possible.append(rules)
        assert still_possible, "\n or\n".join(dict.fromkeys(difference(each, got) for each in expected))
        self.possible = still_possible

    def _after(self, before: Rules, moves: Sequence[Move]) -> Iterator[Rules]:
        """Where the model may be: of two moves either may be first, and its end not yet kept or read when the other comes."""
        if len(moves) == 1:
            moves[0].ruled(before)
            yield before
            return
        for order, pause in itertools.product((moves, moves[::-1]), ("none", "kept", "read")):
            rules: Rules = pickle.loads(pickle.dumps(before))
            was_stalled = rules.store.stalled
            rules.store.stall(was_stalled or pause == "kept")
            rules.read(is_slow=pause == "read")
            for each in order:
                each.ruled(rules)
            rules.store.stall(was_stalled)
            rules.read(is_slow=False)
            yield rules

    def _settle(self) -> None:
        self.loop.settle()
        while self.disk.commit_next(self.loop):
            self.loop.settle()

    def _got(self) -> dict[object, Any]:
        """What each client was told on each lane; what the engine works on, and with which context; what the disk holds."""
        got: dict[object, Any] = {}
        for number, line in enumerate(self.lines):
            told = line.read()
            for lane, words in [] if line.is_gone else told:
                got.setdefault((number, lane), []).append(words)
        at_work = set()
        for turn in self.engine.running:
            create = turn.request.create
            place = self.maker[create.metadata["number"]], create.stream_id
            assert not self.lines[place[0]].is_gone, "the engine works for a client that is gone"
            assert place not in at_work, "two turns at once on a lane"
            at_work.add(place)
            if create.generates:
                context = [read_item(msgspec.json.decode(raw)) for raw in turn.input]
                got["at work", place] = self.name(turn), context
        names = self.names.by_id
        got["waiting"] = [turn.status for _, turn, _, _ in self.disk.writes]
        got["kept"] = {names[each]: status for each, status in self.disk.statuses.items() if each in names}
        return got

    def _expected(self, rules: Rules) -> dict[object, Any]:
        """The same by the model."""
        expected: dict[object, Any] = {}
        for number, connection in enumerate(rules.connections):
            for lane, words in [] if self.lines[number].is_gone else connection.told:
                expected.setdefault((number, lane), []).append(words)
            connection.told = []
            for lane, turn in connection.running.items():
                if turn.generates and not turn.ending:
                    expected["at work", (number, lane)] = turn.name, turn.context
        expected["waiting"] = [turn.ending.partition(":")[0] for _, turn in rules.store.waiting]
        known = set(self.names.by_id.values())
        expected["kept"] = {name: status for name, status in rules.store.statuses.items() if name in known}
        return expected

    def name(self, turn: HandTurn) -> str:
        create = turn.request.create
        return self.names.name(create.metadata["number"], create.previous_response_id)

    def finish(self) -> None:
        """Let all that runs and waits come to its end; then everybody goes, and nothing is left."""
        self.make(move(self, Step("disk goes on")))
        while generating := [turn for turn in self.engine.running if turn.request.create.generates]:
            self.make(move(self, Step("finish", pick=self.engine.running.index(generating[0]))))
        assert not any(line.running for line in self.lines if not line.is_gone)
        for rules in self.possible:
            assert not any(connection.running or connection.queue for connection in rules.connections)
        for number in self.open:
            self.lines[number].close()
        self._settle()
        assert [line.serving.result() for line in self.lines] == [None] * len(self.lines)
        assert not self.engine.running, "the engine works for a client that is gone"
        assert len(self.registry) == 0
        assert not asyncio.all_tasks(self.loop)

    def close(self) -> None:
        """Leave nothing behind, also where something went wrong."""
        self.disk.stall(False)
        closing = [self.loop.create_task(self.registry.close()), self.loop.create_task(self.router.close())]
        self._settle()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self._settle()
        assert all(task.done() for task in closing)
        self.loop.run_until_complete(self.disk.close())
        self.loop.close()


def difference(expected: dict[object, Any], got: dict[object, Any]) -> str:
    keys = [key for key in {**expected, **got} if expected.get(key) != got.get(key)]
    return "\n".join(f"{key}\n  expected {expected.get(key)}\n  got      {got.get(key)}" for key in keys)


# --- Schedules --------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One thing that a client or the engine does with what there is when its turn comes.

    Attributes:
        place: whose socket.
        lane: of a create.
        which: a kind of response, to be continued, steered or cancelled.
        pick: which of several.
        flaw: what is special about a create.
        joined: whether the next step comes at the same time.
    """

    kind: str
    place: int = 0
    lane: Lane = None
    which: str = "none"
    pick: int = 0
    stores: bool = False
    flaw: str = ""
    joined: bool = False

    def __repr__(self) -> str:
        said = {key: value for key, value in self._asdict().items() if value != self._field_defaults.get(key)}
        return f"Step({', '.join(f'{key}={value!r}' for key, value in said.items())})"


CLIENT = {"create": 20, "steer": 8, "cancel": 2, "stop": 2, "close": 1, "misname": 1}
ENGINE = {"accept": 5, "say": 5, "call": 4, "finish": 8, "cut short": 1, "refuse": 2, "break off": 1}
OTHERS = {"nothing": 1, "time passes": 2, "disk stalls": 1, "disk goes on": 2}
CHOICES: list[Sequence[Any]] = [  # for each field of a step; the first is the simplest
    list(Counter(OTHERS | CLIENT | ENGINE).elements()),
    [0, 0, 0, 0, 0, 0, 1, 1, 2],
    [None, None, "a", "a", "b", "b", "c", "d", "e"],  # one more than may be named
    ["none", "own", "own", "own", "own", "other", "other", "running", "any", "unknown"],
    range(8),
    [False, True],
    [*[""] * 12, "warm-up", "wrong", "mute", "stray"],
    [False, False, True],
]


def read_schedule(drawn: bytes) -> list[Step]:
    """A schedule out of bytes, one for each field of each step. Of integers hypothesis draws the small ones much more often."""
    width = len(CHOICES)
    steps = [drawn[start : start + width] for start in range(0, len(drawn), width)]
    return [
        Step(*[choices[byte % len(choices)] for byte, choices in zip(step, CHOICES, strict=True)]) for step in steps
    ]


STEPS_EACH = 30
SCHEDULES = st.binary(min_size=STEPS_EACH * len(CHOICES), max_size=STEPS_EACH * len(CHOICES)).map(read_schedule)
# What was wrong once. A client goes while its warm-up is being kept, and nobody stopped the prefill that came behind.
GONE_WHILE_KEPT = [
    Step("disk stalls"),
    Step("create", stores=True, flaw="warm-up"),
    Step("close"),
    Step("disk goes on"),
]


def run(world: World, schedule: Sequence[Step]) -> None:
    """Make the steps one after the other; a client's and an engine's may come at the same time."""
    steps = list(schedule)
    while steps:
        step = steps.pop(0)
        is_pair = step.joined and steps and {by(step), by(steps[0])} == {"client", "engine"}
        together = [step, steps.pop(0)] if is_pair else [step]
        world.make(*[move(world, each) for each in together])


def by(step: Step) -> str:
    return "client" if step.kind in CLIENT else "engine" if step.kind in ENGINE else ""


def move(world: World, step: Step) -> Move:
    """What a step comes to."""
    if step.kind in CLIENT:
        return client_move(world, step)
    if step.kind in ENGINE and world.engine.running:
        return engine_move(world, step)
    match step.kind:
        case "time passes":
            return Move(step.kind, world.loop.pass_time, Rules.accept_all)
        case "disk stalls":
            return Move(step.kind, lambda: world.disk.stall(True), lambda rules: rules.store.stall(True))
        case "disk goes on":
            return Move(step.kind, lambda: world.disk.stall(False), lambda rules: rules.store.stall(False))
        case _:
            return Move("")


def engine_move(world: World, step: Step) -> Move:
    turn = world.engine.running[step.pick % len(world.engine.running)]
    name, new = world.name(turn), world.count()
    done: Callable[[], object]
    done, deed, *words = {
        "accept": (turn.accept, "accept"),
        "say": (partial(turn.give, TextDelta(new)), "say", new),
        "call": (partial(turn.give, CallStarted("function_call", new, "look"), CallDelta("{}")), "call", new),
        "finish": (turn.finish, "stop"),
        "cut short": (partial(cut_short, turn), "stop", "incomplete: max_output_tokens"),
        "refuse": (turn.refuse, "fail", "rate_limit_exceeded"),
        "break off": (turn.end, "fail", "upstream_error"),
    }[step.kind]
    return Move(f"engine, {name}: {step.kind} {new}", done, lambda rules: rules.of_turn(name, deed, *words))


def cut_short(turn: HandTurn) -> None:
    turn.give(Ended("max_output_tokens"))
    turn.end()


def client_move(world: World, step: Step) -> Move:
    number = world.open[step.place]
    line = world.lines[number]
    name = choose(world, line, step, step.which if step.which in {"any", "unknown"} else "running")

    def made(done: Callable[[], object], deed: str, *words: Any) -> Move:
        said = f"socket {number} ({OWNERS[step.place]}): {deed} {' '.join(map(str, words))}"
        return Move(said, done, lambda rules: getattr(rules.connections[number], deed)(*words))

    match step.kind:
        case "create":
            return create_move(world, step, number)
        case "steer" if name is not None:
            text = "" if step.flaw == "wrong" else world.count()
            steer = partial(line.send, "response.steer", previous_response_id=world.names.id(name), input=text or [])
            return made(steer, "steer", name, text)
        case "cancel" if name is not None:
            return made(partial(line.send, "response.cancel", response_id=world.names.id(name)), "cancel", name)
        case "stop":
            return made(partial(line.send, "response.cancel"), "cancel", None)
        case "misname":
            create = partial(line.send, "response.create", stream_id="", input="Hello.")
            return made(create, "tell", None, "error", "invalid_stream_id", "stream_id")
        case "close":
            world.open[step.place] = world.connect(OWNERS[step.place])
            return made(line.close, "close")
        case _:
            return Move("")


def create_move(world: World, step: Step, number: int) -> Move:
    line, new = world.lines[number], world.count()
    parent = choose(world, line, step, step.which)
    answers = [] if step.flaw == "mute" or parent is None else line.unanswered.get(parent, [])
    answers = [*answers, "stray"] if step.flaw == "stray" else answers
    items = [{"type": "function_call_output", "call_id": call_id, "output": "42"} for call_id in answers]
    items.append({"role": "user", "content": new})
    event: dict[str, Any] = {"model": "any", "input": items, "store": step.stores, "metadata": {"number": new}}
    event |= {"stream_id": step.lane} if step.lane else {}
    event |= {"previous_response_id": world.names.id(parent)} if parent else {}
    event |= {"temperature": "hot"} if step.flaw == "wrong" else {}
    event |= {"generate": False} if step.flaw == "warm-up" else {}

    def ruled(rules: Rules) -> None:
        turn = Turn(new, step.lane, parent, [read_item(item) for item in items], step.stores)
        turn.generates = step.flaw != "warm-up"
        turn.wrong = ("invalid_type", "temperature") if step.flaw == "wrong" else None
        rules.connections[number].create(turn)

    world.maker[new] = number
    words = f"{'stored' if step.stores else 'unstored'} {step.flaw}".strip()
    return Move(
        f"socket {number}, lane {step.lane}: create {new} behind {parent}, {words}",
        lambda: line.send("response.create", **event),
        ruled,
    )


def choose(world: World, line: Line, step: Step, which: str) -> str | None:
    """The name of a response of that kind, as far as the client can know one."""
    own = [line.latest[step.lane]] if step.lane in line.latest else []
    names = {
        "none": [],
        "own": own,
        "other": [name for lane, name in line.latest.items() if lane != step.lane] or own,
        "running": [world.names.by_id[response_id] for response_id in line.running.values()] or own,
        "any": list(world.names.by_id.values())[::-1],
        "unknown": ["unknown"],
    }[which]
    return names[step.pick % len(names)] if names else None


@pytest.mark.parametrize("store_url", ["sqlite::memory:", "none"])
@pytest.mark.parametrize("schedules", [500, pytest.param(5_000, marks=pytest.mark.long)])
def test_the_server_comes_to_where_the_model_comes(store_url, schedules):
    """Whatever the schedule, a create ends once, in its lane's order, finds what it may find, and leaves nothing running.

    Source: guarantees, "Connection-local state", "Order" and "Cancellation", 10 000 schedules; a tenth in every run.
    """

    @settings(max_examples=schedules, suppress_health_check=list(HealthCheck))
    @given(SCHEDULES)
    @example(GONE_WHILE_KEPT)
    def holds(schedule: list[Step]) -> None:
        world = World(store_url)
        try:
            run(world, schedule)
            world.finish()
        finally:
            note("\n".join(world.trace))
            world.close()

    holds()
