"""What to do when a turn's line has broken: one pure function over what was sent, what was seen, what broke, and what can be done.

Two rules stand above the table. A create whose fate is unknown is sent again only where that cannot start a second
generation, or where the app has said that it may. And no stream ever holds events of two generations, unless the app has said
so and is told where the second begins.

Source: websocket-mode guide, "Failure matrix"; docs/adr/0013.
"""

from __future__ import annotations

import random
from enum import Enum
from typing import Final, Literal, NamedTuple

from openline.client.refusal import Refusal
from openline.client.settings import ClientSettings


class Sent(NamedTuple):
    """What has left of the create.

    Attributes:
        may_run: a create was sent, and neither refused nor seen to end: it may be running.
        is_whole: it brought everything that the session has.
        in_two_forms: it was built more than once, or before this session: the key may be held with another body.
        is_trimmed: the server has not all the events after the last one seen, and will not have them.
    """

    may_run: bool = False
    is_whole: bool = False
    in_two_forms: bool = False
    is_trimmed: bool = False


class Seen(NamedTuple):
    """What has come of the response.

    Attributes:
        has_begun: an event came.
        was_shown: an event was given to the app.
    """

    has_begun: bool = False
    was_shown: bool = False


class Abilities(NamedTuple):
    """What can be done.

    Attributes:
        has_extensions: the server knows idempotency keys and resuming; None while nobody knows.
        may_fall_back: HTTP may stand in for a socket.
        had_socket: one was open before, so what refuses it now is the moment, not the server.
        may_restart: the app takes a second generation.
        in_background: the turn runs without a connection, and its events can be read again, on any server.
        may_try: there are tries and time left.
        may_ask_again: the same for a create that was refused, so that nothing runs.
    """

    has_extensions: bool | None
    may_fall_back: bool = False
    had_socket: bool = False
    may_restart: bool = False
    in_background: bool = False
    may_try: bool = True
    may_ask_again: bool = True


class What(Enum):
    """What broke, where no answer says it."""

    NO_CONNECTION = "no connection came about"
    NEVER = "no connection can come about"  # trying again is in vain
    UPGRADE_BROKEN = "the connection ended before the WebSocket upgrade was answered"
    LINE_ENDED = "the connection ended"
    SILENT = "no event came in time"
    NO_MORE = "the events ended before the turn did"  # of a turn that was read again: as far as the server has them
    NOT_READABLE = (
        "the turn cannot be read again now"  # another process of the server runs it, or nobody kept its events
    )
    OUT_OF_ORDER = "an event is missing, or is out of order"
    NOT_HELD = "the server does not hold the turn"
    TOO_BIG = "a message was too big"  # close code 1009
    RUNS_ON = "the turn still runs"  # says a look-up
    HAS_ENDED = "the turn has ended"  # says a look-up


class UpgradeRefused(NamedTuple):
    """The WebSocket upgrade was answered, but not with 101."""

    refusal: Refusal


class CreateRefused(NamedTuple):
    """The server answered a create with an error."""

    refusal: Refusal


Broke = What | UpgradeRefused | CreateRefused


class Resume(NamedTuple):
    """Attach to the turn, behind the last event that was seen."""


class ResendSameKey(NamedTuple):
    """Send the same create again: the server attaches to the turn of its key, or runs it; it never runs it twice."""


class ResendFull(NamedTuple):
    """Build the create anew, for a connection that holds nothing of the conversation.

    Attributes:
        lost_parent: the server does not know the parent by its id, stored or not.
        is_second: it may be a second generation; what was seen of the first is void.
    """

    lost_parent: bool = False
    is_second: bool = False


class LookUp(NamedTuple):
    """Ask the server what it has of the key; that starts nothing."""


class FallBack(NamedTuple):
    """Use HTTP from now on, and do there what was to be done."""


class TakeEnd(NamedTuple):
    """The events are gone, but the response's end is known: take that."""


Why = Literal["refused", "unreachable", "tries", "ambiguous", "gone", "broken", "too_big"]


class GiveUp(NamedTuple):
    """Tell the app.

    Attributes:
        why: `refused` by the server; `unreachable`; no more `tries`; `ambiguous`, whether the create ran; the turn is `gone`,
            and was seen in part; `broken` by a server that does not keep to the protocol; `too_big`, a message.
    """

    why: Why


Action = Resume | ResendSameKey | ResendFull | LookUp | FallBack | TakeEnd | GiveUp

_LOAD_STATUSES: Final = frozenset({408, 425, 429, 500, 502, 503, 504})  # and those that the OpenAI SDKs repeat
_NOT_LOAD: Final = frozenset({"insufficient_quota", "usage_not_included"})  # 429, and will stay so


def decide(sent: Sent, seen: Seen, broke: Broke, can: Abilities) -> Action:
    """What to do next."""
    match broke:
        case UpgradeRefused(refusal):
            return _upgrade_refused(sent, seen, refusal, can)
        case CreateRefused(refusal):
            return _create_refused(sent, seen, refusal, can)
        case What():
            return _line_broke(sent, seen, broke, can)


