"""Each bound of an upstream at its limit: what is below passes, what is above ends the turn and names the setting."""

import asyncio
import gc
import socket
from contextlib import ExitStack, aclosing, suppress

import pytest

from engines.fake_upstream import chunked, fake_upstream
from engines.one_turn import CHUNKS, collect, engine_for, failed, generation, played
from openline.protocol.deltas import Ended, TextDelta
from openline.protocol.errors import ProtocolError

TEXTS = [TextDelta("a"), TextDelta("b")]
# A busy machine may be late by this, which is nothing beside the bounds that are not set here.
SLACK_SECONDS = 5.0


async def whole(script, **settings):
    """What a turn brings that ends well."""
    async with fake_upstream(script) as fake, engine_for(fake.url, **settings) as engine:
        return [delta for batch in await played(engine) for delta in batch]


class Stopwatch:
    """Seconds of the loop's clock, from entering to leaving."""

    def __enter__(self):
        self._began = asyncio.get_running_loop().time()
        return self

    def __exit__(self, *_):
        self.seconds = asyncio.get_running_loop().time() - self._began


class TestTime:
    async def test_connect(self, caplog):
        """A system whose queue of connections is full answers none; that is not tried twice."""
        seconds = 0.4
        with ExitStack() as stack:
            listening = stack.enter_context(socket.socket())
            listening.bind(("127.0.0.1", 0))
            listening.listen(0)
            for _ in range(4):  # nobody accepts them, so they fill the queue
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                with suppress(BlockingIOError):
                    waiting.connect(listening.getsockname())
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            async with engine_for(url, connect_seconds_max=seconds) as engine:
                with Stopwatch() as watch, pytest.raises(ProtocolError) as caught:
                    await played(engine)
        assert caught.value.code == "upstream_unreachable"
        assert "accepted no connection in time" in caught.value.message
        assert seconds <= watch.seconds < seconds + SLACK_SECONDS
        assert "sent again" not in caplog.text

    async def test_first_event_counts_head_and_body_together(self):
        """A head that comes late leaves less time for what follows."""

        async def script(exchange):
            await asyncio.sleep(1.0)
            await exchange.begin()
            await exchange.left()

        with Stopwatch() as watch:
            error, _ = await failed(script, first_event_seconds_max=1.2)
        assert error.code == "upstream_timeout"
        assert "1.2 seconds (`first_event_seconds_max`)" in error.message
        assert 1.2 <= watch.seconds < 2.2

    async def test_first_event_covers_a_request_that_is_not_taken(self):
        """An upstream that does not read holds the request up, and not for ever."""
        with socket.socket() as listening:  # the system makes the connections, and nobody takes them
            listening.bind(("127.0.0.1", 0))
            listening.listen()
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            async with engine_for(url, connect_seconds_max=0.1, first_event_seconds_max=0.1) as engine:
                with pytest.raises(ProtocolError) as caught:
                    await played(engine, "x" * 32 * 1024 * 1024)
        assert caught.value.code == "upstream_timeout"

    async def test_idle_is_between_two_reads(self):
        """An answer may take longer than it, if something comes in between."""
        count, idle = 6, 1.0

        async def script(exchange):
            await exchange.begin()
            for number in range(count):
                await asyncio.sleep(0.2)
                await exchange.event(CHUNKS[number % 2])
            await exchange.left()

        with Stopwatch() as watch:
            error, seen = await failed(script, idle_seconds_max=idle)
        assert len(seen) == count
        assert "1 seconds (`idle_seconds_max`)" in error.message
        assert watch.seconds >= count * 0.2 + idle

    @pytest.mark.parametrize("goes_on", [True, False], ids=["comments", "silence"])
    async def test_end_is_not_waited_for_longer_than_told(self, goes_on):
        """The answer is whole, whatever the upstream does behind it; what it counts in that time still arrives."""

        async def script(exchange):
            await exchange.begin()
            for chunk in CHUNKS[:3]:
                await exchange.event(chunk)
            await exchange.event(b'{"choices":[],"usage":{"prompt_tokens":7}}')
            while goes_on:
                await exchange.send(chunked(b": still here\n\n"))
                await asyncio.sleep(0.01)
            await exchange.left()

        with Stopwatch() as watch:
            texts = await whole(script, end_seconds_max=0.1)
        assert (texts[:2], texts[2].input_tokens, texts[3:]) == (TEXTS, 7, [Ended()])
        assert 0.1 <= watch.seconds < 0.1 + SLACK_SECONDS

    async def test_answer_as_a_whole(self):
        """Comments that say that it is still alive keep it alive only so long."""

        async def script(exchange):
            await exchange.begin()
            while True:
                await exchange.send(chunked(b": PROCESSING\n\n"))
                await asyncio.sleep(0.01)

        with Stopwatch() as watch:
            error, seen = await failed(script, answer_seconds_max=0.2)
        assert (error.code, error.status, seen) == ("upstream_timeout", 504, [])
        assert "0.2 seconds (`answer_seconds_max`)" in error.message
        assert 0.2 <= watch.seconds < 0.2 + SLACK_SECONDS

    async def test_answer_that_is_no_stream(self):
        """A body that drips is one answer, and has its time until it begins."""

        async def script(exchange):
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n")
            while True:
                await exchange.send(b" ")
                await asyncio.sleep(0.01)

        with Stopwatch() as watch:
            error, _ = await failed(script, first_event_seconds_max=0.2)
        assert error.code == "upstream_timeout"
        assert watch.seconds < 0.2 + SLACK_SECONDS


