"""A Chat Completions upstream over real sockets: what it answers, and every way it can fail."""

import asyncio
import json
import logging
import socket
import ssl
import subprocess
from contextlib import aclosing
from typing import get_args

import msgspec
import pytest
from openai.types.responses import Tool

from engines.fake_upstream import fake_upstream
from engines.one_turn import CHUNKS, engine_for, failed, generation, played, refuse, whole_stream
from openline.client.network import proxy_of
from openline.config import ConfigError, UpstreamSettings
from openline.engines.chat import ChatEngine
from openline.engines.chat_tools import HOSTED
from openline.engines.engine import EngineRequest, Model
from openline.protocol.deltas import Ended, TextDelta
from openline.protocol.errors import ProtocolError
from openline.protocol.events import read_http_create, read_input
from openline.state.context import EMPTY


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENLINE_UPSTREAM_API_KEY", raising=False)


class TestTurns:
    async def test_first_batch_is_empty_and_comes_with_the_headers(self):
        """So that `response.created` need not wait for the first token."""
        go_on = asyncio.Event()

        async def script(exchange):
            await exchange.begin()
            await go_on.wait()
            for chunk in CHUNKS:
                await exchange.event(chunk)
            await exchange.end()

        async with (
            fake_upstream(script) as fake,
            engine_for(fake.url) as engine,
            aclosing(generation(engine).stream()) as batches,
        ):
            assert await anext(batches) == []
            go_on.set()
            rest = [delta async for batch in batches for delta in batch]
        assert rest == [TextDelta("a"), TextDelta("b"), Ended()]

    async def test_request_is_what_a_model_server_expects(self, monkeypatch):
        """Its path, its body, its key, and nothing about us but the name."""
        monkeypatch.setenv("GPU_KEY", "k-1")
        async with fake_upstream(whole_stream) as fake, engine_for(fake.url, api_key_env="GPU_KEY") as engine:
            await played(engine, "Hi")
        (exchange,) = fake.exchanges
        lines = exchange.head.lower().splitlines()
        assert lines[0] == "post /v1/chat/completions http/1.1"
        assert "authorization: bearer k-1" in lines
        assert "content-type: application/json" in lines
        assert not any(line.startswith("cookie") for line in lines)
        assert json.loads(exchange.body)["messages"] == [{"role": "user", "content": "Hi"}]

    async def test_without_a_key_none_is_sent(self):
        """Not even an empty one."""
        async with fake_upstream(whole_stream) as fake, engine_for(fake.url) as engine:
            await played(engine)
        assert "authorization" not in fake.exchanges[0].head.lower()

    async def test_connection_is_kept_for_the_next_turn(self):
        """Although `[DONE]` comes before the end of the body."""
        finish = asyncio.Event()

        async def script(exchange):
            await exchange.begin()
            for chunk in CHUNKS:
                await exchange.event(chunk)
            await finish.wait()
            await exchange.end()

        async with fake_upstream(script, keep_alive=True) as fake, engine_for(fake.url) as engine:
            assert (await played(engine))[-1] == [Ended()]  # it did not wait for the end
            finish.set()
            draining = list(engine._upstream._draining)
            await asyncio.gather(*draining)
            await played(engine)
            assert (fake.connections, len(fake.exchanges)) == (1, 2)

    async def test_pooled_connection_that_was_closed_is_replaced(self):
        """A server's idle timeout may cross the next request on the wire."""
        first = True

        async def script(exchange):
            nonlocal first
            if len(fake.exchanges) == 2 and first:
                first = False
                exchange.reset()
                raise ConnectionResetError
            await whole_stream(exchange)

        async with fake_upstream(script, keep_alive=True) as fake, engine_for(fake.url) as engine:
            await played(engine)
            await played(engine)
            assert (fake.connections, len(fake.exchanges)) == (2, 3)

    async def test_server_that_ignores_stream_is_understood(self):
        """It sends the whole completion as JSON."""
        body = b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}'
        script = refuse("200 OK", body, "Content-Type: application/json")
        async with fake_upstream(script) as fake, engine_for(fake.url) as engine:
            assert await played(engine) == [[], [TextDelta("a")], [Ended()]]

    async def test_body_above_a_mebibyte_arrives(self):
        """It is written piece by piece."""
        async with fake_upstream(whole_stream) as fake, engine_for(fake.url) as engine:
            await played(engine, "x" * (3 * 1024 * 1024))
        assert len(fake.exchanges[0].body) > 3 * 1024 * 1024

    async def test_closing_the_stream_closes_the_connection(self):
        """Which is how a model server learns to stop."""
        left = asyncio.Event()

        async def script(exchange):
            await exchange.begin()
            await exchange.event(CHUNKS[0])
            await exchange.left()
            left.set()

        async with fake_upstream(script) as fake, engine_for(fake.url) as engine:
            batches = generation(engine).stream()
            assert [await anext(batches), await anext(batches)] == [[], [TextDelta("a")]]
            await batches.aclose()
            await asyncio.wait_for(left.wait(), 1)

    @pytest.mark.parametrize("accepted", [True, False])
    async def test_cancelling_a_turn_closes_the_connection(self, accepted):
        """Also while the upstream is still thinking about the prompt."""
        asked, left = asyncio.Event(), asyncio.Event()

        async def script(exchange):
            if accepted:
                await exchange.begin()
            asked.set()
            await exchange.left()
            left.set()

        async with fake_upstream(script) as fake, engine_for(fake.url) as engine:
            turn = asyncio.create_task(played(engine))
            await asked.wait()
            turn.cancel()
            with pytest.raises(asyncio.CancelledError):
                await turn
            await asyncio.wait_for(left.wait(), 1)


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "body", "code"),
        [
            ("401 Unauthorized", b'{"error":{"message":"bad key"}}', "upstream_unauthorized"),
            ("429 Too Many Requests", b"", "rate_limit_exceeded"),
            ("500 Internal Server Error", b"oops", "upstream_error"),
            ("503 Service Unavailable", b"<html>busy</html>", "server_is_overloaded"),
            ("400 Bad Request", b'{"error":{"message":"maximum context length is 8"}}', "context_length_exceeded"),
            ("404 Not Found", b'{"error":{"message":"model m does not exist"}}', "model_not_found"),
        ],
    )
    async def test_refusal_comes_before_anything_else(self, status, body, code):
        """So that the client gets a status, not a failed response."""
        error, seen = await failed(refuse(status, body, "Retry-After: 7"))
        assert (error.code, seen) == (code, [])
        assert bool(error.headers) == (code in {"rate_limit_exceeded", "server_is_overloaded"})

    async def test_redirect_is_not_followed(self):
        """The key and the conversation would go elsewhere."""
        error, _ = await failed(refuse("307 Temporary Redirect", b"", "Location: http://169.254.169.254/"))
        assert error.code == "upstream_error"

    @pytest.mark.parametrize("content_type", ["text/html", "application/x-ndjson", "\x7f weird"])
    async def test_answer_of_another_type_is_an_error(self, content_type):
        """A page of a proxy, mostly."""
        error, seen = await failed(refuse("200 OK", b"<html>", f"Content-Type: {content_type}"))
        assert (error.code, seen) == ("upstream_error", [])

    async def test_words_and_keys_and_prompts_stay_inside(self, monkeypatch, caplog):
        """The client of a shared server sees nothing of them; the log has words, but neither key nor prompt."""
        monkeypatch.setenv("OPENLINE_UPSTREAM_API_KEY", "SECRET-key")

        async def script(exchange):
            body = f"Key SECRET-key may not say {json.loads(exchange.body)['messages'][0]['content']!r} to temperature"
            await exchange.answer("400 Bad Request", body.encode())

        with caplog.at_level(logging.DEBUG, "openline"):
            error, _ = await failed(script, show_detail=False)
        assert "temperature" not in error.message
        assert "temperature" in caplog.text
        for text in (error.message, caplog.text):
            assert "SECRET-key" not in text
            assert "CANARY" not in text

    async def test_answer_stays_out_of_the_log_when_the_connection_breaks(self, caplog):
        """A library's words about broken framing quote what stands there."""

        async def script(exchange):
            await exchange.begin()
            await exchange.event(CHUNKS[0])
            await exchange.send(b"CANARY\r\n" * 2)
            await exchange.left()

        with caplog.at_level(logging.DEBUG, "openline"):
            error, _ = await failed(script)
        assert "CANARY" not in caplog.text + error.message

    async def test_error_inside_the_stream_is_mapped_too(self):
        """After what came before it."""

        async def script(exchange):
            await exchange.begin()
            data = b'data: {"error":{"message":"maximum context length is 8","code":400}}\n\n'
            await exchange.send(
                b"%x\r\n%b\r\n" % (len(CHUNKS[0]) + 8 + len(data), b"data: " + CHUNKS[0] + b"\n\n" + data)
            )
            await exchange.left()

        error, seen = await failed(script)
        assert (error.code, seen) == ("context_length_exceeded", [TextDelta("a")])

    async def test_refusal_whose_body_never_ends_is_cut(self):
        """64 KiB say enough."""

        async def script(exchange):
            await exchange.begin("500 Internal Server Error", "text/plain")
            for _ in range(100_000):
                await exchange.send(b"400\r\n" + b"x" * 1024 + b"\r\n")

        error, _ = await failed(script)
        assert error.code == "upstream_error"
        assert len(error.message) < 1000

    async def test_refusal_whose_body_does_not_come_is_told_all_the_same(self):
        """The status says enough."""

        async def script(exchange):
            await exchange.begin("429 Too Many Requests", "application/json")
            await exchange.left()

        error, _ = await failed(script, connect_seconds_max=0.05)
        assert error.code == "rate_limit_exceeded"


