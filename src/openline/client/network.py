"""Whose certificates are trusted, and which proxy stands between: the same for sessions and for upstreams."""

from __future__ import annotations

import ssl
from urllib.request import getproxies_environment, proxy_bypass

from yarl import URL

from openline.config import ConfigError, is_loopback


def read_trust(ca_file: str, field: str) -> ssl.SSLContext | bool:
    """Whose certificates are trusted: the system's, or only those of `ca_file`.

    Args:
        field: the setting that names the file, for the error.

    Raises:
        ConfigError: the file cannot be read.
    """
    if not ca_file:
        return True
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one too
        reason = error.strerror or "not a file of certificates in PEM"
        raise ConfigError(f"{field} is '{ca_file}': {reason}.") from None


def proxy_of(url: str) -> URL | None:
    """The proxy that the environment names for a server; never one for loopback.

    aiohttp's own `trust_env` reads the environment and `.netrc` again for every request, in a thread.

    Raises:
        ConfigError: what the environment names is not a URL.
    """
    target = URL(url)
    found = getproxies_environment().get(target.scheme)
    if found is None or is_loopback(target.host or "") or proxy_bypass(target.authority):
        return None
    try:
        return URL(found if "://" in found else f"http://{found}")
    except ValueError:  # the value stays untold: a proxy's URL may hold its password
        message = f"the environment's {target.scheme}_proxy is not a URL: expected http://HOST:PORT."
        raise ConfigError(message) from None
