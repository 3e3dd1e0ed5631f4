"""A connection against a model of it, step by step, on whatever hypothesis thinks of."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from openline.protocol.connection import Connection, Limits, Start
from openline.protocol.errors import ProtocolError

LANES = [None, "a", "b", "c", "d", "e"]


@dataclass
class Model:
    """The rules of lanes in their plainest form: entries in order, and since when each lane's head has waited.

    Source: WebSocket mode guide, "stream_id" and "Limits".
    """

    limits: Limits
    names: set[str] = field(default_factory=set)
    running: dict[str | None, bool] = field(default_factory=dict)  # lane, whether it is a refusal
    waiting: list[tuple[str | None, int, bool]] = field(default_factory=list)  # lane, number, refused
    ready_since: dict[str | None, int] = field(default_factory=dict)
    clock: int = 0

    def note_ready(self) -> None:
        for lane in {lane for lane, _, _ in self.waiting} - set(self.running) - set(self.ready_since):
            self.ready_since[lane] = self.clock = self.clock + 1

    def receive(self, lane: str | None, number: int, refused: bool) -> str | None:
        if lane is not None and lane not in self.names:
            if len(self.names) == self.limits.lanes_named_max:
                return "websocket_stream_limit_reached"
            self.names.add(lane)
        if len(self.waiting) == self.limits.creates_queued_max:
            return "server_is_overloaded"
        self.waiting.append((lane, number, refused))
        self.note_ready()
        return None

    def next_turn(self) -> tuple[str | None, int, bool] | None:
        for lane in sorted(self.ready_since, key=self.ready_since.__getitem__):
            head = next(entry for entry in self.waiting if entry[0] == lane)
            if head[2] or self.active() < self.limits.responses_active_max:
                self.waiting.remove(head)
                del self.ready_since[lane]
                self.running[lane] = head[2]
                return head
        return None

    def active(self) -> int:
        return sum(not refused for refused in self.running.values())

    def end_turn(self, lane: str | None) -> None:
        del self.running[lane]
        self.note_ready()


class Lanes(RuleBasedStateMachine):
    """Random creates, refusals, starts and ends; what comes out must be what the model says."""

    @initialize(active=st.integers(1, 3), named=st.integers(0, 5), queued=st.integers(1, 12))
    def connect(self, active, named, queued):
        limits = Limits(lanes_named_max=named, responses_active_max=active, creates_queued_max=queued)
        self.connection, self.model = Connection(limits), Model(limits)
        self.sent = 0
        self.accepted: dict[str | None, list[int]] = {}
        self.came_out: dict[str | None, list[int]] = {}

    @rule(burst=st.lists(st.tuples(st.sampled_from(LANES), st.booleans()), min_size=1, max_size=6))
    def creates(self, burst):
        for lane, refused in burst:
            self._create(lane, refused)

    def _create(self, lane, refused):
        self.sent += 1
        fields = {"previous_response_id": str(self.sent), "stream_id": lane, "background": refused}
        error = None
        try:
            self.connection.receive(json.dumps({"type": "response.create", **fields}))
        except ProtocolError as raised:
            error = raised
        expected = self.model.receive(lane, self.sent, refused)
        if error is None:
            assert expected is None
            self.accepted.setdefault(lane, []).append(self.sent)
        else:
            assert (error.code, error.stream_id) == (expected, lane)

    def _next(self) -> bool:
        expected = self.model.next_turn()
        turn = self.connection.next_turn()
        if turn is None:
            assert expected is None
            return False
        what = turn.create if isinstance(turn, Start) else turn
        assert (what.stream_id, int(what.previous_response_id), not isinstance(turn, Start)) == expected
        self.came_out.setdefault(what.stream_id, []).append(int(what.previous_response_id))
        return True

    @rule()
    def start_one(self):
        self._next()

    @rule()
    def start_all(self):
        while self._next():
            pass

    @precondition(lambda self: self.model.running)
    @rule(data=st.data())
    def end(self, data):
        lane = data.draw(st.sampled_from(sorted(self.model.running, key=str)))
        self.connection.end_turn(lane)
        self.model.end_turn(lane)

    @invariant()
    def never_more_than_may_run(self):
        """At most so many responses are active, over all lanes (WebSocket mode guide, "Limits")."""
        assert self.model.active() <= self.model.limits.responses_active_max
        assert f"active={self.model.active()} queued={len(self.model.waiting)}>" in repr(self.connection)

    def teardown(self):
        """Whatever was accepted comes out, once, and in its lane's order."""
        if not hasattr(self, "model"):
            return
        while self._next() or self.model.running:
            for lane in list(self.model.running):
                self.connection.end_turn(lane)
                self.model.end_turn(lane)
        assert self.came_out == self.accepted


TestLanes = Lanes.TestCase
TestLanes.settings = settings(max_examples=150, stateful_step_count=60)
