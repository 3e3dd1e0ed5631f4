"""What a session sends, when, over which way; in virtual time, against the model of a server in `fake_network`."""

from __future__ import annotations

import asyncio
import gc
import random
from functools import wraps

import msgspec
import pytest

from client.fake_network import FakeDial, FakeServer, Fault, Refusal
from openline import ClientSettings, ConnectionLost, History, OpenlineError, Refused, TurnFailed, connect
from virtual_time import run

TOOLS = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]
HELLO = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello."}]}


class World:
    """A server, the way to it, and a session."""

    def __init__(self, *faults, knows_keys=True, words=3, has_sockets=True, **options):
        self.server = FakeServer(knows_keys=knows_keys, words=words)
        self.network = FakeDial(self.server, faults, has_sockets=has_sockets)
        settings = options.pop("settings", {})
        self.session = connect(
            "http://fake/v1",
            dial=self.network,
            chance=random.Random(0),
            settings=ClientSettings(**settings),
            **{"model": "m", **options},
        )

    async def turn(self, text="Hello.", **fields):
        return await self.session.create(input=text, **fields).response()

    @property
    def frames(self):
        """Every frame that was sent, over whichever line."""
        return [frame for line in self.network.lines for frame in line.sent]

    @property
    def posts(self):
        return self.network.posted


def in_virtual_time(test):
    """Run a test that is a coroutine, in virtual time."""

    @wraps(test)
    def runs(**arguments):
        run(test(**arguments))

    return runs


# Which way.


@in_virtual_time
async def test_the_first_turn_goes_over_http_and_the_second_opens_a_socket():
    """Generate once over HTTP, loop over a socket.

    Source: WebSocket mode guide.
    """
    world = World()
    async with world.session as session:
        assert session.transport == "http"
        await world.turn()
        assert (len(world.posts), len(world.frames), session.transport) == (1, 0, "websocket")
        await world.turn()
        await world.turn()
    assert (len(world.posts), len(world.frames), len(world.network.lines)) == (1, 2, 1)
    assert world.network.is_closed


@pytest.mark.parametrize("field", [{"tools": TOOLS}, {"generate": False}])
@in_virtual_time
async def test_a_first_turn_of_several_opens_a_socket(field):
    """Tools are given because they will be called, and a warm-up is for what follows it."""
    world = World()
    async with world.session:
        await world.turn(**field)
    assert (len(world.posts), len(world.frames)) == (0, 1)


@in_virtual_time
async def test_a_background_turn_goes_over_http_whatever_is_asked_for():
    """WebSocket mode has no background turns.

    Source: WebSocket mode guide, "response.create".
    """
    world = World(transport="websocket")
    async with world.session:
        await world.turn(background=True)
    assert (len(world.posts), len(world.frames)) == (1, 0)


@in_virtual_time
async def test_a_socket_that_is_refused_by_426_is_never_asked_for_again():
    """The server means it: HTTP at once, for the whole session.

    Source: RFC 9110 §15.5.22.
    """
    world = World(has_sockets=False)
    async with world.session as session:
        for _ in range(3):
            await world.turn(tools=TOOLS)
            assert session.transport == "http"
            await asyncio.sleep(1e6)
    assert len(world.posts) == 3
    assert not world.network.lines


@in_virtual_time
async def test_a_socket_that_something_else_refused_is_tried_again_after_a_while():
    """A 403 may be a proxy's word of the moment: HTTP at once, and a socket after `socket_retry_seconds`."""
    world = World(Fault(refuse=403), settings={"socket_retry_seconds": 100})
    async with world.session as session:
        await world.turn(tools=TOOLS)
        await asyncio.sleep(99)
        assert session.transport == "http"
        await world.turn(tools=TOOLS)
        await asyncio.sleep(1)
        assert session.transport == "websocket"
        await world.turn(tools=TOOLS)
    assert (len(world.posts), len(world.frames)) == (2, 1)


@in_virtual_time
async def test_a_turn_that_fell_back_stays_with_http():
    """However soon a socket may be tried again: one turn asks for one once."""
    world = World(has_sockets=True, settings={"socket_retry_seconds": 1e-9})
    world.network.faults = iter([Fault(refuse=403), Fault(cut_after=2), Fault(cut_after=2)])
    async with world.session:
        await world.turn(tools=TOOLS)
        assert not world.network.lines
        await world.turn(tools=TOOLS)
        assert len(world.network.lines) == 1


@in_virtual_time
async def test_a_socket_that_is_wanted_is_not_replaced():
    """`transport="websocket"` is the app's word: a refusal is told."""
    world = World(Fault(refuse=403), transport="websocket")
    async with world.session:
        with pytest.raises(Refused) as refused:
            await world.turn()
    assert refused.value.status == 403
    assert not world.posts


