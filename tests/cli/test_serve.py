"""`openline serve`: what it says when it cannot start, and when it does.

What cannot be used is one clear line that names the field, exit code 2, and no traceback.
"""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from commands import environment, serving
from local_engine import needs_local
from openline.cli import app
from openline.engines.tiny_model import write_tiny_model

STOP_SECONDS_MAX = 30
SCRIPTED = ["--upstream", "scripted:", "--store", "none", "--port", "0"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--upstream", "http://127.0.0.1:8000/v1"], "--upstream"),
        (["--upstream", "chat:127.0.0.1:8000"], "upstreams[0].url"),
        (["--upstream", "chat:http://127.0.0.1:99999/v1"], "upstreams[0].url"),
        (["--upstream", "chat:http://user:secret@127.0.0.1/v1"], "api_key_env"),
        (["--upstream", "scripted:/no/such.jsonl"], "--upstream scripted:/no/such.jsonl"),
        (["--upstream", "gguf:/no/such.gguf"], "--upstream gguf:/no/such.gguf"),
        ([*SCRIPTED, "--store", "sqlite:/no/such/folder/x.db"], "store.url"),
        ([*SCRIPTED, "--store", "mysql://x"], "store.url"),
        ([*SCRIPTED, "--host", "0.0.0.0"], "server.host"),
        ([*SCRIPTED, "--port", "99999"], "server.port"),
        ([*SCRIPTED, "--config", "/no/such.toml"], "--config"),
        ([*SCRIPTED, "--tls-cert", "cert.pem"], "server.tls_key"),
        ([*SCRIPTED, "--tls-cert", "no.pem", "--tls-key", "no.pem"], "server.tls_cert"),
        ([*SCRIPTED, "--log-level", "notset"], "--log-level"),
    ],
)
def test_what_cannot_be_used_is_one_line_that_names_the_field(arguments: list[str], named: str):
    """A person reads which setting it is and what was expected; exit code 2."""
    ran = CliRunner().invoke(app, ["serve", *arguments], env={"COLUMNS": "200"})
    lines = [line for line in ran.stderr.splitlines() if line]
    assert ran.exit_code == 2, ran.output
    assert len(lines) == 1
    assert lines[0].startswith("openline: ")
    assert named in lines[0]
    assert "secret" not in ran.output


def test_a_port_that_is_taken_is_named_with_what_to_do():
    """The commonest mistake is a server that runs already."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ran = CliRunner().invoke(app, ["serve", "--upstream", "scripted:", "--store", "none", "--port", port])
    assert ran.exit_code == 2
    assert f"server.port {port}" in ran.stderr
    assert "--port" in ran.stderr


def test_an_environments_proxy_that_is_no_url_is_said_without_its_value():
    """A proxy's URL may hold a password."""
    arguments = ["serve", "--upstream", "chat:http://gpu-box/v1", "--store", "none", "--port", "0"]
    ran = CliRunner().invoke(app, arguments, env={"http_proxy": "http://secret@[bad:1", "HTTP_PROXY": ""})
    assert ran.exit_code == 2
    assert "http_proxy" in ran.stderr
    assert "secret" not in ran.output


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_ends_with_0_when_told_to(stop: signal.Signals):
    """The lines can be pasted as they are: they name the address and a model that is served."""
    with serving("--upstream", "scripted:") as (process, said):
        process.send_signal(stop)
        _, errors = process.communicate(timeout=STOP_SECONDS_MAX)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    address = re.search(r"listens on (http://127\.0\.0\.1:\d+/v1)", said)
    assert address is not None
    assert said.count(address[1]) == 3
    assert 'model = "scripted-text"' in said


@pytest.mark.parametrize(("key", "says"), [("", "any"), ("sk-canary", "sk-canary")])
def test_codex_asks_for_the_list_of_models_with_a_key_that_is_taken(key: str, says: str):
    """Its block has a command that prints the key: without one it asks for no list, and guesses a context window.

    Source: openai/codex, codex-rs/models-manager/src/manager.rs, `should_refresh_models`.
    """
    with serving("--upstream", "scripted:", **({"OPENLINE_API_KEY": key} if key else {})) as (process, said):
        process.terminate()
        process.communicate(timeout=STOP_SECONDS_MAX)
    _, _, block = said.partition("config.toml\n")
    told = tomllib.loads(block)["model_providers"]["openline"]["auth"]
    ran = subprocess.run(
        [told["command"], *told["args"]],
        env=environment(OPENLINE_API_KEY=key),
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == says
    assert "sk-canary" not in said


@needs_local
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_model_in_this_process_ends_with_it(stop: signal.Signals, tmp_path: Path):
    """llama.cpp's threads and port are gone with exit code 0, and it says nothing of its own meanwhile."""
    lasting = {"XDG_CACHE_HOME": str(tmp_path), "OPENLINE_SEALING_KEY": "0" * 64}
    with serving("--upstream", "gguf:tiny", **lasting) as (process, said):
        process.send_signal(stop)
        _, errors = process.communicate(timeout=STOP_SECONDS_MAX)
    assert (process.returncode, errors) == (0, "")
    assert "behind it: tiny (gguf, llama.cpp)" in said
    assert 'model = "tiny-shell-5"' in said
    assert "`openline doctor` tries turns too" in said


@needs_local
def test_it_says_what_it_loads(tmp_path: Path):
    """A large model takes a minute before the server listens."""
    path = tmp_path / "large.gguf"
    write_tiny_model(path)
    with serving("--upstream", f"gguf:{path}") as (process, said):
        process.terminate()
        process.communicate(timeout=STOP_SECONDS_MAX)
    assert said.startswith("Loading large.gguf (0.0 GB)\n")


@needs_local
def test_upstreams_are_tried_first_if_asked_for(tmp_path: Path):
    """With `--check` the table has what turns showed as well: calls, reasoning, the prefix cache."""
    with serving("--check", "--upstream", "gguf:tiny", XDG_CACHE_HOME=str(tmp_path)) as (process, said):
        process.terminate()
        process.communicate(timeout=STOP_SECONDS_MAX)
    assert process.returncode == 0
    for check in ("reachable", "context window", "streaming", "tool call", "parallel calls", "prefix cache"):
        assert re.search(rf"^ +[✓!] +{check}  ", said, re.MULTILINE), said


def test_a_dead_upstream_does_not_keep_it_from_starting():
    """`openline serve` starts all the same, and says that nothing answers behind it."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{nobody.getsockname()[1]}/v1"
    with serving("--upstream", f"chat:{dead}") as (process, said):
        process.terminate()
        process.communicate(timeout=STOP_SECONDS_MAX)
    assert process.returncode == 0
    assert "listens on" in said
    assert f"at {dead}" in said
    assert re.search(r"✗ +reachable +.*\n.*\n +→ Start it", said)
