"""`openline run`: what it shows, how it stops, and how it is gone on with."""

from __future__ import annotations

import io
import json
import logging
import re
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from commands import environment, read_until, serving
from openline.cli import app
from openline.cli.run_agent import Notes
from openline.cli.run_screen import Failure, PeopleScreen, ask_about, called, output_lines, printable
from openline.cli.tools_file import read_tools_file
from openline.client.progress import CallFinished, TextDelta
from openline.client.recovery import GiveUp, Resume
from openline.client.run_options import RUN, STOP, Output
from openline.client.tool_outputs import ToolOutput
from openline.client.tools import ToolCall

SECONDS_MAX = 60
TOOLS = '''
import openline

@openline.tool
def shout(word: str) -> str:
    """Say a word loudly."""
    return word.upper()

@openline.tool
def fail(why: str) -> None:
    """Fail."""
    raise LookupError(why)

def helper(x):
    return x
'''
# Appends a line, and takes its time where a file asks for it.
APPEND = """
import os, time
from pathlib import Path

FOLDER = Path(__file__).parent

def append(line: str) -> str:
    with (FOLDER / "lines.txt").open("a") as file:
        file.write(line + "\\n")
    while (FOLDER / "wait").exists():
        time.sleep(0.01)
    return f"appended {line}"
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server in front of the script; its base URL."""
    with serving("--upstream", "scripted:") as (_, said):
        yield re.search(r"listens on (http://\S+/v1)", said)[1]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with tools in it, and the user's data directory."""
    (tmp_path / "tools.py").write_text(TOOLS)
    (tmp_path / "append.py").write_text(APPEND)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("OPENLINE_BASE_URL", "OPENLINE_LEDGER", "OPENLINE_API_KEY", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def ran(folder: Path, url: str) -> Any:
    """Runs the command in this process."""

    def run(*arguments: object, base_url: str = url) -> Any:
        return CliRunner().invoke(app, ["run", *map(str, arguments), "--base-url", base_url], catch_exceptions=False)

    return run


def command_in(said: str) -> list[str]:
    """The command that goes on, as it is printed; without `openline run`."""
    (line,) = re.findall(r"^  openline run (--resume .+)$", said, re.MULTILINE)
    return shlex.split(line)


class TestShown:
    def test_the_answer_alone_goes_to_standard_output(self, ran):
        """So that it can be put into a file; nothing is coloured where no terminal is."""
        shown = ran("Hello.")
        assert shown.exit_code == 0
        assert shown.stdout == (
            "This is the scripted engine, in turn 1 of the conversation. It repeats no model's words.\n"
        )
        assert "scripted-text at http://" in shown.stderr
        assert "\x1b" not in shown.stdout + shown.stderr

    def test_calls_are_shown_with_arguments_and_outputs(self, ran, folder: Path):
        """And what it all cost, at the end."""
        shown = ran("Go.", "--tools", folder / "tools.py", "--model", "scripted-tools-2")
        assert shown.exit_code == 0
        assert re.search(r'✓ shout\(word="item-01"\)  [\d.]+ m?s\n  ITEM-01\n', shown.stderr)
        assert re.search(r'✗ fail\(why="item-02"\)  [\d.]+ m?s\n  Error: LookupError: item-02\n', shown.stderr)
        assert shown.stdout.startswith("Done after 2 tool calls.")
        assert re.search(r"\n +3 +2 \(1 failed\) +\d+ in, \d+ out +0 +\d\.\d KB +[\d.]+ m?s", shown.stderr)

    def test_programs_read_a_json_object_a_line(self, ran, folder: Path):
        """Each with its `type`; the last has the answer and what it cost."""
        shown = ran("Go.", "--tools", folder / "tools.py", "--model", "scripted-tools-1", "--json")
        told = [json.loads(line) for line in shown.stdout.splitlines()]
        types = [each["type"] for each in told if each["type"] != "text_delta"]
        assert types == [
            "session",
            *("turn_started", "turn_finished", "call_started", "call_finished"),
            *("turn_started", "turn_finished", "result"),
        ]
        assert told[0]["tools"] == ["shout", "fail"]
        assert told[3]["call"]["arguments"] == {"word": "item-01"}
        last = told[-1]
        assert (last["status"], last["turns"], last["calls"], last["failed_calls"]) == ("completed", 2, 1, 0)
        assert last["text"] == "Done after 1 tool calls. The last tool said: ITEM-01"
        assert last["usage"]["total_tokens"] > 0
        assert last["sent_bytes"] > 0
        assert shown.stderr == ""

    def test_a_prompt_may_come_from_standard_input(self, folder: Path, url: str):
        """As `-`."""
        arguments = ["run", "-", "--json", "--ledger", str(folder / "l.db"), "--base-url", url]
        shown = CliRunner().invoke(app, arguments, input="Hello from a pipe.")
        assert shown.exit_code == 0
        with sqlite3.connect(folder / "l.db") as ledger:
            (body,) = ledger.execute("SELECT body FROM steps").fetchone()
        ledger.close()
        assert b"Hello from a pipe." in body


class TestWrong:
    """Errors name what is wrong and say what to do; nothing shows a traceback."""

    def test_without_a_server_it_says_how_to_start_one(self, ran):
        """At once, and not after minutes of trying again."""
        shown = ran("Hello.", base_url="http://127.0.0.1:9/v1")
        assert shown.exit_code == 1
        assert "no server answers at http://127.0.0.1:9/v1" in shown.stderr
        assert "openline serve --upstream scripted:" in shown.stderr
        assert "--resume" not in shown.stderr  # nothing was begun

    def test_a_server_that_says_nothing_is_not_waited_for_for_long(self, ran, monkeypatch: pytest.MonkeyPatch):
        """It takes the connection, and no more."""
        monkeypatch.setattr("openline.cli.run_agent._LOOK_SECONDS_MAX", 0.05)
        with socket.create_server(("127.0.0.1", 0)) as mute:
            shown = ran("Hello.", base_url=f"http://127.0.0.1:{mute.getsockname()[1]}/v1")
        assert shown.exit_code == 1
        assert "/models has not answered within 0.05 s" in shown.stderr

    def test_a_server_elsewhere_is_not_ours_to_start(self, ran):
        """The address may be wrong."""
        shown = ran("Hello.", base_url="http://host.invalid:9/v1")
        assert shown.exit_code == 1
        assert "Is --base-url right?" in shown.stderr

    def test_an_unknown_model_is_answered_with_the_known_ones(self, ran):
        """The command that is printed names one of them, and works."""
        shown = ran("Hello.", "--model", "nope")
        assert shown.exit_code == 1
        assert "The server has scripted-text, scripted-tools-3, scripted-tools-20." in shown.stderr
        command = command_in(shown.stderr)
        assert command[-2:] == ["--model", "scripted-text"]
        assert CliRunner().invoke(app, ["run", *command]).exit_code == 0

    def test_a_refused_key_names_its_variable(self, folder: Path):
        """The key is in neither output."""
        with serving("--upstream", "scripted:", OPENLINE_API_KEY="olk-right") as (_, said):
            base_url = re.search(r"listens on (http://\S+/v1)", said)[1]
            arguments = ["run", "Hi.", "--model", "scripted-text", "--base-url", base_url]
            shown = CliRunner().invoke(app, arguments, env={"OPENLINE_API_KEY": "olk-wrong"})
            assert shown.exit_code == 1
            assert "OPENLINE_API_KEY" in shown.stderr
            assert "olk-wrong" not in shown.output + shown.stderr
            right = CliRunner().invoke(app, arguments, env={"OPENLINE_API_KEY": "olk-right"})
        assert right.exit_code == 0

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            ([], 'what is the model to be asked? openline run "…"'),
            (["  "], "what is the model to be asked?"),
            (["Go.", "--tools", "none.py"], "--tools none.py: there is no such file"),
            (["Go.", "--calls-max", "0"], "calls_max is 0: expected more than 0"),
            (["Go.", "--ledger", "no/such/folder.db"], "cannot be used"),
            (["--resume"], "runs.db holds no session yet"),
            (["--resume", "sess_x", "--ledger", "none"], "--ledger none holds no session"),
        ],
    )
    def test_wrong_usage_has_exit_code_2(self, ran, arguments: list[str], says: str):
        """As with every command."""
        shown = ran(*arguments)
        assert (shown.exit_code, shown.stdout) == (2, "")
        assert says in shown.stderr

    def test_a_url_that_is_none_has_exit_code_2(self, ran):
        """The session says what it expected."""
        shown = ran("Go.", base_url="ftp://x")
        assert shown.exit_code == 2
        assert "expected http://HOST:PORT/v1" in shown.stderr

    @pytest.mark.parametrize(
        ("code", "says"),
        [
            ("def f(:", "tools.py, line 1: invalid syntax"),
            ("\n\n1 / 0", "tools.py, line 3: ZeroDivisionError"),
            ("import nothing_of_the_kind", "line 1: ModuleNotFoundError"),
            ("open('not-there.txt')", "line 1: FileNotFoundError"),
            ("x = 1", "it has no functions"),
            ("TOOLS = 3", "TOOLS is a int: expected a list of functions"),
            ("def look(word): ...", "tool 'look', parameter 'word' has no type"),
        ],
    )
    def test_what_is_wrong_with_a_file_of_tools_is_named(self, ran, folder: Path, code: str, says: str):
        """With its line, where it has one."""
        (folder / "tools.py").write_text(code)
        shown = ran("Go.", "--tools", folder / "tools.py")
        assert (shown.exit_code, shown.stdout) == (2, "")
        assert says in shown.stderr
        assert "Traceback" not in shown.stderr


