"""A task for the Codex CLI: five real shell commands in a scratch folder, with a home of its own.

Codex sums its conversation up where it reaches `--compact-at` tokens: by a turn of its own, or by asking the server,
where the provider's name is `OpenAI`.

Prints one JSON line that says what happened: the commands that Codex ran, with their outputs and exit
codes, its closing message, and the files it left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

PROMPT = """Run exactly these five shell commands, one after another, each in a tool call of its own:
1. printf 'one\\n' > notes.txt && echo created
2. printf 'two\\n' >> notes.txt && echo appended
3. ls notes.txt | tee listing.txt
4. cat notes.txt | tee copy.txt
5. wc -l notes.txt | tee count.txt
Then say what the last one printed."""

# How it gets its key decides whether it asks for the list of models.
KEY_BY_VARIABLE = 'env_key = "OPENLINE_API_KEY"'
KEY_BY_COMMAND = 'auth = { command = "printenv", args = ["OPENLINE_API_KEY"] }'

CONFIG = """\
model_provider = "openline"
check_for_update_on_startup = false
{limit}
[model_providers.openline]
name = "{provider}"
base_url = "{base_url}"
wire_api = "responses"
{key}
supports_websockets = {websockets}

[analytics]
enabled = false
"""


def config(args: argparse.Namespace) -> str:
    """Return the text of its `config.toml`."""
    return CONFIG.format(
        base_url=args.base_url,
        websockets=str(args.mode == "ws").lower(),
        provider=args.provider,
        limit=f"model_auto_compact_token_limit = {args.compact_at}\n" if args.compact_at else "",
        key=KEY_BY_COMMAND if args.listed else KEY_BY_VARIABLE,
    )


def run(codex: str, model: str, scratch: Path, config: str) -> dict[str, Any]:
    """Run `codex exec` in `scratch/work` with `scratch/home` as its home; return its result."""
    home, work = scratch / "home", scratch / "work"
    home.mkdir(parents=True)
    work.mkdir()
    (home / "config.toml").write_text(config)
    command = [codex, "exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "CODEX_HOME": str(home),
        "OPENLINE_API_KEY": "conform",
    }
    done = subprocess.run(
        [*command, "--model", model, PROMPT],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    sys.stderr.write(done.stdout)
    events = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    items = [event["item"] for event in events if event.get("type") == "item.completed"]
    commands = [item for item in items if item["type"] == "command_execution"]
    messages = [item["text"] for item in items if item["type"] == "agent_message"]
    return {
        "prompt": PROMPT,
        "exit_code": done.returncode,
        "errors": [event["message"] for event in events if event.get("type") == "error"],
        "warnings": [item["message"] for item in items if item["type"] == "error"],
        "exit_codes": [item.get("exit_code") for item in commands],
        "outputs": [item.get("aggregated_output", "") for item in commands],
        "text": messages[-1] if messages else "",
        "files": {path.name: path.read_text() for path in sorted(work.iterdir())},
    }


def main() -> None:
    """Run Codex once and print the result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--codex", required=True, help="the executable")
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=("http", "ws"), required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--provider", default="Openline", help="the provider's name")
    parser.add_argument("--compact-at", type=int, default=0, help="tokens at which it sums up; 0: its own limit")
    parser.add_argument("--listed", action="store_true", help="have it ask for the list of models")
    args = parser.parse_args()
    result = run(args.codex, args.model, args.scratch, config(args))
    version = subprocess.run([args.codex, "--version"], stdout=subprocess.PIPE, text=True, check=True)
    print(json.dumps({"client": version.stdout.strip(), **result}))


if __name__ == "__main__":
    main()
