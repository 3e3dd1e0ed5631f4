"""What a session gives is what the OpenAI SDK's types take, and what it takes is what they are."""

from __future__ import annotations

import pytest
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseStreamEvent
from pydantic import TypeAdapter

from openline import connect

EVENT = TypeAdapter(ResponseStreamEvent)
TOOLS = [{"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}]


@pytest.mark.parametrize("transport", ["websocket", "http"])
async def test_a_loop_can_be_written_in_the_sdks_types(server, transport):
    """Events and responses validate as they are, and what came out goes in again as objects."""
    session = connect(f"{server.url}/v1", model="scripted-tools-1", transport=transport)
    async with session:
        stream = session.create(input="Hello.", tools=TOOLS, store=False)
        events = [EVENT.validate_python(event) async for event in stream]
        response = Response.model_validate(await stream.response())
        assert events[-1].type == "response.completed"
        assert events[-1].response == response
        (call,) = (item for item in response.output if isinstance(item, ResponseFunctionToolCall))
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "1"}
        answer = Response.model_validate(await session.create(input=[output], tools=TOOLS, store=False).response())
        assert answer.output_text


async def test_a_conversation_of_sdk_objects_goes_out_in_full(server):
    """An app that keeps its own list of the SDK's objects passes it as it is."""
    async with connect(f"{server.url}/v1", model="scripted-tools-1") as session:
        first = Response.model_validate(await session.create(input="Hello.", tools=TOOLS).response())
        (call,) = (item for item in first.output if isinstance(item, ResponseFunctionToolCall))
        output = {"type": "function_call_output", "call_id": call.call_id, "output": "1"}
        items = [{"role": "user", "content": "Hello."}, *first.output, output]
        again = session.create(input=items, tools=TOOLS, previous_response_id=None)
        assert Response.model_validate(await again.response()).output_text
