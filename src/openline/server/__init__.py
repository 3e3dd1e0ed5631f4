"""The shells: one ASGI app, a WebSocket, HTTP, and who may come in."""
