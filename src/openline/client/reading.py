"""What was seen of a response: each event once and in order, or it is said that it is not so.

Pure. The response itself is `protocol.Fold`'s.
"""

from __future__ import annotations

from typing import Final

from openline.client.refusal import Refusal
from openline.client.wire import Event, Item, Response, as_object
from openline.protocol.fold import Fold
from openline.protocol.states import LIFECYCLE_EVENTS, TERMINAL_EVENTS, IllegalTransition

_RUNNING: Final = frozenset({"queued", "in_progress"})


class OutOfOrder(Exception):  # noqa: N818 - what the event is
    """An event that cannot stand here: others are missing before it, or it is another response's."""


class Reading:
    """Takes a response's events, from one connection or from several.

    Attributes:
        after: the last event's `sequence_number`; None if there is none.
        response_id: the response's; None before its first event.
        final: the response as its terminal event has it; None before that.
        end: the response as a look-up found it ended; None before that.
        is_closed_here: no server has told its end.
    """

    def __init__(self) -> None:
        self.after: int | None = None
        self.response_id: str | None = None
        self.final: Response | None = None
        self.end: Response | None = None
        self.is_closed_here = False
        self._count = 0
        self._numbers = True
        self._fold: Fold | None = Fold()
        self._latest: Response | None = None

    def __repr__(self) -> str:
        return f"<Reading {self.response_id} after={self.after} events={self._count}>"

    @property
    def has_begun(self) -> bool:
        """Whether an event was seen."""
        return self._count > 0

    def take(self, event: Event, *, strict: bool) -> bool:
        """Take the next event that came.

        Args:
            strict: the server promises numbers from 0 without a gap, and the order of the streaming reference. Of another
                server an order that our fold does not know is accepted, and then the terminal event alone has the response.

        Returns:
            Whether it is new; one that was seen before, sent again in a replay, is not.

        Raises:
            OutOfOrder: it leaves a gap, is another response's, or cannot stand here.
        """
        response_id = response_id_of(event)
        if self.has_begun and None not in {response_id, self.response_id} and response_id != self.response_id:
            raise OutOfOrder(f"'{event['type']}' is of response {response_id}: expected {self.response_id}.")
        number = self._number(event, strict=strict)
        if number is not None and self.after is not None and number <= self.after:
            return False
        self._apply(event, strict=strict)
        self.after = number if number is not None else self.after
        self.response_id = response_id or self.response_id  # one that a look-up found may be gone, and run again
        self._count += 1
        if response_id is not None:
            self._latest = event["response"]
        if event["type"] in TERMINAL_EVENTS:
            self.final = final = event["response"]
            final.setdefault("status", event["type"].rpartition(".")[2])
        return True

    def fail(self, refusal: Refusal) -> None:
        """The turn has ended in an `error` event: as if it had ended in `response.failed`."""
        error = {"code": refusal.code or "server_error", "message": refusal.message}
        self.final = {**(self.snapshot() or {}), "status": "failed", "error": error}

    def found(self, response: Response) -> None:
        """The response as a look-up has it.

        Raises:
            OutOfOrder: it is another one.
        """
        response_id: object = response.get("id")
        if not isinstance(response_id, str) or (self.has_begun and response_id != self.response_id):
            raise OutOfOrder(f"the server has response {response_id} under the key: expected {self.response_id}.")
        self.response_id = response_id
        self._latest = response
        self.end = None if response.get("status") in _RUNNING else response

    def take_end(self) -> None:
        """The events up to the response's end are lost: what a look-up found of it is what there is."""
        self.final = self.final or self.end

    def close_as_cancelled(self) -> None:
        """The turn was cancelled, and its end did not come: what there is of it is how it ended."""
        response = self.snapshot()
        if self.final is None and response is not None:
            output = [_cut(item) for item in response.get("output") or ()]
            details = {"reason": "cancelled"}
            self.final = {**response, "status": "incomplete", "incomplete_details": details, "output": output}
            self.is_closed_here = True

    def snapshot(self) -> Response | None:
        """The response as far as it was seen; None if nothing was."""
        if self.final is not None or self._fold is None or not self.has_begun:
            return self.final or self._latest
        return self._fold.snapshot()

    def _number(self, event: Event, *, strict: bool) -> int | None:
        """The event's number, checked; None where the server does not number."""
        number: object = event.get("sequence_number")
        if not isinstance(number, int) or not self._numbers:
            if strict:
                raise OutOfOrder(f"'{event['type']}' has no sequence_number.")
            self._numbers = False
            return None
        expected = number if self._count == 0 and not strict else 0 if self.after is None else self.after + 1
        if number < expected and not strict and self._count == 1:
            self._numbers = False  # the same number twice from the start: these are none
            return None
        if number > expected or (number < expected and not strict):
            raise OutOfOrder(f"'{event['type']}' has sequence_number {number}: expected {expected}.")
        return number

    def _apply(self, event: Event, *, strict: bool) -> None:
        if event["type"] in TERMINAL_EVENTS and not isinstance(event.get("response"), dict):
            raise OutOfOrder(f"'{event['type']}' has no response.")
        if self._fold is None:
            return
        if event.get("sequence_number") != self._count:
            event = {**event, "sequence_number": self._count}
        try:
            self._fold.apply(event)
        except (IllegalTransition, LookupError, TypeError, AttributeError) as error:
            if strict:
                raise OutOfOrder(str(error)) from None
            self._fold = None


def response_id_of(event: Event) -> str | None:
    """The id of the response that an event brings; None if it brings none."""
    if event["type"] not in LIFECYCLE_EVENTS or (response := as_object(event.get("response"))) is None:
        return None
    found: object = response.get("id")
    return found if isinstance(found, str) else None


def _cut(item: Item) -> Item:
    return {**item, "status": "incomplete"} if item.get("status") == "in_progress" else item
