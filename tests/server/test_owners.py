"""What one owner made is unknown to every other: on every route and frame, byte for byte, whatever both of them do.

Source: guarantees, "Owners".
"""

from __future__ import annotations

import json
import random
import re

import pytest

from openline.state.sqlite import SqliteStore
from server.background import begin_streamed
from server.two_owners import NAMINGS, OWNERS, World, new_id

KEYS = {"key-a": "a", "key-b": "b"}
BODIES = {
    "/conversations/{conversation_id}": {"metadata": {"a": "b"}},
    "/conversations/{conversation_id}/items": {"items": [{"role": "user", "content": "Hi."}]},
}


async def ask(server, method, path, **options):
    """The answer, without what differs from request to request."""
    answer = await server.request(method, path, **options)
    headers = sorted((name, value) for name, value in answer.headers.items() if name.lower() != "x-request-id")
    return answer.status, headers, answer.body


def filled(path, values):
    """A route's path with these in the place of its parameters."""
    return re.sub(r"\{(\w+)(?::\w+)?\}", lambda match: values[match[1]], path)


@pytest.mark.parametrize("kind", ["ended", "runs"])
async def test_every_route_with_an_id_knows_its_owners_only(start, hand, kind):
    """Each route that the app has, found by asking the app: another owner's id is answered as an id that nobody was given.

    Headers too; and nothing happens to what is there. A route with an id of a new kind fails until it stands here.
    """
    server = await start(engine=hand, keys=KEYS)
    response_id, turn = await begin_streamed(server, hand, "Hi.", key="key-a")
    if kind == "ended":
        turn.finish()
        await server.idle()
    options = {"key": "key-a", "json": {"items": [{"role": "user", "content": "Hi."}]}}
    conversation_id = (await server.request("POST", "/v1/conversations", **options)).json["id"]
    (item,) = (await server.get(f"/v1/conversations/{conversation_id}/items", key="key-a")).json["data"]
    theirs = {"response_id": response_id, "conversation_id": conversation_id, "item_id": item["id"]}
    looks = [f"/v1/responses/{response_id}", f"/v1/conversations/{conversation_id}/items"]
    before = [await ask(server, "GET", path, key="key-a") for path in looks]
    assert {status for status, _, _ in before} == {200}
    unknown = {name: new_id(value.partition("_")[0]) for name, value in theirs.items()}
    tried = 0
    for route in server.app._routes.routes:
        if "{" not in route.path or "model_id" in route.path:
            continue
        for method in route.methods - {"HEAD"}:
            pattern = re.sub(r"^(/openai)?/v1", "", route.path)
            body = {"json": BODIES[pattern]} if method == "POST" and pattern in BODIES else {}
            for query in ("", "?stream=true") if method == "GET" else ("",):
                got = await ask(server, method, filled(route.path, theirs) + query, key="key-b", **body)
                expected = await ask(server, method, filled(route.path, unknown) + query, key="key-b", **body)
                status, headers, text = got
                for name, value in theirs.items():
                    text = text.replace(value.encode(), unknown[name].encode())
                assert (status, headers, text) == expected, (method, route.path)
                assert status == 404
                tried += 1
    assert tried >= 3 * 14, "three prefixes"
    assert [await ask(server, "GET", path, key="key-a") for path in looks] == before
    if kind == "runs":
        turn.finish()
        await server.idle()


async def test_a_cancel_does_not_reach_another_owners_response(start, hand):
    """On a socket nothing answers a cancel; the other's response goes on, in the background and on a socket of its own."""
    server = await start(engine=hand, keys=KEYS)
    response_id, background = await begin_streamed(server, hand, "Hi.", key="key-a")
    async with server.connect(key="key-a") as theirs, server.connect(key="key-b") as socket:
        await theirs.create()
        turn = await hand.next_turn()
        turn.accept()
        (created,) = await theirs.until("response.created")
        for named in (created["response"]["id"], response_id):
            await socket.send(type="response.cancel", response_id=named)
        assert await socket.is_silent()
        for each in (turn, background):
            assert not each.closed.is_set()
            each.answer("Done.")
        assert (await theirs.rest())[-1]["type"] == "response.completed"
        await server.idle()


async def acted(seed, steps):
    """Two owners after so many steps; how often one has named what is the other's."""
    store = SqliteStore(None)
    world = World(store, random.Random(seed))
    try:
        for step in range(steps):
            try:
                await world.step()
            except Exception as error:
                error.add_note(f"seed {seed}, step {step}")
                raise
        told = {owner: len(world.owned[owner].ids) for owner in OWNERS}
    finally:
        await world.close()
        await store.close()
    return world.strange, told


@pytest.mark.parametrize("steps", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
async def test_nothing_leaks_between_two_owners_who_do_anything(steps):
    """Whatever they do, in whatever order: neither is told an id, a word or a trace of the other's, nor changes it.

    Another owner's response, conversation, item, tool call or sealed summary, named on any route, in any field and frame,
    is answered as one that nobody made; and what an owner made it finds as it left it.
    """
    seed = random.SystemRandom().randrange(2**32)
    strange, told = await acted(seed, steps)
    assert strange > steps / 4
    assert min(told.values()) > steps / 10


def test_every_field_that_names_something_is_tried():
    """By each way of sending a create, and by every other request that takes it."""
    bodies = [json.dumps(naming.body) for naming in NAMINGS if naming.body]
    for field in ("previous_response_id", "conversation", "item_reference", "call_id", "encrypted_content"):
        assert sum(field in body for body in bodies) >= 7
