"""The settings of a session: every bound has its unit in its name and stands next to the reason for its number."""

from __future__ import annotations

from typing import Literal

import msgspec

OnLost = Literal["raise", "restart"]
Transport = Literal["auto", "websocket", "http"]


class ClientSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a session bounds, and how patient it is.

    Attributes:
        on_lost: what happens to a turn of which nobody can say whether it ran, or that is gone: `raise` ConnectionLost, or
            `restart` it, which may cost a second generation. If events of it were seen before, another
            `response.created` with another id then says that they are void.
        ca_file: a CA bundle to trust instead of the system's.
    """

    on_lost: OnLost = "raise"
    ca_file: str = ""
    # The network.
    connect_seconds_max: float = 10.0
    idle_seconds_max: float = 300.0  # in a turn, between two events; models think for minutes, Codex waits as long
    ping_seconds: float = 20.0  # an unanswered one ends the line after half of it; NATs forget a flow after 60
    cancel_seconds_max: float = 5.0  # for the end of a turn that was cancelled; then its line is given up
    # A connection's age.
    connection_seconds_max: float = 3300.0  # servers end a socket at 60 minutes: OpenAI, and ours
    socket_retry_seconds: float = 600.0  # after a refused socket; one that was refused by 426 is not tried again
    # Recovery: consecutive tries without a new event.
    tries_max: int = 10
    recovery_seconds_max: float = 120.0  # a server restarts, a laptop changes its network
    backoff_seconds: float = 0.25  # doubles with each try but the first, which comes at once
    backoff_seconds_max: float = 15.0
    retry_after_seconds_max: float = 60.0  # who is to wait longer is told so
    refused_tries_max: int = (
        2  # of a create that was refused for load or by an upstream's fault; the OpenAI SDKs' number
    )
    # Memory.
    message_bytes_max: int = 64 * 1024 * 1024  # one event, or one create; our server's own limit
    buffered_bytes_max: int = 8 * 1024 * 1024  # of events that came and were not taken; then the line waits
    history_bytes_max: int = 64 * 1024 * 1024  # what could not be sent in one message could not be sent again

    def __post_init__(self) -> None:
        for field in self.__struct_fields__:
            value = getattr(self, field)
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{field} is {value}: expected more than 0.")
        if self.on_lost not in {"raise", "restart"}:
            raise ValueError(f"on_lost is '{self.on_lost}': expected 'raise' or 'restart'.")
