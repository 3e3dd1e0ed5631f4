"""The turn log: its readers, its window, what it keeps, and how it ends."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.protocol.errors import ProtocolError
from openline.turns.log import LAG_BYTES_MAX, ReaderLagged, TurnLog, Window

RESPONSE = {"id": "resp_1"}
REFUSAL = ProtocolError("rate_limit_exceeded", "Not now.")


async def everything(reader):
    """All that a reader gets until the turn has ended."""
    events = []
    while batch := await reader.read():
        events += batch
    return events


async def waits(awaitable):
    """Whether this waits for something that has not happened; it is left waiting."""
    task = asyncio.ensure_future(awaitable)
    for _ in range(5):
        await asyncio.sleep(0)
    return None if task.done() else task


async def test_a_reader_gets_the_events_in_order_and_then_the_end():
    """What was appended is read in order, in as large pieces as there are; an ended log reads as empty."""
    log = TurnLog()
    with log.deliver() as reader:
        log.append([b"1", b"2"])
        log.append([b"3"])
        assert await reader.read() == [b"1", b"2", b"3"]
        log.append([b"4"], last=RESPONSE)
        assert await reader.read() == [b"4"]
        assert await reader.read() == []
        assert await reader.read() == []
    assert log.response is RESPONSE


async def test_a_waiting_reader_is_woken_by_an_event():
    """A reader that has read everything waits, and an append wakes it."""
    log = TurnLog()
    with log.deliver() as reader:
        reading = await waits(reader.read())
        log.append([b"1"])
        assert await reading == [b"1"]


async def test_a_refused_turn_gives_its_readers_nothing_but_the_error():
    """A refusal is all that any reader gets, whether it waited for it or came later."""
    log = TurnLog()
    with log.deliver() as early:
        reading = await waits(early.read())
        log.refuse(REFUSAL)
        with pytest.raises(ProtocolError) as raised:
            await reading
        assert raised.value is REFUSAL
    with log.observe() as late, pytest.raises(ProtocolError):
        await late.read()
    assert log.response is None


async def test_a_full_window_holds_the_writer_up_until_the_client_has_taken_its_bytes():
    """The writer waits from `bytes_max` on; reading again says that the bytes before were taken."""
    log = TurnLog(Window(10))
    with log.deliver() as reader:
        log.append([b"x" * 9])
        assert await waits(log.writable()) is None
        log.append([b"x"])
        writing = await waits(log.writable())
        assert writing is not None
        await reader.read()  # taken out of the log, but not yet by the transport
        assert not writing.done()
        reading = await waits(reader.read())
        await asyncio.wait_for(writing, 5)
        log.append([b"y"], last=RESPONSE)
        assert await reading == [b"y"]


async def test_the_window_is_shared_by_the_turns_of_a_connection():
    """Bytes that wait for one turn hold up the others of the same connection, and theirs only."""
    window = Window(10)
    one, two, other = TurnLog(window), TurnLog(window), TurnLog(Window(10))
    with one.deliver() as reader, two.deliver():
        one.append([b"x" * 10])
        writing = await waits(two.writable())
        assert writing is not None
        assert await waits(other.writable()) is None
        await reader.read()
        reading = await waits(reader.read())
        await asyncio.wait_for(writing, 5)
        reading.cancel()


async def test_a_reader_that_leaves_gives_its_bytes_back():
    """Whatever waited for a client that has gone counts no more, and its turn is never held up again."""
    window = Window(10)
    log = TurnLog(window)
    with log.deliver() as reader:
        log.append([b"x" * 5])
        await reader.read()
        log.append([b"y" * 20])
        writing = await waits(log.writable())
        assert window.bytes == 25
    await asyncio.wait_for(writing, 5)
    assert window.bytes == 0
    log.append([b"z" * 99])
    assert window.bytes == 0
    assert await waits(log.writable()) is None


async def test_the_last_reader_to_leave_a_running_turn_abandons_it():
    """The turn is told once, by the last of its readers, and not at all if it has ended."""
    told = []
    log = TurnLog(on_abandoned=lambda: told.append("abandoned"))
    first, second = log.deliver(), log.observe()
    first.leave()
    assert told == []
    second.leave()
    second.leave()
    assert told == ["abandoned"]

    ended = TurnLog(on_abandoned=lambda: told.append("late"))
    reader = ended.deliver()
    ended.append([b"1"], last=RESPONSE)
    reader.leave()
    assert told == ["abandoned"]


async def test_what_the_client_has_taken_is_not_kept():
    """The log is trimmed behind its delivering reader, so a long answer costs no more than its window."""
    log = TurnLog(Window(10))
    with log.deliver() as reader:
        for number in range(100):
            log.append([b"%d" % number])
            assert await reader.read() == [b"%d" % number]
            assert len(log._events) == 1
    assert len(log) == 100


async def test_an_observer_that_keeps_up_sees_everything():
    """A second reader gets every event too, whichever of the two wakes first."""
    log = TurnLog()

    async def watch():
        with log.observe() as observer:
            return await everything(observer)

    async def write():
        for number in range(100):
            log.append([b"%d" % number])
            await asyncio.sleep(0)
        log.append([b"end"], last=RESPONSE)

    async def deliver():
        with log.deliver() as reader:
            return await everything(reader)

    expected = [b"%d" % number for number in range(100)] + [b"end"]
    for order in ((watch, deliver, write), (deliver, watch, write), (write, watch, deliver)):
        log = TurnLog()
        results = await asyncio.gather(*(step() for step in order))
        for step, result in zip(order, results, strict=True):
            assert step is write or result == expected


async def test_an_observer_that_lags_is_cut_off():
    """A reader that falls further behind the client than is kept is told so, never given a gap."""
    log = TurnLog()
    with log.deliver() as reader, log.observe() as observer, log.observe() as late:
        event = b"x" * (LAG_BYTES_MAX // 4)
        for number in range(20):
            log.append([event])
            await reader.read()
            if number < 3:
                await observer.read()
        assert len(log._events) * len(event) <= LAG_BYTES_MAX + 2 * len(event)
        for slow in (observer, late):
            with pytest.raises(ReaderLagged):
                await slow.read()


async def test_an_observer_that_comes_late_begins_with_what_is_kept():
    """It is given no gap behind its first event."""
    log = TurnLog()
    with log.deliver() as reader:
        for number in range(3):
            log.append([b"%d" % number])
            await reader.read()
        with log.observe() as observer:
            log.append([b"3"], last=RESPONSE)
            assert await everything(observer) == [b"2", b"3"]


async def test_an_observer_never_holds_the_writer_up():
    """Only the delivering reader's bytes count in the window."""
    window = Window(10)
    log = TurnLog(window)
    with log.deliver() as reader, log.observe():
        for _ in range(10):
            log.append([b"x" * 9])
            await reader.read()
        reading = await waits(reader.read())
        assert window.bytes == 0
        assert await waits(log.writable()) is None
        reading.cancel()


