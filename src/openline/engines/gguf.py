"""A model file as an engine: llama.cpp in this process, spoken to as the Chat Completions server that it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from openline.config import ConfigError, UpstreamSettings
from openline.engines.chat import ChatEngine, ChatGeneration
from openline.engines.engine import EngineRequest, Generation, Model
from openline.engines.gguf_header import BadGguf, Header, read_header
from openline.engines.llama import Llama, LlamaFailed, NotInstalled, Options
from openline.engines.room import Room
from openline.engines.slots import Slots, Wanted, wanted
from openline.protocol.deltas import CallStarted, Delta
from openline.protocol.errors import ProtocolError

INSTALL: Final = "Install it: pip install 'openline[local]'"


class _PrivateSettings(UpstreamSettings, frozen=True):
    """An upstream in this process, whose key only we know."""

    private_key: str = ""

    @property
    def api_key(self) -> str:
        """The key that it was started with."""
        return self.private_key


class GgufEngine:
    """A GGUF model.

    The file is looked at when the engine is made, and loaded by `load`, or else with the first turn.

    Args:
        settings: `url` is the file's path.
        show_detail: whether clients may see llama.cpp's own words on errors.
        spec: how the user named it; `gguf:` and the path if None.
        seed: of the sampling, where a request names none.
        threads: of the CPU; None is all cores.

    Raises:
        ConfigError: there is no such file, or it is no GGUF file.
    """

    def __init__(
        self,
        settings: UpstreamSettings,
        *,
        show_detail: bool,
        spec: str | None = None,
        seed: int | None = None,
        threads: int | None = None,
    ) -> None:
        self.name = settings.label
        self._settings = settings
        self._spec = spec or f"gguf:{settings.url}"
        self._path = self._find_path()
        self._show_detail = show_detail
        self._seed = seed
        self._threads = threads
        self._slots = Slots(settings.slots)
        self._loaded: tuple[Llama, ChatEngine] | None = None
        self._header = self._read_header()
        self._room = Room(self._window)

    def __repr__(self) -> str:
        return f"<GgufEngine {self.name} {self._loaded[0] if self._loaded else 'not loaded'} {self._slots!r}>"

    def load(self) -> None:
        """Load the model, once; this takes seconds, in which nothing else runs.

        Raises:
            ConfigError: `xllamacpp` is not installed, or the model cannot be loaded.
        """
        if self._loaded is not None:
            return
        settings, path = self._settings, self._path
        options = Options(
            path=str(path),
            alias=path.stem,
            context_tokens=settings.context_tokens,
            slots=settings.slots,
            gpu_layers=settings.gpu_layers,
            threads=self._threads,
            seed=self._seed,
        )
        try:
            llama = Llama(options)
        except NotInstalled as error:
            raise ConfigError(f"--upstream {self._spec}: {error}. {INSTALL}") from None
        except LlamaFailed as error:
            remedy = "Is the file complete, and of a kind that this llama.cpp knows?"
            raise ConfigError(f"--upstream {self._spec}: the model cannot be loaded: {error}. {remedy}") from None
        self._loaded = llama, ChatEngine(_private(settings, llama), show_detail=self._show_detail)

    def prepare(self, request: EngineRequest, *, calls: bool = False) -> Generation:
        """The request as a Chat Completions body, for the slot that holds its conversation.

        Args:
            calls: what it generates is a call, although it may not look so here.

        Raises:
            ProtocolError: something in it has no form there, or the model cannot be loaded.
        """
        chat = self._chat()
        count = partial(chat.count_tokens, request)
        return _SlotGeneration(chat.prepare(request), self._slots, wanted(request), self._room, count, calls=calls)

    async def count_tokens(self, request: EngineRequest) -> int:
        """What llama.cpp counts.

        Raises:
            ProtocolError: as `prepare`, or its server failed.
        """
        return await self._chat().count_tokens(request)

    async def models(self) -> Sequence[Model]:
        """The model, by the file's name.

        Raises:
            ProtocolError: its server does not answer.
        """
        if self._loaded is not None:
            return await self._loaded[1].models()
        return [Model(self._path.stem, context_window=self._window, known_as=self._header.architecture)]

    async def close(self) -> None:
        """Stop it and free the model."""
        if self._loaded is not None:
            llama, chat = self._loaded
            self._loaded = None
            await chat.close()
            llama.stop()

    @property
    def _window(self) -> int:
        """The tokens of context that llama.cpp will have."""
        wanted_tokens = self._settings.context_tokens
        return min(wanted_tokens, self._header.context_tokens or wanted_tokens)

    def _chat(self) -> ChatEngine:
        try:
            self.load()
        except ConfigError as error:
            raise ProtocolError("upstream_unreachable", str(error)) from None
        assert self._loaded is not None, "load has made it or raised"
        return self._loaded[1]

    def _find_path(self) -> Path:
        try:
            return Path(self._settings.url).expanduser()  # behind `gguf:` no shell reads a `~`
        except RuntimeError:
            raise ConfigError(f"--upstream {self._spec}: there is no such home folder.") from None

    def _read_header(self) -> Header:
        """What the file says of itself: whether it is there and a model at all, before anything is started."""
        try:
            return read_header(self._path)
        except OSError as error:
            raise ConfigError(f"--upstream {self._spec}: {error.strerror}. Expected a GGUF model file.") from None
        except BadGguf as error:
            raise ConfigError(f"--upstream {self._spec}: {error}. Expected a GGUF model file.") from None


class _SlotGeneration:
    """A generation that runs when there is room for it, on a slot of its own where one is free."""

    def __init__(
        self,
        chat: ChatGeneration,
        slots: Slots,
        turn: Wanted,
        room: Room,
        count: Callable[[], Awaitable[int]],
        *,
        calls: bool,
    ) -> None:
        self._chat = chat
        self._slots = slots
        self._turn = turn
        self._room = room
        self._count = count
        self._calls = calls
        self.dropped_tools = chat.dropped_tools
        self.prefills = chat.prefills

    async def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        """As `Generation`."""
        async with self._room.hold(self._count), aclosing(self._on_slot()) as batches:
            async for batch in batches:
                yield batch

    async def _on_slot(self) -> AsyncGenerator[Sequence[Delta], None]:
        now = asyncio.get_running_loop().time
        slot = self._slots.take(self._turn, now())
        if slot is not None:
            self._chat.body = b'%b,"id_slot":%d}' % (self._chat.body[:-1], slot)
        called = self._calls
        try:
            async with aclosing(self._chat.stream()) as batches:
                async for batch in batches:
                    called = called or any(isinstance(delta, CallStarted) for delta in batch)
                    yield batch
        finally:
            if slot is not None:
                self._slots.release(slot, self._turn, now(), called=called)


def _private(settings: UpstreamSettings, llama: Llama) -> UpstreamSettings:
    """How its server is spoken to; what is not about where it is, is as configured."""
    fields: dict[str, Any] = {
        **msgspec.structs.asdict(settings),
        "kind": "chat",
        "url": f"{llama.url}/v1",
        "name": settings.label,
        "profile": "llama.cpp",
        "ca_file": "",
        "private_key": llama.key,
    }
    return _PrivateSettings(**fields)