class TestBytes:
    @pytest.mark.parametrize(("spare", "passes"), [(0, True), (-1, False)])
    async def test_one_event(self, spare, passes):
        """A bound is what may be reached."""
        data = b'{"choices":[{"delta":{"content":"%b"}}]}' % (b"a" * 5000)

        async def script(exchange):
            await exchange.begin()
            await exchange.event(data)
            for chunk in CHUNKS[2:]:
                await exchange.event(chunk)
            await exchange.end()

        bound = {"event_bytes_max": len(b"data: " + data) + spare}
        if passes:
            assert await whole(script, **bound) == [TextDelta("a" * 5000), Ended()]
        else:
            error, _ = await failed(script, **bound)
            assert error.code == "upstream_error"

    @pytest.mark.parametrize(("spare", "code"), [(0, "upstream_timeout"), (-1, "upstream_error")])
    async def test_whole_answer(self, spare, code):
        """What came before it was too much goes out; the turn fails, as nobody knows what would have followed."""
        chunks = CHUNKS[:2] * 10
        bound = sum(len(b"data: " + chunk + b"\n\n") for chunk in chunks) + spare

        async def script(exchange):
            await exchange.begin()
            for chunk in chunks:
                await exchange.event(chunk)
            await exchange.left()

        error, seen = await failed(script, answer_bytes_max=bound, idle_seconds_max=1.0)
        assert (error.code, seen) == (code, TEXTS * 10)
        assert (f"{bound} bytes (`answer_bytes_max`)" in error.message) is (code == "upstream_error")


class TestBehindTheAnswer:
    @pytest.mark.parametrize(
        "how", ["closed", "reset", "broken", "an event above its bound", "an answer above its bound"]
    )
    @pytest.mark.parametrize("is_whole", [True, False])
    async def test_what_came_before_a_fault_is_not_lost_to_it(self, how, is_whole):
        """Also where both come in one read; and an answer that is whole has not failed."""
        behind = {
            "broken": b"zz\r\n",
            "an event above its bound": chunked(b"data: " + b"x" * 5000),
            "an answer above its bound": chunked(b": \n" * 5000),
        }
        accepted = asyncio.Event()

        async def script(exchange):
            await exchange.begin()
            await accepted.wait()
            came = CHUNKS[: 3 if is_whole else 2]
            await exchange.send(b"".join(chunked(b"data: " + chunk + b"\n\n") for chunk in came) + behind.get(how, b""))
            if how == "reset":
                exchange.reset()

        seen = []
        bounds = {"event_bytes_max": 4000, "answer_bytes_max": 9000}
        async with (
            fake_upstream(script) as fake,
            engine_for(fake.url, **bounds) as engine,
            aclosing(generation(engine).stream()) as batches,
        ):
            assert await anext(batches) == []
            accepted.set()
            try:
                await collect(batches, seen)
            except ProtocolError as error:
                seen.append(error.code)
        assert seen == [*TEXTS, Ended() if is_whole else "upstream_error"]

    async def test_the_end_is_found_in_whichever_event_of_a_read_it_is(self):
        """A connection on which more follows is not waited for."""

        async def script(exchange):
            await exchange.begin()
            await exchange.send(chunked(b"".join(b"data: " + chunk + b"\n\n" for chunk in [*CHUNKS, *CHUNKS, b"{"])))
            await exchange.left()

        assert await whole(script, end_seconds_max=60.0) == [*TEXTS, Ended()]

    async def test_a_chunk_that_is_none_behind_the_end_is_no_news(self, caplog):
        """The connection is given up, and nobody is told."""
        accepted = asyncio.Event()

        async def script(exchange):
            await exchange.begin()
            await accepted.wait()
            await exchange.send(b"".join(chunked(b"data: " + chunk + b"\n\n") for chunk in CHUNKS) + b"zz\r\n")
            await exchange.left()

        async with (
            fake_upstream(script) as fake,
            engine_for(fake.url) as engine,
            aclosing(generation(engine).stream()) as batches,
        ):
            assert await anext(batches) == []
            accepted.set()
            seen = []
            await collect(batches, seen)
            await asyncio.gather(*engine._upstream._draining)
        assert seen == [*TEXTS, Ended()]
        gc.collect()
        assert "never retrieved" not in caplog.text
