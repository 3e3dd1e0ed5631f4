"""Idempotency keys: one turn for one key, however often and over whatever connection its create comes.

Source: docs/adr/0009; guarantees, "Idempotent turns".
"""

from __future__ import annotations

import asyncio

import pytest

from openline.protocol.deltas import CallDelta, CallStarted, TextDelta
from server.background import cancel, delete, path_of, replay
from server.closing import GOING_AWAY, blocked_client, until_closed
from server.late import KERNEL_BYTES, SlowStore, stingy_connection
from server.running import Running, Socket, until
from server.watching import types, watched

KEY = "key-1"


async def keyed(server: Running, transport: str, **fields):
    """A create with a key over a transport: its final response, or its error."""
    fields = {"idempotency_key": KEY, **fields}
    if transport == "websocket":
        async with server.connect() as socket:
            last = (await socket.turn(**fields))[-1]
        return last.get("response") or last["error"]
    answer = await server.post(**fields, stream=transport == "sse")
    if answer.status != 200:
        return answer.json["error"]
    return answer.json if transport == "json" else answer.events[-1]["response"]


TRANSPORTS = ["websocket", "sse", "json"]
over = pytest.mark.parametrize("transport", TRANSPORTS)
stored = pytest.mark.parametrize("stores", [True, False], ids=["stored", "unstored"])


@over
@stored
async def test_the_same_key_and_body_is_the_same_response(played, hand, transport, stores):
    """A finished turn is given again, over every transport, and generated once."""
    asked = asyncio.ensure_future(keyed(played, transport, store=stores))
    (await hand.next_turn()).answer("Once.")
    first = await asked
    assert first["status"] == "completed", first
    for again in TRANSPORTS:
        assert await keyed(played, again, store=stores) == first
    assert hand.is_idle


@over
async def test_a_second_create_reads_the_turn_that_runs(played, hand, transport):
    """The same key and body while the turn runs is one more reader of it, from its first event on."""
    asked = [asyncio.ensure_future(keyed(played, each)) for each in (transport, *TRANSPORTS)]
    turn = await hand.next_turn()
    turn.give(TextDelta("One "))
    log = played.registry.held.of_key("local", KEY).log
    await until(lambda: f"readers={len(asked)}" in repr(log))
    turn.answer("two.")
    first, *rest = await asyncio.gather(*asked)
    assert first["output"][0]["content"][0]["text"] == "One two."
    assert rest == [first] * len(rest)
    assert hand.is_idle


# --- Refusals


async def refusal(server: Running, transport: str, **fields):
    """A create's refusal: its status and its error. The connection goes on; over HTTP it is not to be repeated."""
    fields = {"idempotency_key": KEY, **fields}
    if transport == "websocket":
        async with server.connect() as socket:
            frame = await socket.refused(**fields)
            assert await socket.refused(model=None) is not None
        return frame["status"], frame["error"]
    answer = await server.post(**fields, stream=transport == "sse")
    if answer.status == 409:
        assert answer.headers["x-should-retry"] == "false"
    return answer.status, answer.json["error"]


async def finish(server: Running, hand, **fields):
    """A turn with the key, which has ended."""
    asked = asyncio.ensure_future(keyed(server, "sse", **fields))
    (await hand.next_turn()).answer("Once.")
    return await asked


@over
@stored
async def test_another_body_is_refused(played, hand, transport, stores):
    """409 with a stable code, and the field; the first turn stays as it is."""
    first = await finish(played, hand, store=stores)
    status, error = await refusal(played, transport, store=stores, input="Goodbye.")
    assert (status, error["code"], error["param"]) == (409, "idempotency_key_reused", "idempotency_key")
    assert await keyed(played, transport, store=stores) == first
    assert hand.is_idle


@over
@pytest.mark.parametrize("stores", [True, False, None], ids=["stored", "unstored", "by default"])
async def test_the_rest_of_an_unknown_turn_is_refused(played, hand, transport, stores):
    """409 and no generation, so that a client learns for sure that nothing is held (guarantees, "Resume")."""
    fields = {} if stores is None else {"store": stores}
    for after in (0, 5, 10**18):
        status, error = await refusal(played, transport, starting_after=after, **fields)
        assert (status, error["code"], error["param"]) == (409, "resume_window_exceeded", "starting_after")
    assert hand.is_idle
    await played.idle()
    assert len(played.registry.held._turns) == 0


