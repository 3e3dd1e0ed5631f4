"""The cases: which client, over which transport, with which model behind the server, and its plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from install import BUN, CODEX, HERE, NODE, OPENCODE, PYTHON, SUITE_HOME

CASE_SECONDS_MAX = 120
PLANNED = "planned"
TINY = "tiny"

# What a client does, and so how it is judged.
LOOP = "loop"  # one conversation, with tools of its own
SHELL = "shell"  # one conversation of a coding agent, with real commands
LANES = "lanes"  # several conversations at once on one socket
SUITE = "suite"  # tests that judge the server themselves

# All of the Open Responses suite.
SUITE_HTTP = (
    "basic-response",
    "assistant-phase",
    "response-output-phase-schema",
    "streaming-response",
    "system-prompt",
    "tool-calling",
    "image-input",
    "multi-turn",
    "compact-response",
    "compact-missing-model",
)
SUITE_WEBSOCKET = (
    "websocket-response",
    "websocket-sequential-responses",
    "websocket-continuation",
    "websocket-reconnect-store-false-recovery",
    "websocket-previous-response-not-found",
    "websocket-failed-continuation-evicts-cache",
    "websocket-compact-new-chain",
)

# Who sums the conversation up: Codex by a turn of its own, or the server, which it asks if it takes it for OpenAI's.
BY_CLIENT = "client"
BY_SERVER = "server"
COMPACT_AT_TOKENS = 25_000  # between two and three tool outputs of a model that ends in `-growing`


@dataclass(frozen=True)
class Case:
    """One run of one client.

    `rounds` and `width` say how often the model calls tools, and how many at once. For Codex the model
    name decides which tools it offers: one that it does not know, one with a patch tool, one that reaches
    its shell through a script tool. `chained` cases send increments, the others the whole conversation; `warmed`
    ones begin with a warm-up; in `listed` ones Codex asks for the list of models first, which then decides what it offers;
    `compacted` says who sums the conversation up on the way. `lanes` is how many
    conversations run at once, `tests` which tests of the suite.
    `engine` is who answers: the harness's own model server, `PLANNED`, or the tiny model in llama.cpp, `TINY`.
    """

    name: str
    task: str
    kind: str  # what must be installed: python, node, codex, opencode or suite
    script: str
    mode: str
    model: str
    rounds: int = 0
    width: int = 1
    lanes: int = 0
    tests: tuple[str, ...] = ()
    patched: bool = False
    chained: bool = False
    warmed: bool = False
    listed: bool = False
    compacted: str = ""
    engine: str = PLANNED

    @property
    def transport(self) -> str:
        """What the client must use."""
        return "WebSocket" if self.mode.startswith("ws") else "HTTP"

    @property
    def needs(self) -> tuple[str, ...]:
        """What must be installed."""
        return (self.kind, TINY) if self.engine == TINY else (self.kind,)

    def command(self, base_url: str, model: str, python: str, scratch: Path) -> list[str]:
        """Return the command line; `python` runs what needs no client's own environment."""
        options = ["--base-url", base_url, "--model", model, "--mode", self.mode]
        if self.kind == "node":
            return ["node", str(NODE / self.script), *options]
        script = [str(HERE / "clients" / self.script), *options]
        home = ["--scratch", str(scratch / self.name)]
        match self.kind:
            case "python":
                return [str(PYTHON), *script]
            case "codex":
                summing = ["--compact-at", str(COMPACT_AT_TOKENS)] if self.compacted else []
                provider = ["--provider", "OpenAI"] if self.compacted == BY_SERVER else []
                listed = ["--listed"] if self.listed else []
                return [python, *script, *home, "--codex", str(CODEX), *summing, *provider, *listed]
            case "opencode":
                return [python, *script, *home, "--opencode", str(OPENCODE)]
            case _:
                return [python, *script, "--bun", str(BUN), "--suite", str(SUITE_HOME), "--tests", ",".join(self.tests)]


def _sdk(name: str, kind: str, script: str, mode: str, model: str = "calls-20", *, chained: bool = False) -> Case:
    rounds, _, width = model.removeprefix("calls-").partition("x")
    return Case(name, LOOP, kind, script, mode, model, int(rounds), int(width or 1), chained=chained)


