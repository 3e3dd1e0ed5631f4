"""What `previous_response_id` finds: in the connection's memory, in the store, and nowhere else."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing

import pytest

from openline.protocol.deltas import Ended, TextDelta

CANARY = "canary-7f3a9c"
KEYS = {"keys": {"key-a": "a", "key-b": "b"}}


def not_found(response_id: str) -> dict[str, object]:
    """The error object for an id that cannot be continued, whatever the reason.

    Source: WebSocket mode guide, "Error frame".
    """
    return {
        "message": f"Previous response with id '{response_id}' not found.",
        "type": "invalid_request_error",
        "param": "previous_response_id",
        "code": "previous_response_not_found",
    }


async def assert_not_found(server, response_id, **options):
    """The id can be continued neither over a new connection nor over HTTP."""
    async with server.connect(**options) as socket:
        assert (await socket.refused(previous_response_id=response_id))["error"] == not_found(response_id)
        await socket.completed()
    answer = await server.post(previous_response_id=response_id, **options)
    assert (answer.status, answer.json) == (400, {"error": not_found(response_id)})


@pytest.mark.parametrize("response_id", ["resp_nobody_made", "", "resp_" + "0" * 48, "\ud83d", "' OR 1=1 --"])
async def test_an_unknown_parent_is_not_found(server, response_id):
    """An id that nobody was given is `previous_response_not_found`, and the connection goes on."""
    async with server.connect() as socket:
        frame = await socket.refused(previous_response_id=response_id)
        assert frame["error"]["code"] in {"previous_response_not_found", "invalid_json"}
        await socket.completed()


async def test_a_stored_response_is_continued_across_transports(played, hand):
    """`store: true` chains from WebSocket to HTTP and back, with the whole context each time.

    Source: WebSocket mode guide, "Continuing".
    """
    async with played.connect() as socket:
        await socket.create(input="One?")
        (await hand.next_turn()).answer("One.")
        first = (await socket.rest())[-1]["response"]

    posting = asyncio.ensure_future(played.post(input="Two?", previous_response_id=first["id"]))
    turn = await hand.next_turn()
    assert len(turn.input) == 3
    turn.answer("Two.")
    second = (await posting).json
    assert second["previous_response_id"] == first["id"]
    async with played.connect() as socket:
        await socket.create(input="Three?", previous_response_id=second["id"])
        turn = await hand.next_turn()
        assert [b"?" in item for item in turn.input] == [True, False, True, False, True]
        turn.answer("Three.")
        assert (await socket.rest())[-1]["type"] == "response.completed"


async def test_an_unstored_response_dies_with_its_connection(server):
    """`store: false` continues on its own connection and is unknown everywhere else.

    Source: WebSocket mode guide, "Continuing", after a reconnect.
    """
    async with server.connect() as socket:
        first = await socket.completed(store=False)
        await assert_not_found(server, first["id"])
        second = await socket.completed(store=False, previous_response_id=first["id"])
    await assert_not_found(server, second["id"])


async def test_an_unstored_response_over_http_is_not_kept(server):
    """Over HTTP there is no connection's memory: `store: false` can be continued by nobody, not even read."""
    response = (await server.post(store=False)).json
    await assert_not_found(server, response["id"])
    assert (await server.get(f"/v1/responses/{response['id']}")).status == 404


async def test_only_the_latest_response_of_a_lane_is_remembered(server):
    """An older unstored response of the same lane is not found, a stored one comes out of the store.

    Source: WebSocket mode guide, "Continuing": only the latest is promised.
    """
    async with server.connect() as socket:
        for store in (True, False):
            first = await socket.completed(store=store)
            await socket.completed(store=False)
            if store:
                await socket.completed(previous_response_id=first["id"])
            else:
                frame = await socket.refused(previous_response_id=first["id"])
                assert frame["error"] == not_found(first["id"])


async def test_a_failed_continuation_evicts_its_parent(server):
    """A same-lane continuation that is refused takes its unstored parent with it.

    Source: WebSocket mode guide, "Continuing", eviction on failure.
    """
    orphan = [{"type": "function_call_output", "call_id": "call_X", "output": "42"}]
    async with server.connect() as socket:
        first = await socket.completed(store=False)
        await socket.refused(previous_response_id=first["id"], input=orphan)
        assert (await socket.refused(previous_response_id=first["id"]))["error"] == not_found(first["id"])