@over
async def test_the_rest_of_a_trimmed_turn_is_refused(start, hand, transport):
    """Explicitly, and without a second generation; a plain answer has no events to miss (guarantees, "Resume")."""
    server = await start(engine=hand, resume={"bytes_max": 4000})
    asked = asyncio.ensure_future(keyed(server, "sse", store=False))
    turn = await hand.next_turn()
    for _ in range(10):
        turn.asked.clear()
        turn.give(TextDelta("x" * 1000))
        await turn.asked.wait()
    turn.finish()
    response = await asked
    await server.idle()
    for after in (None, 1):
        fields = {"store": False} if after is None else {"store": False, "starting_after": after}
        if transport == "json":
            assert await keyed(server, "json", **fields) == response
        else:
            status, error = await refusal(server, transport, **fields)
            assert (status, error["code"]) == (409, "resume_window_exceeded")
    assert hand.is_idle


@over
async def test_a_key_that_cannot_be_read_is_refused(played, hand, transport):
    """It never takes a place: 400 with the field."""
    for fields, param in (
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": None, "starting_after": 1}, "starting_after"),
        ({"starting_after": -1}, "starting_after"),
    ):
        status, error = await refusal(played, transport, **fields)
        assert (status, error["code"], error["param"]) == (400, "invalid_value", param)
    assert hand.is_idle


@over
async def test_a_refused_create_lets_go_of_its_key(played, hand, transport):
    """What was wrong can be put right, and sent with the same key."""
    status, error = await refusal(played, transport, previous_response_id="resp_nobody")
    assert (status, error["code"]) == (400, "previous_response_not_found")
    asked = asyncio.ensure_future(keyed(played, transport))
    (await hand.next_turn()).refuse(headers={"retry-after": "7"})
    assert (await asked)["code"] == "rate_limit_exceeded"
    await finish(played, hand)


async def test_a_refusal_for_its_key_leaves_the_lanes_parent(played, hand):
    """Nothing was tried, so nothing has failed: the conversation goes on from where it was."""
    await finish(played, hand)
    async with played.connect() as socket:
        await socket.create(store=False)
        (await hand.next_turn()).answer("Yes.")
        parent = (await socket.rest())[-1]["response"]["id"]
        for wrong in ({"input": "Other."}, {"idempotency_key": "unknown", "starting_after": 3}):
            fields = {"idempotency_key": KEY, "previous_response_id": parent, "store": False, **wrong}
            assert (await socket.refused(**fields))["status"] == 409
        await socket.create(store=False, previous_response_id=parent)
        (await hand.next_turn()).answer("Still here.")
        assert types(await socket.rest())[-1] == "completed"


# --- Over HTTP


async def test_the_header_is_the_field(played, hand):
    """`Idempotency-Key` and `idempotency_key` are one; two that differ are refused."""
    header = {"Idempotency-Key": KEY}
    body = {"model": "m", "input": "Hello."}
    asked = asyncio.ensure_future(played.request("POST", "/v1/responses", json=body, headers=header))
    (await hand.next_turn()).answer("Once.")
    first = (await asked).json
    for fields, headers in (({"idempotency_key": KEY}, {}), ({"idempotency_key": KEY}, header), ({}, header)):
        again = await played.request("POST", "/v1/responses", json={**body, **fields}, headers=headers)
        assert again.json == first
    wrong = await played.request("POST", "/v1/responses", json={**body, "idempotency_key": "other"}, headers=header)
    assert (wrong.status, wrong.json["error"]["param"]) == (400, "idempotency_key")
    async with played.connect() as socket:  # whose body is the same but for how it travels
        frames = await socket.turn(**body, idempotency_key=KEY, stream_id="a", stream=True)
    assert frames[-1]["response"] == first
    assert hand.is_idle


async def test_a_plain_answer_has_the_real_status_again_and_again(played, hand):
    """Where another client has seen the response fail, the plain one's error is the same each time."""
    plain = [asyncio.ensure_future(played.post(idempotency_key=KEY)) for _ in range(2)]
    turn = await hand.next_turn()
    streaming = asyncio.ensure_future(played.post(idempotency_key=KEY, stream=True))
    await until(lambda: "readers=3" in repr(played.registry.held.of_key("local", KEY).log))
    turn.give(TextDelta("One "))
    turn.refuse(headers={"retry-after": "7"})
    assert (await streaming).events[-1]["type"] == "response.failed"
    answers = [await each for each in plain]
    answers.append(await played.post(idempotency_key=KEY))
    assert [(each.status, each.json["error"]["code"]) for each in answers] == [(429, "rate_limit_exceeded")] * 3
    assert answers[0].headers["retry-after"] == "7"
    played.registry.held.close()
    again = await played.post(idempotency_key=KEY)  # from the store
    assert (again.status, again.json) == (429, answers[0].json)


