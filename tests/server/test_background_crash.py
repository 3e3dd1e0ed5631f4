"""A server that is killed in the middle of background responses, and started again on the same store.

Source: guarantees, "Durability"; docs/adr/0007.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager

import aiohttp
import pytest

from commands import read_until, running
from server.background import text_of
from server.running import read_sse
from state.stores import place as made_place

COUNT = 200
LEASE_SECONDS = 1
WAIT_SECONDS_MAX = 30
CONFIG = """
[store]
url = "{spec}"

[resume]
lease_seconds = {lease}
seconds = 0.1

[[upstreams]]
kind = "scripted"
delta_seconds = 0.05

[[upstreams]]
name = "slow"
kind = "scripted"
delta_seconds = 60
models = []
aliases = {{ "scripted-slow" = "scripted-text" }}
"""


@pytest.fixture(params=["sqlite file", "postgres"])
async def config(request, tmp_path):
    """The path of a configuration on an empty database."""
    async with made_place(request.param, tmp_path) as place:
        path = tmp_path / "openline.toml"
        path.write_text(CONFIG.format(spec=place.spec, lease=LEASE_SECONDS))
        yield path


class Client:
    """Talks to one process."""

    def __init__(self, session, url):
        self._session = session
        self._url = url

    async def post(self, **body):
        """A create of a background response; its id, once the server has acknowledged it."""
        body = {"model": "scripted-text", "input": "Hello.", "background": True, **body}
        async with self._session.post(self._url, json=body) as answer:
            assert answer.status == 200, await answer.read()
            if body.get("stream"):
                await answer.content.readline()
                return json.loads((await answer.content.readline()).removeprefix(b"data: "))["response"]["id"]
            return (await answer.json())["id"]

    async def get(self, response_id, query=""):
        """The body of an answer, which must be a good one."""
        async with self._session.get(f"{self._url}/{response_id}{query}") as answer:
            body = await answer.read()
            assert answer.status == 200, body
            return body

    async def responses(self, ids):
        """Each of them as it stands."""
        return [json.loads(await self.get(response_id)) for response_id in ids]

    async def ended(self, ids):
        """The same once all of them have ended: polled, as clients do."""
        while True:
            responses = await self.responses(ids)
            if not any(map(is_open, responses)):
                return responses
            await asyncio.sleep(0.05)

    async def cancel(self, response_id):
        """The response, cancelled."""
        async with self._session.post(f"{self._url}/{response_id}/cancel") as answer:
            assert answer.status == 200, await answer.read()
            return await answer.json()


@asynccontextmanager
async def serving(config):
    """A server process and a client of it; it is killed, not stopped."""
    with running("serve", "--config", str(config), "--port", "0", OPENLINE_SEALING_KEY="0" * 64) as process:
        said = await asyncio.to_thread(read_until, process, "supports_websockets")
        url = re.search(r"listens on (\S+/v1)", said)[1] + "/responses"
        timeout = aiohttp.ClientTimeout(total=WAIT_SECONDS_MAX)
        async with aiohttp.ClientSession(timeout=timeout, trust_env=False) as session:
            yield Client(session, url)
            process.kill()
            process.wait()


def is_open(response):
    return response["status"] in {"queued", "in_progress"}


async def test_no_acknowledged_response_is_lost_or_stuck(config):
    """Killed with 200 in the middle: each is there again, finished ones as they were, the others failed after the lease.

    The events of finished streamed ones replay behind every number.
    """
    async with serving(config) as client:
        early = await asyncio.gather(*(client.post(stream=number % 2 == 0) for number in range(COUNT // 2)))
        await client.ended(early[:20])
        slow = [client.post(model="scripted-slow", stream=number % 2 == 0) for number in range(COUNT // 2)]
        late = await asyncio.gather(*slow)
        before = {each["id"]: each for each in await client.responses([*early, *late])}
        streams = {each: await client.get(each, "?stream=true") for each in early[:20:2]}
    assert len(before) == COUNT
    assert sum(map(is_open, before.values())) >= COUNT // 2

    async with serving(config) as client:
        async with asyncio.timeout(LEASE_SECONDS * 2 + 5):
            after = await client.ended(before)
        for response in after:
            seen = before[response["id"]]
            if is_open(seen):
                assert response["status"] in {"failed", "completed"}
            else:
                assert response == seen
            if response["status"] == "failed":
                assert response["error"]["code"] == "server_error"
            else:
                assert text_of(response).startswith("This is the scripted engine")
        assert sum(each["status"] == "failed" for each in after) >= COUNT // 2
        for response_id, body in streams.items():
            assert await client.get(response_id, "?stream=true") == body
        response_id, body = next(iter(streams.items()))
        events = read_sse(body)
        assert events[-1]["response"] == before[response_id]
        for number in range(len(events)):
            rest = read_sse(await client.get(response_id, f"?stream=true&starting_after={number}"))
            assert rest == events[number + 1 :]
        child = await client.post(previous_response_id=response_id)
        assert is_open(json.loads(await client.get(child)))


async def test_a_process_that_lives_keeps_its_turns(config):
    """Two on one store: what one runs is not failed by the other, although it runs for longer than a lease.

    Any of the two says how it stands, and stops it.
    """
    config.write_text(config.read_text().replace("delta_seconds = 0.05", "delta_seconds = 0.15"))
    async with serving(config) as runs, serving(config) as other:
        ends, stopped = [await runs.post() for _ in range(2)]
        assert [each["status"] for each in await other.responses([ends, stopped])] == ["in_progress"] * 2
        assert (await other.cancel(stopped))["status"] == "cancelled"
        await asyncio.wait_for(other.ended([ends]), WAIT_SECONDS_MAX)
        for client in (runs, other):
            assert [each["status"] for each in await client.responses([ends, stopped])] == ["completed", "cancelled"]
