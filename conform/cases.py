"""The cases: which client, over which transport, with which model behind the server, and its plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from install import CODEX, HERE, NODE, PYTHON

CASE_SECONDS_MAX = 120
PLANNED = "planned"
TINY = "tiny"


@dataclass(frozen=True)
class Case:
    """One run of one client.

    `rounds` and `width` say how often the model calls tools, and how many at once. For Codex the model
    name decides which tools it offers: one that it does not know, one with a patch tool, one that reaches
    its shell through a script tool. `chained` cases send increments, the others the whole conversation.
    `engine` is who answers: the harness's own model server, `PLANNED`, or the tiny model in llama.cpp, `TINY`.
    """

    name: str
    kind: str  # what must be installed: python, node or codex
    script: str
    mode: str
    transport: str
    model: str
    rounds: int
    width: int = 1
    patched: bool = False
    chained: bool = False
    engine: str = PLANNED

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be installed."""
        return (self.kind, TINY) if self.engine == TINY else (self.kind,)

    def command(self, base_url: str, model: str, python: str, scratch: Path) -> list[str]:
        """Return the command line; `python` runs what needs no client's own environment."""
        options = ["--base-url", base_url, "--model", model, "--mode", self.mode]
        match self.kind:
            case "python":
                return [str(PYTHON), str(HERE / "clients" / self.script), *options]
            case "node":
                return ["node", str(NODE / self.script), *options]
            case _:
                mine = ["--codex", str(CODEX), "--scratch", str(scratch / self.name)]
                return [python, str(HERE / "clients" / self.script), *options, *mine]


def _sdk(name: str, kind: str, script: str, mode: str, model: str = "calls-20", *, chained: bool = False) -> Case:
    rounds, _, width = model.removeprefix("calls-").partition("x")
    transport = "WebSocket" if mode.startswith("ws") else "HTTP"
    return Case(name, kind, script, mode, transport, model, int(rounds), int(width or 1), chained=chained)


def _codex(name: str, mode: str, model: str, *, patched: bool = False) -> Case:
    transport = "WebSocket" if mode == "ws" else "HTTP"
    rounds = 6 if patched else 5
    return Case(name, "codex", "codex.py", mode, transport, model, rounds, patched=patched, chained=mode == "ws")


def _tiny(case: Case, model: str, rounds: int) -> Case:
    """The same with the tiny model, whose words mean nothing and whose tool calls follow its name."""
    return replace(case, name=f"{case.name}-tiny", model=model, rounds=rounds, engine=TINY)


CASES = (
    _sdk("openai-python-json", "python", "openai_python.py", "json"),
    _sdk("openai-python-sse", "python", "openai_python.py", "sse"),
    _sdk("openai-python-ws", "python", "openai_python.py", "ws", chained=True),
    _sdk("openai-python-json-parallel", "python", "openai_python.py", "json", "calls-4x3"),
    _sdk("openai-python-sse-parallel", "python", "openai_python.py", "sse", "calls-4x3"),
    _sdk("openai-python-ws-parallel", "python", "openai_python.py", "ws", "calls-4x3", chained=True),
    _sdk("agents-python-http", "python", "agents_python.py", "http"),
    _sdk("agents-python-ws", "python", "agents_python.py", "ws"),
    _sdk("agents-python-ws-chained", "python", "agents_python.py", "ws-chained", chained=True),
    _sdk("openai-node-sse", "node", "openai_node.mjs", "sse"),
    _sdk("openai-node-ws", "node", "openai_node.mjs", "ws", chained=True),
    _sdk("openai-node-ws-parallel", "node", "openai_node.mjs", "ws", "calls-4x3", chained=True),
    _sdk("agents-node-http", "node", "agents_node.mjs", "http"),
    _sdk("agents-node-ws", "node", "agents_node.mjs", "ws"),
    _codex("codex-http", "http", "shell"),
    _codex("codex-http-patch", "http", "gpt-5.5", patched=True),
    _codex("codex-http-script", "http", "gpt-6.1-sol"),
    _codex("codex-ws", "ws", "shell"),
    _codex("codex-ws-patch", "ws", "gpt-5.5", patched=True),
    _codex("codex-ws-script", "ws", "gpt-6.1-sol"),
    _tiny(_sdk("openai-python-sse", "python", "openai_python.py", "sse"), "tiny-tools-8", 8),
    _tiny(_sdk("openai-python-ws", "python", "openai_python.py", "ws", chained=True), "tiny-tools-8", 8),
    _tiny(_sdk("agents-python-http", "python", "agents_python.py", "http"), "tiny-tools-8", 8),
    _tiny(
        _sdk("agents-python-ws-chained", "python", "agents_python.py", "ws-chained", chained=True), "tiny-tools-8", 8
    ),
    _tiny(_codex("codex-http", "http", "shell"), "tiny-shell-5", 5),
    _tiny(_codex("codex-ws", "ws", "shell"), "tiny-shell-5", 5),
)
