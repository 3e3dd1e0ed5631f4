"""A conversation over one socket or HTTP, whichever fits, that survives a bad network."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from openline.client.aiohttp_dial import AiohttpDial
from openline.client.connections import Connections, Over
from openline.client.create import Create, checked
from openline.client.errors import OpenlineError
from openline.client.history import History, Input, Past, encode_items
from openline.client.settings import ClientSettings, OnLost, Transport
from openline.client.stream import ResponseStream
from openline.client.turn import Turn
from openline.client.wire import Dial, Response

_UNGIVEN: Final = object()
_KEY: Final = re.compile(r"[!-~](?:[ -~]{0,253}[!-~])?\Z")  # what a header can hold, and gives back as it was


def connect(
    base_url: str,
    *,
    api_key: str | None = None,
    model: str | None = None,
    transport: Transport = "auto",
    session_id: str | None = None,
    history: History | None = None,
    settings: ClientSettings | None = None,
    headers: Mapping[str, str] | None = None,
    dial: Dial | None = None,
    chance: random.Random | None = None,
) -> Session:
    """A session with a Responses server: Openline, OpenAI, xAI, Azure or any other. Nothing is sent yet.

    ```python
    async with openline.connect("http://127.0.0.1:8484/v1", model="qwen3-coder") as session:
        async for event in session.create(input="Hello."):
            ...
    ```

    Args:
        base_url: the API's root; with most servers it ends in `/v1`.
        api_key: goes out as a bearer token; None sends none.
        model: of creates that name none.
        settings: what it bounds.
        transport: `auto` takes HTTP for a first create without tools and a socket from then on, and HTTP where a socket is
            refused; `websocket` and `http` force one.
        session_id: a name for the conversation; a random one unless given.
        history: what was said before, to go on with.
        headers: more headers for every request, such as `OpenAI-Organization`.
        dial: reaches the server; the network's own unless a test brings another.
        chance: makes ids and the jitter of waits.

    Raises:
        ValueError: `base_url` or a setting is not what was expected.
        ConfigError: the CA bundle, or the proxy that the environment names, cannot be used.
    """
    settings = settings or ClientSettings()
    chance = chance or random.SystemRandom()
    sent = {name.lower(): value for name, value in (headers or {}).items()}
    if api_key is not None:
        sent["authorization"] = f"Bearer {api_key}"
    connections = Connections(dial or AiohttpDial(base_url, settings), sent, transport, settings)
    return Session(
        connections,
        session_id=session_id or f"sess_{chance.getrandbits(128):032x}",
        model=model,
        history=history if history is not None else History(bytes_max=settings.history_bytes_max),
        settings=settings,
        chance=chance,
    )


class Session:
    """One conversation; `connect` makes it.

    It takes its turns one after another. What was said is in `history`; as long as the server remembers it too, a create
    sends only what is new.

    Attributes:
        id: the conversation's name here.
        history: what a full resend needs.
        model: of creates that name none.
    """

    def __init__(
        self,
        connections: Connections,
        *,
        session_id: str,
        model: str | None,
        history: History,
        settings: ClientSettings,
        chance: random.Random,
    ) -> None:
        self.id = session_id
        self.history = history
        self._connections = connections
        self.model = model
        self.settings = settings
        self._chance = chance
        self._running: ResponseStream | None = None
        self._is_closed = False
        self._has_run = False
        self._store_forgets = False  # a stored response was lost: from then on what is not held goes out again

    def __repr__(self) -> str:
        return f"<Session {self.id} {self._connections!r} {self.history!r}>"

    @property
    def transport(self) -> Over:
        """What the next create would use, if it had no tools."""
        return self._connections.over(loops=self._loops)

    @property
    def has_extensions(self) -> bool | None:
        """Whether the server knows idempotency keys and resuming; None until it has answered once."""
        return self._connections.has_extensions

    def create(
        self,
        *,
        input: Input,  # noqa: A002 - the wire's name
        tools: list[Any] | None = None,
        idempotency_key: str | None = None,
        resume: bool = False,
        on_lost: OnLost | None = None,
        past: Past | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> ResponseStream:
        """A turn. Nothing is sent before its first event, or its response, is asked for.

        Args:
            input: a text, or items as dicts or as the SDK's objects: what is new, tool outputs for instance.
            tools: as the wire has them; like `instructions` and all other settings they are the create's, not the session's.
            idempotency_key: 1 to 255 printable characters; a random one unless given.
            resume: the key may be that of a turn which was sent before, by another process perhaps: take that up where the
                server has it, with all its events, and send the create only where it has not.
            on_lost: as in the settings, for this turn.
            past: what the turn goes on from, for a caller that keeps conversations itself; `history` is left alone then.
            extra_body: more fields of the create, whatever their names: those that a server knows beyond the API, and those that
                were chosen elsewhere and could be taken for arguments of this call.
            fields: every other field of a create; None leaves it out. `previous_response_id` begins a conversation anew,
                behind that response, or, as None, behind nothing.

        Raises:
            OpenlineError: a field cannot be used here, an item is none, or the session is closed.

        Source: Responses API reference, "Create a response".
        """
        if self._is_closed:
            raise OpenlineError("The session is closed: connect another.")
        previous: object = fields.pop("previous_response_id", _UNGIVEN)
        asked = encode_items(input)
        sent = checked({"model": self.model, **fields, "tools": tools, **(extra_body or {})})
        history = self._history_for(previous, past, in_conversation="conversation" in sent)
        key = f"key_{self._chance.getrandbits(128):032x}" if idempotency_key is None else idempotency_key
        if not _KEY.match(key):
            expected = "1 to 255 printable characters of ASCII, without a blank at either end"
            raise OpenlineError(f"idempotency_key: expected {expected}.")
        # A history that holds nothing yet is false, and still the one to go on from.
        goes_on_from = next(each for each in (past, history, History()) if each is not None)
        loops = (
            self._loops
            or goes_on_from.response_id is not None
            or bool(sent.get("tools"))
            or sent.get("generate") is False
        )
        create = Create(sent, asked, goes_on_from, key, resume, on_lost or self.settings.on_lost, loops)

        turn = Turn(create, self._connections, self.settings, self._chance)
        end = partial(self._ended, history, create, turn)
        return ResponseStream(turn, idempotency_key=key, settings=self.settings, begin=self._begin, end=end)

    async def close(self) -> None:
        """Cancel what runs, and close every connection."""
        self._is_closed = True
        if self._running is not None:
            await self._running.aclose()
        await self._connections.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    @property
    def _loops(self) -> bool:
        """Whether the next turn is not the first."""
        return self._has_run or not self.history.is_empty

    async def _begin(self, stream: ResponseStream) -> None:
        if self._running is not None and not self._running.is_leaving:
            # A loop that was left by `break` closes its iterator in a task of its own, which asyncio has only just made.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        running = self._running
        if running is not None and running.is_leaving:
            await running.aclose()
        if self._is_closed:
            raise OpenlineError("The session is closed: connect another.")
        if self._running is not None:
            raise OpenlineError(
                f"A session takes its turns one after another, and {self._running!r} still runs: "
                "read it to its end, or call its response() or cancel()."
            )
        self._running = stream

    def _ended(
        self, history: History | None, create: Create, turn: Turn, stream: ResponseStream, response: Response | None
    ) -> None:
        """A stream has ended; with a response if that belongs to the conversation."""
        if self._running is stream:
            self._running = None
            self._has_run = True
        self._store_forgets = self._store_forgets or turn.lost_parent
        if history is not None and response is not None:
            is_stored = create.is_stored and response.get("store") is not False and not self._store_forgets
            is_stored = is_stored and not turn.reading.is_closed_here
            history.add(map(msgspec.Raw, create.asked), response, is_stored=is_stored)
            self.history = history

    def _history_for(self, previous: object, past: Past | None, *, in_conversation: bool) -> History | None:
        """What the turn's end is added to; None for a conversation that is kept elsewhere."""
        if past is not None or in_conversation:
            return None
        if previous is _UNGIVEN:
            return self.history
        if previous is not None and not isinstance(previous, str):
            raise OpenlineError("previous_response_id: expected a response's id, or None.")
        if previous is not None and previous == self.history.response_id:
            return self.history
        history = History(bytes_max=self.settings.history_bytes_max)
        history.restart(previous)
        return history
