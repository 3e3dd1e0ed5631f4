"""Openline: an open, self-hosted server for the Responses API with WebSocket mode, and a client that survives a bad network."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from openline.client.errors import ConnectionLost, OpenlineError, Refused, ToolOutcomeUnknown, TurnFailed
    from openline.client.history import History
    from openline.client.session import Session, connect
    from openline.client.settings import ClientSettings
    from openline.client.stream import ResponseStream
    from openline.client.sync import SyncResponseStream, SyncSession, connect_sync

__version__ = "0.1.0"

__all__ = [
    "ClientSettings",
    "ConnectionLost",
    "History",
    "OpenlineError",
    "Refused",
    "ResponseStream",
    "Session",
    "SyncResponseStream",
    "SyncSession",
    "ToolOutcomeUnknown",
    "TurnFailed",
    "connect",
    "connect_sync",
]

# Where each name lives; it is imported when it is asked for, so that the server does not load the client (PEP 562).
_HOMES: Final = {
    "ClientSettings": "settings",
    "ConnectionLost": "errors",
    "History": "history",
    "OpenlineError": "errors",
    "Refused": "errors",
    "ResponseStream": "stream",
    "Session": "session",
    "SyncResponseStream": "sync",
    "SyncSession": "sync",
    "ToolOutcomeUnknown": "errors",
    "TurnFailed": "errors",
    "connect": "session",
    "connect_sync": "sync",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'openline' has no attribute '{name}'")
    return getattr(importlib.import_module(f"openline.client.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