@in_virtual_time
async def test_a_restarting_server_does_not_cost_the_socket():
    """A 503 to a session that had a socket is of the moment: it is waited for, and the turn resumed on a socket."""
    world = World(Fault(cut_after=3), Fault(refuse=503), Fault(refuse="break"))
    async with world.session as session:
        await world.turn(tools=TOOLS)
        assert session.transport == "websocket"
    assert len(world.server.generations) == 1


# What is sent.


@in_virtual_time
async def test_over_the_socket_only_what_is_new_is_sent():
    """The connection's memory holds the rest, stored or not.

    Source: WebSocket mode guide, "Continuation".
    """
    world = World(transport="websocket")
    async with world.session:
        first = await world.turn(store=False, tools=TOOLS, instructions="Be brief.")
        await world.turn("More.", store=False, temperature=None)
    first_frame, second_frame = world.frames
    assert first_frame["input"] == [HELLO]
    assert (first_frame["tools"], first_frame["instructions"], first_frame["model"]) == (TOOLS, "Be brief.", "m")
    assert len(second_frame["input"]) == 1
    assert second_frame["previous_response_id"] == first["id"]
    assert not {"tools", "instructions", "temperature"} & set(second_frame), "settings are a create's own"
    assert world.server.generations[1].context[0] == HELLO


@pytest.mark.parametrize("store", [True, False, None])
@in_virtual_time
async def test_over_http_what_is_stored_is_not_sent_again(store):
    """With `store: false` nothing is remembered there, so everything goes out; else `previous_response_id` does."""
    world = World(transport="http")
    async with world.session:
        first = await world.turn(store=store)
        await world.turn("More.", store=store)
    sent = world.posts[1]
    if store is False:
        assert sent["input"][:2] == [HELLO, first["output"][0]]
        assert "previous_response_id" not in sent
    else:
        assert (len(sent["input"]), sent["previous_response_id"]) == (1, first["id"])
    assert world.server.generations[1].context[:2] == [HELLO, first["output"][0]]


@in_virtual_time
async def test_a_parent_that_the_server_has_lost_is_sent_in_full_once_on_the_same_socket():
    """And the store is not relied on any more: the next lost memory costs no refusal.

    Source: WebSocket mode guide, "previous_response_not_found".
    """
    world = World(transport="websocket")
    async with world.session:
        first = await world.turn()
        world.server.held.clear()
        await world.turn("More.")
        assert [len(frame["input"]) for frame in world.frames] == [1, 1, 3]
        assert len(world.network.lines) == 1
        world.network.lines[0].cut()
        await world.turn("Still more.")
    assert len(world.frames) == 4
    assert world.server.generations[-1].context[:2] == [HELLO, first["output"][0]]


@in_virtual_time
async def test_behind_a_refused_turn_everything_is_sent():
    """It has taken its parent out of the connection's memory, so the increment would only be refused.

    Source: WebSocket mode guide, "Failed continuations".
    """
    world = World(transport="websocket")
    async with world.session:
        await world.turn(store=False)
        world.server.refusals.append(Refusal(400, "invalid_value"))
        with pytest.raises(Refused):
            await world.turn("Wrong.", store=False)
        await world.turn("More.", store=False)
    assert [len(frame["input"]) for frame in world.frames] == [1, 1, 3]


@in_virtual_time
async def test_a_parent_that_only_the_server_knew_is_refused_when_it_is_lost():
    """There is nothing more to send: one resend, and the server's word goes to the app."""
    world = World(transport="websocket")
    async with world.session:
        with pytest.raises(Refused) as refused:
            await world.turn(previous_response_id="resp_unknown")
    assert refused.value.code == "previous_response_not_found"
    assert refused.value.param == "previous_response_id"


@in_virtual_time
async def test_a_conversation_may_begin_anew_or_behind_another_response():
    """`previous_response_id` in a create says where the conversation goes on; None is nowhere."""
    world = World()
    async with world.session as session:
        first = await world.turn()
        second = await world.turn("Second.")
        branch = await world.turn("Instead.", previous_response_id=first["id"])
        assert session.history.response_id == branch["id"]
        assert len(world.server.generations[2].context) == 3
        await world.turn("Behind it.")
        assert len(world.server.generations[3].context) == 5
        await world.turn("Afresh.", previous_response_id=None)
        assert len(world.server.generations[4].context) == 1
        assert len(session.history) == 2
        with pytest.raises(OpenlineError, match="previous_response_id"):
            session.create(input="x", previous_response_id=7)
    assert second["status"] == "completed"


@in_virtual_time
async def test_a_turn_of_a_kept_conversation_leaves_the_history_alone():
    """`conversation` is kept by the server, and excludes `previous_response_id`."""
    world = World()
    async with world.session as session:
        await world.turn()
        await world.turn("More.", conversation="conv_1")
        assert len(session.history) == 2
    assert "previous_response_id" not in world.frames[-1]


