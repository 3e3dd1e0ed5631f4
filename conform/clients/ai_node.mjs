// A tool loop with the stock Vercel AI SDK (`ai` and `@ai-sdk/openai`) over HTTP, in one of two ways.
//
//   json  generateText(), which has the server store what it sends
//   sse   streamText(), store: false
//
// Either sends the whole conversation every time.
//
// Prints one JSON line that says what happened.

import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";

import { createOpenAI } from "@ai-sdk/openai";
import { generateText, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const INSTRUCTIONS = "You test a server. Use the tools.";
const PROMPT = "Call the tools one after another, then say what the last one answered.";
const STEPS_MAX = 64;

const { values: args } = parseArgs({
  options: { "base-url": { type: "string" }, model: { type: "string" }, mode: { type: "string" } },
});
const outputs = [];

/** Keep what a tool answers. */
function say(output) {
  outputs.push(output);
  return output;
}

const tools = {
  add: tool({
    description: "Add two whole numbers.",
    inputSchema: z.object({ a: z.number().int(), b: z.number().int() }),
    execute: async ({ a, b }) => say(`sum: ${a + b}`),
  }),
  note: tool({
    description: "Write a note down.",
    inputSchema: z.object({ text: z.string() }),
    execute: async ({ text }) => say(`noted: ${text}`),
  }),
};

const stored = args.mode === "json";
const options = {
  model: createOpenAI({ baseURL: args["base-url"], apiKey: "conform" }).responses(args.model),
  instructions: INSTRUCTIONS,
  prompt: PROMPT,
  tools,
  stopWhen: stepCountIs(STEPS_MAX),
  maxRetries: 0,
  providerOptions: { openai: { store: stored } },
};
const result = stored ? await generateText(options) : streamText(options);
const text = await result.text;
const { version } = JSON.parse(await readFile(new URL("./node_modules/ai/package.json", import.meta.url)));
console.log(
  JSON.stringify({
    client: `ai ${version}`,
    instructions: INSTRUCTIONS,
    prompt: PROMPT,
    responses: (await result.steps).length,
    outputs,
    text,
  }),
);
