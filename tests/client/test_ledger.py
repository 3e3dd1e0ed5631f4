"""The ledger file: what stands in it, who may read it, and what it refuses."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
import threading
from pathlib import Path

import msgspec
import pytest

from openline.client.ledger import Ledger, LedgerFailed, SessionLocked, committed
from openline.client.ledger_schema import APPLICATION_ID, MIGRATIONS
from openline.client.run_state import Call, Step
from openline.client.tool_outputs import ToolOutput

CREATE = {"input": [{"role": "user", "content": "Hello ☃"}], "model": "m", "tools": []}
RESPONSE = {"id": "resp_1", "status": "completed", "output": [{"type": "function_call"}]}
CALLS = (Call("call_b", "function_call", "append", '{"line": "x"}'), Call("call_a", "custom_tool_call", "run", "ls"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.db"


def step(number: int = 1, **changes: object) -> Step:
    return msgspec.structs.replace(Step(number, 1, f"key-{number}", CREATE), **changes)


def reopened(path: Path, session_id: str = "s") -> list[Step]:
    with Ledger(path) as ledger:
        return ledger.steps(session_id)


class TestEntries:
    def test_every_entry_is_there_for_another_process(self, path: Path):
        """Each as it was written: the create, the turn's end with its calls in order, a call's start, its output."""
        with Ledger(path) as ledger:
            ledger.add_step("s", step())
            assert reopened(path) == [step()]
            ended = step(status="completed", response=RESPONSE, calls=CALLS)
            ledger.end_turn("s", ended)
            assert reopened(path) == [ended]
            ledger.start_call("s", ended, CALLS[0])
            started = msgspec.structs.replace(CALLS[0], has_started=True)
            assert reopened(path) == [ended.with_call(started)]
            finished = msgspec.structs.replace(started, output=ToolOutput([{"type": "input_text", "text": "ä"}]))
            ledger.finish_call("s", ended, finished)
            assert reopened(path) == [ended.with_call(finished)]
            second = step(2, before={"root": None, "items": [{"role": "user", "content": "earlier"}]})
            ledger.add_step("s", second)
            assert reopened(path) == [ended.with_call(finished), second]

    def test_an_output_without_a_start_stands_alone(self, path: Path):
        """Of a call whose arguments were wrong, or that two calls share."""
        told = msgspec.structs.replace(CALLS[0], output=ToolOutput("Error: no", is_error=True))
        with Ledger(path) as ledger:
            ledger.add_step("s", step())
            ledger.end_turn("s", step(status="completed", response=RESPONSE, calls=(told,)))
        (call,) = reopened(path)[0].calls
        assert call == told

    def test_call_ids_may_come_again_in_another_turn_and_session(self, path: Path):
        """Some model servers count them from 0 in each turn."""
        with Ledger(path) as ledger:
            for session_id in ("s", "t"):
                for number in (1, 2):
                    ledger.add_step(session_id, step(number))
                    ledger.end_turn(session_id, step(number, status="completed", response=RESPONSE, calls=CALLS))
            ledger.finish_call("s", step(2), msgspec.structs.replace(CALLS[0], output=ToolOutput("only here")))
            assert [call.output for s in ledger.steps("s") for call in s.calls] == [
                None,
                None,
                ToolOutput("only here"),
                None,
            ]
            assert [call.output for s in ledger.steps("t") for call in s.calls] == [None] * 4

    def test_threads_may_share_it(self, path: Path):
        """Calls that run at once are noted at once."""
        with Ledger(path) as ledger:
            calls = tuple(Call(f"call_{number}", "function_call", "f", "{}") for number in range(16))
            ledger.add_step("s", step())
            ledger.end_turn("s", step(status="completed", response=RESPONSE, calls=calls))
            threads = [threading.Thread(target=ledger.start_call, args=("s", step(), call)) for call in calls]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert all(call.has_started for call in ledger.steps("s")[0].calls)

    async def test_an_entry_is_waited_for_by_who_is_cancelled_meanwhile(self):
        """Else the next one might be made before it, and a tool's output be lost that is about to be there."""
        go_on, written = threading.Event(), threading.Event()

        def write() -> None:
            go_on.wait(10)
            written.set()

        making = asyncio.ensure_future(committed(write))
        await asyncio.sleep(0)
        making.cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert not making.done()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await making
        assert written.is_set()