async def test_a_response_is_found_by_its_key(played, hand):
    """As it stands: not before there is one, while it runs, and when it has ended, from memory and from the store."""
    path = f"/v1/responses?idempotency_key={KEY}"
    assert (await played.get(path)).status == 404
    async with played.connect() as socket:
        await socket.create(idempotency_key=KEY)
        turn = await hand.next_turn()
        assert (await played.get(path)).status == 404
        turn.give(TextDelta("One "))
        created = (await socket.until("response.output_text.delta"))[0]["response"]
        running = (await played.get(path)).json
        assert (running["id"], running["status"]) == (created["id"], "in_progress")
        assert running["output"][0]["content"][0]["text"] == "One "
        turn.finish()
        final = (await socket.rest())[-1]["response"]
    assert (await played.get(path)).json == final
    played.registry.held.close()
    assert (await played.get(path)).json == final
    assert (await played.get(f"/v1/responses?idempotency_key={KEY}2")).status == 404


async def test_without_a_key_there_is_no_list(played):
    """405, as before, whatever else is asked for (WebSocket mode guide, "Disagreements and silences", row 19)."""
    for path in ("/v1/responses", "/responses?limit=3", "/openai/v1/responses?api-version=1"):
        answer = await played.get(path)
        assert (answer.status, answer.headers["allow"]) == (405, "POST")


async def test_a_plain_answer_that_was_looked_up_fails_as_a_response(played, hand):
    """Somebody knows its id: then it does not vanish, and its key stays with it."""
    asked = asyncio.ensure_future(played.post(idempotency_key=KEY))
    turn = await hand.next_turn()
    turn.give(TextDelta("One "))
    await until(lambda: played.registry.held.of_key("local", KEY).is_known)
    seen = (await played.get(f"/v1/responses?idempotency_key={KEY}")).json
    turn.refuse()
    assert (await asked).status == 429
    assert (await played.get(path_of(seen["id"]))).json["status"] == "failed"


@stored
async def test_a_turn_with_a_key_is_read_again_by_its_id(played, hand, stores):
    """The standard way: `GET /v1/responses/{id}?stream=true&starting_after=N`, of held and of stored ones."""
    asked = asyncio.ensure_future(played.post(idempotency_key=KEY, stream=True, store=stores))
    (await hand.next_turn()).answer("Once.")
    events = (await asked).events
    response_id = events[0]["response"]["id"]
    for _ in range(1 + stores):
        for after in (None, 0, 5, len(events) - 1):
            expected = events if after is None else events[after + 1 :]
            assert (await replay(played, response_id, after)).events == expected
        assert (await played.get(path_of(response_id))).json == events[-1]["response"]
        listed = (await played.get(f"/v1/responses/{response_id}/input_items")).json
        assert listed["data"][0]["content"] == [{"type": "input_text", "text": "Hello."}]
        played.registry.held.close()
    if not stores:
        assert (await played.get(path_of(response_id))).status == 404


@stored
async def test_a_deleted_response_frees_its_key(played, hand, stores):
    """Running or ended: the next create with it runs, with another body too."""
    first = await finish(played, hand, store=stores)
    assert (await delete(played, first["id"])).status == 200
    async with played.connect() as socket:
        await socket.create(idempotency_key=KEY, store=stores, input="Goodbye.")
        turn = await hand.next_turn()
        turn.give(TextDelta("One "))
        response_id = (await socket.until("response.output_text.delta"))[0]["response"]["id"]
        assert (await delete(played, response_id)).status == 200
        assert types(await socket.rest())[-1] == "incomplete"
    await finish(played, hand, store=stores)


async def test_a_turn_that_nobody_reads_can_be_cancelled(played, hand):
    """By its id, over HTTP: its client may have nothing but that."""
    async with played.connect() as socket:
        await socket.create(idempotency_key=KEY)
        turn = await hand.next_turn()
        turn.give(TextDelta("One "))
        response_id = (await socket.until("response.output_text.delta"))[0]["response"]["id"]
    answer = await cancel(played, response_id)
    assert turn.closed.is_set()
    assert (answer.status, answer.json["status"]) == (200, "incomplete")
    assert answer.json["incomplete_details"] == {"reason": "cancelled"}
    assert (await keyed(played, "websocket"))["status"] == "incomplete"


