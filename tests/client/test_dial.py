"""The network as it is: what `AiohttpDial` makes of servers, proxies and their faults."""

from __future__ import annotations

import asyncio
import gc
import ssl
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from websockets.asyncio.server import serve
from websockets.utils import accept_key

from openline import ClientSettings, connect
from openline.client.aiohttp_dial import AiohttpDial
from openline.client.wire import DialFailed, DialRefused, LineClosed
from openline.config import ConfigError

TLS = Path(__file__).parent.parent / "server" / "tls"
CERT, KEY = str(TLS / "localhost.pem"), str(TLS / "localhost.key")


@asynccontextmanager
async def listening(handle, tls=None):
    """A TCP server; its port."""
    open_ones = {}

    async def serve_one(reader, writer):
        open_ones[asyncio.current_task()] = writer
        try:
            await handle(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async with await asyncio.start_server(serve_one, "127.0.0.1", 0, ssl=tls) as server:
        yield server.sockets[0].getsockname()[1]
        for writer in open_ones.values():
            writer.transport.abort()
        await asyncio.gather(*open_ones)


@asynccontextmanager
async def dialing(port, path="/v1", scheme="http", host="127.0.0.1", **settings):
    """A dial to a port."""
    dial = AiohttpDial(f"{scheme}://{host}:{port}{path}", ClientSettings(**settings))
    try:
        yield dial
    finally:
        await dial.close()


def answering(answer: bytes, seen=None):
    """Answers every request in the same way."""

    async def handle(reader, writer):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            if seen is not None:
                seen.append(head)
            length = next(
                (int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), 0
            )
            await reader.readexactly(length)
            writer.write(answer)
            await writer.drain()

    return handle


def http(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.mark.parametrize("url", ["", "localhost:8484/v1", "ftp://host/v1", "http://", "file:///v1"])
def test_a_base_url_is_one(url):
    """The message says what was expected."""
    with pytest.raises(ValueError, match="base_url"):
        connect(url)


def test_a_key_belongs_not_into_the_url():
    """It would stand in logs; and the error does not repeat it."""
    with pytest.raises(ValueError, match="pass api_key=") as raised:
        connect("http://user:secret@host/v1")
    assert "secret" not in str(raised.value)


def test_a_ca_bundle_is_one():
    """The setting is named."""
    with pytest.raises(ConfigError, match="ca_file is '/nowhere'"):
        connect("https://host/v1", settings=ClientSettings(ca_file="/nowhere"))


async def test_paths_are_below_the_base_and_its_query_stays():
    """Azure wants one on every request."""
    seen = []
    async with listening(answering(http("200 OK", b"{}"), seen)) as port, dialing(port, "/v1/?a=b") as dial:
        for answer in (await dial.post("/responses", b"{}", {}), await dial.get("/responses?key=%20x", {})):
            assert await answer.body() == b"{}"
            await answer.close()
    assert [head.split(b" HTTP")[0] for head in seen] == [
        b"POST /v1/responses?a=b",
        b"GET /v1/responses?a=b&key=%20x",
    ]
    assert all(b"openline/" in head for head in seen)


async def test_a_connection_is_used_again_after_its_answer_was_read():
    """And one whose answer was given up is not."""
    connections = []

    async def handle(reader, writer):
        connections.append(writer)
        await answering(http("200 OK", b"data: 1\n\ndata: 2\n\n", "Content-Type: text/event-stream"))(reader, writer)

    async with listening(handle) as port, dialing(port) as dial:
        for _ in range(2):
            answer = await dial.post("/responses", b"x" * 2_000_000, {})
            assert [data async for data in answer.events()] == [b"1", b"2"]
            await answer.close()
    assert len(connections) == 1


@pytest.mark.parametrize("cut", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", b"data"])
async def test_a_request_that_is_cut_off_may_have_arrived(cut):
    """Wherever the answer broke off: nobody can say what the server did."""

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(cut)
        await writer.drain()

    async def whole(dial):
        answer = await dial.post("/responses", b"{}", {})
        try:
            return await answer.body()
        finally:
            await answer.close()

    async with listening(handle) as port, dialing(port) as dial:
        with pytest.raises(LineClosed):
            await whole(dial)


async def test_where_nobody_listens_nothing_was_sent():
    """Over either way; and it may be tried again."""
    async with listening(answering(b"")) as port:
        pass
    async with dialing(port) as dial:
        for attempt in (dial.post("/responses", b"{}", {}), dial.get("/x", {}), dial.open_socket({})):
            with pytest.raises(DialFailed) as failed:
                await attempt
            assert not failed.value.reached
            assert not failed.value.is_lasting


async def test_a_certificate_that_is_not_trusted_stays_so():
    """Trying again is in vain; with `ca_file` it is trusted."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(CERT, KEY)
    async with listening(answering(http("200 OK", b"{}")), tls) as port:
        async with dialing(port, scheme="https", host="localhost") as dial:
            for attempt in (dial.get("/x", {}), dial.open_socket({})):
                with pytest.raises(DialFailed) as failed:
                    await attempt
                assert failed.value.is_lasting
        async with dialing(port, scheme="https", host="localhost", ca_file=CERT) as dial:
            answer = await dial.get("/x", {})
            assert await answer.body() == b"{}"
            await answer.close()


@pytest.mark.parametrize("status", ["401 Unauthorized", "426 Upgrade Required", "200 OK"])
async def test_an_upgrade_that_is_refused_tells_why(status):
    """Status, headers and body: the body is what a person is shown."""
    refused = http(status, b'{"error":{"message":"No."}}', "Retry-After: 3")
    async with listening(answering(refused)) as port, dialing(port) as dial:
        with pytest.raises(DialRefused) as raised:
            await dial.open_socket({})
    assert raised.value.status == int(status[:3])
    assert raised.value.headers["retry-after"] == "3"
    assert raised.value.body == b'{"error":{"message":"No."}}'


async def test_a_redirect_is_not_followed():
    """Neither of an upgrade nor of a request: the key is meant for this server."""
    elsewhere = []
    async with listening(answering(http("200 OK", b""), elsewhere)) as other:
        moved = http("307 Temporary Redirect", b"", f"Location: http://127.0.0.1:{other}/")
        async with listening(answering(moved)) as port, dialing(port) as dial:
            with pytest.raises(DialRefused) as raised:
                await dial.open_socket({"authorization": "Bearer secret"})
            answer = await dial.post("/responses", b"{}", {"authorization": "Bearer secret"})
            assert (raised.value.status, answer.status) == (307, 307)
            await answer.close()
    assert not elsewhere


@pytest.mark.parametrize("stalls", [True, False])
async def test_an_upgrade_that_is_not_answered_reached_somebody(stalls):
    """Some proxies do so to every upgrade: the session then takes HTTP."""

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        if stalls:
            await reader.read()

    async with listening(handle) as port, dialing(port, connect_seconds_max=0.1) as dial:
        with pytest.raises(DialFailed) as failed:
            await dial.open_socket({})
    assert failed.value.reached
    assert not failed.value.is_lasting


# The environment's proxy.


def through_proxy(seen, to):
    """A forward proxy: passes requests with absolute targets, and tunnels, on to one port."""

    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        seen.append(head.split(b"\r\n")[0])
        there, back = await asyncio.open_connection("127.0.0.1", to)
        if head.startswith(b"CONNECT"):
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        else:
            back.write(head)

        async def pass_on(source, target):
            while data := await source.read(65536):
                target.write(data)
            target.close()

        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    return handle


async def test_the_environments_proxy_is_used_but_never_for_loopback(monkeypatch):
    """For requests and for sockets.

    Source: WebSocket mode guide, corporate proxies; a proxy cannot reach our loopback.
    """
    seen = []

    async def echo(socket):
        async for message in socket:
            await socket.send(message)

    async with serve(echo, "127.0.0.1", 0, compression=None) as server:
        port = server.sockets[0].getsockname()[1]
        async with listening(through_proxy(seen, port)) as proxy:
            monkeypatch.setenv("http_proxy", f"127.0.0.1:{proxy}")
            monkeypatch.delenv("no_proxy", raising=False)
            async with dialing(80, host="openline.test") as dial:
                line = await dial.open_socket({})
                await line.send("Hello.")
                assert await line.receive() == "Hello."
                await line.close()
                answer = await dial.get("/x", {})
                assert answer.status != 0
                await answer.close()
            assert [line.split(b" ")[1] for line in seen] == [
                b"http://openline.test/v1/responses",
                b"http://openline.test/v1/x",
            ]
            async with dialing(port) as dial:
                await (await dial.open_socket({})).close()
            monkeypatch.setenv("no_proxy", "openline.test")
            assert AiohttpDial("http://openline.test/v1", ClientSettings())._proxy is None
    assert len(seen) == 2


def test_a_proxy_that_is_none_is_named_without_its_value(monkeypatch):
    """It may hold a password."""
    monkeypatch.setenv("https_proxy", "http://user:secret@[broken")
    with pytest.raises(ConfigError, match="https_proxy is not a URL") as raised:
        connect("https://openline.test/v1")
    assert "secret" not in str(raised.value)


# An open socket.


@asynccontextmanager
async def lined(handle, **settings):
    """A line to a server of the `websockets` library."""
    served = serve(handle, "127.0.0.1", 0, compression=None, ping_interval=None)
    async with served as server, dialing(server.sockets[0].getsockname()[1], **settings) as dial:
        yield await dial.open_socket({"authorization": "Bearer k"})


async def test_messages_go_both_ways_and_the_101_is_known():
    """In order, as text; the answer's headers have lower-case names."""
    asked = {}

    async def handle(socket):
        asked.update(socket.request.headers.raw_items())
        async for message in socket:
            await socket.send(message)
            await socket.send("more")

    async with lined(handle) as line:
        for text in ("ä", "x" * 200_000):
            await line.send(text)
            assert [await line.receive(), await line.receive()] == [text, "more"]
        assert line.headers["upgrade"] == "websocket"
        await line.close()
    assert asked["authorization"] == "Bearer k"


@pytest.mark.parametrize("code", [1000, 1001, 1012, 4000])
async def test_the_servers_close_is_told_with_its_code(code):
    """What was sent before it is received; from then on nothing leaves."""

    async def handle(socket):
        await socket.send("last")
        await socket.close(code, "why")

    async with lined(handle) as line:
        assert await line.receive() == "last"
        with pytest.raises(LineClosed) as closed:
            await line.receive()
        assert closed.value.code == code
        with pytest.raises(LineClosed):
            await line.send("too late")
        await line.close()


async def test_a_reset_is_told():
    """Without a code, and from both sides' view."""

    async def handle(socket):
        socket.transport.abort()
        await socket.wait_closed()

    async with lined(handle) as line:
        with pytest.raises(LineClosed):
            await line.receive()
        with pytest.raises(LineClosed):
            await line.send("too late")


@pytest.mark.parametrize("message", [b"binary", "x" * 1001])
async def test_what_is_no_text_or_too_big_ends_the_line(message):
    """The bound is `message_bytes_max`; the one at the bound is taken."""

    async def handle(socket):
        await socket.send("y" * 1000)
        await socket.send(message)
        await socket.wait_closed()

    async with lined(handle, message_bytes_max=1000) as line:
        assert len(await line.receive()) == 1000
        with pytest.raises(LineClosed):
            await line.receive()
        with pytest.raises(LineClosed):
            await line.send("too late")


async def test_a_server_that_answers_no_ping_is_gone():
    """After `ping_seconds` and half of it again: a laptop that changed its network learns so."""

    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        key = next(line[19:] for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-key:"))
        accept = accept_key(key.strip().decode())
        writer.write(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n\r\n".encode()
        )
        await reader.read()

    async with listening(handle) as port, dialing(port, ping_seconds=0.05) as dial:
        line = await dial.open_socket({})
        async with asyncio.timeout(2):
            with pytest.raises(LineClosed):
                await line.receive()


async def test_an_answer_that_is_given_up_wakes_who_reads_it():
    """A turn over HTTP is cancelled so, from another task."""

    async def handle(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
        await writer.drain()
        await reader.read()

    async with listening(handle) as port, dialing(port) as dial:
        answer = await dial.get("/x", {})
        events = answer.events()
        assert await anext(events) == b"1"
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        await answer.close()
        async with asyncio.timeout(2):
            with pytest.raises(LineClosed):
                await waiting


async def test_nothing_is_left_open():
    """A dial that is closed has closed its connections; collecting it warns of nothing."""

    async def handle(socket):
        await socket.wait_closed()

    async with lined(handle) as line:
        await line.close()
    del line
    gc.collect()
