"""The README's snippets are what a newcomer runs first."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from openline.config import load

README = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_client_runs_as_it_stands(free_server: str):
    """The client of the first screen runs its tool loop to the end, with nothing changed but the address."""
    (code,) = snippets("python")
    code = code.replace("http://127.0.0.1:8484/v1", free_server)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Done after 3 tool calls" in ran.stdout


def test_the_configuration_example_is_taken_as_it_stands(tmp_path: Path):
    """Every field of the configuration example exists and has a value of its type."""
    (example,) = (code for code in snippets("toml") if "[limits]" in code)
    path = tmp_path / "openline.toml"
    path.write_text(example, encoding="utf-8")
    assert load(path, {}, {}).upstreams[0].aliases == {"gpt-5": "qwen3-coder"}


def test_the_codex_block_is_toml_for_a_websocket_provider():
    """Codex reads its block as TOML and uses a socket only if it is told to."""
    (block,) = (code for code in snippets("toml") if "model_provider" in code)
    provider = tomllib.loads(block)["model_providers"]["openline"]
    assert provider["supports_websockets"] is True
    assert provider["wire_api"] == "responses"


@pytest.fixture
def free_server(tmp_path: Path):
    """`openline serve` in front of the script, on a free port; its base URL."""
    command = [sys.executable, "-m", "openline", "serve", "--port", "0", "--upstream", "scripted:"]
    command += ["--store", f"sqlite:{tmp_path}/readme.db"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    with process.stdout:
        line = next(line for line in process.stdout if "listens on" in line)
        yield re.search(r"http://\S+/v1", line).group()
        process.terminate()
        assert process.wait(10) == 0, "a server that was told to stop ends with 0"
