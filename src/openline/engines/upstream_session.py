"""The connections to one upstream: where they may go, what they carry, whom they trust."""

from __future__ import annotations

import asyncio
import ssl
from types import SimpleNamespace
from typing import Final
from urllib.request import getproxies_environment, proxy_bypass

import aiohttp
from yarl import URL

from openline import __version__
from openline.config import ConfigError, UpstreamSettings, is_loopback
from openline.engines.upstream_faults import Attempt

EVENT_STREAM: Final = "text/event-stream"
JSON: Final = "application/json"

_CONNECTIONS_MAX: Final = 10_000  # one upstream's share of the 28 000 ephemeral ports that Linux has
_KEEPALIVE_SECONDS: Final = 60.0  # below the idle cut of the usual NATs and balancers


def open_session(settings: UpstreamSettings, trust: ssl.SSLContext | bool, proxy: URL | None) -> aiohttp.ClientSession:
    """A pool of connections to one upstream; no cookies, no `.netrc`, and its key in a header of every request.

    A request whose `trace_request_ctx` is an `Attempt` has it told on which connection it goes out, and when.
    """
    headers = {
        "Accept": f"{EVENT_STREAM}, {JSON}",
        "Accept-Encoding": "identity",  # a compressor holds events back
        "User-Agent": f"openline/{__version__}",
    }
    if settings.api_key:
        headers["Authorization"] = f"Bearer {settings.api_key}"
    trace = aiohttp.TraceConfig()
    trace.on_connection_reuseconn.append(_note_reuse)
    trace.on_connection_create_end.append(_note_connection)
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=_CONNECTIONS_MAX, keepalive_timeout=_KEEPALIVE_SECONDS, ssl=trust),
        cookie_jar=aiohttp.DummyCookieJar(),
        headers=headers,
        proxy=proxy,
        timeout=aiohttp.ClientTimeout(
            total=None, connect=settings.connect_seconds_max, sock_read=settings.first_event_seconds_max
        ),
        trace_configs=[trace],
    )


def read_trust(ca_file: str) -> ssl.SSLContext | bool:
    """Whose certificates are trusted: the system's, or only those of `ca_file`.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not ca_file:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one too
        reason = error.strerror or "not a file of certificates in PEM"
        raise ConfigError(f"upstreams.ca_file is '{ca_file}': {reason}.") from None


def proxy_of(url: str) -> URL | None:
    """The proxy that the environment names for an upstream; never one for loopback.

    aiohttp's own `trust_env` reads the environment and `.netrc` again for every request, in a thread.

    Raises:
        ConfigError: what the environment names is not a URL.
    """
    target = URL(url)
    found = getproxies_environment().get(target.scheme)
    if found is None or is_loopback(target.host or "") or proxy_bypass(target.authority):
        return None
    try:
        return URL(found if "://" in found else f"http://{found}")
    except ValueError:  # the value stays untold: a proxy's URL may hold its password
        message = f"the environment's {target.scheme}_proxy is not a URL: expected http://HOST:PORT."
        raise ConfigError(message) from None


async def _note_connection(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
    attempt = context.trace_request_ctx
    if isinstance(attempt, Attempt):
        attempt.began = asyncio.get_running_loop().time()


async def _note_reuse(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
    await _note_connection(session, context, params)
    if isinstance(context.trace_request_ctx, Attempt):
        context.trace_request_ctx.pooled = True
