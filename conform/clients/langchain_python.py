"""A tool loop with the stock `langchain-openai` package over HTTP, in one of two ways.

* `json`: `ChatOpenAI(use_responses_api=True)`; the whole conversation every time, `store=False`.
* `sse-chained`: streamed, with `use_previous_response_id`, which sends what is new.

Prints one JSON line that says what happened.
"""

from __future__ import annotations

import argparse
import json
from functools import reduce
from importlib.metadata import version
from operator import add as joined
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import Runnable
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

INSTRUCTIONS = "You test a server. Use the tools."
PROMPT = "Call the tools one after another, then say what the last one answered."


@tool
def add(a: int, b: int) -> str:
    """Add two whole numbers."""
    return f"sum: {a + b}"


@tool
def note(text: str) -> str:
    """Write a note down."""
    return f"noted: {text}"


TOOLS = {each.name: each for each in (add, note)}


def answer(model: Runnable[Any, AIMessage], messages: list[BaseMessage], *, streamed: bool) -> AIMessage:
    """Return the model's next message."""
    return reduce(joined, model.stream(messages)) if streamed else model.invoke(messages)


def main() -> None:
    """Run one conversation and print its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=("json", "sse-chained"), required=True)
    args = parser.parse_args()
    chained = args.mode == "sse-chained"
    chat = ChatOpenAI(
        model=args.model,
        base_url=args.base_url,
        api_key="conform",
        use_responses_api=True,
        use_previous_response_id=chained,
        store=chained,
        max_retries=0,
    )
    model = chat.bind_tools(list(TOOLS.values()))
    messages: list[BaseMessage] = [SystemMessage(INSTRUCTIONS), HumanMessage(PROMPT)]
    outputs: list[str] = []
    responses = 0
    while True:
        said = answer(model, messages, streamed=chained)
        messages.append(said)
        responses += 1
        if not said.tool_calls:
            break
        for call in said.tool_calls:
            done = TOOLS[call["name"]].invoke(call)
            outputs.append(done.content)
            messages.append(done)
    result = {
        "client": f"langchain-openai {version('langchain-openai')}",
        "instructions": INSTRUCTIONS,
        "prompt": PROMPT,
        "responses": responses,
        "outputs": outputs,
        "text": said.text,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