@pytest.mark.parametrize("transport", ["sse", "json"])
async def test_a_background_response_may_have_a_key(played, hand, transport):
    """A second create gets the response as it stands, or all its events; it runs once (Background mode guide)."""
    queued = (await played.post(idempotency_key=KEY, background=True)).json
    assert queued["status"] == "queued"
    turn = await hand.next_turn()
    turn.give(TextDelta("One "))
    await until(lambda: len(played.registry.held.of_key("local", KEY).log) > 5)
    asked = asyncio.ensure_future(played.post(idempotency_key=KEY, background=True, stream=transport == "sse"))
    if transport == "json":
        running = (await asked).json
        assert (running["id"], running["status"]) == (queued["id"], "in_progress")
    turn.finish()
    await played.idle()
    final = (await played.get(path_of(queued["id"]))).json
    assert final["status"] == "completed"
    if transport == "sse":
        assert (await asked).events[-1]["response"] == final
    for _ in range(2):
        assert (await played.post(idempotency_key=KEY, background=True)).json == final
        played.registry.held.close()
    assert hand.is_idle


# --- Whose


@over
async def test_another_owners_key_is_an_unknown_key(start, hand, transport):
    """By every way to it, and byte for byte; each owner may use it for a create of its own (guarantees, "Owners")."""
    server = await start(engine=hand, keys={"key-a": "a", "key-b": "b"})
    asked = asyncio.ensure_future(server.post(key="key-a", idempotency_key=KEY))
    (await hand.next_turn()).answer("Mine.")
    mine = (await asked).json
    looked_up = [await server.get(f"/v1/responses?idempotency_key={key}", key="key-b") for key in (KEY, "key-9")]
    assert [each.status for each in looked_up] == [404, 404]
    assert looked_up[0].body.replace(KEY.encode(), b"key-9") == looked_up[1].body
    for key in (KEY, "key-9"):
        error = await of_owner(server, transport, "key-b", idempotency_key=key, starting_after=2)
        assert (error["code"], error["message"].count(key)) == ("resume_window_exceeded", 1)
    asked = asyncio.ensure_future(of_owner(server, transport, "key-b", idempotency_key=KEY, input="Other."))
    (await hand.next_turn()).answer("Theirs.")
    theirs = await asked
    assert theirs["id"] != mine["id"]
    assert (await server.get(f"/v1/responses?idempotency_key={KEY}", key="key-a")).json == mine


async def of_owner(server, transport, key, **fields):
    if transport == "websocket":
        async with server.connect(key=key) as socket:
            last = (await socket.turn(**fields))[-1]
        return last.get("response") or last["error"]
    answer = await server.post(key=key, stream=transport == "sse", **fields)
    if answer.status != 200:
        return answer.json["error"]
    return answer.json if transport == "json" else answer.events[-1]["response"]


# --- Connections that end


async def cut_off(played, hand, *said, **fields):
    """A turn with the key whose socket is gone: the last number that its client has seen, and its engine."""
    async with played.connect() as socket:
        await socket.create(idempotency_key=KEY, store=False, **fields)
        turn = await hand.next_turn()
        turn.give(*said)
        events = await socket.until("response.output_text.delta")
    held = played.registry.held.of_key("local", KEY)
    await until(lambda: "readers=0" in repr(held.log))
    return events, turn


async def resume(socket: Socket, after: int, **fields):
    await socket.create(idempotency_key=KEY, store=False, starting_after=after, **fields)


async def test_the_chain_goes_on_on_the_new_connection(played, hand):
    """With `store: false` too: the turn is its lane's latest there, before its end is read (docs/adr/0009)."""
    events, turn = await cut_off(played, hand, TextDelta("One "))
    async with played.connect() as socket:
        await resume(socket, events[-1]["sequence_number"], stream_id="a")
        turn.finish(TextDelta("two."))
        rest = await socket.rest()
        assert [event["sequence_number"] for event in events + rest] == list(range(len(events + rest)))
        assert {event["stream_id"] for event in rest} == {"a"}
        response = rest[-1]["response"]
        assert response["id"] == events[0]["response"]["id"]
        await socket.create(input="Go on.", store=False, previous_response_id=response["id"])
        turn = await hand.next_turn()
        assert len(turn.input) == 3
        turn.answer("Yes.")
        assert types(await socket.rest())[-1] == "completed"
    async with played.connect() as other:
        error = await other.refused(previous_response_id=response["id"], store=False)
        assert error["error"]["code"] == "previous_response_not_found"


