"""An agent that dies, at every point where it can, and the one that goes on for it."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from sqlite3 import Connection
from typing import Any

import pytest

import openline
from client.replies import Cut, Held
from client.test_run_tools import add, calls
from openline import RUN, STOP, Ledger, Output, ToolCall
from openline.client.ledger import SessionLocked
from openline.client.progress import Progress, TurnStarted
from openline.client.run_options import RunBoundReached
from openline.protocol.errors import ProtocolError


class Died(BaseException):
    """The agent's process is gone."""


class MortalLedger(Ledger):
    """A ledger whose agent dies at one of its commits.

    Args:
        lives: commits that it survives; None survives all.
        after: it dies when that commit is on the disk, else just before.
    """

    def __init__(self, path: Path, lives: int | None = None, *, after: bool = False) -> None:
        super().__init__(path)
        self.lives = lives
        self.after = after
        self.commits = 0

    @contextmanager
    def _transaction(self) -> Generator[Connection]:
        with super()._transaction() as connection:
            yield connection
            writes = connection.total_changes > self.commits_seen(connection)
            if writes:
                self.commits += 1
                if self.commits == self.lives and not self.after:
                    raise Died
        if writes and self.commits == self.lives:
            raise Died

    _seen = 0

    def commits_seen(self, connection: Connection) -> int:
        """The rows that were changed up to the last commit."""
        before, self._seen = self._seen, connection.total_changes
        return before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


class Agent:
    """An agent whose tools write lines, as the next one does after it."""

    def __init__(self, at: Any, path: Path) -> None:
        self.at = at
        self.path = path
        self.lines: list[str] = []
        self.asked: list[str] = []
        self.keys: list[str] = []

    def append(self, line: str) -> str:
        """Append a line."""
        self.lines.append(line)
        return f"appended {line}"

    def look(self, call: ToolCall) -> Any:
        """What an app can find out: the line is there, or it is not."""
        self.asked.append(call.arguments["line"])
        return Output("found") if call.arguments["line"] in self.lines else RUN

    def note(self, progress: Progress) -> None:
        if isinstance(progress, TurnStarted):
            self.keys.append(progress.idempotency_key)

    async def run(self, ledger: Ledger, **options: Any) -> openline.RunResult:
        """A process's whole life."""
        async with openline.connect(self.at.url, model="m") as session:
            return await openline.run_tools(
                session,
                tools=[self.append],
                ledger=ledger,
                **{"on_unknown": self.look, "on_progress": self.note, **options},
            )

    async def begin(self, ledger: Ledger, **options: Any) -> str:
        """A process's whole life, from the input; the session's id."""
        async with openline.connect(self.at.url, model="m", session_id="s") as session:
            await openline.run_tools(
                session,
                input="Go.",
                tools=[self.append],
                ledger=ledger,
                **{"on_unknown": self.look, "on_progress": self.note, **options},
            )
        return session.id


def lines(*names: str) -> list[tuple[str, str]]:
    return calls(*({"line": name} for name in names), name="append")


TURNS = (lines("one"), lines("two", "three"), "Done.")
# Of each of three turns its create and its end; of each of three calls its start and its end.
COMMITS = 3 * 2 + 3 * 2


