"""A model file as an engine: real llama.cpp, with the tiny model."""

import asyncio
import json
import re
import signal
import socket
import sys
import threading
from contextlib import AsyncExitStack, aclosing
from pathlib import Path

import pytest

from local_engine import ask, needs_local, output, request_of
from openline.config import ConfigError, UpstreamSettings
from openline.engines.gguf import GgufEngine
from openline.engines.tiny import SHELL_COMMANDS, TinyEngine
from openline.engines.tiny_model import tiny_model_path
from openline.protocol.errors import ProtocolError

pytestmark = needs_local

SHARED = "You are an agent that looks before it concludes. " * 40
NEARLY = 4  # at a prompt's end tokens change with what follows

READ = {
    "type": "function",
    "name": "read_file",
    "parameters": {
        "type": "object",
        "properties": {"name": {"enum": ["a.log", "b.log"]}, "page": {"type": "integer", "minimum": 1}},
        "required": ["name", "page"],
    },
}
NOTE = {"type": "function", "name": "note", "parameters": {"type": "object", "properties": {"t": {"type": "string"}}}}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The model is written once, and not into the cache of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
async def engine():
    """The tiny model's engine."""
    engine = TinyEngine(UpstreamSettings(kind="gguf", url="tiny"), show_detail=True)
    yield engine
    await engine.close()


@pytest.fixture
async def open_gguf():
    """Opens the tiny model's file as any other."""
    async with AsyncExitStack() as stack:

        def open_one(**fields):
            settings = UpstreamSettings(kind="gguf", url=str(tiny_model_path()), **fields)
            engine = GgufEngine(settings, show_detail=True, threads=1)
            stack.push_async_callback(engine.close)
            return engine

        yield open_one


class TestCache:
    async def test_a_second_turn_finds_the_first_ones_prompt(self, engine):
        """Of a chain, only what is new is read: the tool's output, and what stands around it."""
        first = await ask(engine, "Look.", model="tiny-tools-1", instructions=SHARED, tools=[READ])
        call_id = first.calls[0][0].call_id
        second = await ask(engine, output(call_id, "x" * 500), context=first.context, instructions=SHARED, tools=[READ])
        assert first.tokens > len(SHARED) / 2
        assert first.tokens - NEARLY <= second.cached <= second.tokens - 200
        assert second.usage.timings.prompt_ms > 0

    async def test_conversations_in_turn_keep_all_they_have(self, engine):
        """Each on its slot, although llama.cpp would give the second one the first one's."""
        tools = {"model": "tiny-tools-9", "instructions": SHARED, "tools": [NOTE]}
        last = [await ask(engine, f"Task {name}. " * 60, **tools) for name in "ab"]
        for _ in range(2):
            for index, before in enumerate(last):
                call_id = before.calls[-1][0].call_id
                last[index] = await ask(engine, output(call_id, "y" * 300), context=before.context, **tools)
                assert last[index].cached >= before.tokens - NEARLY

    async def test_the_next_agent_finds_instructions_and_tools(self, engine):
        """A conversation that has its answer gives its slot to one that begins alike."""
        first = await ask(engine, "One question.", instructions=SHARED)
        second = await ask(engine, "Another question.", instructions=SHARED)
        assert 0.9 * first.tokens < second.cached < first.tokens

    async def test_a_turn_finds_its_warm_up(self, engine):
        """A warm-up reads the instructions before there is a question."""
        await ask(engine, [], instructions=SHARED, generate=False)
        first = await ask(engine, "Now the question.", instructions=SHARED)
        assert first.cached > 0.9 * first.tokens


