"""The HTTP shell of a create: the same turn, read as server-sent events or as one JSON answer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import msgspec

from openline.protocol.errors import ProtocolError, failure_of
from openline.protocol.events import read_http_create
from openline.server.asgi import ClientGone, Receive, Send, answer_headers, read_body, send_error, send_json, until_gone
from openline.server.event_stream import send_event_stream
from openline.turns.attachment import Attachment
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
    idempotency_key: str | None,
    content_length: int,
    message_bytes_max: int,
    send_buffer_bytes_max: int,
) -> None:
    """`POST /v1/responses`.

    Source: Responses API reference, "Create a response"; streaming reference, "Server-sent events".
    """
    try:
        body = await read_body(receive, message_bytes_max, declared=content_length)
        create = read_http_create(body, idempotency_key)
        request = TurnRequest(
            owner=owner,
            create=create,
            body=body,
            request_id=request_id,
            transport="sse" if create.stream else "json",
        )
        attachment = registry.attach(request, Window(send_buffer_bytes_max))
        try:
            await until_gone(receive, _answer(attachment, send, request_id))
        finally:
            attachment.leave()
    except ProtocolError as error:
        await send_error(send, error, request_id)
    except ClientGone:
        return


async def _answer(attachment: Attachment, send: Send, request_id: str) -> None:
    await attachment.admitted()
    turn = attachment.turn
    if attachment.request.streams:
        read = attachment.reader.read
        await send_event_stream(send, read, request_id, lambda: _dropped_tools(turn), may_be_refused=True)
    elif attachment.request.in_background:
        await _send_as_it_stands(attachment, send, request_id)
    else:
        await _send_final(turn, attachment.reader, send, request_id)


async def _send_as_it_stands(attachment: Attachment, send: Send, request_id: str) -> None:
    """The response as it was created, or for a client that comes back as it is now: it goes on without its client."""
    turn = attachment.turn
    with suppress(ReaderLagged):  # what it has written since may be more than is kept
        await attachment.reader.read()
    writer = turn.writer if attachment.is_first else None
    response = writer.builder.queued if writer is not None else turn.snapshot()
    await send_json(send, 200, msgspec.json.encode(response), answer_headers(request_id, _dropped_tools(turn)))


async def _send_final(turn: Turn, reader: LogReader, send: Send, request_id: str) -> None:
    await reader.to_the_end()
    response = turn.log.response
    assert response is not None, "a turn that was not refused ends with its response"
    if response["status"] == "failed":  # of which another client has seen the events; this one gets the real status
        raise turn.error or failure_of(response["error"])
    await send_json(send, 200, msgspec.json.encode(response), answer_headers(request_id, _dropped_tools(turn)))


def _dropped_tools(turn: Turn) -> Sequence[tuple[bytes, bytes]]:
    # Types come from the client: what cannot stand in a header is told as `?`.
    dropped = turn.log.dropped_tools[:_DROPPED_NAMED_MAX]
    names = ",".join(name if _HEADER_NAME.match(name) else "?" for name in dropped)
    return [(b"openline-dropped-tools", names.encode("ascii"))] if names else ()
