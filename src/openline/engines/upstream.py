"""A model server's HTTP API: connections to it, its event streams, its faults as our errors.

Both HTTP engines stand on this. It knows HTTP, framing and time; what the events mean
is the engines' business.
"""

from __future__ import annotations

import asyncio
import io
import logging
import random
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import closing, suppress
from typing import Annotated, Any, Final, NamedTuple, NoReturn

import aiohttp
import msgspec

from openline.client.network import proxy_of, read_trust
from openline.config import UpstreamSettings
from openline.engines.progress import Progress
from openline.engines.upstream_errors import read_answer, refusal, without_echo, without_secrets
from openline.engines.upstream_faults import (
    FAULTS,
    Attempt,
    fault_error,
    pause_after_fault,
    pause_after_refusal,
    read_some,
    too_long,
)
from openline.engines.upstream_session import EVENT_STREAM, JSON, open_session
from openline.engines.upstream_stream import EventReader
from openline.protocol.errors import ProtocolError

logger = logging.getLogger("openline.upstream")

_DRAIN_SECONDS_MAX: Final = 1.0  # how long a finished stream may take to end before its connection is given up
_ERROR_BYTES_MAX: Final = 64 * 1024
_MODELS_BYTES_MAX: Final = 4 * 1024 * 1024
_LOOK_SECONDS_MAX: Final = 2.0  # a server that does not know a path says so at once
_RAW_BODY_BYTES_MAX: Final = 1024 * 1024  # above it aiohttp wants a file object, which it writes piece by piece
_SPREAD: Final = 1.25  # how much longer than told a wait may be
_POST_HEADERS: Final = {"Content-Type": JSON}
_object: Final = msgspec.json.Decoder(dict[str, Any])


class _Counted(msgspec.Struct):
    """A count of tokens, under either of the names that servers give it."""

    input_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    count: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Listing(NamedTuple):
    """An answer to `GET /models`: its body, and what the server calls itself."""

    body: bytes
    server: str


_counted: Final = msgspec.json.Decoder(_Counted)


