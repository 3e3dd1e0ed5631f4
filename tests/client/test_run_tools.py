"""The agent loop against a real server: what the model gets, what the app is told, and what bounds it."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

import openline
from client.replies import Cut, Held
from openline.client.progress import CallFinished, CallStarted, Progress, TextDelta, TurnFinished, TurnStarted
from openline.client.run_options import RunBoundReached
from openline.protocol.errors import ProtocolError


def add(a: int, b: int = 1) -> int:
    """Add two numbers."""
    return a + b


def calls(*arguments: dict[str, Any], name: str = "add") -> list[tuple[str, str]]:
    return [(name, json.dumps(each)) for each in arguments]


class TestLoop:
    @pytest.mark.parametrize("transport", ["auto", "websocket", "http"])
    async def test_tools_run_until_the_model_calls_none(self, peer, transport):
        """Each output goes to the model under its call's id; the result has every turn and call, and all tokens."""
        at = await peer(calls({"a": 1}), calls({"a": 2, "b": 3}, {"a": 4}), "All added.")
        session = await at.session(transport=transport)
        result = await openline.run_tools(session, input="Add.", tools=[add], instructions="Be exact.")
        assert result.text == "All added."
        assert at.engine.generations == [1, 2, 3]
        assert at.engine.outputs() == {"call_1_1": "2", "call_2_1": "5", "call_2_2": "5"}
        assert [request.create.instructions for request in at.engine.requests] == ["Be exact."] * 3
        assert [(done.call.turn, done.call.arguments, done.output.content) for done in result.calls] == [
            (1, {"a": 1}, "2"),
            (2, {"a": 2, "b": 3}, "5"),
            (2, {"a": 4}, "5"),
        ]
        assert [response["status"] for response in result.responses] == ["completed"] * 3
        assert result.usage == {
            "input_tokens": 30,
            "output_tokens": 6,
            "total_tokens": 36,
            "cached_tokens": 12,
            "reasoning_tokens": 3,
        }

    async def test_a_session_goes_on_after_a_run(self, peer):
        """With another run, or with creates of the app's own: the conversation is one."""
        at = await peer(calls({"a": 1}), "First.", "Second.", "Third.")
        session = await at.session()
        await openline.run_tools(session, input="Add.", tools=[add])
        second = await openline.run_tools(session, input="And?", tools=[add])
        third = await session.create(input="And?").response()
        assert second.text == "Second."
        assert third["output"][0]["content"][0]["text"] == "Third."
        assert at.engine.generations == [1, 2, 3, 4]

    async def test_programs_without_an_event_loop_have_the_same(self, peer):
        """A method of the synchronous session, with the same arguments."""
        at = await peer(calls({"a": 1}), "Done.")

        def agent() -> openline.RunResult:
            with openline.connect_sync(at.url, model="m") as session:
                return session.run_tools(input="Add.", tools=[add])

        assert (await asyncio.to_thread(agent)).text == "Done."
        assert at.engine.outputs() == {"call_1_1": "2"}

    async def test_content_parts_reach_the_model_as_they_are(self, peer):
        """An image is no JSON text."""
        parts = [{"type": "input_text", "text": "A page."}]

        def look() -> list[dict[str, str]]:
            return parts

        at = await peer(calls({}, name="look"), "Seen.")
        await openline.run_tools(await at.session(), input="Look.", tools=[look])
        assert at.engine.outputs() == {"call_1_1": parts}

    async def test_what_is_said_once_is_said_once(self, peer):
        """A choice that forces a call, and a parent, belong to the first turn; other choices hold."""
        at = await peer("Before.", calls({"a": 1}), "Done.")
        session = await at.session()
        parent = (await session.create(input="Hello.").response())["id"]
        await openline.run_tools(
            session, input="Add.", tools=[add], tool_choice="required", previous_response_id=parent, temperature=0.5
        )
        _, first, second = at.engine.requests
        assert (first.create.tool_choice, second.create.tool_choice) == ("required", None)
        assert first.create.previous_response_id == parent
        assert second.create.previous_response_id != parent
        assert (first.create.temperature, second.create.temperature) == (0.5, 0.5)

    async def test_a_choice_that_forces_nothing_holds(self, peer):
        """As `none` and `auto` do."""
        at = await peer(calls({"a": 1}), "Done.")
        await openline.run_tools(await at.session(), input="Add.", tools=[add], tool_choice="auto")
        assert [request.create.tool_choice for request in at.engine.requests] == ["auto", "auto"]

    async def test_a_turn_that_was_cut_ends_the_run(self, peer):
        """The app sees its status; calls of it may be cut as well, and are not run."""
        at = await peer(Cut("max_output_tokens"))
        result = await openline.run_tools(await at.session(), input="Add.", tools=[add])
        assert result.response["status"] == "incomplete"
        assert (result.text, result.calls) == ("Half a ", ())

    async def test_without_an_input_it_says_what_is_missing(self, peer):
        """Nothing is sent."""
        at = await peer()
        with pytest.raises(openline.OpenlineError, match=r"input: expected what the model is asked, or resume="):
            await openline.run_tools(await at.session(), tools=[add])
        assert at.engine.generations == []


