"""`openline demo`: the real command with its real server, the loop by itself, and the tools."""

import io
import json
import re
import signal
import socket
import sys
import urllib.request

import pytest
from rich.console import Console

from commands import read_until, running
from local_engine import needs_local
from openline.cli.agent_loop import Event, Question, Received, Run, Turn, TurnFailed, agent_loop
from openline.cli.demo_tables import ROWS, comparison, notes, ratio, turn_by_turn
from openline.cli.demo_tools import OUTPUT_CHARACTERS_MAX, TOOLS, toolbox
from openline.engines.scripted import example

SECONDS_MAX = 60
SCRIPTED = ("--upstream", "scripted:")


def demo(folder, *arguments, **environ):
    """The running command, whose temporary files go to `folder`."""
    return running("demo", *arguments, TMPDIR=str(folder), TEMP=str(folder), **environ)


def row(output, label):
    """The two figures of a line of the table."""
    line = next(line for line in output.splitlines() if line.strip().startswith(label))
    http, over_socket = re.findall(r"([\d.]+)(?: [KM]B| ms| s)?\b", line)[:2]
    return float(http), float(over_socket)


class TestCommand:
    def test_once_shows_both_loops_and_ends(self, tmp_path):
        """Both transports make 20 calls, the WebSocket sends fewer bytes, and nothing is left behind."""
        with demo(tmp_path, "--once", *SCRIPTED) as process:
            output, errors = process.communicate(timeout=SECONDS_MAX)
        assert (process.returncode, errors) == (0, "")
        assert row(output, "turns") == (21, 21)
        assert row(output, "tool calls") == (20, 20)
        http_sent, socket_sent = row(output, "sent, all turns")
        assert socket_sent < http_sent / 4
        assert "simulated" in output
        assert "Ctrl-C" not in output
        assert list(tmp_path.iterdir()) == []

    @needs_local
    def test_it_runs_on_the_tiny_model(self, tmp_path, tmp_path_factory):
        """Unless told otherwise: every turn has its tokens and its prefill, and most of each prompt is cached."""
        cache = tmp_path_factory.mktemp("cache")
        with demo(tmp_path, "--once", "--turns", "3", XDG_CACHE_HOME=str(cache)) as process:
            output, errors = process.communicate(timeout=SECONDS_MAX)
        assert (process.returncode, errors) == (0, "")
        assert "model tiny-tools-3" in output
        assert row(output, "turns") == (4, 4)
        last = re.search(r"^ *4 +answer +(.+)$", output, re.MULTILINE)[1]
        http_tokens, http_cached, _, tokens, cached, _ = (
            int(part.replace("\N{NO-BREAK SPACE}", "")) for part in re.split(" +", last.strip())
        )
        assert 0.8 * http_tokens < http_cached < http_tokens
        assert 0.8 * tokens < cached < tokens
        assert "Full resend hits the engine's prefix cache too" in " ".join(output.split())
        assert "simulated" not in output
        assert list(tmp_path.iterdir()) == []

    def test_without_llama_the_script_answers_and_it_says_so(self, tmp_path):
        """Where the extra `local` has no wheel, the demo works all the same."""
        (tmp_path / "hidden").mkdir()
        (tmp_path / "hidden" / "xllamacpp.py").write_text("raise ImportError('no wheel here')")
        with demo(tmp_path, "--once", "--turns", "1", PYTHONPATH=str(tmp_path / "hidden")) as process:
            output, errors = process.communicate(timeout=SECONDS_MAX)
        assert (process.returncode, errors) == (0, "")
        assert "llama.cpp is not installed here" in output
        assert "pip install 'openline[local]'" in " ".join(output.split())
        assert "scripted-tools-1" in output

    @pytest.mark.skipif(sys.platform == "win32", reason="a console's Ctrl-C cannot be sent to one process there")
    @pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
    def test_serves_on_until_it_is_told_to_stop(self, tmp_path, sent):
        """After the table the server answers at the address shown; a signal ends it and the demo with exit code 0."""
        with demo(tmp_path, "--turns", "2", *SCRIPTED) as process:
            shown = read_until(process, "Ctrl-C stops it")
            base_url = re.search(r"listens on (\S+)", shown)[1]
            with urllib.request.urlopen(f"{base_url}/models", timeout=SECONDS_MAX) as answer:
                assert json.load(answer)["object"] == "list"
            process.send_signal(sent)
            rest, errors = process.communicate(timeout=SECONDS_MAX)
        assert (process.returncode, errors) == (0, "")
        assert "Stopping." in rest
        assert "curl " in shown
        assert "supports_websockets = true" in shown
        assert not accepts_connections(base_url)
        assert list(tmp_path.iterdir()) == []

    def test_a_server_that_cannot_start_is_shown(self, tmp_path):
        """What the server said goes to standard error, and the exit code is not 0."""
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with demo(tmp_path, "--once", "--port", str(port), *SCRIPTED) as process:
                _, errors = process.communicate(timeout=SECONDS_MAX)
        assert process.returncode == 1
        assert "The server did not start" in errors
        assert f"server.port {port}" in errors
        assert "Traceback" not in errors
        assert list(tmp_path.iterdir()) == []

    def test_more_turns_than_the_tiny_model_has_room_for_are_refused(self, tmp_path):
        """Before anything is measured: both loops share its cache, and each would push out the other's prompt."""
        with demo(tmp_path, "--once", "--upstream", "gguf:tiny", "--turns", "33") as process:
            output, errors = process.communicate(timeout=SECONDS_MAX)
        assert (process.returncode, output) == (1, "")
        assert "--turns is 33" in errors
        assert "room for 32" in errors

    def test_a_turn_that_fails_is_named(self, tmp_path):
        """The error's code and message are printed, and the exit code is 1."""
        with demo(tmp_path, "--once", "--model", "nobody", *SCRIPTED) as process:
            _, errors = process.communicate(timeout=SECONDS_MAX)
        assert process.returncode == 1
        assert "openline: model_not_found: The requested model 'nobody' does not exist" in errors
        assert "Traceback" not in errors