class TestToolsFile:
    @pytest.mark.parametrize(
        ("code", "names"),
        [
            ("def b(): ...\ndef a(): ...\ndef _c(): ...", ["b", "a"]),
            ("import openline\ndef a(): ...\n@openline.tool\ndef b(): ...", ["b"]),
            ("def a(): ...\ndef b(): ...\nTOOLS = [b, {'type': 'web_search'}]", ["b", "web_search"]),
            ("from os.path import join\nfrom beside import near\ndef a(): ...\ndef on_unknown(call): ...", ["a"]),
        ],
    )
    def test_which_functions_are_tools(self, tmp_path: Path, code: str, names: list[str]):
        """`TOOLS`, else those with the decorator, else all that are public and the file's own, in its order."""
        (tmp_path / "beside.py").write_text("def near(): ...")
        (tmp_path / "tools.py").write_text(code)
        file = read_tools_file(tmp_path / "tools.py")
        assert [each["type"] if isinstance(each, dict) else each.__name__ for each in file.tools] == names
        assert (file.on_unknown is not None) == ("on_unknown" in code)


class TestGoingOn:
    def test_a_bound_can_be_raised_by_the_command_that_is_printed(self, ran, folder: Path):
        """Exit code 4; what had run does not run again."""
        shown = ran("Go.", "--tools", folder / "append.py", "--model", "scripted-tools-3", "--calls-max", 2)
        assert shown.exit_code == 4
        assert "the run has reached --calls-max 2" in shown.stderr
        again = CliRunner().invoke(app, ["run", *command_in(shown.stderr)], catch_exceptions=False)
        assert again.exit_code == 0
        assert (folder / "lines.txt").read_text() == "item-01\nitem-02\nitem-03\n"

    def test_a_session_goes_on_with_another_question(self, ran, folder: Path):
        """The last one, or one by its id; the list shows how they stand."""
        ran("Hello.")
        shown = ran("And?", "--resume")
        assert "in turn 2 of the conversation" in shown.stdout
        session = re.search(r"session  (\S+) in", shown.stderr)[1]
        assert "in turn 3 of the conversation" in ran("--resume", session, "And?").stdout
        listed = CliRunner().invoke(app, ["run", "--sessions"]).stderr
        assert re.search(rf"{session} +3 +\d{{4}}-\d\d-\d\d \d\d:\d\d +done", listed)

    def test_a_session_that_is_not_held_is_named(self, ran):
        """A prompt in the session's place is one."""
        ran("Hello.")
        shown = ran("--resume", "And now in French.")
        assert shown.exit_code == 2
        assert "holds no session 'And now in French.'; openline run --sessions lists" in shown.stderr
        assert 'A prompt comes first: openline run "…" --resume.' in shown.stderr

    def test_without_its_tools_it_does_not_go_on(self, ran, folder: Path):
        """The model would get errors for outputs."""
        ran("Go.", "--tools", folder / "append.py", "--model", "scripted-tools-3", "--calls-max", 1)
        shown = ran("--resume")
        assert shown.exit_code == 2
        assert "has the tools append, which are not here: name their file with --tools" in shown.stderr

    def test_what_is_long_done_is_forgotten(self, ran, folder: Path):
        """In the user's own ledger, which nobody else looks after; what can be gone on with stays."""
        ran("Go.", "--tools", folder / "append.py", "--model", "scripted-tools-3", "--calls-max", 1)
        ran("Hello.")
        path = folder / "data" / "openline" / "runs.db"
        with sqlite3.connect(path) as ledger:
            ledger.execute("UPDATE steps SET changed_at = ?", (time.time() - 31 * 86_400,))
        ledger.close()
        listed = CliRunner().invoke(app, ["run", "--sessions"]).stderr
        assert listed.count("sess_") == 1
        assert "unfinished" in listed

    def test_nothing_is_kept_if_nobody_wants_it(self, ran, folder: Path):
        """`--ledger none`: an end before the end offers no way on."""
        shown = ran(
            "Go.", "--tools", folder / "append.py", "--model", "scripted-tools-3", "--calls-max", 1, "--ledger", "none"
        )
        assert shown.exit_code == 4
        assert "--resume" not in shown.stderr
        assert not (folder / "data").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C cannot be sent to one process there")