@in_virtual_time
async def test_a_caller_that_keeps_the_conversation_itself_passes_it():
    """Its id while the server knows it, everything of it otherwise; the session's own history is left alone."""
    world = World(transport="websocket")
    theirs = History()
    async with world.session as session:
        for text in ("Hello.", "More."):
            theirs.add(text, await world.turn(text, store=False, past=theirs))
        assert [len(frame["input"]) for frame in world.frames] == [1, 1]
        world.network.lines[0].cut()
        await world.turn("Again.", store=False, past=theirs)
        assert session.history.is_empty
    assert len(world.frames[-1]["input"]) == 5


@in_virtual_time
async def test_a_history_of_another_process_is_gone_on_with():
    """A stored parent by its id, and over a socket: it is no first turn."""
    world = World()
    async with world.session:
        first = await world.turn()
    history = History([HELLO, *first["output"]], response_id=first["id"], is_stored=True)
    again = connect("http://fake/v1", dial=world.network, history=history, session_id="sess_mine")
    async with again as session:
        assert (session.id, session.transport) == ("sess_mine", "websocket")
        await session.create(input="More.").response()
    assert world.frames[-1]["previous_response_id"] == first["id"]


@pytest.mark.parametrize("transport", ["websocket", "http"])
@in_virtual_time
async def test_keys_go_to_every_server_in_a_header_and_in_frames_only_where_they_are_known(transport):
    """A header that a server does not know does nothing; an unknown field of a body is refused by some."""
    ours, plain = World(transport=transport), World(transport=transport, knows_keys=False)
    for world in (ours, plain):
        async with world.session as session:
            stream = session.create(input="Hello.", idempotency_key="mine")
            assert stream.idempotency_key == "mine"
            await stream.response()
    assert list(ours.server.keys) == ["mine"]
    assert not any("idempotency_key" in frame for frame in [*plain.frames, *plain.posts])


@pytest.mark.parametrize("key", ["", "x" * 256, "new\nline", "ü", " blank", "blank "])
def test_a_key_has_a_form(key):
    """1 to 255 printable characters, that a header can carry."""
    with pytest.raises(OpenlineError, match="idempotency_key"):
        World().session.create(input="Hello.", idempotency_key=key)


# A connection's life.


@in_virtual_time
async def test_a_socket_is_replaced_between_turns_before_the_server_ends_it():
    """At `connection_seconds_max`: a turn that began before it ends on the old one."""
    world = World(transport="websocket", settings={"connection_seconds_max": 100})
    async with world.session:
        await world.turn(store=False)
        await asyncio.sleep(99)
        await world.turn(store=False)
        assert len(world.network.lines) == 1
        await asyncio.sleep(1)
        await world.turn(store=False)
    assert len(world.network.lines) == 2
    assert world.network.lines[0].is_cut
    assert len(world.frames[-1]["input"]) == 5, "the new connection holds nothing"


@in_virtual_time
async def test_a_socket_that_closed_between_turns_is_replaced_without_a_word():
    """A server that drains closes with 1001: nothing was sent, so nothing is in doubt, on any server."""
    world = World(transport="websocket", knows_keys=False)
    async with world.session:
        await world.turn(store=False)
        world.network.lines[0].cut()
        await world.turn(store=False)
    assert [len(line.sent) for line in world.network.lines] == [1, 1]


@in_virtual_time
async def test_the_last_word_of_an_old_connection_is_heard_between_turns():
    """`websocket_connection_limit_reached` on an idle socket: the next create goes to another.

    Source: WebSocket mode guide, "Connection life".
    """
    world = World(transport="websocket")
    async with world.session:
        await world.turn()
        error = {"code": "websocket_connection_limit_reached", "message": "60 minutes."}
        world.network.lines[0].deliver(msgspec.json.encode({"type": "error", "status": 400, "error": error}).decode())
        await asyncio.sleep(1)
        assert world.network.lines[0].is_cut
        await world.turn("More.")
    assert [len(line.sent) for line in world.network.lines] == [1, 1]


@in_virtual_time
async def test_a_create_that_meets_the_connections_end_goes_to_another():
    """The two crossed on the wire: the create was refused, so it is sent again."""
    world = World(transport="websocket", knows_keys=False)
    async with world.session:
        await world.turn(store=False)
        world.server.refusals.append(Refusal(400, "websocket_connection_limit_reached"))
        await world.turn("More.", store=False)
    assert [len(line.sent) for line in world.network.lines] == [2, 1]
    assert len(world.server.generations) == 2


@in_virtual_time
async def test_a_turn_outlives_its_connection():
    """A server that ends an old connection in mid-turn says so, and holds the turn: it goes on over another one."""
    world = World(transport="websocket", words=30)
    async with world.session as session:
        stream = session.create(input="Hello.")
        await anext(stream)
        error = {"code": "websocket_connection_limit_reached", "message": "60 minutes."}
        world.network.lines[0].deliver(msgspec.json.encode({"type": "error", "status": 400, "error": error}).decode())
        assert (await stream.response())["status"] == "completed"
    assert len(world.network.lines) == 2
    assert len(world.server.generations) == 1


