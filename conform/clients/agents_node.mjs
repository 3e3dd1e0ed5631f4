// A tool loop with the stock `@openai/agents` package for Node, in one of two ways.
//
//   http  the Runner over HTTP; it resends the conversation every turn
//   ws    withResponsesWebSocketSession(), streamed, over one socket
//
// Prints one JSON line that says what happened.

import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";

import { Agent, OpenAIProvider, Runner, setTracingDisabled, tool, withResponsesWebSocketSession } from "@openai/agents";
import WebSocket from "ws";
import { z } from "zod";

const INSTRUCTIONS = "You test a server. Use the tools.";
const PROMPT = "Call the tools one after another, then say what the last one answered.";
const TURNS_MAX = 64;

// Before Node 22 there is no global WebSocket; `ws` is one that takes headers, as the package wants it.
globalThis.WebSocket ??= WebSocket;

const { values: args } = parseArgs({
  options: { "base-url": { type: "string" }, model: { type: "string" }, mode: { type: "string" } },
});
const outputs = [];

/** Keep what a tool answers. */
function say(output) {
  outputs.push(output);
  return output;
}

const tools = [
  tool({
    name: "add",
    description: "Add two whole numbers.",
    parameters: z.object({ a: z.number().int(), b: z.number().int() }),
    execute: async ({ a, b }) => say(`sum: ${a + b}`),
  }),
  tool({
    name: "note",
    description: "Write a note down.",
    parameters: z.object({ text: z.string() }),
    execute: async ({ text }) => say(`noted: ${text}`),
  }),
];

const agent = new Agent({ name: "conform", instructions: INSTRUCTIONS, model: args.model, tools });
const providerOptions = { apiKey: "conform", baseURL: args["base-url"] };

/** Run over HTTP. */
async function overHttp() {
  const runner = new Runner({ modelProvider: new OpenAIProvider(providerOptions) });
  return runner.run(agent, PROMPT, { maxTurns: TURNS_MAX });
}

/** Run streamed, over the session's one socket. */
async function overSocket() {
  return withResponsesWebSocketSession(
    async ({ run }) => {
      const result = await run(agent, PROMPT, { maxTurns: TURNS_MAX, stream: true });
      for await (const _event of result);
      await result.completed;
      return result;
    },
    { providerOptions },
  );
}

setTracingDisabled(true);
const result = await (args.mode === "ws" ? overSocket() : overHttp());
const { version } = JSON.parse(await readFile(new URL("./node_modules/@openai/agents/package.json", import.meta.url)));
console.log(
  JSON.stringify({
    client: `@openai/agents ${version}`,
    instructions: INSTRUCTIONS,
    prompt: PROMPT,
    responses: result.rawResponses.length,
    outputs,
    text: result.finalOutput,
  }),
);