def _line_broke(sent: Sent, seen: Seen, what: What, can: Abilities) -> Action:
    match what:
        case What.NEVER:
            return GiveUp("unreachable")
        case What.UPGRADE_BROKEN if can.may_fall_back and not can.had_socket:
            return FallBack()  # some proxies do that to every upgrade
        case What.NO_CONNECTION | What.UPGRADE_BROKEN:
            return go_on(sent, seen, can) if can.may_try else GiveUp("unreachable")
        case What.LINE_ENDED | What.SILENT:
            return go_on(sent, seen, can) if can.may_try else GiveUp("tries")
        case What.OUT_OF_ORDER:  # without a replay it would only come the same way again
            return go_on(sent, seen, can) if can.may_try and can.has_extensions else GiveUp("broken")
        case What.TOO_BIG:
            return FallBack() if can.may_fall_back and not seen.has_begun else GiveUp("too_big")
        case What.NO_MORE | What.NOT_READABLE:
            return LookUp() if can.may_try and can.has_extensions else GiveUp("broken")
        case What.NOT_HELD:
            return _not_held(seen, can)
        case What.RUNS_ON | What.HAS_ENDED:
            return _found(sent, what, can)


def go_on(sent: Sent, seen: Seen, can: Abilities) -> Action:
    """How a turn goes on over a new connection."""
    if not sent.may_run:
        return ResendFull()
    if can.has_extensions is None:
        return LookUp()
    if can.has_extensions:
        return Resume() if seen.has_begun else ResendSameKey()
    if can.in_background and seen.has_begun:
        return Resume()
    return ResendFull(is_second=True) if can.may_restart else GiveUp("ambiguous")


def _upgrade_refused(sent: Sent, seen: Seen, refusal: Refusal, can: Abilities) -> Action:
    if refusal.status == 401:
        return GiveUp("refused")  # HTTP would say the same
    is_of_the_moment = refusal.status in _LOAD_STATUSES and (can.had_socket or not can.may_fall_back)
    if is_of_the_moment and can.may_try:
        return go_on(sent, seen, can)
    if can.may_fall_back and not is_of_the_moment:
        return FallBack()  # also at 403: servers that know no WebSocket answer so
    return GiveUp("refused")


def _create_refused(sent: Sent, seen: Seen, refusal: Refusal, can: Abilities) -> Action:
    match refusal.code:
        case "previous_response_not_found":
            return GiveUp("refused") if sent.is_whole else ResendFull(lost_parent=True)
        case "websocket_connection_limit_reached":
            return go_on(sent, seen, can) if can.may_try else GiveUp("refused")
        case "resume_window_exceeded":
            return LookUp() if can.may_try else GiveUp("gone")
        case "idempotency_key_reused" if sent.in_two_forms and can.may_try:
            return LookUp()
        case "idempotency_key_in_use" if can.may_try:  # its turn runs in another process of the server
            return go_on(sent, seen, can)
        case _ if is_load(refusal) and (can.may_try if sent.may_run else can.may_ask_again):
            return go_on(sent, seen, can)
        case _:
            return GiveUp("refused")


def _not_held(seen: Seen, can: Abilities) -> Action:
    """The server, asked for the key, has nothing of it: nothing runs."""
    if not can.has_extensions:
        return ResendFull(is_second=True) if can.may_restart else GiveUp("ambiguous")
    if not seen.was_shown or can.may_restart:
        return ResendFull(is_second=seen.has_begun)
    return GiveUp("gone")


def _found(sent: Sent, what: What, can: Abilities) -> Action:
    if not sent.is_trimmed:
        return Resume()
    if what is What.HAS_ENDED:
        return TakeEnd()
    return LookUp() if can.may_try else GiveUp("tries")


def is_load(refusal: Refusal) -> bool:
    """Whether the same create may be taken a little later.

    Source: Responses API reference, "Errors"; `x-should-retry` is the OpenAI SDKs' header.
    """
    if refusal.should_retry is not None:
        return refusal.should_retry
    if refusal.code in _NOT_LOAD:
        return False
    return refusal.status in _LOAD_STATUSES or refusal.code == "server_is_overloaded"


def wait_seconds(tries: int, retry_after: float | None, settings: ClientSettings, chance: random.Random) -> float:
    """How long to wait before a try.

    The first comes at once, because most lines break alone and the server is there; the others come at a random moment of a
    span that doubles, so that many clients of a restarted server do not come together.

    Args:
        tries: how many there were since the last progress, this one included.
        retry_after: the least, if the server named one.
    """
    span = settings.backoff_seconds * 2 ** min(tries - 2, 32) if tries > 1 else 0.0
    return max(chance.uniform(0, min(span, settings.backoff_seconds_max)), retry_after or 0.0)