class TestEngine:
    async def test_it_serves_the_file_under_its_name(self, open_gguf):
        """The same before and after it is loaded, with the context that a conversation may have."""
        engine = open_gguf(context_tokens=8192)
        before = await engine.models()
        engine.load()
        after = await engine.models()
        assert [(model.id, model.context_window) for model in before] == [(tiny_model_path().stem, 8192)]
        assert [(model.id, model.context_window) for model in after] == [(tiny_model_path().stem, 8192)]

    async def test_a_model_is_asked_as_any_upstream(self, open_gguf):
        """Whatever it is called by, one model answers; a bound on its output ends it as incomplete."""
        answered = await ask(open_gguf(), "Hello", model="gpt-5", max_output_tokens=3)
        assert answered.ended.reason == "max_output_tokens"
        assert answered.usage.output_tokens == 3

    async def test_a_conversation_that_does_not_fit_is_refused(self, open_gguf):
        """With the code at which clients compact, and nothing cut away silently."""
        with pytest.raises(ProtocolError) as refused:
            await ask(open_gguf(context_tokens=256), "x" * 1000)
        assert refused.value.code == "context_length_exceeded"

    async def test_more_turns_than_slots_wait_for_each_other(self, open_gguf):
        """None is refused."""
        engine = open_gguf(slots=2)
        answers = await asyncio.gather(*(ask(engine, f"{number}", max_output_tokens=4) for number in range(5)))
        assert [answered.usage.output_tokens for answered in answers] == [4] * 5

    async def test_turns_that_fit_only_one_by_one_run_so(self, open_gguf):
        """Their slots share the context; llama.cpp would fail both, as too long.

        Source: llama.cpp, tools/server/server-context.cpp, "Context size has been exceeded."
        """
        engine = open_gguf(slots=2, context_tokens=2048)
        answers = await asyncio.gather(*(ask(engine, name * 2600, max_output_tokens=4) for name in "ab"))
        assert all(1024 < answered.tokens < 2048 for answered in answers)

    async def test_answers_that_outgrow_the_context_together_are_told_from_one_that_is_too_long(self, open_gguf):
        """The client is not to compact a conversation that would fit alone."""
        engine = open_gguf(slots=2, context_tokens=2048)
        words = {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{30}$"}, "minItems": 64}
        text = {"format": {"type": "json_schema", "name": "words", "schema": words}}
        answers = await asyncio.gather(*(ask(engine, name * 500, text=text) for name in "ab"), return_exceptions=True)
        failed = [error for error in answers if isinstance(error, ProtocolError)]
        assert {error.code for error in failed} == {"server_is_overloaded"}
        assert "`context_tokens`" in failed[0].message

    async def test_a_turn_that_nobody_reads_stops(self, open_gguf):
        """Its slot is free for the next one."""
        engine = open_gguf(slots=1)
        async with aclosing(engine.prepare(request_of("Hello", "m", max_output_tokens=100_000)).stream()) as batches:
            async for batch in batches:
                if batch:
                    break
        assert (await ask(engine, "Next", max_output_tokens=2)).usage.output_tokens == 2

    @pytest.mark.parametrize("before", [signal.default_int_handler, signal.SIG_IGN])
    async def test_loading_leaves_ctrl_c_as_it_was(self, open_gguf, before):
        """While a model loads, Ctrl-C ends the process as Python could not; in the background it is still ignored."""
        original = signal.signal(signal.SIGINT, before)
        try:
            open_gguf().load()
            assert signal.getsignal(signal.SIGINT) is before
        finally:
            signal.signal(signal.SIGINT, original)

    async def test_nothing_is_left_when_it_is_closed(self, open_gguf):
        """Neither a thread of Python's, nor the port; and a connection that was kept open does not hold it up."""
        threads = threading.active_count()
        engine = open_gguf()
        await ask(engine, "Hello", max_output_tokens=2)
        host, _, port = engine._loaded[0].url.removeprefix("http://").partition(":")
        async with asyncio.timeout(5):
            await engine.close()
        with socket.socket() as probe:
            assert probe.connect_ex((host, int(port))) != 0
        assert threading.active_count() == threads
        assert "not loaded" in repr(engine)

    async def test_it_is_asked_as_its_upstream_is_configured(self, open_gguf):
        """All that is not about where its server is counts as for any upstream."""
        warm_up = request_of([], "m", instructions=SHARED, generate=False)
        assert open_gguf().prepare(warm_up).prefills
        assert not open_gguf(warmup="none").prepare(warm_up).prefills

    async def test_its_server_is_for_us_alone(self, open_gguf):
        """Neither another user of this machine nor a web page talks to the model behind the server's back."""
        engine = open_gguf()
        engine.load()
        llama = engine._loaded[0]
        reader, writer = await asyncio.open_connection(*llama.url.removeprefix("http://").split(":"))
        writer.write(b"GET /slots HTTP/1.1\r\nHost: x\r\nOrigin: http://evil\r\nConnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert llama.key not in repr(llama)


def nobody_has_one():
    raise RuntimeError("Could not determine home directory.")


class TestStart:
    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (None, "No such file or directory"),
            (b"", "not a GGUF file"),
            (b"PK\x03\x04 something else", "not a GGUF file"),
            (lambda whole: whole[:60], "ends inside its metadata"),
            (lambda whole: whole[:-1000], "the model cannot be loaded: tensor"),
            (lambda whole: whole.replace(b"llama", b"lorem"), "unknown model architecture: 'lorem'"),
            (lambda whole: whole.replace(b"{%- for message", b"{%- fox message"), "its chat template cannot be read: "),
        ],
    )
    def test_a_file_that_cannot_be_served_is_named_with_its_reason(self, tmp_path, capfd, content, says):
        """In one line; what llama.cpp has to say about it does not flood the terminal."""
        path = tmp_path / "model.gguf"
        if content is not None:
            path.write_bytes(content(tiny_model_path().read_bytes()) if callable(content) else content)
        with pytest.raises(ConfigError) as refused:
            GgufEngine(UpstreamSettings(kind="gguf", url=str(path)), show_detail=True).load()
        assert str(refused.value).startswith(f"--upstream gguf:{path}: ")
        assert says in str(refused.value)
        assert "\n" not in str(refused.value)
        assert capfd.readouterr() == ("", "")

    @pytest.mark.parametrize("url", ["tiny", "file"])
    def test_a_missing_extra_is_named(self, monkeypatch, url):
        """With what to type."""
        path = tiny_model_path()
        monkeypatch.setitem(sys.modules, "xllamacpp", None)
        make = TinyEngine if url == "tiny" else GgufEngine
        engine = make(UpstreamSettings(kind="gguf", url=url if url == "tiny" else str(path)), show_detail=True)
        with pytest.raises(ConfigError, match=r"pip install 'openline\[local\]'"):
            engine.load()

    def test_a_missing_writer_is_named(self, monkeypatch, tmp_path):
        """The tiny model needs two packages more."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setitem(sys.modules, "gguf", None)
        with pytest.raises(ConfigError, match=r"gguf:tiny.*pip install 'openline\[local\]'"):
            TinyEngine(UpstreamSettings(kind="gguf", url="tiny"), show_detail=True)

    def test_a_cache_that_cannot_be_written_is_named(self, monkeypatch, tmp_path):
        """With the variable that sets another one."""
        (tmp_path / "openline").write_text("a file in its way")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        with pytest.raises(ConfigError, match=r"gguf:tiny.*XDG_CACHE_HOME"):
            TinyEngine(UpstreamSettings(kind="gguf", url="tiny"), show_detail=True)

    def test_a_user_without_a_home_folder_is_told_what_to_set(self, monkeypatch):
        """As in a container that runs under any user's number."""
        for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(Path, "home", nobody_has_one)
        with pytest.raises(ConfigError, match=r"gguf:tiny.*XDG_CACHE_HOME"):
            TinyEngine(UpstreamSettings(kind="gguf", url="tiny"), show_detail=True)

    def test_a_home_folder_that_is_not_there_is_named(self):
        """In one line."""
        with pytest.raises(ConfigError, match=r"gguf:~no-such-user/x\.gguf: there is no such home folder"):
            GgufEngine(UpstreamSettings(kind="gguf", url="~no-such-user/x.gguf"), show_detail=True)

    def test_a_home_folder_is_found(self, monkeypatch):
        """Behind `gguf:` no shell reads a `~`."""
        path = tiny_model_path()
        monkeypatch.setenv("HOME", str(path.parent))
        monkeypatch.setenv("USERPROFILE", str(path.parent))
        assert GgufEngine(UpstreamSettings(kind="gguf", url=f"~/{path.name}"), show_detail=True)


