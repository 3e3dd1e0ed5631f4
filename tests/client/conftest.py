"""Servers for the tests of this folder: the real one, as the server's own tests start it."""

from server.conftest import hand, played, server, start

__all__ = ["hand", "played", "server", "start"]