def _lanes(name: str, kind: str, script: str, mode: str = "ws") -> Case:
    """Three lanes of two rounds each; the model answers when all three have asked."""
    return Case(name, LANES, kind, script, mode, "calls-2-lanes-3", rounds=2, lanes=3)


def _suite(name: str, mode: str, tests: tuple[str, ...]) -> Case:
    """As model `calls-1`, which calls a tool where one is offered."""
    return Case(name, SUITE, "suite", "open_responses.py", mode, "calls-1", tests=tests)


def _codex(name: str, mode: str, model: str, *, patched: bool = False, compacted: str = "") -> Case:
    rounds, over_socket = 6 if patched else 5, mode == "ws"
    case = Case(name, SHELL, "codex", "codex.py", mode, model, rounds, patched=patched, compacted=compacted)
    return replace(case, chained=over_socket, warmed=over_socket)


def _listed(case: Case) -> Case:
    """With the list of models, which gives Codex a patch tool for every one of them."""
    return replace(case, name=f"{case.name}-listed", listed=True)


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
    _sdk("pydantic-ai-http", "python", "pydantic_agent.py", "http"),
    _sdk("pydantic-ai-ws", "python", "pydantic_agent.py", "ws", chained=True),
    _sdk("langchain-json", "python", "langchain_python.py", "json"),
    _sdk("langchain-json-parallel", "python", "langchain_python.py", "json", "calls-4x3"),
    _sdk("langchain-sse-chained", "python", "langchain_python.py", "sse-chained"),
    _sdk("ai-sdk-json", "node", "ai_node.mjs", "json"),
    _sdk("ai-sdk-sse", "node", "ai_node.mjs", "sse"),
    _sdk("ai-sdk-sse-parallel", "node", "ai_node.mjs", "sse", "calls-4x3"),
    _lanes("openai-python-lanes", "python", "lanes_python.py"),
    _lanes("openai-node-lanes", "node", "lanes_node.mjs"),
    _lanes("pydantic-ai-lanes", "python", "pydantic_agent.py", "ws-lanes"),
    _suite("open-responses-http", "http", SUITE_HTTP),
    _suite("open-responses-ws", "ws", SUITE_WEBSOCKET),
    _codex("codex-http", "http", "shell"),
    _codex("codex-http-patch", "http", "gpt-5.5", patched=True),
    _codex("codex-http-script", "http", "gpt-6.1-sol"),
    _codex("codex-ws", "ws", "shell"),
    _codex("codex-ws-patch", "ws", "gpt-5.5", patched=True),
    _codex("codex-ws-script", "ws", "gpt-6.1-sol"),
    _listed(_codex("codex-http", "http", "shell", patched=True)),
    _listed(_codex("codex-ws", "ws", "shell", patched=True)),
    _codex("codex-http-compact", "http", "shell-growing", compacted=BY_CLIENT),
    _codex("codex-http-compact-server", "http", "shell-growing", compacted=BY_SERVER),
    _codex("codex-ws-compact", "ws", "shell-growing", compacted=BY_CLIENT),
    _codex("codex-ws-compact-server", "ws", "shell-growing", compacted=BY_SERVER),
    Case("opencode-ws", SHELL, "opencode", "opencode.py", "ws", "shell", rounds=5),
    _tiny(_sdk("openai-python-sse", "python", "openai_python.py", "sse"), "tiny-tools-8", 8),
    _tiny(_sdk("openai-python-ws", "python", "openai_python.py", "ws", chained=True), "tiny-tools-8", 8),
    _tiny(_sdk("agents-python-http", "python", "agents_python.py", "http"), "tiny-tools-8", 8),
    _tiny(
        _sdk("agents-python-ws-chained", "python", "agents_python.py", "ws-chained", chained=True), "tiny-tools-8", 8
    ),
    _tiny(_codex("codex-http", "http", "shell"), "tiny-shell-5", 5),
    _tiny(_codex("codex-ws", "ws", "shell"), "tiny-shell-5", 5),
    _tiny(_listed(_codex("codex-ws", "ws", "shell")), "tiny-shell-5", 5),
)
