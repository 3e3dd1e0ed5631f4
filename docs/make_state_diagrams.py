"""Draws `docs/protocol/states.md` from the tables in `openline.protocol.states`.

Run it after a change of a table: `python docs/make_state_diagrams.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path

from openline.protocol.states import LANE, RESPONSE

PAGE = Path(__file__).parent / "protocol" / "states.md"

INTRO = """\
# The two state machines

Drawn by `docs/make_state_diagrams.py` from the tables in `src/openline/protocol/states.py`: an arrow that is not
here is an illegal transition.
"""


def page() -> str:
    """The whole page."""
    lane = "A lane is the queue that a `stream_id` names; the default lane has no name."
    response = "A response is followed by its events; an item event is any event that belongs to an output item."
    return "\n".join([INTRO, *_section("A lane", lane, LANE), "", *_section("A response", response, RESPONSE), ""])


def _section(title: str, text: str, table: Mapping[Enum, Mapping[Enum | str, Enum]]) -> Iterator[str]:
    yield from (f"## {title}", "", text, "", "```mermaid", "stateDiagram-v2")
    yield f"    [*] --> {next(iter(table)).value}"
    for state, row in table.items():
        for event, target in row.items():
            name = event.value if isinstance(event, Enum) else event
            yield f"    {state.value} --> {target.value} : {name}"
        if not row:
            yield f"    {state.value} --> [*]"
    yield "```"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE} is drawn.")
