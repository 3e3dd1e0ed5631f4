"""A create bound to what it refers to: its parent, its whole context, its engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec

from openline.engines.engine import EngineRequest, Generation
from openline.engines.router import Router
from openline.observe import Hook
from openline.protocol.errors import ProtocolError
from openline.protocol.events import Create, read_input
from openline.protocol.fold import Event
from openline.protocol.response import opening_response
from openline.protocol.steering import Steered
from openline.state.cache import Anchor, ConnectionCache
from openline.state.context import EMPTY, ContextNode
from openline.state.conversation import find_anchor
from openline.state.store import Store, StoreUnavailable, store_unavailable


class Parts(msgspec.Struct, frozen=True):
    """What every turn works with.

    Attributes:
        unix_time: the wall clock, in seconds, for `created_at`.
        new_id: makes an unguessable id with a prefix.
        created_wait_seconds_max: how long `response.created` may wait for the upstream's acceptance.
        keepalive_seconds: after so long without an event a turn says that it still runs.
    """

    router: Router
    store: Store
    hook: Hook
    unix_time: Callable[[], float]
    new_id: Callable[[str], str]
    created_wait_seconds_max: float
    keepalive_seconds: float


class TurnRequest(msgspec.Struct, frozen=True):
    """A create that may start.

    Attributes:
        body: its JSON, as it came.
        cache: its connection's memory; None over HTTP.
        stream_id: its lane; None is the default lane.
        transport: how the client reads the turn.
        steers: steered into its parent, and now before its own input.
    """

    owner: str
    create: Create
    body: str | bytes
    request_id: str
    transport: Literal["websocket", "sse", "json"]
    cache: ConnectionCache | None = None
    stream_id: str | None = None
    steers: tuple[Steered, ...] = ()


class Bound(msgspec.Struct, frozen=True):
    """A request whose parent, model and engine have been found.

    Attributes:
        context: everything up to and with the request's own input.
        model: the name the client knows it by.
        upstream: the engine's name.
        response: as it opens.
    """

    context: ContextNode
    parent: Anchor | None
    model: str
    upstream: str
    generation: Generation
    response: Event


async def bind(request: TurnRequest, parts: Parts) -> Bound:
    """Find what the create refers to, when its turn starts and not when its frame came.

    Raises:
        ProtocolError: it refers to what is not there, or asks for what its engine cannot do.
    """
    create = request.create
    parent = await _find_parent(request, parts.store)
    steered = [item for steer in request.steers for item in steer.items]
    context = (parent.node if parent else EMPTY).extend([*steered, *read_input(create)])
    context.open_calls.require_none()
    if context.depth == 0 and create.generates and not create.instructions:
        raise ProtocolError("missing_required_parameter", "'input' is missing: expected text or items.", param="input")
    model = create.model or (parent.model if parent else None)
    if not model:
        raise ProtocolError("missing_required_parameter", "'model' is missing: expected a model's name.", param="model")
    engine, upstream_model = parts.router.route(model)
    response = opening_response(
        create, response_id=parts.new_id("resp"), model=model, created_at=int(parts.unix_time())
    )
    generation = engine.prepare(EngineRequest(create, request.body, context, upstream_model))
    return Bound(context, parent, model, engine.name, generation, response)


async def _find_parent(request: TurnRequest, store: Store) -> Anchor | None:
    response_id = request.create.previous_response_id
    if response_id is None:
        return None
    try:
        return await find_anchor(request.owner, response_id, request.cache, store)
    except StoreUnavailable as error:
        raise store_unavailable(error) from None
