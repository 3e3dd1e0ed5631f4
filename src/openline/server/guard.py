"""Who may come in: keys, owners, origins, hosts, and how many sockets an owner may hold.

Source: Responses API reference, "Authentication"; a web page must not reach a local
server through the browser of whoever runs it, so `Origin` and `Host` are checked.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import urlsplit

from openline.config import KeySettings, is_loopback
from openline.protocol.errors import ProtocolError

Headers = Iterable[tuple[bytes, bytes]]

# Whose data it is while no key is configured; such a server listens on loopback only.
LOCAL_OWNER: Final = "local"


def header(headers: Headers, name: bytes) -> str | None:
    """The first header of this name, lower case; None if it is not there."""
    for key, value in headers:
        if key == name:
            return value.decode("latin-1")
    return None


def _host_name(host: str) -> str:
    """A `Host` without its port; empty if it cannot be read."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


class Guard:
    """Decides on each request who asks, or refuses it.

    Args:
        keys: whose requests are taken; none means that anybody on this machine is `local`.
        allowed_origins: the `Origin`s of web pages that may use the server.
        loopback_only: whether `Host` must be this machine: a server on loopback without keys would otherwise
            answer a web page whose name was made to resolve to it.
        connections_per_owner_max: open sockets one owner may hold.
    """

    def __init__(
        self,
        keys: Sequence[KeySettings],
        *,
        allowed_origins: Sequence[str],
        loopback_only: bool,
        connections_per_owner_max: int,
    ) -> None:
        self._keys = [(bytes.fromhex(key.sha256), key.owner) for key in keys]
        self._allowed_origins = frozenset(allowed_origins)
        self._loopback_only = loopback_only
        self._connections_per_owner_max = connections_per_owner_max
        self._connections: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"<Guard keys={len(self._keys)} connections={self._connections.total()}>"

    def admit(self, headers: Headers) -> str:
        """The owner that this request belongs to.

        Raises:
            ProtocolError: 403 for a web page or host that is not listed, 401 for a key that is not known.
        """
        headers = list(headers)
        self.check_origin(headers)
        if not self._keys:
            return LOCAL_OWNER
        return self._owner_of(header(headers, b"authorization"))

    def check_origin(self, headers: Headers) -> None:
        """Refuse requests that a web page makes through somebody's browser.

        Raises:
            ProtocolError: the `Origin` is not listed, or the `Host` is not this machine.
        """
        headers = list(headers)
        origin = header(headers, b"origin")
        if origin is not None and origin not in self._allowed_origins:
            message = "This 'Origin' is not allowed. List it in server.allowed_origins if the page may use this server."
            raise ProtocolError("origin_not_allowed", message)
        if self._loopback_only and not is_loopback(_host_name(header(headers, b"host") or "localhost")):
            message = "This server listens on loopback: expected 'localhost' or a loopback address as 'Host'."
            raise ProtocolError("host_not_allowed", message)

    def listed_origin(self, headers: Headers) -> str | None:
        """The `Origin` of a request, if it is one of those that may use this server."""
        origin = header(headers, b"origin") if self._allowed_origins else None
        return origin if origin in self._allowed_origins else None

    def connect(self, owner: str) -> None:
        """An owner opens a socket; `disconnect` gives it back.

        Raises:
            ProtocolError: the owner holds as many as it may.
        """
        if self._connections[owner] >= self._connections_per_owner_max:
            message = f"{self._connections_per_owner_max} connections are open: expected at most that many for one key."
            raise ProtocolError("connection_limit_exceeded", message, headers={"retry-after": "10"})
        self._connections[owner] += 1

    def disconnect(self, owner: str) -> None:
        """An owner's socket has closed."""
        self._connections[owner] -= 1
        if not self._connections[owner]:
            del self._connections[owner]

    def _owner_of(self, authorization: str | None) -> str:
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() == "bearer" and key:
            digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
            found = None
            # Every key is compared, and in constant time: neither the hit nor its place shows.
            for known, owner in self._keys:
                if hmac.compare_digest(known, digest):
                    found = owner
            if found is not None:
                return found
        message = (
            "The API key is missing or not known: expected 'Authorization: Bearer <key>' with a key of this server."
        )
        raise ProtocolError("invalid_api_key", message, headers={"www-authenticate": "Bearer"})
