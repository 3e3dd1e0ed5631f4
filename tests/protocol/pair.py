"""Both ends of the event stream, and the words in which the tests speak of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from openline.protocol.builder import Builder
from openline.protocol.deltas import Delta, UpstreamEvent
from openline.protocol.errors import ProtocolError
from openline.protocol.events import Create
from openline.protocol.fold import Event, Fold
from openline.protocol.response import opening_response

NOW = 1_800_000_000


def over_the_wire(value: Any) -> Any:
    """What the other side reads once we have written `value`."""
    return msgspec.json.decode(msgspec.json.encode(value))


def counting_ids() -> Callable[[str], str]:
    """Ids that a test can foresee: `msg_0`, then `fc_1`."""
    made: list[str] = []

    def new_id(prefix: str) -> str:
        made.append(f"{prefix}_{len(made)}")
        return made[-1]

    return new_id


def opening(**fields: Any) -> Event:
    """The response object that a turn opens with."""
    return opening_response(Create(**fields), response_id="resp_1", model="m", created_at=NOW)


class Pair:
    """A server's builder and a client's fold, joined by JSON.

    Every event goes through both, and after each the two must see the same response.
    """

    def __init__(self, response: Event | None = None) -> None:
        self.server = Builder(opening() if response is None else response, counting_ids())
        self.client = Fold()
        self.events: list[Event] = []
        self._carry(self.server.open())

    def _carry(self, events: list[Event]) -> list[Event]:
        received = [over_the_wire(event) for event in events]
        for event in received:
            self.client.apply(event)
        assert over_the_wire(self.client.snapshot()) == over_the_wire(self.server.fold.snapshot())
        self.events += received
        return received

    def send(self, *deltas: Delta) -> list[Event]:
        """The engine said this."""
        return self._carry(self.server.apply(deltas))

    def upstream(self, event_type: str, **fields: Any) -> list[Event]:
        """An upstream that speaks Responses sent this; its numbers and its lane are never ours."""
        return self.send(UpstreamEvent({"type": event_type, "sequence_number": 4711, "stream_id": "theirs", **fields}))

    def finish(self) -> Event:
        """The engine is done; gives the response."""
        return self._carry(self.server.finish(NOW))[-1]["response"]

    def fail(self, code: str = "upstream_error") -> Event:
        """The engine failed; gives the response."""
        return self._carry(self.server.fail(ProtocolError(code, "It broke.")))[-1]["response"]

    @property
    def types(self) -> list[str]:
        """The events' types, without the common prefix."""
        return [event["type"].removeprefix("response.") for event in self.events]

    def one(self, event_type: str) -> Event:
        """The only event of this type."""
        (event,) = (event for event in self.events if event["type"] == f"response.{event_type}")
        return event


def played(*deltas: Delta, response: Event | None = None) -> Pair:
    """A whole turn that says `deltas` and ends well, or as the `Ended` among them says."""
    pair = Pair(response)
    pair.send(*deltas)
    pair.finish()
    return pair


def check_sequence(events: Iterable[Event]) -> None:
    """What holds for every turn: numbers from 0 without gap, one terminal, items and parts properly nested.

    It is written against the wire alone, and shares no code with the builder or the fold.
    """
    events = list(events)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    types = [event["type"] for event in events]
    assert types[:2] == ["response.created", "response.in_progress"]
    ends = {"response.completed", "response.incomplete", "response.failed"}
    assert [kind in ends for kind in types] == [False] * (len(types) - 1) + [True]
    assert len({event["response"]["id"] for event in events if "response" in event}) == 1

    added = [event for event in events if event["type"] == "response.output_item.added"]
    done = [event for event in events if event["type"] == "response.output_item.done"]
    output = events[-1]["response"]["output"]
    assert [event["output_index"] for event in added] == list(range(len(output)))
    assert {event["output_index"]: event["item"] for event in done} == dict(enumerate(output))
    assert len(done) == len(output)
    for event in added:
        _check_item([e for e in events if e.get("output_index") == event["output_index"]])


def _check_item(events: list[Event]) -> None:
    first, *body, last = events
    assert (first["type"], last["type"]) == ("response.output_item.added", "response.output_item.done")
    assert first["item"].get("status", "in_progress") == "in_progress"
    for key in ("id", "type", "call_id", "name"):
        assert first["item"].get(key) == last["item"].get(key)
    named = [event for event in body if not event["type"].startswith("response.shell_call_command.")]  # which name none
    assert {event["item_id"] for event in named} <= {last["item"]["id"]}
    for key, index_key in (("summary", "summary_index"), ("content", "content_index")):
        parts = [event for event in body if index_key in event]
        for index, part in enumerate(last["item"].get(key, [])):
            _check_part([event for event in parts if event[index_key] == index], part)
    call = [event for event in body if event["type"].endswith(CALL_DELTAS)]
    call_done = [event for event in body if event["type"].endswith(CALL_DONES)]
    whole = last["item"].get("arguments", last["item"].get("input"))
    assert len(call_done) <= 1
    assert {event.get("arguments", event.get("input")) for event in call_done} <= {whole}
    if call:
        assert "".join(event["delta"] for event in call) == whole


CALL_DELTAS = ("_call_arguments.delta", "_call_input.delta")
CALL_DONES = ("_call_arguments.done", "_call_input.done")


def _check_part(events: list[Event], part: Event) -> None:
    first, *between, done, last = events
    assert (first["type"], last["type"]) in {
        ("response.content_part.added", "response.content_part.done"),
        ("response.reasoning_summary_part.added", "response.reasoning_summary_part.done"),
    }
    assert first["part"]["type"] == part["type"]
    assert last["part"] == part
    text = part.get("text", part.get("refusal"))
    deltas = [event for event in between if event["type"].endswith(".delta")]
    assert {event["type"].rpartition(".")[2] for event in between} <= {"delta", "added"}
    assert "".join(event["delta"] for event in deltas) == text
    assert done["type"].endswith(("_text.done", "refusal.done"))
    assert done.get("text", done.get("refusal")) == text
