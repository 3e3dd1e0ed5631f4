"""Tests of the Open Responses compliance suite, run by its own runner.

Prints one JSON line: what the suite reported of each test.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path


def main() -> None:
    """Run the tests and print their results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=("http", "ws"), required=True)
    parser.add_argument("--bun", required=True, help="the executable")
    parser.add_argument("--suite", type=Path, required=True, help="the suite's folder")
    parser.add_argument("--tests", required=True, help="their ids, with commas")
    args = parser.parse_args()
    command = [args.bun, "run", "bin/compliance-test.ts", "--json", "--api-key", "conform"]
    command += ["--base-url", args.base_url, "--model", args.model, "--filter", args.tests]
    done = subprocess.run(command, cwd=args.suite, stdout=subprocess.PIPE, text=True, check=False)
    sys.stderr.write(done.stdout)
    version = (args.suite / "version").read_text()
    print(json.dumps({"client": f"openresponses {version}".strip(), "tests": json.loads(done.stdout)["results"]}))


if __name__ == "__main__":
    main()