class TestEveryPoint:
    async def test_a_whole_run_has_that_many_commits(self, peer, path: Path):
        """So that the next tests reach every point."""
        agent = Agent(await peer(*TURNS), path)
        with MortalLedger(path) as ledger:
            await agent.begin(ledger)
            assert ledger.commits == COMMITS

    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    @pytest.mark.parametrize("lives", range(1, COMMITS + 1))
    async def test_the_next_agent_goes_on_where_one_died(self, peer, path: Path, lives: int, after: bool):
        """Before and after each commit: every line is there once, and the model was asked for each turn once.

        Source: guarantees, "Tools exactly once".
        """
        agent = Agent(await peer(*TURNS), path)
        with pytest.raises(Died), MortalLedger(path, lives, after=after) as ledger:
            await agent.begin(ledger, parallel=False)
        if lives == 1 and not after:  # nothing was begun
            with Ledger(path) as ledger:
                assert ledger.steps("s") == []
            return
        with Ledger(path) as ledger:
            result = await agent.run(ledger, resume="s", parallel=False)
        assert result.text == "Done."
        assert agent.lines == ["one", "two", "three"]
        assert agent.at.engine.generations == [1, 2, 3]
        outputs = agent.at.engine.outputs()
        expected = {"call_1_1": "appended one", "call_2_1": "appended two", "call_2_2": "appended three"}
        assert outputs.keys() == expected.keys()
        assert all(outputs[call_id] in {"found", said} for call_id, said in expected.items())
        assert len(agent.asked) <= 1

    @pytest.mark.parametrize("seed", range(4))
    async def test_many_deaths_in_one_run(self, peer, path: Path, seed: int):
        """Each agent dies at one of its first commits."""
        agent = Agent(await peer(*TURNS), path)
        deaths = 0
        options: dict[str, Any] = {}
        for lives in itertools.islice(itertools.cycle((1 + seed, 2, 1)), 100):
            with MortalLedger(path, lives, after=seed % 2 == 1) as ledger:
                try:
                    await (agent.run(ledger, **options) if options else agent.begin(ledger))
                    break
                except Died:
                    deaths += 1
                    if ledger.steps("s"):
                        options = {"resume": "s"}
        assert deaths > 2
        assert sorted(agent.lines) == ["one", "three", "two"]

    async def test_a_turn_is_sent_again_with_its_key(self, peer, path: Path):
        """Under the same key the server knows it, and generates nothing twice."""
        agent = Agent(await peer(*TURNS), path)
        with pytest.raises(Died), MortalLedger(path, 1, after=True) as ledger:
            await agent.begin(ledger)
        with Ledger(path) as ledger:
            (step,) = ledger.steps("s")
            assert step.status == "open"
            await agent.run(ledger, resume="s")
        assert agent.keys[0] == step.idempotency_key
        assert len(set(agent.keys)) == 3


