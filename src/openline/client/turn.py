"""One turn over whichever lines it takes: what `recovery` decides is carried out here."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any, Final
from urllib.parse import quote

import msgspec

from openline.client.connections import Connections, Over
from openline.client.create import Body, Create
from openline.client.errors import ConnectionLost, OpenlineError
from openline.client.reading import OutOfOrder, Reading, response_id_of
from openline.client.recovery import (
    Abilities,
    Action,
    Broke,
    CreateRefused,
    FallBack,
    GiveUp,
    LookUp,
    ResendFull,
    ResendSameKey,
    Resume,
    Seen,
    Sent,
    TakeEnd,
    UpgradeRefused,
    What,
    Why,
    decide,
    is_load,
    wait_seconds,
)
from openline.client.refusal import refusal_of_answer, refusal_of_event
from openline.client.settings import ClientSettings
from openline.client.socket import NotSent, Socket
from openline.client.wire import DialFailed, DialRefused, Event, Events, LineClosed
from openline.protocol.sse import DONE_DATA
from openline.protocol.states import TERMINAL_EVENTS

logger = logging.getLogger("openline.client")

_DRAIN_SECONDS_MAX: Final = 0.1  # what stands behind the last event comes with it, or the connection is given up
_CONTINUABLE_ENDS: Final = TERMINAL_EVENTS - {"response.failed"}
_decoder: Final = msgspec.json.Decoder(dict[str, Any])

_WHY: Final[dict[Why, str]] = {
    "refused": "the server refused",
    "unreachable": "the server cannot be reached",
    "tries": "it did not come back within tries_max or recovery_seconds_max",
    "ambiguous": "the create was sent, and nobody can say whether it ran. on_lost='restart' would send it again",
    "gone": "the server does not hold the turn any more, and events of it were seen. on_lost='restart' would run another",
    "broken": "the server does not keep to the protocol",
}


class Broken(Exception):  # noqa: N818 - carries what broke
    """An attempt has ended before the turn."""

    def __init__(self, broke: Broke, words: str = "") -> None:
        super().__init__(words)
        self.broke = broke
        self.words = words or (broke.value if isinstance(broke, What) else broke.refusal.message)


class Turn:
    """A create and its response.

    Attributes:
        reading: what was seen; another object after a second generation has begun.
        was_shown: whether the app got an event of it; whoever gives it one says so.
        restarts: how often a second generation has begun.
        is_cancelled: the app wants no more of it.
    """

    def __init__(
        self, create: Create, connections: Connections, settings: ClientSettings, chance: random.Random
    ) -> None:
        self._create = create
        self._connections = connections
        self._settings = settings
        self._chance = chance
        self._tries = Tries(settings)
        self._sent = Sent(in_two_forms=create.may_be_known)
        self._body: Body | None = None
        self._line: Socket | Events | None = None  # what the turn's events come over
        self._cancelled = asyncio.Event()
        self._was_told = False  # the server, of the cancelling
        self._is_abandoned = False
        self.reading = Reading()
        self.was_shown = False
        self.restarts = 0

    def __repr__(self) -> str:
        return f"<Turn {self.reading!r} {self._sent!r} tries={self._tries.count}>"

    @property
    def is_cancelled(self) -> bool:
        """Whether the app wants no more of it."""
        return self._cancelled.is_set()

    async def events(self) -> AsyncGenerator[Event, None]:
        """Every event once and in order, up to the last; asked for again, it goes on where it was left.

        Raises:
            Refused: the server did not take the create.
            ConnectionLost: the turn cannot be gone on with.
            OpenlineError: the create cannot be sent as it is.
        """
        action: Action = LookUp() if self._create.may_be_known else ResendFull()
        if self._sent.may_run:
            action = await self._next(action, Broken(What.LINE_ENDED, "the stream was left"))
        while not self.is_cancelled or self._line is not None:
            try:
                async with aclosing(self._carry_out(action)) as events:
                    async for event in events:
                        if self._take(event):
                            yield event
                        if self.reading.final is not None:
                            return
                        if self.is_cancelled:
                            await self._tell_cancelled()
                raise Broken(What.LINE_ENDED, "the events ended before the turn did")
            except Broken as broken:
                if not self.is_cancelled:
                    action = await self._next(action, broken)
        await self._end_cancelled()

    async def cancel(self) -> None:
        """Have the server end the turn; what still comes, comes over `events`.

        A server that knows no cancelling is told by the end of the connection.
        """
        self._cancelled.set()
        await self._tell_cancelled()

    async def abandon(self) -> None:
        """Give up the line that the events come over, and ask the server nothing more."""
        self._is_abandoned = True
        self._cancelled.set()
        if self._line is not None:
            await self._line.close()

    # Cancelling.

    async def _tell_cancelled(self) -> None:
        line, response_id = self._line, self.reading.response_id
        if self._was_told:
            return
        if not self._connections.has_extensions:
            await self.abandon()
        elif isinstance(line, Socket):
            self._was_told = True
            with suppress(LineClosed):
                await line.cancel(response_id)
        elif line is not None and response_id is not None:
            self._was_told = True
            with suppress(Broken):
                await self._cancel_by_id(response_id)

    async def _end_cancelled(self) -> None:
        """The line has gone before the turn's end came over it; a server that holds the turn still has to be told."""
        if self._sent.may_run and self._connections.has_extensions and not self._is_abandoned:
            with suppress(Broken, OutOfOrder, msgspec.DecodeError, UnicodeDecodeError):
                if self.reading.response_id is None:
                    self.reading.found(_decoder.decode(await self._whole(await self._get(self._look_up_path))))
                if self.reading.response_id is not None:
                    self.reading.found(_decoder.decode(await self._cancel_by_id(self.reading.response_id)))
        self.reading.take_end()
        self.reading.close_as_cancelled()

    async def _cancel_by_id(self, response_id: str) -> bytes:
        path = f"/responses/{quote(response_id)}/cancel"
        try:
            answer = await self._connections.dial.post(path, b"", self._connections.headers)
        except (DialFailed, LineClosed) as error:
            raise Broken(What.LINE_ENDED, str(error)) from None
        return await self._whole(answer)

    # What comes.

    def _take(self, event: Event) -> bool:
        if event["type"] == "error":  # in mid-turn; the SDKs take it as the turn's end, too
            self.reading.fail(refusal_of_event(event))
            return True
        try:
            is_new = self.reading.take(event, strict=self._connections.has_extensions is True)
        except OutOfOrder as error:
            raise Broken(What.OUT_OF_ORDER, str(error)) from None
        if is_new:
            self._tries.progress()
        return is_new

    # What was decided.

    def _carry_out(self, action: Action) -> AsyncGenerator[Event, None]:
        match action:
            case ResendFull(lost_parent, is_second):
                if is_second:
                    self._begin_anew()
                self._body = None
                self._sent = self._sent._replace(in_two_forms=self._sent.in_two_forms or self._sent.may_run)
                if is_second:
                    self._sent = self._sent._replace(may_run=False)
                return self._send(lost_parent=lost_parent)
            case ResendSameKey():
                return self._send()
            case Resume():
                over_socket = self._over() == "websocket" and self._body is not None and not self._sent.in_two_forms
                return self._send(after=self.reading.after) if over_socket else self._follow()
            case LookUp():
                return self._look_up()
            case FallBack() | TakeEnd() | GiveUp():
                raise AssertionError("these are no sends")

    def _begin_anew(self) -> None:
        """A second generation: what was seen of the first is void."""
        self.reading = Reading()
        self.restarts += 1

    async def _next(self, action: Action, broken: Broken) -> Action:
        """What to do about what broke; returns when it is time for it.

        Raises:
            OpenlineError: nothing can be done.
        """
        broke = broken.broke
        may_try, may_ask_again = self._tries.next(broke)
        if broke is What.NOT_HELD and self._connections.has_extensions:
            self._sent = self._sent._replace(may_run=False)
        if isinstance(broke, CreateRefused) and broke.refusal.code == "resume_window_exceeded":
            self._sent = self._sent._replace(is_trimmed=True)
        if isinstance(broke, CreateRefused) and broke.refusal.code == "websocket_connection_limit_reached":
            await self._connections.drop_socket()
        can = Abilities(
            self._connections.has_extensions,
            may_fall_back=self._connections.may_fall_back,
            may_restart=self._create.on_lost == "restart",
            in_background=self._create.in_background,
            may_try=may_try,
            may_ask_again=may_ask_again,
        )
        seen = Seen(self.reading.has_begun, self.was_shown)
        decided = decide(self._sent, seen, broke, can)
        retry_after = None if isinstance(broke, What) else broke.refusal.retry_after
        if retry_after is not None and retry_after > self._settings.retry_after_seconds_max:
            decided = GiveUp("refused")
        logger.info("turn %s: %s: %s", self._create.key, broken.words, type(decided).__name__)
        match decided:
            case FallBack():
                self._connections.refuse_socket(None if isinstance(broke, What) else broke.refusal.status)
                return action
            case GiveUp(why):
                raise self._error(why, broken)
            case TakeEnd():
                self.reading.take_end()
                raise ConnectionLost(
                    "the turn has ended, and its events are no longer held: `response` has how it ended.",
                    idempotency_key=self._create.key,
                    response=self.reading.final,
                )
            case _:
                if not isinstance(decided, ResendFull) or not decided.lost_parent:
                    await self._pause(retry_after)
                return decided

    async def _pause(self, retry_after: float | None) -> None:
        seconds = wait_seconds(self._tries.count, retry_after, self._settings, self._chance)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._cancelled.wait()

    def _error(self, why: Why, broken: Broken) -> OpenlineError:
        broke = broken.broke
        if why == "refused" and not isinstance(broke, What):
            return broke.refusal.error()
        return ConnectionLost(
            f"{broken.words}; {_WHY[why]}.",
            idempotency_key=self._create.key,
            response=self.reading.snapshot(),
            may_have_run=self._sent.may_run or self.reading.has_begun,
        )

    # One attempt each.

    def _over(self) -> Over:
        return self._connections.over_for(self._create)

    async def _send(self, *, after: int | None = None, lost_parent: bool = False) -> AsyncGenerator[Event, None]:
        """Send the create, as it was or built anew, and give its events."""
        before = self._sent
        over_socket = self._over() == "websocket"
        attempt = self._over_socket(after, lost_parent) if over_socket else self._over_http(lost_parent)
        try:
            async with aclosing(self._checked(attempt)) as events:
                async for event in events:
                    yield event
        except Broken as broken:
            if isinstance(broken.broke, CreateRefused):  # this one does not run; an earlier one still may
                self._sent = self._sent._replace(may_run=before.may_run)
            raise

    async def _over_socket(self, after: int | None, lost_parent: bool) -> AsyncGenerator[Event, None]:
        socket = await self._socket()
        knows_keys = self._connections.has_extensions is True
        if self._sent.may_run and not knows_keys:
            raise Broken(What.LINE_ENDED, "another server answers now, which knows no idempotency keys")
        body = self._built(socket.holds, lost_parent=lost_parent)
        frame = body.frame(self._create.key if knows_keys else None, after)
        self._check_size(len(frame))
        before, self._sent = self._sent, self._sent._replace(may_run=True)
        self._line = socket
        holds = socket.holds = None  # until the turn has ended: a refused or failed one takes its parent along
        try:
            async with aclosing(socket.exchange(frame)) as events:
                async for event in events:
                    if event["type"] in _CONTINUABLE_ENDS:
                        holds = response_id_of(event)
                    yield event
        except NotSent as unsent:
            self._sent = before
            raise Broken(What.LINE_ENDED, str(unsent)) from None
        except LineClosed as closed:
            raise Broken(What.LINE_ENDED, str(closed)) from None
        except TimeoutError:
            raise Broken(What.SILENT, self._silence()) from None
        finally:
            socket.holds = holds
            self._line = None

    async def _over_http(self, lost_parent: bool) -> AsyncGenerator[Event, None]:
        body = self._built(None, lost_parent=lost_parent).post()
        self._check_size(len(body))
        headers = {**self._connections.headers, "accept": "text/event-stream", "idempotency-key": self._create.key}
        before, self._sent = self._sent, self._sent._replace(may_run=True)
        try:
            async with asyncio.timeout(self._settings.idle_seconds_max):
                answer = await self._connections.dial.post("/responses", body, headers)
        except DialFailed as failed:
            self._sent = before
            raise _unreachable(failed) from None
        except LineClosed as closed:
            raise Broken(What.LINE_ENDED, str(closed)) from None
        except TimeoutError:
            raise Broken(What.SILENT, self._silence()) from None
        async with aclosing(self._answered(answer)) as events:
            async for event in events:
                yield event

    async def _follow(self) -> AsyncGenerator[Event, None]:
        """The rest of the events by the response's id: ours of any turn that is held, others' of background turns.

        Source: Background mode guide, "Streaming a background response".
        """
        after = "" if self.reading.after is None else f"&starting_after={self.reading.after}"
        answer = await self._get(f"/responses/{quote(self.reading.response_id or '')}?stream=true{after}")
        try:
            async with aclosing(self._checked(self._answered(answer))) as events:
                async for event in events:
                    yield event
        except Broken as broken:
            raise _not_followed(broken) from None

    async def _look_up(self) -> AsyncGenerator[Event, None]:
        """What the server has of the key; no events."""
        answer = await self._get(self._look_up_path)
        body = await self._whole(answer)
        if is_load(refusal_of_answer(answer.status, answer.headers, b"")):
            raise Broken(What.LINE_ENDED, f"the look-up was answered with status {answer.status}")
        if answer.status != 200 or not self._connections.has_extensions:
            raise Broken(What.NOT_HELD)
        try:
            self.reading.found(_decoder.decode(body))
        except (OutOfOrder, msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Broken(What.OUT_OF_ORDER, str(error)) from None
        raise Broken(What.HAS_ENDED if self.reading.end is not None else What.RUNS_ON)
        yield {}  # an iterator, as the others are

    # Their pieces.

    async def _checked(self, events: AsyncGenerator[Event, None]) -> AsyncGenerator[Event, None]:
        """The events of one attempt; an `error` at its begin is a refusal, a later one the turn's end."""
        begun = False
        async with aclosing(events):
            async for event in events:
                if event["type"] == "error" and not begun:
                    raise Broken(CreateRefused(refusal_of_event(event)))
                begun = True
                yield event

    async def _answered(self, answer: Events) -> AsyncGenerator[Event, None]:
        """The events of an HTTP answer."""
        self._connections.note(answer.status, answer.headers)
        if answer.status != 200:
            refusal = refusal_of_answer(answer.status, answer.headers, await self._whole(answer))
            raise Broken(CreateRefused(refusal))
        self._line = answer
        ended = False
        events = answer.events()
        try:
            while (data := await self._next_data(events)) is not None:
                event = _read(data)
                ended = event["type"] in TERMINAL_EVENTS
                yield event
        finally:
            self._line = None
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
            raise Broken(What.SILENT, self._silence()) from None
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

    @property
    def _look_up_path(self) -> str:
        return f"/responses?idempotency_key={quote(self._create.key, safe='')}"

    async def _socket(self) -> Socket:
        try:
            return await self._connections.socket()
        except DialRefused as refused:
            raise Broken(UpgradeRefused(refusal_of_answer(refused.status, refused.headers, refused.body))) from None
        except DialFailed as failed:
            raise _unreachable(failed) from None

    def _built(self, holds: str | None, *, lost_parent: bool) -> Body:
        if self._body is None:
            self._body = self._create.body(holds, whole=lost_parent)
            self._sent = self._sent._replace(is_whole=self._body.is_whole)
        return self._body

    def _check_size(self, size: int) -> None:
        most = self._settings.message_bytes_max
        if size > most:
            raise OpenlineError(
                f"The create has {size} bytes, more than message_bytes_max = {most}: "
                "let the conversation be summed up in time with context_management=, or raise the bound."
            )

    def _silence(self) -> str:
        return f"nothing came for idle_seconds_max = {self._settings.idle_seconds_max:g} seconds"


class Tries:
    """How often and how long it was tried since something new came."""

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._refused = 0
        self._until: float | None = None
        self.count = 0

    def progress(self) -> None:
        """Something new came."""
        self.count, self._refused, self._until = 0, 0, None

    def next(self, broke: Broke) -> tuple[bool, bool]:
        """Count one more: whether it may be tried at all, and whether again after a refusal."""
        now = asyncio.get_running_loop().time()
        if self._until is None:
            self._until = now + self._settings.recovery_seconds_max
        self.count += 1
        self._refused += isinstance(broke, CreateRefused)
        may_try = self.count <= self._settings.tries_max and now < self._until
        return may_try, may_try and self._refused <= self._settings.refused_tries_max


def _read(data: bytes) -> Event:
    try:
        event = _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Broken(What.OUT_OF_ORDER, "the server sent an event that is no JSON object") from None
    if not isinstance(event.get("type"), str):
        raise Broken(What.OUT_OF_ORDER, "the server sent an event without a type")
    return event


def _unreachable(failed: DialFailed) -> Broken:
    what = What.NEVER if failed.is_lasting else What.UPGRADE_BROKEN if failed.reached else What.NO_CONNECTION
    return Broken(what, failed.reason)


def _not_followed(broken: Broken) -> Broken:
    """What it means that a response's events were not given by its id."""
    if not isinstance(broken.broke, CreateRefused):
        return broken
    refusal = broken.broke.refusal
    if refusal.status == 404:
        return Broken(What.NOT_HELD, refusal.message)
    if is_load(refusal):
        return Broken(What.LINE_ENDED, refusal.message)
    return Broken(CreateRefused(msgspec.structs.replace(refusal, code="resume_window_exceeded")), refusal.message)


async def _drained(events: AsyncGenerator[bytes, None]) -> None:
    """Read what stands behind the last event, so that the connection can be used again."""
    with suppress(LineClosed, TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS_MAX):
            async for _ in events:
                pass