class Upstream:
    """One model server, spoken to over HTTP.

    Make it anywhere; use and close it in one event loop.

    Args:
        settings: where it is, its key, its bounds.
        show_detail: whether clients may see its own words in errors; only where every client is the operator.

    Raises:
        ConfigError: its `ca_file` cannot be read.
    """

    def __init__(self, settings: UpstreamSettings, *, show_detail: bool) -> None:
        self._settings = settings
        self._show_detail = show_detail
        self._trust = read_trust(settings.ca_file, "upstreams.ca_file")
        self._proxy = proxy_of(settings.url)
        self._opened: aiohttp.ClientSession | None = None
        self._draining: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<Upstream {self.label} draining={len(self._draining)}>"

    @property
    def label(self) -> str:
        """What people call this upstream."""
        return self._settings.label

    async def post_events(
        self, path: str, body: bytes, progress: Callable[[], Progress], *, whole_json: bool = False
    ) -> AsyncGenerator[Sequence[bytes], None]:
        """Post a request and read its event stream.

        The first batch is empty and comes when the upstream has accepted, with its
        2xx headers. Each later one holds the data of the events that one read from
        the network completed. Close the generator (`contextlib.aclosing`) to cut
        the connection at once, which is how model servers learn to stop.

        Args:
            path: below the upstream's `url`, such as `/chat/completions`.
            body: the request as JSON.
            progress: how far the answer is with all that was yielded. Once it is over, the generator ends, and the
                connection is kept for another turn.
            whole_json: also take a plain JSON body, as one event; some servers ignore `stream`.

        Raises:
            ProtocolError: it cannot be reached, refused, fell silent, was cut off, or sent no event stream.
        """
        response, first_at = await self._accepted(path, body, whole_json=whole_json)
        try:
            if whole_json and _content_type(response) == JSON:
                yield ()
                yield (await self._whole(response, self._settings.event_bytes_max, first_at),)
                return
            with closing(EventReader(response, self._settings, first_at)) as reader:
                yield ()
                while (so_far := progress()) is not Progress.OVER and (events := await reader.read(so_far)) is not None:
                    if events:
                        yield events
        finally:
            if progress() is Progress.OVER:
                self._drain(response)
            else:
                response.close()  # nothing is cut where the body has ended: its connection is back in the pool by then

    async def count(self, path: str, body: bytes, *, at_root: bool = False) -> int:
        """Post a request to an endpoint that counts its tokens and does not run it.

        Args:
            path: as for `post_events`.
            body: the request as JSON.
            at_root: whether the path is below the root of its API, so without the `/v1` of its `url`.

        Raises:
            ProtocolError: it cannot be reached, refused, fell silent, or sent no count; `NoEndpointError` if it does not
                know the path.
        """
        response, until = await self._answered((self._root if at_root else self._settings.url) + path, body)
        try:
            counted = _counted.decode(await self._whole(response, self._settings.event_bytes_max, until))
        except (msgspec.DecodeError, RecursionError):
            counted = _Counted()
        finally:
            response.close()
        tokens = counted.count if counted.input_tokens is None else counted.input_tokens
        if tokens is None:
            message = f"Upstream '{self.label}' answered POST {path} with something other than a count of tokens."
            raise ProtocolError("upstream_error", message)
        return tokens

    async def get_models(self) -> Listing:
        """Its answer to `GET /models`.

        Raises:
            ProtocolError: it cannot be reached, or refused.
        """
        seconds = self._settings.connect_seconds_max
        try:
            session = self._session()
            timeout = aiohttp.ClientTimeout(total=seconds)
            response = await session.get(self._settings.url + "/models", timeout=timeout, allow_redirects=False)
        except FAULTS as error:
            raise fault_error(error, self.label, f"{seconds:g} seconds (`connect_seconds_max`)") from None
        try:
            if not 200 <= response.status < 300:
                raise await self._refused(response)
            return Listing(await self._whole(response, _MODELS_BYTES_MAX), response.headers.get("Server", ""))
        finally:
            response.close()

    def no_models(self) -> NoReturn:
        """Refuse what `get_models` got: it is no list.

        Raises:
            ProtocolError: always.
        """
        message = f"Upstream '{self.label}' answered GET /models with something other than a list of models."
        raise ProtocolError("upstream_error", message)

    async def look(self, path: str, body: bytes | None = None) -> dict[str, Any]:
        """What it answers beside its API; empty for anything but a JSON object, a fault included.

        Args:
            path: below the root of its API, so without the `/v1` of its `url`.
            body: JSON to post, if any.
        """
        url = self._root + path
        timeout = aiohttp.ClientTimeout(total=_LOOK_SECONDS_MAX)
        method, headers = ("GET", None) if body is None else ("POST", _POST_HEADERS)
        try:
            async with self._session().request(
                method, url, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                if response.status != 200:
                    return {}
                return _object.decode(await self._whole(response, _MODELS_BYTES_MAX))
        except (*FAULTS, ProtocolError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return {}

    async def close(self) -> None:
        """Close every connection."""
        for task in self._draining:
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)
        if self._opened is not None:
            await self._opened.close()
            self._opened = None

    def refusal(self, status: int, body: bytes, headers: Mapping[str, str], *, request: bytes) -> ProtocolError:
        """Our error for an answer other than 2xx.

        Its words go into the log, without keys and without what repeats the request.

        Args:
            status: its HTTP status; 0 for an error inside a stream.
            body: what it sent, in any shape.
            headers: its HTTP headers; names in any case.
            request: the body that it answers.
        """
        answer = read_answer(status, body, secret=self._settings.api_key)
        error = refusal(answer, headers, label=self.label, show_words=self._show_detail, now=time.time())
        words = without_echo(f"{answer.names} {answer.words}".strip(), request)
        logger.warning("upstream %s answered %d, told as %s: %s", self.label, answer.status, error.code, words)
        return error

    def failure(self, error: object, *, request: bytes) -> ProtocolError:
        """Our error for one that came inside a 2xx answer, mapped and logged like `refusal`.

        Args:
            error: its error object, decoded or still JSON.
            request: the body that it answers.
        """
        return self.refusal(0, error if isinstance(error, bytes) else msgspec.json.encode(error), {}, request=request)

    def loss(self, code: str, why: str, *, request: bytes) -> ProtocolError:
        """Our error for a turn that was lost with its connection; why may hold the upstream's words, and is logged.

        Args:
            code: a key of `ERRORS`.
            why: for people.
            request: what was sent.
        """
        words = without_secrets(why, self._settings.api_key)
        logger.warning("upstream %s was lost: %s", self.label, without_echo(words, request))
        told = words if self._show_detail else "why is in the server's log."
        return ProtocolError(code, f"Upstream '{self.label}' was lost: {told}")

    # One request, up to its headers.

    async def _accepted(self, path: str, body: bytes, *, whole_json: bool) -> tuple[aiohttp.ClientResponse, float]:
        """Its answer as `_answered` gives it, of a content that we want."""
        response, first_at = await self._answered(self._settings.url + path, body)
        content_type = _content_type(response)
        if content_type in {"", EVENT_STREAM} or (whole_json and content_type == JSON):
            return response, first_at
        response.close()
        came = content_type if re.fullmatch(r"[\w.+-]{1,40}/[\w.+-]{1,60}", content_type) else "something else"
        message = f"Upstream '{self.label}' answered {response.status} with {came} where an event stream was expected."
        raise ProtocolError("upstream_error", message + " Its `url` usually ends in /v1.")

    async def _answered(self, url: str, body: bytes) -> tuple[aiohttp.ClientResponse, float]:
        """Its answer, once it has accepted with 2xx, and until when the first bytes of the body must come.

        What failed without having run is sent again, `retries_max` times.
        """
        retries_left = self._settings.retries_max
        while True:
            attempt = Attempt(asyncio.get_running_loop().time())
            try:
                response = await self._attempt(url, body, attempt)
                return response, attempt.began + self._settings.first_event_seconds_max
            except FAULTS as fault:
                pause = pause_after_fault(fault, attempt, asyncio.get_running_loop().time())
                error = fault_error(fault, self.label, self._first_event)
            except ProtocolError as refused:
                pause = pause_after_refusal(refused, self._settings)
                error = refused
            if pause is None or not retries_left:
                raise error
            retries_left -= 1
            logger.warning("upstream %s: the request did not run and is sent again in %g seconds", self.label, pause)
            # Those who were sent away together shall not come back together.
            await asyncio.sleep(pause * random.uniform(1.0, _SPREAD))  # noqa: S311 - nothing secret

    async def _attempt(self, url: str, body: bytes, attempt: Attempt) -> aiohttp.ClientResponse:
        data = body if len(body) <= _RAW_BODY_BYTES_MAX else io.BytesIO(body)
        # One timer a request: it covers the sending too, which aiohttp's own timeouts do not.
        async with asyncio.timeout(self._settings.connect_seconds_max + self._settings.first_event_seconds_max):
            response = await self._session().post(
                url, data=data, headers=_POST_HEADERS, allow_redirects=False, trace_request_ctx=attempt
            )
        if not 200 <= response.status < 300:
            try:
                raise await self._refused(response, body)
            finally:
                response.close()
        return response

    async def _refused(self, response: aiohttp.ClientResponse, request: bytes = b"") -> ProtocolError:
        body = b""
        with suppress(ProtocolError, TimeoutError):  # the status says enough where the words do not arrive
            async with asyncio.timeout(self._settings.connect_seconds_max):
                body = await self._whole(response, _ERROR_BYTES_MAX, cut=True)
        return self.refusal(response.status, body, response.headers, request=request)

    async def _whole(
        self, response: aiohttp.ClientResponse, bytes_max: int, until: float | None = None, *, cut: bool = False
    ) -> bytes:
        """A body that is not a stream; above `bytes_max` its beginning, or an error.

        Args:
            until: when it must be there, by the loop's clock, if the caller does not see to that.
        """
        pieces: list[bytes] = []
        left = bytes_max
        try:
            async with asyncio.timeout_at(until):
                while left >= 0 and (piece := await read_some(response)):
                    pieces.append(piece)
                    left -= len(piece)
        except FAULTS as error:
            raise fault_error(error, self.label, self._first_event) from None
        if left < 0 and not cut:
            raise too_long(self.label, bytes_max)
        return b"".join(pieces)[:bytes_max]

    @property
    def _first_event(self) -> str:
        return f"{self._settings.first_event_seconds_max:g} seconds (`first_event_seconds_max`)"

    # Connections.

    @property
    def _root(self) -> str:
        """Where it answers what does not belong to its API."""
        return self._settings.url.removesuffix("/v1")

    def _session(self) -> aiohttp.ClientSession:
        """The connections, opened with the first request: a session belongs to the loop it is made in."""
        if self._opened is None:
            self._opened = open_session(self._settings, self._trust, self._proxy)
        return self._opened

    def _drain(self, response: aiohttp.ClientResponse) -> None:
        """Let a finished stream end, so that its connection can be used again; the turn does not wait for that."""
        if not response.content.at_eof():
            task = asyncio.create_task(_drained(response))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)
            task.add_done_callback(lambda _: response.close())  # not by the task: it may be cancelled before it begins


def _content_type(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("Content-Type", "").partition(";")[0].strip().lower()


async def _drained(response: aiohttp.ClientResponse) -> None:
    with suppress(*FAULTS):
        async with asyncio.timeout(_DRAIN_SECONDS_MAX):
            await read_some(response)  # the end, or more, which nobody wants