class TestStopping:
    def start(self, folder: Path, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "openline", "run", *map(str, arguments)]
        env = environment(XDG_DATA_HOME=str(folder / "data"))
        return subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
        )

    def begin(self, folder: Path, url: str) -> subprocess.Popen[str]:
        """A run whose first tool takes its time."""
        (folder / "wait").touch()
        process = self.start(
            folder, "Go.", "--tools", folder / "append.py", "--model", "scripted-tools-3", "--base-url", url, "--json"
        )
        read_until(process, "call_started")
        while not (folder / "lines.txt").exists():
            time.sleep(0.001)
        return process

    def test_ctrl_c_waits_for_the_tool_and_the_printed_command_goes_on(self, folder: Path, url: str):
        """Exit code 130; every line is there once."""
        with self.begin(folder, url) as process:
            process.send_signal(signal.SIGINT)
            read_until(process, "stopping after the running call; Ctrl-C again stops at once")
            (folder / "wait").unlink()
            told, errors = process.communicate(timeout=SECONDS_MAX)
        assert (process.returncode, errors) == (130, "")
        finished, failure = map(json.loads, told.splitlines())
        assert finished["output"]["content"] == "appended item-01"
        assert failure["code"] == "stopped"
        again = CliRunner().invoke(app, shlex.split(failure["command"])[1:], catch_exceptions=False)
        assert (again.exit_code, again.stdout[:22]) == (0, "Done after 3 tool call")
        assert (folder / "lines.txt").read_text() == "item-01\nitem-02\nitem-03\n"

    def test_a_second_ctrl_c_leaves_an_unknown_outcome_that_somebody_has_to_decide(self, folder: Path, url: str):
        """Exit code 3 without a decision; then the command that is printed asks, the flag decides, or the file does."""
        with self.begin(folder, url) as process:
            process.send_signal(signal.SIGINT)
            read_until(process, "stopping after the running call")
            process.send_signal(signal.SIGINT)
            told, errors = process.communicate(timeout=SECONDS_MAX)
        assert (process.returncode, errors) == (130, "")
        (folder / "wait").unlink()
        command = shlex.split(json.loads(told)["command"])[1:]
        undecided = CliRunner().invoke(app, command, catch_exceptions=False)
        assert undecided.exit_code == 3
        assert "call call_0001 of tool 'append' had started" in undecided.stderr
        assert command_in(undecided.stderr)[-2:] == ["--on-unknown", "ask"]
        file = (folder / "append.py").read_text()
        (folder / "append.py").write_text(
            f"{file}\nimport openline\ndef on_unknown(call): return openline.Output('I looked')\n"
        )
        decided = CliRunner().invoke(app, command, catch_exceptions=False)
        assert decided.exit_code == 0
        assert 'append(line="item-01")\n  I looked' in decided.stderr
        assert (folder / "lines.txt").read_text() == "item-01\nitem-02\nitem-03\n"

    def test_a_flag_decides_for_all_calls(self, folder: Path, url: str):
        """`--on-unknown run`; a process that was killed is gone on with as one that was stopped."""
        with self.begin(folder, url) as process:
            process.kill()
        (folder / "wait").unlink()
        arguments = ["--tools", folder / "append.py", "--base-url", url, "--on-unknown", "run"]
        again = CliRunner().invoke(app, ["run", "--resume", *map(str, arguments)], catch_exceptions=False)
        assert again.exit_code == 0
        assert (folder / "lines.txt").read_text() == "item-01\nitem-01\nitem-02\nitem-03\n"

    def test_a_reader_that_leaves_is_no_error(self, folder: Path, url: str):
        """As `| head -1` does; no traceback."""
        with self.start(folder, "Go.", "--base-url", url, "--model", "scripted-text", "--json") as process:
            process.stdout.readline()
            process.stdout.close()
            errors = process.stderr.read()
            assert process.wait(SECONDS_MAX) in {0, 1}
        assert errors == ""


