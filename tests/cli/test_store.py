"""`openline store`: what an operator sees of a store, takes out of it, and deletes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from commands import environment
from openline.cli import app
from openline.state.retention import DAY_SECONDS
from state.stores import conversation, items, turn
from state.stores import place as made_place

KINDS = ["sqlite file", "postgres"]
LONG_AGO = 1_000_000


@pytest.fixture(params=KINDS)
def filled(request: pytest.FixtureRequest, tmp_path: Path):
    """The SPEC of a store with old and new turns of two owners, and an old and a new conversation."""
    with asyncio.Runner() as runner:
        place = runner.run(fill_in(request.param, tmp_path))
        yield place[0].spec
        runner.run(place[1].__aexit__(None, None, None))


async def fill_in(kind: str, folder: Path) -> Any:
    now = int(time.time())
    holding = made_place(kind, folder)
    place = await holding.__aenter__()
    store = place.make()
    for number in range(60):
        await store.put("ann", turn(f"resp_{number}", f"resp_{number - 1}" if number else None, at=LONG_AGO))
    await store.put("ann", turn("resp_new", at=now))
    await store.put("ben", turn("resp_run", at=now - 5 * DAY_SECONDS, lease_until=now + 60))
    await store.create_conversation("ann", conversation("conv_old", at=LONG_AGO), items("a", "b"))
    await store.create_conversation("ann", conversation("conv_new", at=now), items("a"))
    await store.close()
    return place, holding


def ran(*arguments: str, **environ: str):
    return CliRunner().invoke(app, ["store", *arguments], env={"COLUMNS": "200", **environ})


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_info_counts_what_is_there(filled: str):
    """A person reads the counts, the size, the times and how long things are kept."""
    result = ran("info", "--store", filled)
    assert result.exit_code == 0, result.output
    shown = dict(line.split(maxsplit=1) for line in result.stdout.splitlines() if line.strip())
    assert shown["responses"].strip() == "62, 1 unfinished"
    assert shown["conversations"].strip() == "2, with 3 items"
    assert shown["owners"].strip() == "2"
    assert shown["oldest"].startswith("1970-01-1")
    assert shown["kept"].strip() == "for 30 days after their last use"


def test_info_is_json_for_programs(filled: str):
    """The same in numbers: bytes, and Unix seconds."""
    result = ran("info", "--json", "--store", filled)
    found = json.loads(result.stdout)
    assert {name: found[name] for name in ("owners", "turns", "unfinished", "conversations", "items", "oldest")} == {
        "owners": 2,
        "turns": 62,
        "unfinished": 1,
        "conversations": 2,
        "items": 3,
        "oldest": LONG_AGO,
    }
    assert found["bytes"] > 0


def test_an_export_is_a_line_a_response_and_a_conversation(filled: str):
    """Each is JSON by itself, with what it holds as JSON within it, and nothing else is printed."""
    result = ran("export", "--store", filled)
    assert result.exit_code == 0, result.output
    rows = {(row["owner"], row.get("response_id") or row["conversation_id"]): row for row in lines(result.stdout)}
    assert len(rows) == 64
    assert rows["ann", "conv_old"] == {
        "owner": "ann",
        "conversation_id": "conv_old",
        "created_at": LONG_AGO,
        "metadata": {},
        "items": [{"id": "a"}, {"id": "b"}],
    }
    assert rows["ann", "resp_7"] == {
        "owner": "ann",
        "response_id": "resp_7",
        "created_at": LONG_AGO,
        "status": "completed",
        "input": [{"role": "user", "content": "hello"}],
        "response": {"id": "resp_7", "output": []},
    }
    assert result.stderr == ""


def test_an_export_of_one_owner_has_no_one_elses(filled: str):
    """What an owner asks to be given is theirs alone (G13)."""
    result = ran("export", "--owner", "ben", "--store", filled)
    assert [row["response_id"] for row in lines(result.stdout)] == ["resp_run"]
    assert ran("export", "--owner", "dan", "--store", filled).stdout == ""


def test_an_export_whose_reader_goes_away_ends(filled: str):
    """`openline store export | head -1` shows a line and no traceback."""
    command = [sys.executable, "-m", "openline", "store", "export", "--store", filled]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode in {0, 1}


def test_a_purge_deletes_what_is_old(filled: str):
    """The old chain and the old conversation go, what is new or runs stays; a second purge finds nothing."""
    result = ran("purge", "--older-than", "10d", "--store", filled)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("Deleted 61 responses and conversations, not used since ")
    left = lines(ran("export", "--store", filled).stdout)
    assert {row.get("response_id") or row["conversation_id"] for row in left} == {"resp_new", "resp_run", "conv_new"}
    assert json.loads(ran("info", "--json", "--store", filled).stdout)["conversations"] == 1
    assert ran("purge", "--older-than", "10d", "--store", filled).stdout.startswith("Deleted 0 ")


@pytest.mark.parametrize("days", ["", "0d", "30", "-1d", "1h", "30 d", "d", "100000d", "٣d"])
def test_an_age_is_whole_days(days: str):
    """Less than a day would delete what running turns go on from."""
    result = ran("purge", "--older-than", days, "--store", "none")
    assert result.exit_code == 2
    assert "expected days, such as 30d" in result.stderr


def test_the_store_is_found_as_by_serve(tmp_path: Path):
    """`--store` wins over the environment, and that over the configuration file."""
    for name in ("flag", "environment", "file"):
        asyncio.run(made(tmp_path / f"{name}.db", name))
    config = tmp_path / "openline.toml"
    config.write_text(f"[store]\nurl = 'sqlite:{tmp_path / 'file.db'}'\nretain_days = 0\n", encoding="utf-8")
    environ = {"OPENLINE_STORE": f"sqlite:{tmp_path / 'environment.db'}"}
    flag = f"sqlite:{tmp_path / 'flag.db'}"
    told = [
        ran("export", "--config", str(config), "--store", flag, **environ),
        ran("export", "--config", str(config), **environ),
        ran("export", "--config", str(config)),
        ran("export", OPENLINE_CONFIG=str(config)),
    ]
    assert [lines(each.stdout)[0]["response_id"] for each in told] == ["flag", "environment", "file", "file"]
    assert "for ever" in ran("info", "--config", str(config)).stdout


async def made(path: Path, response_id: str) -> None:
    from openline.state.sqlite import SqliteStore

    store = SqliteStore(path)
    await store.put("ann", turn(response_id))
    await store.close()


@pytest.mark.parametrize("command", [["info"], ["export"], ["purge", "--older-than", "1d"]], ids=lambda words: words[0])
@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("sqlite:/no/such/folder/x.db", "there is no such file"),
        ("mysql://ann:canary@db/x", "store.url (--store) is 'mysql://db/x'; expected"),
        ("postgresql://ann:canary@127.0.0.1:1/x", "it cannot be reached, Connection refused"),
    ],
)
def test_what_cannot_be_used_is_one_line(command: list[str], spec: str, said: str):
    """The setting and the reason, exit code 2, no secret, and no new file."""
    result = ran(*command, "--store", spec)
    (line,) = [line for line in result.stderr.splitlines() if line]
    assert result.exit_code == 2
    assert line.startswith("openline: store.url (--store)")
    assert said in line
    assert "canary" not in result.output


@pytest.mark.parametrize("command", [["info"], ["export"], ["purge", "--older-than", "1d"]], ids=lambda words: words[0])
def test_a_store_that_keeps_nothing_is_empty(command: list[str]):
    """`none` is a store as well."""
    assert ran(*command, "--store", "none").exit_code == 0


def test_help_has_examples():
    """Each command shows how it is typed."""
    for command in ("info", "export", "purge"):
        assert f"openline store {command}" in ran(command, "--help").stdout
