"""A task for opencode: five real shell commands in a scratch folder, with a home of its own.

Prints one JSON line that says what happened: the commands that it ran, with their outputs and exit codes, its closing
message, and the files it left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from codex import PROMPT


def config(base_url: str, model: str) -> dict[str, Any]:
    """Return opencode's settings: its own provider `openai`, the only one with WebSocket, at another address."""
    offered = {"name": model, "tool_call": True, "limit": {"context": 128_000, "output": 8_000}}
    return {
        "autoupdate": False,
        "share": "disabled",
        "enabled_providers": ["openai"],
        "provider": {"openai": {"options": {"baseURL": base_url}, "models": {model: offered}}},
        "permission": {"*": "allow"},
    }


def environment(home: Path, websockets: str) -> dict[str, str]:
    """Return the environment: all that opencode keeps goes into `home`, and nothing comes from the network."""
    folders = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CACHE", "CONFIG", "DATA", "STATE")}
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        **folders,
        "OPENCODE_CONFIG": str(home / "opencode.json"),
        "OPENCODE_AUTH_CONTENT": json.dumps({"openai": {"type": "api", "key": "conform"}}),
        "OPENCODE_DISABLE_AUTOUPDATE": "1",
        "OPENCODE_DISABLE_LSP_DOWNLOAD": "1",
        "OPENCODE_DISABLE_MODELS_FETCH": "1",
        "OPENCODE_EXPERIMENTAL_WEBSOCKETS": websockets,
    }


def run(opencode: str, base_url: str, model: str, scratch: Path, websockets: str) -> dict[str, Any]:
    """Run `opencode run` in `scratch/work` with `scratch/home` as its home; return its result."""
    home, work = scratch / "home", scratch / "work"
    home.mkdir(parents=True)
    work.mkdir()
    (home / "opencode.json").write_text(json.dumps(config(base_url, model)))
    # A prompt among the arguments would arrive in quotes. With a title given, opencode does not ask the model for one.
    command = [opencode, "run", "--format", "json", "--title", "conform", "--model", f"openai/{model}"]
    done = subprocess.run(
        command,
        cwd=work,
        env=environment(home, websockets),
        input=PROMPT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    sys.stderr.write(done.stdout)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    states = [event["part"]["state"] for event in events if event["type"] == "tool_use"]
    texts = [event["part"]["text"] for event in events if event["type"] == "text"]
    return {
        "prompt": PROMPT,
        "exit_code": done.returncode,
        "errors": [json.dumps(event["error"]) for event in events if event["type"] == "error"],
        "exit_codes": [state.get("metadata", {}).get("exit") for state in states],
        "outputs": [state.get("output", "") for state in states],
        "text": texts[-1] if texts else "",
        "files": {path.name: path.read_text() for path in sorted(work.iterdir())},
    }


def main() -> None:
    """Run opencode once and print the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--opencode", required=True, help="the executable")
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=("http", "ws"), required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that does not exist yet")
    args = parser.parse_args()
    result = run(args.opencode, args.base_url, args.model, args.scratch, str(int(args.mode == "ws")))
    version = subprocess.run([args.opencode, "--version"], stdout=subprocess.PIPE, text=True, check=True)
    print(json.dumps({"client": f"opencode {version.stdout.strip()}", **result}))


if __name__ == "__main__":
    main()
