"""What an upstream tells of itself: which server it is, which models it serves, how much they can read.

Pure readers of its answers, and `Inquiry`, which asks. `GET /models` has to be answered; the
rest is asked beside the API, at the root of the same origin, and may fail.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from openline.config import ServerKind, UpstreamSettings
from openline.engines.engine import Model
from openline.engines.upstream import Listing, Upstream
from openline.protocol.errors import ProtocolError

logger = logging.getLogger("openline.about")

MODELS_SECONDS_MAX: Final = 5.0  # how old an answer may be: agents ask at each start, balancers every few seconds
_AGAIN_SECONDS: Final = 30.0  # how soon a turn lets ask again: Ollama knows a model's window once it is loaded
_SHOWN_MAX: Final = 16  # models whose details are asked for one by one
_SHOWN_KEPT_MAX: Final = 256

_HOSTS: Final[Mapping[str, ServerKind]] = {
    "api.openai.com": "openai",
    "api.mistral.ai": "mistral",
    "api.groq.com": "groq",
}
# `owned_by` of the rows. Gateways say "openai" of everything, so that says nothing.
_OWNERS: Final[Mapping[str, ServerKind]] = {
    "vllm": "vllm",
    "sglang": "sglang",
    "llamacpp": "llama.cpp",
    "library": "ollama",
    "organization_owner": "lmstudio",
    "organization-owner": "lmstudio",
    "mistralai": "mistral",
}
# Where nothing else tells: a path at the root, and the field that only this server answers with there.
_PROBES: Final[tuple[tuple[str, str, ServerKind], ...]] = (
    ("/props", "default_generation_settings", "llama.cpp"),
    ("/api/version", "version", "ollama"),
    ("/get_model_info", "model_path", "sglang"),
    ("/version", "version", "vllm"),
)
# What rows call the context window: vLLM and SGLang, OpenRouter, Groq, Mistral.
_WINDOW_FIELDS: Final = ("max_model_len", "context_length", "context_window", "max_context_length")
_NUM_CTX: Final = re.compile(r"^\s*num_ctx\s+(\d{1,9})\s*$", re.MULTILINE)


class About(msgspec.Struct, frozen=True):
    """What is known of an upstream; its models by their ids, in its order."""

    kind: ServerKind = "generic"
    version: str = ""
    models: Mapping[str, Model] = {}

    def model(self, model_id: str) -> Model:
        """What is known of a model; one that is not listed is known by its name alone."""
        tagged = f"{model_id}:latest"  # Ollama takes a name without its tag
        return self.models.get(model_id) or self.models.get(tagged) or Model(model_id)


class Inquiry:
    """Asks an upstream what it is, at most every few seconds, one at a time, and remembers it."""

    def __init__(self, upstream: Upstream, settings: UpstreamSettings) -> None:
        self._upstream = upstream
        self._settings = settings
        self._asking: asyncio.Task[About] | None = None
        self._answered_at = float("-inf")
        self._began_at = float("-inf")
        self._kind: ServerKind | None = settings.profile or _HOSTS.get(urlsplit(settings.url).hostname or "")
        self._shown: dict[str, Mapping[str, Any]] = {}
        self.about = About(kind=self._kind or "generic")

    def __repr__(self) -> str:
        return f"<Inquiry {self.about.kind} models={len(self.about.models)}>"

    async def ask(self) -> About:
        """What it is now, or was a few seconds ago.

        Raises:
            ProtocolError: it cannot be asked for its models.
        """
        if asyncio.get_running_loop().time() - self._answered_at < MODELS_SECONDS_MAX:
            return self.about
        return await asyncio.shield(self._start())

    def begin(self) -> None:
        """Ask in the background, so that a later turn knows; a turn neither waits for it nor fails with it."""
        now = asyncio.get_running_loop().time()
        if now - self._began_at >= _AGAIN_SECONDS:
            self._began_at = now
            self._start()

    async def close(self) -> None:
        """Stop asking."""
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    def _start(self) -> asyncio.Task[About]:
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(_taken)
        return self._asking

    async def _ask(self) -> About:
        self._began_at = asyncio.get_running_loop().time()
        try:
            listing = await self._upstream.get_models()
            models = read_models(listing.body)
        except msgspec.DecodeError:
            self._upstream.no_models()
        self._kind = self._settings.profile or kind_of(listing, models) or self._kind or await self._probe()
        version, models = await self._details(self._kind, models)
        self.about = About(self._kind, version, {model.id: model for model in models})
        self._answered_at = asyncio.get_running_loop().time()
        return self.about

    async def _probe(self) -> ServerKind:
        answers = await asyncio.gather(*(self._upstream.look(path) for path, _, _ in _PROBES))
        for (_, field, kind), answer in zip(_PROBES, answers, strict=True):
            if field in answer:
                return kind
        return "generic"

    async def _details(self, kind: ServerKind, models: list[Model]) -> tuple[str, list[Model]]:
        """Its version, and the models with what its own endpoints tell of them."""
        look = self._upstream.look
        match kind:
            case "vllm":
                return _text((await look("/version")).get("version")), models
            case "llama.cpp":
                props = await look("/props")
                return _text(props.get("build_info")), with_props(models, props)
            case "lmstudio":
                return "", with_lmstudio(models, await look("/api/v0/models"))
            case "ollama":
                version, loaded, shown = await asyncio.gather(look("/api/version"), look("/api/ps"), self._show(models))
                return _text(version.get("version")), with_ollama(models, loaded, shown)
            case _:
                return "", models

    async def _show(self, models: Sequence[Model]) -> dict[str, Mapping[str, Any]]:
        """Ollama's details of its models; they change with the model's date only."""
        keys = {model.id: f"{model.id} {model.created}" for model in models[:_SHOWN_MAX]}
        missing = [model_id for model_id, key in keys.items() if key not in self._shown]
        bodies = (msgspec.json.encode({"model": model_id}) for model_id in missing)
        answers = await asyncio.gather(*(self._upstream.look("/api/show", body) for body in bodies))
        if len(self._shown) > _SHOWN_KEPT_MAX:
            self._shown.clear()
        # Of an answer of many kilobytes only this is of use.
        used = ("parameters", "details", "capabilities")
        for model_id, answer in zip(missing, answers, strict=True):
            self._shown[keys[model_id]] = {name: answer[name] for name in used if name in answer}
        return {model_id: self._shown.get(key, {}) for model_id, key in keys.items()}


def _taken(task: asyncio.Task[About]) -> None:
    """Nobody may be waiting for it, and an upstream that fails is no news then; a defect of ours is."""
    error = None if task.cancelled() else task.exception()
    if error is not None and not isinstance(error, ProtocolError):
        logger.error("asking an upstream about itself failed", exc_info=error)


# Readers of its answers.


class _Row(msgspec.Struct):
    id: str
    created: object = None
    owned_by: object = None
    root: object = None
    max_model_len: object = None
    context_length: object = None
    context_window: object = None
    max_context_length: object = None


class _List(msgspec.Struct):
    data: list[_Row]


def read_models(body: bytes) -> list[Model]:
    """The body of `GET /models`.

    Raises:
        msgspec.DecodeError: it is not a list of models.
    """
    try:
        rows = msgspec.json.decode(body, type=_List | list[_Row])
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None
    return [
        Model(
            row.id,
            created=row.created if isinstance(row.created, int) else 0,
            owned_by=_text(row.owned_by) or "openline",
            context_window=_first_count(getattr(row, name) for name in _WINDOW_FIELDS),
            known_as=_text(row.root),
        )
        for row in (rows.data if isinstance(rows, _List) else rows)
    ]


def kind_of(listing: Listing, models: Sequence[Model]) -> ServerKind | None:
    """Which server lists models like that."""
    if listing.server.lower().startswith("llama.cpp"):
        return "llama.cpp"
    return next((_OWNERS[model.owned_by] for model in models if model.owned_by in _OWNERS), None)


def with_props(models: Sequence[Model], props: Mapping[str, Any]) -> list[Model]:
    """What llama.cpp's `/props` tell: `n_ctx` is the window of one slot; a server of several models tells of none.

    Source: llama.cpp, tools/server/README.md, "GET /props".
    """
    if len(models) != 1:
        return list(models)
    window = _first_count([_table(props.get("default_generation_settings")).get("n_ctx")])
    vision = _table(props.get("modalities")).get("vision")
    path = _text(props.get("model_path"))
    return [_known(models[0], window, path, vision if isinstance(vision, bool) else None)]


def with_lmstudio(models: Sequence[Model], listed: Mapping[str, Any]) -> list[Model]:
    """What LM Studio's own list tells; the window is that of the loaded model, not what it could be.

    Source: LM Studio, REST API v0, "GET /api/v0/models".
    """
    rows = {row.get("id"): row for row in _tables(listed.get("data"))}
    out: list[Model] = []
    for model in models:
        row = rows.get(model.id, {})
        window = _first_count([row.get("loaded_context_length")])
        images = row["type"] == "vlm" if "type" in row else None
        out.append(_known(model, window, _text(row.get("arch")), images))
    return out


def with_ollama(
    models: Sequence[Model], loaded: Mapping[str, Any], shown: Mapping[str, Mapping[str, Any]]
) -> list[Model]:
    """What Ollama tells: the window of a loaded model, else the one that its Modelfile sets.

    What `/api/show` calls the context length is what the model could read, not what it gets: that depends on
    the machine, 4096 on most.

    Source: Ollama, docs/api.md, "List running models"; docs/context-length.mdx; ollama/ollama#17889.
    """
    running = {row.get("name"): row.get("context_length") for row in _tables(loaded.get("models"))}
    out: list[Model] = []
    for model in models:
        details = shown.get(model.id, {})
        match = _NUM_CTX.search(_text(details.get("parameters")))
        window = _first_count([running.get(model.id), int(match[1]) if match else None])
        capabilities = details.get("capabilities")
        images = "vision" in capabilities if isinstance(capabilities, list) else None
        out.append(_known(model, window, _text(_table(details.get("details")).get("family")), images))
    return out


def _known(model: Model, window: int | None, known_as: str, images: bool | None) -> Model:
    return msgspec.structs.replace(
        model,
        context_window=window or model.context_window,
        known_as=known_as or model.known_as,
        images=images if images is not None else model.images,
    )


def _first_count(values: Iterable[object]) -> int | None:
    counts = (value for value in values if isinstance(value, int) and not isinstance(value, bool))
    return next((count for count in counts if 0 < count < 1 << 40), None)


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _tables(value: object) -> list[dict[str, Any]]:
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []  # pyright: ignore[reportUnknownVariableType]
