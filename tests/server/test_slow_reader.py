"""A client that does not read slows its own turns down, and nobody else's; memory stays bounded."""

from __future__ import annotations

import asyncio
import json
import socket as sockets
from contextlib import closing, suppress

import pytest

from openline.protocol.deltas import TextDelta
from server.running import read_sse

WINDOW_BYTES = 128 * 1024
BATCH_BYTES = 32 * 1024
BATCHES = 64  # 2 MiB in all
KERNEL_BYTES = 64 * 1024  # of each socket's buffer; Linux doubles it
# What lies outside the window: the transport's own buffer (64 KiB high water) and the event that filled it, the
# two sockets' buffers, and what the client has read ahead.
OUTSIDE_BYTES = 64 * 1024 + BATCH_BYTES + 4 * KERNEL_BYTES + 64 * 1024 + BATCH_BYTES


assert BATCHES * BATCH_BYTES > 2 * (WINDOW_BYTES + BATCH_BYTES + OUTSIDE_BYTES)


@pytest.fixture
async def small(start, hand):
    """A server whose window is small enough to fill, and its engine."""
    return await start(engine=hand, limits={"send_buffer_bytes_max": WINDOW_BYTES}, kernel_buffer_bytes=KERNEL_BYTES)


def push(turn):
    """Hand out more than any buffer takes; the queue is the upstream's, not the server's."""
    turn.accept()
    for number in range(BATCHES):
        turn.give(TextDelta(f"{number:08d}".ljust(BATCH_BYTES, "x")))
    turn.finish()


async def paused(turn):
    """Wait until the server has asked the engine for nothing more for a while; how many bytes it has taken."""
    with suppress(TimeoutError):
        while True:
            turn.asked.clear()
            await asyncio.wait_for(turn.asked.wait(), 0.25)
    return turn.taken * BATCH_BYTES


def stingy_connection(server):
    """A TCP connection that takes as little as the kernel allows before it is read."""
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, KERNEL_BYTES)
    raw.setblocking(True)
    host, port = server.address.split(":")
    raw.connect((host, int(port)))
    raw.setblocking(False)
    return raw


@pytest.mark.parametrize("transport", ["websocket", "sse"])
async def test_a_reader_that_stops_pauses_the_upstream(small, hand, transport):
    """At most the window, one batch and the sockets' own buffers are held; then the engine is asked for nothing.

    Reading on, the client gets every event, in order and once.

    Source: guarantees, "Slow consumer"; WebSocket mode guide, "Backpressure".
    """
    raw = stingy_connection(small)
    if transport == "websocket":
        async with small.connect(sock=raw, max_queue=1) as socket:
            await socket.create()
            turn = await hand.next_turn()
            push(turn)
            held = await paused(turn)
            assert held < WINDOW_BYTES + BATCH_BYTES + OUTSIDE_BYTES
            async with small.connect() as other:
                await other.create()
                (await hand.next_turn()).answer("Unaffected.")
                assert (await other.rest())[-1]["type"] == "response.completed"
            events = await socket.rest()
    else:
        reader, writer = await asyncio.open_connection(sock=raw, limit=4096)
        with closing(writer):
            body = json.dumps({"model": "m", "input": "x", "stream": True}).encode()
            writer.write(b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            turn = await hand.next_turn()
            push(turn)
            held = await paused(turn)
            assert held < WINDOW_BYTES + BATCH_BYTES + OUTSIDE_BYTES
            events = await read_chunked_events(reader)
    deltas = [event["delta"][:8] for event in events if event["type"] == "response.output_text.delta"]
    assert deltas == [f"{number:08d}" for number in range(BATCHES)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "response.completed"


async def read_chunked_events(reader):
    """The events of a chunked event stream."""
    await reader.readuntil(b"\r\n\r\n")
    chunks = []
    while size := int(await reader.readline(), 16):
        chunks.append(await reader.readexactly(size))
        await reader.readexactly(2)
    return read_sse(b"".join(chunks))


async def test_the_lanes_of_a_connection_share_its_window(small, hand):
    """Four lanes hold no more than one does: the bound is the connection's.

    Source: WebSocket mode guide, "Backpressure": other lanes share the pipe.
    """
    async with small.connect(sock=stingy_connection(small), max_queue=1) as socket:
        turns = []
        for lane in range(4):
            await socket.create(stream_id=f"lane-{lane}")
            turns.append(await hand.next_turn())
        for turn in turns:
            push(turn)
        held = sum(await asyncio.gather(*(paused(turn) for turn in turns)))
        # A writer that wakes brings one batch past the window, and a reader that wakes one past the transport's buffer.
        assert held < WINDOW_BYTES + 2 * len(turns) * BATCH_BYTES + OUTSIDE_BYTES
        socket.connection.transport.abort()


async def test_a_reader_that_stopped_and_goes_stops_its_turn(small, hand):
    """A turn that waits for its slow reader ends when that reader goes."""
    async with small.connect(sock=stingy_connection(small), max_queue=1) as socket:
        await socket.create()
        turn = await hand.next_turn()
        push(turn)
        await paused(turn)
        socket.connection.transport.abort()
        await asyncio.wait_for(turn.closed.wait(), 1)
    await small.idle()


async def test_a_plain_post_holds_the_response_and_not_its_events(small, hand):
    """A create that does not stream is never paused by its own unread events: nobody is to read them."""
    posting = asyncio.ensure_future(small.post())
    push(await hand.next_turn())
    response = (await posting).json
    assert len(response["output"][0]["content"][0]["text"]) == BATCHES * BATCH_BYTES
