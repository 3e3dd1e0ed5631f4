"""CPU time that the server spends on a turn, over WebSocket and over SSE.

    make bench                                  8 connections, burst
    make bench ARGS="--connections 64 --token-milliseconds 5"

Three processes on loopback: an upstream that speaks Responses and answers at once (or
paced), the server under test, and this one, which keeps every connection busy with one
turn at a time. What is reported is the CPU time of the server's process (user and
system, from /proc) over the turns it finished, so that the load and the upstream do not
count. The transports take turns, round by round; the median stands beside the extremes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import os
import statistics
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from processes import free_port, running, wait_for
from rich.console import Console
from rich.table import Table

DELTAS: Final = 60
DELTA_BYTES: Final = 250
REQUEST_BYTES: Final = 2048
_ENDS: Final = (b'"type":"response.completed"', b'"type":"response.failed"', b'"type":"error"')


# --- The upstream: a whole turn, encoded before anybody asks ---------------------------------------


def upstream_events() -> list[bytes]:
    """The turn's events as a Responses server streams them: 60 deltas of 250 bytes, 68 events in all."""
    item: dict[str, Any] = {
        "type": "message",
        "id": "msg_0",
        "status": "in_progress",
        "role": "assistant",
        "content": [],
    }
    part = {"type": "output_text", "text": "", "annotations": []}
    where: dict[str, Any] = {"item_id": "msg_0", "output_index": 0, "content_index": 0}
    delta = "x" * (DELTA_BYTES - 150)
    text = delta * DELTAS
    whole_part = {**part, "text": text}
    whole_item = {**item, "status": "completed", "content": [whole_part]}
    response: dict[str, Any] = {
        "id": "resp_0",
        "object": "response",
        "status": "in_progress",
        "model": "m",
        "output": [],
    }
    usage = {"input_tokens": 500, "output_tokens": DELTAS, "total_tokens": 500 + DELTAS}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": response},
        {"type": "response.in_progress", "response": response},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.content_part.added", **where, "part": part},
        *({"type": "response.output_text.delta", **where, "delta": delta, "logprobs": []} for _ in range(DELTAS)),
        {"type": "response.output_text.done", **where, "text": text, "logprobs": []},
        {"type": "response.content_part.done", **where, "part": whole_part},
        {"type": "response.output_item.done", "output_index": 0, "item": whole_item},
        {
            "type": "response.completed",
            "response": {**response, "status": "completed", "output": [whole_item], "usage": usage},
        },
    ]
    framed: list[bytes] = []
    for number, event in enumerate(events):
        data = msgspec.json.encode({**event, "sequence_number": number})
        framed.append(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data))
    return framed


def chunk(data: bytes) -> bytes:
    """A chunk of HTTP's chunked encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


async def serve_upstream(port: int, token_seconds: float) -> None:
    """Answer every POST with the turn, and GET /models with one model."""
    events = upstream_events()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    burst = head + chunk(b"".join(events)) + b"0\r\n\r\n"
    models = b'{"object":"list","data":[{"id":"m","object":"model","created":0,"owned_by":"bench"}]}'
    listed = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
        len(models),
        models,
    )

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                request = await reader.readuntil(b"\r\n\r\n")
                if request.startswith(b"GET"):
                    writer.write(listed)
                    continue
                length = next(line for line in request.lower().split(b"\r\n") if line.startswith(b"content-length:"))
                await reader.readexactly(int(length.split(b":")[1]))
                if not token_seconds:
                    writer.write(burst)
                    continue
                writer.write(head)
                for event in events:
                    writer.write(chunk(event))
                    await asyncio.sleep(token_seconds)
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", port, limit=1 << 22) as server:
        await server.serve_forever()


# --- The load: one turn at a time on each connection ----------------------------------------------


def request_body(*, over_socket: bool) -> bytes:
    """A request of about 2 KiB."""
    body: dict[str, Any] = {"model": "m", "store": False, "stream": True, "input": [{"role": "user", "content": ""}]}
    if over_socket:
        body = {"type": "response.create", **body}
    body["input"][0]["content"] = "z" * (REQUEST_BYTES - len(msgspec.json.encode(body)))
    return msgspec.json.encode(body)


def masked_frame(payload: bytes) -> bytes:
    """A text frame as clients send it; a mask of zeros leaves the payload as it is."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + struct.pack(">H", size)
    return b"\x81" + length + b"\0\0\0\0" + payload


class FrameWalk:
    """Walks frame headers across reads; True once a turn's last event has come whole."""

    def __init__(self) -> None:
        self._rest = b""
        self.events = 0

    def __call__(self, data: bytes) -> bool:
        """Whether these bytes complete a turn."""
        data = self._rest + data
        at, ended = 0, False
        while len(data) - at >= 4:
            size, start = data[at + 1], at + 2
            if size == 126:
                size, start = int.from_bytes(data[start : start + 2], "big"), start + 2
            elif size == 127:
                size, start = int.from_bytes(data[start : start + 8], "big"), start + 8
            if len(data) < start + size:
                break
            if data[at] & 0x0F == 1:
                self.events += 1
                ended = ended or any(end in data[start : start + 60] for end in _ENDS)
            at = start + size
        self._rest = data[at:]
        return ended


class BodyWalk:
    """True once a chunked body has ended."""

    def __init__(self) -> None:
        self._tail = b""
        self.events = 0

    def __call__(self, data: bytes) -> bool:
        """Whether these bytes complete a turn."""
        self.events += data.count(b"\ndata: {")
        self._tail = (self._tail + data)[-5:]
        return self._tail == b"0\r\n\r\n"