async def test_a_cancelled_read_loses_nothing():
    """A read that is cancelled while it waits takes no event with it."""
    log = TurnLog()
    with log.deliver() as reader:
        reading = await waits(reader.read())
        reading.cancel()
        log.append([b"1"])
        assert await reader.read() == [b"1"]


async def test_the_reprs_say_how_it_stands():
    """What an operator sees of a log and a window."""
    window = Window(10)
    log = TurnLog(window)
    with log.deliver():
        log.append([b"12", b"3"], last=RESPONSE)
        assert repr(log) == "<TurnLog events=0..2 readers=1 ended>"
        assert repr(window) == "<Window 3 of 10 bytes>"


# --- What is kept for those who come later


async def test_what_is_kept_can_be_read_from_any_place():
    """A log that is kept is not trimmed behind its client: a later reader begins where it says (docs/adr/0007)."""
    log = TurnLog(kept_bytes_max=1000)
    with log.deliver() as reader:
        for number in range(9):
            log.append([b"%d" % number])
            await reader.read()
    log.append([b"9"], last=RESPONSE)
    for after in range(-1, 12):
        with log.observe(after) as late:
            assert await everything(late) == [b"%d" % number for number in range(after + 1, 10)]
    assert (log.is_whole, log.kept_bytes, len(log.events())) == (True, 10, 10)


