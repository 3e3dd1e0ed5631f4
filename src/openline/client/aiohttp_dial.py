"""The network as it is: sockets and requests by aiohttp."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from openline import __version__
from openline.client.network import proxy_of, read_trust
from openline.client.settings import ClientSettings
from openline.client.wire import DialFailed, DialRefused, Headers, LineClosed
from openline.protocol import sse

_REFUSAL_BYTES_MAX: Final = 64 * 1024
_RAW_BODY_BYTES_MAX: Final = 1024 * 1024  # above it aiohttp wants a file object, which it writes piece by piece
_KEEPALIVE_SECONDS: Final = 15.0  # a pooled connection that its server is about to close leaves a create's fate unknown
_CLOSE_SECONDS_MAX: Final = 1.0
_FAULTS: Final = (aiohttp.ClientError, OSError, HttpProcessingError)
# What fails the same way at every try.
_LASTING: Final = (aiohttp.InvalidURL, aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError)


class AiohttpDial:
    """Sockets and requests to one server; make it anywhere, use and close it in one event loop.

    Args:
        base_url: ends in `/v1` with most servers; `http` or `https`, `ws` or `wss`. A query is kept.

    Raises:
        ValueError: `base_url` is no such URL, or has a password in it.
        ConfigError: the CA bundle, or the proxy that the environment names, cannot be used.
    """

    def __init__(self, base_url: str, settings: ClientSettings) -> None:
        parts = urlsplit(base_url)
        scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
        if scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError(f"base_url is '{base_url}': expected http://HOST:PORT/v1 or https://HOST/v1.")
        if "@" in parts.netloc:
            raise ValueError("base_url has a name or password in it: pass api_key= instead.")
        self._parts = parts._replace(scheme=scheme, path=parts.path.rstrip("/"), fragment="")
        self._settings = settings
        self._trust = read_trust(settings.ca_file, "ca_file")
        self._proxy = proxy_of(urlunsplit(self._parts))
        self._opened: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"<AiohttpDial {self._parts.scheme}://{self._parts.netloc}>"

    async def open_socket(self, headers: Headers) -> AiohttpLine:
        """As `Dial`."""
        answer = _Answer()
        try:
            async with asyncio.timeout(self._settings.connect_seconds_max), self._upgrading(answer) as session:
                socket = await session.ws_connect(
                    self._url("/responses"),
                    headers=headers,
                    heartbeat=self._settings.ping_seconds,
                    max_msg_size=self._settings.message_bytes_max + 1,  # aiohttp's is the least that it refuses
                )
        except aiohttp.WSServerHandshakeError as error:
            raise DialRefused(error.status, answer.headers, answer.body) from None
        except (*_FAULTS, TimeoutError) as error:
            raise _failed(error, reached=answer.is_connected) from None
        return AiohttpLine(socket, answer.headers)

    async def post(self, path: str, body: bytes, headers: Headers) -> AiohttpEvents:
        """As `Dial`."""
        data = body if len(body) <= _RAW_BODY_BYTES_MAX else io.BytesIO(body)
        return await self._request("POST", path, {"content-type": "application/json", **headers}, data)

    async def get(self, path: str, headers: Headers) -> AiohttpEvents:
        """As `Dial`."""
        return await self._request("GET", path, headers, None)

    async def close(self) -> None:
        """As `Dial`."""
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    async def _request(self, method: str, path: str, headers: Headers, data: object) -> AiohttpEvents:
        try:
            answer = await self._session().request(
                method, self._url(path), headers=headers, data=data, allow_redirects=False
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            raise _failed(error) from None
        except _FAULTS as error:
            raise LineClosed(None, _words(error)) from None
        return AiohttpEvents(answer, self._settings.message_bytes_max)

    def _url(self, path: str) -> URL:
        path, _, query = path.partition("?")
        joined = "&".join(filter(None, (self._parts.query, query)))
        return URL(urlunsplit(self._parts._replace(path=self._parts.path + path, query=joined)), encoded=True)

    def _session(self) -> aiohttp.ClientSession:
        """The pool of connections, opened with the first request: it belongs to the loop it is made in."""
        if self._opened is None:
            connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_SECONDS, ssl=self._trust)
            self._opened = aiohttp.ClientSession(connector=connector, **self._options())
        return self._opened

    def _upgrading(self, answer: _Answer) -> aiohttp.ClientSession:
        """The same pool, for one upgrade, of which aiohttp tells the headers and a refusal's body only on the way."""
        trace = aiohttp.TraceConfig()
        trace.on_request_redirect.append(_refuse_redirect)
        trace.on_request_end.append(answer.note)
        trace.on_connection_create_end.append(answer.connected)
        trace.on_connection_reuseconn.append(answer.connected)
        connector = self._session().connector
        return aiohttp.ClientSession(
            connector=connector, connector_owner=False, trace_configs=[trace], **self._options()
        )

    def _options(self) -> dict[str, Any]:
        return {
            "cookie_jar": aiohttp.DummyCookieJar(),
            # A compressor would hold events back.
            "headers": {"user-agent": f"openline/{__version__}", "accept-encoding": "identity"},
            "proxy": self._proxy,
            "timeout": aiohttp.ClientTimeout(total=None, connect=self._settings.connect_seconds_max),
        }


