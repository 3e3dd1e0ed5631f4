"""One turn over whichever lines it takes: what `recovery` decides is carried out here."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from typing import Final

from openline.client.attempt import Attempts, Broken
from openline.client.connections import Connections, Over
from openline.client.create import Body, Create
from openline.client.errors import ConnectionLost, OpenlineError
from openline.client.reading import OutOfOrder, Reading
from openline.client.recovery import (
    Abilities,
    Action,
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
    What,
    Why,
    decide,
    wait_seconds,
)
from openline.client.refusal import refusal_of_event
from openline.client.settings import ClientSettings
from openline.client.socket import Socket
from openline.client.wire import Event, LineClosed

logger = logging.getLogger("openline.client")

# Errors in mid-turn that are about the connection, or about reading: the turn goes on.
_NOT_ITS_END: Final = frozenset({"websocket_connection_limit_reached", "resume_window_exceeded"})
_WHY: Final[dict[Why, str]] = {
    "refused": "the server refused",
    "unreachable": "the server cannot be reached",
    "tries": "it did not come back within tries_max and recovery_seconds_max",
    "ambiguous": "the create was sent, and nobody can say whether it ran: on_lost='restart' would send it again",
    "gone": "events were seen, and the server does not hold the turn any more: on_lost='restart' would run it again",
    "broken": "the server does not keep to the protocol",
    "too_big": "a message was larger than the other side takes",
}


class Turn:
    """A create and its response.

    Attributes:
        reading: what was seen; another object once a second generation has begun.
        was_shown: whether the app got an event of it; whoever gives it one says so.
        restarts: how often a second generation has begun.
        lost_parent: the server did not know the response that was continued.
        on_restart: is told when a second generation begins.
    """

    def __init__(
        self, create: Create, connections: Connections, settings: ClientSettings, chance: random.Random
    ) -> None:
        self._create = create
        self._connections = connections
        self._settings = settings
        self._chance = chance
        self._attempts = Attempts(create, connections, settings)
        self._tries = Tries(settings)
        self._sent = Sent(may_run=create.may_be_known, in_two_forms=create.may_be_known)
        self._body: Body | None = None
        self._cancelled = asyncio.Event()
        self._was_told = False  # the server, of the cancelling
        self._is_left = False  # nothing more is asked of the server
        self._is_detached = False
        self._fell_back = False  # for this turn, however soon a socket may be tried again
        self.reading = Reading()
        self.was_shown = False
        self.restarts = 0
        self.lost_parent = False
        self.on_restart: Callable[[], None] = _nobody

    def __repr__(self) -> str:
        return f"<Turn {self.reading!r} {self._sent!r} tries={self._tries.count}>"

    async def events(self) -> AsyncGenerator[Event, None]:
        """Every event once and in order, up to the last.

        Raises:
            Refused: the server did not take the create.
            ConnectionLost: the turn cannot be gone on with, or was detached.
            OpenlineError: the create cannot be sent as it is.
        """
        action: Action = LookUp() if self._create.may_be_known else ResendFull()
        while not self._is_over and not isinstance(action, TakeEnd):
            before = self._sent
            try:
                async with aclosing(self._new_events(action)) as events:
                    async for event in events:
                        yield event
                return
            except Broken as broken:
                if broken.started_nothing:
                    self._sent = self._sent._replace(may_run=before.may_run)
                if not self._is_over:
                    action = await self._next(action, broken)
        if isinstance(action, TakeEnd):
            self._take_end()
        else:
            await self._end_early()

    async def cancel(self) -> None:
        """Have the server end the turn; what still comes, comes over `events`.

        A server that knows no cancelling is told by the end of the connection.
        """
        self._cancelled.set()
        await self._tell_cancelled()

    async def leave(self, *, detached: bool) -> None:
        """Give up the line that the events come over, and ask the server nothing more.

        Args:
            detached: the turn may run on.
        """
        self._is_left, self._is_detached = True, detached
        self._cancelled.set()
        if self._attempts.line is not None:
            await self._attempts.line.close()

    # What comes, and how it ends.

    async def _new_events(self, action: Action) -> AsyncGenerator[Event, None]:
        """Carry out an action, and give the events that are new, up to the turn's last.

        Raises:
            Broken: that did not come.
        """
        attempt = self._carry_out(action)
        self._sent = self._sent._replace(may_run=True)
        is_first = True
        async with aclosing(attempt) as events:
            async for event in events:
                if self._take(event, is_first=is_first):
                    yield event
                is_first = False
                if self.reading.final is not None:
                    return
                if self._cancelled.is_set():
                    await self._tell_cancelled()
        raise Broken(What.LINE_ENDED, "the events ended before the turn did")

    def _take(self, event: Event, *, is_first: bool) -> bool:
        """Whether an event is new.

        Args:
            is_first: of its attempt, which an error refuses then.
        """
        if event["type"] == "error":
            refusal = refusal_of_event(event)
            if is_first or refusal.code in _NOT_ITS_END:
                raise Broken(CreateRefused(refusal), started_nothing=is_first)
            self.reading.fail(refusal)  # the SDKs take an error in mid-turn as the turn's end, too
            return True
        try:
            is_new = self.reading.take(event, strict=self._connections.has_extensions is True)
        except OutOfOrder as error:
            raise Broken(What.OUT_OF_ORDER, str(error)) from None
        if is_new:
            self._tries.progress()
        return is_new

    def _take_end(self) -> None:
        """The end without the events before it; a background turn that was cancelled has no other.

        Raises:
            ConnectionLost: events are missing.
        """
        self.reading.take_end()
        if self.reading.final is None or self.reading.final.get("status") != "cancelled":
            raise self._lost("the turn has ended, and its events are no longer held: `response` is how it ended.")

    @property
    def _is_over(self) -> bool:
        """Whether nothing more is to be had: it was cancelled, and no line is there over which its end could come."""
        return self._cancelled.is_set() and self._attempts.line is None

    async def _tell_cancelled(self) -> None:
        line, response_id = self._attempts.line, self.reading.response_id
        if self._was_told or self._is_left or line is None:
            return
        if not self._runs_alone:
            await self.leave(detached=False)
        elif isinstance(line, Socket):
            self._was_told = True
            with suppress(LineClosed):
                await line.cancel(response_id)
        elif response_id is not None:
            self._was_told = True
            await self._cancel_by_id(response_id)

    async def _end_early(self) -> None:
        """It was cancelled, and the line went before its end came; a server that holds the turn still has to be told."""
        if self._is_detached:
            raise self._lost("the stream was left while its turn ran: take it up by its idempotency key.")
        if self._sent.may_run and self._runs_alone and not self._is_left:
            if self.reading.response_id is None and self._connections.has_extensions:
                with suppress(Broken, OutOfOrder):
                    self.reading.found(await self._attempts.look_up())
            if self.reading.response_id is not None:
                await self._cancel_by_id(self.reading.response_id)
        self.reading.take_end()
        self.reading.close_as_cancelled()

    @property
    def _runs_alone(self) -> bool:
        """Whether the turn goes on without this client, so that the end of the connection does not end it."""
        return self._connections.has_extensions is True or self._create.in_background

    async def _cancel_by_id(self, response_id: str) -> None:
        with suppress(Broken, OutOfOrder):
            self.reading.found(await self._attempts.cancel(response_id))

    # What was decided.

    def _carry_out(self, action: Action) -> AsyncGenerator[Event, None]:
        match action:
            case ResendFull(lost_parent, is_second):
                if is_second:
                    self._begin_anew()
                self.lost_parent = self.lost_parent or lost_parent
                self._sent = self._sent._replace(in_two_forms=self._sent.in_two_forms or self._sent.may_run)
                self._body = None
                return self._send(None)
            case ResendSameKey():
                return self._send(None)
            case Resume():
                return self._resume()
            case LookUp():
                return self._look_up()
            case FallBack() | TakeEnd() | GiveUp():
                raise AssertionError("none of them is an attempt")

    def _begin_anew(self) -> None:
        """A second generation: what was seen of the first is void."""
        self.on_restart()
        self.reading = Reading()
        self.was_shown = False
        self.restarts += 1
        self._sent = self._sent._replace(may_run=False, is_trimmed=False)

    def _send(self, after: int | None) -> AsyncGenerator[Event, None]:
        again = self._sent.may_run
        if not self.reading.has_begun:
            self.reading = Reading()  # a response that a look-up found may be gone, and another one come of this
        if self._over() == "websocket":
            return self._attempts.over_socket(self._built, after, again=again)
        return self._attempts.over_http(self._built(None))

    def _over(self) -> Over:
        if self._fell_back:
            return "http"
        return self._connections.over(loops=self._create.loops, in_background=self._create.in_background)

    def _built(self, holds: str | None) -> Body:
        if self._body is None:
            self._body = self._create.body(holds, whole=self.lost_parent)
            self._sent = self._sent._replace(is_whole=self._body.is_whole)
        return self._body

    def _resume(self) -> AsyncGenerator[Event, None]:
        """Over the socket the key attaches to the turn, and makes it the connection's latest; over HTTP its id does."""
        if self._over() == "websocket" and self._body is not None and not self._sent.in_two_forms:
            return self._send(self.reading.after)
        assert self.reading.response_id is not None, "only a response that was seen, or looked up, is resumed"
        return self._attempts.follow(self.reading.response_id, self.reading.after)

    async def _look_up(self) -> AsyncGenerator[Event, None]:
        """What the server has of the key; it gives no events."""
        try:
            self.reading.found(await self._attempts.look_up())
        except OutOfOrder as error:
            raise Broken(What.OUT_OF_ORDER, str(error)) from None
        end = self.reading.end
        if end is not None and end.get("status") == "cancelled":  # of a background turn: no event says so
            self._sent = self._sent._replace(is_trimmed=True)
        raise Broken(What.RUNS_ON if end is None else What.HAS_ENDED)
        yield {}  # an iterator, as the others are

    async def _next(self, action: Action, broken: Broken) -> Action:
        """What to do about what broke; returns when it is time for it.

        Args:
            action: what was tried.

        Raises:
            OpenlineError: nothing can be done.
        """
        broke = broken.broke
        refusal = None if isinstance(broke, What) else broke.refusal
        may_try, may_ask_again = self._tries.next(was_refused=isinstance(broke, CreateRefused))
        await self._note(broken)
        can = Abilities(
            self._connections.has_extensions,
            may_fall_back=self._connections.may_fall_back,
            had_socket=self._connections.had_socket,
            may_restart=self._create.on_lost == "restart",
            in_background=self._create.in_background,
            may_try=may_try,
            may_ask_again=may_ask_again,
        )
        decided = decide(self._sent, Seen(self.reading.has_begun, self.was_shown), broke, can)
        retry_after = refusal.retry_after if refusal is not None else None
        if retry_after is not None and retry_after > self._settings.retry_after_seconds_max:
            decided = GiveUp("refused")
        logger.info("turn %s: %s: %s", self._create.key, broken.words, decided)
        match decided:
            case GiveUp(why):
                raise self._error(why, broken)
            case FallBack():
                self._connections.refuse_socket(None if refusal is None else refusal.status)
                self._fell_back = True
                return action
            case ResendFull(lost_parent=True):
                return decided
            case _:
                await self._pause(retry_after)
                return decided

    async def _note(self, broken: Broken) -> None:
        """What is known from what broke, whatever is done about it."""
        match broken.broke:
            case What.NOT_HELD if self._connections.has_extensions:
                self._sent = self._sent._replace(may_run=False)
                if not self.reading.has_begun:
                    self._sent = self._sent._replace(is_trimmed=False)
            case What.RUNS_ON:
                self._tries.runs_on()
            case What.NOT_READABLE if self.reading.end is not None:
                self._sent = self._sent._replace(is_trimmed=True)  # it has ended, so that will not change
            case What.TOO_BIG if not self.reading.has_begun:
                self._sent = self._sent._replace(may_run=False)  # it was the create
            case CreateRefused(refusal) if refusal.code == "resume_window_exceeded":
                self._sent = self._sent._replace(is_trimmed=True)
            case CreateRefused(refusal) if refusal.code == "websocket_connection_limit_reached":
                await self._connections.drop_socket()
            case _:
                pass

    async def _pause(self, retry_after: float | None) -> None:
        seconds = wait_seconds(self._tries.count, retry_after, self._settings, self._chance)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._cancelled.wait()

    def _error(self, why: Why, broken: Broken) -> OpenlineError:
        if not isinstance(broken.broke, What) and not self._sent.may_run and not self.reading.has_begun:
            return broken.broke.refusal.error()
        return self._lost(f"{broken.words}; {_WHY[why]}.")

    def _lost(self, why: str) -> ConnectionLost:
        return ConnectionLost(
            why,
            idempotency_key=self._create.key,
            response=self.reading.snapshot(),
            may_have_run=self._sent.may_run or self.reading.has_begun,
        )


def _nobody() -> None:
    """Is told of restarts where nobody wants to know."""


class Tries:
    """How often and how long it was tried since something new came.

    Attributes:
        count: how often, so that it is tried less and less often.
    """

    def __init__(self, settings: ClientSettings) -> None:
        self._settings = settings
        self._failed = 0
        self._refused = 0
        self._until: float | None = None
        self.count = 0

    def progress(self) -> None:
        """Something new came."""
        self.count = 0
        self.runs_on()

    def runs_on(self) -> None:
        """The server says that the turn runs: so long it may be asked, as it is the server's to bound how long that is."""
        self._failed, self._refused, self._until = 0, 0, None

    def next(self, *, was_refused: bool) -> tuple[bool, bool]:
        """Count one more: whether it may be tried at all, and whether again after a refusal."""
        now = asyncio.get_running_loop().time()
        if self._until is None:
            self._until = now + self._settings.recovery_seconds_max
        self.count += 1
        self._failed += 1
        self._refused += was_refused
        may_try = self._failed <= self._settings.tries_max and now < self._until
        return may_try, may_try and self._refused <= self._settings.refused_tries_max
