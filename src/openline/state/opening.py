"""From `[store]` to a store."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from openline.config import ConfigError, StoreSettings
from openline.state.nothing import NothingStore
from openline.state.sqlite import SqliteStore
from openline.state.store import Store, StoreUnavailable, without_secrets

_EXPECTED: Final = "expected sqlite:PATH, sqlite::memory:, postgresql://… or none"
_POOL_CONNECTIONS_MAX: Final = StoreSettings().pool_connections_max


async def start_store(settings: StoreSettings, *, make: bool = True) -> Store:
    """The store of `[store]`, which answers, and is on the newest schema.

    Args:
        make: whether a SQLite file is made if there is none.

    Raises:
        ConfigError: it cannot be used.
    """
    store = open_store(settings.url, settings.pool_connections_max, make=make)
    try:
        await store.open()
    except StoreUnavailable as error:
        await store.close()
        expected = "expected a PostgreSQL database that can be used"
        raise ConfigError(f"store.url (--store) is '{without_secrets(settings.url)}': {expected}: {error}.") from None
    return store


def open_store(url: str, pool_connections_max: int = _POOL_CONNECTIONS_MAX, *, make: bool = True) -> Store:
    """The store that a SPEC names. A SQLite file is opened here, a PostgreSQL database by the store's `open`.

    Args:
        url: `sqlite:PATH`, `sqlite::memory:`, `postgresql://…`, `none`, or empty for `openline.db` in the user's data
            directory.
        pool_connections_max: to a PostgreSQL server.
        make: whether a SQLite file is made if there is none.

    Raises:
        ConfigError: the SPEC is not of that form, or what it names cannot be used.
    """
    if url == "none":
        return NothingStore()
    kind, _, rest = url.partition(":")
    if not url:
        path = default_path()
        if make:
            _make_folder(path.parent)
        return _open_sqlite(f"sqlite:{path}", path, make=make)
    if kind in {"postgresql", "postgres"} and rest.startswith("//"):
        return _open_postgres(url, kind, pool_connections_max)
    if kind != "sqlite" or not rest:
        raise ConfigError(f"store.url (--store) is '{without_secrets(url)}'; {_EXPECTED}.")
    return _open_sqlite(url, None if rest == ":memory:" else Path(rest), make=make)


def default_path(platform: str = sys.platform, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the database is when nobody says: `openline/openline.db` under the user's data directory.

    Source: XDG Base Directory Specification ("paths … must be absolute", otherwise ignored).
    """
    home = Path.home()
    if platform == "darwin":
        data = home / "Library" / "Application Support"
    elif platform == "win32":
        data = Path(environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        named = Path(environ.get("XDG_DATA_HOME", ""))
        data = named if named.is_absolute() else home / ".local" / "share"
    return data / "openline" / "openline.db"


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"store.url (--store) is not set, and {folder} cannot be made: {error.strerror}; {_EXPECTED}."
        ) from None


def _open_sqlite(url: str, path: Path | None, *, make: bool) -> Store:
    try:
        return SqliteStore(path.expanduser() if path else None, make=make)
    except (StoreUnavailable, ValueError, RuntimeError) as error:  # a NUL in the path; no home to expand `~` to
        raise ConfigError(
            f"store.url (--store) is '{url}': expected a SQLite file that can be read and written: {error}."
        ) from None


def _open_postgres(url: str, kind: str, pool_connections_max: int) -> Store:
    try:
        from openline.state.postgres import PostgresStore  # noqa: PLC0415 - asyncpg is an extra
    except ModuleNotFoundError:
        remedy = "which needs asyncpg: pip install 'openline[postgres]'"
        raise ConfigError(f"store.url (--store) is a {kind}: URL, {remedy}.") from None
    return PostgresStore(url, pool_connections_max=pool_connections_max)
