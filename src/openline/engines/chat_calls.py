"""Tool calls out of a Chat Completions stream, one after another.

Chat Completions sends parallel calls as fragments with an index, and some servers mix
them; in a Responses stream each call is whole before the next begins. So fragments of
later calls wait here until the current call's arguments are complete JSON.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

import msgspec

from openline.engines.chat_tools import CUSTOM_ARGUMENT, ToolName
from openline.protocol.deltas import CallDelta, CallStarted, Delta

logger = logging.getLogger("openline.chat")


class BadStreamError(Exception):
    """The upstream's stream cannot be used; the message continues "Upstream X …" and quotes nothing of it."""


class FunctionFragment(msgspec.Struct):
    """`function` of a fragment; a few servers send the arguments as an object, at once."""

    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class CallFragment(msgspec.Struct):
    """An element of `tool_calls`, in a chunk or in a whole message."""

    index: int | None = None
    id: str | None = None
    function: FunctionFragment | None = None


class _Call:
    """One call while its fragments come."""

    __slots__ = ("_complete", "arguments", "call_id", "closed", "input", "name", "order", "sent", "started")

    def __init__(self, order: int) -> None:
        self.order = order
        self.call_id = ""
        self.name = ""
        self.arguments: list[str] = []
        self.sent = 0  # how many pieces of the arguments are out
        self.started = False
        self.closed = False
        self.input: InputText | None = None  # reads a custom tool's text out of the arguments
        self._complete: bool | None = False  # None where that is to be found out

    def __repr__(self) -> str:
        return f"<_Call {self.order} {self.name} pieces={len(self.arguments)} sent={self.sent}>"

    def add(self, arguments: str) -> None:
        """More of its arguments."""
        self.arguments.append(arguments)
        self._complete = None

    def is_complete(self) -> bool:
        """Whether the arguments are a whole JSON object, so that nothing can be missing."""
        if self._complete is None:
            self._complete = self._is_object()
        return self._complete

    def _is_object(self) -> bool:
        if not self.arguments[-1].rstrip().endswith("}"):
            return False
        try:
            return isinstance(msgspec.json.decode("".join(self.arguments)), dict)
        except (msgspec.DecodeError, RecursionError):
            return False