def accepts_connections(base_url):
    host, port = re.search(r"//([\d.]+):(\d+)", base_url).groups()
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


class Recorded:
    """A transport that answers by list and keeps what was sent."""

    def __init__(self, *answers, resends):
        self.answers = list(answers)
        self.resends = resends
        self.sent = []

    async def exchange(self, body):
        self.sent.append(json.loads(body))
        for event in self.answers.pop(0):
            yield Received(100, [event])


def completed(response_id, *output):
    response = {"id": response_id, "status": "completed", "output": list(output)}
    return [Event("response.created"), Event("response.completed", response)]


def call(number, name="read_file"):
    return {"type": "function_call", "call_id": f"call_{number}", "name": name, "arguments": f'{{"page":{number}}}'}


MESSAGE = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Done."}]}
QUESTION = Question(model="m", instructions="Be brief.", task="Look.", tools=TOOLS, turns_max=4)
TASK_ITEM = {"type": "message", "role": "user", "content": "Look."}


async def taken(transport, question=QUESTION):
    return [turn async for turn in agent_loop(transport, question, lambda name, arguments: f"{name} {arguments}")]


def output(number):
    return {"type": "function_call_output", "call_id": f"call_{number}", "output": f'read_file {{"page":{number}}}'}


class TestLoop:
    async def test_http_resends_the_whole_conversation(self):
        """Every turn's input begins with the one before it, followed by the model's items and the tools' outputs."""
        transport = Recorded(
            completed("r1", call(1)), completed("r2", call(2), call(3)), completed("r3", MESSAGE), resends=True
        )
        turns = await taken(transport)
        assert [create["input"] for create in transport.sent] == [
            [TASK_ITEM],
            [TASK_ITEM, call(1), output(1)],
            [TASK_ITEM, call(1), output(1), call(2), call(3), output(2), output(3)],
        ]
        assert all(create["stream"] and not create["store"] for create in transport.sent)
        assert [len(turn.calls) for turn in turns] == [1, 2, 0]
        assert turns[0].received_bytes == 200

    async def test_websocket_sends_what_is_new(self):
        """Every later turn names the response before it and carries only the tools' outputs."""
        transport = Recorded(completed("r1", call(1)), completed("r2", MESSAGE), resends=False)
        await taken(transport)
        assert [create["input"] for create in transport.sent] == [[TASK_ITEM], [output(1)]]
        assert [create["previous_response_id"] for create in transport.sent] == [None, "r1"]
        assert {create["type"] for create in transport.sent} == {"response.create"}

    async def test_a_model_that_calls_for_ever_is_stopped(self):
        """The loop ends after `turns_max` turns, whatever the model wants."""
        transport = Recorded(*(completed(f"r{n}", call(n)) for n in range(9)), resends=False)
        assert len(await taken(transport)) == QUESTION.turns_max

    @pytest.mark.parametrize(
        ("events", "code"),
        [
            ([Event("response.failed", {"error": {"code": "upstream_error", "message": "gone"}})], "upstream_error"),
            ([Event("error", None, {"code": None, "type": "invalid_request_error"})], "invalid_request_error"),
            ([Event("error")], "error"),
            ([Event("response.created")], "connection_lost"),
            ([], "connection_lost"),
        ],
    )
    async def test_a_failed_turn_ends_the_loop_with_its_code(self, events, code):
        """A failed response, an error event and a stream that just ends are failures, each with a code."""
        with pytest.raises(TurnFailed) as failed:
            await taken(Recorded(events, resends=True))
        assert failed.value.code == code


