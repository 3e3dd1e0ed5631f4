"""Engines out of their settings, and the model server that already runs on this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from openline.config import UpstreamSettings
from openline.engines.chat import ChatEngine
from openline.engines.engine import Engine
from openline.engines.gguf import GgufEngine
from openline.engines.responses import ResponsesEngine
from openline.engines.responses_socket import ResponsesSocketEngine
from openline.engines.router import Router, Upstream
from openline.engines.scripted import ScriptedEngine
from openline.engines.tiny import URL as TINY_URL
from openline.engines.tiny import TinyEngine
from openline.protocol.errors import ProtocolError

# Where model servers listen by default, in the order in which they are tried.
USUAL_PORTS: Final = {"vLLM": 8000, "SGLang": 30000, "llama.cpp": 8080, "Ollama": 11434, "LM Studio": 1234}
_LOOK_SECONDS_MAX: Final = 1.0


def open_engine(settings: UpstreamSettings, *, show_detail: bool) -> Engine:
    """The engine for one upstream; nothing is asked of it yet, and no model is loaded.

    Args:
        settings: of the upstream.
        show_detail: whether clients may see the upstream's own words on errors.

    Raises:
        ConfigError: a file that it names cannot be read, or the tiny model not be written.
    """
    match settings.kind:
        case "chat":
            return ChatEngine(settings, show_detail=show_detail)
        case "responses":
            return ResponsesEngine(settings, show_detail=show_detail)
        case "responses+ws":
            return ResponsesSocketEngine(settings, show_detail=show_detail)
        case "gguf":
            make = TinyEngine if settings.url == TINY_URL else GgufEngine
            return make(settings, show_detail=show_detail)
        case "scripted":
            return ScriptedEngine(settings)


def open_router(upstreams: Sequence[UpstreamSettings], *, show_detail: bool) -> Router:
    """Every upstream's engine, in order.

    Raises:
        ConfigError: as `open_engine`.
    """
    return Router([Upstream(settings, open_engine(settings, show_detail=show_detail)) for settings in upstreams])


def load_models(router: Router) -> None:
    """Load the models that run in this process; nothing else runs until they are there.

    Raises:
        ConfigError: one of them cannot be loaded.
    """
    for upstream in router.upstreams:
        load_model(upstream.engine)


def load_model(engine: Engine) -> None:
    """Load an engine's model, if that runs in this process.

    Raises:
        ConfigError: it cannot be loaded.
    """
    if isinstance(engine, GgufEngine | TinyEngine):
        engine.load()


async def find_local_upstream() -> tuple[str, UpstreamSettings] | None:
    """The first model server that answers on a usual loopback port, and what it usually is there."""
    found = await asyncio.gather(*(_look(port) for port in USUAL_PORTS.values()))
    for (name, port), answers in zip(USUAL_PORTS.items(), found, strict=True):
        if answers:
            return name, _at(port)
    return None


def _at(port: int) -> UpstreamSettings:
    # Without a key: what listens there may be anybody's.
    return UpstreamSettings(kind="chat", url=f"http://127.0.0.1:{port}/v1", api_key_env="")


async def _look(port: int) -> bool:
    engine = open_engine(_at(port), show_detail=False)
    try:
        async with asyncio.timeout(_LOOK_SECONDS_MAX):
            return len(await engine.models()) > 0
    except (ProtocolError, TimeoutError):
        return False
    finally:
        await engine.close()
