"""An agent's tool loop over either transport, with what each turn cost the client, and both side by side.

Over HTTP every turn resends the whole conversation; over WebSocket it sends what is new
and `previous_response_id`. Nothing is stored by the server: all else is the same.

Source: WebSocket mode guide, "response.create"; Responses API reference, "Create a response".
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from time import perf_counter
from typing import Any, Final, Protocol

import msgspec
from aiohttp import ClientError, ClientSession, ClientWebSocketResponse, WSMsgType

from openline.protocol import sse
from openline.protocol.events import TIMINGS

TURN_SECONDS_MAX: Final = 600.0  # a long prompt on a small machine prefills for minutes
EVENT_BYTES_MAX: Final = 64 * 1024 * 1024

Item = dict[str, Any]
Answer = Callable[[str, str], str]  # runs a tool, from its name and its arguments as the model wrote them


class Question(msgspec.Struct, frozen=True):
    """What the agent is asked.

    Attributes:
        tools: as the wire has them.
        turns_max: the loop ends after so many, whether or not the model has answered.
    """

    model: str
    instructions: str
    task: str
    tools: list[dict[str, Any]]
    turns_max: int


class Engine(msgspec.Struct, frozen=True):
    """What the engine behind the server did in a turn, in its own words.

    Attributes:
        prefill_seconds: in which it read what was not cached of the prompt; None if it does not tell.
        generation_seconds: in which it generated; None likewise.
    """

    prompt_tokens: int
    cached_tokens: int
    prefill_seconds: float | None
    generation_seconds: float | None

    @property
    def seconds(self) -> float:
        """Both together; 0 if it does not tell."""
        return (self.prefill_seconds or 0) + (self.generation_seconds or 0)


class Turn(msgspec.Struct, frozen=True):
    """One turn: what it cost, and what the model said.

    Attributes:
        seconds: from before the request is encoded until the terminal event is read; the tools' own time is not in it.
        first_event_seconds: the same until the first event.
        sent_bytes: of JSON, without the headers of HTTP requests and of WebSocket frames.
        received_bytes: of events, with SSE's own lines, without such headers.
    """

    seconds: float
    first_event_seconds: float
    sent_bytes: int
    received_bytes: int
    response: dict[str, Any]

    @property
    def calls(self) -> list[Item]:
        """The tool calls that wait for an output."""
        return [item for item in self.response["output"] if item["type"] == "function_call"]

    @property
    def engine(self) -> Engine:
        """What the engine says it did."""
        usage: dict[str, Any] = self.response.get("usage") or {}
        timings: dict[str, float] = usage.get("openline_timings") or {}
        details: dict[str, int] = usage.get("input_tokens_details") or {}
        return Engine(
            usage.get("input_tokens", 0),
            details.get("cached_tokens", 0),
            timings["prompt_ms"] / 1000 if timings else None,
            timings["predicted_ms"] / 1000 if timings else None,
        )


class Run(msgspec.Struct, frozen=True):
    """One transport's whole loop.

    Attributes:
        turns: in order, the unmeasured one left out.
    """

    name: str
    turns: Sequence[Turn]


class TurnFailed(Exception):  # noqa: N818 - what happened to the turn
    """A turn that has no answer.

    Attributes:
        code: the wire's, or `connection_lost` or `timeout` where the server said nothing.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Event(msgspec.Struct, frozen=True):
    """What the loop reads of an event."""

    type: str = ""
    response: dict[str, Any] | None = None
    error: dict[str, Any] | None = None

    @property
    def is_last(self) -> bool:
        """Whether its turn ends with it."""
        return self.type in {"response.completed", "response.incomplete", "response.failed", "error"}


class Received(msgspec.Struct, frozen=True):
    """One read from the connection: how many bytes it was, and the events that it completed."""

    size: int
    events: list[Event]


_encoder: Final = msgspec.json.Encoder()
_event: Final = msgspec.json.Decoder(Event)


class Transport(Protocol):
    """How turns travel."""

    @property
    def resends(self) -> bool:
        """Whether each turn carries the whole conversation."""
        ...

    def exchange(self, body: bytes) -> AsyncGenerator[Received, None]:
        """Send one create and give what comes back, until the turn's last event.

        Raises:
            TurnFailed: it was refused, or the connection is lost.
        """
        ...