def usage(tokens, cached, milliseconds):
    """As a server tells it that has been asked for the engine's times."""
    told = {"openline_timings": {"prompt_ms": milliseconds, "predicted_ms": 1.0}} if milliseconds is not None else {}
    return {"input_tokens": tokens, "input_tokens_details": {"cached_tokens": cached}, **told}


def run_of(*sent_bytes, last_calls=False, cached=0.9, milliseconds=None):
    turns = [
        Turn(0.01 * size, 0.001 * size, size, 50, {"output": [], "usage": usage(100, 100 * cached, milliseconds)})
        for size in sent_bytes
    ]
    if last_calls:
        turns[-1] = Turn(0.01, 0.001, 1, 50, {"output": [call(1)]})
    return Run("HTTP", turns)


def ratios(over_http, over_socket):
    return {row.label: ratio(row, over_http, over_socket) for row in ROWS}


def drawn(table):
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


class TestComparison:
    def test_less_and_more_are_said_plainly(self):
        """A ratio says who needs less, also when that is HTTP, and that a difference below 5 % is none."""
        less, more = ratios(run_of(40, 40), run_of(10, 10)), ratios(run_of(10, 10), run_of(20, 20))
        assert less["sent, all turns"] == "4.0\N{MULTIPLICATION SIGN} less"
        assert more["time, median turn"] == "2.0\N{MULTIPLICATION SIGN} more"
        assert less["received, all turns"] == "as much"
        assert less["turns"] == ""

    def test_loops_of_other_lengths_compare_by_turn_only(self):
        """Where the model took more turns over one of them, totals carry no ratio and a note says so."""
        runs = run_of(40, 40, 40), run_of(10, 10)
        shown = {label for label, found in ratios(*runs).items() if found}
        assert shown == {"time, median turn", "first event, median turn"}
        assert any("totals do not compare" in note for note in notes(runs, is_simulated=False))

    def test_notes_say_what_is_not_in_the_figures(self):
        """A simulated model is called so, and a loop that was cut short too."""
        simulated = " ".join(notes((run_of(1), run_of(1)), is_simulated=True))
        assert "The model is simulated" in simulated
        assert "without network latency" in simulated
        cut_short = " ".join(notes((run_of(1), run_of(1, last_calls=True)), is_simulated=False))
        assert "simulated" not in cut_short
        assert "before the model's final answer" in cut_short

    def test_the_engines_times_are_not_claimed_as_a_gain(self):
        """The same work takes one time or another by chance: it carries no ratio, the bytes do."""
        runs = run_of(400, 400, milliseconds=50.0), run_of(100, 100, milliseconds=20.0)
        lines = {
            line.strip().partition("  ")[0]: line.rstrip()
            for line in drawn(comparison(runs, "m", is_simulated=False)).splitlines()
        }
        assert "less" not in lines["time, all turns"] + lines["prefill, all turns"]
        assert "4.0\N{MULTIPLICATION SIGN} less" in lines["sent, all turns"]
        assert lines["prefill, all turns"].endswith("engine's")
        assert lines["the rest, median turn"].endswith("measured")
        assert "prefill" not in drawn(comparison((run_of(1), run_of(1)), "m", is_simulated=False))

    @pytest.mark.parametrize(
        ("cached", "says"), [(0.91, "the model's work is the same"), (0.1, "the model had another amount of work")]
    )
    def test_it_says_that_a_full_resend_is_cached_too(self, cached, says):
        """Whatever the figures are, they are told, and what is saved then."""
        runs = run_of(4000, cached=cached, milliseconds=5.0), run_of(1000, milliseconds=5.0)
        note = notes(runs, is_simulated=False)[1]
        assert f"{cached:.0%} of the prompt tokens cached over HTTP and 90% over WebSocket" in note
        assert says in note
        assert "4.0 KB over HTTP, 1.0 KB over WebSocket" in note

    def test_turns_stand_side_by_side(self):
        """Also where one loop is longer, and where the engine tells no times; without tokens there is no table."""
        table = drawn(turn_by_turn((run_of(1, 1, 1), run_of(1, 1, milliseconds=7.0))))
        assert "1   answer      100       90         ?         100       90         7" in table
        assert len([line for line in table.splitlines() if "answer" in line]) == 3
        nothing = Run("HTTP", [Turn(1, 1, 1, 1, {"output": []})])
        assert turn_by_turn((nothing, nothing)) is None


