"""What a warm-up saves: the time to a turn's first token, with and without one before it.

    make bench BENCH=warm_up
    make bench BENCH=warm_up ARGS="--instruction-bytes 60000 --rounds 9"
    make bench BENCH=warm_up ARGS="--upstream chat:http://127.0.0.1:8000/v1 --model qwen3"

One server, with the tiny model in its process unless told otherwise, and one socket. Each round tries every way
once, in an order that changes, with instructions that nobody has sent before: cold, and after `generate: false`
that was sent some time earlier. The median stands beside the extremes, and its share of the cold one.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from typing import Any, Final

from aiohttp import ClientSession, ClientWebSocketResponse
from processes import free_port, running, wait_for
from rich.console import Console
from rich.table import Table

from openline.engines.tiny import is_available

PAUSES_SECONDS: Final = (0.0, 0.25, 1.0, 3.0)  # between warm-up and turn


def instructions(size: int) -> str:
    """Words that no cache holds."""
    words = (
        random.choice(("read", "write", "list", "search")) + f" {random.getrandbits(24):06x}\n" for _ in range(size)
    )
    return "".join(words)[:size]


async def take_turn(socket: ClientWebSocketResponse, create: dict[str, Any]) -> tuple[float, str]:
    """From sending a create to the first piece of its text, in seconds; the rest is read too. And the response's id."""
    started = time.perf_counter()
    first = None
    await socket.send_json(create)
    while True:
        event = await socket.receive_json()
        match event["type"]:
            case "response.output_text.delta":
                first = first or time.perf_counter()
            case "response.completed":
                return (first or time.perf_counter()) - started, event["response"]["id"]
            case "error" | "response.failed" | "response.incomplete":
                raise SystemExit(f"The turn failed: {event}")


async def measured_turn(socket: ClientWebSocketResponse, model: str, size: int, pause_seconds: float | None) -> float:
    """One turn, in seconds to its first token; None as the pause is a turn without warm-up."""
    create = {"type": "response.create", "model": model, "store": False, "instructions": instructions(size)}
    parent = {}
    if pause_seconds is not None:
        _, warmed = await take_turn(socket, {**create, "input": [], "generate": False})
        parent = {"previous_response_id": warmed}
        await asyncio.sleep(pause_seconds)
    seconds, _ = await take_turn(socket, {**create, **parent, "input": "Sum it up."})
    return seconds


async def measure(port: int, model: str, rounds: int, size: int) -> dict[float | None, list[float]]:
    """Every round of every way."""
    found: dict[float | None, list[float]] = {None: [], **{pause: [] for pause in PAUSES_SECONDS}}
    async with ClientSession() as session, session.ws_connect(f"http://127.0.0.1:{port}/v1/responses") as socket:
        await measured_turn(socket, model, size, None)  # the first turn of a process is slower
        for number in range(rounds):
            for pause in random.sample(list(found), len(found)):
                found[pause].append(await measured_turn(socket, model, size, pause))
            print(f"round {number + 1}/{rounds}", file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--instruction-bytes", type=int, default=12_000, help="of the prefix that is warmed up")
    parser.add_argument("--upstream", default="gguf:tiny", help="who answers, as for `openline serve`")
    parser.add_argument("--model", default="tiny-text", help="of that upstream")
    arguments = parser.parse_args()
    if arguments.upstream.startswith("gguf:") and not is_available():
        raise SystemExit("llama.cpp is not installed: there is no wheel for this system.")
    port = free_port()
    serve = [sys.executable, "-m", "openline", "serve", "--port", str(port), "--upstream", arguments.upstream]
    with running(*serve, "--store", "none", "--log-level", "warning") as server:
        wait_for(port, server)
        found = asyncio.run(measure(port, arguments.model, arguments.rounds, arguments.instruction_bytes))
    cold = statistics.median(found[None])
    table = Table(title=f"Time to the first token, {arguments.instruction_bytes} bytes of instructions")
    for column in ("before the turn", "median", "least", "most", "of the cold one"):
        table.add_column(column, justify="left" if column == "before the turn" else "right")
    for pause, seconds in found.items():
        median = statistics.median(seconds)
        way = "nothing (cold)" if pause is None else f"a warm-up, then {pause:g} s"
        table.add_row(
            way, *(f"{value * 1000:.0f} ms" for value in (median, min(seconds), max(seconds))), f"{median / cold:.2f}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
