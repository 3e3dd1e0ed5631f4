"""The Responses protocol, pure: no I/O, no clock, no randomness, no async."""

from openline.protocol.builder import Builder
from openline.protocol.connection import Connection, Limits
from openline.protocol.errors import ERRORS, ProtocolError
from openline.protocol.fold import Fold
from openline.protocol.states import LANE, RESPONSE, IllegalTransition
from openline.protocol.transcript import Line, read_lines, write_line

__all__ = [
    "ERRORS",
    "LANE",
    "RESPONSE",
    "Builder",
    "Connection",
    "Fold",
    "IllegalTransition",
    "Limits",
    "Line",
    "ProtocolError",
    "read_lines",
    "write_line",
]