async def test_a_place_that_has_not_come_is_waited_for():
    """A reader behind the end gets what comes there, and nothing before."""
    log = TurnLog(kept_bytes_max=1000)
    log.append([b"0"])
    with log.observe(2) as reader:
        reading = await waits(reader.read())
        log.append([b"1", b"2"])
        await asyncio.sleep(0)
        assert not reading.done()
        log.append([b"3"], last=RESPONSE)
        assert await reading == [b"3"]


async def test_the_oldest_go_when_too_much_is_kept():
    """Past `kept_bytes_max` the log says from where on it is whole, and a reader before that is told (docs/adr/0007)."""
    log = TurnLog(kept_bytes_max=10)
    with log.observe() as slow:
        for number in range(20):
            log.append([b"%02d" % number])
        with pytest.raises(ReaderLagged):
            await slow.read()
    assert not log.is_whole
    assert log.kept_bytes == sum(map(len, log.events())) <= 10 + 2
    first = int(log.events()[0])
    assert [log.reaches(number) for number in (first - 1, first, 20, 99)] == [False, True, True, True]
    with log.observe(first - 1) as late:
        assert await late.read() == [b"%02d" % number for number in range(first, 20)]


async def test_who_keeps_up_gets_even_what_is_larger_than_all_that_is_kept():
    """One event may be larger than `kept_bytes_max`; it goes with the next one, not before it was read."""
    log = TurnLog(kept_bytes_max=10)
    with log.deliver() as reader, log.observe() as observer:
        for size in (5, 100, 1, 50, 2):
            log.append([b"x" * size])
            assert await reader.read() == await observer.read() == [b"x" * size]
    assert log.kept_bytes == sum(map(len, log.events()))


async def test_what_is_kept_stays_when_its_readers_go():
    """Neither the client that leaves nor one that lags takes anything from those who come later."""
    log = TurnLog(kept_bytes_max=4 * LAG_BYTES_MAX)
    event = b"x" * (LAG_BYTES_MAX // 2)
    with log.observe() as slow:
        with log.deliver() as reader:
            log.append([event])
            await reader.read()
        for _ in range(5):
            log.append([event])
        assert len(await slow.read()) == 6
    assert log.is_whole


async def test_without_a_window_nobody_holds_the_writer_up():
    """A log without a window is always writable, however far its client is behind (docs/adr/0007)."""
    log = TurnLog(kept_bytes_max=1000)
    with log.deliver():
        log.append([b"x" * 5000])
        assert log.is_writable
        assert await waits(log.writable()) is None


KEPT = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
        st.tuples(st.just("read"), st.integers(0, 2)),
        st.tuples(st.just("observe"), st.integers(-1, 30)),
        st.tuples(st.just("leave"), st.integers(0, 2)),
    ),
    max_size=40,
)


@given(KEPT, st.integers(1, 40))
def test_readers_of_a_kept_log_get_every_event_behind_their_place_or_are_told(steps, kept_bytes_max):
    """Against a list: no reader ever sees a gap, a double or a wrong order, and what is kept is bounded."""

    async def run():
        log, written = TurnLog(kept_bytes_max=kept_bytes_max), []
        readers = [(log.deliver(), [0])]
        for step, argument in steps:
            match step:
                case "append":
                    events = [b"%d" % (len(written) + index) + b"." * size for index, size in enumerate(argument)]
                    log.append(events)
                    written += events
                    assert log.kept_bytes <= kept_bytes_max + sum(map(len, events))
                case "observe":
                    reaches = log.reaches(argument + 1)
                    reader = log.observe(argument)
                    readers.append((reader, [argument + 1]))
                    if not reaches:
                        with pytest.raises(ReaderLagged):
                            await reader.read()
                        readers.pop()[0].leave()
                case "read" if argument < len(readers):
                    reader, place = readers[argument]
                    try:
                        got = await reader.read() if len(written) > place[0] else []
                    except ReaderLagged:
                        assert not log.reaches(place[0])
                        reader.leave()
                        readers.pop(argument)
                        continue
                    assert got == written[place[0] :]
                    place[0] = max(place[0], len(written))
                case "leave" if argument < len(readers):
                    readers.pop(argument)[0].leave()
            assert log.kept_bytes == sum(map(len, log.events()))
            assert list(log.events()) == written[len(written) - len(log.events()) :]

    asyncio.run(run())