@in_virtual_time
async def test_what_is_no_json_ends_the_line():
    """A message that cannot be read may have been anything: the turn is resumed."""
    world = World(transport="websocket", words=30)
    async with world.session as session:
        stream = session.create(input="Hello.")
        await anext(stream)
        world.network.lines[0].deliver("{")
        assert (await stream.response())["status"] == "completed"
    assert [frame.get("starting_after") for frame in world.frames] == [None, 3]


# Patience.


@in_virtual_time
async def test_a_turn_on_which_nothing_comes_is_resumed():
    """`idle_seconds_max` between two events, from the create on; each event begins it anew."""
    silent = [Fault(cut_after=0, is_silent=True), Fault(cut_after=2, is_silent=True)]
    world = World(*silent, transport="websocket", settings={"idle_seconds_max": 50})
    loop = asyncio.get_running_loop()
    async with world.session:
        await world.turn()
    assert 100 < loop.time() < 101
    assert len(world.server.generations) == 1


@pytest.mark.parametrize("refused", [2, 3])
@in_virtual_time
async def test_an_overloaded_server_is_asked_again_so_many_times(refused):
    """`refused_tries_max` times, and not before its Retry-After."""
    world = World(transport="websocket", settings={"refused_tries_max": 2})
    world.server.refusals.extend(Refusal(503, "server_is_overloaded", **{"retry-after": "7"}) for _ in range(refused))
    async with world.session:
        if refused == 2:
            await world.turn()
        else:
            with pytest.raises(Refused) as told:
                await world.turn()
            assert (told.value.status, told.value.retry_after) == (503, 7)
    assert 14 <= asyncio.get_running_loop().time() < 16
    assert len(world.frames) == 3


@in_virtual_time
async def test_a_server_that_wants_a_long_wait_is_not_waited_for():
    """Above `retry_after_seconds_max` the app is told, with the time."""
    world = World(transport="http", settings={"retry_after_seconds_max": 10})
    for seconds in ("10", "10.5"):
        world.server.refusals.append(Refusal(429, "rate_limit_exceeded", **{"retry-after": seconds}))
    async with world.session:
        with pytest.raises(Refused) as told:
            await world.turn()
    assert told.value.retry_after == 10.5
    assert len(world.posts) == 2


@pytest.mark.parametrize(("failing", "succeeds"), [(4, True), (5, False)])
@in_virtual_time
async def test_tries_are_counted_until_something_new_comes(failing, succeeds):
    """`tries_max` of them in a row, each progress begins anew; the app is told that nothing was sent."""
    faults = [Fault(cut_after=2), *[Fault(refuse="fail")] * 3, Fault(cut_after=1), *[Fault(refuse="fail")] * failing]
    world = World(*faults, transport="websocket", settings={"tries_max": 5})
    async with world.session:
        if succeeds:
            await world.turn()
        else:
            with pytest.raises(ConnectionLost, match="cannot be reached") as lost:
                await world.turn()
            assert lost.value.may_have_run
            assert lost.value.response["id"] == "resp_0"


@in_virtual_time
async def test_a_server_that_cannot_be_reached_is_given_up_in_time():
    """`recovery_seconds_max` from the first failure on, with waits of at most `backoff_seconds_max`."""
    settings = {"tries_max": 10_000, "recovery_seconds_max": 60, "backoff_seconds_max": 4}
    world = World(*[Fault(refuse="fail")] * 10_000, settings=settings)
    async with world.session:
        with pytest.raises(ConnectionLost, match="nobody listens") as lost:
            await world.turn()
    assert not lost.value.may_have_run
    assert 60 <= asyncio.get_running_loop().time() <= 64


@in_virtual_time
async def test_the_first_try_after_a_cut_comes_at_once():
    """Most lines break alone: the turn goes on one round trip later."""
    world = World(Fault(cut_after=4), transport="websocket")
    async with world.session:
        await world.turn()
    assert asyncio.get_running_loop().time() < 0.05


# Bounds.


@pytest.mark.parametrize("transport", ["websocket", "http"])
@in_virtual_time
async def test_a_create_larger_than_a_message_is_not_sent(transport):
    """At `message_bytes_max` it goes out; a byte more, and the app is told what to do."""
    plain = World(transport=transport)
    async with plain.session:
        await plain.turn("ä")
    size = len(msgspec.json.encode((plain.frames or plain.posts)[0]))
    exact = World(transport=transport, settings={"message_bytes_max": size})
    short = World(transport=transport, settings={"message_bytes_max": size - 1})
    async with exact.session, short.session:
        await exact.turn("ä")
        with pytest.raises(OpenlineError, match=f"has {size} bytes, more than message_bytes_max = {size - 1}"):
            await short.turn("ä")
    assert not short.posts
    assert not short.frames