class TestSessions:
    def test_they_are_listed_last_changed_first_with_how_they_stand(self, path: Path):
        """A session whose last turn made calls, or has not ended, is not done."""
        with Ledger(path) as ledger:
            for session_id in ("open", "called", "done"):
                ledger.add_step(session_id, step())
            ledger.end_turn("called", step(status="completed", response=RESPONSE, calls=CALLS))
            ledger.end_turn("done", step(status="completed", response=RESPONSE))
            found = {each.session_id: each for each in ledger.sessions()}
            assert list(found) == ["done", "called", "open"]
            assert [each.is_done for each in found.values()] == [True, False, False]
            assert found["open"].created_at <= found["open"].changed_at
            ledger.add_step("done", step(2))
            assert (ledger.sessions()[0].turns, ledger.sessions()[0].is_done) == (2, False)

    def test_a_deleted_session_leaves_no_trace(self, path: Path):
        """Not even in the file's free pages: what is deleted is overwritten."""
        canary = "kept-no-longer"
        with Ledger(path) as ledger:
            ledger.add_step("s", step(create={"input": canary}))
            ledger.add_step("t", step())
            ledger.end_turn("s", step(status="completed", response=RESPONSE | {"x": canary}, calls=CALLS))
            ledger.delete("s")
            ledger.delete("never there")
            assert ledger.steps("s") == []
            assert ledger.steps("t") == [step()]
        assert all(canary.encode() not in file.read_bytes() for file in path.parent.iterdir())

    def test_one_agent_at_a_time_works_on_a_session(self, path: Path):
        """The second is told who holds it; other sessions are free; it can be held again afterwards."""
        with Ledger(path) as ledger, Ledger(path) as other:
            with ledger.hold("s"):
                with pytest.raises(SessionLocked, match=r"session 's' of .* is held by process \d+"), other.hold("s"):
                    pass
                with pytest.raises(SessionLocked):
                    other.delete("s")
                with other.hold("t"):
                    pass
            with other.hold("s"):
                pass

    def test_holding_a_session_lets_the_errors_of_the_block_out(self, path: Path):
        """An OSError of a tool is not the ledger's."""
        with Ledger(path) as ledger, pytest.raises(FileNotFoundError), ledger.hold("s"):
            raise FileNotFoundError


class TestFile:
    def test_only_its_user_can_read_it(self, path: Path):
        """The content of conversations is in it; SQLite's own files beside it have its mode."""
        with Ledger(path) as ledger, ledger.hold("s"):
            ledger.add_step("s", step())
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()}
        assert set(modes.values()) == {0o600}, modes
        assert {"ledger.db", "ledger.db-wal"} <= set(modes)

    def test_what_is_committed_is_on_the_disk(self, path: Path):
        """WAL with `synchronous=FULL` (2): a commit returns after its fsync."""
        with Ledger(path) as ledger:
            assert ledger._connection is not None
            assert ledger._connection.execute("PRAGMA synchronous").fetchone()[0] == 2
            assert ledger._connection.execute("PRAGMA journal_mode").fetchone()[0] == "wal"

    def test_another_programs_database_is_left_alone(self, path: Path):
        """The message says what to do."""
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE theirs (x)")
        database.close()
        with pytest.raises(LedgerFailed, match="is another program's database; name another file"):
            Ledger(path)

    def test_a_newer_ledger_is_refused(self, path: Path):
        """Rather than misread."""
        Ledger(path).close()
        with sqlite3.connect(path) as database:
            database.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
        database.close()
        with pytest.raises(LedgerFailed, match=r"newer version of Openline.*knows up to 1"):
            Ledger(path)

    def test_it_says_what_it_is(self, path: Path):
        """To `file` and to the next version."""
        Ledger(path).close()
        with sqlite3.connect(path) as database:
            assert database.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
            assert database.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        database.close()

    @pytest.mark.parametrize("name", ["no/such/folder/ledger.db", "."])
    def test_a_file_that_cannot_be_opened_is_named(self, tmp_path: Path, name: str):
        """With the system's own reason."""
        with pytest.raises(LedgerFailed, match=r"the ledger .* cannot be used: "):
            Ledger(tmp_path / name)

    def test_a_lock_that_another_program_keeps_is_waited_for_and_then_named(self, path: Path):
        """An entry that cannot be made is an error, never left out."""
        with Ledger(path, lock_wait_seconds_max=0.01) as ledger:
            keeper = sqlite3.connect(path, isolation_level=None)
            keeper.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerFailed, match="database is locked"):
                ledger.add_step("s", step())
            keeper.execute("ROLLBACK")
            keeper.close()
            ledger.add_step("s", step())
            assert ledger.steps("s") == [step()]

    def test_a_closed_ledger_refuses(self, path: Path):
        """Closing twice does nothing."""
        ledger = Ledger(path)
        ledger.close()
        ledger.close()
        with pytest.raises(LedgerFailed, match="is closed"):
            ledger.add_step("s", step())

    def test_in_memory_it_is_a_ledger_all_the_same(self):
        """A run without a file takes the same path."""
        with Ledger(None) as ledger, ledger.hold("s"):
            ledger.add_step("s", step())
            assert ledger.steps("s") == [step()]
        assert repr(ledger) == "<Ledger :memory: closed>"
