"""What comes next in a run, out of its last step alone: every case, and a crash at every point."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from openline.client.errors import OpenlineError
from openline.client.run_state import (
    Call,
    Done,
    Run,
    Send,
    SendAgain,
    SendOutputs,
    Status,
    Step,
    calls_of,
    is_done,
    next_move,
)
from openline.client.tool_outputs import ToolOutput

FRESH = Call("call_1", "function_call", "append", "{}")
STARTED = msgspec.structs.replace(FRESH, has_started=True)
FINISHED = msgspec.structs.replace(STARTED, output=ToolOutput("done"))
TOLD = msgspec.structs.replace(FRESH, output=ToolOutput("Error: no such tool", is_error=True))  # never started
STATES = {"fresh": FRESH, "started": STARTED, "finished": FINISHED, "told": TOLD}
STATUSES: tuple[Status, ...] = ("open", "completed", "incomplete", "failed", "cancelled", "refused")


def step(status: Status = "completed", *calls: Call) -> Step:
    numbered = tuple(msgspec.structs.replace(call, call_id=f"call_{number}") for number, call in enumerate(calls, 1))
    return Step(1, 1, "key", {"input": []}, None, status, {"id": "resp_1", "output": []}, numbered)


def never(_name: str) -> bool:
    return False


def always(_name: str) -> bool:
    return True


class TestNextMove:
    def test_an_open_turn_is_sent_with_its_key(self):
        """Whether it was sent before or not: the server knows by the key."""
        assert next_move(step("open"), never) == Send()

    @pytest.mark.parametrize("status", ["failed", "cancelled", "refused"])
    def test_what_came_to_nothing_is_asked_again_under_another_key(self, status: Status):
        """Under the old key the server would replay the same end."""
        assert next_move(step(status), never) == SendAgain()

    def test_a_turn_without_calls_is_the_answer(self):
        """So is one that was cut: its calls may be cut too."""
        assert next_move(step(), never) == Done()
        assert next_move(step("incomplete", FRESH), never) == Done()

    @pytest.mark.parametrize("count", [1, 2, 3])
    @pytest.mark.parametrize("is_idempotent", [never, always])
    def test_of_any_calls_each_is_run_once_at_most(self, count: int, is_idempotent: Any):
        """In every combination of what may have become of them.

        What has an output never runs again; what has started only if it is idempotent; the others do run; and outputs
        are sent when all are there, in the order of the calls.

        Source: guarantees, "Tools exactly once".
        """
        for states in itertools.product(STATES.values(), repeat=count):
            calls = step("completed", *states).calls
            move = next_move(step("completed", *states), is_idempotent)
            if all(call.output for call in calls):
                outputs = [
                    {"type": "function_call_output", "call_id": c.call_id, "output": c.output.content} for c in calls
                ]
                assert move == SendOutputs(tuple(outputs))
                continue
            assert isinstance(move, Run)
            unfinished = [call for call in calls if call.output is None]
            assert sorted([*move.ready, *move.unknown], key=lambda call: call.call_id) == unfinished
            for call in move.unknown:
                assert call.has_started
                assert not is_idempotent(call.name)
            for call in move.ready:
                assert is_idempotent(call.name) or not call.has_started

    @pytest.mark.parametrize("status", STATUSES)
    def test_a_session_is_done_when_its_last_step_is(self, status: Status):
        """The list of sessions says the same as the loop."""
        for calls in ([], [FRESH], [FINISHED]):
            move = next_move(step(status, *calls), never)
            assert is_done(status, len(calls)) == (move == Done())

    def test_idempotence_goes_by_the_tools_name(self):
        """Of two calls that have started, one may run again."""
        other = msgspec.structs.replace(STARTED, name="read")
        first, second = step("completed", STARTED, other).calls
        assert next_move(step("completed", STARTED, other), lambda name: name == "read") == Run((second,), (first,))


class TestCalls:
    def test_functions_and_custom_tools_wait_for_an_output(self):
        """In the order of the response; hosted tools do not, nor does anything else.

        Source: Responses API reference, "Function tool call", "Custom tool call".
        """
        output = [
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "function_call", "call_id": "a", "name": "f", "arguments": '{"x": 1}', "status": "completed"},
            {"type": "web_search_call", "id": "ws_1", "status": "completed"},
            {"type": "custom_tool_call", "call_id": "b", "name": "c", "input": "text"},
        ]
        calls = calls_of({"output": output})
        assert calls == (Call("a", "function_call", "f", '{"x": 1}'), Call("b", "custom_tool_call", "c", "text"))
        told = msgspec.structs.replace(calls[1], output=ToolOutput("no"))
        assert told.output_item == {"type": "custom_tool_call_output", "call_id": "b", "output": "no"}

    def test_the_same_call_twice_is_one(self):
        """Some servers repeat an item."""
        item = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
        assert calls_of({"output": [item, item]}) == (Call("a", "function_call", "f", "{}"),)

    def test_different_calls_under_one_id_are_not_run(self):
        """An output could not say whose it is; the model is told so."""
        item = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
        (call,) = calls_of({"output": [item, item | {"name": "g"}, item]})
        assert call.output is not None
        assert call.output.is_error
        assert "different calls under its call_id" in str(call.output.content)

    def test_a_call_without_an_id_is_an_error(self):
        """Its output could not be sent."""
        with pytest.raises(OpenlineError, match="'f' without a call_id"):
            calls_of({"output": [{"type": "function_call", "name": "f", "arguments": "{}"}]})
