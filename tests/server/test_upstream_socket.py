"""Two servers in a row, the first speaking WebSocket mode to the second: increments upstream, for every client.

Source: WebSocket mode guide, "Continuation and the connection-local cache"; docs/adr/0016.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from openline.config import UpstreamSettings
from openline.engines.opening import open_engine
from openline.engines.upstream_lines import SaidProjection
from openline.protocol.deltas import CallDelta, CallStarted, TextDelta
from openline.protocol.events import user_message
from server.hand import Hand
from server.running import Running, running, until
from state.proxy import Proxy

TOOLS = [
    {"type": "function", "name": "read", "parameters": {"type": "object", "properties": {"path": {"type": "string"}}}}
]
OUTPUT = "a line of a file\n" * 64


class Pair:
    """A client's server, and the server behind it with a wire between them that is watched."""

    def __init__(self, front: Running, back: Running, model: Hand, wire: Proxy, engine: Any) -> None:
        self.front = front
        self.back = back
        self.model = model
        self.wire = wire
        self.engine = engine

    async def answers(self, posting: Any, text: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Let the model answer; what it was shown, and the client's response."""
        turn = await self.model.next_turn()
        seen = [msgspec.json.decode(raw) for raw in turn.input]
        turn.answer(text)
        return seen, await posting


@asynccontextmanager
async def in_a_row(tmp_path, *, kind="responses+ws", back=None, front=None, **settings):
    model = Hand()
    (tmp_path / "back").mkdir()
    (tmp_path / "front").mkdir()
    async with running(tmp_path / "back", engine=model, **(back or {})) as behind, Proxy(f"{behind.url}/v1") as wire:
        upstream = UpstreamSettings(kind=kind, url=wire.url, **settings)
        engine = open_engine(upstream, show_detail=True)
        async with running(tmp_path / "front", engine=engine, **(front or {})) as server:
            yield Pair(server, behind, model, wire, engine)


def words(items: list[dict[str, Any]]) -> list[str]:
    """Items as a model reads them."""
    return [_words(item) for item in items]


def _words(item: dict[str, Any]) -> str:
    if item.get("type") == "function_call":
        return f"call {item['call_id']}"
    if item.get("type") == "function_call_output":
        return f"output {item['call_id']}"
    content = item["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


async def loop(pair: Pair, calls: int, *, resends: bool) -> int:
    """An agent's loop over HTTP, with everything resent or by the id of what came before; the bytes that went upstream."""
    items: list[dict[str, Any]] = [{"role": "user", "content": "Read it all."}]
    new, parent = items, None
    for number in range(calls):
        body = {"input": items} if resends else {"input": new, "previous_response_id": parent}
        posting = asyncio.ensure_future(pair.front.post(**body, tools=TOOLS, store=not resends))
        turn = await pair.model.next_turn()
        assert words([msgspec.json.decode(raw) for raw in turn.input]) == words(items)
        turn.accept()
        turn.finish(CallStarted("function_call", f"call_{number}", "read"), CallDelta('{"path":"notes"}'))
        response = (await posting).json
        parent = response["id"]
        new = [{"type": "function_call_output", "call_id": f"call_{number}", "output": OUTPUT}]
        items = [*items, *response["output"], *new]
    return pair.wire.bytes


@pytest.mark.parametrize("resends", [True, False], ids=["all resent", "by its id"])
async def test_an_http_client_s_loop_goes_upstream_as_increments(tmp_path, resends):
    """Each turn sends upstream what is new and no more, and the model sees the whole conversation all the same."""
    async with in_a_row(tmp_path) as pair:
        sent = await loop(pair, 12, resends=resends)
        assert pair.wire.connections == 1
    assert sent < 12 * (len(OUTPUT) + 1500)


async def test_increments_send_a_fraction_of_what_full_resends_do(tmp_path):
    """What it is for: over `responses:` the same loop sends the whole conversation upstream each turn."""
    sent = {}
    for kind in ("responses", "responses+ws"):
        (tmp_path / kind).mkdir()
        async with in_a_row(tmp_path / kind, kind=kind) as pair:
            sent[kind] = await loop(pair, 20, resends=True)
    assert sent["responses+ws"] * 5 < sent["responses"], sent


async def test_a_second_branch_gets_a_line_of_its_own(tmp_path):
    """A line's other end holds the latest response; whoever goes on from an earlier one brings everything."""
    async with in_a_row(tmp_path) as pair:
        ask = {"tools": TOOLS, "store": False}
        first = [{"role": "user", "content": "One."}]
        _, answer = await pair.answers(asyncio.ensure_future(pair.front.post(input=first, **ask)), "1")
        common = [*first, *answer.json["output"]]
        for branch in ("Two.", "Other."):
            items = [*common, {"role": "user", "content": branch}]
            seen, _ = await pair.answers(asyncio.ensure_future(pair.front.post(input=items, **ask)), "2")
            assert words(seen) == ["One.", "1", branch]
        assert pair.wire.connections == 2


async def test_two_owners_who_say_the_same_share_no_line(tmp_path):
    """The owner is part of the look-up. Source: guarantees, "Owners"."""
    async with in_a_row(tmp_path, front={"keys": {"key-a": "ann", "key-b": "bob"}}) as pair:
        ask = {"tools": TOOLS, "store": False}
        first = [{"role": "user", "content": "One."}]
        posting = asyncio.ensure_future(pair.front.post(key="key-a", input=first, **ask))
        _, answer = await pair.answers(posting, "1")
        items = [*first, *answer.json["output"], {"role": "user", "content": "Two."}]
        seen, _ = await pair.answers(asyncio.ensure_future(pair.front.post(key="key-b", input=items, **ask)), "2")
        assert words(seen) == ["One.", "1", "Two."]
        assert pair.wire.connections == 2


async def test_an_upstream_that_lost_the_conversation_gets_all_of_it(tmp_path):
    """The line was cut between two turns: the next one goes out on a new line, as a whole."""
    async with in_a_row(tmp_path) as pair:
        ask = {"tools": TOOLS, "store": False}
        first = [{"role": "user", "content": "One."}]
        _, answer = await pair.answers(asyncio.ensure_future(pair.front.post(input=first, **ask)), "1")
        pair.wire.cut()
        items = [*first, *answer.json["output"], {"role": "user", "content": "Two."}]
        seen, answer = await pair.answers(asyncio.ensure_future(pair.front.post(input=items, **ask)), "2")
        assert words(seen) == ["One.", "1", "Two."]
        assert answer.json["status"] == "completed"


async def test_a_turn_whose_line_upstream_is_cut_is_taken_up_again(tmp_path):
    """The client sees one stream, and the model is asked once: the upstream knows keys and resuming."""
    async with in_a_row(tmp_path) as pair:
        async with pair.front.connect() as socket:
            await socket.create(tools=TOOLS, store=False, input="One.")
            turn = await pair.model.next_turn()
            turn.accept()
            turn.give(TextDelta("a"))
            await socket.until("response.output_text.delta")
            pair.wire.cut()
            turn.finish(TextDelta("b"))
            frames = await socket.rest()
        assert frames[-1]["type"] == "response.completed"
        assert frames[-1]["response"]["output"][0]["content"][0]["text"] == "ab"
        assert pair.model.is_idle


async def test_an_upstream_without_websocket_mode_is_spoken_to_over_http(tmp_path):
    """426 at the upgrade, and the same turn goes on over HTTP. Source: WebSocket mode guide, "Rejecting"."""
    async with in_a_row(tmp_path, back={"server": {"websocket": False}}) as pair:
        items = [{"role": "user", "content": "One."}]
        for number in range(2):
            posting = asyncio.ensure_future(pair.front.post(input=items, tools=TOOLS, store=False))
            seen, answer = await pair.answers(posting, str(number))
            assert words(seen) == words(items)
            items = [*items, *answer.json["output"], {"role": "user", "content": "Go on."}]


async def test_a_client_that_leaves_stops_the_turn_upstream(tmp_path):
    """Source: guarantees, "Cancellation": the upstream is closed within a second."""
    async with in_a_row(tmp_path) as pair:
        async with pair.front.connect() as socket:
            await socket.create(tools=TOOLS, store=False, input="One.")
            turn = await pair.model.next_turn()
            turn.accept()
            turn.give(TextDelta("a"))
            await socket.until("response.output_text.delta")
        async with asyncio.timeout(1):
            await turn.closed.wait()
        await until(lambda: len(pair.back.registry) == 0)


async def test_an_upstream_that_refuses_is_told_as_over_http(tmp_path):
    """An upstream's refusal keeps its code and status, whatever it came over. Source: guarantees, "Upstream errors"."""
    async with in_a_row(tmp_path) as pair:
        posting = asyncio.ensure_future(pair.front.post(input="One.", tools=TOOLS, store=False))
        turn = await pair.model.next_turn()
        turn.refuse("context_length_exceeded")
        answer = await posting
        assert answer.status == 400
        assert answer.json["error"]["code"] == "context_length_exceeded"


async def test_an_upstream_that_is_down_is_told_as_such(tmp_path):
    """Nothing was sent, so the client may try again: 502 `upstream_unreachable`."""
    async with in_a_row(tmp_path, connect_seconds_max=0.2) as pair:
        pair.engine._client = msgspec.structs.replace(pair.engine._client, tries_max=1)
        pair.wire.refuse()
        answer = await pair.front.post(input="One.", tools=TOOLS, store=False)
        assert answer.status == 502
        assert answer.json["error"]["code"] == "upstream_unreachable"
        await pair.wire.accept()


async def test_a_client_s_unknown_fields_travel_and_steer_nothing(tmp_path):
    """Fields are the upstream's business, also those that are called like an argument of the session that sends them."""
    async with in_a_row(tmp_path) as pair:
        fields = {"past": "x", "resume": True, "on_lost": "restart", "new_field": 1}
        posting = asyncio.ensure_future(pair.front.post(input="One.", tools=TOOLS, store=False, **fields))
        turn = await pair.model.next_turn()
        seen = msgspec.json.decode(turn.request.body)
        turn.answer("1")
        assert (await posting).status == 200
        assert {name: seen.get(name) for name in fields} == fields


def test_what_was_said_goes_with_its_conversation():
    """Conversations begin in buffers of their own: one that grew in a common one would stay in memory for ever."""
    said = SaidProjection()
    said.extend(said.start(), [user_message("Something private.")])
    begun = said.start()
    assert {repr(each) for each in (begun.encoded, begun.digests, begun.ends)} == {"<SharedBytes 0 of 0 bytes>"}


async def test_the_line_that_waited_longest_makes_room(tmp_path):
    """Lines are bounded by `sockets_max`; a conversation whose line went brings everything."""
    async with in_a_row(tmp_path, sockets_max=2) as pair:
        conversations = []
        for name in "abc":
            items = [{"role": "user", "content": name}]
            posting = asyncio.ensure_future(pair.front.post(input=items, tools=TOOLS, store=False))
            _, answer = await pair.answers(posting, "1")
            conversations.append([*items, *answer.json["output"], {"role": "user", "content": "Go on."}])
        assert repr(pair.engine._lines) == "<Lines busy=0 waiting=2>"
        for items in reversed(conversations):
            posting = asyncio.ensure_future(pair.front.post(input=items, tools=TOOLS, store=False))
            seen, _ = await pair.answers(posting, "2")
            assert words(seen) == words(items)
        assert pair.wire.connections == 4


async def test_a_line_that_waits_too_long_is_closed(tmp_path):
    """`socket_idle_seconds` after its last turn; the bound is the setting's."""
    async with in_a_row(tmp_path, socket_idle_seconds=0.05) as pair:
        posting = asyncio.ensure_future(pair.front.post(input="One.", tools=TOOLS, store=False))
        await pair.answers(posting, "1")
        await until(lambda: not pair.engine._lines._waiting)
        await until(lambda: not pair.back.app._sockets)


async def test_what_a_client_may_change_of_an_item_does_not_cost_the_line(tmp_path):
    """Ids, a status, empty annotations and reasoning left out: it is the same conversation still."""
    async with in_a_row(tmp_path) as pair:
        ask = {"tools": TOOLS, "store": False}
        _, answer = await pair.answers(asyncio.ensure_future(pair.front.post(input="One.", **ask)), "1")
        text = answer.json["output"][0]["content"][0]["text"]
        items = [
            {"role": "user", "content": [{"type": "input_text", "text": "One."}]},
            {"role": "assistant", "content": text},
            {"role": "user", "content": "Two."},
        ]
        seen, _ = await pair.answers(asyncio.ensure_future(pair.front.post(input=items, **ask)), "2")
        assert len(seen) == 3
        assert pair.wire.connections == 1
