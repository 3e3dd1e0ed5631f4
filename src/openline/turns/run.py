"""One turn, as a sentence: bind its parent, run the engine, build, write, keep, announce."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any, Final, Literal

import msgspec

from openline.engines.engine import EngineRequest, Generation
from openline.engines.router import Router
from openline.observe import Hook, TurnDetails
from openline.protocol.builder import Builder
from openline.protocol.deltas import Delta, Ended, Usage
from openline.protocol.errors import ProtocolError
from openline.protocol.events import Create, read_input
from openline.protocol.fold import Event
from openline.protocol.items import item_of
from openline.protocol.response import opening_response
from openline.protocol.states import IllegalTransition
from openline.state.cache import Anchor, ConnectionCache
from openline.state.conversation import EMPTY, ContextNode, find_anchor
from openline.state.store import Store, StoredTurn, StoreUnavailable
from openline.turns.log import TurnLog

_log: Final = logging.getLogger("openline.turns")
_encoder: Final = msgspec.json.Encoder()


def _now() -> float:
    return asyncio.get_running_loop().time()


class Parts(msgspec.Struct, frozen=True):
    """What every turn works with.

    Attributes:
        unix_time: the wall clock, in seconds, for `created_at`.
        new_id: makes an unguessable id with a prefix.
        created_wait_seconds_max: how long `response.created` may wait for the upstream's acceptance.
    """

    router: Router
    store: Store
    hook: Hook
    unix_time: Callable[[], float]
    new_id: Callable[[str], str]
    created_wait_seconds_max: float


class TurnRequest(msgspec.Struct, frozen=True):
    """A create that may start.

    Attributes:
        body: its JSON, as it came.
        cache: its connection's memory; None over HTTP.
        stream_id: its lane; None is the default lane.
        transport: how the client reads the turn.
    """

    owner: str
    create: Create
    body: str | bytes
    request_id: str
    transport: Literal["websocket", "sse", "json"]
    cache: ConnectionCache | None = None
    stream_id: str | None = None


class _Bound(msgspec.Struct):
    """A request whose parent, model and engine have been found."""

    context: ContextNode
    parent: Anchor | None
    model: str
    upstream: str
    generation: Generation
    response: Event


class _Writer:
    """Builds a turn's events and writes them into its log."""

    def __init__(self, log: TurnLog, builder: Builder) -> None:
        self.log = log
        self.builder = builder
        self.opened_at: float | None = None

    def open(self) -> None:
        """`response.created` and `response.in_progress`, once."""
        if self.opened_at is None:
            self.opened_at = _now()
            self.log.append([_encoder.encode(event) for event in self.builder.open()])

    async def write(self, deltas: Sequence[Delta]) -> None:
        """The events of one read from the upstream, in one write; waits while the client is its window behind."""
        self.open()
        if deltas:
            self.log.append([_encoder.encode(event) for event in self.builder.apply(deltas)])
            await self.log.writable()

    def end(self, response: Event) -> None:
        """The terminal event, with the response that has been kept."""
        self.open()
        self.log.append([_encoder.encode(event) for event in self.builder.announce(response)], last=response)


async def run_turn(request: TurnRequest, log: TurnLog, parts: Parts) -> None:
    """Run one create from its parent to its terminal event, or to its refusal.

    Cancelling it ends the response as incomplete, reason `cancelled`, and keeps what
    there is of it.
    """
    started_at = _now()
    bound: _Bound | None = None
    writer: _Writer | None = None
    error: ProtocolError | None = None
    try:
        bound = await _bind(request, parts)
        log.dropped_tools = bound.generation.dropped_tools
        writer = _Writer(log, Builder(bound.response, parts.new_id))
        await _generate(request, bound, writer, parts)
    except asyncio.CancelledError:
        if writer is not None:
            writer.builder.apply([Ended("cancelled")])
    except ProtocolError as refused_or_failed:
        error = refused_or_failed
    except Exception:  # noqa: BLE001 - a defect ends its turn with an error, never in silence
        _log.exception("turn failed, request=%s", request.request_id)
        error = ProtocolError(
            "internal_error", f"The server failed. Its log has more under request {request.request_id}."
        )
    if bound is not None and writer is not None and not _is_refusal(request, writer, error):
        error = await _keep_and_announce(request, bound, writer, error, parts)
    else:
        _evict_failed_parent(request)
        log.refuse(error or ProtocolError("internal_error", "The turn was cancelled before it started."))
    parts.hook.turn_ended(_details(request, log, bound, writer, error, started_at))
    if bound is not None and error is None and bound.generation.prefills:
        await _prefill(bound)


async def _bind(request: TurnRequest, parts: Parts) -> _Bound:
    """Find what the create refers to, when its turn starts and not when its frame came."""
    create = request.create
    parent = None
    if create.previous_response_id is not None:
        parent = await _find_parent(request, create.previous_response_id, parts.store)
    context = (parent.node if parent else EMPTY).extend(read_input(create))
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
    return _Bound(context, parent, model, engine.name, generation, response)


