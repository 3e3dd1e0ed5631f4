"""Whatever an upstream does: one end for each turn, in time, and nothing left behind.

Source: guarantees, "Upstream faults" and "Upstream errors".
"""

from __future__ import annotations

import asyncio
import random
import re
import tomllib
import tracemalloc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
from msgspec.structs import asdict

from engines.faults import FAULTS, KEY, STALLS, Fault, of_kind
from openline.config import LimitSettings, UpstreamSettings
from openline.protocol.errors import ERRORS
from server.faulty import KINDS, TRANSPORTS, Scene, differences, footprint, scene
from server.running import Socket

ROOT = Path(__file__).parent.parent.parent
# Whole upstreams at which nothing can be asked, by the model's name: the code, and what the message must say.
UNREACHABLE = {
    "refused": "no connection",
    "untrusted": "`ca_file`",
    "no-tls": "http or https",
    "unknown-host": "does not resolve",
}
# What takes longer than `response.created` waits, and ends before the upstream has accepted.
SLOW = ("silent", "half-a-head", "rate-limited-for-1", "loading-once")


@pytest.fixture(autouse=True)
def _upstream_key(monkeypatch):
    monkeypatch.setenv("OPENLINE_UPSTREAM_API_KEY", KEY)


@dataclass(frozen=True)
class Case:
    """A turn that meets a fault."""

    kind: str
    transport: str
    name: str
    fault: Fault

    def __str__(self) -> str:
        return f"{self.name} of {self.kind} over {self.transport}"


def cases(kinds: Iterable[str], transports: Iterable[str]) -> list[Case]:
    return [
        Case(kind, transport, name, fault)
        for kind, transport in product(kinds, transports)
        for name, fault in of_kind(kind).items()
    ]


async def met(at: Scene, case: Case, line: Socket | None, *, pooled: bool = False) -> list[str]:
    """What was wrong with the end of one turn."""
    try:
        end, sent = await at.turn(case.kind, case.name, case.transport, line)
    except TimeoutError:
        return ["it did not end"]
    except AssertionError as error:
        return [str(error)[:500]]
    return differences(case.fault, case.transport, end, sent, pooled=pooled)


async def all_met(at: Scene, wanted: Iterable[Case], at_once: int) -> dict[str, list[str]]:
    """Each on a connection of its own, with a good turn behind it; those with which something was wrong."""
    left, wrong = iter(wanted), {}

    async def work() -> None:
        for case in left:
            async with at.line(case.transport) as line:
                found = await met(at, case, line)
                good = await met(at, replace(case, name="good", fault=FAULTS["good"]), line)
            if found or good:
                wrong[str(case)] = [*found, *(f"the next turn: {each}" for each in good)]

    await asyncio.gather(*(work() for _ in range(at_once)))
    return wrong


def test_there_are_forty_faults():
    """Without counting that a stream can be cut at every event."""
    assert len([name for name in FAULTS if "-behind-" not in name]) >= 40


def test_the_page_about_faults_names_every_code_and_every_bound():
    """With the status of its refusal; and the README shows the bounds as they are unless they are set."""
    page, readme = (
        ROOT.joinpath(name).read_text(encoding="utf-8") for name in ("docs/upstream-faults.md", "README.md")
    )
    for code in {"upstream_unreachable", *(fault.code for fault in FAULTS.values() if fault.code)}:
        assert f"`{code}` ({ERRORS[code].status})" in page
    bounds = {name: value for name, value in asdict(UpstreamSettings()).items() if name.endswith("_max")}
    assert [name for name in bounds if f"`{name}`" not in page] == []
    (shown,) = (
        tomllib.loads(code) for code in re.findall(r"```toml\n(.*?)```", readme, re.DOTALL) if "[limits]" in code
    )
    named = (setting for upstream in shown["upstreams"] for setting in upstream.items())
    assert {name: value for name, value in named if name.endswith("_max")} == bounds


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", KINDS)
async def test_every_fault_ends_its_turn_once_and_as_told(tmp_path, kind, transport, caplog):
    """One terminal event or one refusal, with its code; then a good turn on the same connection, and nothing is left."""
    wanted = [case for case in cases([kind], [transport]) if not case.fault.stalls]
    async with scene(tmp_path) as at:
        before = footprint()
        assert await all_met(at, wanted, at_once=8) == {}
        await at.nothing_is_left(before)
    assert KEY not in caplog.text


