"""Events exactly once and in order, or it is said that it is not so."""

from __future__ import annotations

from pathlib import Path

import pytest

from openline.client.reading import OutOfOrder, Reading
from openline.client.refusal import Refusal
from openline.protocol.transcript import read_lines

TRANSCRIPTS = Path(__file__).parent.parent / "transcripts"


def frames(name="call-then-text"):
    """The events of a transcript's first turn."""
    lines = read_lines((TRANSCRIPTS / f"{name}.jsonl").read_text(encoding="utf-8"))
    events = [line.frame for line in lines if line.dir == "<"]
    end = next(at for at, event in enumerate(events) if event["type"] == "response.completed")
    return events[: end + 1]


EVENTS = frames()


def test_every_event_is_new_once_and_the_end_is_the_response():
    """The folded response is the terminal event's, and before that what the events say so far."""
    reading = Reading()
    for event in EVENTS:
        assert reading.final is None
        assert reading.take(event, strict=True)
    assert reading.final is EVENTS[-1]["response"]
    assert reading.snapshot() is reading.final
    assert reading.after == len(EVENTS) - 1


@pytest.mark.parametrize("cut", range(1, len(EVENTS)))
def test_what_a_replay_repeats_is_dropped(cut):
    """A replay from the first event on gives each event once, wherever the line broke."""
    reading = Reading()
    shown = [event for event in [*EVENTS[:cut], *EVENTS] if reading.take(event, strict=True)]
    assert shown == EVENTS


@pytest.mark.parametrize("strict", [True, False])
def test_a_gap_is_an_error_and_leaves_everything_as_it_was(strict):
    """A missing event is never passed over in silence, and a resume asks for the one that is missing."""
    reading = Reading()
    for event in EVENTS[:4]:
        reading.take(event, strict=strict)
    with pytest.raises(OutOfOrder, match=r"sequence_number 5: expected 4"):
        reading.take(EVENTS[5], strict=strict)
    assert reading.after == 3
    assert reading.take(EVENTS[4], strict=strict)


def test_a_server_with_extensions_numbers_from_zero():
    """The first event of a stream is number 0; another one was missed, or none has a number."""
    with pytest.raises(OutOfOrder, match="expected 0"):
        Reading().take(EVENTS[1], strict=True)
    with pytest.raises(OutOfOrder, match="no sequence_number"):
        Reading().take({"type": "response.created", "response": {"id": "resp_1"}}, strict=True)


def test_another_responses_events_are_an_error():
    """No stream holds two generations without saying so."""
    reading = Reading()
    reading.take(EVENTS[0], strict=True)
    other = {**EVENTS[1], "response": {**EVENTS[1]["response"], "id": "resp_2"}}
    with pytest.raises(OutOfOrder, match=r"resp_2: expected resp_1"):
        reading.take(other, strict=True)


def test_an_event_that_cannot_stand_there_is_an_error_of_a_strict_server_only():
    """Other servers' orders are not ours to judge: the terminal event alone has the response then."""
    start = [EVENTS[0], {**EVENTS[2], "sequence_number": 1}]
    strict, lenient = Reading(), Reading()
    strict.take(start[0], strict=True)
    with pytest.raises(OutOfOrder):
        strict.take(start[1], strict=True)
    for number, event in enumerate([*start, EVENTS[-1]]):
        assert lenient.take({**event, "sequence_number": number}, strict=False)
    assert lenient.final == EVENTS[-1]["response"]


@pytest.mark.parametrize("base", [1, 7])
def test_other_servers_may_count_from_anywhere(base):
    """What counts is that no number is left out."""
    reading = Reading()
    for number, event in enumerate(EVENTS):
        assert reading.take({**event, "sequence_number": number + base}, strict=False)
    assert reading.final is not None


@pytest.mark.parametrize("number", [None, 0])
def test_servers_that_do_not_number_are_understood(number):
    """Numbers left out, or all the same, are no numbers."""
    reading = Reading()
    assert all(reading.take({**event, "sequence_number": number}, strict=False) for event in EVENTS)
    assert reading.final == EVENTS[-1]["response"]


def test_a_repeated_event_of_another_server_is_an_error():
    """Nothing was replayed, so dropping it could drop something new."""
    reading = Reading()
    for event in EVENTS[:5]:
        reading.take(event, strict=False)
    with pytest.raises(OutOfOrder, match="expected 5"):
        reading.take(EVENTS[3], strict=False)


def test_an_error_in_mid_turn_is_its_failure():
    """The SDKs take an `error` event as the end of the running turn."""
    reading = Reading()
    for event in EVENTS[:8]:
        reading.take(event, strict=False)
    reading.fail(Refusal(500, "server_error", "It broke."))
    assert reading.final["status"] == "failed"
    assert reading.final["error"] == {"code": "server_error", "message": "It broke."}
    assert reading.final["id"] == "resp_1"


def test_what_was_cancelled_without_an_end_is_closed_here():
    """Its open items are incomplete, as a server with our extensions would have closed them."""
    reading = Reading()
    reading.close_as_cancelled()
    assert reading.final is None, "nothing had come"
    text = frames("text")
    for event in text[:5]:
        reading.take(event, strict=True)
    reading.close_as_cancelled()
    final = reading.final
    assert final["status"] == "incomplete"
    assert final["incomplete_details"] == {"reason": "cancelled"}
    assert [item["status"] for item in final["output"]] == ["incomplete"]
    assert final["output"][0]["content"][0]["text"] == "Hello "


def test_a_look_up_tells_whether_the_response_has_ended():
    """One that runs gives the id to follow; one that has ended gives the end too; another one is an error."""
    reading = Reading()
    reading.found({"id": "resp_1", "status": "in_progress"})
    assert reading.response_id == "resp_1"
    assert reading.end is None
    assert not reading.has_begun
    reading.found({"id": "resp_1", "status": "completed"})
    reading.take_end()
    assert reading.final == {"id": "resp_1", "status": "completed"}
    reading.take(EVENTS[0], strict=True)
    with pytest.raises(OutOfOrder):
        reading.found({"id": "resp_2", "status": "completed"})


def test_what_a_look_up_found_may_be_gone_when_its_events_are_asked_for():
    """Nothing of it was seen: then another one, which its create has begun meanwhile, is the response."""
    reading = Reading()
    reading.found({"id": "resp_0", "status": "in_progress"})
    assert reading.take(EVENTS[0], strict=True)
    assert reading.response_id == "resp_1"
