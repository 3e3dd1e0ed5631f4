"""The HTTP shell of a create: the same turn, read as server-sent events or as one JSON answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import msgspec

from openline.protocol.errors import ProtocolError
from openline.protocol.events import read_http_create
from openline.server.asgi import ClientGone, Receive, Send, answer_headers, read_body, send_error, send_json, until_gone
from openline.server.event_stream import send_event_stream
from openline.turns.bind import TurnRequest
from openline.turns.log import LogReader, ReaderLagged, Window
from openline.turns.registry import Registry
from openline.turns.turn import Turn

_HEADER_NAME: Final = re.compile(r"[\w.:/-]{1,64}\Z", re.ASCII)
_DROPPED_NAMED_MAX: Final = 32


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
            answering = _answer(turn, reader, send, request_id)
            await until_gone(receive, answering)
    except ProtocolError as error:
        await send_error(send, error, request_id)
    except ClientGone:
        return


async def _answer(turn: Turn, reader: LogReader, send: Send, request_id: str) -> None:
    if turn.request.streams:
        await send_event_stream(send, reader.read, request_id, lambda: _dropped_tools(turn), may_be_refused=True)
    elif turn.request.in_background:
        await _send_queued(turn, reader, send, request_id)
    else:
        await _send_answer(turn, reader, send, request_id)


async def _send_queued(turn: Turn, reader: LogReader, send: Send, request_id: str) -> None:
    """The response as it was created: it goes on without its client."""
    with suppress(ReaderLagged):  # what it has written since may be more than is kept
        await reader.read()
    assert turn.writer is not None, "a turn that was not refused is being written"
    queued = msgspec.json.encode(turn.writer.builder.queued)
    await send_json(send, 200, queued, answer_headers(request_id, _dropped_tools(turn)))


async def _send_answer(turn: Turn, reader: LogReader, send: Send, request_id: str) -> None:
    while await reader.read():
        pass  # the fold's last value is all that this client wants
    response = turn.log.response
    assert response is not None, "a turn that was not refused ends with its response"
    await send_json(send, 200, msgspec.json.encode(response), answer_headers(request_id, _dropped_tools(turn)))


def _dropped_tools(turn: Turn) -> Sequence[tuple[bytes, bytes]]:
    # Types come from the client: what cannot stand in a header is told as `?`.
    dropped = turn.log.dropped_tools[:_DROPPED_NAMED_MAX]
    names = ",".join(name if _HEADER_NAME.match(name) else "?" for name in dropped)
    return [(b"openline-dropped-tools", names.encode("ascii"))] if names else ()