async def test_every_stall_ends_its_turn_in_time(tmp_path):
    """The same where an upstream falls silent, or keeps sending and says nothing: at the bound that is there for it."""
    wanted = [case for case in cases(KINDS, TRANSPORTS) if case.fault.stalls]
    async with scene(tmp_path, **STALLS) as at:
        before = footprint()
        assert await all_met(at, wanted, at_once=len(wanted)) == {}
        await at.nothing_is_left(before)


async def test_a_refusal_that_comes_late_fails_the_response(tmp_path):
    """`response.created` is out by then; what the client would have read in a header stands in the message."""
    late = [case for case in cases(KINDS, ["websocket"]) if case.name in SLOW]
    async with scene(tmp_path, created_wait_seconds_max=0.01, **STALLS) as at:
        failing = [replace(case, fault=replace(case.fault, begun=True)) for case in late]
        assert await all_met(at, failing, at_once=len(failing)) == {}


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_an_upstream_that_cannot_be_reached_says_what_to_look_at(tmp_path, transport):
    """502 with the cause; the message names the setting."""
    async with scene(tmp_path) as at:
        for model, says in UNREACHABLE.items():
            async with at.line(transport) as line:
                end, _ = await at.turn(model, "good", transport, line)
            assert (end.code, end.status) == ("upstream_unreachable", 502), model
            assert says in end.message


@pytest.mark.parametrize("turns", [100, pytest.param(1000, marks=pytest.mark.long)])
async def test_turns_with_faults_in_any_order_each_end_once(tmp_path, turns):
    """On connections that are used again, client's and upstream's, by several at once; nothing is left of them."""
    seed = random.randrange(1 << 32)
    choose, wrong = random.Random(seed), {}
    names = [choose.choice([name, "good"]) for name in choose.choices(list(FAULTS), k=turns)]
    left = iter([(name, choose.choice(FAULTS[name].kinds)) for name in names])
    async with scene(tmp_path, keep_alive=True, **STALLS) as at:
        before = footprint()

        async def work(transport: str) -> None:
            async with at.line(transport) as line:
                for name, kind in left:
                    case = Case(kind, transport, name, FAULTS[name])
                    if found := await met(at, case, line, pooled=True):
                        wrong[str(case)] = found

        await asyncio.gather(*(work(transport) for transport in TRANSPORTS * 2))
        assert wrong == {}, f"seed {seed}"
        await at.nothing_is_left(before)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_line_without_end_costs_a_few_times_what_an_event_may_have(tmp_path, kind):
    """Of its 100 MB no more is taken."""
    event_bytes_max = 2 * 1024 * 1024
    peak = await _peak_of(
        tmp_path, kind, "a-line-without-end", event_bytes_max=event_bytes_max, answer_bytes_max=1 << 40
    )
    assert event_bytes_max < peak < 3 * event_bytes_max


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_without_end_costs_a_few_times_what_it_may_have(tmp_path, kind):
    """Its tokens are held as text; beside them stands what waits for the client, which has a bound of its own."""
    answer_bytes_max, waiting_bytes_max = 512 * 1024, LimitSettings().send_buffer_bytes_max
    peak = await _peak_of(tmp_path, kind, "an-answer-without-end", answer_bytes_max=answer_bytes_max)
    assert answer_bytes_max < peak < 2 * answer_bytes_max + 3 * waiting_bytes_max


async def _peak_of(folder: Path, kind: str, name: str, **bounds: float) -> int:
    """The most bytes that were allocated while a turn met a fault; its client gets an error only, and keeps nothing."""
    async with scene(folder, **bounds) as at:
        await at.turn(kind, "good", "json", None)
        tracemalloc.start()
        try:
            end, _ = await at.turn(kind, name, "json", None)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert end.code == "upstream_error"
    return peak
