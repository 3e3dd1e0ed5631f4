"""`openline doctor`: what it finds of good and of broken upstreams, and what it prints."""

from __future__ import annotations

import asyncio
import io
import json
import socket
import struct
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from commands import environment
from local_engine import needs_local
from openline.cli.checks import Report, examine, look
from openline.cli.findings import table
from openline.config import UpstreamSettings

PIECES = [f"{number} " for number in range(1, 13)]


class Model:
    """A Chat Completions server that does what a good one does, but for its faults."""

    def __init__(self, *faults: str) -> None:
        self.faults = faults
        self.prefixes: set[str] = set()
        self.tokens = 0
        self.allowed: list[int] = []  # tokens, of each turn

    async def models(self, _: web.Request) -> web.Response:
        if "loading" in self.faults:
            return web.json_response({"error": {"message": "Loading model", "type": "unavailable_error"}}, status=503)
        window = 4096 if "small" in self.faults else 131072
        row = {"id": "m", "object": "model", "created": 0, "owned_by": "vllm", "max_model_len": window}
        if "unknown" in self.faults:
            row = {"id": "m"}
        return web.json_response({"object": "list", "data": [] if "empty" in self.faults else [row]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if "tools" in body and "no tools" in self.faults:
            words = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
            return web.json_response({"error": {"message": words}}, status=400)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for chunk in self.chunks(body):
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            await asyncio.sleep(0)
        await response.write(b"data: [DONE]\n\n")
        return response

    def chunks(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        text = body["messages"][-1]["content"]
        self.allowed.append(body["max_tokens"])
        if "tools" in body:
            deltas = self.calls(2 if "Rome" in text and "one call" not in self.faults else 1)
        else:
            deltas = [{"content": piece} for piece in PIECES[: body["max_tokens"]]]
            deltas = [{"content": "".join(PIECES)}] if "held back" in self.faults else deltas
        if "reasoning" in self.faults:
            deltas.insert(0, {"reasoning": "Hm."})
        if "thinking" in self.faults:
            deltas.insert(0, {"content": "<think>Hm.</think>"})
        self.tokens += len(deltas)
        usage = {"prompt_tokens": len(text) // 4, "completion_tokens": len(deltas)}
        prefix = body["messages"][0]["content"][:2000]
        if prefix in self.prefixes and "no cache" not in self.faults:
            usage["prompt_tokens_details"] = {"cached_tokens": 500}
        self.prefixes.add(prefix)
        chunks = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
        return [
            *chunks,
            {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
            {"choices": [], "usage": usage},
        ]

    def calls(self, count: int) -> list[dict[str, Any]]:
        if "call as text" in self.faults:
            return [{"content": '<tool_call>\n{"name": "get_weather", "arguments": {}}'}]
        if "no call" in self.faults:
            return [{"content": "It is sunny."}]
        pieces = ['{"city":', '"Paris"' if "bad arguments" not in self.faults else "]", "}"]
        deltas = []
        for index in range(count):
            begun = {"index": index, "id": f"call_{index}", "function": {"name": "get_weather", "arguments": ""}}
            deltas.append({"tool_calls": [begun]})
            deltas += [{"tool_calls": [{"index": index, "function": {"arguments": piece}}]} for piece in pieces]
        return deltas


@asynccontextmanager
async def serving(model: Model):
    app = web.Application()
    app.router.add_get("/v1/models", model.models)
    app.router.add_post("/v1/chat/completions", model.complete)
    runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield UpstreamSettings(name="up", url=f"http://127.0.0.1:{runner.addresses[0][1]}/v1")
    finally:
        await runner.cleanup()


async def found(*faults: str) -> dict[str, tuple[str, str, str]]:
    async with serving(Model(*faults)) as settings:
        report = await examine(settings)
    return {finding.check: (finding.level, finding.says, finding.remedy) for finding in report.findings}


async def test_good_upstream_has_nothing_wrong():
    """Every check is made, with few tokens."""
    model = Model("reasoning")
    async with serving(model) as settings:
        report = await examine(settings)
    told = ["reachable", "models", "kind", "context window"]
    tried = ["streaming", "reasoning", "tool call", "parallel calls", "prefix cache"]
    assert [(finding.check, finding.level) for finding in report.findings] == [(check, "ok") for check in told + tried]
    assert all(not finding.remedy for finding in report.findings)
    assert report.is_good
    assert report.tried == "m"
    assert model.tokens < 60
    assert min(model.allowed) >= 16, "the least that OpenAI's Responses API takes"


FAULTS = {
    "loading": ("reachable", "bad", "overloaded or still loading", ""),
    "empty": ("models", "warn", "lists none", "Load or pull a model"),
    "unknown": ("kind", "warn", "Not recognised", "`profile`"),
    "small": ("context window", "warn", "4096 tokens", "--max-model-len"),
    "held back": ("streaming", "warn", "at once", "proxy"),
    "thinking": ("reasoning", "warn", "inside the answer", "--reasoning-parser"),
    "no tools": ("tool call", "bad", "--enable-auto-tool-choice", ""),
    "call as text": ("tool call", "bad", "came as text", "--tool-call-parser"),
    "no call": ("tool call", "warn", "did not call", "trained for tools"),
    "bad arguments": ("tool call", "bad", "no JSON object", "larger model"),
    "one call": ("parallel calls", "warn", "one call a turn", "more turns"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_fault_is_found_and_has_its_remedy(fault):
    """Each with the words that help, for the server that it is."""
    check, level, says, remedy = FAULTS[fault]
    got = (await found(fault))[check]
    assert got[0] == level
    assert says in got[1]
    assert remedy in got[2]


async def test_missing_cache_is_found_by_times_or_not_at_all():
    """Without counts only the time of the first token tells, and on loopback it may tell either."""
    level, says, remedy = (await found("no cache"))["prefix cache"]
    assert (level, says.startswith("No sign")) in {("warn", True), ("ok", False)}
    assert ("--enable-prompt-tokens-details" in remedy) == (level == "warn")


async def test_quick_look_generates_nothing():
    """It is what `serve` does at its start."""
    model = Model()
    async with serving(model) as settings:
        report = await look(settings)
    assert [finding.check for finding in report.findings] == ["reachable", "models", "kind", "context window"]
    assert model.tokens == 0


async def test_named_model_is_tried():
    """Also one that is not listed."""
    async with serving(Model("empty")) as settings:
        report = await examine(settings, "mine")
    assert "prefix cache" in [finding.check for finding in report.findings]


@needs_local
async def test_the_tiny_model_is_tried_as_what_calls_any_tool(monkeypatch, tmp_path):
    """The first that it lists calls nothing but a shell; the report says which one was tried."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    report = await examine(UpstreamSettings(kind="gguf", url="tiny"))
    levels = {finding.check: finding.level for finding in report.findings}
    assert levels.pop("parallel calls") == "warn"
    assert set(levels.values()) == {"ok"}
    assert "tool call" in levels
    assert report.tried == "tiny-tools-3"


@pytest.fixture
def small_gguf(tmp_path):
    """A file that says it is a model, with a context too short for an agent."""

    def text(value):
        return struct.pack("<Q", len(value)) + value.encode()

    architecture = text("general.architecture") + struct.pack("<I", 8) + text("llama")
    window = text("llama.context_length") + struct.pack("<II", 4, 2048)
    path = tmp_path / "small.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + architecture + window)
    return UpstreamSettings(kind="gguf", url=str(path))


async def test_a_model_that_cannot_be_loaded_is_a_finding(monkeypatch, small_gguf):
    """With the reason; other upstreams are still tried."""
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    report = await examine(small_gguf)
    assert [finding.level for finding in report.findings] == ["ok", "ok", "warn", "bad"]
    assert (report.findings[-1].check, report.tried) == ("loading", "")
    assert "pip install 'openline[local]'" in report.findings[-1].says


async def test_a_model_in_this_process_has_no_servers_remedies(small_gguf):
    """Nobody started a llama-server, so its options do not help."""
    (window,) = [finding for finding in (await look(small_gguf)).findings if finding.level != "ok"]
    assert "`context_tokens`" in window.remedy
    assert "llama-server" not in window.remedy


@pytest.mark.parametrize("width", [80, 120])
def test_table_fits_the_terminal(width):
    """Long findings and remedies are wrapped under their check."""
    report = Report("gpu-1", "http://gpu-1:8000/v1")
    report.add("reachable", "ok", "It answers.")
    report.add("context window", "warn", "word " * 40, "remedy " * 40)
    report.add("tool call", "bad", "x" * 200, "Do it.")
    console = Console(width=width, file=io.StringIO())
    console.print(table(report))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert all(len(line) <= width for line in lines)
    assert [line.split()[0] for line in lines if line[1:2] in {"✓", "!", "✗"}] == ["✓", "!", "✗"]
    assert lines[-1] == "Turns will fail: 1 found that must be set right."


def command(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "openline", "doctor", *arguments],
        env=environment(),
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


class TestCommand:
    def test_unreachable_upstream_is_exit_code_1(self):
        """With what to do about it, and nothing else."""
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            code, output, errors = command("--upstream", f"chat:http://127.0.0.1:{unused.getsockname()[1]}/v1")
        assert (code, errors) == (1, "")
        assert "✗" in output
        assert "listen on 0.0.0.0" in output.replace("\n", " ").replace("                 ", "")

    def test_json_is_for_machines(self):
        """The findings as they are, and 0 where turns work."""
        code, output, _ = command("--upstream", "scripted:", "--json")
        told = json.loads(output)
        assert (code, told["ok"]) == (0, True)
        assert told["upstreams"][0]["findings"][0] == {
            "check": "reachable",
            "level": "ok",
            "says": "It answers.",
            "remedy": "",
        }

    def test_wrong_spec_is_exit_code_2(self):
        """As with every command."""
        code, _, errors = command("--upstream", "vllm")
        assert code == 2
        assert "expected chat:URL" in errors