# --- A client that comes back


async def test_a_client_that_comes_back_takes_the_place_of_the_first():
    """The new connection holds the writer up, and the old one does not any more (docs/adr/0009)."""
    old_window, new_window = Window(10), Window(10)
    log = TurnLog(old_window, kept_bytes_max=1000)
    with log.deliver() as old:
        log.append([b"x" * 6])
        await old.read()
        log.append([b"y" * 7])
        with log.take_over(new_window, 0) as new:
            assert (old_window.bytes, new_window.bytes) == (0, 7)
            log.append([b"z" * 5])
            assert (old_window.bytes, new_window.bytes) == (0, 12)
            writing = await waits(log.writable())
            assert await old.read() == [b"y" * 7, b"z" * 5]
            assert not writing.done()
            assert await new.read() == [b"y" * 7, b"z" * 5]
            reading = await waits(new.read())
            await asyncio.wait_for(writing, 5)
            log.append([b"end"], last=RESPONSE)
            assert await reading == [b"end"]
            assert await everything(old) == [b"end"]


@pytest.mark.parametrize("how", ["takes over", "leaves"])
async def test_a_writer_is_not_held_up_by_the_other_turns_of_a_connection_that_was_left(how):
    """Their bytes may keep that window shut for long (docs/adr/0009)."""
    window = Window(10)
    log, other = TurnLog(window, kept_bytes_max=1000), TurnLog(window)
    other.append([b"x" * 10])
    with log.deliver() as reader, log.observe():
        writing = await waits(log.writable())
        if how == "takes over":
            log.take_over(Window(10))
        else:
            reader.leave()
        await asyncio.wait_for(writing, 5)
    assert not window.is_open


async def test_a_writer_that_was_handed_over_waits_for_the_new_connection():
    """It may be as far behind as the old one was."""
    log = TurnLog(Window(10), kept_bytes_max=1000)
    with log.deliver():
        log.append([b"x" * 10])
        writing = await waits(log.writable())
        with log.take_over(Window(10)) as new:
            for _ in range(3):
                await asyncio.sleep(0)
            assert not writing.done()
            await new.read()
            reading = await waits(new.read())
            await asyncio.wait_for(writing, 5)
            reading.cancel()


async def test_every_last_reader_abandons_a_turn_anew():
    """Also one that came back and left again; the one that was replaced counts as long as it reads (docs/adr/0009)."""
    told = []
    log = TurnLog(Window(10), lambda: told.append("abandoned"), kept_bytes_max=1000)
    old = log.deliver()
    new = log.take_over(Window(10))
    old.leave()
    assert told == []
    new.leave()
    assert told == ["abandoned"]
    log.take_over(Window(10)).leave()
    assert told == ["abandoned"] * 2


async def test_what_a_client_has_seen_before_does_not_wait_for_it():
    """It comes back before it is known what there is: only what it wants counts in its window."""
    window = Window(10)
    log = TurnLog(window, kept_bytes_max=1000)
    with log.deliver(1) as reader:
        log.append([b"xx", b"yy", b"zz"], last=RESPONSE)
        assert window.bytes == 2
        assert await everything(reader) == [b"zz"]
        assert window.bytes == 0


async def test_what_the_client_has_not_taken_is_kept_whatever_the_limit():
    """Its window bounds that as well; so who is delivered to is never told that it was too slow (docs/adr/0009)."""
    log = TurnLog(Window(100), kept_bytes_max=10)
    with log.deliver() as reader, log.observe() as slow:
        for _ in range(5):
            log.append([b"x" * 9])
        assert len(await reader.read()) == 5
        log.append([b"y" * 9])
        assert await reader.read() == [b"y" * 9]
        log.append([b"z"], last=RESPONSE)
        with pytest.raises(ReaderLagged):
            await slow.read()
        assert await everything(reader) == [b"z"]