@in_virtual_time
async def test_what_is_not_taken_waits_on_the_line():
    """An app that stops reading stops the line: `buffered_bytes_max`, one event more, and 16 that were handed over."""
    world = World(transport="websocket", words=1000, settings={"buffered_bytes_max": 4_000})
    async with world.session as session, session.create(input="Hello.") as stream:
        await anext(stream)
        await asyncio.sleep(100)
        line = world.network.lines[0]
        taken = line.delivered - len(line.to_client)
        assert 20 < taken < 50
        await asyncio.sleep(100)
        assert line.delivered - len(line.to_client) == taken
        rest = [event async for event in stream]
    assert [event["sequence_number"] for event in rest] == list(range(1, len(rest) + 1))


# One turn after another.


@in_virtual_time
async def test_a_session_takes_one_turn_at_a_time():
    """The message names the stream that runs, and what to do; the turn itself goes on."""
    world = World(transport="websocket")
    async with world.session as session:
        first = session.create(input="Hello.")
        await anext(first)
        with pytest.raises(OpenlineError, match="still runs"):
            await world.turn()
        assert (await first.response())["status"] == "completed"
        await world.turn()


@in_virtual_time
async def test_a_stream_is_read_in_one_place():
    """Two readers would each get a part."""
    world = World(transport="websocket")
    async with world.session as session:
        stream = session.create(input="Hello.")
        first = asyncio.create_task(stream.response())
        await asyncio.sleep(0)
        with pytest.raises(OpenlineError, match="two places"):
            await anext(stream)
        await first


@in_virtual_time
async def test_a_closed_session_takes_nothing():
    """Neither a create nor the first read of one made before."""
    world = World()
    async with world.session as session:
        stream = session.create(input="Hello.")
    with pytest.raises(OpenlineError, match="closed"):
        session.create(input="Hello.")
    with pytest.raises(OpenlineError, match="closed"):
        await stream.response()


@in_virtual_time
async def test_a_loop_that_is_left_cancels_its_turn():
    """The server stops generating, what was said so far stays in the conversation, and the next turn may start at once."""
    world = World(transport="websocket", words=1000)
    async with world.session as session:
        async for event in session.create(input="Hello.", store=False):
            if event["type"] == "response.output_text.delta":
                break
        world.server.words = 3
        await world.turn("More.", store=False)
        assert len(world.frames[-1]["input"]) == 1, "the connection holds what was cut"
        assert len(session.history) == 4
    cut = world.server.generations[0]
    assert cut.events[-1]["type"] == "response.incomplete"
    assert len(cut.events) < 20


@pytest.mark.parametrize("knows_keys", [True, False])
@in_virtual_time
async def test_a_loop_that_is_left_at_the_last_event_leaves_nothing(knows_keys):
    """Many loops end so: nothing is cancelled, and the socket stays."""
    world = World(transport="websocket", knows_keys=knows_keys)
    async with world.session as session:
        for _ in range(2):
            async for event in session.create(input="Hello.", store=False):
                if event["type"] == "response.completed":
                    break
        stream = session.create(input="Hello.", store=False)
        while (await anext(stream))["type"] != "response.completed":
            assert not stream.is_ended
        assert stream.is_ended
        await world.turn("More.", store=False)
    assert [frame["type"] for frame in world.frames] == ["response.create"] * 4
    assert [len(frame["input"]) for frame in world.frames] == [1] * 4
    assert len(world.network.lines) == 1


@pytest.mark.parametrize("transport", ["websocket", "http"])
@pytest.mark.parametrize("knows_keys", [True, False])
@in_virtual_time
async def test_cancelling_ends_a_turn_that_another_task_reads(transport, knows_keys):
    """Its loop ends, and the response says why; servers without our extensions are told by the end of the connection."""
    world = World(transport=transport, knows_keys=knows_keys, words=1000)
    async with world.session as session:
        stream = session.create(input="Hello.", store=False)

        async def read():
            return [event async for event in stream]

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.1)
        await stream.cancel()
        events = await reading
        response = await stream.response()
        assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "cancelled"})
        assert response["output"][0]["status"] == "incomplete"
        if knows_keys:
            assert events[-1]["response"] == response
        await asyncio.sleep(0.01)
        assert world.server.generations[0].has_ended
        assert session.history.items()[-1] == response["output"][0]
        await stream.cancel()
        world.server.words = 3
        await world.turn("More.", store=False)
        assert world.server.generations[1].context[:2] == [HELLO, response["output"][0]]
        sent = (world.frames or world.posts)[-1]
        assert ("previous_response_id" in sent) == (knows_keys and transport == "websocket"), "no server refused it"


