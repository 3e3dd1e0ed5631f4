"""The drawn tables in the documentation."""

from __future__ import annotations

import runpy
from pathlib import Path

from openline.protocol.states import LANE, RESPONSE

DOCS = Path(__file__).parents[2] / "docs"


def test_page_is_what_the_script_draws_now():
    """Whoever changes a table runs `python docs/make_state_diagrams.py`."""
    page = runpy.run_path(str(DOCS / "make_state_diagrams.py"))["page"]
    assert (DOCS / "protocol" / "states.md").read_text(encoding="utf-8") == page()


def test_every_transition_is_an_arrow():
    """Nothing of the tables is left out of the drawing."""
    drawn = (DOCS / "protocol" / "states.md").read_text(encoding="utf-8").splitlines()
    arrows = [line for line in drawn if " : " in line]
    assert len(arrows) == sum(len(row) for table in (LANE, RESPONSE) for row in table.values())
