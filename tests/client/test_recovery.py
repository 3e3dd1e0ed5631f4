"""The table of `recovery.decide`: every row, and what holds for all of them."""

from __future__ import annotations

import random
from itertools import product

import pytest

from openline.client.recovery import (
    Abilities,
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
    decide,
    is_load,
    wait_seconds,
)
from openline.client.refusal import Refusal
from openline.client.settings import ClientSettings

NOTHING = Sent()
MAYBE = Sent(may_run=True)
UNSEEN, BEGUN, SHOWN = Seen(), Seen(has_begun=True), Seen(has_begun=True, was_shown=True)
OURS, PLAIN, UNKNOWN = Abilities(True), Abilities(False), Abilities(None)
RESTARTING = Abilities(False, may_restart=True)


def refused(status=400, code=None, **more):
    return CreateRefused(Refusal(status, code, "No.", **more))


def upgrade(status):
    return UpgradeRefused(Refusal(status, None, "No."))


ROWS = {
    # No connection, so nothing of this attempt has left.
    "refused connection, nothing sent yet": (NOTHING, UNSEEN, What.NO_CONNECTION, UNKNOWN, ResendFull()),
    "refused connection, ours, in mid-turn": (MAYBE, SHOWN, What.NO_CONNECTION, OURS, Resume()),
    "refused connection, no tries left": (
        NOTHING,
        UNSEEN,
        What.NO_CONNECTION,
        UNKNOWN._replace(may_try=False),
        GiveUp("unreachable"),
    ),
    "certificate not trusted": (NOTHING, UNSEEN, What.NEVER, UNKNOWN, GiveUp("unreachable")),
    "upgrade broken off, never had a socket": (
        NOTHING,
        UNSEEN,
        What.UPGRADE_BROKEN,
        UNKNOWN._replace(may_fall_back=True),
        FallBack(),
    ),
    "upgrade broken off, had a socket": (
        MAYBE,
        SHOWN,
        What.UPGRADE_BROKEN,
        OURS._replace(may_fall_back=True, had_socket=True),
        Resume(),
    ),
    "upgrade broken off, HTTP not wanted": (NOTHING, UNSEEN, What.UPGRADE_BROKEN, UNKNOWN, ResendFull()),
    # The upgrade was answered.
    "426": (NOTHING, UNSEEN, upgrade(426), UNKNOWN._replace(may_fall_back=True), FallBack()),
    "403, as servers without WebSocket mode answer": (
        NOTHING,
        UNSEEN,
        upgrade(403),
        UNKNOWN._replace(may_fall_back=True),
        FallBack(),
    ),
    "502 before any socket": (NOTHING, UNSEEN, upgrade(502), UNKNOWN._replace(may_fall_back=True), FallBack()),
    "503 of a server that restarts": (
        MAYBE,
        SHOWN,
        upgrade(503),
        OURS._replace(may_fall_back=True, had_socket=True),
        Resume(),
    ),
    "503, HTTP not wanted": (NOTHING, UNSEEN, upgrade(503), UNKNOWN, ResendFull()),
    "401": (NOTHING, UNSEEN, upgrade(401), UNKNOWN._replace(may_fall_back=True), GiveUp("refused")),
    "426, HTTP not wanted": (NOTHING, UNSEEN, upgrade(426), UNKNOWN, GiveUp("refused")),
    # The line ended.
    "idle socket closed before the send": (NOTHING, UNSEEN, What.LINE_ENDED, PLAIN, ResendFull()),
    "ours, sent, nothing seen": (MAYBE, UNSEEN, What.LINE_ENDED, OURS, ResendSameKey()),
    "ours, events seen": (MAYBE, BEGUN, What.LINE_ENDED, OURS, Resume()),
    "ours, silent": (MAYBE, SHOWN, What.SILENT, OURS, Resume()),
    "ours, a gap": (MAYBE, SHOWN, What.OUT_OF_ORDER, OURS, Resume()),
    "ours, read again, and the events end too early": (MAYBE, SHOWN, What.NO_MORE, OURS, LookUp()),
    "ours, run by another process of the server": (MAYBE, SHOWN, What.NOT_READABLE, OURS, LookUp()),
    "ours, no tries left": (MAYBE, SHOWN, What.LINE_ENDED, OURS._replace(may_try=False), GiveUp("tries")),
    "plain, sent, nothing seen": (MAYBE, UNSEEN, What.LINE_ENDED, PLAIN, GiveUp("ambiguous")),
    "plain, events seen": (MAYBE, SHOWN, What.LINE_ENDED, PLAIN, GiveUp("ambiguous")),
    "plain, silent": (MAYBE, UNSEEN, What.SILENT, PLAIN, GiveUp("ambiguous")),
    "plain, a gap": (MAYBE, SHOWN, What.OUT_OF_ORDER, PLAIN, GiveUp("broken")),
    "plain, the app takes a second generation": (
        MAYBE,
        SHOWN,
        What.LINE_ENDED,
        RESTARTING,
        ResendFull(is_second=True),
    ),
    "plain, background, events seen": (MAYBE, SHOWN, What.LINE_ENDED, PLAIN._replace(in_background=True), Resume()),
    "plain, background, read again, and the events end too early": (
        MAYBE,
        SHOWN,
        What.NO_MORE,
        PLAIN._replace(in_background=True),
        GiveUp("broken"),
    ),
    "plain, background, nothing seen": (
        MAYBE,
        UNSEEN,
        What.LINE_ENDED,
        PLAIN._replace(in_background=True),
        GiveUp("ambiguous"),
    ),
    "unknown server, sent, nothing seen": (MAYBE, UNSEEN, What.LINE_ENDED, UNKNOWN, LookUp()),
    "a create too big for the socket": (MAYBE, UNSEEN, What.TOO_BIG, PLAIN._replace(may_fall_back=True), FallBack()),
    "an event too big for us": (MAYBE, SHOWN, What.TOO_BIG, OURS._replace(may_fall_back=True), GiveUp("too_big")),
    # The create was answered by an error.
    "lost parent": (
        NOTHING,
        UNSEEN,
        refused(code="previous_response_not_found"),
        PLAIN,
        ResendFull(lost_parent=True),
    ),
    "lost parent, with everything sent": (
        Sent(is_whole=True),
        UNSEEN,
        refused(code="previous_response_not_found"),
        PLAIN,
        GiveUp("refused"),
    ),
    "the connection's age": (NOTHING, UNSEEN, refused(code="websocket_connection_limit_reached"), PLAIN, ResendFull()),
    "events trimmed, or key not held": (MAYBE, SHOWN, refused(409, "resume_window_exceeded"), OURS, LookUp()),
    "the same, no tries left": (
        MAYBE,
        SHOWN,
        refused(409, "resume_window_exceeded"),
        OURS._replace(may_try=False),
        GiveUp("gone"),
    ),
    "key held with another body of ours": (
        Sent(may_run=True, in_two_forms=True),
        UNSEEN,
        refused(409, "idempotency_key_reused"),
        OURS,
        LookUp(),
    ),
    "key held with somebody else's body": (
        NOTHING,
        UNSEEN,
        refused(409, "idempotency_key_reused"),
        OURS,
        GiveUp("refused"),
    ),
    "key held by another process": (
        MAYBE,
        UNSEEN,
        refused(409, "idempotency_key_in_use", should_retry=False),
        OURS,
        ResendSameKey(),
    ),
    "overloaded": (NOTHING, UNSEEN, refused(503, "server_is_overloaded"), PLAIN, ResendFull()),
    "overloaded, but the turn may run": (MAYBE, SHOWN, refused(503, "server_is_overloaded"), OURS, Resume()),
    "overloaded again and again": (
        NOTHING,
        UNSEEN,
        refused(503),
        PLAIN._replace(may_ask_again=False),
        GiveUp("refused"),
    ),
    "overloaded again and again, and the turn may run": (
        MAYBE,
        SHOWN,
        refused(503),
        OURS._replace(may_ask_again=False),
        Resume(),
    ),
    "out of quota": (NOTHING, UNSEEN, refused(429, "insufficient_quota"), OURS, GiveUp("refused")),
    "a wrong field": (NOTHING, UNSEEN, refused(400, "invalid_value"), OURS, GiveUp("refused")),
    # A look-up was answered.
    "not held, and nothing shown": (MAYBE, BEGUN, What.NOT_HELD, OURS, ResendFull(is_second=True)),
    "not held, and nothing seen": (MAYBE, UNSEEN, What.NOT_HELD, OURS, ResendFull()),
    "not held, and events shown": (MAYBE, SHOWN, What.NOT_HELD, OURS, GiveUp("gone")),
    "not held, shown, the app takes a second generation": (
        MAYBE,
        SHOWN,
        What.NOT_HELD,
        OURS._replace(may_restart=True),
        ResendFull(is_second=True),
    ),
    "the server turns out to be a plain one": (MAYBE, UNSEEN, What.NOT_HELD, PLAIN, GiveUp("ambiguous")),
    "the same, the app takes a second generation": (
        MAYBE,
        UNSEEN,
        What.NOT_HELD,
        RESTARTING,
        ResendFull(is_second=True),
    ),
    "found running": (MAYBE, UNSEEN, What.RUNS_ON, OURS, Resume()),
    "found ended": (MAYBE, UNSEEN, What.HAS_ENDED, OURS, Resume()),
    "found running, events trimmed": (Sent(may_run=True, is_trimmed=True), SHOWN, What.RUNS_ON, OURS, LookUp()),
    "found running, events trimmed, no tries left": (
        Sent(may_run=True, is_trimmed=True),
        SHOWN,
        What.RUNS_ON,
        OURS._replace(may_try=False),
        GiveUp("tries"),
    ),
    "found ended, events trimmed": (Sent(may_run=True, is_trimmed=True), SHOWN, What.HAS_ENDED, OURS, TakeEnd()),
}


