"""What a client sends, as border structs: checked once, here, and trusted afterwards.

Only fields that we act on or echo are typed. Items, tools and other objects stay raw.
Unknown top-level fields are tolerated (Codex sends `client_metadata`).

Source: Responses API reference, "Create a response"; WebSocket mode guide, "response.create".
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw

from openline.protocol.errors import MESSAGE_CHARS_MAX, ProtocolError
from openline.protocol.items import Item, read_item, wrong_type

TIMINGS: Final = "openline.timings"  # in `include`
SEALED_REASONING: Final = "reasoning.encrypted_content"  # the same
_NULL: Final = Raw(b"null")
B = TypeVar("B")


class StreamOptions(msgspec.Struct, frozen=True):
    """`stream_options`; obfuscation padding is never added, so the field has no effect beyond its check."""

    include_obfuscation: bool | None = None


class PromptCacheOptions(msgspec.Struct, frozen=True):
    """The one member of `prompt_cache_options` that we act on."""

    prewarm: bool | None = None


class Conversation(msgspec.Struct, frozen=True):
    """`conversation` as an object."""

    id: str


class ContextManagement(msgspec.Struct, frozen=True, tag_field="type", tag="compaction"):
    """When a conversation is to be summed up: once it has so many tokens.

    Source: Responses API reference, "context_management".
    """

    compact_threshold: Annotated[int, Meta(ge=1000)] | None = None


# Responses API reference, "include". The last one is ours, docs/adr/0004.
Include = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    "openline.timings",
]

# Responses API reference, "metadata": up to 16 pairs.
Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]],
    Meta(max_length=16),
]


class Create(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a create, the same over WebSocket and HTTP. `None` is what was left out or null.

    Source: Responses API reference, "Create a response", table of body fields.
    """

    model: str | None = None
    input: str | list[Raw] | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    conversation: str | Conversation | None = None
    prompt: object = None
    background: bool | None = None
    store: bool | None = None
    generate: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Raw] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    max_tool_calls: int | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    include: list[Include] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: Metadata | None = None
    multi_agent: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    prompt_cache_retention: str | None = None
    context_management: list[ContextManagement] | None = None
    access_programs: object = None
    background_options: object = None
    image: object = None
    moderation: object = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    idempotency_key: str | None = None
    starting_after: Annotated[int, Meta(ge=0)] | None = None

    @property
    def generates(self) -> bool:
        """False for a warm-up: prepare the context, produce nothing.

        Source: WebSocket mode guide, "Warm-up"; `prompt_cache_options.prewarm` asks for the same.
        """
        options = self.prompt_cache_options
        return self.generate is not False and not (options is not None and options.prewarm is True)

    @property
    def conversation_id(self) -> str | None:
        """The conversation that this is a turn of."""
        return self.conversation.id if isinstance(self.conversation, Conversation) else self.conversation

    @property
    def stores(self) -> bool:
        """Whether the response is to be kept in the store; OpenAI's default is true."""
        return self.store is not False

    @property
    def wants_sealed_reasoning(self) -> bool:
        """Whether reasoning items are to have `encrypted_content`, for a client that nothing is stored for."""
        return SEALED_REASONING in (self.include or ())

    @property
    def wants_timings(self) -> bool:
        """Whether `usage` is to say how long the engine took, where it tells: an extension of ours, docs/adr/0004."""
        return TIMINGS in (self.include or ())


class HttpCreate(Create, frozen=True, kw_only=True):
    """The body of `POST /v1/responses`."""

    stream: bool | None = None


# WebSocket mode guide, "stream_id".
StreamId = Annotated[str, Meta(min_length=1, max_length=256, pattern=r"^[A-Za-z0-9_.-]+\Z")]


class SocketCreate(Create, frozen=True, kw_only=True, tag_field="type", tag="response.create"):
    """The event `response.create`: the body's fields at top level, and the lane.

    `stream` has no meaning on a socket, but Codex and the Agents SDKs send it.
    """

    stream_id: StreamId | None = None
    stream: object = None


class Processed(msgspec.Struct, frozen=True, tag_field="type", tag="response.processed"):
    """Codex's acknowledgement of a response; accepted, and answered by nothing."""


class Cancel(msgspec.Struct, frozen=True, tag_field="type", tag="response.cancel"):
    """Stop a response; without an id, what the default lane is at. An extension that some clients send anyway.

    Source: WebSocket mode guide, "Cancelling".
    """

    response_id: str | None = None


