"""The tiny model's file."""

from pathlib import Path

import pytest

from local_engine import needs_local
from openline.engines import tiny_model
from openline.engines.gguf_header import Header, read_header
from openline.engines.tiny_model import CONTEXT_TOKENS, cache_folder, tiny_model_path, write_tiny_model


@needs_local
def test_it_is_the_same_in_every_run(tmp_path):
    """Whoever has it has the same one, so that figures compare."""
    for name in ("a", "b"):
        write_tiny_model(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_header(tmp_path / "a") == Header("llama", CONTEXT_TOKENS)
    assert 5_000_000 < (tmp_path / "a").stat().st_size < 15_000_000


@needs_local
def test_it_is_written_once(tmp_path, monkeypatch):
    """The next start finds it, under a name that says which version it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tiny_model_path()
    assert path == tmp_path / "openline" / f"tiny-{tiny_model.VERSION}.gguf"
    written = path.stat().st_mtime_ns
    assert tiny_model_path().stat().st_mtime_ns == written


@needs_local
def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    """Two starts at once, or one that is stopped, never leave half a file under its name."""
    monkeypatch.setattr(tiny_model, "_add_weights", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_tiny_model(tmp_path / "tiny.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("platform", "environ", "folder"),
    [
        ("linux", {}, "~/.cache/openline"),
        ("linux", {"XDG_CACHE_HOME": "/c"}, "/c/openline"),
        ("darwin", {}, "~/Library/Caches/openline"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/openline/cache"),
        ("win32", {}, "~/AppData/Local/openline/cache"),
    ],
)
def test_the_cache_is_where_the_system_wants_it(monkeypatch, platform, environ, folder):
    """XDG Base Directory Specification, and its like elsewhere."""
    monkeypatch.setattr(tiny_model.sys, "platform", platform)
    assert cache_folder(environ) == Path(folder).expanduser()
