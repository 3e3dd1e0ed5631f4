"""The rule of lanes, memory, failure and steering in its plainest form, to hold the server against.

Nothing waits here and nothing is half done: a method is one thing that happens, with all that follows from it, and `told`
has what the client gets then. An item of a context is a pair: ("user", text), ("text", text), ("call", id), ("answer", id).

Source: WebSocket mode guide, "stream_id", "Limits", "Continuing", "Failed continuations", "Cancelling", "Connection
life"; Mid-turn steering guide, "Outcomes".
"""

from __future__ import annotations

from dataclasses import dataclass, field

ACTIVE_MAX, NAMED_MAX, QUEUED_MAX, STEERS_MAX = 3, 4, 3, 2
CANCELLED, STEERED, REFUSED = "incomplete: cancelled", "incomplete: steered", "refused"
Item = tuple[str, str]
Lane = str | None  # None is the default lane
Words = tuple[object, ...]


@dataclass
class Turn:
    """A create, or what follows by itself on a response that was steered; and what becomes of it."""

    name: str
    lane: Lane
    parent: str | None = None
    input: list[Item] = field(default_factory=list)
    stores: bool = True
    generates: bool = True
    by_itself: bool = False
    wrong: tuple[str, str | None] | None = None  # code and param of what it is refused for in itself
    steers: list[Item] = field(default_factory=list)  # come before its input, each behind the name of its response
    context: list[Item] = field(default_factory=list)
    output: list[Item] = field(default_factory=list)
    shared: bool = False  # its owner finds it from anywhere: it is stored, and all before it
    opened: bool = False  # its client knows it
    ending: str = ""  # how it ends
    told: bool = False  # its end


def unanswered(items: list[Item]) -> list[str]:
    """The calls that wait for their answer, and the answers that no call waits for."""
    waiting: list[str] = []
    for kind, name in items:
        if kind == "answer" and name in waiting:
            waiting.remove(name)
        elif kind in {"answer", "call"}:
            waiting.append(name)
    return waiting


@dataclass
class Store:
    """What outlives connections. While it is stalled, a stored turn that is over waits for it."""

    keeps: bool
    stalled: bool = False
    turns: dict[tuple[str, str | None], Turn] = field(default_factory=dict)  # what can be continued, by owner and name
    statuses: dict[str, str] = field(default_factory=dict)  # of all that it was given, by name
    waiting: list[tuple[Connection, Turn]] = field(default_factory=list)

    def stall(self, stalled: bool) -> None:
        self.stalled = stalled
        while self.waiting and not stalled:
            connection, turn = self.waiting[0]
            connection.end(turn)
            del self.waiting[0]


