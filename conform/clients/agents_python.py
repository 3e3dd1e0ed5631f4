"""A tool loop with the stock `openai-agents` package for Python, in one of three ways.

* `http`: the Runner over HTTP; it resends the conversation every turn.
* `ws`: `responses_websocket_session()`, streamed; the conversation is resent over one socket.
* `ws-chained`: `set_default_openai_responses_transport("websocket")` and `auto_previous_response_id`, so that
  only what is new is sent.

Prints one JSON line that says what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from importlib.metadata import version
from typing import Any

from agents import (
    Agent,
    OpenAIProvider,
    RunConfig,
    Runner,
    function_tool,
    responses_websocket_session,
    set_default_openai_client,
    set_default_openai_responses_transport,
    set_tracing_disabled,
)
from openai import AsyncOpenAI

INSTRUCTIONS = "You test a server. Use the tools."
PROMPT = "Call the tools one after another, then say what the last one answered."
TURNS_MAX = 64

outputs: list[str] = []


@function_tool
def add(a: int, b: int) -> str:
    """Add two whole numbers."""
    outputs.append(f"sum: {a + b}")
    return outputs[-1]


@function_tool
def note(text: str) -> str:
    """Write a note down."""
    outputs.append(f"noted: {text}")
    return outputs[-1]


async def run_http(agent: Agent, base_url: str) -> Any:
    """Run over HTTP, with a provider of the application's own."""
    client = AsyncOpenAI(base_url=base_url, api_key="conform", max_retries=0)
    provider = OpenAIProvider(openai_client=client, use_responses=True)
    return await Runner.run(agent, PROMPT, max_turns=TURNS_MAX, run_config=RunConfig(model_provider=provider))


async def run_session(agent: Agent, base_url: str) -> Any:
    """Run streamed over the session's one socket."""
    async with responses_websocket_session(
        base_url=base_url, api_key="conform", openai_prefix_mode="model_id", unknown_prefix_mode="model_id"
    ) as session:
        result = session.run_streamed(agent, PROMPT, max_turns=TURNS_MAX)
        async for _event in result.stream_events():
            pass
        return result


async def run_chained(agent: Agent, base_url: str) -> Any:
    """Run over the process-wide WebSocket transport, sending increments."""
    set_default_openai_client(AsyncOpenAI(base_url=base_url, api_key="conform", max_retries=0), use_for_tracing=False)
    set_default_openai_responses_transport("websocket")
    return await Runner.run(agent, PROMPT, max_turns=TURNS_MAX, auto_previous_response_id=True)


MODES = {"http": run_http, "ws": run_session, "ws-chained": run_chained}


async def main() -> None:
    """Run one agent and print its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    args = parser.parse_args()
    set_tracing_disabled(disabled=True)
    agent = Agent(name="conform", instructions=INSTRUCTIONS, model=args.model, tools=[add, note])
    result = await MODES[args.mode](agent, args.base_url)
    print(
        json.dumps(
            {
                "client": f"openai-agents {version('openai-agents')}",
                "instructions": INSTRUCTIONS,
                "prompt": PROMPT,
                "responses": len(result.raw_responses),
                "outputs": outputs,
                "text": result.final_output,
            }
        )
    )


if __name__ == "__main__":
    asyncio.run(main())