@pytest.fixture
def answer(tmp_path):
    """The tools over a new folder."""
    return toolbox(tmp_path / "logs")


class TestTools:
    def test_a_script_can_use_them_all(self, answer):
        """No arguments made from the schemas fail, and most outputs are a few KB, so that the context grows."""
        outputs = [
            answer(tool["name"], json.dumps(example(tool["parameters"], number)))
            for number in range(1, 201)
            for tool in (TOOLS[(number - 1) % len(TOOLS)],)
        ]
        assert not [text for text in outputs if text.startswith("Error")]
        assert max(map(len, outputs)) <= OUTPUT_CHARACTERS_MAX
        assert sum(len(text) > 1500 for text in outputs) >= len(outputs) / 2

    def test_they_say_the_same_in_every_run(self, answer, tmp_path):
        """Both loops get equal outputs, else their bytes would not compare."""
        again = toolbox(tmp_path / "again")
        for name, arguments in [("search_files", '{"word":"ERROR"}'), ("read_file", '{"name":"api.log","page":2}')]:
            assert answer(name, arguments) == again(name, arguments)

    def test_what_is_written_can_be_read(self, answer):
        """A file that the model wrote is a file like the others."""
        assert "report.txt" in answer("write_file", '{"name":"report.txt","content":"The worker fails most."}')
        assert "The worker fails most." in answer("read_file", '{"name":"report.txt","page":9}')

    @pytest.mark.parametrize(
        ("name", "arguments"),
        [
            ("delete_everything", "{}"),
            ("read_file", ""),
            ("read_file", "[]"),
            ("read_file", '{"name":7}'),
            ("read_file", '{"name":"missing.log","page":1}'),
            ("read_file", '{"name":"../../etc/passwd","page":1}'),
            ("count_words", '{"name":"/etc/passwd"}'),
            ("count_words", '{"name":""}'),
            ("write_file", '{"name":"../outside","content":"x"}'),
            ("write_file", '{"name":"..","content":"x"}'),
            ("write_file", '{"name":"a\\u0000b","content":"x"}'),
            ("write_file", json.dumps({"name": "huge", "content": "x" * 1_000_000})),
        ],
    )
    def test_odd_arguments_are_answered_with_an_error_text(self, answer, tmp_path, name, arguments):
        """Whatever a model writes, a tool answers in text, and nothing outside its folder is touched."""
        assert answer(name, arguments).startswith("Error: ")
        assert [path.name for path in tmp_path.iterdir()] == ["logs"]
