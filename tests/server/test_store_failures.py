"""A store that cannot be used: nothing is said to be kept that is not."""

from __future__ import annotations

import asyncio

import pytest

from openline.state.sqlite import SqliteStore
from openline.state.store import StoreUnavailable


class Failing(SqliteStore):
    """A SQLite store whose disk is full, slow, or cannot be read, when the test says so."""

    def __init__(self, path):
        super().__init__(path)
        self.full = False
        self.unreadable = False
        self.fast = asyncio.Event()
        self.fast.set()

    async def put(self, owner, turn, **more):
        if self.full:
            raise StoreUnavailable("The store is on a full disk.")
        await self.fast.wait()
        await super().put(owner, turn, **more)

    async def chain(self, owner, response_id):
        if self.unreadable:
            raise StoreUnavailable("The store met an I/O error.")
        return await super().chain(owner, response_id)

    async def get(self, owner, response_id):
        if self.unreadable:
            raise StoreUnavailable("The store met an I/O error.")
        return await super().get(owner, response_id)

    async def delete(self, owner, response_id):
        if self.full:
            raise StoreUnavailable("The store is on a full disk.")
        return await super().delete(owner, response_id)


@pytest.fixture
def store(tmp_path):
    return Failing(tmp_path / "openline.db")


async def test_a_turn_that_cannot_be_kept_never_completes(start, store):
    """Without its row a turn with `store: true` fails with a 503-class code, on every transport.

    Source: guarantees, "Database faults".
    """
    server = await start(store=store)
    store.full = True
    async with server.connect() as socket:
        last = (await socket.turn())[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "store_unavailable"
    events = (await server.post(stream=True)).events
    assert events[-1]["type"] == "response.failed"
    answer = await server.post()
    assert (answer.status, answer.json["error"]["code"]) == (503, "store_unavailable")
    assert answer.headers["retry-after"] == "1"


async def test_completed_waits_for_the_store(start, hand, store):
    """While the row is not committed, `response.completed` is not sent; the client's going then changes nothing.

    Source: design, "Keep (cache, store), then announce"; guarantees, "Durability".
    """
    server = await start(engine=hand, store=store)
    store.fast.clear()
    async with server.connect() as socket:
        await socket.create()
        (await hand.next_turn()).answer("Hi.")
        await socket.until("response.output_text.delta")
        assert await socket.is_silent()
        store.fast.set()
        response = (await socket.rest())[-1]["response"]
        assert (await server.get(f"/v1/responses/{response['id']}")).json == response
        store.fast.clear()
        await socket.create()
        (await hand.next_turn()).answer("Hi.")
        created = (await socket.until("response.output_text.delta"))[0]["response"]
    store.fast.set()
    await server.idle()
    assert (await server.get(f"/v1/responses/{created['id']}")).json["status"] == "completed"


async def test_turns_that_need_no_store_are_unharmed(start, store):
    """`store: false` works on a full disk, and its chain with it.

    Source: guarantees, "Database faults".
    """
    server = await start(store=store)
    store.full = store.unreadable = True
    async with server.connect() as socket:
        response = await socket.completed(store=False)
        await socket.completed(store=False, previous_response_id=response["id"])
    assert (await server.post(store=False)).status == 200


async def test_an_unreadable_store_is_not_an_unknown_id(start, store):
    """While the store cannot be read a parent is not "not found": that would make clients resend everything."""
    server = await start(store=store)
    parent = (await server.post()).json
    store.unreadable = True
    async with server.connect() as socket:
        frame = await socket.refused(previous_response_id=parent["id"])
        assert (frame["status"], frame["error"]["code"]) == (503, "store_unavailable")
        assert frame["headers"] == {"retry-after": "1"}
    answer = await server.post(previous_response_id=parent["id"])
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    answer = await server.get(f"/v1/responses/{parent['id']}")
    assert (answer.status, answer.json["error"]["code"]) == (503, "store_unavailable")
    store.full, store.unreadable = True, False
    assert (await server.request("DELETE", f"/v1/responses/{parent['id']}")).status == 503


async def test_the_store_is_used_again_once_it_can_be(start, store):
    """Recovery needs no restart.

    Source: guarantees, "Database faults".
    """
    server = await start(store=store)
    store.full = True
    assert (await server.post()).status == 503
    store.full = False
    response = (await server.post()).json
    assert (await server.post(previous_response_id=response["id"])).status == 200


async def test_without_a_store_a_response_lives_as_long_as_its_connection(start):
    """`--store none`: chaining works on a connection; elsewhere the id is unknown, as `GET` says too."""
    server = await start(store_url="none")
    async with server.connect() as socket:
        response = await socket.completed()
        second = await socket.completed(previous_response_id=response["id"])
    assert (await server.get(f"/v1/responses/{second['id']}")).status == 404
    answer = await server.post(previous_response_id=second["id"])
    assert answer.json["error"]["code"] == "previous_response_not_found"
