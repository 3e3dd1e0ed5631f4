"""Responses that run in the background: begun, looked at, left, followed again from anywhere, and stopped.

Source: Responses API reference, "Create a response", `background`; Background mode guide.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack, closing

import pytest

from openline.protocol.deltas import TextDelta
from openline.server.event_stream import send_event_stream
from openline.server.stored import stopped
from openline.state.nothing import NothingStore
from server.background import (
    begin,
    begin_stream,
    begin_streamed,
    cancel,
    delete,
    ended,
    events_of,
    follow,
    log_of,
    path_of,
    readers,
    replay,
    retrieve,
    text_of,
)
from server.hand import Hand
from server.late import SlowStore, stingy_connection
from server.running import read_sse, until

WORDS = ["One ", "two ", "three."]
DONE = b"data: [DONE]\n\n"
CANARY = "canary-5c1d0b"
KEYS = {"keys": {"key-a": "a", "key-b": "b"}}

by_store = pytest.mark.parametrize("store", [True, False], ids=["stored", "unstored"])
by_stream = pytest.mark.parametrize("stream", [True, False], ids=["sse", "json"])


def not_found(response_id: str) -> dict[str, object]:
    """The error for a response that is unknown, whatever the reason.

    Source: Responses API reference, "Errors".
    """
    message = f"Response with id '{response_id}' not found."
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def parent_not_found(response_id: str) -> dict[str, object]:
    """The error for a parent that cannot be continued, whatever the reason."""
    return {
        "error": {
            "message": f"Previous response with id '{response_id}' not found.",
            "type": "invalid_request_error",
            "param": "previous_response_id",
            "code": "previous_response_not_found",
        }
    }


def numbers(events):
    return [event["sequence_number"] for event in events]


def types(events):
    return [event["type"].removeprefix("response.") for event in events]


async def finished(server, hand, *texts, **fields):
    """A streamed background response that has ended, and all its events."""
    response_id, turn = await begin_streamed(server, hand, *(texts or WORDS), **fields)
    turn.finish()
    assert (await ended(server, response_id))["status"] == "completed"
    return response_id, events_of(await replay(server, response_id))


# --- Begun and polled


@by_store
async def test_it_is_answered_at_once_as_queued(played, hand, store):
    """The create is answered before the upstream has said a word; status `queued`, nothing said yet.

    Source: Background mode guide: "returns at once with status queued".
    """
    response = await begin(played, store=store, metadata={"k": "v"})
    turn = await hand.next_turn()
    assert (response["status"], response["output"], response["usage"]) == ("queued", [], None)
    assert (response["background"], response["store"], response["metadata"]) == (True, store, {"k": "v"})
    assert (response["object"], response["completed_at"], response["error"]) == ("response", None, None)
    assert turn.taken == 0
    turn.answer("Hi.")


@by_store
async def test_polling_shows_what_there_is_so_far(played, hand, store):
    """`in_progress` with the output so far, open items with their text; then `completed`, with its usage.

    Source: Background mode guide: poll until neither queued nor in_progress.
    """
    response_id = (await begin(played, store=store))["id"]
    turn = await hand.next_turn()
    begun = await retrieve(played, response_id)
    assert (begun["status"], begun["output"], begun["completed_at"]) == ("in_progress", [], None)
    turn.give(TextDelta("One "))
    turn.give(TextDelta("two "))
    await until(lambda: turn.taken == 2)
    partly = await retrieve(played, response_id)
    assert (partly["status"], text_of(partly), partly["output"][0]["status"]) == (
        "in_progress",
        "One two ",
        "in_progress",
    )
    turn.finish(TextDelta("three."))
    whole = await ended(played, response_id)
    assert (whole["status"], text_of(whole), whole["usage"]["total_tokens"]) == ("completed", "One two three.", 2)
    assert whole["completed_at"] >= whole["created_at"]
    assert whole["output"][0]["id"] == partly["output"][0]["id"]


async def test_a_row_stands_before_the_create_is_answered(start, hand, tmp_path):
    """With `store: true` the unfinished response is committed before its client gets the id.

    Source: guarantees, "Durability": what is acknowledged is committed.
    """
    store = SlowStore(tmp_path / "slow.db")
    server = await start(engine=hand, store=store)
    posting = asyncio.ensure_future(begin(server))
    await asyncio.wait_for(store.asked.wait(), 5)
    assert (await server.get("/healthz")).status == 200
    assert not posting.done()
    assert hand.is_idle
    store.fast.set()
    response_id = (await posting)["id"]
    turn = await store.get("local", response_id)
    assert (turn.status, turn.chainable, turn.lease_until is not None) == ("in_progress", False, True)
    (await hand.next_turn()).answer("Hi.")


async def test_without_a_store_it_is_kept_in_memory(start, hand):
    """`--store none` and `store: true`: polled, followed, listed and deleted as long as memory holds it."""
    server = await start(engine=hand, store=NothingStore())
    response_id, events = await finished(server, hand)
    assert await retrieve(server, response_id) == events[-1]["response"]
    assert len((await server.get(f"/v1/responses/{response_id}/input_items")).json["data"]) == 1
    assert (await delete(server, response_id)).status == 200
    assert (await server.get(path_of(response_id))).json == not_found(response_id)


# --- Refused


@by_stream
@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"model": None}, 400, "missing_required_parameter"),
        ({"input": None}, 400, "missing_required_parameter"),
        ({"previous_response_id": "resp_x"}, 400, "previous_response_not_found"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, 404, None),
        ({"model": "nobody-serves-this"}, 400, "model_not_found"),
    ],
    ids=["no model", "no input", "unknown parent", "unknown item", "unknown model"],
)
async def test_what_cannot_begin_is_refused_and_leaves_nothing(server, stream, fields, status, code):
    """The create itself gets the real status; nothing is held, and nothing is stored.

    Source: Responses API reference, "Errors".
    """
    answer = await server.post(background=True, stream=stream, **fields)
    assert (answer.status, answer.json["error"]["code"]) == (status, code)
    await server.idle()
    assert repr(server.registry.held) == "<Held turns=0 ended=0 bytes=0>"
    assert (await server.registry.parts.store.info()).turns == 0


async def test_one_that_cannot_be_kept_is_refused(start, hand):
    """If its row cannot be written, the create gets 503, and the upstream is never asked."""
    server = await start(engine=hand)
    await server.registry.parts.store.close()
    answer = await server.post(background=True)
    assert (answer.status, answer.json["error"]["code"]) == (503, "store_unavailable")
    assert hand.is_idle
    assert (await server.post(background=True, store=False)).status == 200
    (await hand.next_turn()).answer("Hi.")


async def test_more_than_may_run_at_once_are_refused(start, hand):
    """From `background_active_max` on a create gets 503 and when to come back; one that ends makes room.

    Source: guarantees, "Bounds".
    """
    server = await start(engine=hand, resume={"background_active_max": 2})
    ids = [(await begin(server, store=False))["id"] for _ in range(2)]
    turns = [await hand.next_turn() for _ in ids]
    for stream in (True, False):
        answer = await server.post(background=True, stream=stream)
        assert (answer.status, answer.json["error"]["code"]) == (503, "server_is_overloaded")
        assert answer.headers["retry-after"] == "5"
    asking = asyncio.ensure_future(server.post(store=False))  # what is not in the background has its own bounds
    (await hand.next_turn()).answer("Unaffected.")
    assert (await asking).status == 200
    turns[0].answer("Done.")
    await ended(server, ids[0])
    await begin(server, store=False)
    for turn in (turns[1], await hand.next_turn()):
        turn.answer("Done.")


async def test_a_failed_one_is_read_as_failed(played, hand):
    """The upstream fails after the create was answered: status `failed`, with the reason and what was said.

    Source: Responses API reference, "The response object", `error`.
    """
    response_id, turn = await begin_streamed(played, hand, "One ")
    turn.refuse("upstream_error")
    failed = await ended(played, response_id)
    assert (failed["status"], failed["error"]["code"], text_of(failed)) == ("failed", "upstream_error", "One ")
    assert failed["completed_at"] is None
    events = events_of(await replay(played, response_id))
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"] == failed


# --- Its events


async def test_its_stream_begins_with_created_queued_in_progress(played, hand):
    """`created` and `queued` have status `queued`, then `in_progress`; the upstream has said nothing yet.

    Source: Streaming reference, "Event order", background stream.
    """
    async with begin_stream(played) as stream:
        head = await stream.until("response.in_progress")
        assert types(head) == ["created", "queued", "in_progress"]
        assert [event["response"]["status"] for event in head] == ["queued", "queued", "in_progress"]
        (await hand.next_turn()).answer("Hi.")
        rest = await stream.rest()
    assert numbers(head + rest) == list(range(len(head + rest)))
    assert rest[-1]["response"]["status"] == "completed"


@by_stream
async def test_its_client_may_leave(played, hand, stream):
    """A dropped connection does not stop the work.

    Source: Background mode guide.
    """
    if stream:
        response_id, turn = await begin_streamed(played, hand, *WORDS[:1])
    else:
        response_id = (await begin(played))["id"]
        turn = await hand.next_turn()
        turn.give(TextDelta(WORDS[0]))
    await readers(played, response_id, 0)
    turn.give(TextDelta(WORDS[1]))
    turn.finish(TextDelta(WORDS[2]))
    assert text_of(await ended(played, response_id)) == "".join(WORDS)


async def test_a_client_that_leaves_before_the_answer_changes_nothing(start, hand, tmp_path):
    """The create was taken: it runs, whether or not anybody heard of it."""
    store = SlowStore(tmp_path / "slow.db")
    server = await start(engine=hand, store=store)
    posting = asyncio.ensure_future(begin(server))
    await asyncio.wait_for(store.asked.wait(), 5)
    posting.cancel()
    await asyncio.wait({posting})
    store.fast.set()
    (await hand.next_turn()).answer("Nobody hears this.")
    await server.idle()
    assert (await store.info()).turns == 1


@by_store
async def test_it_is_taken_up_after_every_number_while_it_runs(played, hand, store):
    """`starting_after=n` gives exactly the events behind n: those that have come, then live.

    Source: Background mode guide: resume with `starting_after`.
    """
    response_id, turn = await begin_streamed(played, hand, *WORDS, store=store)
    followers = [asyncio.ensure_future(replay(played, response_id, after)) for after in (None, *range(9))]
    await readers(played, response_id, len(followers))
    turn.finish()
    whole, *parts = [events_of(await follower) for follower in followers]
    assert numbers(whole) == list(range(len(whole)))
    assert (len(whole), types(whole)[-1]) == (12, "completed")
    assert parts == [whole[after + 1 :] for after in range(9)]


@pytest.mark.parametrize("kept", ["memory", "store"])
async def test_it_is_taken_up_after_every_number_when_it_has_ended(start, hand, kept):
    """The same events, byte for byte, whether memory or the store has them; behind the last there is just the end.

    Source: Background mode guide: if it has finished, replay and end.
    """
    server = await start(engine=hand, resume={"seconds": 0.05 if kept == "store" else 300})
    async with begin_stream(server) as stream:
        (await hand.next_turn()).finish(*map(TextDelta, WORDS))
        events = await stream.rest()
    response_id = events[0]["response"]["id"]
    if kept == "store":
        await until(lambda: server.registry.held.get("local", response_id) is None)
    assert types(events)[-1] == "completed"
    for after in (None, *range(len(events) + 3)):
        found = events_of(await replay(server, response_id, after))
        assert found == events[0 if after is None else after + 1 :], after


async def test_a_number_that_has_not_come_is_waited_for(played, hand):
    """`starting_after` beyond the end of one that runs: what comes behind it, and nothing before."""
    response_id, turn = await begin_streamed(played, hand, "One ")
    async with follow(played, response_id, after=7) as follower:
        turn.give(TextDelta("two "), TextDelta("three "))
        turn.finish()
        events = await follower.rest()
    assert numbers(events) == [8, 9, 10, 11]


async def test_every_follower_gets_every_event(played, hand):
    """The client that created it, one that came at once and one that came in the middle read the same bytes."""
    async with begin_stream(played) as creator:
        head = await creator.until("response.in_progress")
        response_id = head[0]["response"]["id"]
        turn = await hand.next_turn()
        early = asyncio.ensure_future(replay(played, response_id))
        turn.give(TextDelta("One "))
        head += await creator.until("response.output_text.delta")
        late = asyncio.ensure_future(replay(played, response_id))
        turn.finish(TextDelta("two."))
        events = head + await creator.rest()
        assert (await early).body == (await late).body
        assert events_of(await late) == events


async def test_a_follower_that_is_gone_leaves_nothing(played, hand):
    """Neither a reader in the log nor a task; what it followed goes on."""
    response_id, turn = await begin_streamed(played, hand, "One ")
    before = len(asyncio.all_tasks())
    for _ in range(3):
        async with follow(played, response_id) as follower:
            await follower.until("response.output_text.delta")
            await readers(played, response_id, 1)
        await readers(played, response_id, 0)
        await until(lambda: len(asyncio.all_tasks()) <= before)
    turn.finish()
    assert (await ended(played, response_id))["status"] == "completed"


BIG = "x" * 8 * 1024
MANY = 64  # with what closes it 2 MiB in all, more than any buffer on the way takes


@pytest.mark.parametrize("who", ["creator", "follower"])
async def test_who_does_not_read_holds_up_nobody(start, hand, who):
    """It runs to its end although its creator, or a follower, takes nothing; then that one reads all of it.

    Source: guarantees, "Slow consumer"; Background mode guide.
    """
    server = await start(
        engine=hand,
        kernel_buffer_bytes=16 * 1024,
        limits={"send_buffer_bytes_max": 128 * 1024},
    )
    body = json.dumps({"model": "m", "input": "x", "stream": True, "background": True, "store": False}).encode()
    with ExitStack() as stack:
        raw = stack.enter_context(stingy_connection(server))
        reader, writer = await asyncio.open_connection(sock=raw, limit=4096)
        stack.enter_context(closing(writer))
        if who == "creator":
            writer.write(b"POST /v1/responses HTTP/1.1\r\nHost: x.localhost\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            turn = await hand.next_turn()
            (response_id,) = server.registry.held._turns
        else:
            response_id, turn = await begin_streamed(server, hand, store=False)
            writer.write(f"GET {path_of(response_id, stream=True)} HTTP/1.1\r\nHost: x.localhost\r\n\r\n".encode())
        await readers(server, response_id, 1)
        for _ in range(MANY):
            turn.give(TextDelta(BIG))
        turn.finish()
        await server.idle()
        assert len(text_of(await ended(server, response_id))) == MANY * len(BIG)
        events = read_sse(await read_chunked(reader))
    assert numbers(events) == list(range(len(events)))
    assert events[-1]["type"] == "response.completed"


async def test_a_long_replay_leaves_in_pieces():
    """A follower that does not read costs the server a piece, not a copy of the whole log.

    Source: guarantees, "Slow consumer".
    """
    events = [f'{{"type":"response.output_text.delta","delta":"{BIG}"}}'.encode()] * MANY
    batches = [[], events]
    sent = []

    async def read():
        return batches.pop()

    async def send(message):
        sent.append(message.get("body", b""))

    await send_event_stream(send, read, "req_1")
    assert len(read_sse(b"".join(sent))) == MANY
    assert max(map(len, sent)) < 80 * 1024


async def read_chunked(reader):
    """A chunked body."""
    await reader.readuntil(b"\r\n\r\n")
    chunks = []
    while size := int(await reader.readline(), 16):
        chunks.append(await reader.readexactly(size))
        await reader.readexactly(2)
    return b"".join(chunks)


# --- What is no longer kept


async def lengthy(server, hand, **fields):
    """One that has said far more than its server keeps, and goes on."""
    response_id, turn = await begin_streamed(server, hand, **fields)
    for number in range(100):
        turn.give(TextDelta(f"{number:>20}"))
    await until(lambda: turn.taken == 101)
    return response_id, turn


def assert_window(answer, after, last):
    """Every event behind `after`, or the refusal that says that some are gone."""
    if answer.status == 200:
        assert numbers(events_of(answer)) == list(range(after + 1, last + 1))
        return True
    error = answer.json["error"]
    assert (answer.status, error["code"], error["param"]) == (409, "resume_window_exceeded", "starting_after")
    return False


async def test_what_is_no_longer_kept_is_refused_and_never_left_out(start, hand):
    """Past `bytes_max` the oldest events go: a number before them gets 409, each one behind them exactly the rest.

    While it runs and after its end; and the response itself is always whole.

    Source: docs/adr/0007.
    """
    server = await start(engine=hand, resume={"bytes_max": 10_000})
    response_id, turn = await lengthy(server, hand, store=False)
    live = {after: asyncio.ensure_future(replay(server, response_id, after)) for after in range(3, 103, 5)}
    await asyncio.wait(live.values(), timeout=0.5, return_when=asyncio.FIRST_COMPLETED)
    log = log_of(server, response_id)
    await until(lambda: repr(log).count(f"readers={sum(not each.done() for each in live.values())}") == 1)
    turn.finish()
    await server.idle()
    last = len(log) - 1
    found = [assert_window(await answer, after, last) for after, answer in live.items()]
    assert found == sorted(found)
    assert 0 < found.count(False) < len(found)
    assert len(text_of(await ended(server, response_id))) == 100 * 20
    found = [assert_window(await replay(server, response_id, after), after, last) for after in range(last + 2)]
    assert found == sorted(found)
    assert 0 < found.count(False) < last


async def test_events_that_are_not_whole_are_not_stored(start, hand):
    """The store has all events of a response or none: then a replay is refused, and the response is there.

    Source: docs/adr/0007.
    """
    server = await start(engine=hand, resume={"bytes_max": 10_000, "seconds": 0.05})
    response_id, turn = await lengthy(server, hand)
    turn.finish()
    await ended(server, response_id)
    await until(lambda: server.registry.held.get("local", response_id) is None)
    answer = await replay(server, response_id, 100)
    assert (answer.status, answer.json["error"]["param"]) == (400, "stream")
    assert (await retrieve(server, response_id))["status"] == "completed"


async def test_a_follower_that_lags_is_cut_off_without_an_end(start, hand):
    """Too slow for what is kept: its stream ends early, without a gap and without `[DONE]`, so that it asks again."""
    server = await start(engine=hand, kernel_buffer_bytes=16 * 1024, resume={"bytes_max": 256 * 1024})
    response_id, turn = await begin_streamed(server, hand, store=False)
    with ExitStack() as stack:
        raw = stack.enter_context(stingy_connection(server))
        reader, writer = await asyncio.open_connection(sock=raw, limit=4096)
        stack.enter_context(closing(writer))
        writer.write(f"GET {path_of(response_id, stream=True)} HTTP/1.1\r\nHost: x.localhost\r\n\r\n".encode())
        await readers(server, response_id, 1)
        for _ in range(MANY):
            turn.give(TextDelta(BIG))
        turn.finish()
        await server.idle()
        body = await read_chunked(reader)
        assert not body.endswith(DONE)
        events = read_sse(body + DONE)
        assert numbers(events) == list(range(len(events)))
        assert "completed" not in types(events)


async def test_the_create_is_answered_however_little_is_kept(start):
    """Its first events may be gone before they were read: the response as it was created is not."""

    class Eager(Hand):
        """Says all at once."""

        def prepare(self, request):
            turn = super().prepare(request)
            turn.answer("Hi.")
            return turn

    server = await start(engine=Eager(), resume={"bytes_max": 1})
    response = await begin(server, store=False)
    assert response["status"] == "queued"
    assert (await ended(server, response["id"]))["status"] == "completed"
    answer = await server.post(background=True, stream=True, store=False)  # whose events cannot be had any more
    assert (answer.status, answer.json["error"]["code"]) == (409, "resume_window_exceeded")


async def test_one_that_was_not_streamed_has_no_stream(played, hand):
    """Events can be followed only if the create asked for them; the same before and after the end.

    Source: Background mode guide: only if it was created with `stream: true`.
    """
    response_id = (await begin(played))["id"]
    turn = await hand.next_turn()
    for _ in range(2):
        answer = await replay(played, response_id)
        assert (answer.status, answer.json["error"]["param"]) == (400, "stream")
        turn.answer("Hi.")
        await ended(played, response_id)
    assert await played.registry.parts.store.events("local", response_id) is None
    foreground = asyncio.ensure_future(played.post(stream=True))
    (await hand.next_turn()).answer("Hi.")
    answer_of_foreground = await replay(played, events_of(await foreground)[0]["response"]["id"])
    assert (answer_of_foreground.status, answer_of_foreground.body) == (400, answer.body)


async def test_an_unstored_one_is_held_for_a_while_and_never_on_the_disk(start, hand):
    """`store: false`: readable for `resume.seconds` after its end, not counted while it runs, then unknown.

    Source: Background mode guide: unstored responses are kept for about ten minutes.
    """
    server = await start(engine=hand, resume={"seconds": 0.05})
    response_id, turn = await begin_streamed(server, hand, CANARY, store=False, input=CANARY, metadata={"k": CANARY})
    shorter, other = await begin_streamed(server, hand, store=False)
    other.finish()
    await until(lambda: server.registry.held.get("local", shorter) is None)
    assert (await retrieve(server, response_id))["status"] == "in_progress"
    turn.finish()
    await until(lambda: server.registry.held.get("local", response_id) is None)
    for answer in (await server.get(path_of(response_id)), await replay(server, response_id)):
        assert (answer.status, answer.json) == (404, not_found(response_id))
    assert repr(server.registry.held) == "<Held turns=0 ended=0 bytes=0>"
    await server.registry.parts.store.close()
    assert CANARY.encode() not in server.files()


async def test_the_oldest_that_have_ended_make_room(start, hand):
    """Those that have ended share `bytes_max`, input and events: the oldest are unknown first, what runs stays.

    Source: docs/adr/0007.
    """
    server = await start(engine=hand, resume={"bytes_max": 60_000})
    runs, turn = await begin_streamed(server, hand, store=False)
    kept = []
    for _ in range(6):
        response_id = (await begin(server, store=False, input="x" * 6000))["id"]
        (await hand.next_turn()).answer("y" * 2000)
        await ended(server, response_id)
        kept.append(response_id)
    statuses = [(await server.get(path_of(response_id))).status for response_id in kept]
    assert statuses == sorted(statuses, reverse=True)
    assert 0 < statuses.count(404) < 6
    assert (await retrieve(server, runs))["status"] == "in_progress"
    turn.finish()


# --- Cancelled


@by_store
async def test_a_cancelled_one_keeps_what_it_has_said(played, hand, store):
    """Status `cancelled`, `completed_at` null, the open item as incomplete; the upstream is let go of at once.

    Source: Responses API reference, "Cancel"; Streaming reference, "Cancelled turn".
    """
    response_id, turn = await begin_streamed(played, hand, "One ", store=store)
    answer = await cancel(played, response_id)
    response = answer.json
    assert (answer.status, response["status"], response["completed_at"]) == (200, "cancelled", None)
    assert (response["error"], response["incomplete_details"]) == (None, None)
    assert (text_of(response), response["output"][0]["status"]) == ("One ", "incomplete")
    assert turn.closed.is_set()
    assert await retrieve(played, response_id) == response
    for _ in range(2):
        again = await cancel(played, response_id)
        assert (again.status, again.body) == (200, answer.body)


async def test_one_that_the_upstream_has_not_accepted_is_cancelled_too(played, hand):
    """Nothing was said: the output is empty."""
    response_id = (await begin(played))["id"]
    turn = await hand.next_turn()
    response = (await cancel(played, response_id)).json
    assert (response["status"], response["output"]) == ("cancelled", [])
    assert turn.closed.is_set()


async def test_a_stored_one_stays_cancelled(start, hand):
    """Once memory has let go of it, the store says the same, byte for byte; its events have no terminal one."""
    server = await start(engine=hand, resume={"seconds": 0.05})
    response_id, _ = await begin_streamed(server, hand, "One ")
    response = await cancel(server, response_id)
    live = events_of(await replay(server, response_id))
    await until(lambda: server.registry.held.get("local", response_id) is None)
    assert (await server.get(path_of(response_id))).body == response.body
    assert (await cancel(server, response_id)).body == response.body
    assert events_of(await replay(server, response_id)) == live
    assert types(live)[-1] == "output_item.done"


async def test_the_stream_of_a_cancelled_one_just_ends(played, hand):
    """There is no `response.cancelled`: open items are closed, and then comes `[DONE]`; for the creator too.

    Source: Streaming reference, "Cancelled turn".
    """
    async with begin_stream(played) as creator:
        created = await creator.event()
        response_id = created["response"]["id"]
        (await hand.next_turn()).give(TextDelta("One "))
        await creator.until("response.output_text.delta")
        async with follow(played, response_id, after=5) as follower:
            await cancel(played, response_id)
            rest = await creator.rest()
            assert types(rest) == ["output_text.done", "content_part.done", "output_item.done"]
            assert await follower.rest() == rest


async def test_cancels_at_once_give_one_end(played, hand):
    """Two that cancel at the same moment get the same final object."""
    response_id, _ = await begin_streamed(played, hand, "One ")
    answers = await asyncio.gather(*(cancel(played, response_id) for _ in range(5)))
    assert {(answer.status, answer.body) for answer in answers} == {(200, answers[0].body)}
    assert answers[0].json["status"] == "cancelled"


@pytest.mark.parametrize("kept", ["memory", "store"])
async def test_a_finished_one_is_not_cancelled_any_more(start, hand, kept):
    """A cancel that comes too late gives the final object.

    Source: Background mode guide: idempotent, later calls return the final object.
    """
    server = await start(engine=hand, resume={"seconds": 0.05 if kept == "store" else 300})
    response_id, events = await finished(server, hand)
    if kept == "store":
        await until(lambda: server.registry.held.get("local", response_id) is None)
    answer = await cancel(server, response_id)
    assert (answer.status, answer.json) == (200, events[-1]["response"])


async def test_one_that_is_being_kept_is_not_cancelled_any_more(start, hand, tmp_path):
    """The store has the last word: a cancel waits for it, and gives what was kept."""
    store = SlowStore(tmp_path / "slow.db")
    store.fast.set()
    server = await start(engine=hand, store=store)
    response_id, turn = await begin_streamed(server, hand, "One.")
    store.asked.clear()
    store.fast.clear()
    turn.finish()
    await asyncio.wait_for(store.asked.wait(), 5)
    cancelling = asyncio.ensure_future(cancel(server, response_id))
    assert (await retrieve(server, response_id))["status"] == "in_progress"
    store.fast.set()
    assert (await cancelling).json["status"] == "completed"


async def test_only_a_background_response_is_cancelled(server):
    """Any other one is ended by closing its connection: 400.

    Source: Responses API reference, "Cancel".
    """
    response = (await server.post()).json
    answer = await cancel(server, response["id"])
    assert answer.status == 400
    assert "'background'" in answer.json["error"]["message"]
    assert await retrieve(server, response["id"]) == response


# --- Deleted


@by_store
async def test_one_that_runs_is_stopped_and_gone(played, hand, store):
    """Deleting it stops the upstream; its stream ends, and its id is unknown from then on.

    Source: Responses API reference, "Delete".
    """
    response_id, turn = await begin_streamed(played, hand, "One ", store=store)
    async with follow(played, response_id, after=5) as follower:
        answer = await delete(played, response_id)
        assert (answer.status, answer.json) == (200, {"id": response_id, "object": "response", "deleted": True})
        assert types(await follower.rest()) == ["output_text.done", "content_part.done", "output_item.done"]
    assert turn.closed.is_set()
    for answer in (
        await delete(played, response_id),
        await cancel(played, response_id),
        await played.get(path_of(response_id)),
        await replay(played, response_id),
        await played.get(f"/v1/responses/{response_id}/input_items"),
    ):
        assert (answer.status, answer.json) == (404, not_found(response_id))
    assert repr(played.registry.held) == "<Held turns=0 ended=0 bytes=0>"
    assert (await played.registry.parts.store.info()).turns == 0


async def test_one_that_has_just_ended_is_gone_too(played, hand):
    """In the very moment of its end it is not let go of too early: then it would come back, and stay for minutes."""
    response_id, turn = await begin_streamed(played, hand, "One.")
    held = played.registry.held
    running = held.get("local", response_id)
    turn.finish()
    with running.log.observe() as reader:
        while await reader.read():
            pass
    assert not held.forget("local", response_id)  # its task has not quite ended
    await stopped(running)
    assert held.forget("local", response_id)
    assert repr(held) == "<Held turns=0 ended=0 bytes=0>"


# --- Continued


async def test_it_is_continued_once_it_has_completed(played, hand):
    """While it runs nobody can continue it; once it has completed and is stored everybody can.

    Source: WebSocket mode guide, "Continuing"; Background mode guide.
    """
    response_id, turn = await begin_streamed(played, hand, "One.", input="One?")
    answer = await played.post(previous_response_id=response_id)
    assert (answer.status, answer.json) == (400, parent_not_found(response_id))
    turn.finish()
    await ended(played, response_id)
    child = (await begin(played, previous_response_id=response_id, input="Two?"))["id"]
    turn = await hand.next_turn()
    assert [b"One?" in turn.input[0], b"One." in turn.input[1], b"Two?" in turn.input[2]] == [True] * 3
    turn.answer("Two.")
    await ended(played, child)
    async with played.connect() as socket:
        await socket.create(previous_response_id=child, input="Three?")
        turn = await hand.next_turn()
        assert len(turn.input) == 5
        turn.answer("Three.")
        assert (await socket.rest())[-1]["type"] == "response.completed"


@pytest.mark.parametrize("how", ["unstored", "failed"])
async def test_what_cannot_be_continued_is_not_found(played, hand, how):
    """An unstored one, although it can still be read, and a failed one: the same error as an unknown id."""
    response_id, turn = await begin_streamed(played, hand, "One.", store=how != "unstored")
    if how == "failed":
        turn.refuse("upstream_error")
    else:
        turn.finish()
    await ended(played, response_id)
    answer = await played.post(previous_response_id=response_id)
    assert (answer.status, answer.json) == (400, parent_not_found(response_id))


# --- The server stops


@pytest.mark.parametrize("ends", [True, False], ids=["ends in time", "does not"])
async def test_a_server_that_stops_lets_it_end_or_cancels_it(start, hand, ends):
    """Within `drain_seconds_max` it may end; then it is cancelled. Either end is kept, and told to who follows.

    Source: guarantees, "Drain".
    """
    server = await start(engine=hand, limits={"drain_seconds_max": 5 if ends else 0.05})
    store = server.registry.parts.store
    response_id, turn = await begin_streamed(server, hand, "One ")
    async with follow(server, response_id, after=5) as follower:
        draining = asyncio.ensure_future(server.app.drain(asyncio.Event()))
        await until(lambda: server.app._draining)
        answer = await server.post(background=True)
        assert (answer.status, answer.json["error"]["code"]) == (503, "server_is_overloaded")
        if ends:
            turn.finish(TextDelta("two."))
        rest = await follower.rest()
    await asyncio.wait_for(draining, 5)
    row = await store.get("local", response_id)
    assert row.lease_until is None
    if ends:
        assert (row.status, text_of(json.loads(row.response))) == ("completed", "One two.")
        assert types(rest)[-1] == "completed"
    else:
        assert (row.status, text_of(json.loads(row.response))) == ("cancelled", "One ")
        assert types(rest)[-1] == "output_item.done"


async def test_another_process_on_the_store_can_be_asked(start, hand):
    """It fetches, lists and cancels what it does not run; the events are where it runs, and it says so.

    Source: docs/adr/0007.
    """
    runs, other = await start(engine=hand), await start()
    response_id, turn = await begin_streamed(runs, hand, "One ", input="Hi?")
    assert (await retrieve(other, response_id))["status"] == "in_progress"
    listed = await other.get(f"/v1/responses/{response_id}/input_items")
    assert listed.json == (await runs.get(f"/v1/responses/{response_id}/input_items")).json
    answer = await replay(other, response_id)
    assert (answer.status, answer.json["error"]["param"]) == (400, "stream")
    assert "another process" in answer.json["error"]["message"]
    cancelled = await cancel(other, response_id)
    assert (cancelled.status, cancelled.json["status"]) == (200, "cancelled")
    assert (await cancel(other, response_id)).body == cancelled.body
    turn.finish()
    assert await ended(runs, response_id) == cancelled.json
    assert (await delete(other, response_id)).status == 200
    assert (await other.get(path_of(response_id))).json == not_found(response_id)
