"""The session for programs without an event loop."""

from __future__ import annotations

import gc
import inspect
import subprocess
import sys
import threading

import pytest

import openline
from client.fake_network import FakeDial, FakeServer, Fault
from openline import ConnectionLost, OpenlineError, Refused, connect, connect_sync
from openline.client.session import Session
from openline.client.stream import ResponseStream
from openline.client.sync import SyncResponseStream, SyncSession


def session_with(server, *faults, **options):
    return connect_sync("http://fake/v1", dial=FakeDial(server, faults), model="m", **options)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "openline-session"]


def test_a_loop_gives_every_event_and_the_response():
    """The same events, by a plain `for`."""
    server = FakeServer(knows_keys=True)
    with session_with(server, transport="websocket") as session:
        stream = session.create(input="Hello.", idempotency_key="mine")
        events = list(stream)
        assert events == server.generations[0].events
        assert stream.response() == events[-1]["response"]
        assert (stream.idempotency_key, stream.response_id, stream.is_ended) == ("mine", "resp_0", True)
        assert next(session.create(input="More."))["type"] == "response.created"
        assert (session.transport, session.has_extensions, len(session.history)) == ("websocket", True, 2)
        assert session.id.startswith("sess_")
    assert not threads()


def test_recovery_goes_on_behind_it():
    """A cut in mid-turn is not seen."""
    server = FakeServer(knows_keys=True)
    with session_with(server, Fault(cut_after=3), transport="websocket") as session:
        assert list(session.create(input="Hello.")) == server.generations[0].events


def test_leaving_a_loop_cancels_its_turn():
    """As with the asynchronous one; and the next turn may start at once."""
    server = FakeServer(knows_keys=True, words=1000)
    with session_with(server, transport="websocket") as session:
        for event in session.create(input="Hello."):
            if event["type"] == "response.output_text.delta":
                break
        assert server.generations[0].has_ended
        with session.create(input="More.") as stream:
            next(stream)
        assert stream.response()["incomplete_details"] == {"reason": "cancelled"}
        stream = session.create(input="Still more.")
        next(stream)
        stream.detach()
        stream.close()
        with pytest.raises(ConnectionLost):
            stream.response()
        assert not server.generations[2].has_ended


def test_errors_are_the_same():
    """What the server says, and what cannot be done here."""
    server = FakeServer(knows_keys=True)
    with session_with(server, transport="websocket") as session:
        with pytest.raises(Refused, match="previous_response_not_found"):
            session.create(input="Hello.", previous_response_id="resp_no").response()
        with pytest.raises(OpenlineError, match="stream_id"):
            session.create(input="Hello.", stream_id="lane")
    session.close()
    with pytest.raises(OpenlineError, match="closed"):
        session.create(input="Hello.")


def test_a_session_that_nobody_closes_leaves_nothing():
    """Its thread ends with it."""
    server = FakeServer(knows_keys=True)
    session = session_with(server, transport="websocket")
    session.create(input="Hello.").response()
    (line,) = server.connections
    del session
    gc.collect()
    assert line.is_cut
    assert not threads()


def test_names_and_arguments_are_those_of_the_asynchronous_session():
    """Whoever knows the one knows the other."""
    assert inspect.signature(connect_sync) == inspect.signature(connect)
    assert inspect.signature(SyncSession.create) == inspect.signature(Session.create)
    for sync, other in ((SyncSession, Session), (SyncResponseStream, ResponseStream)):
        names = {name for name in vars(other) if not name.startswith("_")} - {"aclose", "is_leaving"}
        assert names <= set(dir(sync))


INTERRUPTED = """
import os, signal, sys, threading
sys.path.insert(0, {tests!r})
from client.fake_network import FakeDial, FakeServer
from openline import ClientSettings, connect_sync

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell in the background has taken away
server = FakeServer(knows_keys=True, words=100_000)
settings = ClientSettings(cancel_seconds_max=1000)  # which is not waited for
session = connect_sync("http://fake/v1", dial=FakeDial(server), transport="websocket", settings=settings)
try:
    with session:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        for _ in session.create(input="Hello."):
            pass
except KeyboardInterrupt:
    generation = server.generations[0]
    print("interrupted", generation.has_ended, generation.events[-1]["type"], threading.active_count())
"""


def test_an_interrupt_ends_the_turn_and_the_program():
    """Ctrl-C while it waits: the turn is cancelled on the server, and nothing keeps the process."""
    tests = str(__import__("pathlib").Path(__file__).parent.parent)
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED.format(tests=tests)], capture_output=True, text=True, timeout=30, check=False
    )
    assert ran.stdout == "interrupted True response.incomplete 1\n", ran.stderr
    assert ran.returncode == 0


def test_the_client_is_not_loaded_before_it_is_used():
    """The server imports the package too, and needs nothing of it."""
    code = "import sys, openline; print('openline.client.session' in sys.modules, openline.connect.__name__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False connect\n"
    assert set(openline.__all__) <= set(dir(openline))
    for name in openline.__all__:
        assert getattr(openline, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = openline.nothing