class TestUnknown:
    """A call that had started, and of whose end the ledger has nothing."""

    DIED_IN_TOOL = 3  # commits: the create, the turn's end, the call's start

    async def agent(self, peer: Any, path: Path) -> Agent:
        agent = Agent(await peer(lines("one", "two"), "Done."), path)
        with pytest.raises(Died), MortalLedger(path, self.DIED_IN_TOOL, after=True) as ledger:
            await agent.begin(ledger, parallel=False)
        return agent

    async def test_nobody_guesses(self, peer, path: Path):
        """By default the run stops, names the call and says how to go on; nothing of the turn is run."""
        agent = await self.agent(peer, path)
        for on_unknown in (None, lambda _: STOP):
            with Ledger(path) as ledger, pytest.raises(openline.ToolOutcomeUnknown) as unknown:
                await agent.run(ledger, resume="s", on_unknown=on_unknown)
            assert unknown.value.call == {
                "type": "function_call",
                "call_id": "call_1_1",
                "name": "append",
                "arguments": '{"line": "one"}',
            }
            assert "call call_1_1 of tool 'append' had started" in str(unknown.value)
            assert "on_unknown=" in str(unknown.value)
        assert agent.lines == []

    async def test_the_app_may_know_its_output(self, peer, path: Path):
        """The model gets that, as if the tool had returned it; the tool is not run."""
        agent = await self.agent(peer, path)
        with Ledger(path) as ledger:
            await agent.run(ledger, resume="s", on_unknown=lambda _: Output({"ok": True}))
        assert agent.lines == ["two"]
        assert agent.at.engine.outputs() == {"call_1_1": '{"ok":true}', "call_1_2": "appended two"}

    async def test_the_app_may_have_it_run_again(self, peer, path: Path):
        """It may ask around first, as a coroutine."""
        agent = await self.agent(peer, path)
        asked: list[ToolCall] = []

        async def look(call: ToolCall) -> Any:
            asked.append(call)
            return RUN

        with Ledger(path) as ledger:
            await agent.run(ledger, resume="s", on_unknown=look)
        assert asked == [ToolCall("s", 1, "call_1_1", "append", {"line": "one"})]
        assert sorted(agent.lines) == ["one", "two"]

    async def test_an_answer_that_is_none_is_refused(self, peer, path: Path):
        """A forgotten `return` runs nothing."""
        agent = await self.agent(peer, path)
        with (
            Ledger(path) as ledger,
            pytest.raises(
                openline.OpenlineError, match=r"on_unknown answered None: expected Output\(value\), RUN or STOP"
            ),
        ):
            await agent.run(ledger, resume="s", on_unknown=lambda _: None)
        assert agent.lines == []

    async def test_what_the_app_said_of_one_call_is_kept_when_it_stops_at_the_next(self, peer, path: Path):
        """It is not asked again."""
        agent = await self.agent(peer, path)
        answers = iter([Output("known"), STOP])
        with Ledger(path) as ledger:
            (step,) = ledger.steps("s")
            ledger.start_call("s", step, step.calls[1])  # the second had started too
            with pytest.raises(openline.ToolOutcomeUnknown):
                await agent.run(ledger, resume="s", on_unknown=lambda _: next(answers))
        with Ledger(path) as ledger:
            await agent.run(ledger, resume="s", on_unknown=lambda _: Output("now too"))
        assert agent.at.engine.outputs() == {"call_1_1": "known", "call_1_2": "now too"}

    async def test_an_idempotent_tool_runs_again_by_itself(self, peer, path: Path):
        """The app is not asked."""
        ran: list[str] = []

        @openline.tool(idempotent=True)
        def append(line: str) -> None:
            ran.append(line)

        agent = await self.agent(peer, path)
        with Ledger(path) as ledger:
            async with openline.connect(agent.at.url, model="m") as session:
                await openline.run_tools(session, tools=[append], ledger=ledger, resume="s")
        assert sorted(ran) == ["one", "two"]


