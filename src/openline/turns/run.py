"""One turn, as a sentence: bind its parent, run the engine, build, write, keep, announce."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Generator
from contextlib import aclosing, contextmanager
from functools import partial
from typing import Final

import msgspec

from openline.observe import TurnDetails
from openline.protocol.builder import Builder
from openline.protocol.deltas import Ended, UpstreamEvent, Usage
from openline.protocol.errors import ProtocolError, request_cancelled
from openline.protocol.ids import output_item_ids
from openline.protocol.items import item_of
from openline.protocol.states import IllegalTransition
from openline.state.sealed_items import COMPACTION, compaction_item, opened, sealed_reasoning
from openline.state.store import KeyTaken
from openline.turns.bind import Bound, Parts, TurnRequest, bind
from openline.turns.compact import is_due, summed_up
from openline.turns.keep import begin, keep, keep_failed, let_go, own_input
from openline.turns.log import TurnLog
from openline.turns.replay import replayed
from openline.turns.truncate import without_oldest
from openline.turns.turn import Turn
from openline.turns.writer import Writer

_COMPACTION_AT: Final = -1  # no upstream's own index
_log: Final = logging.getLogger("openline.turns")


def _now() -> float:
    return asyncio.get_running_loop().time()


async def run_turn(turn: Turn, parts: Parts) -> None:
    """Run one create from its parent to its terminal event, or to its refusal; what its key stands for is given again.

    Cancelling it ends the response as incomplete, for the reason that `Turn.stop` was given, and keeps
    what there is of it.
    """
    while turn.key is None or not await _is_kept(turn, parts):
        try:
            return await _run(turn, parts)
        except KeyTaken:  # by another process, a moment ago
            turn.writer = None
    return None


async def _is_kept(turn: Turn, parts: Parts) -> bool:
    """Whether the store had what a key stands for, and it was given again; or nothing can come of this create."""
    started_at = _now()
    try:
        return await replayed(turn, parts)
    except asyncio.CancelledError:
        error = request_cancelled()
    except ProtocolError as refused:
        error = refused
    except Exception:  # noqa: BLE001 - as in `_run`
        error = _defect(turn.request)
    turn.log.refuse(error)
    parts.hook.turn_ended(_details(turn, None, None, error, started_at))
    return True


async def _run(turn: Turn, parts: Parts) -> None:
    """The turn itself.

    Raises:
        KeyTaken: another process runs it; nothing was begun.
    """
    request, log = turn.request, turn.log
    started_at = _now()
    bound: Bound | None = None
    writer: Writer | None = None
    error: ProtocolError | None = None
    try:
        bound = await bind(request, turn.id, parts)
        log.dropped_tools = bound.generation.dropped_tools
        writer = turn.writer = _writer(request, log, bound, parts)
        await _begin(turn, bound, writer, parts)
        with _opened_in_time(request, writer, parts):
            bound = await _summed_up(request, bound, writer, parts)
            await _generate(request, bound, writer)
    except asyncio.CancelledError:
        if writer is not None and writer.builder.ended is None:
            writer.builder.apply([Ended(turn.stop_reason)])
    except KeyTaken:
        raise
    except ProtocolError as refused_or_failed:
        error = refused_or_failed
    except Exception:  # noqa: BLE001 - whatever it is, the turn must end
        error = _defect(request)
    if bound is None or writer is None or not _began(turn) or (error is not None and _shows_nothing(turn, writer)):
        error = await _refuse(turn, error, parts)
    else:
        error = await _keep_and_announce(turn, bound, writer, error, parts)
    parts.hook.turn_ended(_details(turn, bound, writer, error, started_at))
    if bound is not None and not turn.stopped and _is_warm(request, log) and bound.generation.prefills:
        await _prefill(bound)


async def _begin(turn: Turn, bound: Bound, writer: Writer, parts: Parts) -> None:
    """What its client may come back to stands in the store before anybody learns of it."""
    if turn.log.is_kept:
        turn.own_input = [item.wire for item in own_input(bound)]
        await begin(turn, bound, parts)
    if turn.request.in_background:
        writer.open()


def _began(turn: Turn) -> bool:
    """Whether the row stands that a turn is to have before anybody learns of it; it may have been stopped before."""
    return turn.is_claimed or not (turn.log.is_kept and turn.request.create.stores)


async def _refuse(turn: Turn, error: ProtocolError | None, parts: Parts) -> ProtocolError:
    turn.log.closing = True
    if error is not None and not turn.request.is_successor:
        turn.evict_failed_parent()
    await let_go(turn, parts)
    error = error or request_cancelled()
    turn.log.refuse(error)
    return error


def _writer(request: TurnRequest, log: TurnLog, bound: Bound, parts: Parts) -> Writer:
    create = request.create
    seal = partial(sealed_reasoning, owner=request.owner, seal=parts.seal) if create.wants_sealed_reasoning else None
    builder = Builder(bound.response, output_item_ids(bound.response["id"]), timings=create.wants_timings, seal=seal)
    may_be_read = request.streams or request.key is not None
    return Writer(log, builder, parts.keepalive_seconds if may_be_read else None)


@contextmanager
def _opened_in_time(request: TurnRequest, writer: Writer, parts: Parts) -> Generator[None]:
    """`response.created` leaves after a while: clients must not wait for a long prefill in silence.

    As long as nothing was sent, a refusal can still have its real status.
    """
    wait = parts.created_wait_seconds_max
    opening = asyncio.get_running_loop().call_later(wait, writer.open) if request.transport != "json" else None
    try:
        yield
    finally:
        if opening is not None:
            opening.cancel()


async def _summed_up(request: TurnRequest, bound: Bound, writer: Writer, parts: Parts) -> Bound:
    """The request with its conversation summed up, if that is asked for or its time has come.

    What follows in the output stands behind the summary; the user's last messages stay as they are for this turn.
    `usage` tells of the summary only where nothing follows: by it clients judge how long their conversation is.

    Source: Streaming reference, "Compaction".
    """
    if not bound.sums_up and not await is_due(bound.engine, bound.request, bound.context):
        return bound
    writer.open()
    added = {
        "type": "response.output_item.added",
        "output_index": _COMPACTION_AT,
        "item": {"type": COMPACTION, "encrypted_content": ""},
    }
    compacting = {"type": "response.compaction.compacting", "output_index": _COMPACTION_AT, "item_id": ""}
    await writer.write([UpstreamEvent(added), UpstreamEvent(compacting)])
    summary = await summed_up(bound)
    item = compaction_item(summary.text, request.owner, parts.seal)
    done = {"type": "response.output_item.done", "output_index": _COMPACTION_AT, "item": item}
    if bound.sums_up:
        end = {"type": "response.completed", "response": {"usage": summary.usage}}
        await writer.write([UpstreamEvent(done), UpstreamEvent(end)])
        return bound
    await writer.write([UpstreamEvent(done)])
    context = bound.context.summed_up(opened([item_of(item)], request.owner, parts.seal))
    engine_request = msgspec.structs.replace(bound.request, context=context)
    generation = bound.engine.prepare(engine_request)
    return msgspec.structs.replace(bound, request=engine_request, generation=generation)


async def _generate(request: TurnRequest, bound: Bound, writer: Writer) -> None:
    if writer.builder.ended is not None:
        return
    if not request.create.generates:
        await writer.write([Usage(), Ended()])
        return
    try:
        await _stream(bound, writer)
    except IllegalTransition as broken:
        _log.warning("upstream %s broke the protocol: %s", bound.upstream, broken)
        message = f"Upstream '{bound.upstream}' sent an event that cannot stand where it came."
        raise ProtocolError("upstream_error", message) from None
    if writer.builder.ended is None:
        raise ProtocolError("upstream_error", f"Upstream '{bound.upstream}' ended its answer before it was finished.")


async def _stream(bound: Bound, writer: Writer) -> None:
    """What the engine generates; of a context that is too long for it and may be truncated, without the oldest turns.

    Source: Responses API reference, "truncation".
    """
    items = len(writer.builder.fold.items)
    request, generation = bound.request, bound.generation
    while True:
        try:
            async with aclosing(generation.stream()) as batches:
                async for deltas in batches:
                    await writer.write(deltas)
                    if writer.builder.yielded:
                        break
            return
        except ProtocolError as error:
            is_too_long = error.code == "context_length_exceeded" and len(writer.builder.fold.items) == items
            context = without_oldest(request.context) if is_too_long and request.create.truncation == "auto" else None
            if context is None:
                raise
        _log.info("%s does not fit its model: %d items are left of it", bound.response["id"], context.depth)
        request = msgspec.structs.replace(request, context=context)
        generation = bound.engine.prepare(request)


def _is_warm(request: TurnRequest, log: TurnLog) -> bool:
    # Over HTTP nobody would stop the prefill when its client is gone.
    return (
        not request.create.generates and request.cache is not None and (log.response or {}).get("status") == "completed"
    )


async def _prefill(bound: Bound) -> None:
    """Let the upstream read a warm-up's prefix, so that the next turn finds it in its cache; nobody waits for this.

    Source: WebSocket mode guide, "Warm-up".
    """
    try:
        async with aclosing(bound.generation.stream()) as batches:
            async for _ in batches:
                pass
    except ProtocolError as error:
        _log.info("the prefix of %s was not prefilled: %s", bound.response["id"], error.message)


def _shows_nothing(turn: Turn, writer: Writer) -> bool:
    """Whether an error can still be a refusal: before `response.created`, and for a plain JSON answer to its end."""
    return writer.opened_at is None or not turn.is_shown


async def _keep_and_announce(
    turn: Turn, bound: Bound, writer: Writer, error: ProtocolError | None, parts: Parts
) -> ProtocolError | None:
    """Keep the response, then let its terminal event be read: a client may chain from it at once."""
    writer.log.closing = True
    builder = writer.builder
    response = builder.final(int(parts.unix_time())) if error is None else builder.failed(error)
    if turn.log.is_kept:
        writer.append(builder.take())  # so that they are kept as well
    try:
        response = await keep(turn, bound, response, parts)
    except ProtocolError as unkept:
        error = unkept
    except Exception:  # noqa: BLE001 - as in `_run`
        error = _defect(turn.request)
    if error is not None:
        turn.evict_failed_parent()
        response = builder.failed(error)
    if error is not None and _shows_nothing(turn, writer):
        await let_go(turn, parts)
        writer.log.refuse(error)
    else:
        if error is not None:
            await keep_failed(turn, bound, response, error, parts)
        turn.error = error
        writer.end(response)
    return error


def _defect(request: TurnRequest) -> ProtocolError:
    """A defect ends its turn with an error, never in silence; the log has its traceback."""
    _log.exception("turn failed, request=%s", request.request_id)
    return ProtocolError("internal_error", f"The server failed. Its log has more under request {request.request_id}.")


def _details(
    turn: Turn, bound: Bound | None, writer: Writer | None, error: ProtocolError | None, started_at: float
) -> TurnDetails:
    request, log = turn.request, turn.log
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
