"""What can be asked about a response after its create: fetch it, read its events again, list its input, cancel, delete.

A response that runs in the background or under an idempotency key, or ended a moment ago, is answered from memory, every
other one from the store. What is another owner's is unknown.

Source: Responses API reference, "Get", "Delete", "Cancel", "List input items"; Background mode guide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from openline.protocol.errors import ProtocolError
from openline.protocol.events import SEALED_REASONING
from openline.protocol.fold import Event
from openline.protocol.listed import listed_input
from openline.server.asgi import Receive, Scope, Send, until_gone
from openline.server.event_stream import send_event_stream
from openline.server.guard import Guard
from openline.server.plain import RouteList, json_answer, json_bytes_answer, new_request_id
from openline.server.query import Page, flag, included, page_of, whole_number
from openline.state.sealed_items import sealed_reasoning
from openline.state.sealing import Seal
from openline.state.store import Store, StoredTurn
from openline.turns.leases import cancel_elsewhere
from openline.turns.registry import Registry
from openline.turns.replay import whole_stream
from openline.turns.turn import Turn


class _Kept(msgspec.Struct):
    background: bool = False


_kept: Final = msgspec.json.Decoder(_Kept)
_fields: Final = msgspec.json.Decoder(dict[str, Any])
_raw_items: Final = msgspec.json.Decoder(list[msgspec.Raw])


class StoredResponses:
    """The routes below `/v1/responses/{id}`."""

    def __init__(self, guard: Guard, registry: Registry, store: Store) -> None:
        self._guard = guard
        self._registry = registry
        self._store = store

    def routes(self) -> RouteList:
        """Below `/v1`."""
        return [
            ("GET", "/responses", self.of_key),
            ("GET", "/responses/{response_id}", self.get),
            ("DELETE", "/responses/{response_id}", self.delete),
            ("POST", "/responses/{response_id}/cancel", self.cancel),
            ("GET", "/responses/{response_id}/input_items", self.input_items),
        ]

    async def of_key(self, request: Request) -> Response:
        """`GET /v1/responses?idempotency_key=K`: the response that the key stands for. Without a key there is no list."""
        owner = self._guard.admit(request.headers.raw)
        key = request.query_params.get("idempotency_key")
        if key is None:
            message = "Only POST, a WebSocket upgrade, or a GET with 'idempotency_key', is answered here."
            raise ProtocolError("method_not_allowed", message, headers={"allow": "POST"})
        held = self._registry.held.of_key(owner, key)
        if held is None:
            kept = await self._store.of_key(owner, key)
            if kept is not None:
                return _plain(kept.turn)
        elif held.is_known:
            held.is_shown = True
            return json_answer(held.snapshot())
        raise ProtocolError("not_found", f"No response with the idempotency key '{key[:255]}' was found.")

    async def get(self, request: Request) -> Response:
        """`GET /v1/responses/{id}`: the response as it stands, or its events after `starting_after`."""
        owner, response_id = self._asked(request)
        streams = flag(request.query_params, "stream")
        flag(request.query_params, "include_obfuscation")  # there is none to leave out
        include = included(request.query_params.multi_items())
        after = whole_number(request.query_params, "starting_after")
        if after is not None and not streams:
            message = "'starting_after' is about a stream: expected 'stream=true' beside it."
            raise ProtocolError("invalid_value", message, param="starting_after")
        held = self._registry.held.get(owner, response_id)
        if streams:
            first = 0 if after is None else after + 1
            return _Followed(held, first) if held is not None else await self._replayed(owner, response_id, first)
        if SEALED_REASONING not in include:
            return json_answer(held.snapshot()) if held is not None else _plain(await self._stored(owner, response_id))
        response = held.snapshot() if held else _fields.decode((await self._stored(owner, response_id)).response)
        return json_answer(_sealed(response, owner, self._registry.parts.seal))

    async def delete(self, request: Request) -> Response:
        """`DELETE /v1/responses/{id}`: what runs is stopped first."""
        owner, response_id = self._asked(request)
        held = self._registry.held.get(owner, response_id)
        if held is not None:
            await stopped(held)
        forgotten = self._registry.held.forget(owner, response_id)
        if not (await self._store.delete(owner, response_id) or forgotten):
            raise no_such_response(response_id)
        return json_answer({"id": response_id, "object": "response", "deleted": True})

    async def cancel(self, request: Request) -> Response:
        """`POST /v1/responses/{id}/cancel`: stop a background response; the final one if it has ended already."""
        owner, response_id = self._asked(request)
        held = self._registry.held.get(owner, response_id)
        if held is not None:
            await stopped(held)
            return json_answer(held.snapshot())
        turn = await self._stored(owner, response_id)
        if not _kept.decode(turn.response).background:
            message = "Only a response that was created with 'background' can be cancelled."
            raise ProtocolError("invalid_request", message)
        if turn.lease_until is not None:
            await cancel_elsewhere(self._store, owner, turn)
            turn = await self._stored(owner, response_id)
        return _plain(turn)

    async def input_items(self, request: Request) -> Response:
        """`GET /v1/responses/{id}/input_items`: what the response was asked, a page at a time."""
        owner, response_id = self._asked(request)
        page = page_of(request.query_params)
        included(request.query_params.multi_items())  # items are listed with all that was sent
        held = self._registry.held.get(owner, response_id)
        if held is not None:
            raws: Sequence[bytes | msgspec.Raw] = held.own_input
        else:
            raws = _raw_items.decode((await self._stored(owner, response_id)).input)
        return json_answer(_page(listed_input(raws, response_id), page))

    def _asked(self, request: Request) -> tuple[str, str]:
        return self._guard.admit(request.headers.raw), request.path_params["response_id"]

    async def _stored(self, owner: str, response_id: str) -> StoredTurn:
        turn = await self._store.get(owner, response_id)
        if turn is None:
            raise no_such_response(response_id)
        return turn

    async def _replayed(self, owner: str, response_id: str, first: int) -> Response:
        """The kept events of a response, and the terminal one, which is made of the response itself."""
        turn = await self._stored(owner, response_id)
        if turn.lease_until is not None:
            message = "This response runs in another process of the server: fetch it until it has ended."
            raise ProtocolError("invalid_request", message, param="stream")
        kept = await self._store.events(owner, response_id)
        if kept is None:
            raise _no_events()
        return _Events(whole_stream(turn, kept)[first:])


def no_such_response(response_id: str) -> ProtocolError:
    """The one error for an id that is unknown, another owner's, or was not stored."""
    return ProtocolError("not_found", f"Response with id '{response_id}' not found.")


