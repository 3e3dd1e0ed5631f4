"""Two owners of one server, in this process, who do whatever can be done with each other's ids.

The app is the real one, with its registry, memory and a SQLite store; a socket is two queues, and the engine says whose secrets
it was given to read.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec

from openline.config import UpstreamSettings
from openline.engines.engine import EngineRequest, Model
from openline.engines.router import Router, Upstream
from openline.protocol.deltas import CallDelta, CallStarted, Delta, Ended, TextDelta, Usage
from openline.protocol.states import TERMINAL_EVENTS
from openline.server.runner import build
from openline.state.store import Store
from server.running import WAIT_SECONDS_MAX, make_config, read_sse

OWNERS = ("ann", "ben")
SECRETS = {owner: f"secret-of-{owner}" for owner in OWNERS}
KNOWN_MAX = 30  # of a kind, by each owner; older ones are forgotten here, and stay there
RUNNING_MAX = 10
_ID = re.compile(rb"(?:resp|conv|msg|fc|cmp)_[0-9a-f]{48}(?:i?[0-9a-f]{4})?|call_[0-9a-f]{48}")
_RANDOM = re.compile("[0-9a-f]{48}")
_SECRET = re.compile(rb"secret-of-\w+")
_ENDS = TERMINAL_EVENTS | {"error", "response.steer.failed"}


def new_id(prefix: str) -> str:
    """An id as the server makes them; nobody was given it."""
    return f"{prefix}_{secrets.token_hex(24)}"


def strange(named: str) -> str:
    """An id, or a sealed text, of the same form that nobody was given."""
    return _RANDOM.sub(lambda _: secrets.token_hex(24), named) if _RANDOM.search(named) else named[:-8] + "AAAAAAAA"


# --- What is named, and how -----------------------------------------------------------------------


class Naming(NamedTuple):
    """A request that names something by its id, wherever `ID` stands in it; `socket` is a frame.

    Attributes:
        kind: of what is named.
        must_find: whether its owner is answered 200 as long as it is there.
    """

    kind: str
    method: str
    path: str = ""
    body: Any = None
    must_find: bool = False


def _create(**fields: Any) -> dict[str, Any]:
    return {"model": "plain", "input": "SECRET", **fields}


def _creates(kind: str, **fields: Any) -> list[Naming]:
    """Every way in which a create can name it."""
    more = ({}, {"stream": True}, {"background": True}, {"store": False})
    return [
        *(Naming(kind, "POST", "/v1/responses", _create(**fields, **each)) for each in more),
        Naming(kind, "POST", "/v1/responses/compact", _create(**fields)),
        Naming(kind, "POST", "/v1/responses/input_tokens", _create(**fields)),
        Naming(kind, "socket", body={"type": "response.create", **_create(**fields)}),
    ]


def _input(*items: Mapping[str, Any]) -> list[Any]:
    return [*items, {"role": "user", "content": "SECRET"}]


NAMINGS = (
    Naming("response", "GET", "/v1/responses/ID", must_find=True),
    Naming("response", "GET", "/v1/responses/ID?include[]=reasoning.encrypted_content", must_find=True),
    Naming("response", "GET", "/v1/responses/ID?stream=true"),
    Naming("response", "GET", "/v1/responses/ID?stream=true&starting_after=1"),
    Naming("response", "GET", "/v1/responses/ID/input_items", must_find=True),
    Naming("response", "POST", "/v1/responses/ID/cancel"),
    Naming("response", "DELETE", "/v1/responses/ID", must_find=True),
    *_creates("response", previous_response_id="ID"),
    Naming("response", "socket", body={"type": "response.steer", "previous_response_id": "ID", "input": "SECRET"}),
    Naming("conversation", "GET", "/v1/conversations/ID", must_find=True),
    Naming("conversation", "GET", "/v1/conversations/ID/items?limit=100", must_find=True),
    Naming("conversation", "POST", "/v1/conversations/ID", {"metadata": {"note": "SECRET"}}, must_find=True),
    Naming("conversation", "POST", "/v1/conversations/ID/items", {"items": _input()}, must_find=True),
    Naming("conversation", "DELETE", "/v1/conversations/ID", must_find=True),
    *_creates("conversation", conversation="ID"),
    Naming("conversation item", "GET", "/v1/conversations/IN/items/ID", must_find=True),
    Naming("conversation item", "GET", "/v1/conversations/IN/items?after=ID", must_find=True),
    Naming("conversation item", "DELETE", "/v1/conversations/IN/items/ID", must_find=True),
    *_creates("item", input=_input({"type": "item_reference", "id": "ID"})),
    *_creates("call", input=[{"type": "function_call_output", "call_id": "ID", "output": "SECRET"}]),
    *_creates("summary", input=_input({"type": "compaction", "encrypted_content": "ID"})),
    Naming("key", "GET", "/v1/responses?idempotency_key=ID", must_find=True),
    Naming("key", "POST", "/v1/responses", _create(idempotency_key="ID", starting_after=0), must_find=True),
    Naming("key", "socket", body={"type": "response.create", **_create(idempotency_key="ID", starting_after=0)}),
)
_KINDS = ("response", "conversation", "item", "call", "summary", "key")


# --- The server and its clients -------------------------------------------------------------------


class Witness:
    """The engine: it says whose secrets it was given. Model `calls` calls a tool, `waits` does not end by itself."""

    name = "witness"

    def prepare(self, request: EngineRequest) -> Testimony:
        return Testimony(request)

    async def count_tokens(self, request: EngineRequest) -> int:
        return len({secret for item in request.context.items() for secret in _SECRET.findall(item.raw)})

    async def models(self) -> Sequence[Model]:
        return []

    async def close(self) -> None:
        """Nothing is held."""


class Testimony:
    dropped_tools: Sequence[str] = ()
    prefills = False

    def __init__(self, request: EngineRequest) -> None:
        self._request = request

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        read = {secret for item in self._request.context.items() for secret in _SECRET.findall(item.raw)}
        yield [TextDelta(b" ".join(sorted(read)).decode())]
        if self._request.model == "waits":
            await asyncio.Event().wait()
        if self._request.model == "calls":
            yield [CallStarted("function_call", new_id("call"), "f"), CallDelta("{}")]
        yield [Usage(), Ended()]


class Quiet:
    def turn_ended(self, details: object) -> None:
        """Nobody listens."""


class Said(NamedTuple):
    """A whole answer, without the id of its request."""

    status: int
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes

    @property
    def json(self) -> Any:
        return msgspec.json.decode(self.body)

    def without(self, named: str) -> Said:
        """The same for any other id of this length."""
        return self._replace(body=self.body.replace(named.encode(), b"ID"))


class Client:
    """One owner's, with a socket that stays open."""

    def __init__(self, app: Any, owner: str) -> None:
        self._app = app
        self._headers = [(b"host", b"localhost"), (b"authorization", f"Bearer {owner}".encode())]
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._frames: asyncio.Queue[bytes] = asyncio.Queue()
        self._inbox.put_nowait({"type": "websocket.connect"})
        scope = {"type": "websocket", "path": "/v1/responses", "headers": self._headers}
        self.serving = asyncio.ensure_future(app(scope, self._inbox.get, self._take))

    async def _take(self, message: dict[str, Any]) -> None:
        for event in message.get("events", ()):
            self._frames.put_nowait(event)

    async def close(self) -> None:
        self._inbox.put_nowait({"type": "websocket.disconnect", "code": 1000})
        await self.serving

    async def ask(self, method: str, target: str, body: bytes = b"") -> Said:
        """One request; on the `socket` its answer is every frame up to an end."""
        if method == "socket":
            self._inbox.put_nowait({"type": "websocket.receive", "text": body.decode()})
            async with asyncio.timeout(WAIT_SECONDS_MAX):
                frames = [await self._frames.get()]
                while msgspec.json.decode(frames[-1])["type"] not in _ENDS:
                    frames.append(await self._frames.get())
            last = msgspec.json.decode(frames[-1])
            return Said(last.get("status", 200), (), b"\n".join(frames))
        path, _, query = target.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": unquote(path),
            "query_string": query.encode(),
            "headers": [*self._headers, (b"content-length", b"%d" % len(body))],
            "root_path": "",
        }
        incoming: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        incoming.put_nowait({"type": "http.request", "body": body})
        outgoing: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            outgoing.append(message)

        async with asyncio.timeout(WAIT_SECONDS_MAX):
            await self._app(scope, incoming.get, send)
        start, *bodies = outgoing
        headers = tuple((name, value) for name, value in start["headers"] if name != b"x-request-id")
        return Said(start["status"], headers, b"".join(each.get("body", b"") for each in bodies))