class Load(asyncio.Protocol):
    """One connection that asks again as soon as its turn has ended."""

    def __init__(
        self, request: bytes, walk: Callable[[bytes], bool], on_turn: Callable[[], None], upgrade: bytes
    ) -> None:
        self._request, self._walk, self._on_turn, self._upgrade = request, walk, on_turn, upgrade
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        """Upgrade, or ask at once."""
        self._transport = transport
        transport.write(self._upgrade or self._request)

    def data_received(self, data: bytes) -> None:
        """Read until the turn's end, then ask again."""
        if self._upgrade:
            if not data.startswith(b"HTTP/1.1 101"):
                raise SystemExit(f"The upgrade was refused: {data[:200]!r}")
            self._upgrade = b""
            self._transport.write(self._request)
        elif self._walk(data):
            self._on_turn()
            self._transport.write(self._request)


class Measured(msgspec.Struct):
    """One round: turns finished, and the server's CPU time for each, in microseconds."""

    turns: int
    events_per_turn: float
    cpu_microseconds: float


async def load_round(port: int, pid: int, *, over_socket: bool, connections: int, seconds: float) -> Measured:
    """Keep the connections busy, and read the server's CPU time around it."""
    loop = asyncio.get_running_loop()
    body = request_body(over_socket=over_socket)
    host = b"Host: 127.0.0.1:%d\r\n" % port
    upgrade = b""
    if over_socket:
        key = base64.b64encode(os.urandom(16))
        upgrade = b"GET /v1/responses HTTP/1.1\r\n%bUpgrade: websocket\r\nConnection: Upgrade\r\n" % host
        upgrade += b"Sec-WebSocket-Key: %b\r\nSec-WebSocket-Version: 13\r\n\r\n" % key
        request = masked_frame(body)
    else:
        head = b"POST /v1/responses HTTP/1.1\r\n%bContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        request = head % (host, len(body)) + body
    turns = 0

    def on_turn() -> None:
        nonlocal turns
        turns += 1

    walks = [FrameWalk() if over_socket else BodyWalk() for _ in range(connections)]
    transports = []
    for walk in walks:
        protocol = Load(request, walk, on_turn, upgrade)
        transport, _ = await loop.create_connection(lambda protocol=protocol: protocol, "127.0.0.1", port)
        transports.append(transport)
    await asyncio.sleep(0.5)  # warm
    turns_before, cpu_before = turns, cpu_seconds(pid)
    events_before = sum(walk.events for walk in walks)
    await asyncio.sleep(seconds)
    count, cpu = turns - turns_before, cpu_seconds(pid) - cpu_before
    events = sum(walk.events for walk in walks) - events_before
    for transport in transports:
        transport.abort()
    if not count:
        raise SystemExit("No turn finished.")
    return Measured(count, events / count, cpu / count * 1e6)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its threads so far, from the scheduler, in seconds."""
    nanoseconds = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        nanoseconds += int((task / "schedstat").read_text().split()[0])
    return nanoseconds / 1e9


# --- The three processes --------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, list[Measured]]:
    """Every round of both transports."""
    upstream_port, port = free_port(), free_port()
    token_seconds = arguments.token_milliseconds / 1000
    me = str(Path(__file__).resolve())
    rounds: dict[str, list[Measured]] = {"WebSocket": [], "SSE": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        running(sys.executable, me, "--be-upstream", str(upstream_port), str(token_seconds)) as upstream,
    ):
        wait_for(upstream_port, upstream)
        serve = [sys.executable, "-m", "openline", "serve", "--port", str(port), "--log-level", arguments.log_level]
        serve += [
            "--upstream",
            f"responses:http://127.0.0.1:{upstream_port}/v1",
            "--store",
            f"sqlite:{folder}/bench.db",
        ]
        with running(*serve) as server:
            wait_for(port, server)
            for number in range(arguments.rounds):
                for transport, found in rounds.items():
                    measured = asyncio.run(
                        load_round(
                            port,
                            server.pid,
                            over_socket=transport == "WebSocket",
                            connections=arguments.connections,
                            seconds=arguments.seconds,
                        )
                    )
                    found.append(measured)
                    print(
                        f"round {number + 1}/{arguments.rounds} {transport}: {measured.turns} turns, "
                        f"{measured.cpu_microseconds:.0f} µs of CPU each",
                        file=sys.stderr,
                    )
    return rounds


def main() -> None:
    if sys.argv[1:2] == ["--be-upstream"]:
        asyncio.run(serve_upstream(int(sys.argv[2]), float(sys.argv[3])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=5, help="of each transport")
    parser.add_argument("--token-milliseconds", type=float, default=0.0, help="between the upstream's events; 0: burst")
    parser.add_argument("--log-level", default="info", help="of the server")
    arguments = parser.parse_args()
    if not Path("/proc/self/schedstat").exists():
        raise SystemExit("CPU time of another process is read from /proc/PID/task/*/schedstat, which only Linux has.")
    rounds = measure(arguments)
    pace = f"{arguments.token_milliseconds:g} ms a token" if arguments.token_milliseconds else "burst"
    table = Table(title=f"Server CPU per turn, {arguments.connections} connections, {pace}")
    for column in ("transport", "events a turn", "CPU a turn, median", "least", "most", "CPU an event"):
        table.add_column(column, justify="right" if column != "transport" else "left")
    for transport, found in rounds.items():
        cpu = sorted(measured.cpu_microseconds for measured in found)
        events = statistics.median(measured.events_per_turn for measured in found)
        median = statistics.median(cpu)
        table.add_row(
            transport,
            f"{events:.0f}",
            f"{median:.0f} µs",
            f"{cpu[0]:.0f} µs",
            f"{cpu[-1]:.0f} µs",
            f"{median / events:.1f} µs",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