async def test_the_end_can_be_read_again_to_go_on_from_it(played, hand):
    """A client that had seen all, and whose socket was cut between two turns."""
    async with played.connect() as socket:
        await socket.create(idempotency_key=KEY, store=False)
        (await hand.next_turn()).answer("Hi.")
        last = (await socket.rest())[-1]
    async with played.connect() as socket:
        await resume(socket, last["sequence_number"] - 1)
        assert await socket.rest() == [last]
        await socket.create(store=False, previous_response_id=last["response"]["id"])
        (await hand.next_turn()).answer("Yes.")
        assert types(await socket.rest())[-1] == "completed"


async def test_a_resumed_turn_keeps_its_lane_until_its_end_was_read(played, hand):
    """What comes behind it on the lane waits, as behind a turn of its own (WebSocket mode guide, "stream_id")."""
    events, turn = await cut_off(played, hand, TextDelta("One "))
    async with played.connect() as socket:
        await resume(socket, events[-1]["sequence_number"])
        await socket.create(store=False, previous_response_id=events[0]["response"]["id"])
        assert await socket.is_silent()
        assert hand.is_idle
        turn.finish()
        assert types(await socket.rest())[-1] == "completed"
        (await hand.next_turn()).answer("Yes.")
        assert types(await socket.rest())[-1] == "completed"


async def test_a_resumed_turn_can_be_cancelled_and_steered(played, hand):
    """Where it is read now, on the lane where it is read now."""
    events, turn = await cut_off(played, hand, TextDelta("One "))
    response_id = events[0]["response"]["id"]
    async with played.connect() as socket:
        await resume(socket, events[-1]["sequence_number"], stream_id="a")
        await until(lambda: "readers=1" in repr(played.registry.held.of_key("local", KEY).log))
        await socket.send(type="response.steer", previous_response_id=response_id, input="Shorter.")
        assert (await socket.receive())["type"] == "response.steer.accepted"
        turn.give(CallStarted("function_call", "call_1", "look"))
        frames = await socket.rest()
        assert (frames[-1]["type"], frames[-1]["stream_id"]) == ("response.incomplete", "a")
        successor = await hand.next_turn()
        assert len(successor.input) == 3
        successor.give(TextDelta("Two "))
        created = (await socket.until("response.output_text.delta"))[0]
        assert (created["stream_id"], created["response"]["previous_response_id"]) == ("a", response_id)
        assert played.registry.held.get("local", created["response"]["id"]) is None  # it has no key
        await socket.send(type="response.cancel", response_id=created["response"]["id"])
        assert (await socket.rest())[-1]["response"]["incomplete_details"] == {"reason": "cancelled"}


async def test_a_steer_dies_with_the_connection_that_it_came_on(played, hand):
    """The turn simply ends where its item ends; nothing follows by itself anywhere else (docs/adr/0009)."""
    async with played.connect() as socket:
        await socket.create(idempotency_key=KEY, store=False)
        turn = await hand.next_turn()
        turn.give(TextDelta("One "))
        response_id = (await socket.until("response.output_text.delta"))[0]["response"]["id"]
        await socket.send(type="response.steer", previous_response_id=response_id, input="Shorter.")
        accepted = await socket.receive()
        assert accepted["type"] == "response.steer.accepted"
    async with played.connect() as socket:
        await resume(socket, accepted["sequence_number"])
        turn.give(CallStarted("function_call", "call_1", "look"), CallDelta("{}"))
        last = (await socket.rest())[-1]
        assert last["response"]["incomplete_details"] == {"reason": "steered"}
        assert await socket.is_silent()
        assert hand.is_idle


