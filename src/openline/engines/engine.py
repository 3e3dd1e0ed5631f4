"""The seam to whoever answers: a model server elsewhere, or one in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import msgspec

from openline.protocol.context import Context
from openline.protocol.deltas import Delta
from openline.protocol.events import Create


class EngineRequest(msgspec.Struct, frozen=True):
    """One turn, as an engine gets it.

    Attributes:
        create: the client's request, checked; its `input` and `previous_response_id` are in the context already.
        body: the request's JSON as it came, for engines that pass on fields we do not read.
        context: the whole ordered context, this turn's input included.
        model: the name that this upstream knows the model by.
        owner: whose conversation it is; empty where there is one owner only.
    """

    create: Create
    body: str | bytes
    context: Context
    model: str
    owner: str = ""


class Model(msgspec.Struct, frozen=True):
    """A model that an engine serves.

    Attributes:
        created: when, in seconds since 1970; 0 if nobody knows.
        context_window: how many tokens prompt and answer may have together, where the upstream tells.
        known_as: a name that says more than the id: a path, an architecture; empty if there is none.
        images: whether it can look at images, where the upstream tells.
    """

    id: str
    created: int = 0
    owned_by: str = "openline"
    context_window: int | None = None
    known_as: str = ""
    images: bool | None = None


class Generation(Protocol):
    """A request that the engine has read, checked and put into its upstream's form."""

    @property
    def dropped_tools(self) -> Sequence[str]:
        """The types of the tools that this upstream cannot do and that were left out."""
        ...

    @property
    def prefills(self) -> bool:
        """Whether a warm-up is worth running: it fills the upstream's prefix cache, and produces one token."""
        ...

    def stream(self) -> AsyncGenerator[Sequence[Delta], None]:
        """Run it. The first batch, which may be empty, comes when the upstream has accepted.

        A batch holds what one read from the upstream brought, so that it is written
        to the client at once too. Closing the iterator stops the upstream.

        Raises:
            ProtocolError: the upstream refused, failed or fell silent.
        """
        ...


class Engine(Protocol):
    """Who answers."""

    @property
    def name(self) -> str:
        """The upstream's name in the configuration, for logs and errors."""
        ...

    def prepare(self, request: EngineRequest) -> Generation:
        """Put a request into this engine's form; nothing is sent.

        Raises:
            ProtocolError: this engine cannot do what was asked.
        """
        ...

    async def count_tokens(self, request: EngineRequest) -> int:
        """How many tokens the whole prompt has as the model would read it, tools and template included.

        Raises:
            ProtocolError: this engine cannot do what was asked, or its upstream does not count or failed.
        """
        ...

    async def models(self) -> Sequence[Model]:
        """The models it serves now.

        Raises:
            ProtocolError: it cannot be asked.
        """
        ...

    async def close(self) -> None:
        """Give back connections; nothing may be running."""
        ...
