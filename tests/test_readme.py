"""The README's snippets are what a newcomer runs first."""

import re
import shlex
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from commands import serving
from openline.cli import app
from openline.config import load
from openline.engines.tiny import MODELS as TINY_MODELS

README = Path(__file__).parent.parent.joinpath("README.md").read_text(encoding="utf-8")


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_clients_run_as_they_stand(free_server: str):
    """The clients of the first screen run to the end, with nothing changed but the address: ours, and a tool loop of the SDK's."""
    for code, said in zip(snippets("python"), ("This is the scripted engine", "Done after 3 tool calls"), strict=True):
        code = code.replace("http://127.0.0.1:8484/v1", free_server)
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stderr
        assert said in ran.stdout


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


def test_the_codex_command_configures_what_the_block_does():
    """From a clone to Codex: the command names the same provider, as TOML, and the model that `serve` names first."""
    (line,) = (line for code in snippets("sh") for line in code.splitlines() if line.startswith("codex "))
    words = shlex.split(line)
    told = dict(setting for option, text in pairwise(words) if option == "-c" for setting in read_setting(text).items())
    (block,) = (code for code in snippets("toml") if "model_provider" in code)
    wanted = tomllib.loads(block)
    assert told == {name: wanted[name] for name in ("model_provider", "model_providers")}
    assert words[words.index("-m") + 1] == TINY_MODELS[0]


def read_setting(text: str) -> dict[str, Any]:
    """As `codex --help` says of `-c`: the value is TOML, or else a string."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        name, _, value = text.partition("=")
        return {name: value}


def commands() -> list[list[str]]:
    """Every `openline …` of the README: in its snippets, between backticks, and what make is given for one."""
    found = re.findall(r"(?<!`)`(openline [^`]+)`", README)
    found += [f"openline serve {arguments}" for arguments in re.findall(r'make serve ARGS="([^"]+)"', README)]
    found += [line for code in snippets("sh") for line in code.splitlines()]
    split = (shlex.split(line, comments=True) for line in found)
    return [words[1:] for words in split if words and Path(words[0]).name == "openline" and len(words) > 1]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_and_option_exists(arguments: list[str]):
    """Whoever pastes a command gets no usage error; `--help` reads the options without running anything."""
    ran = CliRunner().invoke(app, [*arguments, "--help"])
    assert ran.exit_code == 0, ran.stderr


def test_an_option_that_does_not_exist_would_be_found():
    """The test above sees it: click reads all options before it helps."""
    assert len(commands()) > 4
    assert CliRunner().invoke(app, ["serve", "--no-such", "x", "--help"]).exit_code == 2


@pytest.fixture
def free_server():
    """`openline serve` in front of the script, on a free port; its base URL."""
    with serving("--upstream", "scripted:") as (process, said):
        yield re.search(r"listens on (http://\S+/v1)", said)[1]
        process.terminate()
        assert process.wait(10) == 0, "a server that was told to stop ends with 0"