@pytest.mark.parametrize("breaks", [[], [Fault(cut_after=6)], [Fault(cut_after=6), Fault(cut_after=0)]])
@in_virtual_time
async def test_a_background_turn_is_resumed_by_its_id_on_any_server(breaks):
    """It runs without a connection, and its events can be read again.

    Source: Background mode guide, "Streaming a background response".
    """
    world = World(*breaks, knows_keys=False, words=10)
    async with world.session as session:
        events = [event async for event in session.create(input="Hello.", background=True)]
    assert events == world.server.generations[0].events
    assert len(world.server.generations) == 1


@in_virtual_time
async def test_a_background_turn_is_cancelled_by_its_id_on_any_server():
    """The end of the connection would not end it."""
    world = World(knows_keys=False, words=1000)
    async with world.session as session:
        async for event in (stream := session.create(input="Hello.", background=True)):
            if event["type"] == "response.output_text.delta":
                break
        await asyncio.sleep(0.1)
        assert world.server.generations[0].has_ended
        assert (await stream.response())["incomplete_details"] == {"reason": "cancelled"}
    assert world.network.paths[-1] == "POST /responses/resp_0/cancel"


@in_virtual_time
async def test_what_was_never_read_was_never_sent():
    """Cancelling it is easy, and its response says that there is none."""
    world = World()
    async with world.session as session:
        stream = session.create(input="Hello.")
        await stream.cancel()
        with pytest.raises(Refused, match="request_cancelled"):
            await stream.response()
    assert not world.network.paths


@in_virtual_time
async def test_a_cancel_that_is_not_answered_gives_up_the_line():
    """After `cancel_seconds_max`; the app goes on, and so does the session, on another line."""
    world = World(Fault(cut_after=5, is_silent=True), transport="websocket", words=1000)
    async with world.session as session:
        stream = session.create(input="Hello.")
        for _ in range(5):
            await anext(stream)
        before = asyncio.get_running_loop().time()
        await stream.cancel()
        assert asyncio.get_running_loop().time() - before == pytest.approx(5, abs=0.1)
        assert (await stream.response())["incomplete_details"] == {"reason": "cancelled"}
        world.server.words = 3
        await world.turn("More.")
    assert len(world.network.lines) == 2


@pytest.mark.parametrize("transport", ["websocket", "http"])
@in_virtual_time
async def test_a_detached_turn_runs_on_and_can_be_taken_up_by_its_key(transport):
    """By another session, with another form of the create: nothing is generated twice, and every event is there."""
    world = World(transport=transport)
    async with world.session as session:
        stream = session.create(input="Hello.", idempotency_key="mine")
        async for _ in stream:
            stream.detach()
            break
        with pytest.raises(ConnectionLost, match="by its idempotency key"):
            await stream.response()
    other = connect("http://fake/v1", dial=world.network, history=History([HELLO]))
    async with other as session:
        stream = session.create(input="Hello.", idempotency_key="mine", resume=True)
        events = [event async for event in stream]
        assert len(session.history) == 3
    assert len(world.server.generations) == 1
    assert events == world.server.generations[0].events
    assert events[-1]["type"] == "response.completed"


@in_virtual_time
async def test_a_key_that_was_never_sent_is_sent():
    """`resume=True` asks first, and sends the create where nothing is known of it."""
    world = World(transport="http")
    async with world.session as session:
        response = await session.create(input="Hello.", idempotency_key="mine", resume=True).response()
    assert response["status"] == "completed"
    assert world.network.paths == ["GET /responses?idempotency_key=mine", "POST /responses"]


@in_virtual_time
async def test_a_create_that_is_refused_after_its_key_was_not_found_ran_nowhere():
    """The server has said that it holds nothing of the key, and then why: that is no lost connection."""
    world = World(transport="http")
    world.server.refusals.append(Refusal(400, "invalid_value"))
    async with world.session as session:
        with pytest.raises(Refused, match="invalid_value"):
            await session.create(input="Hello.", idempotency_key="mine", resume=True).response()


@in_virtual_time
async def test_a_key_that_may_have_been_sent_to_a_plain_server_is_not_sent_again():
    """It knows no keys, so nobody can say whether the turn ran."""
    world = World(transport="http", knows_keys=False)
    async with world.session as session:
        with pytest.raises(ConnectionLost, match="nobody can say"):
            await session.create(input="Hello.", idempotency_key="mine", resume=True).response()
        response = await session.create(
            input="Hello.", idempotency_key="mine", resume=True, on_lost="restart"
        ).response()
    assert response["status"] == "completed"
    assert len(world.server.generations) == 1


@in_virtual_time
async def test_reading_that_was_interrupted_goes_on():
    """A time limit around one read costs nothing: the turn is read by a task of its own, and the next read goes on."""
    world = World(transport="websocket", words=5)
    async with world.session as session:
        stream = session.create(input="Hello.")
        events = []
        while not stream.is_ended:
            try:
                async with asyncio.timeout(0.025):
                    async for event in _until_end(stream):
                        events.append(event)  # noqa: PERF401 - those before the time limit count
            except TimeoutError:
                continue
        assert events == world.server.generations[0].events
        assert len(world.server.generations) == 1
        assert len(world.frames) == 1, "on the same line"
        assert (await stream.response())["status"] == "completed"


