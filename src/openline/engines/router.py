"""Which engine answers for a model name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import msgspec

from openline.config import UpstreamSettings
from openline.engines.engine import Engine, Model
from openline.protocol.errors import ProtocolError


class Upstream(msgspec.Struct, frozen=True):
    """An engine and the settings it was made from."""

    settings: UpstreamSettings
    engine: Engine


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
        for upstream in self.upstreams:
            for alias in upstream.settings.aliases:
                found.setdefault(alias, Model(alias, owned_by=upstream.engine.name))
            try:
                served = await upstream.engine.models()
            except ProtocolError:
                continue
            for model in served:
                if any(fnmatchcase(model.id, pattern) for pattern in upstream.settings.models):
                    found.setdefault(model.id, model)
        return list(found.values())

    async def check(self) -> dict[str, str | None]:
        """For each upstream, by name: None if it answers, else what is wrong."""
        found: dict[str, str | None] = {}
        for upstream in self.upstreams:
            try:
                await upstream.engine.models()
            except ProtocolError as error:
                found[upstream.engine.name] = error.message
            else:
                found[upstream.engine.name] = None
        return found

    async def close(self) -> None:
        """Close every engine."""
        for upstream in self.upstreams:
            await upstream.engine.close()
