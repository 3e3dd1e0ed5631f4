"""A tool loop with the stock `openai` package for Python, in one of three ways.

* `json`: plain HTTP; the server keeps the conversation (`store=True`), the client sends what is new.
* `sse`: `client.responses.stream()`, whose accumulator checks the order of events; full resend, `store=False`.
* `ws`: `client.responses.connect()`; what is new and `previous_response_id` on one socket, `store=False`.

Prints one JSON line that says what happened.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import openai
from openai.types.responses import Response

INSTRUCTIONS = "You test a server. Use the tools."
PROMPT = "Call the tools one after another, then say what the last one answered."
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "add",
        "description": "Add two whole numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
        "strict": True,
    },
    {
        "type": "function",
        "name": "note",
        "description": "Write a note down.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string"}},
            "required": ["text"],
            "additionalProperties": False,
        },
        "strict": True,
    },
]


class Loop:
    """One conversation: asks, runs the tools that were called, asks again, until there are no calls."""

    def __init__(self, client: openai.OpenAI, model: str, mode: str) -> None:
        self.client = client
        self.common: dict[str, Any] = {"model": model, "instructions": INSTRUCTIONS, "tools": TOOLS}
        self.mode = mode
        self.responses = 0
        self.outputs: list[str] = []

    def run(self) -> str:
        """Return the closing text."""
        match self.mode:
            case "json":
                return self.chained(self.ask_json)
            case "sse":
                return self.resent()
            case _:
                with self.client.responses.connect() as connection:
                    return self.chained(lambda **body: self.ask_socket(connection, **body))

    def chained(self, ask: Any) -> str:
        """Send only what is new, and name the response that it continues."""
        new: list[Any] = [{"role": "user", "content": PROMPT}]
        previous: dict[str, str] = {}
        while True:
            response = ask(input=new, **previous, **self.common)
            new = self.answers(response)
            if not new:
                return response.output_text
            previous = {"previous_response_id": response.id}

    def resent(self) -> str:
        """Send the whole conversation every time."""
        history: list[Any] = [{"role": "user", "content": PROMPT}]
        while True:
            with self.client.responses.stream(input=history, store=False, **self.common) as stream:
                deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
                response = stream.get_final_response()
            assert "".join(deltas) == response.output_text
            new = self.answers(response)
            if not new:
                return response.output_text
            history += [*response.output, *new]

    def ask_json(self, **body: Any) -> Response:
        """Create one response over HTTP and read it back, as a stored response can be."""
        response = self.client.responses.create(store=True, **body)
        again = self.client.responses.retrieve(response.id)
        assert again.output == response.output, "the stored response differs from the answer"
        return response

    def ask_socket(self, connection: Any, **body: Any) -> Response:
        """Create one response over the socket; its events must be numbered from 0 without a gap."""
        connection.response.create(store=False, **body)
        numbers = []
        for event in connection:
            if event.type == "error":
                raise AssertionError(event.to_json())
            numbers.append(event.sequence_number)
            if event.type in ("response.completed", "response.failed", "response.incomplete"):
                assert numbers == list(range(len(numbers))), numbers
                return event.response
        raise AssertionError("the socket closed in the middle of a turn")

    def answers(self, response: Response) -> list[Any]:
        """Run the tools that a response called; return their outputs as input items."""
        assert response.status == "completed", response.to_json()
        assert response.usage
        assert response.usage.input_tokens > 0
        self.responses += 1
        calls = [item for item in response.output if item.type == "function_call"]
        outputs = [tool_output(call.name, json.loads(call.arguments)) for call in calls]
        self.outputs += outputs
        return [
            {"type": "function_call_output", "call_id": call.call_id, "output": output}
            for call, output in zip(calls, outputs, strict=True)
        ]


def tool_output(name: str, arguments: dict[str, Any]) -> str:
    """Do what the tool promises."""
    if name == "add":
        return f"sum: {arguments['a'] + arguments['b']}"
    return f"noted: {arguments['text']}"


def main() -> None:
    """Run one loop and print its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=("json", "sse", "ws"), required=True)
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.base_url, api_key="conform", max_retries=0)
    loop = Loop(client, args.model, args.mode)
    text = loop.run()
    result = {
        "client": f"openai {openai.__version__}",
        "instructions": INSTRUCTIONS,
        "prompt": PROMPT,
        "responses": loop.responses,
        "outputs": loop.outputs,
        "text": text,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
