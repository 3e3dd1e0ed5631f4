"""The connections to one upstream: where they may go, and what they carry."""

from __future__ import annotations

import asyncio
import ssl
from types import SimpleNamespace
from typing import Final

import aiohttp
from yarl import URL

from openline import __version__
from openline.config import UpstreamSettings
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


async def _note_connection(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
    attempt = context.trace_request_ctx
    if isinstance(attempt, Attempt):
        attempt.began = asyncio.get_running_loop().time()


async def _note_reuse(session: aiohttp.ClientSession, context: SimpleNamespace, params: object) -> None:
    await _note_connection(session, context, params)
    if isinstance(context.trace_request_ctx, Attempt):
        context.trace_request_ctx.pooled = True
