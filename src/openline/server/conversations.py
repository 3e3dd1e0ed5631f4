"""Conversations: items that are kept until somebody deletes them, for turns that name the conversation.

Source: Responses API reference, "Conversations", "Conversation items".
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta, Raw
from starlette.requests import Request
from starlette.responses import Response

from openline.protocol.errors import ProtocolError
from openline.protocol.events import Metadata, read_body
from openline.protocol.ids import prefix_of
from openline.protocol.items import REFERENCE, read_item
from openline.protocol.listed import listed_item
from openline.server.guard import Guard
from openline.server.plain import RouteList, body_of, json_answer
from openline.server.query import included, page_of
from openline.server.stored import item_list
from openline.state.conversation import conversation_not_found
from openline.state.store import Appended, Conversation, ConversationItem, NotAppended, NothingIsKept
from openline.turns.bind import Parts
from openline.turns.keep import conversation_item

ITEMS_MAX: Final = 20  # of one request, as at OpenAI
Items = Annotated[list[Raw], Meta(max_length=ITEMS_MAX)]
B = TypeVar("B")


class _Create(msgspec.Struct):
    items: Items | None = None
    metadata: Metadata | None = None


class _Update(msgspec.Struct):
    metadata: Metadata | None


class _Add(msgspec.Struct):
    items: Annotated[list[Raw], Meta(min_length=1, max_length=ITEMS_MAX)]


_create: Final = msgspec.json.Decoder(_Create)
_update: Final = msgspec.json.Decoder(_Update)
_add: Final = msgspec.json.Decoder(_Add)


class Conversations:
    """The routes below `/v1/conversations`.

    Args:
        message_bytes_max: of a body.
    """

    def __init__(self, guard: Guard, parts: Parts, message_bytes_max: int) -> None:
        self._guard = guard
        self._parts = parts
        self._store = parts.store
        self._message_bytes_max = message_bytes_max

    def routes(self) -> RouteList:
        """Below `/v1`."""
        one = "/conversations/{conversation_id}"
        return [
            ("POST", "/conversations", self.create),
            ("GET", one, self.get),
            ("POST", one, self.update),
            ("DELETE", one, self.delete),
            ("GET", f"{one}/items", self.items),
            ("POST", f"{one}/items", self.add),
            ("GET", f"{one}/items/{{item_id}}", self.item),
            ("DELETE", f"{one}/items/{{item_id}}", self.delete_item),
        ]

    async def create(self, request: Request) -> Response:
        """`POST /v1/conversations`."""
        owner = self._guard.admit(request.headers.raw)
        asked = await self._body(request, _create)
        metadata = msgspec.json.encode(asked.metadata or {})
        conversation = Conversation(self._parts.new_id("conv"), self._now(), metadata)
        try:
            await self._store.create_conversation(owner, conversation, self._read(asked.items or []))
        except NothingIsKept as error:  # for ever: nobody should try again, as with a store in trouble
            raise ProtocolError(
                "invalid_request", f"No conversation can be made: the store says that {error}."
            ) from None
        return _shown(conversation)

    async def get(self, request: Request) -> Response:
        """`GET /v1/conversations/{id}`."""
        return _shown(await self._found(*self._asked(request)))

    async def update(self, request: Request) -> Response:
        """`POST /v1/conversations/{id}`: other metadata."""
        owner, conversation_id = self._asked(request)
        asked = await self._body(request, _update)
        metadata = msgspec.json.encode(asked.metadata or {})
        await self._store.set_metadata(owner, conversation_id, metadata, self._now())
        return _shown(await self._found(owner, conversation_id))

    async def delete(self, request: Request) -> Response:
        """`DELETE /v1/conversations/{id}`: its items go too, responses stay."""
        owner, conversation_id = self._asked(request)
        if not await self._store.delete_conversation(owner, conversation_id):
            raise conversation_not_found(conversation_id)
        return json_answer({"id": conversation_id, "object": "conversation.deleted", "deleted": True})

    async def items(self, request: Request) -> Response:
        """`GET /v1/conversations/{id}/items`: a page of its items."""
        owner, conversation_id = self._asked(request)
        limit, order, after = page_of(request.query_params)
        included(request.query_params.multi_items())  # items are listed with all that is kept
        page = await self._store.items(owner, conversation_id, limit=limit, after=after, order=order)
        if page is None:
            await self._found(owner, conversation_id)
            message = f"'after' is '{(after or '')[:64]}': expected the id of an item in this list."
            raise ProtocolError("invalid_value", message, param="after")
        return _list(page.items, has_more=page.has_more)

    async def add(self, request: Request) -> Response:
        """`POST /v1/conversations/{id}/items`: more items at its end."""
        owner, conversation_id = self._asked(request)
        items = self._read((await self._body(request, _add)).items)
        try:
            await self._store.append(owner, Appended(conversation_id, tuple(items), self._now()))
        except NotAppended as error:
            await self._found(owner, conversation_id)
            raise ProtocolError("invalid_request", f"The items were not added: {error}.", param="items") from None
        return _list(items, has_more=False)

    async def item(self, request: Request) -> Response:
        """`GET /v1/conversations/{id}/items/{item_id}`."""
        owner, conversation_id = self._asked(request)
        item_id: str = request.path_params["item_id"]
        item = await self._store.item(owner, conversation_id, item_id)
        if item is None:
            raise _no_such_item(item_id)
        return json_answer(listed_item(item.raw, item.id))

    async def delete_item(self, request: Request) -> Response:
        """`DELETE /v1/conversations/{id}/items/{item_id}`."""
        owner, conversation_id = self._asked(request)
        item_id: str = request.path_params["item_id"]
        if not await self._store.delete_item(owner, conversation_id, item_id):
            raise _no_such_item(item_id)
        return _shown(await self._found(owner, conversation_id))

    def _asked(self, request: Request) -> tuple[str, str]:
        return self._guard.admit(request.headers.raw), request.path_params["conversation_id"]

    async def _found(self, owner: str, conversation_id: str) -> Conversation:
        conversation = await self._store.conversation(owner, conversation_id)
        if conversation is None:
            raise conversation_not_found(conversation_id)
        return conversation

    async def _body(self, request: Request, decoder: msgspec.json.Decoder[B]) -> B:
        body = await body_of(request, self._message_bytes_max)
        return read_body(body or b"{}", decoder)

    def _read(self, raws: list[Raw]) -> list[ConversationItem]:
        items: list[ConversationItem] = []
        for index, raw in enumerate(raws):
            item = read_item(raw, f"items[{index}]")
            if item.type == REFERENCE:
                message = f"'items[{index}]' is a reference: a conversation takes items themselves."
                raise ProtocolError("invalid_value", message, param=f"items[{index}]")
            items.append(conversation_item(item, self._parts.new_id(prefix_of(item.type))))
        return items

    def _now(self) -> int:
        return int(self._parts.unix_time())


def _shown(conversation: Conversation) -> Response:
    shown: dict[str, Any] = {
        "id": conversation.id,
        "object": "conversation",
        "created_at": conversation.created_at,
        "metadata": Raw(conversation.metadata),
    }
    return json_answer(shown)


def _list(items: list[ConversationItem], *, has_more: bool) -> Response:
    first, last = (items[0].id, items[-1].id) if items else (None, None)
    return json_answer(item_list([listed_item(item.raw, item.id) for item in items], first, last, has_more=has_more))


def _no_such_item(item_id: str) -> ProtocolError:
    return ProtocolError("not_found", f"Conversation item with id '{item_id[:256]}' not found.")
