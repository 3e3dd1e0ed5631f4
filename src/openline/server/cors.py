"""What a listed web page needs from HTTP answers to read them.

Source: WHATWG Fetch, "CORS protocol".
"""

from __future__ import annotations

import re
from typing import Final

from openline.server.asgi import HeaderList, Message, Scope, Send
from openline.server.guard import header

_TOKENS: Final = re.compile(r"[A-Za-z0-9-]+(?:\s*,\s*[A-Za-z0-9-]+)*\Z")
_REMEMBER_SECONDS: Final = b"600"


def answering(send: Send, origin: str) -> Send:
    """A `send` whose answers this origin's pages may read, our own headers included."""
    headers: HeaderList = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (
            b"access-control-expose-headers",
            b"openline-version, openline-dropped-tools, x-request-id, x-should-retry, retry-after",
        ),
        (b"vary", b"Origin"),
    ]

    async def send_allowed(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *headers]}
        await send(message)

    return send_allowed


async def answer_preflight(scope: Scope, send: Send) -> None:
    """Tell a browser that the page may ask, with the headers that it wants to send."""
    asked = header(scope["headers"], b"access-control-request-headers") or ""
    headers: HeaderList = [
        (b"access-control-allow-methods", b"GET, POST, DELETE"),
        (b"access-control-max-age", _REMEMBER_SECONDS),
    ]
    if _TOKENS.match(asked):
        headers.append((b"access-control-allow-headers", asked.encode("ascii")))
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