class Inject(msgspec.Struct, frozen=True, tag_field="type", tag="response.inject"):
    """Items for a running multi-agent response, which this server does not have.

    Source: WebSocket mode guide, "response.inject".
    """

    response_id: str = ""
    input: Raw = Raw(b"[]")


class Steer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="response.steer"):
    """More input for a response that still runs, in exactly these keys: the lane is the response's own.

    Attributes:
        input: read by `steering.steer_items`, and sent back as it came where it cannot be used.

    Source: Mid-turn steering guide, "response.steer".
    """

    previous_response_id: str
    input: Raw = _NULL


class SteerRefused(Exception):  # noqa: N818 - an answer, not a fault of ours
    """A steer that cannot be applied; it is answered by `response.steer.failed`, with its input in it.

    Attributes:
        code: one of the guide's, see `steering`.
    """

    def __init__(self, code: str, message: str, steer: Steer) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.steer = steer


ClientEvent = SocketCreate | Cancel | Inject | Steer | Processed


class _Head(msgspec.Struct):
    """What the order of checks looks at, each undecoded so that one does not hide another."""

    type: Raw = _NULL
    stream_id: Raw = _NULL
    previous_response_id: Raw = _NULL
    input: Raw = _NULL


_client_event = msgspec.json.Decoder(ClientEvent)
_http_create = msgspec.json.Decoder(HttpCreate)
_head = msgspec.json.Decoder(_Head)
_string = msgspec.json.Decoder(str | None)
_stream_id = msgspec.json.Decoder(StreamId | None)

# The guide's own words.
_BAD_STREAM_ID: Final = (
    "The 'stream_id' field must be a non-empty string with at most 256 characters and may only contain letters, numbers, "
    "underscores, hyphens, and periods."
)
_OTHER_TYPES: Final = frozenset({"response.cancel", "response.inject", "response.processed"})

_KEY: Final = re.compile(r"[!-~](?:[ -~]{0,253}[!-~])?\Z")  # what a header can hold, and gives back as it was

# Fields that ask for what this server does not do. None of them is lost silently.
_REFUSED: Final = {
    "prompt": "prompt templates are not supported; send 'instructions' and 'input'",
}


class Refused(Exception):  # noqa: N818 - an answer, not a fault of ours
    """A create that is refused although its lane is known: the error waits for the lane's head.

    Attributes:
        error: what the client is told.
        stream_id: the lane; None is the default lane.
        previous_response_id: the parent it named, when that could be read.
    """

    def __init__(self, error: ProtocolError, stream_id: str | None, previous_response_id: str | None) -> None:
        super().__init__(error.message)
        self.error = error
        self.stream_id = stream_id
        self.previous_response_id = previous_response_id


def read_client_event(message: str | bytes) -> ClientEvent:
    """One message from a WebSocket client.

    Checked in the order that clients rely on: JSON, then `type`, then `stream_id`,
    then the rest. The usual message is decoded once; only a refused one is read again
    to find out which of these it was.

    Raises:
        ProtocolError: refused at once, since no lane can be told.
        Refused: refused in its lane.
        SteerRefused: a steer that cannot be read.

    Source: WebSocket mode guide, "stream_id", order of checks.
    """
    try:
        _check_utf8(message)
        event = _client_event.decode(message)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise _why_refused(message, error) from None
    if isinstance(event, SocketCreate):
        error = _not_supported(event, on_socket=True)
        if error is not None:
            raise Refused(error, event.stream_id, event.previous_response_id)
    return event


def read_http_create(body: bytes, idempotency_key: str | None = None) -> HttpCreate:
    """The body of `POST /v1/responses`.

    Args:
        idempotency_key: the header; the body may name the same key.

    Raises:
        ProtocolError: it is not JSON, or a field is of a wrong type or not supported.
    """
    create = read_body(body, _http_create)
    if idempotency_key is not None:
        create = _with_key(create, idempotency_key)
    refusal = _not_supported(create, on_socket=False)
    if refusal is not None:
        raise refusal
    return create


def read_body(body: bytes, decoder: msgspec.json.Decoder[B]) -> B:
    """Any body, read as what its decoder expects.

    Raises:
        ProtocolError: it is not JSON, or a field is of a wrong type.
    """
    try:
        _check_utf8(body)
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise wrong_type(error) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise _not_json(error) from None


def _with_key(create: HttpCreate, header: str) -> HttpCreate:
    if create.idempotency_key not in {None, header}:
        message = "'idempotency_key' is not what the header 'Idempotency-Key' says: expected the same, or one of them."
        raise ProtocolError("invalid_value", message, param="idempotency_key")
    return msgspec.structs.replace(create, idempotency_key=header)