class TestWhatTheModelIsTold:
    async def told(self, peer, call: tuple[str, str], *tools: Any, **options: Any) -> str:
        at = await peer([call], "I see.")
        result = await openline.run_tools(await at.session(), input="Go.", tools=tools or [add], **options)
        (output,) = at.engine.outputs().values()
        assert result.calls[0].output.is_error
        return output

    async def test_wrong_arguments_name_the_field(self, peer):
        """The tool is not run, and the model can call again."""
        assert await self.told(peer, ("add", '{"a": "one"}')) == "Error: argument 'a': expected `int`, got `str`."

    async def test_a_tool_that_is_not_there_is_named_with_those_that_are(self, peer):
        """Models make names up."""
        assert await self.told(peer, ("sub", "{}")) == "Error: there is no tool 'sub'. The tools are: add."

    async def test_an_exception_is_told_without_its_traceback(self, peer):
        """Class and text."""

        def fail() -> None:
            raise FileNotFoundError("notes.txt")

        assert await self.told(peer, ("fail", "{}"), fail) == "Error: FileNotFoundError: notes.txt"

    async def test_a_tool_out_of_time_is_told(self, peer):
        """And the run goes on."""

        async def hang() -> None:
            await asyncio.Event().wait()

        told = await self.told(peer, ("hang", "{}"), hang, tool_seconds_max=0.01)
        assert told.startswith("Error: no result within 0.01 seconds")

    async def test_the_app_may_have_the_exception_instead(self, peer):
        """The run ends with it; other calls of the turn are cancelled."""
        cancelled = asyncio.Event()

        async def hang() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

        async def fail() -> None:
            raise FileNotFoundError("notes.txt")

        at = await peer([("hang", "{}"), ("fail", "{}")])
        with pytest.raises(FileNotFoundError, match=r"notes\.txt"):
            await openline.run_tools(await at.session(), input="Go.", tools=[hang, fail], on_tool_error="raise")
        assert cancelled.is_set()


class TestParallel:
    async def most_at_once(self, peer, count: int, **options: Any) -> tuple[int, Any]:
        """Of so many calls in one turn, how many were inside at the same time."""
        inside = most = 0

        async def work(number: int) -> int:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            for _ in range(10):  # all that may come in do
                await asyncio.sleep(0.001)
            inside -= 1
            return number

        at = await peer(calls(*({"number": n} for n in range(count)), name="work"), "Done.")
        result = await openline.run_tools(await at.session(), input="Go.", tools=[work], **options)
        assert [done.output.content for done in result.calls] == [str(n) for n in range(count)]
        return most, at

    async def test_calls_of_one_turn_run_at_once(self, peer):
        """All of them are inside at the same time."""
        most, at = await self.most_at_once(peer, 8)
        assert most == 8
        assert at.engine.requests[0].create.parallel_tool_calls is None

    async def test_threads_run_at_once_too(self, peer):
        """Two functions that wait for each other both end."""
        meet = threading.Barrier(2, timeout=10)

        def wait() -> str:
            meet.wait()
            return "met"

        at = await peer(calls({}, {}, name="wait"), "Done.")
        result = await openline.run_tools(await at.session(), input="Go.", tools=[wait])
        assert [done.output.content for done in result.calls] == ["met", "met"]

    async def test_no_more_than_may_run_at_once(self, peer):
        """The others wait for their place."""
        assert (await self.most_at_once(peer, 8, parallel_max=3))[0] == 3

    async def test_one_at_a_time_if_the_app_wants_it_so(self, peer):
        """The model is asked for one call at a time as well."""
        most, at = await self.most_at_once(peer, 4, parallel=False)
        assert most == 1
        assert at.engine.requests[0].create.parallel_tool_calls is False


