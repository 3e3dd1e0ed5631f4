"""From `store.url` to a store, and one clear line where that fails."""

import sqlite3
import sys
from pathlib import Path

import pytest

from openline.config import ConfigError, StoreSettings
from openline.state.nothing import NothingStore
from openline.state.opening import default_path, open_store, start_store
from openline.state.sqlite import SqliteStore
from openline.state.store import StoreUnavailable

posix = pytest.mark.skipif(sys.platform == "win32", reason="the variables of a POSIX system")


async def test_none_is_the_store_that_keeps_nothing():
    """`none` opens no file."""
    assert isinstance(open_store("none"), NothingStore)


async def test_a_store_says_its_state(tmp_path):
    """The repr names the file and whether it is open."""
    path = tmp_path / "a folder" / "50% #1?.db"
    path.parent.mkdir()
    store = open_store(f"sqlite:{path}")
    assert repr(store) == f"<SqliteStore {path} open queued=0>"
    await store.close()
    assert repr(store) == f"<SqliteStore {path} closed queued=0>"
    assert path.exists()


async def test_memory_opens_no_file(tmp_path, monkeypatch):
    """`sqlite::memory:` leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    store = open_store("sqlite::memory:")
    assert repr(store) == "<SqliteStore :memory: open queued=0>"
    await store.close()
    assert list(tmp_path.iterdir()) == []


async def test_a_relative_path_starts_at_the_working_directory(tmp_path, monkeypatch):
    """`sqlite:openline.db` is a file here."""
    monkeypatch.chdir(tmp_path)
    await open_store("sqlite:openline.db").close()
    assert (tmp_path / "openline.db").exists()


@posix
@pytest.mark.parametrize("spec", ["", "sqlite:~/data/openline/openline.db"])
async def test_an_empty_spec_is_a_file_in_the_users_data_directory(tmp_path, monkeypatch, spec):
    """Without a SPEC the file and its folders are made; `~` is the user's home."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("openline.state.opening.default_path", lambda: tmp_path / "data/openline/openline.db")
    if spec:
        (tmp_path / "data/openline").mkdir(parents=True)
    store = open_store(spec)
    assert isinstance(store, SqliteStore)
    await store.close()
    assert (tmp_path / "data/openline/openline.db").exists()


@pytest.mark.parametrize(
    ("platform", "environ", "expected"),
    [
        ("linux", {"XDG_DATA_HOME": str(Path("/data").absolute())}, Path("/data").absolute()),
        ("linux", {"XDG_DATA_HOME": "not/absolute"}, Path.home() / ".local/share"),
        ("linux", {}, Path.home() / ".local/share"),
        ("darwin", {"XDG_DATA_HOME": "/data"}, Path.home() / "Library/Application Support"),
        ("win32", {"LOCALAPPDATA": "C:/Users/ann/AppData/Local"}, Path("C:/Users/ann/AppData/Local")),
        ("win32", {}, Path.home() / "AppData/Local"),
    ],
)
def test_the_data_directory_is_the_platforms(platform, environ, expected):
    """Where users of each platform look for a program's data."""
    assert default_path(platform, environ) == expected / "openline" / "openline.db"


@pytest.mark.parametrize("spec", ["sqlite", "sqlite:", "redis:x", "openline.db", ":memory:", "NONE", "postgresql:x"])
def test_a_wrong_spec_is_named_with_what_was_expected(spec):
    """One line: the field, what came, what was expected."""
    with pytest.raises(ConfigError) as refused:
        open_store(spec)
    assert str(refused.value) == (
        f"store.url (--store) is '{spec}'; expected sqlite:PATH, sqlite::memory:, postgresql://… or none."
    )


def test_another_servers_url_is_refused_without_its_password():
    """A message never holds a secret (G16)."""
    with pytest.raises(ConfigError) as refused:
        open_store("mysql://ann:canary@db/x")
    expected = "expected sqlite:PATH, sqlite::memory:, postgresql://… or none"
    assert str(refused.value) == f"store.url (--store) is 'mysql://db/x'; {expected}."


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
async def test_a_postgresql_url_is_a_store_that_connects_later(scheme):
    """Making it needs no server; `start_store` and the first call do."""
    store = open_store(f"{scheme}://ann:canary@no.such.host.invalid/x", 3)
    assert repr(store) == f"<PostgresStore {scheme}://no.such.host.invalid/x not connected connections=0 calls=0>"
    await store.close()


async def test_the_settings_make_a_store(tmp_path):
    """`[store]` as a whole, checked: `start_store` gives what can be used at once."""
    path = tmp_path / "store.db"
    store = await start_store(StoreSettings(url=f"sqlite:{path}"))
    assert repr(store) == f"<SqliteStore {path} open queued=0>"
    await store.close()


async def test_a_file_that_must_be_there_is_not_made(tmp_path):
    """Who looks after a store does not want a new one for a slip of the pen."""
    path = tmp_path / "store.db"
    with pytest.raises(ConfigError, match="there is no such file"):
        await start_store(StoreSettings(url=f"sqlite:{path}"), make=False)
    assert list(tmp_path.iterdir()) == []
    await open_store(f"sqlite:{path}").close()
    await (await start_store(StoreSettings(url=f"sqlite:{path}"), make=False)).close()


def make_other_database(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE history (url)")
    connection.close()


def make_newer_database(path):
    connection = sqlite3.connect(path)
    connection.executescript("PRAGMA application_id = 0x4F504C4E; PRAGMA user_version = 99")
    connection.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "cannot be opened"),
        (lambda path: path.with_name("no") / "such" / "folder.db", "cannot be opened"),
        (lambda path: path.write_text("not a database, but long enough to have a header" * 9) and None, "not a SQLite"),
        (make_other_database, "another program's database"),
        (make_newer_database, "newer version of Openline wrote it: its schema is 99"),
        (lambda path: path.with_name("a\0b"), "expected a SQLite file"),
    ],
    ids=["folder", "no folder", "text", "other program", "newer", "nul"],
)
def test_an_unusable_file_is_one_clear_line(tmp_path, make, reason):
    """What cannot be a store is refused at start, with its path and the reason."""
    path = tmp_path / "store.db"
    made = make(path)
    spec = f"sqlite:{made or path}"
    with pytest.raises(ConfigError) as refused:
        open_store(spec)
    line = str(refused.value)
    assert line.startswith(f"store.url (--store) is '{spec}': ")
    assert reason in line
    assert "\n" not in line


def test_a_locked_file_is_refused(tmp_path):
    """A file that another program holds is named at start, after the wait for its lock."""
    path = tmp_path / "store.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(StoreUnavailable, match="locked by another program"):
        SqliteStore(path, lock_wait_seconds_max=0.05)
    other.close()
