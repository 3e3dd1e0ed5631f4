"""A socket that is watched: what holds for every event of every lane, checked over all that came."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from openline.protocol.deltas import CallDelta, CallStarted, Delta, ReasoningDelta, TextDelta
from openline.protocol.states import TERMINAL_EVENTS
from server.hand import Hand, HandTurn
from server.running import Running, Socket

Frame = dict[str, Any]

# The last event that a delta makes, while its item is open.
_LAST = {
    TextDelta: "response.output_text.delta",
    ReasoningDelta: "response.reasoning_text.delta",
    CallStarted: "response.output_item.added",
    CallDelta: "response.function_call_arguments.delta",
}


class Watched(Socket):
    """Keeps every message that was received."""

    def __init__(self, socket: Socket) -> None:
        super().__init__(socket.connection)
        self.frames: list[Frame] = []

    async def receive(self) -> Frame:
        frame = await super().receive()
        self.frames.append(frame)
        return frame

    async def steer(self, response: Frame, said: Any = "Shorter.") -> None:
        """Steer a response."""
        await self.send(type="response.steer", previous_response_id=response["id"], input=said)

    async def cancel(self, **fields: Any) -> None:
        """Cancel a response, or what the default lane is at."""
        await self.send(type="response.cancel", **fields)

    async def begun(self, hand: Hand, *said: Delta, **create: Any) -> tuple[HandTurn, Frame]:
        """A turn that has said this and goes on, and its response."""
        await self.create(**create)
        turn = await hand.next_turn()
        turn.accept()
        created = (await self.until("response.in_progress"))[0]["response"]
        if said:
            turn.give(*said)
            await self.until(_LAST[type(said[-1])])
        return turn, created

    def burst(self, *messages: Frame) -> None:
        """Send these in one packet, so that the server reads them in one go."""
        self.connection.transport.write(b"".join(_masked(json.dumps(message).encode()) for message in messages))


@asynccontextmanager
async def watched(server: Running, **options: Any) -> AsyncIterator[Watched]:
    """A connection of the server's, checked once the test is done with it."""
    async with server.connect(**options) as socket:
        watching = Watched(socket)
        yield watching
    check(watching.frames)


def _masked(payload: bytes) -> bytes:
    """A client's text message as one frame, with a mask of zeros. Source: RFC 6455 §5.2."""
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
    return b"\x81" + size + bytes(4) + payload


def types(frames: Iterable[Frame]) -> list[str]:
    """Each event's type without the common prefix; an error's code."""
    return [
        frame["error"]["code"] if frame["type"] == "error" else frame["type"].removeprefix("response.")
        for frame in frames
    ]


def check(frames: Iterable[Frame]) -> None:
    """Each response's events carry its lane and count from 0, those of its steering too, also behind its end.

    Between its opening and its end a lane has no other; behind its end only steering events name it.

    Source: WebSocket mode guide, "Server events" and "Steering".
    """
    lanes: dict[str, str | None] = {}
    numbers: dict[str, int] = {}
    running: dict[str | None, str] = {}
    for frame in frames:
        lane = frame.get("stream_id")
        assert "stream_id" not in frame or isinstance(lane, str), frame
        if frame["type"] == "error" or frame["type"].startswith("response.inject."):
            continue
        is_steering = frame["type"].startswith("response.steer.")
        if frame["type"] == "response.created":
            assert lane not in running, frame
            running[lane] = frame["response"]["id"]
            lanes[running[lane]] = lane
        if is_steering and frame.get("error", {}).get("code") == "response_not_found":
            assert (frame["sequence_number"], lane) == (0, None), frame  # of no response, and of no lane
            continue
        target = frame["steer"]["previous_response_id"] if is_steering else running[lane]
        assert lanes[target] == lane, frame
        assert frame["sequence_number"] == numbers.get(target, 0), frame
        numbers[target] = frame["sequence_number"] + 1
        assert frame.get("response", {}).get("id", target) == target, frame
        if frame["type"] in TERMINAL_EVENTS:
            del running[lane]
