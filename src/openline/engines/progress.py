"""How far an upstream's answer is: what its reader needs to know of what its events mean."""

from __future__ import annotations

from enum import Enum


class Progress(Enum):
    """How far an answer is, as whoever reads its events knows.

    `OPEN`: more of it is to come. `WHOLE`: nothing is missing, but something about it may follow. `OVER`: nothing
    that follows is of interest.
    """

    OPEN = "open"
    WHOLE = "whole"
    OVER = "over"