@pytest.mark.parametrize(("sent", "seen", "broke", "can", "expected"), ROWS.values(), ids=ROWS)
def test_a_row_of_the_table(sent, seen, broke, can, expected):
    """What was sent, what was seen, what broke and what can be done decide what is done.

    Source: WebSocket mode guide, "Failure matrix"; docs/adr/0013.
    """
    assert decide(sent, seen, broke, can) == expected


def everything():
    """Every combination of what the function is given."""
    refusals = [
        *(refused(code=code) for code in ("previous_response_not_found", "websocket_connection_limit_reached")),
        *(
            refused(409, code)
            for code in ("resume_window_exceeded", "idempotency_key_reused", "idempotency_key_in_use")
        ),
        *(refused(status) for status in (400, 404, 429, 503)),
    ]
    broken = [*What, *refusals, *(upgrade(status) for status in (401, 403, 426, 503))]
    flags = (False, True)
    for sent in (Sent(*each) for each in product(flags, repeat=4)):
        for seen in (UNSEEN, BEGUN, SHOWN):
            for has_extensions in (False, True, None):
                for more in product(flags, repeat=6):
                    can = Abilities(has_extensions, *more)
                    for broke in broken:
                        yield sent, seen, broke, can


def test_no_row_breaks_the_two_rules_or_goes_on_for_ever():
    """A create that may run is sent again only where that starts no second generation, or the app takes one.

    Source: docs/adr/0013.
    """
    for sent, seen, broke, can in everything():
        action = decide(sent, seen, broke, can)
        row = sent, seen, broke, can, action
        was_asked = broke is What.NOT_HELD and can.has_extensions
        match action:
            case ResendFull(lost_parent=True):
                assert not sent.is_whole, row
            case ResendFull(is_second=is_second) if was_asked:
                assert can.may_restart or not seen.was_shown, row
                assert is_second == seen.has_begun, row
            case ResendFull(is_second=is_second) if sent.may_run:
                assert can.may_restart, row
                assert is_second, row
            case ResendSameKey():
                assert can.has_extensions, row
            case Resume() if broke not in {What.RUNS_ON, What.HAS_ENDED}:
                assert can.has_extensions or can.in_background, row
                assert seen.has_begun, row
            case FallBack():
                assert can.may_fall_back, row
            case _:
                pass
        if not can.may_try and not isinstance(broke, CreateRefused):
            # What was just learnt is used; nothing is tried once more.
            learnt = broke in {What.NOT_HELD, What.RUNS_ON, What.HAS_ENDED, What.TOO_BIG}
            assert learnt or isinstance(action, GiveUp | FallBack), row


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (Refusal(429, "rate_limit_exceeded", ""), True),
        (Refusal(429, "insufficient_quota", ""), False),
        (Refusal(500, None, ""), True),
        (Refusal(0, "server_is_overloaded", ""), True),
        (Refusal(409, "conflict", "", should_retry=True), True),
        (Refusal(503, None, "", should_retry=False), False),
        (Refusal(400, None, ""), False),
    ],
)
def test_load_is_what_may_be_taken_later(refusal, expected):
    """Statuses that the OpenAI SDKs repeat, unless `x-should-retry` or the code says otherwise."""
    assert is_load(refusal) is expected


def test_waits_double_at_random_up_to_a_bound_and_the_first_try_waits_for_nothing():
    """Most lines break alone, with a server that is there; the others must not come back all at once."""
    settings = ClientSettings(backoff_seconds=1, backoff_seconds_max=8)
    assert wait_seconds(1, None, settings, random.Random(0)) == 0
    for tries, most in ((2, 1), (3, 2), (4, 4), (5, 8), (6, 8), (500, 8)):
        waits = [wait_seconds(tries, None, settings, random.Random(seed)) for seed in range(200)]
        assert 0.9 * most < max(waits) <= most
        assert min(waits) < 0.1 * most


def test_retry_after_is_the_least_wait():
    """A server that names a time is not asked before it.

    Source: RFC 9110 §10.2.3.
    """
    assert wait_seconds(1, 7.5, ClientSettings(), random.Random(0)) == 7.5
