"""The WebSocket shell: moves text, starts the turns that the protocol lets start, stops them when the peer is gone.

Source: WebSocket mode guide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import msgspec

from openline.protocol import steering
from openline.protocol.connection import Connection, Direct, Limits, Start, frame
from openline.protocol.errors import ProtocolError
from openline.protocol.events import Cancel, Inject, SocketCreate, Steer, SteerRefused
from openline.protocol.fold import Event
from openline.protocol.steering import Steered, Steers
from openline.server import frames
from openline.server.asgi import ClientGone, Message, Receive, Send, answer_headers
from openline.state.cache import ConnectionCache
from openline.turns.attachment import Attachment
from openline.turns.bind import TurnRequest
from openline.turns.log import ReaderLagged, Window
from openline.turns.registry import Registry
from openline.turns.turn import Turn

GOING_AWAY: Final = 1001
_PIECE_BYTES_MAX: Final = 64 * 1024  # with an event above it; as for HTTP


class SocketLimits(msgspec.Struct, frozen=True):
    """What one socket may have.

    Attributes:
        lanes: of its lanes.
        send_buffer_bytes_max: events that may wait for it before its turns are held up.
        seconds_max: its age, after which nothing starts on it.
        grace_seconds_max: how long what runs then may still run.
        steers_pending_max: steers that wait for a successor.
        steers_pending_bytes_max: of their input.
    """

    lanes: Limits
    send_buffer_bytes_max: int
    seconds_max: float
    grace_seconds_max: float
    steers_pending_max: int
    steers_pending_bytes_max: int


class _Late(NamedTuple):
    """An event about a response whose own are settled, and not all read; and how much of it waits for the client."""

    event_type: str
    fields: Event
    bytes: int


class Socket:
    """One connection that may come in.

    Args:
        owner: whose it is.
        request_id: of its upgrade; all its turns carry it.
    """

    def __init__(
        self,
        registry: Registry,
        receive: Receive,
        send: Send,
        *,
        owner: str,
        request_id: str,
        limits: SocketLimits,
    ) -> None:
        self._registry = registry
        self._receive = receive
        self._send = send
        self._owner = owner
        self._request_id = request_id
        self._limits = limits
        self._connection = Connection(limits.lanes)
        self._steers = Steers(limits.steers_pending_max, limits.steers_pending_bytes_max)
        self._cache = ConnectionCache()
        self._window = Window(limits.send_buffer_bytes_max)
        self._group: asyncio.TaskGroup
        self._running: dict[str | None, Attachment] = {}  # what runs, or is read again, by lane
        self._deliveries: dict[asyncio.Task[None], None] = {}  # in order, so that a run can be repeated
        self._delivering: dict[str | None, asyncio.Task[None]] = {}  # what runs, by lane
        self._late: dict[str | None, list[_Late]] = {}  # to be told behind the end of what runs, by lane
        self._warmed: dict[str | None, Turn] = {}  # warm-ups that may still prefill, by lane
        self._idle = asyncio.Event()
        self._idle.set()
        self._retiring = False
        self._closed = False  # by us; the peer has still to close its side

    def __repr__(self) -> str:
        return f"<Socket {self._owner} {self._connection!r} {self._window!r}>"

    async def serve(self) -> None:
        """Accept it, and take messages until the peer is gone; then nothing of it goes on."""
        limits = self._limits
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as group:
            self._group = group
            error = _too_old(limits.seconds_max)
            aged = loop.call_later(limits.seconds_max, self.retire, error, limits.grace_seconds_max, error)
            try:
                with suppress(ClientGone):
                    await self._say({"type": "websocket.accept", "headers": answer_headers(self._request_id)})
                    while (message := await self._receive())["type"] != "websocket.disconnect":
                        await self._take(message)
            finally:
                aged.cancel()
                self._retiring = True
                for delivery in self._deliveries:
                    delivery.cancel()
                for warmed in self._warmed.values():
                    warmed.stop_prefill()
        if self._closed:
            await self._await_close()

    async def _await_close(self) -> None:
        """Wait until the peer has closed its side: before that, a reset could take what it has still to read."""
        try:
            async with asyncio.timeout(frames.LAST_WORDS_SECONDS_MAX):
                message = await self._receive()
                while message["type"] != "websocket.disconnect" or message["code"] == GOING_AWAY:  # ours
                    message = await self._receive()
        except TimeoutError:
            await self._send({"type": frames.CUT})

    def retire(self, error: ProtocolError, grace_seconds: float, last: ProtocolError | None = None) -> None:
        """Start nothing any more, and close once what runs has ended.

        Args:
            error: for what waits, and for what still comes.
            grace_seconds: how long what runs may still take; then it is cancelled.
            last: what is said before the socket closes.

        Source: WebSocket mode guide, "Connection life".
        """
        if not self._retiring:
            self._retiring = True
            self._connection.retire(error)
            self._spawn(self._close_when_idle(grace_seconds, last))

    async def _close_when_idle(self, grace_seconds: float, last: ProtocolError | None) -> None:
        with suppress(ClientGone):
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_seconds):
                    await self._start_turns()  # the refusals of what waited
                    await self._idle.wait()
            for stream_id, attachment in list(self._running.items()):
                if attachment.turn.key is not None and last is not None:
                    self._leave_running(stream_id)
                else:
                    attachment.turn.stop()
            try:
                async with asyncio.timeout(frames.LAST_WORDS_SECONDS_MAX):
                    await self._start_turns()
                    await self._idle.wait()
                    await self._give_back(self._steers.take_all(), "The connection takes no more creates.")
                    if last is not None:
                        await self._refuse(last, None)
                    await self._say({"type": "websocket.close", "code": GOING_AWAY})
                    self._closed = True
            except TimeoutError:
                await self._send({"type": frames.CUT})

    def _leave_running(self, stream_id: str | None) -> None:
        """A turn with a key goes on without this connection: its client comes back to it on another one."""
        del self._running[stream_id]
        self._delivering.pop(stream_id).cancel()
        self._late.pop(stream_id, None)
        self._connection.end_turn(stream_id)

    # What comes in.

    async def _take(self, message: Message) -> None:
        text: str | bytes | None = message.get("text")
        body: str | bytes = text if text is not None else message.get("bytes") or b""
        try:
            event = self._connection.receive(body)
            if event is not None:
                await self._act(event)
        except SteerRefused as refused:
            await self._refuse_steer(refused)
        except ProtocolError as error:
            await self._refuse(error, None)
        await self._start_turns()

    async def _act(self, event: Direct) -> None:
        match event:
            case Cancel():
                await self._cancel(event)
            case Steer():
                self._steer(event)
            case Inject():
                error = {"code": "response_not_found", "message": "No response runs that items can be injected into."}
                fields: Event = {"response_id": event.response_id, "input": event.input, "error": error}
                await self._tell("response.inject.failed", 0, fields, None)

    async def _cancel(self, cancel: Cancel) -> None:
        """Stop what the client names, if it runs; a client that is late gets no error, which others would misread.

        Source: WebSocket mode guide, "Cancelling".
        """
        if cancel.response_id is not None:
            attachment = self._reading(cancel.response_id)
        else:
            attachment = self._running.get(None)
            if self._connection.cancel_queued(None):
                await self._give_back(self._steers.take(None), "It was cancelled before its successor started.")
        if attachment is not None:
            attachment.turn.stop()

    def _reading(self, response_id: str) -> Attachment | None:
        """Where a response runs here; one that is read on two lanes belongs to either."""
        reading = (each for each in self._running.values() if each.turn.response_id == response_id)
        return next((each for each in reading if each.turn.is_known), None)

    # Steering.

    def _steer(self, steer: Steer) -> None:
        attachment = self._reading(steer.previous_response_id)
        if attachment is None:
            raise self._steers.too_late(steer)
        turn = attachment.turn
        if turn.log.ended:  # and its end has not been read yet
            raise steering.already_completed(steer)
        steering.require_support(steer, turn.request.create)
        items = steering.steer_items(steer)
        self._steers.admit(steer)
        steered = Steered(self._registry.new_id("steer"), steer, items)
        self._tell_about(attachment, steering.ACCEPTED, steering.accepted(steered))
        self._steers.add(attachment.request.stream_id, steered)
        turn.yield_at_boundary()

    async def _refuse_steer(self, refused: SteerRefused) -> None:
        """Say so, among the response's own events as long as those are read."""
        attachment = self._reading(refused.steer.previous_response_id)
        fields = steering.failed(refused)
        if attachment is None:
            await self._tell_of(refused.steer.previous_response_id, steering.FAILED, fields)
        else:
            self._tell_about(attachment, steering.FAILED, fields, len(bytes(refused.steer.input)))
            await self._window.opened()  # the input goes back, and may be large

    def _tell_about(self, attachment: Attachment, event_type: str, fields: Event, size: int = 0) -> None:
        """In the response's own log; once that is settled behind its end, where it belongs to this connection only.

        Args:
            size: of what waits for the client then, as far as that matters.
        """
        if not attachment.turn.is_settled:
            attachment.turn.tell(event_type, fields)
        else:
            self._late.setdefault(attachment.request.stream_id, []).append(_Late(event_type, fields, size))
            self._window.add(size)

    async def _give_back(self, steered: Iterable[Steered], why: str) -> None:
        """Tell of steers that were accepted and have no successor."""
        for each in steered:
            refused = SteerRefused("successor_creation_failed", why, each.steer)
            await self._tell_of(each.steer.previous_response_id, steering.FAILED, steering.failed(refused, each.id))

    async def _give_back_refused(self, steered: Iterable[Steered], error: ProtocolError) -> None:
        await self._give_back(steered, f"The create that was to bring it along was refused: {error.message}")

    async def _tell_of(self, response_id: str, event_type: str, fields: Event) -> None:
        """An event about a response that has ended: it belongs to this connection only."""
        await self._tell(event_type, self._steers.number(response_id), fields, self._steers.lane_of(response_id))

    async def _successor(self, attachment: Attachment) -> Start | None:
        """What goes on by itself behind a turn that was steered; None if nothing does.

        Source: Mid-turn steering guide, "Outcomes".
        """
        stream_id, response = attachment.request.stream_id, attachment.turn.log.response
        if response is None:
            return None
        self._steers.ended(stream_id, response["id"], len(attachment.turn.log))
        for late in self._late.pop(stream_id, ()):
            self._window.add(-late.bytes)
            await self._tell_of(response["id"], late.event_type, late.fields)
        waiting = self._steers.waiting(stream_id)
        if not waiting or self._connection.is_continued(stream_id, response["id"]):
            return None
        if self._retiring or not _goes_on(response):
            await self._give_back(self._steers.take(stream_id), "Its response cannot be continued here.")
            return None
        if required := steering.required_input(response["output"]):
            for steered in waiting:
                await self._tell_of(response["id"], steering.PENDING, steering.pending(steered, required))
            return None
        return continued(attachment.request, response["id"])

    # Turns.

    async def _start_turns(self) -> None:
        while (entry := self._connection.next_turn()) is not None:
            if isinstance(entry, Start):
                await self._start(entry)
            else:
                self._cache.evict_failed(self._owner, entry.stream_id, entry.previous_response_id)
                await self._refuse_in_lane(entry.error, entry.stream_id, self._steers.take(entry.stream_id))
        if self._connection.is_idle:
            self._idle.set()
        else:
            self._idle.clear()

    async def _refuse_in_lane(self, error: ProtocolError, stream_id: str | None, steers: Iterable[Steered]) -> None:
        """Answer what stands at a lane's head by an error, and let the lane go on."""
        await self._refuse(error, stream_id)
        await self._give_back_refused(steers, error)
        self._connection.end_turn(stream_id)

    async def _start(self, start: Start) -> None:
        create = start.create
        stream_id = create.stream_id
        steers = self._steers.take(stream_id)
        if start.is_successor and (self._retiring or not steers):
            await self._give_back(steers, "Its response cannot be continued here.")
            self._connection.end_turn(stream_id)
            return
        left: Sequence[Steered] = ()
        if any(each.steer.previous_response_id != create.previous_response_id for each in steers):
            steers, left = (), steers
        if warmed := self._warmed.pop(stream_id, None):
            warmed.stop_prefill()  # the turn brings the whole prefix itself
        request = TurnRequest(
            owner=self._owner,
            create=create,
            body=start.body,
            request_id=self._request_id,
            transport="websocket",
            cache=self._cache,
            stream_id=stream_id,
            steers=steers,
            is_successor=start.is_successor,
        )
        try:
            attachment = self._registry.attach(request, self._window)
        except ProtocolError as refused:  # for its key: nothing was tried, so the parent stays
            await self._give_back(left, "The lane went on without it.")
            await self._refuse_in_lane(refused, stream_id, steers)
            return
        self._running[stream_id] = attachment
        if not create.generates:
            self._warm(stream_id, attachment.turn)
        # It reads before its task runs, so that a peer that is gone by then still abandons its turn.
        delivery = self._delivering[stream_id] = self._spawn(self._deliver(attachment, left))
        delivery.add_done_callback(lambda _: attachment.leave())

    def _spawn(self, work: Coroutine[object, object, None]) -> asyncio.Task[None]:
        task = self._group.create_task(work)
        self._deliveries[task] = None
        task.add_done_callback(self._deliveries.pop)
        return task

    def _warm(self, stream_id: str | None, turn: Turn) -> None:
        """Remember a warm-up for as long as it runs, so that its prefill can be stopped."""

        def forget(_: object) -> None:
            if self._warmed.get(stream_id) is turn:
                del self._warmed[stream_id]

        self._warmed[stream_id] = turn
        turn.task.add_done_callback(forget)

    async def _deliver(self, attachment: Attachment, left: Sequence[Steered]) -> None:
        """Write one turn's events, behind the steers that it left; then let its lane go on."""
        stream_id, steers = attachment.request.stream_id, attachment.request.steers
        with suppress(ClientGone):
            await self._give_back(left, "The lane went on without it.")
            try:
                if attachment.turn.key is not None:
                    await attachment.admitted()
                    if not attachment.is_new:
                        await self._give_back(steers, "The create that was to bring it along was sent before.")
                        steers = ()
                while events := await attachment.reader.read():
                    for piece in _pieces(events) if attachment.turn.log.is_kept else (events,):
                        await self._write([frame(event, stream_id) for event in piece])
            except ReaderLagged as lagged:
                error = ProtocolError("resume_window_exceeded", str(lagged), param="starting_after")
                await self._refuse(error, stream_id)
            except ProtocolError as refusal:
                if not attachment.request.is_successor:
                    await self._refuse(refusal, stream_id)
                await self._give_back_refused(steers, refusal)
            del self._running[stream_id], self._delivering[stream_id]
            if attachment.turn.key is not None:
                attachment.leave()  # before anything else can become the latest of its lane
            self._connection.end_turn(stream_id, await self._successor(attachment))
            await self._start_turns()

    # What goes out.

    async def _tell(self, event_type: str, number: int, fields: Event, stream_id: str | None) -> None:
        event = msgspec.json.encode({"type": event_type, "sequence_number": number, **fields})
        await self._write([frame(event, stream_id)])

    async def _refuse(self, error: ProtocolError, stream_id: str | None) -> None:
        await self._write([msgspec.json.encode(error.frame(stream_id))])

    async def _write(self, events: list[bytes]) -> None:
        await self._say({"type": frames.MESSAGE, "events": events})

    async def _say(self, message: Message) -> None:
        try:
            await self._send(message)
        except (OSError, RuntimeError):
            # uvicorn raises the one when the peer has gone, the other once it has closed the socket itself.
            raise ClientGone from None


