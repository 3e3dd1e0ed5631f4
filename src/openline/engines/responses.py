"""An upstream that speaks the Responses API itself, over HTTP with server-sent events.

It gets the whole context every turn, with `store: false`: what is remembered, we remember.
Fields and events that we do not read travel through; ids and numbers are ours.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Final

import msgspec

from openline.config import UpstreamSettings
from openline.engines.about import Inquiry
from openline.engines.counting import count_response
from openline.engines.engine import EngineRequest, Model
from openline.engines.progress import Progress
from openline.engines.upstream import Upstream
from openline.protocol.context import SharedBytes
from openline.protocol.deltas import Delta, UpstreamEvent
from openline.protocol.errors import ProtocolError
from openline.protocol.events import TIMINGS
from openline.protocol.items import Item
from openline.protocol.sse import DONE_DATA
from openline.protocol.states import TERMINAL_EVENTS

# What is ours to say, or concerns the client's connection to us only.
_NOT_PASSED_ON: Final = frozenset(
    {"type", "stream_id", "generate", "stream", "stream_options", "background", "store", "input", "model"}
    | {"previous_response_id", "conversation", "client_metadata", "context_management"}
    | {"idempotency_key", "starting_after"}
)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_event = msgspec.json.Decoder(dict[str, Any])
_encoder: Final = msgspec.json.Encoder()


class ItemsProjection:
    """A context as the inside of an `input` array: its items, joined by commas."""

    key = "responses"

    def start(self) -> SharedBytes:
        """No items."""
        return SharedBytes()

    def extend(self, state: SharedBytes, items: Sequence[Item]) -> SharedBytes:
        """The items behind, as they are; only reasoning needs a look."""
        encoded = [raw for raw in map(encoded_item, items) if raw]
        if not encoded:
            return state
        joined = b",".join(encoded)
        return state.append(b"," + joined if len(state) else joined)


def encoded_item(item: Item) -> bytes:
    """An item as the upstream takes it; empty where it is nothing to an upstream that stores nothing."""
    if item.type != "reasoning":
        return item.raw
    fields = _fields.decode(item.raw)
    if _is_given(fields, "encrypted_content"):
        # It is sealed together with the upstream's own id, which the client never
        # saw; without an id it is taken, with ours it is refused.
        fields.pop("id", None)
        return _encoder.encode(fields)
    # An upstream that is told not to store finds nothing behind a bare id.
    return item.raw if _is_given(fields, "content") else b""


def _is_given(fields: dict[str, msgspec.Raw], name: str) -> bool:
    return bytes(fields.get(name, b"null")) not in {b"null", b"[]", b'""'}


def passed_on(request: EngineRequest) -> dict[str, msgspec.Raw]:
    """The fields of a create that are the upstream's business, as they came."""
    fields = {
        name: value
        for name, value in _fields.decode(request.body).items()
        if name not in _NOT_PASSED_ON and bytes(value) != b"null"
    }
    if request.create.wants_timings:  # ours, which other servers would refuse
        fields["include"] = msgspec.Raw(_encoder.encode([*filter(_is_not_ours, request.create.include or ())]))
    return fields


class ResponsesEngine:
    """A Responses upstream.

    Args:
        settings: where it is.
        show_detail: whether clients may see its own words on errors.
    """

    def __init__(self, settings: UpstreamSettings, *, show_detail: bool) -> None:
        self.name = settings.label
        self._upstream = Upstream(settings, show_detail=show_detail)
        self._inquiry = Inquiry(self._upstream, settings)

    def __repr__(self) -> str:
        return f"<ResponsesEngine {self._upstream!r}>"

    @property
    def upstream(self) -> Upstream:
        """The server that it speaks to."""
        return self._upstream

    def prepare(self, request: EngineRequest) -> ResponsesGeneration:
        """The request with the whole context as its input."""
        head = _encoder.encode({"model": request.model, "stream": True, "store": False, **passed_on(request)})
        items = bytes(request.context.project(ItemsProjection()))
        return ResponsesGeneration(self._upstream, b'%b,"input":[%b]}' % (head[:-1], items))

    async def count_tokens(self, request: EngineRequest) -> int:
        """What the upstream counts.

        Raises:
            ProtocolError: it does not count, refused or failed.
        """
        return await count_response(self._upstream, self.prepare(request).body)

    async def models(self) -> Sequence[Model]:
        """The models it lists.

        Raises:
            ProtocolError: it cannot be asked.
        """
        return list((await self._inquiry.ask()).models.values())

    async def close(self) -> None:
        """Give back its connections."""
        await self._inquiry.close()
        await self._upstream.close()


class ResponsesGeneration:
    """One request, as the upstream's events."""

    dropped_tools: Sequence[str] = ()
    prefills = False  # nothing says that it has a cache to fill, and a hosted one would be paid for it

    def __init__(self, upstream: Upstream, body: bytes) -> None:
        self._upstream = upstream
        self._progress = Progress.OPEN
        self.body = body

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        """Its events, a batch a read, until the terminal one.

        Raises:
            ProtocolError: the upstream refused, failed, fell silent, or sent what is no event.
        """
        self._progress = Progress.OPEN
        async with aclosing(self._upstream.post_events("/responses", self.body, lambda: self._progress)) as batches:
            async for batch in batches:
                events: list[Delta] = []
                fault = self._feed(batch, events)
                if events or not batch:
                    yield events
                if fault is not None:
                    raise fault

    def _feed(self, batch: Sequence[bytes], out: list[Delta]) -> ProtocolError | None:
        """Read a batch up to its end, or to the terminal event; what came before a fault in it still goes out."""
        try:
            for data in batch:
                if data == DONE_DATA:
                    self._progress = Progress.OVER
                else:
                    out.append(UpstreamEvent(self._read(data)))
                if self._progress is Progress.OVER:
                    break
        except ProtocolError as error:
            return error
        return None

    def _read(self, data: bytes) -> dict[str, Any]:
        try:
            event = _event.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise ProtocolError(
                "upstream_error", f"Upstream '{self._upstream.label}' sent an event that is not JSON."
            ) from None
        event_type: Any = event.get("type")
        if event_type == "error":
            raise self._failure(event.get("error") or event)
        if event_type == "response.failed":
            response: Any = event.get("response")
            raise self._failure(response.get("error") if isinstance(response, dict) else response)  # pyright: ignore[reportUnknownMemberType,reportUnknownArgumentType]
        if isinstance(event_type, str) and event_type in TERMINAL_EVENTS:
            self._progress = Progress.OVER
        return event

    def _failure(self, error: object) -> ProtocolError:
        return self._upstream.failure({"error": error}, request=self.body)


def _is_not_ours(included: str) -> bool:
    return included != TIMINGS
