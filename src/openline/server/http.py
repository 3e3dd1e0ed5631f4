"""The HTTP shell of a create: the same turn, read as server-sent events or as one JSON answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Final

import msgspec

from openline.protocol import sse
from openline.protocol.errors import ProtocolError
from openline.protocol.events import read_http_create
from openline.server.asgi import ClientGone, Receive, Send, answer_headers, read_body, send_error, send_json
from openline.turns.bind import TurnRequest
from openline.turns.log import LogReader, Window
from openline.turns.registry import Registry, Turn

# uvicorn waits for a slow client before it takes a piece, not after; behind a piece above its high-water mark an
# empty one waits, so that the log is told of bytes as delivered that have gone.
_HEADER_NAME: Final = re.compile(r"[\w.:/-]{1,64}\Z", re.ASCII)
_DROPPED_NAMED_MAX: Final = 32
_UNDRAINED_BYTES_MAX: Final = 64 * 1024


async def create_response(
    registry: Registry,
    receive: Receive,
    send: Send,
    *,
    owner: str,
    request_id: str,
    content_length: int,
    message_bytes_max: int,
    send_buffer_bytes_max: int,
) -> None:
    """`POST /v1/responses`.

    Source: Responses API reference, "Create a response"; streaming reference, "Server-sent events".
    """
    try:
        body = await read_body(receive, message_bytes_max, declared=content_length)
        create = read_http_create(body)
        streams = bool(create.stream)
        request = TurnRequest(
            owner=owner,
            create=create,
            body=body,
            request_id=request_id,
            transport="sse" if streams else "json",
        )
        turn = registry.start(request, Window(send_buffer_bytes_max))
        with turn.log.deliver() as reader:
            answering = _send_events if streams else _send_answer
            await _until_gone(receive, answering(turn, reader, send, request_id))
    except ProtocolError as error:
        await send_error(send, error, request_id)
    except ClientGone:
        return


async def _until_gone(receive: Receive, answering: Coroutine[object, object, None]) -> None:
    """Answer, unless the client goes first: then nothing is left to read the turn, and it is cancelled."""
    answer = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        gone.cancel()
        if not answer.done():
            answer.cancel()
            await asyncio.wait({answer})
    if not answer.cancelled():
        with suppress(OSError):  # a write to a client that has just gone
            answer.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_answer(turn: Turn, reader: LogReader, send: Send, request_id: str) -> None:
    while await reader.read():
        pass  # the fold's last value is all that this client wants
    response = turn.log.response
    assert response is not None, "a turn that was not refused ends with its response"
    await send_json(send, 200, msgspec.json.encode(response), answer_headers(request_id, _dropped_tools(turn)))


async def _send_events(turn: Turn, reader: LogReader, send: Send, request_id: str) -> None:
    events = await reader.read()  # a refusal is raised here, while its status can still be sent
    headers = [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would hold the stream back
        *_dropped_tools(turn),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": answer_headers(request_id, headers)})
    while events:
        body = b"".join([sse.encode(event) for event in events])
        await send({"type": "http.response.body", "body": body, "more_body": True})
        if len(body) > _UNDRAINED_BYTES_MAX:
            await send({"type": "http.response.body", "body": b"", "more_body": True})
        events = await reader.read()
    await send({"type": "http.response.body", "body": sse.DONE})


def _dropped_tools(turn: Turn) -> Sequence[tuple[bytes, bytes]]:
    # Types come from the client: what cannot stand in a header is told as `?`.
    dropped = turn.log.dropped_tools[:_DROPPED_NAMED_MAX]
    names = ",".join(name if _HEADER_NAME.match(name) else "?" for name in dropped)
    return [(b"openline-dropped-tools", names.encode("ascii"))] if names else ()