class TestBounds:
    async def test_calls_up_to_the_bound_run_and_not_one_more(self, peer):
        """At the bound all is well; over it none of the turn's calls starts."""
        ran: list[int] = []

        def note(number: int) -> None:
            ran.append(number)

        turns = [calls({"number": 1}, name="note"), calls({"number": 2}, {"number": 3}, name="note"), "Done."]
        at = await peer(*turns)
        result = await openline.run_tools(await at.session(), input="Go.", tools=[note], calls_max=3, parallel=False)
        assert (len(result.calls), ran) == (3, [1, 2, 3])
        ran.clear()
        with pytest.raises(RunBoundReached, match=r"calls_max = 2.*resume=") as reached:
            await openline.run_tools(await at.session(), input="Go.", tools=[note], calls_max=2)
        assert (reached.value.bound, reached.value.value, ran) == ("calls_max", 2, [1])

    async def test_turns_up_to_the_bound_are_taken_and_not_one_more(self, peer):
        """A model that calls for ever is stopped."""
        at = await peer(calls({"a": 1}), calls({"a": 2}), "Done.")
        result = await openline.run_tools(await at.session(), input="Go.", tools=[add], turns_max=3)
        assert len(result.responses) == 3
        with pytest.raises(RunBoundReached, match="turns_max = 2"):
            await openline.run_tools(await at.session(), input="Go.", tools=[add], turns_max=2)
        assert at.engine.generations == [1, 2, 3, 1, 2]

    async def test_an_output_over_the_bound_is_cut(self, peer):
        """The model is told so."""

        def read() -> str:
            return "x" * 101

        at = await peer(calls({}, name="read"), "Done.")
        await openline.run_tools(await at.session(), input="Go.", tools=[read], output_bytes_max=100)
        assert at.engine.outputs()["call_1_1"] == "x" * 100 + "\n[cut: the first 100 of 101 bytes]"

    @pytest.mark.parametrize(
        "bound", ["tool_seconds_max", "calls_max", "turns_max", "parallel_max", "output_bytes_max"]
    )
    async def test_a_bound_is_more_than_nothing(self, peer, bound):
        """It is said before anything is sent."""
        at = await peer()
        with pytest.raises(ValueError, match=f"{bound} is 0: expected more than 0"):
            await openline.run_tools(await at.session(), input="Go.", tools=[add], **{bound: 0})


class TestProgress:
    async def test_the_app_is_told_what_happens_in_order(self, peer):
        """Turns, text, calls with their outputs and how long they took; a callback may be a coroutine."""
        told: list[Progress] = []

        async def note(progress: Progress) -> None:
            await asyncio.sleep(0)
            told.append(progress)

        at = await peer([("add", '{"a": 1}'), ("sub", "{}")], "Done.")
        await openline.run_tools(await at.session(), input="Go.", tools=[add], on_progress=note, parallel=False)
        assert [type(each) for each in told] == [
            TurnStarted,
            TurnFinished,
            CallStarted,
            CallFinished,
            CallFinished,  # of a tool that is not there: nothing has started
            TurnStarted,
            TextDelta,
            TurnFinished,
        ]
        started, ended, call, finished, other, *_, delta, last = told
        assert isinstance(started, TurnStarted)
        assert (started.turn, started.is_resumed) == (1, False)
        assert isinstance(ended, TurnFinished)
        assert ended.response["output"][0]["call_id"] == "call_1_1"
        assert isinstance(call, CallStarted)
        assert isinstance(finished, CallFinished)
        assert finished.call == call.call
        assert finished.output.content == "2"
        assert finished.seconds is not None
        assert finished.seconds > 0
        assert isinstance(other, CallFinished)
        assert other.seconds is None
        assert delta == TextDelta("Done.")
        assert isinstance(last, TurnFinished)

    async def test_an_error_of_the_callback_ends_the_run(self, peer):
        """It is not swallowed."""

        def fail(_: Progress) -> None:
            raise LookupError("mine")

        at = await peer("Hello.")
        with pytest.raises(LookupError, match="mine"):
            await openline.run_tools(await at.session(), input="Go.", tools=[add], on_progress=fail)


class TestEnds:
    async def test_a_failed_turn_is_raised(self, peer):
        """As the session raises it."""
        at = await peer(ProtocolError("upstream_error", "The model fell over."))
        with pytest.raises((openline.TurnFailed, openline.Refused), match="The model fell over"):
            await openline.run_tools(await at.session(), input="Go.", tools=[add])

    async def test_cancelling_ends_tools_and_stream(self, peer, tmp_path: Path):
        """A tool is cancelled where it waits, and a turn where it speaks; both sessions can be gone on with."""
        tool_began, tool_ended = asyncio.Event(), asyncio.Event()

        async def hang() -> None:
            tool_began.set()
            try:
                await asyncio.Event().wait()
            finally:
                tool_ended.set()

        held = Held()
        at = await peer(calls({}, name="hang"), held)
        with openline.Ledger(tmp_path / "ledger.db") as ledger:
            for ready, answer in ((tool_began, None), (held.begun, openline.Output("enough"))):
                session = await at.session(session_id="s")
                options: dict[str, Any] = {"input": "Go."} if answer is None else {"resume": "s"}
                running = asyncio.ensure_future(
                    openline.run_tools(
                        session, tools=[hang], ledger=ledger, on_unknown=lambda _, answer=answer: answer, **options
                    )
                )
                await asyncio.wait_for(ready.wait(), 5)
                running.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await running
            assert tool_ended.is_set()
            held.go_on.set()
            result = await openline.run_tools(await at.session(), tools=[hang], ledger=ledger, resume="s")
        assert result.text.endswith("Done.")
        assert result.calls[0].output.content == "enough"
