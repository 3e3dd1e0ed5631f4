"""An agent whose tool appends a line to a file, as a process that may be killed: fifty.py URL MODEL LEDGER FILE.

It begins a session, or takes up the one that its ledger holds.
"""

import asyncio
import os
import sys
from pathlib import Path

import openline
from openline import RUN, Ledger, Output, ToolCall


async def main(url: str, model: str, ledger_path: str, file: Path) -> None:
    def append(line: str, call: ToolCall) -> str:
        """Append a line to the file."""
        handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        os.write(handle, f"{call.key} {line}\n".encode())
        os.close(handle)
        return f"appended {line}"

    def look(call: ToolCall) -> Output | openline.Unknown:
        """Whether the line is there is in the file."""
        written = file.read_text().splitlines() if file.exists() else []
        return Output("it is there") if f"{call.key} {call.arguments['line']}" in written else RUN

    with Ledger(ledger_path) as ledger:
        held = ledger.sessions()
        asked = {"resume": held[0].session_id} if held else {"input": "Append them all."}
        async with openline.connect(url, model=model) as session:
            result = await openline.run_tools(session, tools=[append], ledger=ledger, on_unknown=look, **asked)
    sys.stdout.write(f"{len(result.calls)} {result.text}")


asyncio.run(main(*sys.argv[1:4], Path(sys.argv[4])))