class TestConversation:
    async def test_the_next_agent_has_all_that_was_said(self, peer, path: Path):
        """Also where the server has forgotten it: it is sent in full."""
        at = await peer(calls({"a": 1}), calls({"a": 2}), "Done.", store_url="none")
        with Ledger(path) as ledger:
            session = await at.session(session_id="s")
            with pytest.raises(RunBoundReached):
                await openline.run_tools(session, input="Go.", tools=[add], ledger=ledger, turns_max=1, store=False)
            await session.close()
            await openline.run_tools(await at.session(), tools=[add], ledger=ledger, resume="s")
        assert at.engine.outputs() == {"call_1_1": "2", "call_2_1": "3"}
        types = [json.loads(item.raw).get("type", "message") for item in at.engine.requests[-1].context.items()]
        assert types == ["message", *["function_call", "function_call_output"] * 2]

    async def test_its_fields_go_on_to_hold(self, peer, path: Path):
        """Model and instructions are the first agent's, but for those that the next one names."""
        at = await peer(calls({"a": 1}), calls({"a": 2}), "Done.")
        with Ledger(path) as ledger:
            session = await at.session(session_id="s", model="first")
            options: dict[str, Any] = {"tools": [add], "ledger": ledger}
            with pytest.raises(RunBoundReached):
                await openline.run_tools(
                    session, input="Go.", turns_max=1, instructions="Be exact.", temperature=0.5, **options
                )
            await openline.run_tools(await at.session(model=None), resume="s", temperature=0.7, **options)
        asked = [request.create for request in at.engine.requests]
        assert [(each.model, each.instructions, each.temperature) for each in asked] == [
            ("first", "Be exact.", 0.5),
            ("first", "Be exact.", 0.7),
            ("first", "Be exact.", 0.7),
        ]

    async def test_what_the_next_agent_says_once_is_said_once(self, peer, path: Path):
        """A choice that forces a call holds for its first turn only."""
        at = await peer(calls({"a": 1}), calls({"a": 2}), "Done.")
        with Ledger(path) as ledger:
            options: dict[str, Any] = {"tools": [add], "ledger": ledger}
            with pytest.raises(RunBoundReached):
                await openline.run_tools(await at.session(session_id="s"), input="Go.", turns_max=1, **options)
            await openline.run_tools(await at.session(), resume="s", tool_choice="required", **options)
        assert [request.create.tool_choice for request in at.engine.requests] == [None, "required", None]

    async def test_an_answer_whose_events_are_gone_is_an_answer(self, peer, path: Path):
        """The server has the response, and no longer every event of it."""
        held = Held("word " * 10_000)
        at = await peer(held, resume={"bytes_max": 1000})
        with Ledger(path) as ledger:
            options: dict[str, Any] = {"tools": [add], "ledger": ledger}
            running = asyncio.ensure_future(
                openline.run_tools(await at.session(session_id="s"), input="Go.", **options)
            )
            await asyncio.wait_for(held.begun.wait(), 5)
            running.cancel()
            await asyncio.wait({running})
            held.go_on.set()
            await at.server.idle()
            result = await openline.run_tools(await at.session(), resume="s", **options)
        assert result.text == "Wait. " + held.then
        assert at.engine.generations == [1]

    async def test_what_was_said_outside_the_ledger_is_not_lost(self, peer, path: Path):
        """A run may follow turns of the app's own."""
        at = await peer("Hello.", calls({"a": 1}), "Done.", store_url="none")
        with Ledger(path) as ledger:
            session = await at.session(session_id="s")
            await session.create(input="Hi, I am Ada.", store=False).response()
            with pytest.raises(RunBoundReached):
                await openline.run_tools(session, input="Go.", tools=[add], ledger=ledger, turns_max=1, store=False)
            await session.close()
            await openline.run_tools(await at.session(), tools=[add], ledger=ledger, resume="s")
        assert b"I am Ada" in at.engine.requests[-1].context.items().__next__().raw
        assert at.engine.generations == [1, 2, 3]

    async def test_another_run_may_follow_in_another_process(self, peer, path: Path):
        """With `resume` and an input, or by the session's id alone."""
        at = await peer(calls({"a": 1}), "First.", "Second.", "Third.")
        with Ledger(path) as ledger:
            options: dict[str, Any] = {"tools": [add], "ledger": ledger}
            await openline.run_tools(await at.session(session_id="s"), input="Go.", **options)
            second = await openline.run_tools(await at.session(), input="And?", resume="s", **options)
            third = await openline.run_tools(await at.session(session_id="s"), input="And?", **options)
            assert [step.run for step in ledger.steps("s")] == [1, 1, 2, 3]
        assert (second.text, third.text) == ("Second.", "Third.")
        assert (len(second.responses), second.calls) == (1, ())
        assert at.engine.generations == [1, 2, 3, 4]

    async def test_a_run_that_is_done_is_not_done_again(self, peer, path: Path):
        """Its result is in the ledger; the server is not asked."""
        at = await peer(calls({"a": 1}), "Done.")
        with Ledger(path) as ledger:
            options: dict[str, Any] = {"tools": [add], "ledger": ledger}
            first = await openline.run_tools(await at.session(session_id="s"), input="Go.", **options)
            again = await openline.run_tools(await at.session(), resume="s", **options)
        assert again == first
        assert at.engine.generations == [1, 2]

    async def test_a_failed_turn_is_asked_again_under_another_key(self, peer, path: Path):
        """Under the old one its failure would be replayed."""
        at = await peer(calls({"a": 1}), ProtocolError("upstream_error", "The model fell over."))
        with Ledger(path) as ledger:
            options: dict[str, Any] = {"tools": [add], "ledger": ledger}
            with pytest.raises((openline.TurnFailed, openline.Refused)):
                await openline.run_tools(await at.session(session_id="s"), input="Go.", **options)
            at.engine.replies[1] = "Better."
            result = await openline.run_tools(await at.session(), resume="s", **options)
            steps = ledger.steps("s")
        assert result.text == "Better."
        assert [step.status for step in steps][-1] == "completed"
        assert at.engine.outputs() == {"call_1_1": "2"}

    async def test_a_refused_create_may_be_mended(self, peer, path: Path):
        """What refused it may be what it said: the next agent may say it otherwise."""
        at = await peer("Done.", upstream={"models": ("m",)})
        with Ledger(path) as ledger:
            options: dict[str, Any] = {"tools": [add], "ledger": ledger}
            with pytest.raises(openline.Refused, match="temperature"):
                await openline.run_tools(await at.session(session_id="s"), input="Go.", temperature="hot", **options)
            result = await openline.run_tools(await at.session(), resume="s", temperature=0.5, **options)
            assert [step.status for step in ledger.steps("s")] == ["refused", "completed"]
        assert result.text == "Done."

    async def test_a_cancelled_turn_is_asked_again(self, peer, path: Path):
        """As a server ends turns that is told to stop; what it had said is left out. After three it is given up."""
        at = await peer(calls({"a": 1}), Cut("cancelled"))
        with Ledger(path) as ledger:
            options: dict[str, Any] = {"tools": [add], "ledger": ledger}
            with pytest.raises(openline.OpenlineError, match=r"has cancelled turn 4 and those before it, 3 in all"):
                await openline.run_tools(await at.session(session_id="s"), input="Go.", **options)
            at.engine.replies[1] = "Better."
            result = await openline.run_tools(await at.session(), resume="s", **options)
        assert result.text == "Better."
        assert at.engine.generations == [1, 2, 2, 2, 2]
        assert b"Half a" not in b"".join(item.raw for item in at.engine.requests[-1].context.items())


