"""Sealed texts, and the key that they are sealed with: made once, private, the same for every node that has it.

Source: Responses API reference, "encrypted_content"; docs/adr/0008.
"""

from __future__ import annotations

import logging
import os
import stat
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openline.config import Config, ConfigError, StoreSettings, load
from openline.engines.router import Router
from openline.observe import LogHook
from openline.server.runner import build
from openline.state.nothing import NothingStore
from openline.state.sealing import Seal, Unsealable, open_seal

SEAL = Seal(bytes(range(32)))
KEY = "5e" * 32


@given(st.text(), st.text(max_size=8), st.sampled_from(["compaction", "reasoning"]))
def test_what_was_sealed_opens_again(text, owner, kind):
    """Any text, for any owner; the seal bears our mark and nothing of the text.

    Source: Responses API reference, "encrypted_content": opaque, and accepted back.
    """
    sealed = SEAL.close(owner, kind, text)
    assert Seal.is_ours(sealed)
    assert SEAL.open(owner, kind, sealed) == text
    assert sealed.isascii()
    assert len(text) < 4 or text not in sealed


def test_equal_texts_are_sealed_unequally():
    """A client cannot tell from two seals whether the same was sealed.

    Source: RFC 5116 §3.1: a nonce is never used twice.
    """
    assert len({SEAL.close("ada", "reasoning", "Hm.") for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("seal", "owner", "kind"),
    [
        (Seal(bytes(32)), "ada", "compaction"),
        (SEAL, "bob", "compaction"),
        (SEAL, "ada", "reasoning"),
        (SEAL, "", "compaction\0ada"),
    ],
    ids=["key", "owner", "kind", "apart"],
)
def test_another_key_owner_or_kind_does_not_open(seal, owner, kind):
    """A seal is worth something only with the key, to the owner and as the kind of item that it was made for.

    Source: docs/adr/0008; guarantees, "Owners".
    """
    sealed = SEAL.close("ada", "compaction", "Secret.")
    with pytest.raises(Unsealable):
        seal.open(owner, kind, sealed)


@given(st.data())
def test_whatever_is_changed_is_noticed(data):
    """One character replaced, put in or left out, wherever it stands, and the seal does not open.

    Source: docs/adr/0008: authenticated.
    """
    sealed = SEAL.close("ada", "compaction", "Secret.")
    start = len("oln1.")
    at = data.draw(st.integers(start, len(sealed)), label="at")
    end = data.draw(st.integers(at, min(at + 1, len(sealed))), label="end")
    put = data.draw(st.text(st.characters(max_codepoint=255), max_size=1), label="put")
    altered = sealed[:at] + put + sealed[end:]
    if altered != sealed:
        with pytest.raises(Unsealable):
            SEAL.open("ada", "compaction", altered)


@pytest.mark.parametrize("text", ["oln1.", "oln1.AAAA", "oln1.====", "oln1.é", "oln1.\ud800", "oln1." + "A" * 400])
def test_what_was_never_a_seal_does_not_open(text):
    """Whatever a client writes behind our mark, it is told apart, and no other error leaves."""
    with pytest.raises(Unsealable):
        SEAL.open("ada", "compaction", text)


# --- The key --------------------------------------------------------------------------------------


def opens_for(first: Seal, second: Seal) -> bool:
    """Whether two seals have the same key."""
    try:
        return second.open("ada", "reasoning", first.close("ada", "reasoning", "x")) == "x"
    except Unsealable:
        return False


def test_the_key_stands_beside_the_stores_file(tmp_path):
    """Made at the first start, readable by its user alone, and found again at the next.

    Source: docs/adr/0008.
    """
    url = f"sqlite:{tmp_path}/openline.db"
    allowing = os.umask(0)  # all that the code does not forbid itself
    try:
        first = open_seal(url, "", "")
    finally:
        os.umask(allowing)
    path = tmp_path / "openline.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    written = path.read_bytes()
    assert opens_for(first, open_seal(url, "", ""))
    assert path.read_bytes() == written
    assert list(tmp_path.iterdir()) == [path], "nothing else is left"


def test_the_key_can_stand_elsewhere(tmp_path, monkeypatch):
    """Where `sealing_key_file` says, whatever the store is; below the home folder too."""
    monkeypatch.setenv("HOME", str(tmp_path))
    first = open_seal("none", "~/its.key", "")
    assert opens_for(first, open_seal("sqlite::memory:", str(tmp_path / "its.key"), ""))


def test_without_a_store_url_the_key_is_in_the_data_folder(tmp_path, monkeypatch):
    """Beside the store that is there by default."""
    monkeypatch.setattr("openline.state.sealing.default_path", lambda: tmp_path / "openline.db")
    open_seal("", "", "")
    assert (tmp_path / "openline.key").exists()


def started(url: str) -> str:
    """A seal made by a process that starts now."""
    return open_seal(url, "", "").close("ada", "reasoning", "x")


def test_servers_that_start_together_agree_on_one_key(tmp_path):
    """However many make the file at the same time, all read the same key, whole.

    Source: docs/adr/0008: any node that has the key can go on.
    """
    with ProcessPoolExecutor(8, get_context("fork")) as processes:
        for round_ in range(20):
            url = f"sqlite:{tmp_path}/{round_}.db"
            sealed = list(processes.map(started, [url] * 8))
            seal = open_seal(url, "", "")
            assert [seal.open("ada", "reasoning", each) for each in sealed] == ["x"] * 8


@pytest.mark.parametrize(
    ("url", "warns"), [("none", True), ("sqlite::memory:", False), ("postgres://db/openline", True)]
)
def test_without_a_file_the_key_lasts_as_long_as_the_process(url, warns, tmp_path, monkeypatch, caplog):
    """Nothing is written for a store that writes nothing here, and every start has a key of its own.

    The log says so where clients, or a store, hold what it has sealed when the process is gone.

    Source: docs/adr/0008.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("openline.state.sealing.default_path", lambda: tmp_path / "openline.db")
    first = open_seal(url, "", "")
    assert ["set OPENLINE_SEALING_KEY" in line for line in caplog.messages] == [True] * warns
    assert not opens_for(first, open_seal(url, "", ""))
    assert not list(tmp_path.iterdir())
    caplog.clear()
    open_seal(url, "", KEY)
    assert not caplog.messages


def test_a_given_key_wins(tmp_path):
    """`OPENLINE_SEALING_KEY` counts and no file is read or made: so the nodes of a cluster share one."""
    url = f"sqlite:{tmp_path}/openline.db"
    given_one = open_seal(url, "", KEY)
    assert not list(tmp_path.iterdir())
    assert not opens_for(given_one, open_seal(url, "", ""))
    assert opens_for(given_one, open_seal(url, "", KEY.upper() + "\n"))
    assert opens_for(given_one, open_seal("none", "", KEY))


@pytest.mark.parametrize(
    "content",
    [b"", b"\n", b"5e" * 31, b"5e" * 33, b"5" * 63, b"zz" * 32, b"\xff" * 64, b"-----BEGIN PRIVATE KEY-----"],
    ids=["empty", "line", "short", "long", "odd", "letters", "bytes", "pem"],
)
def test_what_is_no_key_is_one_clear_error(tmp_path, content):
    """The file is named and what was expected, never what is in it; the same for a key that was given.

    Source: guarantees, "Errors": which field, what was expected; "Secrets".
    """
    path = tmp_path / "openline.key"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        open_seal(f"sqlite:{tmp_path}/openline.db", "", "")
    assert str(raised.value) == f"store.sealing_key_file {path} is no key: expected 64 hexadecimal digits."
    assert path.read_bytes() == content, "it may be somebody's"
    if content.strip().isascii() and content.strip():
        with pytest.raises(ConfigError, match=r"^OPENLINE_SEALING_KEY is no key: expected 64 hexadecimal digits\.$"):
            open_seal("none", "", content.decode())


@pytest.mark.parametrize("where", ["missing/its.key", ".", "~nobody-of-this-name/its.key", "file/its.key"])
def test_a_key_that_cannot_be_had_is_one_clear_error(tmp_path, where):
    """No folder, a folder in its place, no such home: the path and the reason in one line, and what else to do.

    Source: guarantees, "Errors".
    """
    (tmp_path / "file").touch()
    path = where if where.startswith("~") else f"{tmp_path}/{where}"
    with pytest.raises(ConfigError) as raised:
        open_seal("none", path, "")
    said = str(raised.value)
    assert said.startswith(f"store.sealing_key_file {path.removesuffix('/.')} cannot be read or made: ")
    assert said.endswith(" Give the key as OPENLINE_SEALING_KEY.")
    assert "\n" not in said


def test_a_key_in_a_folder_that_is_not_writable_is_read(tmp_path):
    """As an orchestrator mounts it: nothing is made where a key is."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    (folder / "its.key").write_text(KEY)
    before = folder.stat().st_mtime_ns
    assert opens_for(open_seal("none", str(folder / "its.key"), ""), open_seal("none", "", KEY))
    assert folder.stat().st_mtime_ns == before


def test_the_key_is_nowhere_to_be_seen(monkeypatch, caplog):
    """No `repr` of what holds it has it, and nothing is logged.

    Source: guarantees, "Secrets".
    """
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENLINE_SEALING_KEY", KEY)
    config = Config(store=StoreSettings("none"))
    _, registry = build(config, Router([]), NothingStore(), LogHook())
    assert opens_for(registry.parts.seal, open_seal("none", "", KEY)), "it is the one"
    shown = "".join(map(repr, (registry.parts.seal, registry.parts, registry, config)))
    for secret in (KEY, bytes.fromhex(KEY), repr(bytes.fromhex(KEY))):
        assert str(secret) not in shown + caplog.text
    assert "<Seal>" in shown


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_another_store_leaves_the_key_file_as_configured(tmp_path, how):
    """`--store` and `OPENLINE_STORE` say where the store is, and nothing about the key.

    Source: README, "Configuration": flags win over the environment, which wins over the file, field by field.
    """
    path = tmp_path / "openline.toml"
    path.write_text('[store]\nurl = "none"\nsealing_key_file = "/run/secrets/openline.key"\n')
    environment, flags = ({}, {"store": "sqlite:a.db"}) if how == "flag" else ({"OPENLINE_STORE": "sqlite:a.db"}, {})
    assert load(Path(path), environment, flags).store == StoreSettings("sqlite:a.db", "/run/secrets/openline.key")