async def test_who_wants_only_the_response_is_not_told_of_what_was_trimmed():
    """A plain JSON answer has no events to miss."""
    log = TurnLog(kept_bytes_max=10)
    with log.observe() as reader:
        for _ in range(5):
            log.append([b"x" * 9])
        ending = await waits(reader.to_the_end())
        log.append([b"y"], last=RESPONSE)
        await asyncio.wait_for(ending, 5)
    refused = TurnLog(kept_bytes_max=10)
    refused.refuse(REFUSAL)
    with refused.observe() as reader, pytest.raises(ProtocolError):
        await reader.to_the_end()


async def test_a_log_can_end_without_any_event():
    """The response is there, and who wants its events is told that they are not (docs/adr/0009)."""
    log = TurnLog(kept_bytes_max=10)
    with log.observe(-1) as reader, log.observe() as other:
        ending = await waits(other.to_the_end())
        log.end_without_events(RESPONSE)
        with pytest.raises(ReaderLagged):
            await reader.read()
        await asyncio.wait_for(ending, 5)
    assert (log.response, log.reaches(0), log.reaches(1000)) == (RESPONSE, False, False)


COMING_BACK = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(1, 9), min_size=1, max_size=4)),
        st.tuples(st.just("read"), st.integers(0, 3)),
        st.tuples(st.just("come back"), st.integers(-1, 12)),
        st.tuples(st.just("leave"), st.integers(0, 3)),
    ),
    max_size=40,
)


@given(COMING_BACK, st.integers(1, 60))
def test_whoever_comes_back_gets_every_event_once_or_is_told(steps, kept_bytes_max):
    """Against lists: no reader sees a gap or a double, each window counts exactly what waits for its own client."""

    async def run():
        log, written = TurnLog(Window(30), kept_bytes_max=kept_bytes_max), []
        readers = [(log.deliver(), [0], log._window)]
        for step, argument in steps:
            match step:
                case "append":
                    events = [b"%d" % (len(written) + index) + b"." * size for index, size in enumerate(argument)]
                    log.append(events)
                    written += events
                case "come back":
                    if argument < len(written) and log.reaches(argument + 1):
                        window = Window(30)
                        readers.append((log.take_over(window, argument), [argument + 1], window))
                case "read" if argument < len(readers):
                    reader, place, _ = readers[argument]
                    if len(written) > place[0]:
                        try:
                            assert await reader.read() == written[place[0] :]
                            place[0] = len(written)
                        except ReaderLagged:
                            assert not log.reaches(place[0])
                            assert not reader.delivering
                case "leave" if argument < len(readers):
                    readers.pop(argument)[0].leave()
            assert [window.bytes for reader, _, window in readers if not reader.delivering] == [0] * idle(readers)
            assert waiting(readers) == [sum(map(len, written[log._delivered :]))] * (len(readers) - idle(readers))
            assert log.kept_bytes == sum(map(len, log.events()))
            assert list(log.events()) == written[len(written) - len(log.events()) :]

    asyncio.run(run())


def idle(readers):
    count = sum(not reader.delivering for reader, _, _ in readers)
    assert len(readers) - count <= 1
    return count


def waiting(readers):
    return [window.bytes for reader, _, window in readers if reader.delivering]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.lists(st.integers(0, 6), min_size=1, max_size=4)),
        st.tuples(st.just("read"), st.just(None)),
        st.tuples(st.just("leave"), st.just(None)),
    ),
    max_size=40,
)


@given(STEPS)
def test_the_window_counts_what_the_client_has_not_taken(steps):
    """Against a model of two lists: order is kept, nothing is lost or doubled, and the window's count is exact."""

    async def run():
        window, written, read, taken = Window(10), [], [], 0
        log = TurnLog(window)
        reader = log.deliver()
        gone = False
        for step, argument in steps:
            match step:
                case "append":
                    events = [b"x" * size for size in argument]
                    log.append(events)
                    written += events
                case "read" if not gone:
                    if len(read) < len(written):
                        taken = len(read)
                        read += await reader.read()
                case "leave":
                    reader.leave()
                    gone = True
            assert read == written[: len(read)]
            waiting = 0 if gone else sum(map(len, written[taken:]))
            assert window.bytes == waiting
            assert window.is_open == (waiting < 10)

    asyncio.run(run())