class TestTiny:
    async def test_text_is_words(self, engine):
        """Letters and blanks, ended by the model's own end; the same for the same prompt."""
        answers = [await ask(engine, "Hello") for _ in range(2)]
        assert answers[0].text == answers[1].text
        assert set(answers[0].text) <= set("abcdefghijklmnopqrstuvwxyz ")
        assert len(answers[0].text.split()) >= 5
        assert answers[0].ended.reason is None

    async def test_tools_are_called_in_turn_as_often_as_the_name_says(self, engine):
        """Their arguments are the model's own, and fit the schemas."""
        context, seen, text = None, [], "Look."
        for _ in range(4):
            more = {"context": context} if context else {}
            answered = await ask(engine, text, model="tiny-tools-3", tools=[READ, NOTE], **more)
            context = answered.context
            if not answered.calls:
                break
            ((started, arguments),) = answered.calls
            seen.append((started.name, json.loads(arguments)))
            text = output(started.call_id, "something")
        assert [name for name, _ in seen] == ["read_file", "note", "read_file"]
        assert answered.text
        assert all(
            arguments["name"] in {"a.log", "b.log"} and 1 <= arguments["page"] <= 9 for _, arguments in seen[::2]
        )
        assert seen[1][1]["t"].isalpha()

    @pytest.mark.parametrize(
        ("shell", "command"),
        [
            ({"name": "exec_command", "properties": {"cmd": {"type": "string"}, "tty": {"type": "boolean"}}}, "cmd"),
            ({"name": "shell_command", "properties": {"command": {"type": "string"}}}, "command"),
            ({"name": "shell", "properties": {"command": {"type": "array", "items": {"type": "string"}}}}, "command"),
        ],
    )
    @pytest.mark.parametrize("model", ["tiny-shell-5", "tiny-tools-5"])
    async def test_a_shell_gets_harmless_commands_only(self, engine, shell, command, model):
        """Never letters at random, by whatever rule it is called."""
        parameters = {"type": "object", "properties": shell["properties"], "required": [command]}
        tool = {"type": "function", "name": shell["name"], "parameters": parameters}
        answered = await ask(engine, "Go.", model=model, tools=[tool])
        given = json.loads(answered.calls[0][1])[command]
        assert given in (SHELL_COMMANDS[0], ["bash", "-lc", SHELL_COMMANDS[0]])

    @pytest.mark.parametrize("fields", [{"tools": [READ], "tool_choice": "none"}, {"tools": []}, {}])
    async def test_without_a_tool_to_call_it_speaks(self, engine, fields):
        """A shell model in a client that offers no shell is of use too."""
        answered = await ask(engine, "Hello", model="tiny-shell-5", **fields)
        assert answered.text
        assert not answered.calls

    async def test_a_tool_that_holds_itself_is_called_whole(self, engine):
        """However its schema multiplies, the arguments end before the bound on tokens; a pattern does not fail it."""
        node = {"$ref": "#/$defs/node"}
        word = {"type": "string", "pattern": "[0-9]+"}
        parameters = {"$defs": {"node": {"properties": {"a": node, "b": node, "c": node, "w": word}}}, **node}
        tool = {"type": "function", "name": "find", "parameters": parameters}
        answered = await ask(engine, "Go.", model="tiny-tools-1", tools=[tool])
        assert answered.ended.reason is None
        assert json.loads(answered.calls[0][1])["a"]["a"]

    async def test_a_tool_in_a_namespace_is_called_by_both_names(self, engine):
        """Codex groups tools so."""
        namespace = {"type": "namespace", "name": "files", "tools": [NOTE]}
        started, _ = (await ask(engine, "Go.", model="tiny-tools-1", tools=[namespace])).calls[0]
        assert (started.namespace, started.name) == ("files", "note")

    async def test_a_clients_own_format_is_kept(self, engine):
        """`text.format` holds the model's words to a schema."""
        schema = {"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"], "additionalProperties": False}
        text = {"format": {"type": "json_schema", "name": "n", "schema": schema}}
        assert json.loads((await ask(engine, "Hello", text=text)).text) == {"n": 7}

    async def test_another_name_is_refused(self, engine):
        """With the names that there are."""
        with pytest.raises(ProtocolError) as refused:
            engine.prepare(request_of("Hello", "gpt-5"))
        assert refused.value.code == "model_not_found"
        names = [model.id for model in await engine.models()]
        assert all(name in refused.value.message for name in names)

    def test_a_shell_command_is_harmless(self):
        """Each only touches the one file that carries our name, in the folder that it is run in."""
        assert all("openline-tiny.txt" in command for command in SHELL_COMMANDS)
        assert not re.search(r"[/~$*`;]|\brm\b", " ".join(SHELL_COMMANDS))