def read_input(create: Create) -> list[Item]:
    """The create's own input items; a plain string is one user message.

    Raises:
        ProtocolError: an item cannot be read.
    """
    if create.input is None:
        return []
    if isinstance(create.input, str):
        return [user_message(create.input)]
    return [read_item(raw, f"input[{index}]") for index, raw in enumerate(create.input)]


def user_message(text: str) -> Item:
    """A user's message of one text."""
    message = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": text}]}
    return Item(msgspec.json.encode(message), "message")


def _not_supported(create: Create, *, on_socket: bool) -> ProtocolError | None:
    for field, reason in _REFUSED.items():
        if getattr(create, field) is not None:
            return ProtocolError("unsupported_parameter", f"'{field}' cannot be used: {reason}.", param=field)
    if create.conversation is not None and create.previous_response_id is not None:
        message = "'previous_response_id' cannot be used beside 'conversation': one of them says what came before."
        return ProtocolError("invalid_request", message, param="previous_response_id")
    if create.background and on_socket:
        message = "'background' is not supported over WebSocket: use HTTP."
        return ProtocolError("unsupported_parameter", message, param="background")
    if create.idempotency_key is not None and not _KEY.match(create.idempotency_key):
        expected = "1 to 255 printable characters of ASCII, without a blank at either end"
        message = f"'idempotency_key' is not valid: expected {expected}."
        return ProtocolError("invalid_value", message, param="idempotency_key")
    if create.starting_after is not None and create.idempotency_key is None:
        message = "'starting_after' says from where on to read a turn again: expected its 'idempotency_key' beside it."
        return ProtocolError("invalid_value", message, param="starting_after")
    if create.multi_agent is not None and create.multi_agent.get("enabled"):
        return ProtocolError("unsupported_parameter", "'multi_agent' is not supported.", param="multi_agent")
    return None


def _check_utf8(message: str | bytes) -> None:
    """The decoder looks into the strings it reads, not into those that stay raw and travel on."""
    if isinstance(message, bytes):
        message.decode()


def _not_json(error: Exception) -> ProtocolError:
    if isinstance(error, RecursionError):
        return ProtocolError("invalid_json", "The message is nested too deeply to be read.")
    if isinstance(error, UnicodeError):
        return ProtocolError("invalid_json", "The message is not valid UTF-8.")
    return ProtocolError("invalid_json", f"The message is not valid JSON: {error}.")


def _why_refused(message: str | bytes, error: Exception) -> ProtocolError | Refused | SteerRefused:
    """Which check the message failed, in the order of the checks."""
    if isinstance(error, UnicodeError):
        return _not_json(error)
    try:
        head = _head.decode(message)
    except msgspec.ValidationError:
        return ProtocolError("invalid_json", "The message is not a JSON object.")
    except (msgspec.DecodeError, RecursionError) as not_json:
        return _not_json(not_json)
    event_type = _string_in(head.type)
    if event_type == "response.steer":
        return _refused_steer(head, error)
    if event_type in _OTHER_TYPES:
        return wrong_type(error)
    if event_type != "response.create":
        return _unknown_type(event_type, head.type)
    try:
        lane = _stream_id.decode(head.stream_id)
    except msgspec.ValidationError:
        return ProtocolError("invalid_stream_id", _BAD_STREAM_ID, param="stream_id")
    return Refused(wrong_type(error), lane, _string_in(head.previous_response_id))


def _refused_steer(head: _Head, error: Exception) -> ProtocolError | SteerRefused:
    target = _string_in(head.previous_response_id)
    if target is None:
        message = "'previous_response_id' is missing or no text: expected the id of the response to steer."
        return ProtocolError("missing_required_parameter", message, param="previous_response_id")
    message = f"{error}: expected 'type', 'previous_response_id' and 'input', and nothing else."
    return SteerRefused("invalid_input", message[:MESSAGE_CHARS_MAX], Steer(target, head.input.copy()))


def _string_in(raw: Raw) -> str | None:
    try:
        return _string.decode(raw)
    except msgspec.ValidationError:
        return None


def _unknown_type(event_type: str | None, raw: Raw) -> ProtocolError:
    if bytes(raw) == b"null":
        return ProtocolError(
            "missing_required_parameter", "'type' is missing: expected 'response.create'.", param="type"
        )
    shown = "not a string" if event_type is None else f"'{event_type[:64]}'"
    return ProtocolError("unknown_event_type", f"'type' is {shown}: expected 'response.create'.", param="type")
