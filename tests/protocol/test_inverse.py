"""Builder and fold are inverse, and both mean what the deltas mean."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.deltas import Ended
from openline.protocol.fold import Fold
from protocol.meaning import batches, delta_sequences, heard, meaning
from protocol.pair import Pair, check_sequence, over_the_wire

_ends = st.sampled_from(["completed", "max_output_tokens", "content_filter", "cancelled", "failed"])


def run(said, end):
    """A turn of these batches that ends so; gives both sides, the events and the final response."""
    pair = Pair()
    for batch in said:
        pair.send(*batch)
    if end not in {"completed", "failed"}:
        pair.send(Ended(end))
    response = pair.fail() if end == "failed" else pair.finish()
    return pair, response


@given(batches(), _ends)
def test_folding_the_events_gives_the_response(said, end):
    """fold(build(deltas)) is the terminal response, and at every event the two agree (a response is a fold)."""
    pair, response = run(said, end)
    assert pair.client.snapshot() == response
    assert pair.client.ended


@given(batches(), _ends)
def test_items_alone_make_the_terminals_output(said, end):
    """Codex builds its next input from the items' events, not from the terminal (WebSocket mode guide, "Turn lifecycle")."""
    pair, response = run(said, end)
    assert over_the_wire(pair.client.output()) == response["output"]
    done = [event["item"] for event in pair.events if event["type"] == "response.output_item.done"]
    assert done == response["output"]


@given(batches(), _ends)
def test_response_means_what_was_said(said, end):
    """Nothing is added, lost or reordered, however the deltas were sliced."""
    _, response = run(said, end)
    assert heard(response["output"]) == meaning([delta for batch in said for delta in batch])


@given(batches(), _ends)
def test_only_what_was_cut_is_incomplete(said, end):
    """An incomplete item is the last one, and then the response is incomplete too (Streaming reference, "Event order")."""
    _, response = run(said, end)
    *before, last = ["completed", *[item["status"] for item in response["output"]]]
    assert set(before) <= {"completed"}
    assert last == ("incomplete" if before and end != "completed" else "completed")
    assert response["status"] == (end if end in {"completed", "failed"} else "incomplete")


@given(batches(), _ends)
def test_every_sequence_is_well_formed(said, end):
    """Gapless numbers, one terminal, items and parts nested, texts equal in every place (Streaming reference, "Event order")."""
    pair, _ = run(said, end)
    check_sequence(pair.events)


@given(delta_sequences())
def test_slicing_makes_no_difference(said):
    """One delta at a time gives the same events as all at once."""
    whole, _ = run([said], "completed")
    single, _ = run([[delta] for delta in said], "completed")
    assert whole.events == single.events


@given(delta_sequences())
def test_snapshot_is_what_was_said_so_far(said):
    """At any moment the snapshot is the prefix of the end (a keepalive shows it to an accumulator)."""
    pair = Pair()
    for count, delta in enumerate(said, start=1):
        pair.send(delta)
        snapshot = pair.server.fold.snapshot()
        assert heard(snapshot["output"]) == meaning(said[:count])
        assert snapshot["status"] == "in_progress"


@given(delta_sequences())
def test_earlier_snapshot_does_not_change(said):
    """A snapshot is a value, whoever holds it while the turn goes on."""
    pair = Pair()
    taken = []
    for delta in said:
        pair.send(delta)
        snapshot = pair.server.fold.snapshot()
        taken.append((snapshot, over_the_wire(snapshot)))
    pair.finish()
    for snapshot, at_the_time in taken:
        assert over_the_wire(snapshot) == at_the_time


@given(batches(), _ends, st.data())
def test_fold_refuses_a_lost_or_doubled_event(said, end, data):
    """The numbers show any gap (Streaming reference, "Event order")."""
    pair, _ = run(said, end)
    place = data.draw(st.integers(0, len(pair.events) - 2))
    lost = pair.events[:place] + pair.events[place + 1 :]
    doubled = pair.events[: place + 1] + pair.events[place:]
    assert not _folds(lost)
    assert not _folds(doubled)


def _folds(events):
    from openline.protocol.states import IllegalTransition

    fold = Fold()
    try:
        for event in events:
            fold.apply(event)
    except IllegalTransition:
        return False
    return True