@dataclass
class Owned:
    """What an owner has made and knows by id."""

    client: Client
    things: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in _KINDS})
    ids: set[bytes] = field(default_factory=set)  # all that it was ever told
    running: list[str] = field(default_factory=list)
    items: dict[str, list[str]] = field(default_factory=dict)  # of its conversations
    keys: set[str] = field(default_factory=set)  # all that it ever used

    def learn(self, kind: str, thing: str) -> None:
        things = self.things[kind]
        things.append(thing)
        if len(things) > KNOWN_MAX:
            del things[0]


class World:
    """A server and its two owners, who act by the dice."""

    def __init__(self, store: Store, random: Random) -> None:
        config = make_config(
            Path("unused"),
            store_url="sqlite::memory:",
            keys={owner: owner for owner in OWNERS},
            resume={"seconds": 1e6},
        )
        router = Router([Upstream(UpstreamSettings(kind="scripted"), Witness())])
        self.app, self.registry = build(config, router, store, Quiet())
        self.owned = {owner: Owned(Client(self.app, owner)) for owner in OWNERS}
        self.strange = 0  # how often something of another owner's was named
        self._random = random
        self._unknown: dict[tuple[str, int, int], Said] = {}

    async def close(self) -> None:
        for owned in self.owned.values():
            await owned.client.close()
        await self.registry.close()

    async def step(self) -> None:
        """One owner does one thing."""
        owner = self._random.choice(OWNERS)
        if self._random.random() < 0.3:
            await self._make(owner)
            return
        number = self._random.randrange(len(NAMINGS))
        if self._random.random() < 0.6:
            await self._name_anothers(owner, number)
        else:
            await self._name_own(owner, number)

    # --- Making -----------------------------------------------------------------------------------

    async def _make(self, owner: str) -> None:
        owned = self.owned[owner]
        made = self._random.randrange(9)
        if made == 0:
            said = await self._ask(owner, "POST", "/v1/conversations", {"items": _input()})
            conversation_id = said.json["id"]
            owned.learn("conversation", conversation_id)
            await self._look_at_items(owner, conversation_id)
        elif made == 1 and len(owned.running) < RUNNING_MAX:
            fields = {"model": "waits", "background": True, "store": self._random.random() < 0.5}
            said = await self._ask(owner, "POST", "/v1/responses", _create(**fields))
            owned.running.append(said.json["id"])
        elif made == 2:
            trigger = {"type": "compaction_trigger"}
            said = await self._ask(owner, "POST", "/v1/responses", _create(input=_input(trigger)))
            owned.learn("summary", said.json["output"][0]["encrypted_content"])
        elif made == 3:  # its events can be read again
            said = await self._ask(owner, "POST", "/v1/responses", _create(background=True, stream=True))
            self._learn_response(owner, read_sse(said.body)[-1]["response"])
        elif made == 4:
            await self._use_key(owner)
        else:
            model = self._random.choice(["plain", "plain", "calls"])
            how = self._random.choice(["POST", "socket"])
            body = {"type": "response.create"} if how == "socket" else {}
            said = await self._ask(owner, how, "/v1/responses", {**body, **_create(model=model)})
            last = msgspec.json.decode(said.body.splitlines()[-1])
            self._learn_response(owner, last["response"] if how == "socket" else last)

    async def _use_key(self, owner: str) -> None:
        """A key is its owner's: one that the other has used stands for a new turn here."""
        owned, (other,) = self.owned[owner], set(OWNERS) - {owner}
        theirs, _ = self._thing(other, "key")
        key = theirs if theirs and self._random.random() < 0.5 else new_id("key")
        said = await self._ask(owner, "POST", "/v1/responses", _create(idempotency_key="ID"), key)
        assert said.status == 200, said
        owned.keys.add(key)
        owned.learn("key", key)

    def _learn_response(self, owner: str, response: dict[str, Any]) -> None:
        owned = self.owned[owner]
        owned.learn("response", response["id"])
        for item in response["output"]:
            owned.learn("item", item["id"])
            if item["type"] == "function_call":
                owned.learn("call", item["call_id"])

    async def _look_at_items(self, owner: str, conversation_id: str) -> None:
        said = await self._ask(owner, "GET", f"/v1/conversations/{conversation_id}/items?limit=100&order=asc")
        self.owned[owner].items[conversation_id] = [item["id"] for item in said.json["data"]]

    # --- Naming -----------------------------------------------------------------------------------

    async def _name_anothers(self, owner: str, number: int) -> None:
        """What another owner made is what nobody made, and stays as it is."""
        naming = NAMINGS[number]
        (other,) = set(OWNERS) - {owner}
        theirs, within = self._thing(other, naming.kind)
        if theirs is None or theirs in self.owned[owner].keys:
            return
        if within is not None and self._random.random() < 0.5 and self.owned[owner].items:
            within = self._random.choice(list(self.owned[owner].items))  # in a conversation of its own
        said = await self._named(owner, naming, theirs, within)
        expected = await self._expected(owner, number, theirs, within)
        if naming.path.endswith("?after=ID") and within in self.owned[owner].items:
            assert (said.status, said.json["error"]["param"]) == (400, "after"), (naming, said)
        else:
            assert said.without(theirs).without(within or theirs) == expected, (naming, said, expected)
            assert expected.status in {400, 404, 409} or b'"code":"response_not_found"' in expected.body, (
                naming,
                expected,
            )
        self.strange += 1

    async def _expected(self, owner: str, number: int, theirs: str, within: str | None) -> Said:
        """What is said of an id of that form that nobody was given; asked again now and then."""
        key = (owner, number, len(theirs))
        if key not in self._unknown or self._random.random() < 0.01:
            unknown, unknown_within = strange(theirs), strange(within) if within else None
            said = await self._named(owner, NAMINGS[number], unknown, unknown_within)
            self._unknown[key] = said.without(unknown).without(unknown_within or unknown)
        return self._unknown[key]

    async def _name_own(self, owner: str, number: int) -> None:
        """What an owner made it finds, whatever the other one did."""
        naming = NAMINGS[number]
        owned = self.owned[owner]
        own, within = self._thing(owner, naming.kind)
        if own is None or (own in owned.running and "stream" in naming.path):
            return
        said = await self._named(owner, naming, own, within)
        if naming.must_find:
            assert said.status == 200, (naming, said)
        if naming.kind == "response":
            if own in owned.running and naming.method == "GET" and "input_items" not in naming.path:
                assert said.json["status"] in {"queued", "in_progress"}, said
            if naming.path.endswith("/cancel") and own in owned.running:
                owned.running.remove(own)
                assert said.json["status"] == "cancelled", said
                owned.learn("response", own)
            elif naming.method == "DELETE":
                for known in (owned.things["response"], owned.running):
                    if own in known:
                        known.remove(own)
        if naming.kind.startswith("conversation"):
            await self._look_again(owner, naming, own, within or own)

    async def _look_again(self, owner: str, naming: Naming, own: str, conversation_id: str) -> None:
        """A conversation has what its owner left in it, and what it has just added."""
        owned = self.owned[owner]
        if naming.path.endswith("ations/ID") and naming.method == "DELETE":
            owned.things["conversation"].remove(own)
            del owned.items[own]
            return
        before = [each for each in owned.items[conversation_id] if naming.method != "DELETE" or each != own]
        for turn in list(self.registry._turns.values()):
            if turn.request.create.model != "waits":  # one in the background adds to it at its end
                await asyncio.wait({turn.task})
        await self._look_at_items(owner, conversation_id)
        assert owned.items[conversation_id][: len(before)] == before[:100], naming

    def _thing(self, owner: str, kind: str) -> tuple[str | None, str | None]:
        """Something of an owner's, and the conversation that it stands in."""
        owned = self.owned[owner]
        if kind == "response" and owned.running and self._random.random() < 0.3:
            return self._random.choice(owned.running), None
        if kind != "conversation item":
            things = owned.things[kind]
            return (self._random.choice(things), None) if things else (None, None)
        places = [each for each, items in owned.items.items() if items and each in owned.things["conversation"]]
        if not places:
            return None, None
        within = self._random.choice(places)
        return self._random.choice(owned.items[within]), within

    async def _named(self, owner: str, naming: Naming, named: str, within: str | None) -> Said:
        path = naming.path.replace("IN", within or "").replace("ID", named)
        return await self._ask(owner, naming.method, path, naming.body, named, within)

    async def _ask(
        self, owner: str, method: str, path: str, body: Any = None, named: str = "", within: str | None = None
    ) -> Said:
        """Ask, and see that the answer has nothing of the other's but what was named in the question."""
        encoded = b"" if body is None else msgspec.json.encode(body)
        encoded = encoded.replace(b"SECRET", SECRETS[owner].encode()).replace(b'"ID"', msgspec.json.encode(named))
        owned = self.owned[owner]
        said = await owned.client.ask(method, path, encoded)
        (other,) = set(OWNERS) - {owner}
        assert SECRETS[other].encode() not in said.body, (method, path, said)
        told = set(_ID.findall(said.body)) - {named.encode(), (within or "").encode()}
        assert not told & self.owned[other].ids, (method, path, said)
        owned.ids |= told
        return said
