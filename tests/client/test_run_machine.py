"""Runs of any shape whose agents die at any moment: a state machine over the ledger's rows and the pure decision."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from openline.client.ledger import Ledger
from openline.client.run_state import Call, Done, Run, Send, SendOutputs, Step, calls_of, next_move
from openline.client.tool_outputs import ToolOutput

IDEMPOTENT, OTHER = "read", "append"


def is_idempotent(name: str) -> bool:
    return name == IDEMPOTENT


class Runs(RuleBasedStateMachine):
    """An agent takes one action at a time, and may die between any two; the server and the tools' world live on."""

    def __init__(self) -> None:
        super().__init__()
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.generations: Counter[int] = Counter()  # of each turn, at the server
        self.held: dict[str, dict[str, object]] = {}  # responses, by their key
        self.done: Counter[tuple[int, str]] = Counter()  # what tools did, by turn and call
        self.answer: tuple[int, ...] | None = None

    @initialize(turns=st.lists(st.lists(st.sampled_from([IDEMPOTENT, OTHER]), min_size=1, max_size=3), max_size=3))
    def begin(self, turns: list[list[str]]) -> None:
        self.turns = [*turns, []]
        self.folder = tempfile.TemporaryDirectory()
        self.ledger = Ledger(Path(self.folder.name) / "ledger.db")
        self.agent = self.life()

    @precondition(lambda self: self.answer is None)
    @rule(actions=st.integers(1, 6))
    def act(self, actions: int) -> None:
        for _ in range(actions):
            next(self.agent, None)

    @rule()
    def die(self) -> None:
        """A process ends; the next one opens the file that it finds."""
        self.agent.close()
        path = self.ledger.path
        self.ledger.close()
        self.ledger = Ledger(path)
        self.agent = self.life()

    @invariant()
    def nothing_was_done_twice(self) -> None:
        """No second generation, and no tool but an idempotent one ran twice."""
        assert set(self.generations.values()) <= {1}
        twice = {at for at, times in self.done.items() if times > 1}
        assert all(is_idempotent(self.turns[turn - 1][int(call_id)]) for turn, call_id in twice)

    def teardown(self) -> None:
        """Left alone, the run ends, and everything was done."""
        if self.folder is None:  # it was not begun
            return
        for _ in self.agent:
            pass
        self.agent.close()
        wanted = {(turn, str(call)) for turn, names in enumerate(self.turns, 1) for call in range(len(names))}
        assert set(self.done) == wanted
        assert self.answer == tuple(range(1, len(self.turns) + 1))
        self.nothing_was_done_twice()
        self.ledger.close()
        self.folder.cleanup()

    # An agent's life: an action between any two yields.

    def life(self) -> Iterator[None]:
        steps = self.ledger.steps("s")
        if not steps:
            steps.append(Step(1, 1, "key 1", {"input": "Go."}))
            self.ledger.add_step("s", steps[-1])
            yield
        while True:
            step = steps[-1]
            match next_move(step, is_idempotent):
                case Send():
                    response = self.send(step)
                    yield
                    steps[-1] = msgspec.structs.replace(
                        step, status="completed", response=response, calls=calls_of(response)
                    )
                    self.ledger.end_turn("s", steps[-1])
                    yield
                case Run(ready, unknown):
                    for call in unknown:
                        steps[-1] = steps[-1].with_call(self.find_out(step, call))
                        yield
                    for call in ready:
                        self.ledger.start_call("s", step, call)
                        yield
                        self.done[step.number, call.call_id] += 1
                        yield
                        steps[-1] = steps[-1].with_call(self.finish(step, call, "done"))
                        yield
                case SendOutputs(items):
                    steps.append(Step(step.number + 1, 1, f"key {step.number + 1}", {"input": list(items)}))
                    self.ledger.add_step("s", steps[-1])
                    yield
                case Done():
                    self.answer = tuple(each.number for each in steps)
                    return
                case other:
                    raise AssertionError(other)

    def send(self, step: Step) -> dict[str, object]:
        """What the server does with a key: the same key, the same response."""
        if step.idempotency_key not in self.held:
            self.generations[step.number] += 1
            names = self.turns[step.number - 1]
            output = [
                {"type": "function_call", "call_id": str(number), "name": name, "arguments": "{}"}
                for number, name in enumerate(names)
            ]
            self.held[step.idempotency_key] = {"status": "completed", "output": output}
        return self.held[step.idempotency_key]

    def find_out(self, step: Step, call: Call) -> Call:
        """What an app does that can see whether its tool did something."""
        if self.done[step.number, call.call_id]:
            return self.finish(step, call, "found")
        return msgspec.structs.replace(call, has_started=False)

    def finish(self, step: Step, call: Call, output: str) -> Call:
        finished = msgspec.structs.replace(call, output=ToolOutput(output))
        self.ledger.finish_call("s", step, finished)
        return finished


class TestRuns(Runs.TestCase):
    settings = settings(max_examples=30, stateful_step_count=20)
