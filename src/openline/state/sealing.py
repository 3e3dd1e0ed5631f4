"""Sealed texts: what a client holds for us and cannot read or alter.

A summary or a model's reasoning goes to the client as `encrypted_content` and comes back with a later request, so
that nothing has to be stored, and any node that has the key can go on.

Source: Responses API reference, "encrypted_content"; docs/adr/0008. AES-GCM: RFC 5116.
"""

from __future__ import annotations

import base64
import logging
import os
import secrets
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from openline.config import ConfigError
from openline.state.opening import default_path

_log: Final = logging.getLogger("openline.store")
_MARK: Final = "oln1."  # whose it is, and in which form
_NONCE_BYTES: Final = 12
_KEY_BYTES: Final = 32


class Unsealable(Exception):  # noqa: N818 - a state of the text
    """It was not sealed with this key for this owner, or was altered."""


class Seal:
    """Seals and opens texts.

    Args:
        key: 32 secret bytes, the same on every node.
    """

    def __init__(self, key: bytes) -> None:
        self._cipher = AESGCM(key)

    def __repr__(self) -> str:
        return "<Seal>"

    @staticmethod
    def is_ours(text: str) -> bool:
        """Whether it claims to be sealed by an Openline."""
        return text.startswith(_MARK)

    def close(self, owner: str, kind: str, text: str) -> str:
        """Seal a text, for one owner and one kind of item."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = self._cipher.encrypt(nonce, text.encode(), _bound_to(owner, kind))
        return _marked(nonce + sealed)

    def open(self, owner: str, kind: str, sealed: str) -> str:
        """The text again.

        Raises:
            Unsealable: another key, owner or kind, or not what was sealed.
        """
        try:
            raw = base64.urlsafe_b64decode(sealed.removeprefix(_MARK).encode())
            if _marked(raw) != sealed:  # what is no base64 is read over
                raise Unsealable
            return self._cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], _bound_to(owner, kind)).decode()
        except (InvalidTag, ValueError):
            raise Unsealable from None


def _marked(raw: bytes) -> str:
    return _MARK + base64.urlsafe_b64encode(raw).decode()


def _bound_to(owner: str, kind: str) -> bytes:
    return f"{kind}\0{owner}".encode()


def open_seal(store_url: str, key_file: str, given: str) -> Seal:
    """The seal of a server: by the key that was given, or in its file.

    The file stands beside a SQLite file, and is made, readable by its user alone, if there is none. Where nothing
    is written, and for a store that others share, a key that was not given lasts as long as the process.

    Args:
        store_url: the store's SPEC.
        key_file: where the key is to be, if not there.
        given: 64 hexadecimal digits, or empty.

    Raises:
        ConfigError: it cannot be read or made, or is no key.
    """
    if given:
        return Seal(_from_hex(given, "OPENLINE_SEALING_KEY"))
    path = Path(key_file) if key_file else _beside(store_url)
    if path is not None:
        return Seal(_read_key(path))
    if store_url != "sqlite::memory:":  # which forgets everything else as well
        _log.warning(
            "the sealing key lasts as long as this process: summaries and reasoning that it seals are unreadable after a "
            "restart, and on other nodes; set OPENLINE_SEALING_KEY (openssl rand -hex 32)"
        )
    return Seal(secrets.token_bytes(_KEY_BYTES))


def _beside(store_url: str) -> Path | None:
    if not store_url:
        return default_path().with_suffix(".key")
    kind, _, rest = store_url.partition(":")
    if kind != "sqlite" or rest == ":memory:":
        return None
    return Path(rest).with_suffix(".key")


def _read_key(path: Path) -> bytes:
    name = f"store.sealing_key_file {path}"
    try:
        path = path.expanduser()
        if not path.exists():
            _make_key(path)
        return _from_hex(path.read_text(encoding="ascii"), name)
    except UnicodeDecodeError:
        return _from_hex("", name)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no such home folder
        reason = error.strerror if isinstance(error, OSError) else error
        remedy = "Give the key as OPENLINE_SEALING_KEY"
        raise ConfigError(f"{name} cannot be read or made: {reason}. {remedy}.") from None


def _make_key(path: Path) -> None:
    """Make the file whole or not at all, so that whoever starts at the same time reads the same key."""
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # with mode 0600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(_KEY_BYTES) + "\n")
            file.flush()
            os.fsync(descriptor)
        with suppress(FileExistsError):
            os.link(unfinished, path)
    finally:
        Path(unfinished).unlink()


def _from_hex(text: str, name: str) -> bytes:
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ConfigError(f"{name} is no key: expected {2 * _KEY_BYTES} hexadecimal digits.")
    return key
