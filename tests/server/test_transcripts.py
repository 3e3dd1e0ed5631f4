"""Every golden transcript, reproduced by the real server for every kind of client.

The scripted engine plays the recorded events as an upstream's. Ids, times and sequence numbers are the
server's own: the ids and times are hidden behind placeholders, the numbers must come out as recorded.
What has lanes, or frames in the middle of a turn, is played over WebSocket only.
"""

from __future__ import annotations

import pytest

from server.golden import PATHS, TRANSPORTS, Playing, needs_a_socket, record

RUNS = [
    pytest.param(path, transport, id=f"{path.stem}-{transport}")
    for path in PATHS
    for transport in TRANSPORTS
    if transport == "websocket" or not needs_a_socket(path)
]


@pytest.mark.parametrize(("path", "transport"), RUNS)
async def test_server_reproduces_the_transcript(start, request, path, transport):
    """The same creates get the same events over WebSocket and SSE, and their last response as plain JSON.

    Source: WebSocket mode guide, "Server events"; Responses API reference, "Create a response".
    """
    playing = Playing(path)
    server = await start(engine=playing.engine(), limits=playing.limits)
    if transport == "websocket" and request.config.getoption("--record", default=False):
        await record(server, playing)
        return
    for expected, got in await TRANSPORTS[transport](server, playing):
        assert got == expected