@stored
async def test_what_comes_of_a_late_steer_is_not_given_again(start, hand, tmp_path, stores):
    """Behind the end it belongs to the connection that steered; whoever comes back reads the response and no more.

    Source: WebSocket mode guide, "Steering".
    """
    store = SlowStore(tmp_path / "openline.db")
    store.fast.set()
    server = await start(engine=hand, store=store, kernel_buffer_bytes=KERNEL_BYTES)
    async with watched(server, sock=stingy_connection(server), max_queue=1) as socket:
        turn, first = await socket.begun(hand, TextDelta("Once "), idempotency_key=KEY, store=stores, stream_id="a")
        store.fast.clear()
        store.asked.clear()
        turn.finish(TextDelta("x" * 512 * 1024))  # more than the transport takes, less than may wait
        if stores:
            await store.asked.wait()
            await socket.steer(first, "While it is kept.")
            (connection,) = server.app._sockets
            await until(lambda: connection._late)
            store.fast.set()
        await server.idle()
        await socket.steer(first, "Too late.")
        await socket.rest()
        events = list(socket.frames)
        late = await socket.until("response.steer.failed")
        kinds = ["steer.accepted"] if stores else []
        assert types(late) == [*kinds, "steer.failed"]
        assert late[-1]["steer"]["input"] == "Too late."
        if stores:
            (await hand.next_turn()).answer("Hi.")  # its successor
            await socket.rest()
    async with server.connect(max_queue=None) as socket:
        again = await socket.turn(idempotency_key=KEY, store=stores)
        assert again == [{key: value for key, value in event.items() if key != "stream_id"} for event in events]
        assert await socket.is_silent()


async def test_a_steer_is_given_back_by_a_create_that_had_run(played, hand):
    """It was to come along with a create that was sent before: nobody has read it, and its client is told so."""
    call = [CallStarted("function_call", "call_1", "look"), CallDelta("{}")]
    output = {"type": "function_call_output", "call_id": "call_1", "output": "42"}
    async with played.connect() as socket:
        await socket.create(store=False)
        turn = await hand.next_turn()
        turn.give(*call)
        created = (await socket.until("response.function_call_arguments.delta"))[0]["response"]
        await socket.send(type="response.steer", previous_response_id=created["id"], input="Shorter.")
        await socket.until("response.steer.accepted")
        await socket.create(
            stream_id="b", idempotency_key=KEY, input=[output], store=False, previous_response_id=created["id"]
        )
        await socket.until("error")  # its parent has not ended
        turn.finish()
        await socket.until("response.steer.pending")
        again = {"idempotency_key": KEY, "input": [output], "store": False, "previous_response_id": created["id"]}
        await socket.create(**again, stream_id="b")
        (await hand.next_turn()).answer("42 it is.")
        last = (await socket.rest())[-1]
        await socket.create(**again)
        failed, *events = await socket.rest()
        assert (failed["type"], failed["steer"]["input"]) == ("response.steer.failed", "Shorter.")
        assert events[-1]["response"] == last["response"]
        assert hand.is_idle


async def test_a_half_dead_connection_holds_nobody_up(start, hand):
    """The old socket takes nothing, and is not closed: who comes back gets everything, and the model goes on."""
    server = await start(engine=hand, limits={"send_buffer_bytes_max": 50_000}, kernel_buffer_bytes=16 * 1024)
    async with blocked_client(server) as old, server.connect(max_queue=None) as new:
        await old.create(idempotency_key=KEY)
        turn = await hand.next_turn()
        for number in range(30):
            turn.give(TextDelta(f"{number:02d}".ljust(10_000, "x")))
        turn.finish()
        held = server.registry.held.of_key("local", KEY)
        await until(lambda: not held.log.is_writable)
        events = await new.turn(idempotency_key=KEY)
        assert events[-1]["type"] == "response.completed"
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        # The old one is an observer: what it missed is still kept, and it may read on.
        assert await old.rest() == events


async def test_who_lags_behind_what_is_kept_is_told_on_its_lane(start, hand):
    """An `error` with `resume_window_exceeded`, never a gap; and the lane goes on."""
    server = await start(
        engine=hand,
        limits={"send_buffer_bytes_max": 50_000},
        resume={"bytes_max": 60_000},
        kernel_buffer_bytes=16 * 1024,
    )
    async with blocked_client(server) as old, server.connect(max_queue=None) as new:
        await old.create(idempotency_key=KEY, stream_id="a")
        turn = await hand.next_turn()
        turn.give(TextDelta("x" * 40_000))
        await until(lambda: len(server.registry.held.of_key("local", KEY).log) > 4)
        reading = asyncio.ensure_future(new.turn(idempotency_key=KEY))
        for _ in range(60):
            turn.asked.clear()
            turn.give(TextDelta("x" * 10_000))
            await turn.asked.wait()
        turn.finish()
        assert (await reading)[-1]["type"] == "response.completed"
        frames = await old.until("error")
        assert (frames[-1]["error"]["code"], frames[-1]["stream_id"]) == ("resume_window_exceeded", "a")
        numbers = [frame["sequence_number"] for frame in frames[:-1]]
        assert numbers == list(range(len(numbers)))
        await old.create(stream_id="a")
        (await hand.next_turn()).answer("Yes.")
        assert types(await old.rest())[-1] == "completed"


