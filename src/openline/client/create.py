"""One create of a session, and the two forms it can go out in: what is new, or everything.

Source: WebSocket mode guide, "response.create"; Responses API reference, "Create a response".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from openline.client.errors import OpenlineError
from openline.client.history import Past
from openline.client.settings import OnLost

_NOT_OURS: Final = {
    "stream_id": "a session has one lane: open a session for each conversation",
    "starting_after": "a session resumes by itself",
}


class Body(msgspec.Struct, frozen=True):
    """A create as it was built for one connection; sent again it is the same create.

    Attributes:
        fields: without those that only say how it travels.
        is_whole: it brings all that the session has, and so cannot be made to bring more.
    """

    fields: dict[str, Any]
    is_whole: bool

    def frame(self, key: str | None, after: int | None = None) -> bytes:
        """As a `response.create`.

        Args:
            key: the idempotency key, for a server that knows it.
            after: the `sequence_number` after which the turn is to be gone on with.
        """
        travel: dict[str, Any] = {"type": "response.create"}
        if key is not None:
            travel["idempotency_key"] = key
        if after is not None:
            travel["starting_after"] = after
        return encode(travel | self.fields)

    def post(self) -> bytes:
        """As the body of a `POST`."""
        return encode(self.fields | {"stream": True})


class Create(msgspec.Struct, frozen=True):
    """What the app asks for.

    Attributes:
        fields: everything but the input and what it continues.
        asked: the input's items, each as JSON.
        past: what it goes on from.
        key: the idempotency key.
        may_be_known: the key may be a turn's that was sent before, in another form, by this process or another.
        loops: it is one of several turns, so that a socket pays.
    """

    fields: Mapping[str, Any]
    asked: Sequence[bytes]
    past: Past
    key: str
    may_be_known: bool
    on_lost: OnLost
    loops: bool

    @property
    def in_background(self) -> bool:
        """Whether the turn runs on without a connection, on any server."""
        return self.fields.get("background") is True

    @property
    def is_stored(self) -> bool:
        """Whether the server is to keep the response; it does unless told otherwise."""
        return self.fields.get("store") is not False

    def body(self, holds: str | None, *, whole: bool = False) -> Body:
        """Its form for a connection.

        Args:
            holds: the response that the connection's memory holds at the other end.
            whole: the server has said that it does not know the parent.

        Raises:
            OpenlineError: everything is needed, and is not there.
        """
        past = self.past
        known = past.response_id is not None and (past.is_stored or past.response_id == holds)
        if known and not whole:
            return self._body(past.response_id, b"", is_whole=False)
        root, items = past.everything()
        return self._body(root, items, is_whole=True)

    def _body(self, parent: str | None, before: bytes, *, is_whole: bool) -> Body:
        items = b",".join([before, *self.asked] if before else self.asked)
        fields = {**self.fields, "input": msgspec.Raw(b"[%b]" % items)}
        if parent is not None:
            fields["previous_response_id"] = parent
        return Body(fields, is_whole)


def checked(fields: Mapping[str, Any]) -> dict[str, Any]:
    """An app's create fields: those that are None are left out.

    Raises:
        OpenlineError: one of them is not for a session's creates.
    """
    for name, remedy in _NOT_OURS.items():
        if fields.get(name) is not None:
            raise OpenlineError(f"'{name}' cannot be used here: {remedy}.")
    return {name: value for name, value in fields.items() if value is not None and name != "stream"}


def encode(value: object) -> bytes:
    """JSON, in which objects of the SDK's types may stand."""
    return msgspec.json.encode(value, enc_hook=_plain)


def _plain(value: Any) -> object:
    dump = getattr(value, "model_dump", None)
    if dump is None:
        raise OpenlineError(
            f"a {type(value).__name__} cannot be sent: expected JSON's types, or an object of the SDK's types."
        )
    return dump(exclude_unset=True, mode="json")
