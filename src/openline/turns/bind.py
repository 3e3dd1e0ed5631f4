"""A create bound to what it refers to: its parent, its whole context, its engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Literal

import msgspec

from openline.config import ResumeSettings
from openline.engines.engine import Engine, EngineRequest, Generation
from openline.engines.router import Router
from openline.observe import Hook
from openline.protocol.errors import ProtocolError
from openline.protocol.events import Create, read_input
from openline.protocol.fold import Event
from openline.protocol.response import opening_response
from openline.protocol.steering import Steered
from openline.state.cache import Anchor, ConnectionCache
from openline.state.context import EMPTY, ContextNode
from openline.state.conversation import conversation_node, find_anchor
from openline.state.sealed_items import opened
from openline.state.sealing import Seal
from openline.state.store import Store, StoreUnavailable, store_unavailable
from openline.turns.references import resolved

COMPACTION_TRIGGER: Final = "compaction_trigger"


class Parts(msgspec.Struct, frozen=True):
    """What every turn works with.

    Attributes:
        unix_time: the wall clock, in seconds, for `created_at`.
        new_id: makes an unguessable id with a prefix.
        created_wait_seconds_max: how long `response.created` may wait for the upstream's acceptance.
        keepalive_seconds: after so long without an event a turn says that it still runs.
        resume: what of a turn is kept for those who come back.
        seal: closes what clients hold for us.
    """

    router: Router
    store: Store
    hook: Hook
    unix_time: Callable[[], float]
    new_id: Callable[[str], str]
    created_wait_seconds_max: float
    keepalive_seconds: float
    resume: ResumeSettings
    seal: Seal


class TurnRequest(msgspec.Struct, frozen=True):
    """A create that may start.

    Attributes:
        body: its JSON, as it came.
        cache: its connection's memory; None over HTTP.
        stream_id: its lane; None is the default lane.
        transport: how the client reads the turn.
        steers: steered into its parent, and now before its own input.
        is_successor: it goes on by itself with them, and no create of the client's stands for it.
    """

    owner: str
    create: Create
    body: str | bytes
    request_id: str
    transport: Literal["websocket", "sse", "json"]
    cache: ConnectionCache | None = None
    stream_id: str | None = None
    steers: tuple[Steered, ...] = ()
    is_successor: bool = False

    @property
    def streams(self) -> bool:
        """Whether its client reads events."""
        return self.transport != "json"

    @property
    def in_background(self) -> bool:
        """Whether it goes on without its client.

        Source: Background mode guide.
        """
        return self.create.background is True

    @property
    def key(self) -> str | None:
        """Its idempotency key, by which its client can come back to it. A successor has none.

        Source: docs/adr/0009.
        """
        return None if self.is_successor else self.create.idempotency_key

    @property
    def keeps_events(self) -> bool:
        """Whether its events can be read again, from the store too."""
        return self.key is not None or (self.in_background and self.streams)


class Bound(msgspec.Struct, frozen=True):
    """A request whose parent, model and engine have been found.

    Attributes:
        before: everything up to the request's own input.
        context: the same with it.
        model: the name the client knows it by.
        request: as its engine gets it.
        response: as it opens.
        sums_up: whether all that is asked for is a summary.
    """

    before: ContextNode
    context: ContextNode
    parent: Anchor | None
    model: str
    engine: Engine
    request: EngineRequest
    generation: Generation
    response: Event
    sums_up: bool

    @property
    def upstream(self) -> str:
        """The engine's name."""
        return self.engine.name


class Found(msgspec.Struct, frozen=True):
    """What a create refers to.

    Attributes:
        before: everything up to the request's own input.
        context: the same with it.
        model: the name the client knows it by.
        request: as its engine gets it.
        sums_up: whether all that is asked for is a summary.
    """

    before: ContextNode
    context: ContextNode
    parent: Anchor | None
    model: str
    engine: Engine
    request: EngineRequest
    sums_up: bool


async def bind(request: TurnRequest, response_id: str, parts: Parts) -> Bound:
    """Find what the create refers to, when its turn starts and not when its frame came.

    Args:
        response_id: of the response that it becomes.

    Raises:
        ProtocolError: it refers to what is not there, or asks for what its engine cannot do.
    """
    found = await find(request, parts)
    response = opening_response(
        request.create, response_id=response_id, model=found.model, created_at=int(parts.unix_time())
    )
    generation = found.engine.prepare(found.request)
    return Bound(
        found.before,
        found.context,
        found.parent,
        found.model,
        found.engine,
        found.request,
        generation,
        response,
        found.sums_up,
    )


async def find(request: TurnRequest, parts: Parts) -> Found:
    """Find a create's parent, its whole context, its model and its engine.

    Raises:
        ProtocolError: one of them is not there.
    """
    create = request.create
    steered = [item for steer in request.steers for item in steer.items]
    try:
        parent = await _find_parent(request, parts)
        before = await _before(request, parent, parts)
        items = await resolved(read_input(create), before, request.owner, parts.store)
    except StoreUnavailable as error:
        raise store_unavailable(error) from None
    sums_up = create.generates and any(item.type == COMPACTION_TRIGGER for item in items)
    items = opened((item for item in items if item.type != COMPACTION_TRIGGER), request.owner, parts.seal)
    context = before.extend([*steered, *items])
    context.open_calls.require_none()
    if context.depth == 0 and create.generates and (sums_up or not create.instructions):
        raise ProtocolError("missing_required_parameter", "'input' is missing: expected text or items.", param="input")
    model = create.model or (parent.model if parent else None)
    if not model:
        raise ProtocolError("missing_required_parameter", "'model' is missing: expected a model's name.", param="model")
    engine, upstream_model = parts.router.route(model)
    engine_request = EngineRequest(create, request.body, context, upstream_model, request.owner)
    return Found(before, context, parent, model, engine, engine_request, sums_up)


async def _find_parent(request: TurnRequest, parts: Parts) -> Anchor | None:
    response_id = request.create.previous_response_id
    if response_id is None:
        return None
    return await find_anchor(request.owner, response_id, request.cache, parts.store, parts.seal, now=parts.unix_time())


async def _before(request: TurnRequest, parent: Anchor | None, parts: Parts) -> ContextNode:
    """What stands before the request's own input."""
    conversation_id = request.create.conversation_id
    if conversation_id is not None:
        now = parts.unix_time()
        return await conversation_node(request.owner, conversation_id, parts.store, parts.seal, now=now)
    return parent.node if parent else EMPTY
