"""Openline: an open, self-hosted server for the Responses API with WebSocket mode, and a client that survives a bad network."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from openline.client.errors import ConnectionLost, OpenlineError, Refused, ToolOutcomeUnknown, TurnFailed
    from openline.client.history import History
    from openline.client.ledger import Ledger
    from openline.client.run_options import RUN, STOP, Output, Unknown
    from openline.client.run_result import RunResult
    from openline.client.run_tools import run_tools
    from openline.client.session import Session, connect
    from openline.client.settings import ClientSettings
    from openline.client.stream import ResponseStream
    from openline.client.sync import SyncResponseStream, SyncSession, connect_sync
    from openline.client.tools import ToolCall, tool

__version__ = "0.1.0"

__all__ = [
    "RUN",
    "STOP",
    "ClientSettings",
    "ConnectionLost",
    "History",
    "Ledger",
    "OpenlineError",
    "Output",
    "Refused",
    "ResponseStream",
    "RunResult",
    "Session",
    "SyncResponseStream",
    "SyncSession",
    "ToolCall",
    "ToolOutcomeUnknown",
    "TurnFailed",
    "Unknown",
    "connect",
    "connect_sync",
    "run_tools",
    "tool",
]

# Where each name lives; it is imported when it is asked for, so that the server does not load the client (PEP 562).
_HOMES: Final = {
    "RUN": "run_options",
    "STOP": "run_options",
    "ClientSettings": "settings",
    "ConnectionLost": "errors",
    "History": "history",
    "Ledger": "ledger",
    "OpenlineError": "errors",
    "Output": "run_options",
    "Refused": "errors",
    "ResponseStream": "stream",
    "RunResult": "run_result",
    "Session": "session",
    "SyncResponseStream": "sync",
    "SyncSession": "sync",
    "ToolCall": "tools",
    "ToolOutcomeUnknown": "errors",
    "TurnFailed": "errors",
    "Unknown": "run_options",
    "connect": "session",
    "connect_sync": "sync",
    "run_tools": "run_tools",
    "tool": "tools",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'openline' has no attribute '{name}'")
    return getattr(importlib.import_module(f"openline.client.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
