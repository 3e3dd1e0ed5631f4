"""Servers for the tests of this folder."""

from __future__ import annotations

import gc
import logging
from contextlib import AsyncExitStack

import pytest
import uvicorn

from server.hand import Hand
from server.running import Running, running


def pytest_addoption(parser):
    parser.addoption("--record", action="store_true", help="write tests/transcripts/*.jsonl anew; review the diff")


def pytest_asyncio_loop_factories(config, item):
    """The event loop that the server runs on in production."""
    return {"production": uvicorn.Config("", loop="auto", log_config=None).get_loop_factory()}


@pytest.fixture
async def start(tmp_path):
    """Starts a server with the sections of `make_config`, and an engine or a store of the test's own."""
    async with AsyncExitStack() as stack:

        async def start_one(**options) -> Running:
            return await stack.enter_async_context(running(tmp_path, **options))

        yield start_one


@pytest.fixture
async def server(start):
    """A server as it is without configuration, on a SQLite file, with the scripted engine."""
    return await start()


@pytest.fixture
def hand():
    """An engine that the test plays by hand."""
    return Hand()


@pytest.fixture
async def played(start, hand):
    """A server whose engine is `hand`."""
    return await start(engine=hand)


@pytest.fixture(autouse=True)
def nothing_goes_wrong_unseen(caplog):
    """No test leaves an error in the log: no traceback of the server, no task whose exception nobody took."""
    yield
    gc.collect(1)
    records = [record for phase in ("setup", "call", "teardown") for record in caplog.get_records(phase)]
    errors = [record.getMessage() for record in records if record.levelno >= logging.ERROR]
    assert not errors
