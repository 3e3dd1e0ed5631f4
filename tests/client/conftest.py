"""Servers for the tests of this folder: the real one, as the server's own tests start it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from client.replies import Peer, Replies, Reply
from server.conftest import hand, played, server, start
from server.running import running

__all__ = ["hand", "played", "server", "start"]


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts a server whose engine answers the turns of each conversation so."""
    async with AsyncExitStack() as stack:

        async def start(*replies: Reply, **sections: Any) -> Peer:
            engine = Replies(*replies)
            started = await stack.enter_async_context(running(tmp_path, engine=engine, **sections))
            return Peer(stack, started, engine)

        yield start
