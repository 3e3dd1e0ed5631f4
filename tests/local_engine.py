"""For the tests of models in this process: the extra `local` is not there on every system."""

import os

import msgspec
import pytest

from openline.engines.engine import EngineRequest
from openline.engines.tiny import is_available
from openline.protocol.deltas import CallDelta, CallStarted, Ended, TextDelta, Usage
from openline.protocol.events import read_http_create, read_input
from openline.state.context import EMPTY

# Where the tests must have run, a missing wheel is a failure.
needs_local = pytest.mark.skipif(
    not is_available() and not os.environ.get("CI"), reason="the extra `local` is not installed"
)


class Answered:
    """What came of one turn.

    `context` is the conversation with the answer, for the next turn to continue.
    """

    def __init__(self, context):
        self.context = context
        self.text = ""
        self.calls = []
        self.usage = Usage()
        self.ended = None

    def take(self, delta):
        match delta:
            case TextDelta(text):
                self.text += text
            case CallStarted():
                self.calls.append([delta, ""])
            case CallDelta(text):
                self.calls[-1][1] += text
            case Usage():
                self.usage = delta
            case Ended():
                assert self.ended is None, "a turn ends once"
                self.ended = delta

    @property
    def cached(self):
        return self.usage.cached_tokens

    @property
    def tokens(self):
        return self.usage.input_tokens


def request_of(said, model, context=EMPTY, **fields):
    """A turn, as an engine gets it: `said` is what the user says, or items."""
    body = msgspec.json.encode({"model": model, "input": said, **fields})
    create = read_http_create(body)
    return EngineRequest(create, body, context.extend(read_input(create)), model)


async def ask(engine, said, *, model="tiny-text", context=EMPTY, **fields):
    """One whole turn."""
    request = request_of(said, model, context, **fields)
    answered = Answered(request.context)
    async for batch in engine.prepare(request).stream():
        for delta in batch:
            answered.take(delta)
    assert answered.ended is not None
    answered.context = _with_answer(request.context, answered)
    return answered


def _with_answer(context, answered):
    items = []
    if answered.text:
        items.append({"type": "message", "role": "assistant", "content": answered.text})
    for started, arguments in answered.calls:
        call = {"type": "function_call", "call_id": started.call_id, "name": started.name, "arguments": arguments}
        items.append(call)
    create = read_http_create(msgspec.json.encode({"model": "m", "input": items}))
    return context.extend(read_input(create))


def output(call_id, text):
    """A tool's output, as the next turn's input."""
    return [{"type": "function_call_output", "call_id": call_id, "output": text}]