async def _until_end(stream):
    """Without leaving the stream when the loop is left."""
    while True:
        try:
            yield await anext(stream)
        except StopAsyncIteration:
            return


@in_virtual_time
async def test_waiting_for_a_response_that_is_given_up_cancels_the_turn():
    """As leaving its loop does: nobody is there for it any more."""
    world = World(transport="websocket", words=1000)
    async with world.session as session:
        stream = session.create(input="Hello.")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await stream.response()
        assert stream.is_ended
        assert world.server.generations[0].has_ended


@in_virtual_time
async def test_a_session_that_is_closed_in_mid_turn_cancels_it():
    """Nothing of it runs on, on either side."""
    world = World(transport="websocket", words=1000)
    async with world.session as session:
        stream = session.create(input="Hello.")
        await anext(stream)
    assert world.server.generations[0].has_ended
    assert stream.is_ended


# What cannot be mended.


@in_virtual_time
async def test_a_plain_server_that_is_cut_off_in_mid_turn_loses_it():
    """The app learns what is known: the key, the response so far, that it ran."""
    world = World(Fault(cut_after=6), transport="websocket", knows_keys=False)
    async with world.session as session:
        stream = session.create(input="Hello.")
        for _ in range(6):
            await anext(stream)
        with pytest.raises(ConnectionLost, match="nobody can say whether it ran: on_lost='restart'") as lost:
            await anext(stream)
        assert lost.value.idempotency_key == stream.idempotency_key
        assert lost.value.may_have_run
        assert lost.value.response["output"][0]["content"][0]["text"] == "w0.0w0.1"
        assert len(session.history) == 0
        with pytest.raises(ConnectionLost):
            await stream.response()
        await world.turn("Go on.")


@in_virtual_time
async def test_events_that_are_no_longer_held_are_missing_and_the_end_is_told():
    """The server trimmed the turn's log: iterating says so, and the response is the one that ended."""
    world = World(Fault(cut_after=4), transport="websocket", words=10)
    async with world.session as session:
        stream = session.create(input="Hello.")
        for _ in range(4):
            await anext(stream)
        generation = world.server.generations[0]
        generation.first_kept = 100
        with pytest.raises(ConnectionLost, match="no longer held") as lost:
            await anext(stream)
        assert lost.value.response == generation.events[-1]["response"] == await stream.response()
        assert session.history.response_id == "resp_0"
        await world.turn("More.")
    assert world.server.generations[1].context[:1] == [HELLO]


@pytest.mark.parametrize(("refused", "is_lost"), [(2, False), (1000, True)])
@in_virtual_time
async def test_a_turn_that_another_process_runs_is_asked_for_until_it_can_be_read(refused, is_lost):
    """Or, once it has ended and still cannot be read, its end is what there is."""
    world = World(Fault(cut_after=4), transport="http", words=10)
    world.server.reads_refused = refused
    async with world.session as session:
        stream = session.create(input="Hello.")
        for _ in range(4):
            await anext(stream)
        if is_lost:
            with pytest.raises(ConnectionLost, match="no longer held"):
                await anext(stream)
        response = await stream.response()
    assert response == world.server.generations[0].events[-1]["response"]
    assert len(world.server.generations) == 1


@in_virtual_time
async def test_a_turn_that_another_process_runs_is_waited_for():
    """However long it takes: a server that says so is asked for its end, less and less often."""
    world = World(transport="http", words=30_000)  # five minutes
    async with world.session as session:
        stream = session.create(input="Hello.", idempotency_key="mine")
        await anext(stream)
        stream.detach()
    world.server.generations[0].first_kept = 100_000  # as one whose events are elsewhere
    async with connect("http://fake/v1", dial=world.network, history=History()) as session:
        response = await session.create(input="Hello.", idempotency_key="mine", resume=True).response()
    assert response["id"] == "resp_0"
    assert len(world.server.generations) == 1
    assert len(world.network.paths) < 100


@pytest.mark.parametrize("transport", ["websocket", "http"])
@in_virtual_time
async def test_a_turn_that_was_found_and_then_lost_is_run_again(transport):
    """What the look-up found of it died with its server: nothing of it was shown, so the other one is the turn."""
    world = World(transport=transport, words=100)
    async with world.session as session:
        stream = session.create(input="Hello.", idempotency_key="mine")
        await anext(stream)
        stream.detach()
    lost_after_the_look_up = FakeDial(world.server, [Fault(), Fault(crash_after=0)])
    other = connect("http://fake/v1", dial=lost_after_the_look_up, transport=transport, history=History([HELLO]))
    async with other as session:
        stream = session.create(input="Hello.", idempotency_key="mine", resume=True)
        events = [event async for event in stream]
        assert stream.restarts == 0
    assert events == world.server.generations[1].events
    assert len(world.server.generations) == 2