async def test_a_continuation_of_a_wrong_type_evicts_its_parent(server):
    """The same for a continuation that could not be read: its parent's id could."""
    async with server.connect() as socket:
        first = await socket.completed(store=False)
        await socket.refused(previous_response_id=first["id"], temperature="hot")
        assert (await socket.refused(previous_response_id=first["id"]))["error"] == not_found(first["id"])


async def test_a_failed_generation_evicts_its_parent(played, hand):
    """`response.failed` counts as a failure too, and the failed response cannot be continued either."""
    async with played.connect() as socket:
        await socket.create(store=False)
        (await hand.next_turn()).answer("Fine.")
        first = (await socket.rest())[-1]["response"]
        await socket.create(store=False, previous_response_id=first["id"])
        turn = await hand.next_turn()
        turn.accept()
        turn.refuse()
        failed = (await socket.rest())[-1]["response"]
        assert failed["status"] == "failed"
        for response in (first, failed):
            frame = await socket.refused(previous_response_id=response["id"])
            assert frame["error"] == not_found(response["id"])


async def test_a_failed_fork_leaves_the_shared_parent(server):
    """A fork on another lane that is refused does not take its parent away.

    Source: WebSocket mode guide, "Fork".
    """
    orphan = [{"type": "function_call_output", "call_id": "call_X", "output": "42"}]
    async with server.connect() as socket:
        first = await socket.completed(store=False)
        await socket.refused(stream_id="fork", previous_response_id=first["id"], input=orphan)
        await socket.completed(store=False, previous_response_id=first["id"])


async def test_a_failed_stored_continuation_can_be_retried(server):
    """A stored parent is found in the store again after a failed continuation.

    Source: WebSocket mode guide, "Continuing", eviction on failure.
    """
    async with server.connect() as socket:
        first = await socket.completed()
        await socket.refused(previous_response_id=first["id"], temperature="hot")
        await socket.completed(previous_response_id=first["id"])


async def test_a_failed_stored_response_can_be_read_and_not_continued(played, hand):
    """A failed response with `store: true` is kept for reading; as a parent it is not found."""
    async with played.connect() as socket:
        await socket.create()
        turn = await hand.next_turn()
        turn.accept()
        turn.refuse()
        failed = (await socket.rest())[-1]["response"]
        assert (await played.get(f"/v1/responses/{failed['id']}")).json == failed
        frame = await socket.refused(previous_response_id=failed["id"])
        assert frame["error"] == not_found(failed["id"])


async def test_an_incomplete_response_can_be_continued(played, hand):
    """A response that ran out of tokens is a parent like any other.

    Source: WebSocket mode guide, "Continuing".
    """
    async with played.connect() as socket:
        await socket.create(store=False)
        turn = await hand.next_turn()
        turn.give(TextDelta("One, two,"), Ended("max_output_tokens"))
        turn.end()
        cut = (await socket.rest())[-1]
        assert cut["type"] == "response.incomplete"
        await socket.create(store=False, previous_response_id=cut["response"]["id"], input="Go on.")
        (await hand.next_turn()).answer("three.")
        assert (await socket.rest())[-1]["type"] == "response.completed"


async def test_a_stored_child_of_an_unstored_parent_is_not_continued_elsewhere(server):
    """Its row is readable, but nothing unstored came into the store by it, so elsewhere it is no parent.

    Source: WebSocket mode guide, "Connection-local cache": zero retention.
    """
    async with server.connect() as socket:
        parent = await socket.completed(store=False, input=CANARY)
        child = await socket.completed(previous_response_id=parent["id"])
        grandchild = await socket.completed(previous_response_id=child["id"])
        assert (await server.get(f"/v1/responses/{child['id']}")).status == 200
        await assert_not_found(server, child["id"])
        await assert_not_found(server, grandchild["id"])
        await socket.completed(previous_response_id=grandchild["id"])
    await assert_not_found(server, grandchild["id"])
    assert CANARY.encode() not in server.files()


async def test_a_row_below_an_unstored_ancestor_is_marked(server):
    """The row itself says that it cannot be continued, so no later reading of the store can think otherwise.

    Source: design, "Rules that sketches and experiments taught".
    """
    async with server.connect() as socket:
        root = await socket.completed()
        child = await socket.completed(previous_response_id=root["id"])
        unstored = await socket.completed(previous_response_id=child["id"], store=False)
        below = await socket.completed(previous_response_id=unstored["id"])
        further_below = await socket.completed(previous_response_id=below["id"])
    with closing(sqlite3.connect(server.database)) as connection:
        marks = dict(connection.execute("SELECT response_id, chainable FROM turns").fetchall())
    assert marks == {root["id"]: 1, child["id"]: 1, below["id"]: 0, further_below["id"]: 0}


