"""Clients of a server that is killed, and the model server behind it: what the clients were told must hold afterwards."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager, nullcontext, suppress
from typing import Any

import aiohttp
from aiohttp import web

from openline.state.store import Store
from server.running import read_sse

WAIT_SECONDS_MAX = 20
CHAIN_TURNS_MAX = 6
WAYS = ("json", "sse", "socket", "background", "streamed background", "conversation")
OPEN = {"queued", "in_progress"}
ENDED = {f"response.{status}" for status in ("completed", "failed", "incomplete")}
Event = dict[str, Any]


def answer_to(question: str) -> str:
    """What the model says, always."""
    return f"The answer to {question} is {question[::-1]}, as everybody knows."


def texts_of(items: list[Event]) -> list[str]:
    """What each of them says."""
    return ["".join(part["text"] for part in item["content"]) for item in items]


def text_of(response: Event) -> str:
    return "".join(texts_of(response["output"]))


class ModelServer:
    """Speaks Chat Completions. It answers each question in the same way, and looks at what stands before it.

    Args:
        rng: decides how long it thinks between two words.

    Attributes:
        expected: by question, what must stand before it and itself.
        asked: how often each question came.
        misled: the questions before which something else stood.
        answered_at: by question, when its last word was sent.
        seconds_to_end: from there to the end that a client saw, of the latest turns.
    """

    def __init__(self, rng: random.Random, happened: Callable[[str], None]) -> None:
        self._rng = rng
        self._happened = happened
        self.expected: dict[str, list[str]] = {}
        self.asked: Counter[str] = Counter()
        self.misled: list[tuple[str, list[str]]] = []
        self.answered_at: dict[str, float] = {}
        self.seconds_to_end: deque[float] = deque([0.005], maxlen=50)
        self.url = ""

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        asked = [message["content"] for message in (await request.json())["messages"]]
        question = asked[-1]
        self.asked[question] += 1
        if self.expected.get(question) != asked:
            self.misled.append((question, asked))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        with suppress(ConnectionError):  # the server was killed
            await response.prepare(request)
            for word in answer_to(question).split(" "):
                await response.write(_chunk({"content": f"{word} " if word != "knows." else word}))
                self._happened("word")
                await asyncio.sleep(self._rng.choice([0, 0, 0.001, 0.004]))
            self.answered_at[question] = asyncio.get_running_loop().time()
            self._happened("answer")
            await response.write(_chunk({}, "stop") + b"data: [DONE]\n\n")
        return response


def _chunk(delta: Event, finish_reason: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 0, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


class Api:
    """One server, as its clients see it."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = f"{url}/v1"

    async def ask(self, method: str, path: str, body: Event | None = None) -> tuple[int, bytes]:
        """Any request, and its whole answer."""
        async with self._session.request(method, self._url + path, json=body) as answer:
            return answer.status, await answer.read()

    async def get(self, path: str) -> Event:
        """What must be there."""
        status, body = await self.ask("GET", path)
        assert status == 200, (path, body)
        return json.loads(body)

    async def post(self, body: Event) -> Event:
        """A create, answered as a whole; of one that is refused, its error."""
        return json.loads((await self.ask("POST", "/responses", body))[1])

    async def stream(self, body: Event) -> AsyncIterator[Event]:
        """A create, answered by its events."""
        async with self._session.post(f"{self._url}/responses", json=body | {"stream": True}) as answer:
            if answer.status != 200:
                yield {"type": "error", **await answer.json()}
                return
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    yield json.loads(line.removeprefix(b"data: "))

    def socket(self):
        """A WebSocket."""
        return self._session.ws_connect(f"{self._url}/responses", max_msg_size=0)


async def through(socket: aiohttp.ClientWebSocketResponse, body: Event) -> AsyncIterator[Event]:
    """A create over a socket, answered by its events."""
    await socket.send_json({"type": "response.create", **body})
    while True:
        message = await socket.receive()
        if message.type is not aiohttp.WSMsgType.TEXT:
            return
        yield json.loads(message.data)


@asynccontextmanager
async def api_of(url: str) -> AsyncIterator[Api]:
    timeout = aiohttp.ClientTimeout(total=WAIT_SECONDS_MAX)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Api(session, url)