@in_virtual_time
async def test_a_first_form_that_was_only_late_is_found_by_its_key():
    """The line broke, so the create went out again, in full; the first one arrived in between, and has the key."""
    world = World(Fault(), Fault(late_seconds=0.01), transport="websocket")
    async with world.session:
        await world.turn(store=False)
        first = world.network.lines[0]
        first.fault = Fault(late_seconds=0.015)
        reading = asyncio.create_task(world.turn("More.", store=False))
        while len(first.sent) < 2:  # noqa: ASYNC110 - the model of a network has no event for it
            await asyncio.sleep(0.0001)
        first.cut()
        response = await reading
    assert response["status"] == "completed"
    assert [len(frame["input"]) for frame in world.network.lines[1].sent] == [1, 3]
    assert [path.split("?")[0] for path in world.network.paths] == ["GET /responses", "GET /responses/resp_1"]
    assert len(world.server.generations) == 2


@in_virtual_time
async def test_a_turn_that_was_found_and_died_unseen_is_run_again():
    """Nothing of it was seen, so the app learns nothing of it; the other one has another id."""
    world = World(Fault(late_seconds=0.001), Fault(), Fault(crash_after=0), transport="http")
    async with world.session as session:
        await session.create(input="Hello.", store=False).response()
        assert session.history.response_id == "resp_1"
    assert world.network.paths[1:3] == [
        "GET /responses?idempotency_key=" + next(iter(world.server.keys)),
        "GET /responses/resp_0?stream=true",
    ]
    assert len(world.server.generations) == 2


@in_virtual_time
async def test_what_nobody_has_read_of_a_turn_that_died_is_void():
    """Some of it had come: the app sees the other generation, from its first event on."""
    world = World(transport="websocket", words=8)
    async with world.session as session:
        stream = session.create(input="Hello.", store=False)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.0005):
                await anext(stream)
        await asyncio.sleep(0.05)
        assert len(world.server.generations[0].events) > 5
        world.server.crash()
        await asyncio.sleep(10)
        events = [event async for event in stream]
    assert events == world.server.generations[1].events
    assert len(world.server.generations) == 2


@in_virtual_time
async def test_an_error_in_mid_turn_is_its_failure_and_the_conversation_is_as_before():
    """Some servers send `error` where ours sends `response.failed`."""
    world = World(transport="websocket", knows_keys=False, words=100)
    async with world.session as session:
        stream = session.create(input="Hello.")
        await anext(stream)
        error = {"type": "error", "status": 500, "error": {"code": "server_error", "message": "It broke."}}
        world.network.lines[0].deliver(msgspec.json.encode(error).decode())
        events = [event async for event in stream]
        assert events[-1] == error
        with pytest.raises(TurnFailed, match="It broke") as failed:
            await stream.response()
        assert failed.value.response["id"] == "resp_0"
        assert session.history.is_empty


@in_virtual_time
async def test_another_server_behind_the_same_name_gets_no_second_create():
    """One that knows no keys cannot tell whether the turn runs elsewhere."""
    world = World(Fault(cut_after=0, late_seconds=0.1), transport="websocket")
    async with world.session as session:
        stream = session.create(input="Hello.")
        reading = asyncio.create_task(stream.response())
        await asyncio.sleep(0.01)
        world.server.knows_keys = False
        with pytest.raises(ConnectionLost):
            await reading
    assert len(world.server.generations) == 1
    assert [len(line.sent) for line in world.network.lines] == [1, 0]


@in_virtual_time
async def test_a_server_that_does_not_stream_is_understood():
    """A whole response in place of events: it is the end, and the only event."""
    world = World(transport="http", knows_keys=False)
    world.server.streams = False
    async with world.session as session:
        stream = session.create(input="Hello.")
        events = [event async for event in stream]
        assert [event["type"] for event in events] == ["response.completed"]
        assert await stream.response() == events[0]["response"]


@in_virtual_time
async def test_nothing_is_left_when_a_stream_is_thrown_away():
    """An iterator that is collected closes its stream."""
    world = World(transport="websocket", words=1000)
    async with world.session as session:
        iterator = aiter(session.create(input="Hello."))
        await anext(iterator)
        del iterator
        gc.collect()
        await asyncio.sleep(0.1)
        assert world.server.generations[0].has_ended


def test_what_is_long_lived_says_its_state():
    """The `repr` is the inspector."""
    world = World()
    stream = world.session.create(input="Hello.", idempotency_key="mine")
    assert repr(world.session).startswith("<Session sess_")
    assert "<History items=0 bytes=0 response=None>" in repr(world.session)
    assert repr(stream).startswith("<ResponseStream new key=mine")
