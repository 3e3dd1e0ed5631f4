"""What must not be written is in no file: content with `store: false`, the clients' keys and the upstreams'.

Each secret is a word that occurs nowhere else. It goes every way that the server has, errors that echo it included; then the
server is killed in the middle of that, and every file is searched: the database with SQLite's files beside it, the log, and
whatever else was written to the user's folders.

Source: guarantees, "Secrets and zero retention".
"""

from __future__ import annotations

import asyncio
import base64
import json
import random
from collections import Counter
from contextlib import suppress

import aiohttp
import pytest
from aiohttp import web

from durability.serving import nursery
from durability.world import Api, through

TURNS_AT_ONCE = 8
CONFIG = """
[[upstreams]]
kind = "responses"
url = "{url}"
models = ["r-*"]
api_key_env = "OTHER_UPSTREAM_KEY"

[[upstreams]]
kind = "chat"
url = "{url}"
"""


class Secrets:
    """By name: what no file may hold; `kept` is what one must."""

    def __init__(self, rng: random.Random) -> None:
        self.content, self.client_key, self.upstream_key, self.other_key, self.kept = (
            f"{kind}-{rng.randbytes(12).hex()}" for kind in ("content", "sk-client", "sk-upstream", "sk-other", "kept")
        )

    def found_in(self, folder) -> set[str]:
        """The files that hold one of them, in whatever form: `name: secret`."""
        return {
            f"{path.relative_to(folder)}: {name}"
            for path in folder.rglob("*")
            if path.is_file()
            for name, secret in vars(self).items()
            if any(form in path.read_bytes() for form in forms(secret))
        }


def forms(secret):
    """The bytes that it can stand as; of base64 what is the same wherever in a text it stands."""
    raw = secret.encode()
    yield raw
    yield raw.hex().encode()
    yield secret.encode("utf-16-le")
    for before in range(3):
        yield base64.b64encode(bytes(before) + raw)[4:-4]


class Gossip:
    """A model server that repeats all that it hears, its key included, and fails as it is told by the model's name.

    The model `quiet` keeps what it hears to itself: what is to be kept of it holds nothing of what stands before it.
    """

    def __init__(self) -> None:
        self.heard: Counter[str] = Counter()
        self.url = ""

    async def __aenter__(self):
        app = web.Application()
        app.router.add_post("/v1/{rest:.*}", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_):
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        how = asked["model"].removeprefix("r-")
        said = f"{request.headers.get('Authorization')} said {json.dumps(asked)}" if how != "quiet" else "Yes."
        self.heard[f"{request.path} {how}"] += 1
        if how.isdigit():
            return web.json_response({"error": {"message": said, "type": said, "code": said}}, status=int(how))
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Said": said[:100]})
        with suppress(ConnectionError):
            await response.prepare(request)
            speak = _chat if request.path.endswith("chat/completions") else _responses
            for part in speak(said, how):
                await response.write(b"data: " + part + b"\n\n")
                await asyncio.sleep(0.001)
            if how == "stalls":
                await asyncio.Event().wait()
        return response