class Told:
    """What clients know of responses.

    Attributes:
        completed: by id, those that were to be kept and whose end they have seen.
        unstored: how many others have ended.
        events: by id, all events of those that can be read again.
        refused: by id, or by question where the client has none, the code that their turns ended with.
        begun: by id, the question of background responses that were acknowledged, and whose end they have not seen.
        opened: by id, the question of others that had begun, and whose end they have not seen.
        sent_again: how often a create was sent again with its key and was given its response again, or ran again.
    """

    def __init__(self) -> None:
        self.completed: dict[str, Event] = {}
        self.unstored = 0
        self.events: dict[str, list[Event]] = {}
        self.refused: dict[str, str] = {}
        self.begun: dict[str, str] = {}
        self.opened: dict[str, str] = {}
        self.sent_again: Counter[str] = Counter()


class Talker:
    """One client, with one conversation that goes on over the server's lives.

    Args:
        way: how it talks.
        store: whether its responses are to be kept.
        keyed: whether its creates have idempotency keys; it sends one again whose end it has not seen.
    """

    def __init__(
        self,
        name: str,
        way: str,
        model: ModelServer,
        told: Told,
        happened: Callable[[str], None],
        *,
        store: bool = True,
        keyed: bool = False,
    ) -> None:
        self.name = name
        self.way = way
        self._model = model
        self._told = told
        self._happened = happened
        self._store = store
        self._keyed = keyed
        self._count = 0
        self.unsure: tuple[str, Event] | None = (
            None  # the question and body of a keyed create whose end it has not seen
        )
        self.said: list[str] = []  # questions and answers, as the model server must see them
        self.parent: str | None = None
        self.conversation: str | None = None
        self.leaves = False  # after its turn

    async def talk(self, api: Api) -> None:
        """Turn after turn, until the server is gone, or it leaves."""
        async with api.socket() if self.way == "socket" else nullcontext() as socket:
            while not self.leaves:
                await self.turn(api, socket)

    async def turn(self, api: Api, socket: aiohttp.ClientWebSocketResponse | None = None) -> None:
        """One turn.

        Raises:
            ConnectionError: it was cut before its end. aiohttp's errors say the same.
        """
        if self.unsure is not None:
            await self._again(api, socket, *self.unsure)
            return
        if len(self.said) >= 2 * CHAIN_TURNS_MAX:
            self.restart()
        self._count += 1
        question = f"{self.name}-{self._count}"
        if self.way == "conversation" and self.conversation is None:
            made = json.loads((await api.ask("POST", "/conversations", {}))[1])
            if "id" not in made:
                self._told.refused[question] = made["error"]["code"]
                return
            self.conversation = made["id"]
        self._model.expected[question] = [*self.said, question]
        body = self._body(question)
        self.unsure = (question, body) if self._keyed else None
        self._take(await self._send(api, socket, question, body), question)

    async def _again(
        self, api: Api, socket: aiohttp.ClientWebSocketResponse | None, question: str, body: Event
    ) -> None:
        """Send a create again: what is kept of it is given again, else it runs again, and never both."""
        status, answer = await api.ask("GET", f"/responses?idempotency_key={body['idempotency_key']}")
        kept = json.loads(answer) if status == 200 else {}
        is_kept = kept.get("status") == "completed"
        asked = self._model.asked[question]
        response = await self._send(api, socket, question, body)
        assert self._model.asked[question] == asked + (not is_kept)
        assert response == kept or not is_kept
        self._told.sent_again["given again" if is_kept else "run again"] += 1
        self._take(response, question)

    def _body(self, question: str) -> Event:
        body = {"model": "m", "input": question, "store": self._store}
        if self._keyed:
            body["idempotency_key"] = f"key-{question}"
        if self.way.endswith("background"):
            body["background"] = True
        if self.conversation is not None:
            body["conversation"] = self.conversation
        elif self.parent is not None:
            body["previous_response_id"] = self.parent
        return body

    async def _send(
        self, api: Api, socket: aiohttp.ClientWebSocketResponse | None, question: str, body: Event
    ) -> Event:
        """The final response, or its error."""
        match self.way:
            case "sse" | "streamed background":
                return await self._read(api.stream(body), question)
            case "socket":
                assert socket is not None
                return await self._read(through(socket, body), question)
            case "background":
                return await self._poll(api, await api.post(body), question)
            case _:
                return await api.post(body)

    async def _read(self, events: AsyncIterator[Event], question: str) -> Event:
        seen: list[Event] = []
        in_background = self.way == "streamed background"
        async with aclosing(events):
            async for event in events:
                seen.append(event)
                if event["type"] == "response.created":
                    (self._told.begun if in_background else self._told.opened)[event["response"]["id"]] = question
                if event["type"] == "error":
                    return event
                if event["type"] in ENDED:
                    if in_background or self._keyed:
                        self._told.events[event["response"]["id"]] = seen
                    return event["response"]
        raise ConnectionError("cut")

    async def _poll(self, api: Api, response: Event, question: str) -> Event:
        if "id" in response:
            self._told.begun[response["id"]] = question
        while response.get("status") in OPEN:
            await asyncio.sleep(0.002)
            status, body = await api.ask("GET", f"/responses/{response['id']}")
            if status != 503:  # the store cannot say
                assert status == 200, body
                response = json.loads(body)
        return response

    def _take(self, response: Event, question: str) -> None:
        self._happened("end")
        self.unsure = None
        if "id" not in response:
            self._told.refused[question] = response["error"]["code"]
            return
        response_id = response["id"]
        self._told.opened.pop(response_id, None)
        self._told.begun.pop(response_id, None)
        if response["status"] != "completed":
            self._told.refused[response_id] = response["error"]["code"]
            return
        assert text_of(response) == answer_to(question)
        if self._store:
            self._told.completed[response_id] = response
        else:
            self._told.unstored += 1
        if self._store or self.way == "socket":
            self.parent = response_id
            self.said += [question, answer_to(question)]
        asked_at = self._model.answered_at[question]
        self._model.seconds_to_end.append(asyncio.get_running_loop().time() - asked_at)

    def restart(self) -> None:
        """Begin a new conversation."""
        self.said, self.parent, self.conversation = [], None, None

    async def resume(self, api: Api) -> None:
        """After a kill: a conversation holds the turn whose end was not seen, or nothing of it."""
        if self.conversation is None:
            return
        items = (await api.get(f"/conversations/{self.conversation}/items?order=asc&limit=100"))["data"]
        unseen = f"{self.name}-{self._count}"
        assert texts_of(items) in (self.said, [*self.said, unseen, answer_to(unseen)])
        if self.unsure is None:
            self.said = texts_of(items)