async def test_an_old_connection_leaves_a_turn_with_a_key_running(start, hand):
    """At its age limit the others are cancelled; this one's client reads on elsewhere (WebSocket mode guide, "Connection life")."""
    limits = {"connection_seconds_max": 0.1, "age_grace_seconds_max": 0.05}
    server = await start(engine=hand, limits=limits)
    async with server.connect() as socket:
        await socket.create(idempotency_key=KEY, store=False)
        keeps_on = await hand.next_turn()
        keeps_on.give(TextDelta("One "))
        events = await socket.until("response.output_text.delta")
        await socket.create(stream_id="a", store=False)
        (await hand.next_turn()).give(TextDelta("One "))
        frames, code = await until_closed(socket)
        assert code == GOING_AWAY
        ends = [frame["type"] for frame in frames if frame["type"] in {"response.incomplete", "error"}]
        assert ends == ["response.incomplete", "error"]
    async with server.connect() as socket:
        await resume(socket, events[-1]["sequence_number"])
        keeps_on.finish(TextDelta("two."))
        last = (await socket.rest())[-1]
        assert (last["type"], last["response"]["id"]) == ("response.completed", events[0]["response"]["id"])


async def test_a_server_that_stops_ends_a_turn_with_a_key_too(start, hand):
    """It waits for it as for every other, and then cancels it with its terminal event (guarantees, "Drain")."""
    server = await start(engine=hand, limits={"drain_seconds_max": 0.1})
    async with server.connect() as socket:
        await socket.create(idempotency_key=KEY)
        turn = await hand.next_turn()
        turn.give(TextDelta("One "))
        await socket.until("response.output_text.delta")
        draining = asyncio.ensure_future(server.app.drain(asyncio.Event()))
        assert (await socket.rest())[-1]["response"]["incomplete_details"] == {"reason": "cancelled"}
        assert await until_closed(socket) == ([], GOING_AWAY)
        await draining


async def test_a_warm_up_may_have_a_key(played, hand):
    """Given again, and gone on from, on another connection."""
    fields = {"idempotency_key": KEY, "store": False, "generate": False, "input": [], "instructions": "Be brief."}
    async with played.connect() as socket:
        first = await socket.turn(**fields)
    async with played.connect() as socket:
        assert await socket.turn(**fields) == first
        await socket.create(store=False, previous_response_id=first[-1]["response"]["id"])
        (await hand.next_turn()).answer("Yes.")
        assert types(await socket.rest())[-1] == "completed"
    assert hand.is_idle


async def test_the_same_create_on_two_lanes_of_a_connection_is_one_turn(played, hand):
    """Both get all of it, each under its own name, and both can go on from it."""
    async with played.connect() as socket:
        for lane in ("a", "b"):
            await socket.create(idempotency_key=KEY, store=False, stream_id=lane)
        turn = await hand.next_turn()
        await until(lambda: "readers=2" in repr(played.registry.held.of_key("local", KEY).log))
        turn.answer("Once.")
        frames = await socket.rest() + await socket.rest()
        by_lane = [[{**frame, "stream_id": ""} for frame in frames if frame["stream_id"] == lane] for lane in "ab"]
        assert by_lane[0] == by_lane[1]
        assert hand.is_idle
        for lane in ("a", "b"):
            await socket.create(stream_id=lane, store=False, previous_response_id=frames[-1]["response"]["id"])
            (await hand.next_turn()).answer("Yes.")
            assert types(await socket.rest())[-1] == "completed"


async def test_a_turn_without_a_key_is_cancelled_with_its_connection(played, hand):
    """As before: nobody can come back to it (guarantees, "Cancellation")."""
    async with played.connect() as socket:
        await socket.create(store=False)
        turn = await hand.next_turn()
        turn.accept()
        await socket.until("response.in_progress")
    await asyncio.wait_for(turn.closed.wait(), 1)
    await played.idle()
    assert len(played.registry.held._turns) == 0
