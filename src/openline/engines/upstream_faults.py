"""Faults of the network and of HTTP, as our errors; and whether a request that met one may be sent again."""

from __future__ import annotations

import errno
import logging
from typing import Final

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError

from openline.config import UpstreamSettings
from openline.engines.upstream_errors import without_secrets
from openline.protocol.errors import ProtocolError

logger = logging.getLogger("openline.upstream")

# What the library raises where the network or the peer is at fault.
FAULTS: Final = (aiohttp.ClientError, OSError, HttpProcessingError)

# A fault's class → our code and what the client is told; the first that fits counts.
_KINDS: Final[tuple[tuple[type[BaseException], str, str], ...]] = (
    (aiohttp.ConnectionTimeoutError, "upstream_unreachable", "accepted no connection in time. Is it running?"),
    (TimeoutError, "upstream_timeout", "sent nothing for {waited}."),
    (aiohttp.ClientConnectorDNSError, "upstream_unreachable", "cannot be reached: its host name does not resolve."),
    (
        aiohttp.ClientConnectorCertificateError,
        "upstream_unreachable",
        "cannot be reached: its TLS certificate is not trusted. Set the upstream's `ca_file` to the CA that signed it.",
    ),
    (
        aiohttp.ClientSSLError,
        "upstream_unreachable",
        "cannot be reached: TLS failed. Does its `url` begin with what it speaks, http or https? Is `ca_file` right?",
    ),
    (aiohttp.ClientProxyConnectionError, "upstream_unreachable", "cannot be reached: the proxy does not answer."),
    (aiohttp.ClientHttpProxyError, "upstream_unreachable", "cannot be reached: the proxy refused."),
    (aiohttp.ClientConnectorError, "upstream_unreachable", "cannot be reached: no connection. Is it running?"),
    (aiohttp.InvalidURL, "upstream_unreachable", "cannot be reached: its `url` is not valid."),
    (aiohttp.ServerDisconnectedError, "upstream_error", "closed the connection before it answered."),
    (aiohttp.ClientResponseError, "upstream_error", "sent something that is not HTTP."),
    (HttpProcessingError, "upstream_error", "sent something that is not HTTP."),
)
_CUT: Final = ("upstream_error", "closed the connection: the answer ended before it finished.")

_DROPPED: Final = (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError, aiohttp.ClientConnectionResetError)
_RESETS: Final = frozenset({errno.ECONNRESET, errno.EPIPE})
# What restarts behind an address is back at once, or not within a time that a client would be kept waiting for.
_CONNECT_AGAIN_SECONDS: Final = 0.1
_AT_ONCE_SECONDS_MAX: Final = 1.0  # a connection that crosses its end on the wire is told so within a round trip
_BUSY: Final = frozenset({"rate_limit_exceeded", "server_is_overloaded"})


class Attempt(msgspec.Struct):
    """One sending of a request.

    Attributes:
        began: when its connection was there, by the loop's clock; before that, when it was wanted.
        pooled: whether it went out on a connection used before.
    """

    began: float
    pooled: bool = False


async def read_some(response: aiohttp.ClientResponse) -> bytes:
    """What one read brings of its body; empty at the end.

    Raises:
        one of `FAULTS`.
    """
    try:
        return await response.content.readany()
    except RuntimeError:  # so aiohttp calls a connection that it has closed itself, at a chunk that is none
        raise aiohttp.ClientPayloadError("The connection was closed.") from None


def fault_error(error: BaseException, label: str, waited: str) -> ProtocolError:
    """Our error for a fault, which is logged.

    Args:
        error: the library's exception, one of `FAULTS`.
        label: what people call the upstream.
        waited: how long it was waited, if the fault is that nothing came, and which setting says so.
    """
    # Before there is a connection, the library's words are about addresses and certificates; later they quote bodies.
    words = without_secrets(str(error), "") if isinstance(error, aiohttp.ClientConnectorError) else ""
    logger.warning("upstream %s: %s %s", label, type(error).__name__, words)
    code, says = next(((code, says) for kind, code, says in _KINDS if isinstance(error, kind)), _CUT)
    return ProtocolError(code, f"Upstream '{label}' {says.format(waited=waited)}")


def too_long(label: str, bytes_max: int) -> ProtocolError:
    """Our error for more bytes in one piece than we take."""
    return ProtocolError("upstream_error", f"Upstream '{label}' sent more than {bytes_max} bytes in one event.")


def pause_after_fault(error: BaseException, attempt: Attempt, now: float) -> float | None:
    """How many seconds to wait before the request is sent again; None where it may be running.

    A generation costs money and hosted tools have effects, so only these are repeated: no connection was made; a
    connection of the pool was closed as the request went out on it; or the connection was reset, which a system does
    whose program has not read the request. All of these come at once. What comes later may be a box between that has
    forgotten a connection while the model was reading, so it counts as a timeout, and those are never repeated.

    Source: RFC 9110 §9.2.2; docs/adr/0011.
    """
    if isinstance(error, TimeoutError):
        return None
    if isinstance(error, aiohttp.ClientConnectorError):
        lasts = isinstance(error, aiohttp.ClientSSLError)  # certificates among them
        return None if lasts else _CONNECT_AGAIN_SECONDS
    at_once = now - attempt.began <= _AT_ONCE_SECONDS_MAX
    if not at_once or not isinstance(error, _DROPPED) or _has_begun_to_answer(error):
        return None
    return 0.0 if attempt.pooled or _is_reset(error) else None


def pause_after_refusal(error: ProtocolError, settings: UpstreamSettings) -> float | None:
    """How many seconds to wait before a refused request is sent again; None if that is for the client to do.

    Source: RFC 9110 §10.2.3; docs/adr/0011.
    """
    told, longest = error.headers.get("retry-after"), settings.retry_after_seconds_max
    if error.code not in _BUSY or told is None or not longest or float(told) > longest:
        return None
    return float(told)


def _is_reset(error: BaseException) -> bool:
    return isinstance(error, ConnectionResetError) or getattr(error, "errno", None) in _RESETS


def _has_begun_to_answer(error: BaseException) -> bool:
    """Whether a part of the answer's head came before the connection closed; then it is there in place of words."""
    return isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str)