class Calls:
    """Puts a stream's tool calls into sequence.

    Args:
        names: what the client calls the tools, by the names that the upstream got.
        new_call_id: makes an id for a call that came without one.
    """

    def __init__(self, names: Mapping[str, ToolName], new_call_id: Callable[[], str]) -> None:
        self._names = names
        self._new_call_id = new_call_id
        self._by_index: dict[int, _Call] = {}
        self._following = 0  # the index behind all of these
        self._index_of: dict[str, int] = {}  # by the ids that came
        self._given: set[str] = set()  # the ids that went out
        self._last: _Call | None = None
        self._misnumbered = False
        self._waiting: list[_Call] = []  # the open call, and behind it those that wait for it, by index
        self.seen = False

    def __repr__(self) -> str:
        return f"<Calls waiting={len(self._waiting)} of {len(self._by_index)}>"

    def add(self, fragments: Sequence[CallFragment], out: list[Delta], *, whole: bool = False) -> None:
        """Take fragments; what may go out is appended to `out`.

        Args:
            fragments: the `tool_calls` of a chunk.
            out: where deltas go.
            whole: each of them is a call of its own, from a message that was not streamed.
        """
        self.seen = True
        for position, fragment in enumerate(fragments):
            call = self._call_of(fragment, position if whole or len(fragments) > 1 else None)
            self._take(call, fragment)
        self._send(out)

    def settle(self, out: list[Delta]) -> bool:
        """Close the open call if it is complete and nothing waits behind it; True if none is open then."""
        self._send(out)
        if len(self._waiting) == 1 and self._waiting[0].is_complete():
            self._finish(self._waiting.pop(), out, cut=False)
        return not self._waiting

    def release(self, out: list[Delta], *, cut: bool) -> None:
        """The stream is over: everything that waited goes out, in order.

        Args:
            out: where deltas go.
            cut: the model was stopped, so the last call may be unfinished.

        Raises:
            BadStreamError: a call never got a name.
        """
        for call in self._waiting:
            self._send_pieces(call, out)
            self._finish(call, out, cut=cut)
        self._waiting.clear()

    def _call_of(self, fragment: CallFragment, position: int | None) -> _Call:
        """The call that a fragment belongs to: by its index, else its id, else its place."""
        if (last := self._last) is not None and self._continues(last, fragment):
            return last
        index = fragment.index
        if index is None:
            index = self._index_without_one(fragment, position)
        call = self._by_index.get(index)
        # Gemini gives every parallel call the index 0: another id with a name begins another call.
        if call is not None and fragment.id and call.call_id not in {"", fragment.id} and _named(fragment):
            call = None if call.is_complete() else call
        if call is None:
            call = self._by_index[index] = _Call(index)
            self._following = max(self._following, index + 1)
            self._enqueue(call)
        if fragment.id:
            self._index_of.setdefault(fragment.id, index)
        self._last = call
        return call

    def _continues(self, last: _Call, fragment: CallFragment) -> bool:
        """Whether a fragment goes on with the last call, although its index says another.

        SGLang numbers a call's beginning by its tool's place among the tools, and what follows by the call's own
        (sgl-project/sglang#6310). So nothing begins with a fragment that names neither itself nor its tool.
        """
        if _named(fragment) or fragment.id not in {None, "", last.call_id}:
            return False
        self._misnumbered = self._misnumbered or not (fragment.index is None or fragment.index in self._by_index)
        return self._misnumbered

    def _index_without_one(self, fragment: CallFragment, position: int | None) -> int:
        if fragment.id:
            return self._index_of.get(fragment.id, self._following)
        if position is not None:
            return position
        if self._last is None or (_named(fragment) and self._last.is_complete()):
            return self._following
        return self._last.order

    def _enqueue(self, call: _Call) -> None:
        """Behind the open call, by index; equal ones in the order they came."""
        place = len(self._waiting)
        while place > 0 and not self._waiting[place - 1].started and self._waiting[place - 1].order > call.order:
            place -= 1
        self._waiting.insert(place, call)

    def _take(self, call: _Call, fragment: CallFragment) -> None:
        call.call_id = call.call_id or fragment.id or ""
        function = fragment.function
        if function is None:
            return
        call.name = call.name or function.name or ""
        arguments = function.arguments
        if isinstance(arguments, dict):
            arguments = msgspec.json.encode(arguments).decode()
        if not arguments:
            return
        if not call.closed:
            call.add(arguments)
        elif arguments.strip():
            logger.debug("a fragment of a call that was complete already is left out")

    # What goes out.

    def _send(self, out: list[Delta]) -> None:
        while self._waiting:
            call = self._waiting[0]
            self._send_pieces(call, out)
            if len(self._waiting) == 1 or not call.is_complete():
                return
            self._finish(self._waiting.pop(0), out, cut=False)

    def _send_pieces(self, call: _Call, out: list[Delta]) -> None:
        if not call.started:
            if not call.name:
                return  # it comes with a later fragment
            self._start(call, out)
        while call.sent < len(call.arguments):
            piece = call.arguments[call.sent]
            call.sent += 1
            if call.input is not None:
                piece = call.input.feed(piece)
            if piece:
                out.append(CallDelta(piece))

    def _start(self, call: _Call, out: list[Delta]) -> None:
        call.started = True
        call.call_id = call.call_id or self._new_call_id()
        # An output names its call by the id, so two may not share one.
        given = self._new_call_id() if call.call_id in self._given else call.call_id
        self._given.add(given)
        origin = self._names.get(call.name) or ToolName("function_call", call.name)
        if origin.call_type == "custom_tool_call":
            call.input = InputText()
        out.append(CallStarted(origin.call_type, given, origin.name, origin.namespace))

    def _finish(self, call: _Call, out: list[Delta], *, cut: bool) -> None:
        call.closed = True
        if not call.started:
            if not cut:
                raise BadStreamError("made a tool call without a name")
        elif call.input is not None:
            rest = call.input.end()
            if rest:
                out.append(CallDelta(rest))
        elif not call.arguments and not cut:
            out.append(CallDelta("{}"))  # clients parse the arguments, also of a tool without parameters