class AiohttpLine:
    """An open WebSocket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, headers: Headers) -> None:
        self._socket = socket
        self._headers = headers

    def __repr__(self) -> str:
        return f"<AiohttpLine {'closed' if self._socket.closed else 'open'}>"

    @property
    def headers(self) -> Headers:
        """As `Line`."""
        return self._headers

    async def send(self, text: str) -> None:
        """As `Line`."""
        transport = self._socket.get_extra_info  # None without a connection
        if self._socket.closed or transport("peername") is None:
            raise LineClosed(self._socket.close_code, "")
        with contextlib.suppress(*_FAULTS):  # some of it may have left
            await self._socket.send_str(text)

    async def receive(self) -> str:
        """As `Line`."""
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.TEXT:
            return message.data
        if message.type is aiohttp.WSMsgType.BINARY:
            await self._socket.close(code=aiohttp.WSCloseCode.UNSUPPORTED_DATA)
            raise LineClosed(None, "the server sent a binary message")
        if message.type is aiohttp.WSMsgType.ERROR:
            raise LineClosed(self._socket.close_code, _words(message.data))
        raise LineClosed(self._socket.close_code, str(message.extra or ""))

    async def close(self) -> None:
        """As `Line`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS_MAX):
                await self._socket.close()


class AiohttpEvents:
    """An HTTP answer."""

    def __init__(self, answer: aiohttp.ClientResponse, bytes_max: int) -> None:
        self._answer = answer
        self._bytes_max = bytes_max

    def __repr__(self) -> str:
        return f"<AiohttpEvents {self.status}>"

    @property
    def status(self) -> int:
        """As `Events`."""
        return self._answer.status

    @property
    def headers(self) -> Headers:
        """As `Events`."""
        return _lower(self._answer.headers)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """As `Events`."""
        decoder = sse.Decoder(self._bytes_max)
        try:
            while chunk := await self._answer.content.readany():
                for data in decoder.feed(chunk):
                    yield data
        except (*_FAULTS, sse.TooLong) as error:
            raise LineClosed(None, _words(error)) from None
        for data in decoder.end():
            yield data

    async def body(self) -> bytes:
        """As `Events`."""
        pieces: list[bytes] = []
        left = self._bytes_max
        try:
            while piece := await self._answer.content.readany():
                pieces.append(piece)
                left -= len(piece)
                if left < 0:
                    raise LineClosed(None, f"the answer is larger than message_bytes_max = {self._bytes_max}")
        except _FAULTS as error:
            raise LineClosed(None, _words(error)) from None
        return b"".join(pieces)

    async def close(self) -> None:
        """As `Events`."""
        self._answer.close()


class _Answer:
    """How an upgrade was answered."""

    def __init__(self) -> None:
        self.headers: Headers = {}
        self.body = b""
        self.is_connected = False

    async def connected(self, _session: aiohttp.ClientSession, _context: object, _params: object) -> None:
        self.is_connected = True

    async def note(
        self, _session: aiohttp.ClientSession, _context: object, params: aiohttp.TraceRequestEndParams
    ) -> None:
        self.headers = _lower(params.response.headers)
        if params.response.status != 101:
            with contextlib.suppress(*_FAULTS):  # the status says enough where the words do not arrive
                self.body = await params.response.content.read(_REFUSAL_BYTES_MAX)


async def _refuse_redirect(
    _session: aiohttp.ClientSession, _context: object, params: aiohttp.TraceRequestRedirectParams
) -> None:
    """An upgrade is not followed elsewhere, where the key is not meant for."""
    raise DialRefused(params.response.status, _lower(params.response.headers), b"")


def _lower(headers: Mapping[str, str]) -> Headers:
    return {name.lower(): value for name, value in headers.items()}


def _failed(error: BaseException, *, reached: bool = False) -> DialFailed:
    words = "no answer came within connect_seconds_max" if isinstance(error, TimeoutError) else _words(error)
    return DialFailed(words, reached=reached, is_lasting=isinstance(error, _LASTING))


def _words(error: BaseException) -> str:
    """A fault in its own words, which are about addresses and certificates; its class where it has none."""
    return str(error) or type(error).__name__
