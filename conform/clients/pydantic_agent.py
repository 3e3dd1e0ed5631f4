"""A tool loop with the stock `pydantic-ai` package, in one of three ways.

* `http`: one agent run; the whole conversation every time.
* `ws`: one agent run; `openai_transport="websocket"`, which sends what is new.
* `ws-lanes`: three runs at once on one socket, the first on the default lane, the others on lanes of their own.

Prints one JSON line that says what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from importlib.metadata import version
from typing import Any

from pydantic_ai import Agent, RunContext
from pydantic_ai.models.openai import OpenAIResponsesModel, OpenAIResponsesModelSettings
from pydantic_ai.profiles.openai import OpenAIModelProfile
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.usage import UsageLimits

INSTRUCTIONS = "You test a server. Use the tools."
PROMPT = "Call the tools one after another, then say what the last one answered."
BRANCHES = ("first", "second", "third")
NO_LIMITS = UsageLimits(request_limit=64)


class Run:
    """One agent run, and what was said in it; its tools answer with its name, so that no two runs are alike."""

    def __init__(self, name: str, prompt: str) -> None:
        self.name = name
        self.prompt = prompt
        self.outputs: list[str] = []
        self.responses = 0
        self.text = ""

    async def go(self, agent: Agent[Run, str]) -> None:
        """Run to the end."""
        result = await agent.run(self.prompt, deps=self, usage_limits=NO_LIMITS)
        self.responses, self.text = result.usage.requests, result.output

    def say(self, output: str) -> str:
        """Keep what a tool answers."""
        self.outputs.append(f"{self.name}: {output}")
        return self.outputs[-1]

    def said(self) -> list[tuple[str, str]]:
        """Return the conversation as roles and texts."""
        return [("user", self.prompt), *(("tool", output) for output in self.outputs), ("assistant", self.text)]


async def add(context: RunContext[Run], a: int, b: int) -> str:
    """Add two whole numbers."""
    return context.deps.say(f"sum: {a + b}")


async def note(context: RunContext[Run], text: str) -> str:
    """Write a note down."""
    return context.deps.say(f"noted: {text}")


def agent_for(base_url: str, model_name: str, mode: str) -> Agent[Run, str]:
    """Return the agent; off OpenAI's own host pydantic-ai uses lanes only where a profile says that they work."""
    settings = OpenAIResponsesModelSettings(openai_store=False)
    if mode != "http":
        settings["openai_transport"] = "websocket"
    model = OpenAIResponsesModel(
        model_name,
        provider=OpenAIProvider(base_url=base_url, api_key="conform"),
        profile=OpenAIModelProfile(openai_responses_supports_websocket_stream_id=mode == "ws-lanes"),
        settings=settings,
    )
    return Agent(model, deps_type=Run, instructions=INSTRUCTIONS, tools=[add, note])


async def main() -> None:
    """Run the agent and print its result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--mode", choices=("http", "ws", "ws-lanes"), required=True)
    args = parser.parse_args()
    lanes = args.mode == "ws-lanes"
    runs = [Run(name, f"{name}: {PROMPT}") for name in BRANCHES] if lanes else [Run("only", PROMPT)]
    async with agent_for(args.base_url, args.model, args.mode) as agent, asyncio.TaskGroup() as group:
        for run in runs:
            group.create_task(run.go(agent))
    result: dict[str, Any] = {
        "client": f"pydantic-ai {version('pydantic-ai-slim')}",
        "instructions": INSTRUCTIONS,
        "prompt": runs[0].prompt,
        "responses": sum(run.responses for run in runs),
        "outputs": [output for run in runs for output in run.outputs],
        "text": runs[-1].text,
        "branches": [{"name": run.name, "said": run.said()} for run in runs],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    asyncio.run(main())
