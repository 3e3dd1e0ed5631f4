"""What a conversation has been: enough to go on with it by its last id, and to send all of it again.

Items are kept as the JSON they go out as: what a full resend costs is a join, and what they take is counted in bytes.

Source: Responses API reference, "Items"; guide "Conversation state".
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple, Protocol, runtime_checkable

import msgspec

from openline.client.errors import OpenlineError
from openline.client.settings import ClientSettings
from openline.client.wire import Item, Response
from openline.protocol.events import user_message
from openline.protocol.items import OUTPUT_OF_CALL

_encoder: Final = msgspec.json.Encoder()
_item: Final = msgspec.json.Decoder(dict[str, Any])
_SYSTEM_ROLES: Final = frozenset({"system", "developer"})
_SYSTEM_ITEMS: Final = frozenset({"additional_tools", "configuration_update"})


@runtime_checkable
class _Model(Protocol):
    """An object of the OpenAI SDK's types, or any other of pydantic's."""

    def model_dump(self, *, exclude_unset: bool = ..., mode: str = ...) -> dict[str, Any]: ...


Input = str | Iterable["Mapping[str, Any] | _Model | msgspec.Raw"]


class Everything(NamedTuple):
    """A conversation as a create without a memory at the other end needs it.

    Attributes:
        root: the response before its first item, if it began from one that only the server knows.
        items: the inside of an `input` array, as JSON.
    """

    root: str | None
    items: bytes


class Past(Protocol):
    """What a turn goes on from. A session keeps its own, a `History`; a caller that keeps one itself passes it."""

    @property
    def response_id(self) -> str | None:
        """The response to continue; None if there is none, or if it cannot be continued by its id."""
        ...

    @property
    def is_stored(self) -> bool:
        """Whether the server stored that response: then its id is good on every connection."""
        ...

    def everything(self) -> Everything:
        """All of it, the response to continue included.

        Raises:
            OpenlineError: it cannot be sent again, and why.
        """
        ...


class History:
    """A conversation, turn by turn.

    Args:
        items: what was said before, inputs and outputs in order, if the conversation did not begin here.
        response_id: the response that the last of them belongs to, if it can be continued.
        is_stored: whether the server stored that response.
        bytes_max: of the items; above it they are given up, and the conversation goes on by its ids alone.
    """

    def __init__(
        self,
        items: Input = (),
        *,
        response_id: str | None = None,
        is_stored: bool = False,
        bytes_max: int = ClientSettings().history_bytes_max,
    ) -> None:
        self.response_id = response_id
        self.is_stored = is_stored
        self._root: str | None = None
        self._bytes_max = bytes_max
        self._bytes = 0
        self._is_whole = True
        self._items: list[bytes] = []
        self._append(encode_items(items))

    def __repr__(self) -> str:
        whole = "" if self._is_whole else " not whole"
        return f"<History items={len(self._items)} bytes={self._bytes} response={self.response_id}{whole}>"

    def __len__(self) -> int:
        return len(self._items)

    @property
    def is_empty(self) -> bool:
        """Whether nothing was said yet."""
        return not self._items and self._root is None and self.response_id is None

    def items(self) -> list[Item]:
        """Every item, oldest first, in the form in which it would be sent again."""
        return [_item.decode(item) for item in self._items]

    def everything(self) -> Everything:
        """As `Past`."""
        if not self._is_whole:
            message = (
                f"The server has lost the conversation, and it is larger than history_bytes_max = {self._bytes_max}, so "
                "it is not here either: raise the bound, or let it be summed up in time with context_management=."
            )
            raise OpenlineError(message)
        return Everything(self._root, b",".join(self._items))

    def add(self, asked: Input, response: Response, *, is_stored: bool | None = None) -> None:
        """A turn has ended, completed or incomplete.

        Args:
            asked: the input of its create, without what stood before.
            response: as its terminal event has it.
            is_stored: whether the server stored it; None takes the response's own word.

        Source: guide "Conversation state": a context is the parent's input, its output, then the input.
        """
        output: list[Item] = response.get("output") or []
        cut_calls = [item for item in output if _is_cut_call(item)]
        summary = next((at for at in range(len(output) - 1, -1, -1) if output[at].get("type") == "compaction"), None)
        self._append(encode_items(asked))
        if summary is not None:  # what stands before it is in it; only what the system said stays
            self._keep([item for item in self._items if _is_system(_item.decode(item))])
            self._root, self._is_whole = None, True
        self._append(_resendable(output[summary or 0 :]))
        # A call that was cut in its arguments cannot be answered, and while it stands there nothing else can be said.
        self.response_id = response.get("id") if not cut_calls else None
        self.is_stored = response.get("store") is not False if is_stored is None else is_stored

    def restart(self, root: str | None = None) -> None:
        """Begin anew, behind a response that only the server knows, or behind nothing."""
        self._keep([])
        self._is_whole = True
        self._root = self.response_id = root
        self.is_stored = root is not None

    def _keep(self, items: list[bytes]) -> None:
        self._items, self._bytes = items, sum(map(len, items))

    def _append(self, items: Iterable[bytes]) -> None:
        if not self._is_whole:
            return
        more = list(items)
        self._items += more
        self._bytes += sum(map(len, more))
        if self._bytes > self._bytes_max:
            self._keep([])
            self._is_whole = False


def encode_items(items: Input) -> list[bytes]:
    """An input's items as JSON; a plain string is one user message.

    Raises:
        OpenlineError: one of them is no item.
    """
    if isinstance(items, str):
        return [user_message(items).raw]
    return [_encoded(item, index) for index, item in enumerate(items)]


def _encoded(item: object, index: int) -> bytes:
    if isinstance(item, msgspec.Raw):
        return bytes(item)
    if isinstance(item, _Model):
        # Without what was never set: servers refuse some fields that are null.
        item = item.model_dump(exclude_unset=True, mode="json")
    if not isinstance(item, Mapping):
        raise OpenlineError(
            f"input[{index}] is a {type(item).__name__}: expected a dict, or an object of the SDK's types."
        )
    return _encoder.encode(item)


def _resendable(output: Iterable[Item]) -> list[bytes]:
    """Output items as servers take them for input.

    Reasoning that has neither content nor anything sealed is only an id, behind which a server that stored nothing finds
    nothing; without it the ids of the calls behind it would point to it in vain.
    """
    items: list[bytes] = []
    without_reasoning = False
    for item in output:
        if _is_bare_reasoning(item):
            without_reasoning = True
        elif _is_cut_call(item):
            continue
        elif without_reasoning and item.get("type") in OUTPUT_OF_CALL and item.get("type") != "local_shell_call":
            items.append(_encoder.encode({name: value for name, value in item.items() if name != "id"}))
        else:
            items.append(_encoder.encode(item))
    return items


def _is_bare_reasoning(item: Item) -> bool:
    return item.get("type") == "reasoning" and not item.get("encrypted_content") and not item.get("content")


def _is_cut_call(item: Item) -> bool:
    return item.get("type") in OUTPUT_OF_CALL and item.get("status") == "incomplete"


def _is_system(item: Item) -> bool:
    return item.get("type") in _SYSTEM_ITEMS or item.get("role") in _SYSTEM_ROLES
