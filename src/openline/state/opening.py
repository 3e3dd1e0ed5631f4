"""From `store.url` to a store."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from openline.config import ConfigError
from openline.state.nothing import NothingStore
from openline.state.sqlite import SqliteStore
from openline.state.store import Store, StoreUnavailable

_EXPECTED = "expected sqlite:PATH, sqlite::memory: or none"


def open_store(url: str) -> Store:
    """The store that a SPEC names, opened and on the newest schema.

    Args:
        url: `sqlite:PATH`, `sqlite::memory:`, `none`, or empty for `openline.db` in the user's data directory.

    Raises:
        ConfigError: the SPEC is not of that form, or what it names cannot be used.
    """
    if url == "none":
        return NothingStore()
    if not url:
        path = default_path()
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"store.url (--store) is not set, and {path.parent} cannot be made: {error.strerror}; {_EXPECTED}."
            ) from None
        return _open_sqlite(f"sqlite:{path}", path)
    kind, _, rest = url.partition(":")
    if kind in {"postgresql", "postgres"}:
        raise ConfigError(f"store.url (--store) is a {kind}: URL, which this version does not support; {_EXPECTED}.")
    if kind != "sqlite" or not rest:
        raise ConfigError(f"store.url (--store) is '{_without_secrets(url)}'; {_EXPECTED}.")
    return _open_sqlite(url, None if rest == ":memory:" else Path(rest))


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


def _open_sqlite(url: str, path: Path | None) -> SqliteStore:
    try:
        return SqliteStore(path.expanduser() if path else None)
    except (StoreUnavailable, ValueError, RuntimeError) as error:  # a NUL in the path; no home to expand `~` to
        raise ConfigError(
            f"store.url (--store) is '{url}': expected a SQLite file that can be read and written: {error}."
        ) from None


def _without_secrets(url: str) -> str:
    scheme, slashes, _ = url.partition("://")
    return f"{scheme}{slashes}…" if slashes else url
