"""One attempt at a turn each: over the socket, over HTTP, by the response's id; and what can be asked about it.

Each gives events until the turn's last, or raises `Broken` with what broke. What to do then is decided elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Any, Final
from urllib.parse import quote

import msgspec

from openline.client.connections import Connections
from openline.client.create import Body, Create
from openline.client.errors import OpenlineError
from openline.client.reading import response_id_of
from openline.client.recovery import Broke, CreateRefused, UpgradeRefused, What, is_load
from openline.client.refusal import refusal_of_answer
from openline.client.settings import ClientSettings
from openline.client.socket import NotSent, Socket
from openline.client.wire import DialFailed, DialRefused, Event, Events, LineClosed, Response
from openline.protocol.sse import DONE_DATA
from openline.protocol.states import TERMINAL_EVENTS

_DRAIN_SECONDS_MAX: Final = 0.1  # what stands behind the last event comes with it, or the connection is given up
_CONTINUABLE_ENDS: Final = TERMINAL_EVENTS - {"response.failed"}
_TOO_BIG: Final = 1009  # RFC 6455 §7.4.1
_object: Final = msgspec.json.Decoder(dict[str, Any])


class Broken(Exception):  # noqa: N818 - carries what broke
    """An attempt has ended before the turn.

    Attributes:
        broke: what it was.
        words: the same for people.
        started_nothing: this attempt: nothing of a create has left, or it was refused.
    """

    def __init__(self, broke: Broke, words: str = "", *, started_nothing: bool = False) -> None:
        self.broke = broke
        self.words = words or (broke.value if isinstance(broke, What) else broke.refusal.message)
        self.started_nothing = started_nothing
        super().__init__(self.words)


class Attempts:
    """The ways to get at one turn.

    Attributes:
        line: what its events come over, while they come.
    """

    def __init__(self, create: Create, connections: Connections, settings: ClientSettings) -> None:
        self._create = create
        self._connections = connections
        self._settings = settings
        self.line: Socket | Events | None = None

    async def over_socket(
        self, built: Callable[[str | None], Body], after: int | None, *, again: bool
    ) -> AsyncGenerator[Event, None]:
        """Send the create over the socket, and give its events.

        Args:
            built: gives the create in the form for a connection whose memory holds this response.
            after: the number of the last event seen, to resume behind it.
            again: it may be running; only a server that knows keys may get it.
        """
        socket = await self._socket()
        knows_keys = self._connections.has_extensions is True
        if again and not knows_keys:
            raise Broken(
                What.LINE_ENDED, "another server answers now, one that knows no idempotency keys", started_nothing=True
            )
        frame = built(socket.holds).frame(self._create.key if knows_keys else None, after)
        self._check_size(len(frame))
        # Until the turn has ended well the memory holds nothing: a refused or failed turn takes its parent along.
        holds = socket.holds = None
        self.line = socket
        try:
            async with aclosing(socket.exchange(frame.decode())) as events:
                async for event in events:
                    if event["type"] in _CONTINUABLE_ENDS:
                        holds = response_id_of(event)
                    yield event
        except NotSent as unsent:
            raise Broken(What.LINE_ENDED, str(unsent), started_nothing=True) from None
        except LineClosed as closed:
            raise Broken(What.TOO_BIG if closed.code == _TOO_BIG else What.LINE_ENDED, str(closed)) from None
        except TimeoutError:
            raise self._silence() from None
        finally:
            socket.holds = holds
            self.line = None

    async def over_http(self, body: Body) -> AsyncGenerator[Event, None]:
        """Post the create, and give its events."""
        data = body.post()
        self._check_size(len(data))
        headers = {**self._connections.headers, "accept": "text/event-stream", "idempotency-key": self._create.key}
        try:
            async with asyncio.timeout(self._settings.idle_seconds_max):
                answer = await self._connections.dial.post("/responses", data, headers)
        except DialFailed as failed:
            raise _unreachable(failed) from None
        except LineClosed as closed:
            raise Broken(What.LINE_ENDED, str(closed)) from None
        except TimeoutError:
            raise self._silence() from None
        async with aclosing(self._answered(answer)) as events:
            async for event in events:
                yield event

    async def follow(self, response_id: str, after: int | None) -> AsyncGenerator[Event, None]:
        """The events by the response's id: ours of every turn that is held, others' of background turns.

        Source: Background mode guide, "Streaming a background response".
        """
        more = "" if after is None else f"&starting_after={after}"
        answer = await self._get(f"/responses/{quote(response_id)}?stream=true{more}")
        try:
            async with aclosing(self._answered(answer)) as events:
                async for event in events:
                    yield event
        except Broken as broken:
            raise _not_followed(broken) from None
        raise Broken(What.NO_MORE)

    async def look_up(self) -> Response:
        """The response of the key, as the server has it. Starts nothing, on no server."""
        answer = await self._get(f"/responses?idempotency_key={quote(self._create.key, safe='')}")
        body = await self._whole(answer)
        if answer.status == 200 and self._connections.has_extensions:
            return _decoded(body)
        refusal = refusal_of_answer(answer.status, answer.headers, body)
        if is_load(refusal):
            raise Broken(What.LINE_ENDED, refusal.message)
        raise Broken(What.NOT_HELD)

    async def cancel(self, response_id: str) -> Response:
        """Have a response end that no line of ours leads to; how it ended."""
        try:
            path = f"/responses/{quote(response_id)}/cancel"
            answer = await self._connections.dial.post(path, b"", self._connections.headers)
        except (DialFailed, LineClosed) as error:
            raise Broken(What.LINE_ENDED, str(error)) from None
        body = await self._whole(answer)
        if answer.status != 200:
            raise Broken(CreateRefused(refusal_of_answer(answer.status, answer.headers, body)))
        return _decoded(body)

    # Their pieces.

    async def _answered(self, answer: Events) -> AsyncGenerator[Event, None]:
        """The events of an HTTP answer."""
        self._connections.note(answer.status, answer.headers)
        if answer.status != 200:
            body = await self._whole(answer)
            raise Broken(CreateRefused(refusal_of_answer(answer.status, answer.headers, body)), started_nothing=True)
        if answer.headers.get("content-type", "").startswith("application/json"):
            response = _decoded(await self._whole(answer))  # a server that knows no streaming
            yield {"type": f"response.{response.get('status')}", "response": response}
            return
        self.line = answer
        ended = False
        events = answer.events()
        try:
            while (data := await self._next_data(events)) is not None:
                event = _decoded(data)
                if not isinstance(event.get("type"), str):
                    raise Broken(What.OUT_OF_ORDER, "the server sent an event without a type")
                ended = event["type"] in TERMINAL_EVENTS
                yield event
        finally:
            self.line = None
            if ended:
                await _drained(events)
            await answer.close()

    async def _next_data(self, events: AsyncGenerator[bytes, None]) -> bytes | None:
        """The next event's data; None at the stream's end."""
        try:
            async with asyncio.timeout(self._settings.idle_seconds_max):
                data = await anext(events, None)
        except LineClosed as closed:
            raise Broken(What.LINE_ENDED, str(closed)) from None
        except TimeoutError:
            raise self._silence() from None
        return None if data == DONE_DATA else data

    async def _get(self, path: str) -> Events:
        headers = {**self._connections.headers, "accept": "text/event-stream, application/json"}
        try:
            async with asyncio.timeout(self._settings.idle_seconds_max):
                answer = await self._connections.dial.get(path, headers)
        except DialFailed as failed:
            raise _unreachable(failed) from None
        except (LineClosed, TimeoutError) as error:
            raise Broken(What.LINE_ENDED, str(error)) from None
        self._connections.note(answer.status, answer.headers)
        return answer

    async def _whole(self, answer: Events) -> bytes:
        try:
            async with asyncio.timeout(self._settings.connect_seconds_max):
                return await answer.body()
        except (LineClosed, TimeoutError) as error:
            raise Broken(What.LINE_ENDED, str(error)) from None
        finally:
            await answer.close()

    async def _socket(self) -> Socket:
        try:
            return await self._connections.socket()
        except DialRefused as refused:
            refusal = refusal_of_answer(refused.status, refused.headers, refused.body)
            raise Broken(UpgradeRefused(refusal), started_nothing=True) from None
        except DialFailed as failed:
            raise _unreachable(failed) from None

    def _check_size(self, size: int) -> None:
        most = self._settings.message_bytes_max
        if size > most:
            raise OpenlineError(
                f"The create has {size} bytes, more than message_bytes_max = {most}: "
                "let the conversation be summed up in time with context_management=, or raise the bound."
            )

    def _silence(self) -> Broken:
        return Broken(What.SILENT, f"nothing came for idle_seconds_max = {self._settings.idle_seconds_max:g} seconds")


def _decoded(data: bytes) -> dict[str, Any]:
    try:
        return _object.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Broken(What.OUT_OF_ORDER, "the server sent something that is no JSON object") from None


def _unreachable(failed: DialFailed) -> Broken:
    what = What.NEVER if failed.is_lasting else What.UPGRADE_BROKEN if failed.reached else What.NO_CONNECTION
    return Broken(what, failed.reason, started_nothing=True)


def _not_followed(broken: Broken) -> Broken:
    """What it means that a response's events were not given by its id."""
    if not isinstance(broken.broke, CreateRefused):
        return broken
    refusal = broken.broke.refusal
    if refusal.status == 404:
        return Broken(What.NOT_HELD, refusal.message)
    if is_load(refusal):
        return Broken(What.LINE_ENDED, refusal.message)
    return broken if refusal.code == "resume_window_exceeded" else Broken(What.NOT_READABLE, refusal.message)


async def _drained(events: AsyncGenerator[bytes, None]) -> None:
    """Read what stands behind the last event, so that the connection can be used again."""
    with suppress(LineClosed, TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS_MAX):
            async for _ in events:
                pass