def _chat(said, how):
    for delta in ({"reasoning": said}, {"content": said}):
        yield json.dumps({"id": said, "choices": [{"index": 0, "delta": delta}]}).encode()
    if how == "breaks":
        yield b'{"' + said.encode()
    elif how == "fails":
        yield json.dumps({"error": {"message": said, "code": said}}).encode()
    elif how == "calls":
        call = {"index": 0, "id": "call_1", "function": {"name": "f", "arguments": json.dumps({"x": said})}}
        yield json.dumps({"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}).encode()
        yield b'{"choices":[{"index":0,"delta":{},"finish_reason":"tool_calls"}]}'
        yield b"[DONE]"
    elif how != "stalls":
        yield b'{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}'
        yield b"[DONE]"


def _responses(said, how):
    item = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
    item["content"] = [{"type": "output_text", "text": said, "annotations": []}]
    response = {"id": "resp_1", "object": "response", "status": "in_progress", "output": [], "said": said}
    yield json.dumps({"type": "response.created", "sequence_number": 0, "response": response}).encode()
    if how == "breaks":
        yield b'{"' + said.encode()
        return
    if how == "fails":
        error = {"code": said, "message": said}
        response |= {"status": "failed", "error": error}
        yield json.dumps({"type": "response.failed", "sequence_number": 1, "response": response}).encode()
        return
    item_added = {"type": "response.output_item.added", "output_index": 0, "item": item | {"content": []}}
    yield json.dumps(item_added | {"sequence_number": 1}).encode()
    item_done = {"type": "response.output_item.done", "output_index": 0, "item": item}
    yield json.dumps(item_done | {"sequence_number": 2}).encode()
    if how != "stalls":
        response |= {"status": "completed", "output": [item]}
        yield json.dumps({"type": "response.completed", "sequence_number": 3, "response": response}).encode()


class Spy:
    """A client that says the secret wherever a request has room for it."""

    def __init__(self, api: Api, known: Secrets, rng: random.Random) -> None:
        self._api = api
        self._known = known
        self._rng = rng
        self.ended: Counter[str] = Counter()

    def body(self, model="m", **fields):
        secret = self._known.content
        parameters = {"type": "object", "properties": {secret: {"type": "string", "description": secret}}}
        return {
            "model": model,
            "store": False,
            "instructions": f"Keep {secret}.",
            "input": [{"role": "user", "content": [{"type": "input_text", "text": f"I say {secret}."}]}],
            "tools": [{"type": "function", "name": "f", "description": secret, "parameters": parameters}],
            "metadata": {"said": secret},
            "user": secret,
            "safety_identifier": secret[:64],
            "prompt_cache_key": secret[:64],
            **fields,
        }

    def kept(self, **fields):
        """A create whose response is to be kept."""
        return {"model": "quiet", "input": f"You may keep {self._known.kept}.", **fields}

    async def turn(self):
        """One of the ways, chosen at random."""
        rng = self._rng
        model = rng.choice(["m", "m", "calls", "breaks", "fails", "401", "429", "500", "400"])
        model = rng.choice(["", "r-"]) + model
        way = rng.choice(
            [self.plain, self.streamed, self.socket, self.background, self.compacted, self.refused, self.mixed]
        )
        self.ended[f"{way.__name__} {await way(model)}"] += 1

    async def plain(self, model):
        return _end(await self._api.post(self.body(model)))

    async def streamed(self, model):
        return await _last(self._api.stream(self.body(model)))

    async def background(self, model):
        """Polled or followed, cancelled or not."""
        if self._rng.random() < 0.5:
            return await _last(self._api.stream(self.body(model, background=True)))
        response = await self._api.post(self.body(model, background=True))
        while response.get("status") in {"queued", "in_progress"}:
            response = await self._api.get(f"/responses/{response['id']}")
        return _end(response)

    async def socket(self, model):
        """A warm-up, a turn, a turn behind it with a tool's output, another lane, and one that is steered and cancelled."""
        async with self._api.socket() as socket:
            ends = [await _last(through(socket, self.body(model, generate=False)))]
            first = [event async for event in _until_end(through(socket, self.body(model)))][-1]
            parent = first.get("response", {}).get("id")
            output = {"type": "function_call_output", "call_id": "call_1", "output": self._known.content}
            going_on = output if model.endswith("calls") else f"And {self._known.content}?"
            going_on = [going_on] if isinstance(going_on, dict) else going_on
            ends.append(await _last(through(socket, self.body(model, input=going_on, previous_response_id=parent))))
            ends.append(await _last(through(socket, self.body(model, stream_id=self._known.content))))
            response_id = None
            async for event in through(socket, self.body("stalls")):
                if event["type"] == "response.output_text.delta":
                    said = [{"role": "user", "content": self._known.content}]
                    await socket.send_json({"type": "response.steer", "response_id": response_id, "input": said})
                    await socket.send_json({"type": "response.cancel"})
                response_id = event.get("response", {}).get("id")
                if event["type"] in {"response.incomplete", "error"}:
                    break
            return ", ".join(ends)

    async def compacted(self, model):
        """Summed up, by itself and as it was asked for."""
        body = self.body(model)
        status, _ = await self._api.ask("POST", "/responses/compact", {name: body[name] for name in ("model", "input")})
        management = [{"type": "compaction", "compact_threshold": 1000}]
        await self._api.post(self.body(model, context_management=management, input=f"{self._known.content} " * 500))
        return str(status)

    async def refused(self, model):
        """What is no request, in one place or another."""
        secret = self._known.content
        for wrong in (
            {"input": {secret: secret}},
            {"input": [{"type": "function_call_output", "call_id": secret, "output": secret}]},
            {"input": [{"type": "item_reference", "id": secret}]},
            {"input": [{"role": secret, "content": secret}]},
            {"tools": [{"type": secret}]},
            {"temperature": secret},
            {"previous_response_id": secret},
            {"conversation": secret},
            {"text": {"format": {"type": secret}}},
            {secret: secret},
        ):
            await self._api.ask("POST", "/responses", self.body(model, **wrong))
        async with self._api.socket() as socket:
            for text in ('{"type": "response.create", "input": "' + secret, json.dumps({"type": secret})):
                await socket.send_str(text)
                await socket.receive()
            await _last(through(socket, self.body(model, **wrong)))
        await self._api.ask("GET", f"/responses/{secret}")
        status, _ = await self._api.ask("POST", "/responses/input_tokens", self.body(model))
        return str(status)

    async def mixed(self, model):
        """Unstored behind stored, and stored behind unstored, of which only what was to be kept is."""
        async with self._api.socket() as socket:
            ends = []
            parent = None
            for body in (self.kept(), self.body(model), self.kept()):
                events = [e async for e in _until_end(through(socket, {**body, "previous_response_id": parent}))]
                parent = events[-1].get("response", {}).get("id")
                ends.append(events[-1]["type"])
            return ", ".join(ends)


async def _until_end(events):
    async for event in events:
        yield event
        if event["type"] in {"response.completed", "response.failed", "response.incomplete", "error"}:
            return


async def _last(events):
    return [event async for event in _until_end(events)][-1]["type"]


def _end(answer):
    return answer.get("status") or answer["error"]["code"]


@pytest.mark.parametrize(("seed", "turns"), [(0, 100), pytest.param(1, 1000, marks=pytest.mark.long)])
async def test_no_file_holds_what_must_not_be_written(tmp_path, seed, turns):
    """While it runs, after `kill -9` in the middle of turns, after a new start, and after an orderly end."""
    rng = random.Random(seed)
    known = Secrets(rng)
    home = tmp_path / "home"
    (home / "tmp").mkdir(parents=True)
    config = tmp_path / "openline.toml"
    environ = {
        "HOME": str(home),
        "XDG_DATA_HOME": str(home / "data"),
        "TMPDIR": str(home / "tmp"),
        "SQLITE_TMPDIR": str(home / "tmp"),
        "OPENLINE_LOG_LEVEL": "debug",
        "OPENLINE_API_KEY": known.client_key,
        "OPENLINE_UPSTREAM_API_KEY": known.upstream_key,
        "OTHER_UPSTREAM_KEY": known.other_key,
    }
    async with Gossip() as gossip, nursery(home, **environ) as makes:
        config.write_text(CONFIG.format(url=gossip.url))
        server = await makes.start("--config", str(config))
        async with aiohttp.ClientSession(
            headers={"Authorization": f"Bearer {known.client_key}"}, timeout=aiohttp.ClientTimeout(total=20)
        ) as session:
            spy = Spy(Api(session, server.url), known, rng)

            async def some():
                while sum(spy.ended.values()) < turns:
                    await spy.turn()

            await asyncio.gather(*(some() for _ in range(TURNS_AT_ONCE)))
            found = {place for place in known.found_in(home) if not place.endswith(": kept")}
            assert not found
            endless = [asyncio.ensure_future(_endless(spy)) for _ in range(TURNS_AT_ONCE)]
            await asyncio.wait(endless, timeout=rng.random())
            await server.kill()
            await asyncio.wait(endless)
        places = known.found_in(home)
        assert {place for place in places if not place.endswith(": kept")} == set()
        assert any(place.startswith("data/openline/openline.db") for place in places), "the search finds what is there"
        server = await makes.start("--config", str(config))
        await server.stop()
        assert known.found_in(home) == {"data/openline/openline.db: kept"}
    assert {each.partition(" ")[0] for each in gossip.heard} >= {"/v1/chat/completions", "/v1/responses"}
    print(f"seed {seed}, {dict(gossip.heard)}, {dict(spy.ended)}")  # noqa: T201 - the figures, with -s


async def _endless(spy):
    with suppress(aiohttp.ClientError, ConnectionError, IndexError):
        while True:
            await spy.turn()
