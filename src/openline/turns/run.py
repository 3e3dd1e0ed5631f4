"""One turn, as a sentence: bind its parent, run the engine, build, write, keep, announce."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing
from typing import Final

from openline.observe import TurnDetails
from openline.protocol.builder import Builder
from openline.protocol.deltas import Ended, Usage
from openline.protocol.errors import ProtocolError
from openline.protocol.states import IllegalTransition
from openline.turns.bind import Bound, Parts, TurnRequest, bind
from openline.turns.keep import evict_failed_parent, keep
from openline.turns.log import TurnLog
from openline.turns.turn import Turn
from openline.turns.writer import Writer

_log: Final = logging.getLogger("openline.turns")


def _now() -> float:
    return asyncio.get_running_loop().time()


async def run_turn(turn: Turn, parts: Parts) -> None:
    """Run one create from its parent to its terminal event, or to its refusal.

    Cancelling it ends the response as incomplete, for the reason that `Turn.stop` was given, and keeps
    what there is of it.
    """
    request, log = turn.request, turn.log
    started_at = _now()
    bound: Bound | None = None
    writer: Writer | None = None
    error: ProtocolError | None = None
    try:
        bound = await bind(request, parts)
        log.dropped_tools = bound.generation.dropped_tools
        writer = turn.writer = _writer(request, log, bound, parts)
        await _generate(request, bound, writer, parts)
    except asyncio.CancelledError:
        if writer is not None and writer.builder.ended is None:
            writer.builder.apply([Ended(turn.stop_reason)])
    except ProtocolError as refused_or_failed:
        error = refused_or_failed
    except Exception:  # noqa: BLE001 - whatever it is, the turn must end
        error = _defect(request)
    if bound is None or writer is None or (error is not None and _shows_nothing(request, writer)):
        error = error or ProtocolError("request_cancelled", "The request was cancelled before it started.")
        evict_failed_parent(request)
        log.refuse(error)
    else:
        error = await _keep_and_announce(request, bound, writer, error, parts)
    parts.hook.turn_ended(_details(request, log, bound, writer, error, started_at))
    if bound is not None and _is_warm(request, log) and bound.generation.prefills:
        await _prefill(bound)


def _writer(request: TurnRequest, log: TurnLog, bound: Bound, parts: Parts) -> Writer:
    builder = Builder(bound.response, parts.new_id, timings=request.create.wants_timings)
    return Writer(log, builder, parts.keepalive_seconds if request.transport != "json" else None)


async def _generate(request: TurnRequest, bound: Bound, writer: Writer, parts: Parts) -> None:
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
                if writer.builder.yielded:
                    break
    except IllegalTransition as broken:
        _log.warning("upstream %s broke the protocol: %s", bound.upstream, broken)
        message = f"Upstream '{bound.upstream}' sent an event that cannot stand where it came."
        raise ProtocolError("upstream_error", message) from None
    finally:
        if opening is not None:
            opening.cancel()
    if writer.builder.ended is None:
        raise ProtocolError("upstream_error", f"Upstream '{bound.upstream}' ended its answer before it was finished.")


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


def _shows_nothing(request: TurnRequest, writer: Writer) -> bool:
    """Whether an error can still be a refusal: before `response.created`, and for a plain JSON answer to its end."""
    return writer.opened_at is None or request.transport == "json"


async def _keep_and_announce(
    request: TurnRequest, bound: Bound, writer: Writer, error: ProtocolError | None, parts: Parts
) -> ProtocolError | None:
    """Keep the response, then let its terminal event be read: a client may chain from it at once."""
    writer.log.closing = True
    builder = writer.builder
    response = builder.final(int(parts.unix_time())) if error is None else builder.failed(error)
    try:
        await keep(request, bound, response, parts.store)
    except ProtocolError as unkept:
        error = unkept
    except Exception:  # noqa: BLE001 - as in `run_turn`
        error = _defect(request)
    if error is not None:
        evict_failed_parent(request)
        response = builder.failed(error)
    if error is not None and _shows_nothing(request, writer):
        writer.log.refuse(error)
    else:
        writer.end(response)
    return error


def _defect(request: TurnRequest) -> ProtocolError:
    """A defect ends its turn with an error, never in silence; the log has its traceback."""
    _log.exception("turn failed, request=%s", request.request_id)
    return ProtocolError("internal_error", f"The server failed. Its log has more under request {request.request_id}.")


def _details(
    request: TurnRequest,
    log: TurnLog,
    bound: Bound | None,
    writer: Writer | None,
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