class HttpTransport:
    """`POST` with server-sent events; the session keeps the connection alive between turns."""

    resends = True

    def __init__(self, session: ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def exchange(self, body: bytes) -> AsyncGenerator[Received, None]:
        """As `Transport`."""
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        async with self._session.post(self._url, data=body, headers=headers) as answer:
            if answer.status != 200:
                raise _failure(await answer.read(), f"http_{answer.status}")
            decoder = sse.Decoder(EVENT_BYTES_MAX)
            # To the very end, and not only to the last event: else the connection could not be used again.
            async for chunk in answer.content.iter_any():
                data = [data for data in decoder.feed(chunk) if data != sse.DONE_DATA]
                yield Received(len(chunk), [_event.decode(event) for event in data])


class SocketTransport:
    """One WebSocket; the server remembers the conversation as long as it is open."""

    resends = False

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self._socket = socket

    async def exchange(self, body: bytes) -> AsyncGenerator[Received, None]:
        """As `Transport`."""
        await self._socket.send_str(body.decode())
        ended = False
        while not ended:
            message = await self._socket.receive()
            if message.type is not WSMsgType.TEXT:
                raise TurnFailed("connection_lost", f"the server closed the socket, code {self._socket.close_code}.")
            text = str(message.data).encode()
            event = _event.decode(text)
            yield Received(len(text), [event])
            ended = event.is_last


async def compare(
    session: ClientSession,
    url: str,
    question: Question,
    tools: Callable[[str], Answer],
    *,
    warm_up_turns: int,
    on_turn: Callable[[str, Turn], None],
) -> tuple[Run, Run]:
    """Run the loop over HTTP and over WebSocket, turn by turn in alternation: neither has the warmer machine.

    Args:
        session: without a timeout of its own.
        url: where creates go, over both.
        tools: makes the tools of the loop of that name.
        warm_up_turns: are taken over each connection first, and not counted.
        on_turn: is told of each counted turn, by the loop's name.

    Raises:
        TurnFailed: as `agent_loop`.
        ClientError: the WebSocket cannot be opened.
    """
    async with session.ws_connect(url, max_msg_size=EVENT_BYTES_MAX) as socket:
        transports: dict[str, Transport] = {"HTTP": HttpTransport(session, url), "WebSocket": SocketTransport(socket)}
        for transport in transports.values():
            await _warm_up(transport, question, warm_up_turns)
        loops = {
            name: agent_loop(transport, _unlike_the_other(question), tools(name))
            for name, transport in transports.items()
        }
        turns: dict[str, list[Turn]] = {name: [] for name in loops}
        running = list(loops)
        while running:
            for name in tuple(running):
                turn = await anext(loops[name], None)
                if turn is None:
                    running.remove(name)
                else:
                    turns[name].append(turn)
                    on_turn(name, turn)
            running.reverse()  # who went last goes first
    over_http, over_socket = (Run(name, taken) for name, taken in turns.items())
    return over_http, over_socket


async def _warm_up(transport: Transport, question: Question, turns: int) -> None:
    """Let both sides open and load what they open and load once."""
    async for _ in agent_loop(transport, msgspec.structs.replace(question, turns_max=turns), _say_nothing):
        pass


def _say_nothing(_name: str, _arguments: str) -> str:
    return ""


def _unlike_the_other(question: Question) -> Question:
    """The same question, begun in another way: else one loop would find its prompts in the model's prefix cache."""
    return msgspec.structs.replace(question, instructions=f"Session {secrets.token_hex(4)}. {question.instructions}")


async def agent_loop(transport: Transport, question: Question, answer: Answer) -> AsyncGenerator[Turn, None]:
    """Ask, run the tools that the model calls, send their outputs, until it calls none.

    Args:
        transport: ready to send.
        question: the same for both transports, if they are to be compared.
        answer: must not raise.

    Raises:
        TurnFailed: a turn was refused or failed, or the connection is lost.
    """
    new: list[Item] = [{"type": "message", "role": "user", "content": question.task}]
    history = new
    previous: str | None = None
    for _ in range(question.turns_max):
        create = _create(question, history if transport.resends else new)
        if transport.resends:
            create["stream"] = True
        else:
            create |= {"type": "response.create", "previous_response_id": previous}
        turn = await _take_turn(transport, create)
        yield turn
        if not turn.calls:
            return
        new = [_output(call, answer(call["name"], call["arguments"])) for call in turn.calls]
        history = [*history, *turn.response["output"], *new]
        previous = turn.response["id"]


def _create(question: Question, items: list[Item]) -> dict[str, Any]:
    # Instructions and tools are not inherited from the previous response: both transports send them in every turn.
    return {
        "model": question.model,
        "instructions": question.instructions,
        "input": items,
        "tools": question.tools,
        "parallel_tool_calls": False,
        "store": False,
        "include": [TIMINGS],  # a server that does not know it tells no times
    }


def _output(call: Item, output: str) -> Item:
    return {"type": "function_call_output", "call_id": call["call_id"], "output": output}


async def _take_turn(transport: Transport, create: dict[str, Any]) -> Turn:
    started = perf_counter()
    body = _encoder.encode(create)
    first_event, received, ended = 0.0, 0, None
    try:
        async with asyncio.timeout(TURN_SECONDS_MAX), aclosing(transport.exchange(body)) as exchange:
            async for part in exchange:
                received += part.size
                now = perf_counter() - started
                for event in part.events:
                    first_event = first_event or now
                    if event.is_last:
                        ended = (event, now)
    except TimeoutError:
        raise TurnFailed("timeout", f"no answer within {TURN_SECONDS_MAX:.0f} seconds.") from None
    except (ClientError, OSError) as error:
        raise TurnFailed("connection_lost", str(error) or type(error).__name__) from None
    if ended is None:
        raise TurnFailed("connection_lost", "the events ended before the turn did.")
    event, seconds = ended
    return Turn(seconds, first_event, len(body), received, _response_of(event))


def _response_of(event: Event) -> dict[str, Any]:
    if event.type in {"response.completed", "response.incomplete"} and event.response is not None:
        return event.response
    error = event.error if event.response is None else event.response.get("error")
    raise _failed(error, event.type)


def _failure(body: bytes, otherwise: str) -> TurnFailed:
    try:
        return _failed(_event.decode(body).error, otherwise)
    except msgspec.DecodeError:
        return TurnFailed(otherwise, "the answer is not of the Responses API.")


def _failed(error: dict[str, Any] | None, otherwise: str) -> TurnFailed:
    error = error or {}
    return TurnFailed(error.get("code") or error.get("type") or otherwise, error.get("message") or "no reason given.")