async def test_a_turn_stores_its_own_items_only(played, hand):
    """A turn without input of its own, as after a warm-up, writes none: its parent's items are not doubled.

    Source: design, "A turn stores its own items and its parent's id, never the history".
    """
    warm = (await played.post(generate=False, input="Context.")).json
    posting = asyncio.ensure_future(played.post(input=[], previous_response_id=warm["id"]))
    (await hand.next_turn()).answer("One.")
    first = (await posting).json
    posting = asyncio.ensure_future(played.post(input="Two?", previous_response_id=first["id"]))
    turn = await hand.next_turn()
    assert [words in item for item, words in zip(turn.input, (b"Context.", b"One.", b"Two?"), strict=True)] == [
        True
    ] * 3
    turn.answer("Two.")
    await posting


async def test_a_child_of_a_deleted_parent_is_not_found(server):
    """Deleting a parent breaks its children's chain.

    Source: Responses API reference, "Delete a response".
    """
    parent = (await server.post()).json
    child = (await server.post(previous_response_id=parent["id"])).json
    deleted = await server.request("DELETE", f"/v1/responses/{parent['id']}")
    assert deleted.json == {"id": parent["id"], "object": "response", "deleted": True}
    await assert_not_found(server, parent["id"])
    await assert_not_found(server, child["id"])


async def test_another_owners_id_is_an_unknown_id(start):
    """Whatever is done with another owner's response, the answer is byte for byte that for an id nobody made.

    Source: guarantees, "Owners".
    """
    server = await start(**KEYS)
    async with server.connect(key="key-a") as socket:
        for store in (True, False):
            theirs = (await socket.completed(store=store))["id"]
            unknown = theirs[:-1] + ("0" if theirs[-1] != "0" else "1")
            await assert_not_found(server, theirs, key="key-b")
            for method, path in [("GET", "/v1/responses/{}"), ("DELETE", "/v1/responses/{}")]:
                got = await server.request(method, path.format(theirs), key="key-b")
                expected = await server.request(method, path.format(unknown), key="key-b")
                assert got.status == expected.status == 404
                assert got.body.replace(theirs.encode(), b"ID") == expected.body.replace(unknown.encode(), b"ID")
        assert (await server.get(f"/v1/responses/{theirs}", key="key-a")).status == 404
    # The other owner's attempts took nothing away.
    async with server.connect(key="key-a") as socket:
        first = await socket.completed()
        await server.request("DELETE", f"/v1/responses/{first['id']}", key="key-b")
        await socket.completed(previous_response_id=first["id"])


async def test_nothing_unstored_is_ever_written(server):
    """No byte of a turn with `store: false` reaches the database or SQLite's files beside it.

    Source: guarantees, "Secrets and zero retention".
    """
    create = {
        "input": CANARY,
        "instructions": f"{CANARY} instructions",
        "metadata": {"note": CANARY},
        "tools": [{"type": "function", "name": "f", "description": CANARY}],
    }
    async with server.connect() as socket:
        parent = await socket.completed(store=False, **create)
        await socket.completed(store=False, previous_response_id=parent["id"], **create)
        await server.post(store=False, **create)
        await server.post(store=False, stream=True, **create)
        kept = await socket.completed(input="This one is kept: marker-4b1d.")
    assert CANARY.encode() not in server.files()
    assert b"marker-4b1d" in server.files()
    assert kept["id"].encode() in server.files()


async def test_completed_is_announced_once_it_can_be_continued(server):
    """A client that saw `response.completed` chains from it at once, over another transport, and finds it.

    Source: WebSocket mode guide, "Turn lifecycle"; design, "Keep, then announce".
    """
    async with server.connect() as socket:
        for _ in range(20):
            last = (await socket.turn())[-1]
            answer = await server.post(previous_response_id=last["response"]["id"])
            assert answer.status == 200, answer.body


async def test_a_stored_response_reads_back_as_it_ended(server):
    """`GET` gives the very object of the terminal event.

    Source: Responses API reference, "Get a response".
    """
    async with server.connect() as socket:
        response = await socket.completed(metadata={"run": "7"})
    answer = await server.get(f"/v1/responses/{response['id']}")
    assert answer.json == response
    assert answer.headers["content-type"] == "application/json"