class TestScreen:
    CALL = ToolCall("s", 1, "call_1", "write", {"path": "a\x1b[2Jb", "text": "x" * 100})

    def test_what_would_drive_the_terminal_is_shown_as_what_it_is(self):
        """Models and tools repeat what they read."""
        assert printable("a\x1b[2J\x9bb\r\n\tc") == "a�[2J�b�\n\tc"
        assert called(self.CALL).plain == 'write(path="a\\u001b[2Jb", text="' + "x" * 58 + "…)"

    def test_an_output_is_shown_by_its_first_lines(self):
        """The rest is counted; content parts are not shown."""
        assert output_lines("1\n\n2\n3\n4\n5\n") == ["1", "2", "3", "… 2 more lines"]
        assert output_lines("1\n2\n3\n4") == ["1", "2", "3", "4"]
        assert output_lines([{"type": "input_text", "text": "x"}]) == ["1 content parts"]

    @pytest.mark.parametrize(
        ("typed", "answer"),
        [("run\n", RUN), ("stop\n", STOP), ("\n", STOP), ("maybe\noutput\nit is done\n", Output("it is done"))],
    )
    def test_a_person_is_asked_about_a_call(self, typed: str, answer: object):
        """The question names the call; nothing is run without an answer."""
        said = io.StringIO()
        assert ask_about(self.CALL, Console(file=said, width=200), io.StringIO(typed)) == answer
        assert "had started when its agent stopped" in said.getvalue()

    def test_a_line_fits_the_terminal(self):
        """However long the call is; in a file it is whole."""
        for is_terminal in (True, False):
            said = io.StringIO()
            console = Console(file=said, width=40, force_terminal=is_terminal, color_system=None)
            screen = PeopleScreen(io.StringIO(), console)
            screen.show(CallFinished(self.CALL, ToolOutput("y" * 100), 0.5))
            assert (max(map(len, said.getvalue().splitlines())) <= 40) == is_terminal

    def test_what_happens_to_the_connection_is_told(self):
        """As the session logs it; what ends the turn comes as an error."""
        said = io.StringIO()
        handler = Notes(PeopleScreen(io.StringIO(), Console(file=said, width=80)))
        for action in (Resume(), GiveUp("tries")):
            handler.handle(
                logging.LogRecord(
                    "openline.client", logging.INFO, "", 0, "turn %s: %s: %s", ("key", "the line broke", action), None
                )
            )
        assert said.getvalue() == "↻ taking the turn up again: the line broke\n"

    def test_text_and_calls_are_apart(self):
        """An answer begins on a line of its own, and so does what comes after it."""
        said = io.StringIO()
        screen = PeopleScreen(said, Console(file=said, width=80))
        screen.show(CallFinished(self.CALL, ToolOutput("ok"), None))
        screen.show(TextDelta("Done."))
        screen.fail(Failure("failed", "no more"))
        assert said.getvalue().splitlines()[1:] == ["  ok", "", "Done.", "", "openline: no more"]