def _named(fragment: CallFragment) -> bool:
    return fragment.function is not None and bool(fragment.function.name)


_OPENING: Final = re.compile(r'\s*\{\s*"' + CUSTOM_ARGUMENT + r'"\s*:\s*"')
_OPENING_BARE: Final = '{"' + CUSTOM_ARGUMENT + '":"'
_BLANK: Final = re.compile(r"\s+")
_HIGH: Final = r"\\u[dD][89abAB][0-9a-fA-F]{2}"
_LOW: Final = r"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
# What of a JSON string can be decoded without knowing what follows: half of a surrogate pair
# cannot, unless what follows shows that it stays alone.
_DECIDED: Final = re.compile(
    rf'(?:[^"\\]+|\\[^u]|{_HIGH}{_LOW}|(?!{_HIGH})\\u[0-9a-fA-F]{{4}}'
    rf"|{_HIGH}(?=[^\\]|\\[^u]|(?!{_LOW})\\u[0-9a-fA-F]{{4}}))*"
)
_SURROGATE: Final = re.compile("[\ud800-\udfff]")


class InputText:
    """Reads a custom tool's text out of its arguments, `{"input": "…"}`, while they stream.

    A model that does not keep to that form gets its arguments through as they are.
    """

    def __init__(self) -> None:
        self._state = "opening"
        self._rest = ""

    def __repr__(self) -> str:
        return f"<InputText {self._state} rest={len(self._rest)}>"

    def feed(self, piece: str) -> str:
        """The text that this piece of the arguments brings."""
        if self._state == "plain":
            return piece
        if self._state == "closed":
            return ""
        self._rest += piece
        if self._state == "opening":
            self._open()
        if self._state == "plain":
            text, self._rest = self._rest, ""
            return text
        return self._decode() if self._state == "inside" else ""

    def end(self) -> str:
        """What is left once the arguments are over."""
        if self._state == "other":
            return _input_of(self._rest)
        # An argument cut in its opening or in an escape holds no more text.
        return ""

    def _open(self) -> None:
        match = _OPENING.match(self._rest)
        if match:
            self._state, self._rest = "inside", self._rest[match.end() :]
            return
        bare = _BLANK.sub("", self._rest)
        if bare and not bare.startswith("{"):
            self._state = "plain"
        elif not _OPENING_BARE.startswith(bare):
            self._state = "other"  # perhaps other keys first; only the whole tells

    def _decode(self) -> str:
        match = _DECIDED.match(self._rest)
        assert match is not None  # it matches nothing too
        decided, self._rest = match.group(), self._rest[match.end() :]
        if self._rest.startswith('"'):
            self._state, self._rest = "closed", ""
        return _unescape(decided) if "\\" in decided else decided


def _unescape(text: str) -> str:
    try:
        # Not strict: models put raw line breaks into strings.
        unescaped: str = json.loads(f'"{text}"', strict=False)
    except ValueError:
        return text
    return _SURROGATE.sub("\ufffd", unescaped)


def _input_of(arguments: str) -> str:
    try:
        decoded: object = json.loads(arguments, strict=False)
    except (ValueError, RecursionError):
        return arguments
    found = cast("dict[str, object]", decoded).get(CUSTOM_ARGUMENT) if isinstance(decoded, dict) else None
    return _SURROGATE.sub("\ufffd", found) if isinstance(found, str) else arguments