class TestFaults:
    async def test_refused_connection(self):
        """Nobody listens there."""
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            async with engine_for(f"http://127.0.0.1:{taken.getsockname()[1]}/v1") as engine:
                with pytest.raises(ProtocolError) as caught:
                    await played(engine)
        assert (caught.value.code, caught.value.status) == ("upstream_unreachable", 502)
        assert "gpu-1" in caught.value.message

    async def test_name_that_does_not_resolve(self):
        """RFC 6761 reserves `.invalid` for that."""
        async with engine_for("http://nowhere.invalid/v1") as engine:
            with pytest.raises(ProtocolError) as caught:
                await played(engine)
        assert caught.value.code == "upstream_unreachable"

    async def test_silence_before_the_headers(self):
        """The message names the setting."""
        error, _ = await failed(
            lambda exchange: exchange.left(), first_event_seconds_max=0.05, connect_seconds_max=0.05
        )
        assert (error.code, error.status) == ("upstream_timeout", 504)
        assert "first_event_seconds_max" in error.message

    async def test_silence_before_the_first_event(self):
        """A server that accepts at once may still be in its prefill: that has the longer bound."""

        async def script(exchange):
            await exchange.begin()
            await exchange.left()

        error, seen = await failed(script, first_event_seconds_max=0.05, idle_seconds_max=100)
        assert (error.code, seen) == ("upstream_timeout", [])
        assert "first_event_seconds_max" in error.message

    async def test_silence_between_events(self):
        """What came before goes out."""

        async def script(exchange):
            await exchange.begin()
            await exchange.event(CHUNKS[0])
            await exchange.left()

        error, seen = await failed(script, idle_seconds_max=0.05)
        assert (error.code, seen) == ("upstream_timeout", [TextDelta("a")])
        assert "idle_seconds_max" in error.message

    @pytest.mark.parametrize("chunks", range(len(CHUNKS) - 1))
    @pytest.mark.parametrize("how", ["fin", "rst", "clean"])
    async def test_cut_at_every_chunk(self, chunks, how):
        """However the connection ends, an unfinished answer is an error."""

        async def script(exchange):
            await exchange.begin()
            for chunk in CHUNKS[:chunks]:
                await exchange.event(chunk)
            if how == "rst":
                exchange.reset()
            elif how == "clean":
                await exchange.end()

        error, seen = await failed(script)
        assert error.code == "upstream_error"
        assert seen in [[TextDelta("a"), TextDelta("b")][:chunks][:kept] for kept in range(3)]

    async def test_cut_before_the_headers(self):
        """On a fresh connection nothing is repeated: it may have begun to generate."""
        error, _ = await failed(lambda _: asyncio.sleep(0))
        assert error.code == "upstream_error"

    @pytest.mark.parametrize(
        "answer", [b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 abc\r\n\r\n", b"\0" * 64, b"HTTP/1.1 200 OK\r\nA"]
    )
    async def test_what_is_not_http(self, answer):
        """Another program listens there."""
        error, _ = await failed(lambda exchange: exchange.send(answer))
        assert error.code == "upstream_error"

    async def test_broken_framing_in_the_body(self):
        """A chunk whose length is none."""

        async def script(exchange):
            await exchange.begin()
            await exchange.event(CHUNKS[0])
            await exchange.send(b"zz\r\nxx\r\n")
            await exchange.left()

        error, _ = await failed(script)
        assert error.code == "upstream_error"

    @pytest.mark.parametrize("data", [b"{", b'{"choices":3}', b'{"choices":[{"delta":{"content":"\xc3'])
    async def test_bad_json(self, data):
        """Half a character among it."""

        async def script(exchange):
            await exchange.begin()
            await exchange.event(CHUNKS[0])
            await exchange.event(data)
            await exchange.left()

        error, seen = await failed(script)
        assert error.code == "upstream_error"
        assert seen == [TextDelta("a")]

    async def test_line_without_an_end(self):
        """An event has a bound."""

        async def script(exchange):
            await exchange.begin()
            while True:
                await exchange.send(b"400\r\n" + b"x" * 1024 + b"\r\n")

        error, _ = await failed(script, event_bytes_max=64 * 1024)
        assert error.code == "upstream_error"
        assert "65536" in error.message

    @pytest.mark.parametrize("content_type", ["text/event-stream", "application/json"])
    async def test_event_above_its_bound(self, content_type):
        """Also where it comes as one JSON body."""
        script = refuse("200 OK", b"data: " + b"x" * 200_000 + b"\n\n", f"Content-Type: {content_type}")
        error, _ = await failed(script, event_bytes_max=64 * 1024)
        assert error.code == "upstream_error"


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=test", "-days", "1"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not here to make a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return cert, context


class TestTls:
    async def test_certificate_that_is_not_trusted(self, certificate):
        """The message names the remedy."""
        error, _ = await failed(whole_stream, ssl_context=certificate[1])
        assert error.code == "upstream_unreachable"
        assert "ca_file" in error.message

    async def test_ca_file_is_trusted(self, certificate):
        """A server of one's own."""
        cert, context = certificate
        async with fake_upstream(whole_stream, ssl=context) as fake, engine_for(fake.url, ca_file=str(cert)) as engine:
            assert (await played(engine))[-1] == [Ended()]

    async def test_https_to_a_server_that_speaks_http(self):
        """The message names the remedy."""
        async with fake_upstream(whole_stream) as fake, engine_for(fake.url.replace("http:", "https:")) as engine:
            with pytest.raises(ProtocolError) as caught:
                await played(engine)
        assert caught.value.code == "upstream_unreachable"
        assert "http or https" in caught.value.message

    def test_ca_file_that_cannot_be_read_is_said_at_start(self, tmp_path):
        """Not in somebody's turn."""
        for path in (tmp_path / "none.pem", tmp_path / "no.pem"):
            with pytest.raises(ConfigError, match="ca_file"):
                ChatEngine(UpstreamSettings(url="https://x/v1", ca_file=str(path)), show_detail=False)
            (tmp_path / "no.pem").write_text("not a certificate")


class TestModels:
    @pytest.mark.parametrize(
        ("body", "models"),
        [
            (b'{"data":[{"id":"a","created":7,"owned_by":"vllm"}]}', [Model("a", 7, "vllm")]),
            (b'[{"id":"a","created":"x"},{"id":"b","owned_by":null}]', [Model("a"), Model("b")]),
            (b'{"data":[]}', []),
        ],
    )
    async def test_models_are_listed(self, body, models):
        """In the shapes that servers use."""
        async with fake_upstream(refuse("200 OK", body)) as fake, engine_for(fake.url) as engine:
            assert await engine.models() == models
        assert fake.exchanges[0].head.startswith("GET /v1/models ")

    @pytest.mark.parametrize(
        ("status", "body", "code"),
        [
            ("200 OK", b"<html>", "upstream_error"),
            ("200 OK", b"{}", "upstream_error"),
            ("401 No", b"", "upstream_unauthorized"),
        ],
    )
    async def test_what_is_no_list_is_an_error(self, status, body, code):
        """As in a turn."""
        async with fake_upstream(refuse(status, body)) as fake, engine_for(fake.url) as engine:
            with pytest.raises(ProtocolError) as caught:
                await engine.models()
        assert caught.value.code == code

    async def test_silence_is_an_error(self):
        """Nobody waits for a list as for an answer."""
        script = lambda exchange: exchange.left()  # noqa: E731
        async with fake_upstream(script) as fake, engine_for(fake.url, connect_seconds_max=0.05) as engine:
            with pytest.raises(ProtocolError) as caught:
                await engine.models()
        assert caught.value.code == "upstream_timeout"


@pytest.mark.parametrize(
    ("url", "proxied"),
    [
        ("https://api.example.com/v1", True),
        ("http://gpu.example.com/v1", True),
        ("https://inside.example.org/v1", False),
        ("http://127.0.0.1:8000/v1", False),
        ("http://127.8.8.8/v1", False),
        ("http://[::1]:8000/v1", False),
        ("http://localhost:8000/v1", False),
        ("http://vllm.localhost/v1", False),
    ],
)
def test_proxy_of_the_environment_never_applies_to_loopback(monkeypatch, url, proxied):
    """What `no_proxy` names is reached directly too."""
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "proxy.test:3128")
    monkeypatch.setenv("no_proxy", "inside.example.org")
    assert (str(proxy_of(url)) == "http://proxy.test:3128") is proxied


