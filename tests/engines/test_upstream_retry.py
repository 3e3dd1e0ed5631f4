"""When a request is sent again: only where it certainly did not run, and only as often as told.

Source: RFC 9110 §9.2.2, §10.2.3; docs/adr/0011.
"""

import asyncio
import errno
import gc
import logging
import socket
import ssl
from types import SimpleNamespace

import aiohttp
import pytest

from engines.fake_upstream import fake_upstream
from engines.one_turn import CHUNKS, engine_for, failed, played, refuse, whole_stream
from openline.config import UpstreamSettings
from openline.engines.upstream_faults import Attempt, pause_after_fault, pause_after_refusal
from openline.protocol.deltas import Ended
from openline.protocol.errors import ProtocolError
from server.running import until

AT = SimpleNamespace(host="h", port=1, ssl=True, is_ssl=True)
BUSY = "429 Too Many Requests"
RESET = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
HALF_A_HEAD = object()


class TestDecision:
    @pytest.mark.parametrize(
        ("error", "fresh", "pooled"),
        [
            (aiohttp.ClientConnectorError(AT, ConnectionRefusedError(111, "refused")), 0.1, 0.1),
            (aiohttp.ClientConnectorDNSError(AT, OSError(-3, "try again")), 0.1, 0.1),
            (aiohttp.ClientProxyConnectionError(AT, ConnectionRefusedError(111, "refused")), 0.1, 0.1),
            (aiohttp.ClientConnectorSSLError(AT, ssl.SSLError("wrong version")), None, None),
            (aiohttp.ClientConnectorCertificateError(AT, ssl.CertificateError("no")), None, None),
            (aiohttp.ClientOSError(errno.ECONNRESET, "reset"), 0.0, 0.0),
            (aiohttp.ClientOSError(errno.EPIPE, "cannot write"), 0.0, 0.0),
            (aiohttp.ClientConnectionResetError("Cannot write to closing transport"), 0.0, 0.0),
            (aiohttp.ClientOSError(errno.EHOSTUNREACH, "gone"), None, 0.0),
            (aiohttp.ServerDisconnectedError(), None, 0.0),
            (aiohttp.ServerDisconnectedError(HALF_A_HEAD), None, None),
            (aiohttp.ConnectionTimeoutError("connect"), None, None),
            (aiohttp.SocketTimeoutError("read"), None, None),
            (TimeoutError(), None, None),
            (aiohttp.ClientPayloadError("cut"), None, None),
            (aiohttp.ClientResponseError(None, (), status=400), None, None),
            (aiohttp.InvalidURL("x"), None, None),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
    )
    def test_what_is_repeated(self, error, fresh, pooled):
        """A request that may be running is not, and on no connection what had begun to be answered."""
        assert pause_after_fault(error, Attempt(0.0), 0.0) == fresh
        assert pause_after_fault(error, Attempt(0.0, pooled=True), 0.0) == pooled

    @pytest.mark.parametrize(("seconds", "pause"), [(1.0, 0.0), (1.001, None)])
    def test_a_reset_after_a_while_is_a_timeout(self, seconds, pause):
        """A balancer that forgets a silent connection resets it, while the model reads a long prompt."""
        error = aiohttp.ClientOSError(errno.ECONNRESET, "reset")
        for pooled in (True, False):
            assert pause_after_fault(error, Attempt(0.0, pooled), seconds) == pause

    @pytest.mark.parametrize(
        ("code", "told", "longest", "pause"),
        [
            ("rate_limit_exceeded", "2", 2.0, 2.0),
            ("rate_limit_exceeded", "3", 2.0, None),
            ("rate_limit_exceeded", "0", 2.0, 0.0),
            ("rate_limit_exceeded", "0", 0.0, None),
            ("rate_limit_exceeded", None, 2.0, None),
            ("server_is_overloaded", "1", 2.0, 1.0),
            ("insufficient_quota", "1", 2.0, None),
            ("upstream_refused", "1", 2.0, None),
        ],
    )
    def test_which_refusals_are_sat_out(self, code, told, longest, pause):
        """Those that pass by themselves, if the upstream says when, and soon."""
        settings = UpstreamSettings(url="http://x/v1", retry_after_seconds_max=longest)
        error = ProtocolError(code, "No.", headers={"retry-after": told} if told is not None else {})
        assert pause_after_refusal(error, settings) == pause


async def resets(exchange):
    exchange.reset()


class TestOnTheWire:
    @pytest.mark.parametrize("retries", [0, 1, 2])
    async def test_not_more_often_than_told(self, retries):
        """And once if nothing is told."""
        async with fake_upstream(resets) as fake, engine_for(fake.url, retries_max=retries) as engine:
            with pytest.raises(ProtocolError):
                await played(engine)
        assert len(fake.exchanges) == retries + 1
        assert UpstreamSettings().retries_max == 1

    async def test_refused_connection_is_tried_again(self, caplog):
        """Something may just be starting there."""
        caplog.set_level(logging.WARNING, "openline.upstream")
        async with fake_upstream(whole_stream) as fake:
            with socket.socket() as door:
                door.bind(("127.0.0.1", 0))
                async with engine_for(f"http://127.0.0.1:{door.getsockname()[1]}/v1") as engine:
                    turn = asyncio.create_task(played(engine))
                    await until(lambda: "sent again" in caplog.text)
                    door.listen()
                    door.setblocking(False)
                    async with await asyncio.start_server(fake.serve, sock=door):
                        assert (await turn)[-1] == [Ended()]

    @pytest.mark.parametrize("first", ["reset", "busy"])
    async def test_what_was_repeated_is_one_answer(self, first):
        """The client sees nothing of the first attempt."""

        async def script(exchange):
            if len(fake.exchanges) > 1:
                await whole_stream(exchange)
            elif first == "reset":
                exchange.reset()
            else:
                await exchange.answer(BUSY, b"{}", "Retry-After: 0")

        async with fake_upstream(script) as fake, engine_for(fake.url) as engine:
            deltas = await played(engine)
        assert [len(batch) for batch in deltas].count(0) == 1
        assert len(fake.exchanges) == 2
        assert fake.exchanges[0].body == fake.exchanges[1].body

    @pytest.mark.parametrize("chunks", range(len(CHUNKS)))
    async def test_nothing_is_repeated_once_the_upstream_has_accepted(self, chunks):
        """Neither behind a token nor before the first."""

        async def script(exchange):
            await exchange.begin()
            for chunk in CHUNKS[:chunks]:
                await exchange.event(chunk)
            exchange.reset()

        async with fake_upstream(script) as fake, engine_for(fake.url) as engine:
            if chunks < len(CHUNKS) - 1:
                with pytest.raises(ProtocolError):
                    await played(engine)
            else:
                await played(engine)
        assert len(fake.exchanges) == 1

    async def test_half_a_head_on_a_pooled_connection_is_not_repeated(self):
        """It was answering."""

        async def script(exchange):
            if len(fake.exchanges) == 1:
                await whole_stream(exchange)
            else:
                await exchange.send(b"HTTP/1.1 200 OK\r\nContent-")

        async with fake_upstream(script, keep_alive=True) as fake, engine_for(fake.url) as engine:
            await played(engine)
            with pytest.raises(ProtocolError):
                await played(engine)
        assert (fake.connections, len(fake.exchanges)) == (1, 2)

    async def test_a_pooled_connection_that_is_reset_is_no_news(self, caplog):
        """Nobody waits on it."""
        async with fake_upstream(whole_stream, keep_alive=True) as fake, engine_for(fake.url) as engine:
            for _ in range(2):
                await played(engine)
                fake.exchanges[-1].reset()
                await until(lambda: not fake.open)
        gc.collect()
        assert "never retrieved" not in caplog.text
        assert (fake.connections, len(fake.exchanges)) == (2, 2)

    async def test_a_long_wait_is_the_clients(self):
        """It is told at once, and for how long."""
        error, _ = await failed(refuse(BUSY, b"", "Retry-After: 3"), retry_after_seconds_max=2.0)
        assert error.headers == {"retry-after": "3"}

    async def test_a_turn_that_is_cancelled_while_it_waits_is_not_sent(self, caplog):
        """Its client has gone."""
        caplog.set_level(logging.WARNING, "openline.upstream")
        async with fake_upstream(refuse(BUSY, b"", "Retry-After: 1")) as fake, engine_for(fake.url) as engine:
            turn = asyncio.create_task(played(engine))
            await until(lambda: "sent again" in caplog.text)
            turn.cancel()
            with pytest.raises(asyncio.CancelledError):
                await turn
        assert len(fake.exchanges) == 1
