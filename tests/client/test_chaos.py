"""A session on a network that does anything, in virtual time: what it promises holds whatever happens.

Source: docs/adr/0013; guarantees of resuming and of idempotent turns.
"""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.fake_network import FakeDial, FakeServer, Fault
from openline import ClientSettings, ConnectionLost, connect
from virtual_time import run

TERMINAL = {"response.completed", "response.incomplete", "response.failed"}
FAULTS_MAX = 8
# As patient as it takes: what is shown is what happens when the server is there again in the end.
SETTINGS = ClientSettings(
    tries_max=4 * FAULTS_MAX, refused_tries_max=4 * FAULTS_MAX, recovery_seconds_max=100_000, idle_seconds_max=30
)

refusals = st.sampled_from(["fail", "break", 502, 503])
places = st.integers(0, 12)
faults = st.one_of(
    st.builds(Fault, refuse=refusals),
    st.builds(Fault, arrives=st.just(False)),
    st.builds(Fault, late_seconds=st.sampled_from([0.02, 0.3, 5.0]), cut_after=st.integers(0, 3)),
    st.builds(Fault, cut_after=places, is_silent=st.booleans()),
)
crashes = st.builds(Fault, crash_after=places)
turns = st.lists(st.booleans(), min_size=1, max_size=4)  # whether each is stored
transports = st.sampled_from(["auto", "websocket", "http"])
seeds = st.integers(0, 2**32)


async def talk(server, network, stored, transport, seed, on_lost="raise"):
    """Some turns, each read event by event; what the app saw of each, and what was said before it as the session knows it."""
    told = []
    session = connect(
        "http://fake/v1",
        transport=transport,
        settings=SETTINGS,
        dial=network,
        chance=random.Random(seed),
    )
    async with session:
        for number, store in enumerate(stored):
            said = session.history.items()
            await asyncio.sleep(0.01)
            stream = session.create(input=f"turn {number}", store=store, on_lost=on_lost)
            events, lost = [], None
            try:
                async for event in stream:
                    events.append(event)  # noqa: PERF401 - what came before an error counts
            except ConnectionLost as error:
                lost = error
            else:
                assert await stream.response() == events[-1]["response"]
            told.append((stream, said, events, lost))
    for generation in server.generations:
        await asyncio.wait({generation.task})
    return told


def generation_of(server, events):
    (generation,) = (each for each in server.generations if each.id == events[0]["response"]["id"])
    return generation


def asked_in(server, text):
    """The generations that some input began."""
    return [each for each in server.generations if each.context[-1]["content"][0]["text"] == text]


def whatever_happens(check, wrong, examples):
    """Try a check on many networks."""

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(st.lists(wrong, max_size=FAULTS_MAX), turns, transports, seeds)
    def walk(faults, stored, transport, seed):
        check(faults, stored, transport, seed)

    walk()


often = pytest.mark.parametrize("examples", [40, pytest.param(5_000, marks=pytest.mark.long)])


@often
def test_with_extensions_every_turn_is_whole_and_ran_once(examples):
    """Whatever is cut, lost, late or refused: every event once and in order, of one generation, which read everything."""

    def check(faults, stored, transport, seed):
        server = FakeServer(knows_keys=True)
        told = run(talk(server, FakeDial(server, faults), stored, transport, seed))
        for number, (_, said, events, lost) in enumerate(told):
            assert lost is None, lost
            generation = generation_of(server, events)
            assert events == generation.events
            assert generation.context[:-1] == said
            assert asked_in(server, f"turn {number}") == [generation], "one generation a create"
        assert len(server.generations) == len(stored)

    whatever_happens(check, faults, examples)