async def test_proxy_gets_its_credentials_in_a_header(monkeypatch):
    """And the upstream's whole URL."""
    async with fake_upstream(whole_stream) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.replace("//", "//me:pass@").removesuffix("/v1"))
        async with engine_for("http://gpu.invalid/v1") as engine:
            assert (await played(engine))[-1] == [Ended()]
    lines = proxy.exchanges[0].head.splitlines()
    assert lines[0] == "POST http://gpu.invalid/v1/chat/completions HTTP/1.1"
    assert "Proxy-Authorization: Basic bWU6cGFzcw==" in lines


async def test_long_lived_things_say_their_state():
    """In logs and debuggers."""
    engine = ChatEngine(UpstreamSettings(name="gpu-1", url="http://x/v1"), show_detail=False)
    assert repr(engine) == "<ChatEngine <Upstream gpu-1 draining=0>>"
    assert engine.name == "gpu-1"
    await engine.close()


def test_dropped_tools_are_warned_of_once(caplog):
    """An agent sends them every turn."""
    engine = ChatEngine(UpstreamSettings(url="http://x/v1"), show_detail=False)
    create = read_http_create(msgspec.json.encode({"model": "m", "input": "Hi", "tools": [{"type": "web_search"}]}))
    request = EngineRequest(create, b"", EMPTY.extend(read_input(create)), "m")
    assert [engine.prepare(request).dropped_tools for _ in range(3)] == [("web_search",)] * 3
    assert caplog.text.count("web_search") == 1


def test_what_a_client_calls_its_tool_stays_out_of_the_log(caplog):
    """Of a type that is not known nothing is said but that (guarantees, "Secrets and zero retention")."""
    engine = ChatEngine(UpstreamSettings(name="gpu-1", url="http://127.0.0.1:1/v1"), show_detail=True)
    for kind in ("CANARY", "CANARY 2"):
        fields = {"model": "m", "input": "Hi", "tools": [{"type": kind}]}
        create = read_http_create(msgspec.json.encode(fields))
        engine.prepare(EngineRequest(create, b"", EMPTY.extend(read_input(create)), "m"))
    assert caplog.text.count("tools of type unknown are dropped") == 1
    assert "CANARY" not in caplog.text


def test_every_hosted_tool_has_its_name_in_the_log():
    """Source: openai-python, `Tool`."""
    kinds = {
        kind
        for tool in get_args(get_args(Tool)[0])
        for kind in get_args(tool.model_fields["type"].annotation)
        if kind not in {"function", "custom", "namespace"}
    }
    assert kinds == HOSTED