async def _find_parent(request: TurnRequest, response_id: str, store: Store) -> Anchor:
    try:
        return await find_anchor(request.owner, response_id, request.cache, store)
    except StoreUnavailable as error:
        raise _store_unavailable(error) from None


async def _generate(request: TurnRequest, bound: _Bound, writer: _Writer, parts: Parts) -> None:
    if not request.create.generates:
        await writer.write([Usage(), Ended()])
        return
    # Clients must not wait for a long prefill in silence; but as long as nothing was
    # sent, a refusal can still have its real status.
    wait = parts.created_wait_seconds_max
    opening = asyncio.get_running_loop().call_later(wait, writer.open) if request.transport != "json" else None
    try:
        async with aclosing(bound.generation.stream()) as batches:
            async for deltas in batches:
                await writer.write(deltas)
    except IllegalTransition as broken:
        _log.warning("upstream %s broke the protocol: %s", bound.upstream, broken)
        message = f"Upstream '{bound.upstream}' sent an event that cannot stand where it came."
        raise ProtocolError("upstream_error", message) from None
    finally:
        if opening is not None:
            opening.cancel()
    if writer.builder.ended is None:
        raise ProtocolError("upstream_error", f"Upstream '{bound.upstream}' ended its answer before it was finished.")


async def _prefill(bound: _Bound) -> None:
    """Let the upstream read a warm-up's prefix, so that the next turn finds it in its cache; nobody waits for this.

    Source: WebSocket mode guide, "Warm-up".
    """
    try:
        async with aclosing(bound.generation.stream()) as batches:
            async for _ in batches:
                pass
    except ProtocolError as error:
        _log.info("the prefix of %s was not prefilled: %s", bound.response["id"], error.message)


def _is_refusal(request: TurnRequest, writer: _Writer, error: ProtocolError | None) -> bool:
    """Before `response.created` a turn is refused, after it it fails; a plain JSON answer has shown nothing yet."""
    return error is not None and (writer.opened_at is None or request.transport == "json")


async def _keep_and_announce(
    request: TurnRequest, bound: _Bound, writer: _Writer, error: ProtocolError | None, parts: Parts
) -> ProtocolError | None:
    """Keep the response, then let its terminal event be read: a client may chain from it at once."""
    writer.log.closing = True
    builder = writer.builder
    response = builder.final(int(parts.unix_time())) if error is None else builder.failed(error)
    if request.create.stores:
        try:
            await parts.store.put(request.owner, _row(bound, response))
        except StoreUnavailable as unavailable:
            error = _store_unavailable(unavailable)
            response = builder.failed(error)
    if error is not None:
        _evict_failed_parent(request)
    elif request.cache is not None:
        stored = request.create.stores and _is_chainable(bound)
        node = bound.context.extend([item_of(item) for item in response["output"]])
        request.cache.keep(request.owner, request.stream_id, Anchor(response["id"], node, bound.model, stored))
    if error is not None and _is_refusal(request, writer, error):
        writer.log.refuse(error)
    else:
        writer.end(response)
    return error


def _row(bound: _Bound, response: Event) -> StoredTurn:
    return StoredTurn(
        response_id=response["id"],
        parent_id=bound.parent.response_id if bound.parent else None,
        created_at=response["created_at"],
        status=response["status"],
        chainable=response["status"] != "failed" and _is_chainable(bound),
        input=b"[" + b",".join(item.raw for item in _own_input(bound)) + b"]",
        response=_encoder.encode(response),
    )


def _own_input(bound: _Bound) -> Sequence[Any]:
    is_new = bound.parent is None or bound.context is not bound.parent.node
    return bound.context.own_items if is_new else ()


def _is_chainable(bound: _Bound) -> bool:
    # Nothing unstored is written by the back door, so a stored child of an unstored
    # ancestor cannot be continued outside its connection.
    return bound.parent is None or bound.parent.stored


def _evict_failed_parent(request: TurnRequest) -> None:
    if request.cache is not None:
        request.cache.evict_failed(request.owner, request.stream_id, request.create.previous_response_id)


def _store_unavailable(error: StoreUnavailable) -> ProtocolError:
    return ProtocolError("store_unavailable", f"The store cannot be used now: {error}.", headers={"retry-after": "1"})


def _details(
    request: TurnRequest,
    log: TurnLog,
    bound: _Bound | None,
    writer: _Writer | None,
    error: ProtocolError | None,
    started_at: float,
) -> TurnDetails:
    response = log.response or {}
    opened_at = writer.opened_at if writer else None
    return TurnDetails(
        request_id=request.request_id,
        owner=request.owner,
        transport=request.transport,
        model=bound.model if bound else request.create.model or "",
        upstream=bound.upstream if bound else "",
        response_id=response.get("id", ""),
        status=response.get("status", "refused"),
        error_code=error.code if error else None,
        seconds=_now() - started_at,
        first_event_seconds=opened_at - started_at if opened_at is not None else None,
        events=len(log),
        usage=response.get("usage"),
    )