async def stopped(turn: Turn) -> None:
    """Stop a turn, if it still runs, and wait until its end is kept and the registry knows of it."""
    turn.stop()
    await asyncio.wait({turn.task})


def _no_events() -> ProtocolError:
    created = "'background' and 'stream', or with an idempotency key,"
    message = f"The events of this response are not kept: only those created with {created} are."
    return ProtocolError("invalid_request", message, param="stream")


def _sealed(response: Event, owner: str, seal: Seal) -> Event:
    """A response with its reasoning's content sealed beside it, where that was not done when it was made."""
    output = [
        sealed_reasoning(item, owner, seal) if item["type"] == "reasoning" and "encrypted_content" not in item else item
        for item in response["output"]
    ]
    return {**response, "output": output}


def _plain(turn: StoredTurn) -> Response:
    return json_bytes_answer(turn.response)


def _page(items: list[Event], page: Page) -> dict[str, object]:
    """One page of a list.

    Raises:
        ProtocolError: `after` names no item of it.
    """
    if page.order == "desc":
        items.reverse()
    if page.after is not None:
        ids = [item["id"] for item in items]
        if page.after not in ids:
            message = f"'after' is '{page.after[:64]}': expected the id of an item in this list."
            raise ProtocolError("invalid_value", message, param="after")
        items = items[ids.index(page.after) + 1 :]
    shown = items[: page.limit]
    first_id, last_id = (shown[0]["id"], shown[-1]["id"]) if shown else (None, None)
    return item_list(shown, first_id, last_id, has_more=len(items) > page.limit)


def item_list(
    data: Sequence[object], first_id: str | None, last_id: str | None, *, has_more: bool
) -> dict[str, object]:
    """The list object of items.

    Source: Responses API reference, "The input item list".
    """
    return {"object": "list", "data": data, "first_id": first_id, "last_id": last_id, "has_more": has_more}


class _Events(Response):
    """Events that are all there."""

    def __init__(self, events: Sequence[bytes]) -> None:
        super().__init__()
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        del scope, receive
        await send_event_stream(send, self._read, new_request_id())

    async def _read(self) -> Sequence[bytes]:
        events, self._events = self._events, ()
        return events


class _Followed(Response):
    """A turn's events from a place on, as they come."""

    def __init__(self, turn: Turn, first: int) -> None:
        super().__init__()
        if not turn.request.keeps_events:
            raise _no_events()
        if not turn.log.reaches(first):
            message = f"Events {first} and on of response '{turn.id}' are no longer all kept: fetch the response."
            raise ProtocolError("resume_window_exceeded", message, param="starting_after")
        self._log = turn.log
        self._after = first - 1

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As an ASGI app."""
        del scope
        with self._log.observe(self._after) as reader:
            await until_gone(receive, send_event_stream(send, reader.read, new_request_id()))