@dataclass
class Connection:
    """One connection: lanes, each with one turn at a time, and the latest response of each as its memory."""

    owner: str
    store: Store = field(compare=False)
    lanes: set[Lane] = field(default_factory=lambda: {None})
    queue: list[Turn] = field(default_factory=list)
    ready: list[Lane] = field(default_factory=list)  # whose first may start, in the order in which they became so
    running: dict[Lane, Turn] = field(default_factory=dict)
    begun: list[Turn] = field(default_factory=list)  # of these, who has still to look for its parent
    latest: dict[Lane, Turn] = field(default_factory=dict)
    ended: dict[Lane, str] = field(default_factory=dict)  # the names of the same, failed ones too
    steers: dict[Lane, list[Item]] = field(default_factory=dict)  # accepted, and in no turn yet
    told: list[tuple[Lane, Words]] = field(default_factory=list)
    is_slow: bool = False  # its client: what has ended keeps its lane until that was read

    # What its client does.

    def create(self, turn: Turn) -> None:
        if turn.lane not in self.lanes and len(self.lanes) > NAMED_MAX:
            return self.tell(turn.lane, "error", "websocket_stream_limit_reached", "stream_id")
        self.lanes.add(turn.lane)
        if len(self.queue) == QUEUED_MAX:
            return self.tell(turn.lane, "error", "server_is_overloaded", None)
        self.queue.append(turn)
        return self.start()

    def cancel(self, name: str | None) -> None:
        """What is not known, or over, is left alone; without a name it is what the default lane is at."""
        turn = self.running.get(None) if name is None else self.known(name)
        first = self.first(None)
        if turn:
            self.finish(turn, CANCELLED)
        elif name is None and first and first.by_itself:
            self.give_back(None, self.steers.pop(None, []))  # without them it comes to nothing when its turn comes
        elif name is None and first:
            first.wrong, first.parent = ("request_cancelled", None), None
            self.start()

    def steer(self, name: str, text: str) -> None:
        turn = self.known(name)
        if not turn or turn.told:
            lane = next((lane for lane, ended in self.ended.items() if ended == name), None)
            code = "response_already_completed" if name in self.ended.values() else "response_not_found"
            self.tell(lane, "steer failed", code, name, text)
        elif not text:
            self.tell(turn.lane, "steer failed", "invalid_input", name, text)
        elif sum(map(len, self.steers.values())) == STEERS_MAX:
            self.tell(turn.lane, "steer failed", "too_many_pending_steers", name, text)
        else:
            self.tell(turn.lane, "steer accepted", name)
            self.steers.setdefault(turn.lane, []).append((name, text))
            if not turn.output:
                self.finish(turn, STEERED)

    def read(self, is_slow: bool) -> None:
        self.is_slow = is_slow
        for turn in [turn for turn in self.running.values() if turn.told and not is_slow]:
            self.go_on(turn)

    def close(self) -> None:
        self.queue.clear()
        self.ready.clear()
        self.steers.clear()
        for turn in list(self.running.values()):
            self.finish(turn, CANCELLED)

    # What a turn's engine does.

    def accept(self, turn: Turn) -> None:
        if not turn.opened:
            turn.opened = True
            self.tell(turn.lane, "created", turn.name, turn.parent)

    def say(self, turn: Turn, text: str) -> None:
        self.accept(turn)
        before = turn.output.pop()[1] if turn.output and turn.output[-1][0] == "text" else ""
        turn.output.append(("text", before + text))

    def call(self, turn: Turn, call_id: str) -> None:
        """Where an item ends, steering cuts; not behind a call, whose answer has to come first."""
        self.accept(turn)
        if self.steers.get(turn.lane) and not unanswered(turn.output):
            self.finish(turn, STEERED)
        else:
            turn.output.append(("call", call_id))

    def stop(self, turn: Turn, how: str = "completed") -> None:
        self.accept(turn)
        self.finish(turn, how)

    def fail(self, turn: Turn, code: str) -> None:
        if turn.opened:
            self.finish(turn, f"failed: {code}")
        else:
            self.refuse(turn, code, None)

    # What follows: a turn starts, finds its parent or is refused, and ends.

    def start(self) -> None:
        """A lane's first starts when nothing runs on the lane, and a slot is free or none is needed.

        Only when all have started that can, they look for their parents: what was refused at that moment has failed before.
        """
        free = dict.fromkeys(turn.lane for turn in self.queue if turn.lane not in self.running)
        self.ready += [lane for lane in free if lane not in self.ready]
        for turn in map(self.first, self.ready):
            if turn and (turn.wrong or len(self.running) < ACTIVE_MAX):
                self.ready.remove(turn.lane)
                self.queue.remove(turn)
                self.running[turn.lane] = turn
                self.begin(turn)
                return self.start()
        while self.begun:
            self.bind(self.begun.pop(0))
        return None

    def begin(self, turn: Turn) -> None:
        steers = self.steers.pop(turn.lane, [])
        if turn.wrong or all(name == turn.parent for name, _ in steers):
            turn.steers = steers
        else:
            self.give_back(turn.lane, steers)
        if turn.wrong or (turn.by_itself and not steers):
            self.refuse(turn, *(turn.wrong or (None, None)))
        else:
            self.begun.append(turn)

    def bind(self, turn: Turn) -> None:
        """Its parent is looked for among the latest of the connection, then in the store."""
        held = {latest.name: latest for latest in self.latest.values()}
        parent = held.get(turn.parent or "") or self.store.turns.get((self.owner, turn.parent))
        if turn.parent and not parent:
            return self.refuse(turn, "previous_response_not_found", "previous_response_id")
        before = parent.context + parent.output if parent else []
        turn.context = before + [("user", text) for _, text in turn.steers] + turn.input
        if unanswered(turn.context):
            return self.refuse(turn, None, "input")
        turn.shared = turn.stores and self.store.keeps and (parent is None or parent.shared)
        return None if turn.generates else self.stop(turn)

    def refuse(self, turn: Turn, code: str | None, param: str | None) -> None:
        """All that is told is why; nobody asked for what goes on by itself, so not even that."""
        turn.ending = REFUSED
        if not turn.by_itself:
            self.forget_parent(turn)
            self.tell(turn.lane, "error", code, param)
        self.give_back(turn.lane, turn.steers)
        self.leave(turn)

    def forget_parent(self, turn: Turn) -> None:
        """A failed continuation takes its parent out of the memory; a failed fork does not."""
        if turn.lane in self.latest and self.latest[turn.lane].name == turn.parent:
            del self.latest[turn.lane]

    def finish(self, turn: Turn, how: str) -> None:
        """It is over, and too late for anything else; a stored one is kept before its end is told."""
        if not turn.ending:
            turn.ending = how
            if turn.stores and (self.store.stalled or self.store.waiting):
                self.store.waiting.append((self, turn))
            else:
                self.end(turn)

    def end(self, turn: Turn) -> None:
        failed = turn.ending.startswith("failed")
        if turn.stores:
            self.store.statuses[turn.name] = turn.ending.partition(":")[0]
        if turn.shared and not failed:
            self.store.turns[self.owner, turn.name] = turn
        if failed:
            self.forget_parent(turn)
        else:
            self.latest[turn.lane] = turn
        self.accept(turn)
        self.tell(turn.lane, turn.ending, turn.name, turn.output)
        self.ended[turn.lane] = turn.name
        self.leave(turn)

    def leave(self, turn: Turn) -> None:
        turn.told = True
        if not self.is_slow:
            self.go_on(turn)

    def go_on(self, turn: Turn) -> None:
        del self.running[turn.lane]
        if turn.ending != REFUSED:
            self.apply_steers(turn)
        self.start()

    def apply_steers(self, turn: Turn) -> None:
        """They go into the client's own next create, go back, wait for a call's answer, or go on by themselves."""
        steers, following = self.steers.get(turn.lane, []), self.first(turn.lane)
        if not steers or (following and not following.wrong and following.parent == turn.name):
            return
        if turn.ending.startswith("failed") or turn.ending == CANCELLED:
            self.give_back(turn.lane, self.steers.pop(turn.lane))
        elif calls := unanswered(turn.output):
            for name, _ in steers:
                self.tell(turn.lane, "steer pending", name, calls)
        else:
            successor = Turn(f"{turn.name}'", turn.lane, turn.name, [], turn.stores, turn.generates, by_itself=True)
            self.queue.insert(0, successor)

    def give_back(self, lane: Lane, steers: list[Item]) -> None:
        for name, text in steers:
            self.tell(lane, "steer failed", "successor_creation_failed", name, text)

    def tell(self, lane: Lane, *words: object) -> None:
        self.told.append((lane, words))

    def known(self, name: str) -> Turn | None:
        return next((turn for turn in self.running.values() if turn.name == name and turn.opened), None)

    def first(self, lane: Lane) -> Turn | None:
        return next((turn for turn in self.queue if turn.lane == lane), None)
