"""Which engine answers for a model name."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Final

import msgspec

from openline.config import UpstreamSettings
from openline.engines.engine import Engine, Model
from openline.protocol.errors import ProtocolError

# Codex and load balancers ask while somebody waits; a server that can answer a turn answers this at once.
_ASK_SECONDS_MAX: Final = 5.0


class Upstream(msgspec.Struct, frozen=True):
    """An engine and the settings it was made from."""

    settings: UpstreamSettings
    engine: Engine


def offered(settings: UpstreamSettings, served: Sequence[Model]) -> list[Model]:
    """What may be asked of an upstream that serves these: aliases first, then what its patterns let through."""
    by_id = {model.id: model for model in served}
    aliases = [
        msgspec.structs.replace(by_id.get(model_id, Model(model_id, owned_by=settings.label)), id=alias)
        for alias, model_id in settings.aliases.items()
    ]
    let_through = (model for model in served if any(fnmatchcase(model.id, pattern) for pattern in settings.models))
    return [*aliases, *let_through]


class Router:
    """The upstreams, in the order of the configuration; the first that takes a model gets it."""

    def __init__(self, upstreams: Sequence[Upstream]) -> None:
        self.upstreams = upstreams

    def __repr__(self) -> str:
        return f"<Router {', '.join(upstream.engine.name for upstream in self.upstreams)}>"

    def route(self, model: str) -> tuple[Engine, str]:
        """The engine for a model, and the name it knows the model by; aliases come before patterns.

        Raises:
            ProtocolError: no upstream takes it.
        """
        for upstream in self.upstreams:
            if model in upstream.settings.aliases:
                return upstream.engine, upstream.settings.aliases[model]
        for upstream in self.upstreams:
            if any(fnmatchcase(model, pattern) for pattern in upstream.settings.models):
                return upstream.engine, model
        raise ProtocolError("model_not_found", f"The requested model '{model}' does not exist.", param="model")

    async def models(self) -> list[Model]:
        """What may be asked for: aliases first, then what the upstreams serve and their patterns let through.

        An upstream that cannot be asked now adds nothing.
        """
        found: dict[str, Model] = {}
        for upstream, served in zip(self.upstreams, await self._ask_all(), strict=True):
            for model in offered(upstream.settings, served if isinstance(served, Sequence) else ()):
                found.setdefault(model.id, model)
        return list(found.values())

    async def check(self) -> dict[str, str | None]:
        """For each upstream, by name: None if it answers, else what is wrong."""
        found: dict[str, str | None] = {}
        for upstream, served in zip(self.upstreams, await self._ask_all(), strict=True):
            name = upstream.engine.name
            # Of two that share a name, on one host for instance, neither may hide the other's fault.
            found[name] = found.get(name) or (served.message if isinstance(served, ProtocolError) else None)
        return found

    async def _ask_all(self) -> list[Sequence[Model] | ProtocolError]:
        """What each upstream serves, or why it does not answer; asked at once, so that a silent one holds up none."""

        async def ask(engine: Engine) -> Sequence[Model] | ProtocolError:
            try:
                async with asyncio.timeout(_ASK_SECONDS_MAX):
                    return await engine.models()
            except ProtocolError as error:
                return error
            except TimeoutError:
                return ProtocolError(
                    "upstream_timeout", f"Upstream '{engine.name}' did not say in time what it serves."
                )

        return await asyncio.gather(*(ask(upstream.engine) for upstream in self.upstreams))

    async def close(self) -> None:
        """Close every engine."""
        for upstream in self.upstreams:
            await upstream.engine.close()