# --- What must hold


async def check_completed(api: Api, told: Told, ids: Iterable[str]) -> None:
    """Every response that a client has seen whole is there as it was, and its events, if they are kept."""
    for response_id in ids:
        assert await api.get(f"/responses/{response_id}") == told.completed[response_id]
        if response_id in told.events:
            status, body = await api.ask("GET", f"/responses/{response_id}?stream=true")
            assert status == 200, body
            assert read_sse(body) == told.events[response_id]


async def check_unseen(api: Api, response_id: str, question: str) -> str:
    """A response whose end nobody has seen: it is there as a whole, or not at all, or still open; its status, or `gone`."""
    status, body = await api.ask("GET", f"/responses/{response_id}")
    if status == 404:
        return "gone"
    assert status == 200, body
    response = json.loads(body)
    if response["status"] == "completed":
        assert text_of(response) == answer_to(question)
        assert texts_of((await api.get(f"/responses/{response_id}/input_items"))["data"]) == [question]
    elif response["status"] == "failed":
        assert response["error"]["code"] in {"server_error", "store_unavailable"}
    else:
        assert response["status"] in OPEN
    return response["status"]


async def check_refused(api: Api, told: Told, seconds_max: float) -> None:
    """What was told as failed is not there, or has failed there too, in the end."""
    refused = [response_id for response_id in told.refused if response_id.startswith("resp_")]
    async with asyncio.timeout(seconds_max):
        for response_id in refused:
            while (fate := await check_unseen(api, response_id, "")) in OPEN:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            assert fate in {"gone", "failed"}


async def check_rows(store: Store, told: Told) -> int:
    """The whole store: every row is whole, none is open, and every completed response is there; how many rows."""
    rows = {turn.response_id: turn async for _, turn in store.export()}
    completed = Counter(turn.input for turn in rows.values() if turn.status == "completed")
    assert set(completed.values()) <= {1}, "a question has two answers"
    for turn in rows.values():
        response = json.loads(turn.response)
        assert (turn.status, turn.lease_until) == (response["status"], None)
        if turn.status == "completed":
            assert text_of(response) in map(answer_to, texts_of(json.loads(turn.input)))
            if response.get("conversation"):
                assert await store.item("local", response["conversation"]["id"], response["output"][0]["id"])
        else:
            assert (turn.status, response["background"], turn.chainable) == ("failed", True, False)
        assert turn.parent_id is None or rows[turn.parent_id].status == "completed"
    for response_id, response in told.completed.items():
        assert json.loads(rows[response_id].response) == response
    return len(rows)