@often
def test_a_server_that_crashes_costs_a_turn_or_nothing_but_never_half_of_two(examples):
    """What the app saw is of one generation, from its first event on; where it was lost, the app is told so."""

    def check(faults, stored, transport, seed):
        server = FakeServer(knows_keys=True)
        for _, said, events, lost in run(talk(server, FakeDial(server, faults), stored, transport, seed)):
            if events:
                generation = generation_of(server, events)
                assert events == generation.events[: len(events)]
                assert generation.context[:-1] == said
            if lost is None:
                assert events[-1]["type"] in TERMINAL
            else:
                assert "on_lost" in lost.why

    whatever_happens(check, faults | crashes, examples)


@often
def test_without_extensions_a_create_runs_at_most_once(examples):
    """A create whose fate is unknown is not sent again: the app is told, and what it saw is of one generation."""

    def check(faults, stored, transport, seed):
        server = FakeServer(knows_keys=False)
        told = run(talk(server, FakeDial(server, faults), stored, transport, seed))
        for number, (_, said, events, lost) in enumerate(told):
            assert len(asked_in(server, f"turn {number}")) <= 1
            if events:
                generation = generation_of(server, events)
                assert events == generation.events[: len(events)]
                assert generation.context[:-1] == said
            assert (lost is None) == (bool(events) and events[-1]["type"] in TERMINAL)

    whatever_happens(check, faults | crashes, examples)


@often
def test_without_extensions_nothing_is_lost_that_was_surely_not_sent(examples):
    """Connections that did not come about, and sockets that closed between turns, cost no turn on any server."""

    def check(faults, stored, transport, seed):
        server = FakeServer(knows_keys=False)
        for _, said, events, lost in run(talk(server, FakeDial(server, faults), stored, transport, seed)):
            assert lost is None, lost
            assert generation_of(server, events).context[:-1] == said
        assert len(server.generations) == len(stored)

    not_reached = st.sampled_from([Fault(refuse="fail"), Fault(refuse=503), Fault(closes_between=True)])
    whatever_happens(check, not_reached, examples)


@often
@pytest.mark.parametrize("knows_keys", [True, False])
def test_an_app_that_takes_another_generation_gets_a_whole_one(knows_keys, examples):
    """With `on_lost="restart"` nothing is lost; each `response.created` says that what came before it is void."""

    def check(faults, stored, transport, seed):
        server = FakeServer(knows_keys=knows_keys)
        for stream, said, events, lost in run(
            talk(server, FakeDial(server, faults), stored, transport, seed, "restart")
        ):
            assert lost is None, lost
            begins = [at for at, event in enumerate(events) if event["type"] == "response.created"]
            assert len(begins) <= stream.restarts + 1
            for begin, end in zip(begins, [*begins[1:], len(events)], strict=True):
                generation = generation_of(server, events[begin:])
                assert events[begin:end] == generation.events[: end - begin]
            assert events[-1]["type"] in TERMINAL
            assert generation.context[:-1] == said

    whatever_happens(check, faults | crashes, examples)


@often
@pytest.mark.parametrize("knows_keys", [True, False])
def test_a_cancelled_turn_ends_on_both_sides_and_the_conversation_goes_on(knows_keys, examples):
    """No generation runs on, no task is left, and the next turn knows what was said."""

    def check(faults, stored, transport, seed):
        server = FakeServer(knows_keys=knows_keys, words=50)
        run(cancel_one(server, FakeDial(server, faults), transport, seed))

    whatever_happens(check, faults, examples)


async def cancel_one(server, network, transport, seed):
    chance = random.Random(seed)
    async with connect(
        "http://fake/v1", transport=transport, settings=SETTINGS, dial=network, chance=chance
    ) as session:
        stream = session.create(input="cancelled", store=False)
        before = chance.randrange(8)
        try:
            async for _ in stream:
                before -= 1
                if before < 0:
                    break
        except ConnectionLost:
            assert not server.knows_keys
        await stream.aclose()
        network.faults = iter(())
        said = session.history.items()
        await session.create(input="next", store=False).response()
        assert server.generations[-1].context[:-1] == said
    await asyncio.sleep(10)  # what is late has arrived
    for generation in server.generations:
        assert generation.has_ended or generation.task.done()
