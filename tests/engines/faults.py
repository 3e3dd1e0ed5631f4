"""What can be wrong with an upstream: each fault as a script of bytes, for both kinds of upstream, and how a turn ends.

A request says in its input which fault it wants (`fault=NAME turn=ID`), so that one server plays all of them at once.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from time import time
from typing import Any

import msgspec

from engines.fake_upstream import Exchange, chunked, head

# What no client and no log line may show: the upstream's words, with the key that it was sent.
CANARY = "CANARY-of-the-upstream"
KEY = "sk-upstream-CANARY-key"
WORDS = f"{CANARY}: your key {KEY} is not welcome".encode()
# No bound of time that a turn without a stall could meet on a busy machine; the others small enough to meet.
BOUNDS = {"event_bytes_max": 64 * 1024, "answer_bytes_max": 128 * 1024}
# For turns that stall: soon over.
STALLS = {
    "connect_seconds_max": 1.5,
    "first_event_seconds_max": 2.0,
    "idle_seconds_max": 2.0,
    "end_seconds_max": 0.5,
    "answer_seconds_max": 3.0,
}
LINE_BYTES = 100 * 1024 * 1024
_ASKED = re.compile(rb"fault=([\w-]+) turn=([\w-]+)")


def encode(*events: Any) -> list[bytes]:
    return [event if isinstance(event, bytes) else msgspec.json.encode(event) for event in events]


def event_of(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def delta(**fields: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": fields}]}


def fragment(index: int, **fields: Any) -> dict[str, Any]:
    return {"index": index, **fields}


CALL = {"id": "call_1", "function": {"name": "look", "arguments": ""}}
ARGUMENTS = '{"at": "the sky"}'
FINISHED = {"object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]}
CHAT = encode(
    delta(role="assistant"),
    delta(content="Höre "),
    delta(content="zu."),
    delta(tool_calls=[fragment(0, **CALL)]),
    delta(tool_calls=[fragment(0, function={"arguments": ARGUMENTS[:9]})]),
    delta(tool_calls=[fragment(0, function={"arguments": ARGUMENTS[9:]})]),
    FINISHED,
    {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}},
    b"[DONE]",
)

MESSAGE = {"type": "message", "id": "msg_up", "role": "assistant"}
TOOL = {"type": "function_call", "id": "fc_up", "call_id": "call_1", "name": "look"}
PART = {"type": "output_text", "annotations": []}
AT = {"item_id": "msg_up", "output_index": 0, "content_index": 0}
AT_CALL = {"item_id": "fc_up", "output_index": 1}
SAID = {**MESSAGE, "status": "completed", "content": [{**PART, "text": "Höre zu."}]}
CALLED = {**TOOL, "status": "completed", "arguments": ARGUMENTS}
RESPONSES = encode(
    {"type": "response.created", "response": {"id": "resp_up", "status": "in_progress"}},
    {
        "type": "response.output_item.added",
        "output_index": 0,
        "item": {**MESSAGE, "status": "in_progress", "content": []},
    },
    {"type": "response.content_part.added", **AT, "part": {**PART, "text": ""}},
    {"type": "response.output_text.delta", **AT, "delta": "Höre "},
    {"type": "response.output_text.delta", **AT, "delta": "zu."},
    {"type": "response.output_text.done", **AT, "text": "Höre zu."},
    {"type": "response.content_part.done", **AT, "part": {**PART, "text": "Höre zu."}},
    {"type": "response.output_item.done", "output_index": 0, "item": SAID},
    {
        "type": "response.output_item.added",
        "output_index": 1,
        "item": {**TOOL, "status": "in_progress", "arguments": ""},
    },
    {"type": "response.function_call_arguments.delta", **AT_CALL, "delta": ARGUMENTS},
    {"type": "response.function_call_arguments.done", **AT_CALL, "name": "look", "arguments": ARGUMENTS},
    {"type": "response.output_item.done", "output_index": 1, "item": CALLED},
    {
        "type": "response.completed",
        "response": {
            "id": "resp_up",
            "status": "completed",
            "output": [SAID, CALLED],
            "usage": {"input_tokens": 7, "output_tokens": 5, "total_tokens": 12},
        },
    },
)


@dataclass(frozen=True)
class Wire:
    """What one kind of upstream sends where nothing is wrong.

    Attributes:
        events: the data of a whole answer's events.
        whole: how many of them make the answer whole; what follows is about it.
        error: of a stream that breaks off, in the form in which this kind says so.
    """

    events: list[bytes]
    whole: int
    error: bytes

    @property
    def answer(self) -> bytes:
        return b"".join(map(event_of, self.events))

    @property
    def token(self) -> bytes:
        """The event that brings the first text, with a letter of two bytes."""
        return next(event for event in self.events if "ö".encode() in event)

    @property
    def opening(self) -> list[bytes]:
        """What comes before it."""
        return self.events[: self.events.index(self.token)]


LIMITED = {"code": "rate_limit_exceeded", "type": "rate_limit_error"}
LIMITED["message"] = f"{CANARY}. Please try again in 11.05s."
WIRES = {
    "chat": Wire(CHAT, CHAT.index(msgspec.json.encode(FINISHED)) + 1, msgspec.json.encode({"error": LIMITED})),
    "responses": Wire(
        RESPONSES,
        len(RESPONSES),
        msgspec.json.encode({"type": "response.failed", "response": {"status": "failed", "error": LIMITED}}),
    ),
}


@dataclass
class Play:
    """One request that a script answers: the kind of upstream that it is, and how often this turn was sent before."""

    exchange: Exchange
    wire: Wire
    repeated: int

    async def begin(self) -> None:
        await self.exchange.begin()

    async def events(self, *data: bytes) -> None:
        for each in data:
            await self.exchange.event(each)

    async def good(self) -> None:
        await self.begin()
        await self.events(*self.wire.events)
        await self.exchange.end()

    async def refuse(self, status: str, *fields: str, body: bytes = WORDS) -> None:
        await self.exchange.answer(status, body, *fields)

    async def silent(self) -> None:
        """Nothing more, until the other side has had enough."""
        await self.exchange.left()


Script = Callable[[Play], Awaitable[None]]


@dataclass(frozen=True)
class Fault:
    """What is wrong, and what a client must see of it.

    Attributes:
        code: of the error that the turn ends in; None where it completes.
        begun: whether the upstream had accepted, so that a stream ends in `response.failed` and not in a refusal; None
            where that depends on whether its head and what is wrong with its body come in one read.
        sent: how many requests the upstream gets.
        retry_after: what the client is told.
        kinds: the upstreams for which it makes sense.
        on_pooled: how many requests it gets if the connection may have been used before.
        stalls: whether it is over only when a bound of time is met.
    """

    script: Script
    code: str | None = None
    begun: bool | None = False
    sent: int = 1
    retry_after: str | None = None
    kinds: tuple[str, ...] = ("chat", "responses")
    on_pooled: int | None = None
    stalls: bool = False


FAULTS: dict[str, Fault] = {}


def fault(name: str, code: str | None = None, **fields: Any) -> Callable[[Script], Script]:
    def register(script: Script) -> Script:
        FAULTS[name] = Fault(script, code, **fields)
        return script

    return register


def refusal(name: str, status: str, code: str | None, *fields: str, body: bytes = WORDS, **more: Any) -> None:
    async def script(play: Play) -> None:
        await play.refuse(status, *fields, body=body)

    FAULTS[name] = Fault(script, code, **more)


# Refusals.

refusal("bad-request", "400 Bad Request", "upstream_refused")
refusal("unauthorized", "401 Unauthorized", "upstream_unauthorized")
refusal("forbidden", "403 Forbidden", "upstream_unauthorized")
refusal("no-such-path", "404 Not Found", "upstream_error", body=b"")
refusal("no-such-model", "404 Not Found", "model_not_found", body=b'{"error":{"message":"model m does not exist"}}')
refusal(
    "overflow",
    "400 Bad Request",
    "context_length_exceeded",
    body=b'{"error":{"message":"This model\'s maximum context length is 8 tokens."}}',
)
refusal("too-large", "413 Content Too Large", "upstream_refused")
refusal("unprocessable", "422 Unprocessable Content", "upstream_refused", body=b'{"detail":[{"msg":"no"}]}')
refusal("rate-limited", "429 Too Many Requests", "rate_limit_exceeded")
refusal("rate-limited-for-30", "429 Too Many Requests", "rate_limit_exceeded", "Retry-After: 30", retry_after="30")
refusal(
    "rate-limited-until-a-date",
    "429 Too Many Requests",
    "rate_limit_exceeded",
    f"Date: {formatdate(1_800_000_000, usegmt=True)}",
    f"Retry-After: {formatdate(1_800_000_030, usegmt=True)}",
    retry_after="30",
)
refusal("rate-limited-for-0", "429 Too Many Requests", "rate_limit_exceeded", "Retry-After: 0", sent=2, retry_after="0")
refusal("rate-limited-for-1", "429 Too Many Requests", "rate_limit_exceeded", "Retry-After: 1", sent=2, retry_after="1")
refusal("no-quota", "429 Too Many Requests", "insufficient_quota", body=b'{"error":{"code":"insufficient_quota"}}')
refusal("broken", "500 Internal Server Error", "upstream_error")
refusal("bad-gateway", "502 Bad Gateway", "upstream_error", body=b"<html><h1>502</h1>" + WORDS + b"</html>")
refusal("loading", "503 Service Unavailable", "server_is_overloaded")
refusal("overloaded", "529 Overloaded", "server_is_overloaded")
refusal("redirected", "307 Temporary Redirect", "upstream_error", "Location: http://169.254.169.254/latest/meta-data/")
refusal("an-html-page", "200 OK", "upstream_error", "Content-Type: text/html", body=b"<html>" + WORDS)


@fault("rate-limited-once", sent=2)
async def _rate_limited_once(play: Play) -> None:
    await (play.good() if play.repeated else play.refuse("429 Too Many Requests", "Retry-After: 0"))


@fault("loading-once", sent=2)
async def _loading_once(play: Play) -> None:
    in_a_second = formatdate(time() + 0.9, usegmt=True)
    await (play.good() if play.repeated else play.refuse("503 Service Unavailable", f"Retry-After: {in_a_second}"))


@fault("refused-without-end", "upstream_error")
async def _refused_without_end(play: Play) -> None:
    await play.exchange.begin("500 Internal Server Error", "text/plain")
    while True:
        await play.exchange.send(chunked(WORDS * 20))


# No answer.


@fault("reset", "upstream_error", sent=2)
async def _reset(play: Play) -> None:
    play.exchange.reset()


@fault("reset-once", sent=2)
async def _reset_once(play: Play) -> None:
    await (play.good() if play.repeated else _reset(play))


@fault("reset-later", "upstream_error")
async def _reset_later(play: Play) -> None:
    """As a box between does that has forgotten a silent connection: the request may be running."""
    await asyncio.sleep(1.05)
    play.exchange.reset()


@fault("closed", "upstream_error", on_pooled=2)
async def _closed(play: Play) -> None:
    """It read the request and went: it may have begun to generate."""


@fault("silent", "upstream_timeout", stalls=True)
async def _silent(play: Play) -> None:
    await play.silent()


@fault("half-a-head", "upstream_timeout", stalls=True)
async def _half_a_head(play: Play) -> None:
    await play.exchange.send(b"HTTP/1.1 200 OK\r\nContent-Ty")
    await play.silent()


@fault("closed-in-the-head", "upstream_error")
async def _closed_in_the_head(play: Play) -> None:
    await play.exchange.send(b"HTTP/1.1 200 OK\r\nContent-Ty")


@fault("not-http", "upstream_error")
async def _not_http(play: Play) -> None:
    await play.exchange.send(b"SSH-2.0-OpenSSH_9.6\r\n")


@fault("too-many-headers", "upstream_error")
async def _too_many_headers(play: Play) -> None:
    await play.exchange.send(head("200 OK", *(f"X-{number}: {CANARY}" for number in range(5000))))


@fault("a-header-without-end", "upstream_error")
async def _a_header_without_end(play: Play) -> None:
    await play.exchange.send(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        await play.exchange.send(b"x" * 4096)


@fault("informed-for-ever", "upstream_timeout", stalls=True)
async def _informed_for_ever(play: Play) -> None:
    while True:
        await play.exchange.send(head("103 Early Hints", "Link: </x>"))
        await asyncio.sleep(0.01)


@fault("informed")
async def _informed(play: Play) -> None:
    await play.exchange.send(head("102 Processing") * 20)
    await play.good()


# A stream that stops.


@fault("silent-behind-the-head", "upstream_timeout", begun=True, stalls=True)
async def _silent_behind_the_head(play: Play) -> None:
    await play.begin()
    await play.silent()


@fault("silent-between-tokens", "upstream_timeout", begun=True, stalls=True)
async def _silent_between_tokens(play: Play) -> None:
    await play.begin()
    await play.events(*play.wire.opening, play.wire.token)
    await play.silent()


@fault("silent-before-the-end", stalls=True)
async def _silent_before_the_end(play: Play) -> None:
    await play.begin()
    await play.events(*play.wire.events[: play.wire.whole])
    await play.silent()


@fault("comments-for-ever", "upstream_timeout", begun=True, stalls=True)
async def _comments_for_ever(play: Play) -> None:
    await play.begin()
    while True:
        await play.exchange.send(chunked(b": PROCESSING\n\n"))
        await asyncio.sleep(0.05)


@fault("comments-behind-the-answer", stalls=True)
async def _comments_behind_the_answer(play: Play) -> None:
    await play.begin()
    await play.events(*play.wire.events[: play.wire.whole])
    while True:
        await play.exchange.send(chunked(b": BYE\n\n"))
        await asyncio.sleep(0.05)


@fault("empty", "upstream_error", begun=True)
async def _empty(play: Play) -> None:
    await play.begin()
    await play.exchange.end()


@fault("empty-of-known-length", "upstream_error", begun=True)
async def _empty_of_known_length(play: Play) -> None:
    await play.exchange.send(head("200 OK", "Content-Type: text/event-stream", "Content-Length: 0"))


@fault("only-the-end", "upstream_error", begun=True)
async def _only_the_end(play: Play) -> None:
    await play.begin()
    await play.events(b"[DONE]")
    await play.exchange.end()


def cuts(kind: str) -> None:
    """An end at every event of an answer: FIN, RST, and one that is proper HTTP."""
    wire = WIRES[kind]

    def cut(count: int, how: str) -> Script:
        async def script(play: Play) -> None:
            await play.begin()
            await play.events(*wire.events[:count])
            if how == "reset":
                play.exchange.reset()
            elif how == "ended":
                await play.exchange.end()

        return script

    for count in range(len(wire.events)):
        for how in ("closed", "reset", "ended"):
            code = None if count >= wire.whole else "upstream_error"
            FAULTS[f"{how}-behind-{count}-of-{kind}"] = Fault(cut(count, how), code, begun=True, kinds=(kind,))


cuts("chat")
cuts("responses")


# A stream of other bytes.


@fault("half-a-character", "upstream_error", begun=True)
async def _half_a_character(play: Play) -> None:
    await play.begin()
    await play.events(*play.wire.opening, play.wire.token.replace("ö".encode(), "ö".encode()[:1]))
    await play.exchange.end()


@fault("bad-json", "upstream_error", begun=True)
async def _bad_json(play: Play) -> None:
    await play.begin()
    await play.events(*play.wire.opening, play.wire.token, b'{"choices": [' + WORDS)
    await play.silent()


@fault("json-of-another-shape", "upstream_error", begun=True)
async def _json_of_another_shape(play: Play) -> None:
    await play.begin()
    await play.events(b'["choices"]')
    await play.silent()


@fault("nested-without-end", "upstream_error", begun=True)
async def _nested_without_end(play: Play) -> None:
    await play.begin()
    await play.events(b'{"type":"x","choices":' + b"[" * 20_000)
    await play.silent()


@fault("an-error-inside", "rate_limit_exceeded", begun=True, retry_after="12")
async def _an_error_inside(play: Play) -> None:
    await play.begin()
    await play.events(*play.wire.opening, play.wire.token, play.wire.error)
    await play.exchange.end()


@fault("an-error-of-text", "upstream_error", begun=True)
async def _an_error_of_text(play: Play) -> None:
    await play.begin()
    await play.events(msgspec.json.encode({"type": "error", "error": WORDS.decode()}))
    await play.exchange.end()


@fault("a-line-without-end", "upstream_error", begun=True)
async def _a_line_without_end(play: Play) -> None:
    await play.begin()
    piece = b"x" * 65536
    await play.exchange.send(chunked(b"data: "))
    for _ in range(LINE_BYTES // len(piece)):
        await play.exchange.send(chunked(piece))


@fault("lines-without-end", "upstream_error", begun=True)
async def _lines_without_end(play: Play) -> None:
    await play.begin()
    while True:
        await play.exchange.send(chunked(b"data: x\n" * 1000))


@fault("an-answer-without-end", "upstream_error", begun=True)
async def _an_answer_without_end(play: Play) -> None:
    await play.begin()
    await play.events(*play.wire.opening)
    while True:
        await play.exchange.send(chunked(event_of(play.wire.token) * 50))


@fault("empty-events-without-end", "upstream_error", begun=True)
async def _empty_events_without_end(play: Play) -> None:
    await play.begin()
    while True:
        await play.exchange.send(chunked(b": \n\ndata:\n\n" * 100))


@fault("a-violation-of-chunks", "upstream_error", begun=None)
async def _a_violation_of_chunks(play: Play) -> None:
    await play.begin()
    await play.events(*play.wire.opening)
    await asyncio.sleep(0.05)  # mostly, the head has been read by then
    await play.exchange.send(b"zz\r\n" + WORDS + b"\r\n")
    await play.silent()


@fault("longer-than-it-says", "upstream_error", begun=None)
async def _longer_than_it_says(play: Play) -> None:
    length = len(event_of(play.wire.events[0])) + 9
    await play.exchange.send(head("200 OK", "Content-Type: text/event-stream", f"Content-Length: {length}"))
    await play.exchange.send(play.wire.answer)


@fault("shorter-than-it-says", "upstream_error", begun=True)
async def _shorter_than_it_says(play: Play) -> None:
    await play.exchange.send(head("200 OK", "Content-Type: text/event-stream", "Content-Length: 100000"))
    await play.exchange.send(event_of(play.wire.events[0]) + event_of(play.wire.events[1]))


@fault("without-any-length")
async def _without_any_length(play: Play) -> None:
    await play.exchange.send(head("200 OK", "Content-Type: text/event-stream", "Connection: close") + play.wire.answer)


@fault("compressed-garbage", "upstream_error", begun=True)
async def _compressed_garbage(play: Play) -> None:
    fields = "Content-Type: text/event-stream", "Content-Encoding: gzip", "Transfer-Encoding: chunked"
    await play.exchange.send(head("200 OK", *fields) + chunked(b"\x1f\x8b" + WORDS))
    await play.silent()


@fault("byte-by-byte")
async def _byte_by_byte(play: Play) -> None:
    answer = head("200 OK", "Content-Type: text/event-stream", "Connection: close") + play.wire.answer
    slow = answer.index(play.wire.token) + len(play.wire.token) + 2
    for byte in answer[:slow]:
        await play.exchange.send(bytes([byte]))
        await asyncio.sleep(0)
    await play.exchange.send(answer[slow:])


# A stream of events that do not fit together.


@fault("an-end-twice")
async def _an_end_twice(play: Play) -> None:
    await play.begin()
    await play.exchange.send(chunked(play.wire.answer + event_of(play.wire.events[-1]) * 2))
    await play.silent()


@fault("more-behind-the-end")
async def _more_behind_the_end(play: Play) -> None:
    await play.begin()
    await play.exchange.send(chunked(play.wire.answer + event_of(play.wire.error) + event_of(b"{") + play.wire.answer))
    await play.silent()


# The same for an upstream that is spoken to over a socket: what it sends, and the code in which its turn ends.
STREAMS: dict[str, tuple[list[bytes], str | None]] = {}


def stream(name: str, kind: str, code: str | None, *events: Any) -> None:
    """A proper stream of these events."""
    encoded = encode(*events)

    async def script(play: Play) -> None:
        await play.begin()
        await play.events(*encoded)
        await play.exchange.end()

    FAULTS[f"{name}-in-{kind}"] = Fault(script, code, begun=True, kinds=(kind,))
    if kind == "responses":
        STREAMS[name] = encoded, code


ENDED = (FINISHED, b"[DONE]")
NAMED = {"name": "look", "arguments": "{}"}
stream("null-choices", "chat", None, {"choices": None}, delta(content="a"), *ENDED)
stream("null-in-choices", "chat", "upstream_error", {"choices": [None]}, *ENDED)
stream("null-deltas", "chat", None, {"choices": [{"index": None, "delta": None}]}, *ENDED)
stream("no-end", "chat", "upstream_error", delta(content="a"))
stream("no-reason-for-the-end", "chat", None, delta(content="a"), b"[DONE]")
stream("another-choice", "chat", None, {"choices": [{"index": -1, "delta": {"content": "a"}}]}, *ENDED)
stream("a-huge-choice", "chat", None, {"choices": [{"index": 10**30, "delta": {"content": "a"}}]}, *ENDED)
stream("a-negative-call", "chat", None, delta(tool_calls=[fragment(-7, id="call_1", function=NAMED)]), *ENDED)
stream("a-huge-call", "chat", None, delta(tool_calls=[fragment(10**30, id="call_1", function=NAMED)]), *ENDED)
stream(
    "arguments-of-no-call",
    "chat",
    "upstream_error",
    delta(tool_calls=[fragment(5, function={"arguments": "{}"})]),
    *ENDED,
)
stream(
    "one-id-for-two-calls",
    "chat",
    None,
    delta(tool_calls=[fragment(0, id="call_1", function=NAMED), fragment(1, id="call_1", function=NAMED)]),
    *ENDED,
)
stream("usage-beyond-measure", "chat", None, {"usage": {"prompt_tokens": 10**40, "completion_tokens": -1}}, *ENDED)
stream("a-broken-generation", "chat", "upstream_error", {"choices": [{"delta": {}, "finish_reason": "error"}]})

COMPLETED = {"type": "response.completed", "response": {"status": "completed", "output": []}}
ADDED = {"type": "response.output_item.added", "output_index": 0, "item": {**MESSAGE, "content": []}}
stream("no-end", "responses", "upstream_error", ADDED)
stream("no-response", "responses", "upstream_error", {"type": "response.completed"})
stream("a-failure-of-text", "responses", "upstream_error", {"type": "response.failed", "response": CANARY})
stream("a-failure-of-nothing", "responses", "upstream_error", {"type": "response.failed"})
stream("no-type", "responses", None, {"output_index": 0}, {"type": None}, {"type": ["response.completed"]}, COMPLETED)
stream("an-item-of-text", "responses", "upstream_error", {**ADDED, "item": CANARY}, COMPLETED)
stream("a-negative-item", "responses", None, {**ADDED, "output_index": -1}, COMPLETED)
stream("a-huge-item", "responses", None, {**ADDED, "output_index": 10**30}, COMPLETED)
stream("an-item-nowhere", "responses", "upstream_error", {**ADDED, "output_index": {"a": 1}}, COMPLETED)
stream(
    "a-negative-part",
    "responses",
    "upstream_error",
    ADDED,
    {"type": "response.output_text.delta", **AT, "content_index": -1, "delta": "a"},
    COMPLETED,
)
stream(
    "a-huge-part",
    "responses",
    "upstream_error",
    ADDED,
    {"type": "response.output_text.delta", **AT, "content_index": 10**30, "delta": "a"},
    COMPLETED,
)
stream(
    "arguments-of-no-call",
    "responses",
    None,
    {"type": "response.function_call_arguments.delta", "output_index": 3, "item_id": "fc_?", "delta": "{}"},
    COMPLETED,
)
stream(
    "ids-of-others",
    "responses",
    None,
    *(msgspec.json.decode(event.replace(b'"msg_up"', b'"fc_up"')) for event in RESPONSES[:5]),
    *RESPONSES[5:],
)
stream(
    "nested-deeply",
    "responses",
    "upstream_error",
    ADDED,
    b'{"type":"response.output_item.done","output_index":0,"item":{"type":"x","y":' + b"[" * 960 + b"]" * 960 + b"}}",
    COMPLETED,
)
stream(
    "numbers-beyond-measure",
    "responses",
    None,
    {"type": "response.vendor", "number": 10**40},
    {**COMPLETED, "response": {**COMPLETED["response"], "usage": {"input_tokens": 10**40, "output_tokens": -1}}},
)


@fault("json-where-a-stream-was-wanted", kinds=("chat",))
async def _json(play: Play) -> None:
    body = b'{"choices":[{"message":{"content":"a"},"finish_reason":"stop"}]}'
    await play.refuse("200 OK", "Content-Type: application/json", body=body)


@fault("json-that-drips", "upstream_timeout", begun=True, kinds=("chat",), stalls=True)
async def _json_that_drips(play: Play) -> None:
    await play.exchange.send(head("200 OK", "Content-Type: application/json", "Content-Length: 100000"))
    while True:
        await play.exchange.send(b" ")
        await asyncio.sleep(0.05)


@fault("good")
async def _good(play: Play) -> None:
    await play.good()


@dataclass
class Faulty:
    """The script of a fake upstream of one kind: plays what each request asks for, and counts them by turn."""

    kind: str
    sent: Counter[str] = field(default_factory=Counter)
    heads: list[str] = field(default_factory=list)

    async def __call__(self, exchange: Exchange) -> None:
        found = _ASKED.search(exchange.body)
        assert found, "every request of these tests says what it wants"
        name, turn = (group.decode() for group in found.groups())
        self.heads.append(exchange.head)
        repeated = self.sent[turn]
        self.sent[turn] += 1
        with suppress(ConnectionError):
            await FAULTS[name].script(Play(exchange, WIRES[self.kind], repeated))


def of_kind(kind: str) -> dict[str, Fault]:
    """The faults that an upstream of this kind can have."""
    return {name: each for name, each in FAULTS.items() if kind in each.kinds}