def continued(request: TurnRequest, response_id: str) -> Start:
    """The create of a successor that starts by itself: its settings are the response's own, its input is what waits."""
    create = request.create
    assert isinstance(create, SocketCreate), "only a socket's responses are steered"
    create = msgspec.structs.replace(
        create, previous_response_id=response_id, input=None, idempotency_key=None, starting_after=None
    )
    return Start(create, request.body, is_successor=True)


def _pieces(events: Sequence[bytes]) -> Iterator[Sequence[bytes]]:
    """What is read again may be long: a slow client's buffer is not to hold all of it."""
    start = size = 0
    for index, event in enumerate(events):
        size += len(event)
        if size > _PIECE_BYTES_MAX:
            yield events[start : index + 1]
            start, size = index + 1, 0
    yield events[start:]


def _goes_on(response: Event) -> bool:
    """Whether a response that was steered has a successor: not one that failed, nor one that the client cancelled."""
    details: Event = response["incomplete_details"] or {}
    return response["status"] != "failed" and details.get("reason") != "cancelled"


def _too_old(seconds: float) -> ProtocolError:
    message = (
        f"Responses websocket connection limit reached ({seconds / 60:g} minutes). "
        "Create a new websocket connection to continue."
    )
    return ProtocolError("websocket_connection_limit_reached", message)
