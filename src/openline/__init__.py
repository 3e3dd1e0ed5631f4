"""Openline: an open, self-hosted server for the Responses API with WebSocket mode."""

__version__ = "0.1.0"
