"""The conversation of a session, out of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from openline.client.errors import OpenlineError
from openline.client.history import History
from openline.client.run_state import Step
from openline.client.wire import Response


def history_of(steps: Sequence[Step], *, bytes_max: int) -> History:
    """What was said in these steps: turns that came to nothing left out.

    Args:
        steps: a session's, from its first.
        bytes_max: as for `History`.
    """
    history = History(bytes_max=bytes_max)
    for step in steps:
        if step.before is not None:
            _put_back(history, step.before)
        if "previous_response_id" in step.create:
            history.restart(step.create["previous_response_id"])
        if step.status in {"completed", "incomplete"} and step.response is not None:
            is_stored = step.create.get("store") is not False and step.response.get("store") is not False
            history.add(step.create["input"], step.response, is_stored=is_stored)
    return history


def before_of(history: History, known: History) -> dict[str, Any] | None:
    """What a ledger has to keep of a conversation that began, or went on, without it.

    Args:
        history: the session's.
        known: what the ledger has of it.

    Returns:
        None if the ledger has it all.
    """
    if (history.response_id, len(history)) == (known.response_id, len(known)):
        return None
    before: dict[str, Any] = {"response_id": history.response_id, "is_stored": history.is_stored}
    try:
        everything = history.everything()
    except OpenlineError:  # not all of it is here; its last id is all that it can go on by
        return before | {"root": history.response_id, "items": []}
    return before | {"root": everything.root, "items": msgspec.json.decode(b"[%b]" % everything.items)}


def _put_back(history: History, before: dict[str, Any]) -> None:
    history.restart(before["root"])
    turn: Response = {"id": before["response_id"], "output": []}
    history.add(before["items"], turn, is_stored=before["is_stored"])
