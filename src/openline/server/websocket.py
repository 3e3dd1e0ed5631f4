"""The WebSocket shell: moves text, starts the turns that the protocol lets start, stops them when the peer is gone.

Source: WebSocket mode guide.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec

from openline.protocol.connection import Connection, Limits, Start, frame
from openline.protocol.errors import ProtocolError
from openline.server import frames
from openline.server.asgi import ClientGone, Message, Receive, Send
from openline.state.cache import ConnectionCache
from openline.turns.bind import TurnRequest
from openline.turns.log import LogReader, Window
from openline.turns.registry import Registry, Turn


class Socket:
    """One accepted connection.

    Args:
        owner: whose it is.
        request_id: of its upgrade; all its turns carry it.
        limits: of its lanes.
        send_buffer_bytes_max: events that may wait for it before its turns are held up.
    """

    def __init__(
        self,
        registry: Registry,
        receive: Receive,
        send: Send,
        *,
        owner: str,
        request_id: str,
        limits: Limits,
        send_buffer_bytes_max: int,
    ) -> None:
        self._registry = registry
        self._receive = receive
        self._send = send
        self._owner = owner
        self._request_id = request_id
        self._connection = Connection(limits)
        self._cache = ConnectionCache()
        self._window = Window(send_buffer_bytes_max)
        self._group: asyncio.TaskGroup
        self._deliveries: set[asyncio.Task[None]] = set()
        self._warmed: dict[str | None, Turn] = {}  # warm-ups that may still prefill, by lane

    def __repr__(self) -> str:
        return f"<Socket {self._owner} {self._connection!r} {self._window!r}>"

    async def serve(self) -> None:
        """Take messages until the peer is gone; then nothing of it goes on."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                with suppress(ClientGone):
                    while (message := await self._receive())["type"] != "websocket.disconnect":
                        await self._take(message)
            finally:
                for delivery in self._deliveries:
                    delivery.cancel()
                for warmed in self._warmed.values():
                    warmed.cancel()

    async def _take(self, message: Message) -> None:
        text: str | bytes | None = message.get("text")
        body: str | bytes = text if text is not None else message.get("bytes") or b""
        try:
            self._connection.receive(body)
        except ProtocolError as error:
            await self._refuse(error, None)
        await self._start_turns()

    async def _start_turns(self) -> None:
        while (entry := self._connection.next_turn()) is not None:
            if isinstance(entry, Start):
                self._start(entry)
            else:
                self._cache.evict_failed(self._owner, entry.stream_id, entry.previous_response_id)
                await self._refuse(entry.error, entry.stream_id)
                self._connection.end_turn(entry.stream_id)

    def _start(self, start: Start) -> None:
        create = start.create
        if warmed := self._warmed.pop(create.stream_id, None):
            warmed.cancel()  # the turn brings the whole prefix itself
        turn = self._registry.start(
            TurnRequest(
                owner=self._owner,
                create=create,
                body=start.body,
                request_id=self._request_id,
                transport="websocket",
                cache=self._cache,
                stream_id=create.stream_id,
            ),
            self._window,
        )
        if not create.generates:
            self._warm(create.stream_id, turn)
        # The reader is there before its task runs, so that a peer that is gone by then still abandons its turn.
        reader = turn.log.deliver()
        delivery = self._group.create_task(self._deliver(reader, create.stream_id))
        self._deliveries.add(delivery)
        delivery.add_done_callback(self._deliveries.discard)
        delivery.add_done_callback(lambda _: reader.leave())

    def _warm(self, stream_id: str | None, turn: Turn) -> None:
        """Remember a warm-up for as long as it runs, so that its prefill can be stopped."""

        def forget(_: object) -> None:
            if self._warmed.get(stream_id) is turn:
                del self._warmed[stream_id]

        self._warmed[stream_id] = turn
        turn.task.add_done_callback(forget)

    async def _deliver(self, reader: LogReader, stream_id: str | None) -> None:
        """Write one turn's events, then let its lane go on."""
        with suppress(ClientGone):
            try:
                while events := await reader.read():
                    await self._write([frame(event, stream_id) for event in events])
            except ProtocolError as refusal:
                await self._refuse(refusal, stream_id)
            self._connection.end_turn(stream_id)
            await self._start_turns()

    async def _refuse(self, error: ProtocolError, stream_id: str | None) -> None:
        await self._write([msgspec.json.encode(error.frame(stream_id))])

    async def _write(self, events: list[bytes]) -> None:
        try:
            await self._send({"type": frames.MESSAGE, "events": events})
        except (OSError, RuntimeError):
            # uvicorn raises the one when the peer has gone, the other once it has closed the socket itself.
            raise ClientGone from None