class TestRefusals:
    """What does not fit what the ledger has; the message says how to go on."""

    async def test_a_run_that_is_not_done_is_not_begun_anew(self, peer, path: Path):
        """By mistake it would be: with the same session id, without `resume`."""
        agent = Agent(await peer(*TURNS), path)
        with pytest.raises(Died), MortalLedger(path, 4) as ledger:
            await agent.begin(ledger)
        with Ledger(path) as ledger, pytest.raises(openline.OpenlineError, match="go on with it by resume='s'"):
            await agent.begin(ledger)

    async def test_an_input_has_to_wait_for_the_end_of_the_run(self, peer, path: Path):
        """The model would not see it."""
        agent = Agent(await peer(*TURNS), path)
        with pytest.raises(Died), MortalLedger(path, 4) as ledger:
            await agent.begin(ledger)
        with Ledger(path) as ledger, pytest.raises(openline.OpenlineError, match="resume it without an input first"):
            await agent.run(ledger, resume="s", input="Wait!")

    async def test_what_is_not_held_cannot_be_resumed(self, peer, path: Path):
        """Neither an unknown session, nor anything without a ledger."""
        at = await peer()
        with Ledger(path) as ledger, pytest.raises(openline.OpenlineError, match=r"ledger\.db> holds no session 'x'"):
            await openline.run_tools(await at.session(), tools=[add], ledger=ledger, resume="x")
        with pytest.raises(openline.OpenlineError, match="resume='x' needs the ledger="):
            await openline.run_tools(await at.session(), tools=[add], resume="x")

    async def test_a_second_agent_is_turned_away(self, peer, path: Path):
        """While the first works; it is told which process that is."""
        agent = Agent(await peer(*TURNS), path)
        with Ledger(path) as ledger, Ledger(path) as other:

            async def come_second(_: Progress) -> None:
                with pytest.raises(SessionLocked, match=r"held by process \d+"):
                    await agent.run(other, resume="s")

            await agent.begin(ledger, on_progress=come_second)
        assert sorted(agent.lines) == ["one", "three", "two"]
