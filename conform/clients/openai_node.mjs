// A tool loop with the stock `openai` package for Node, in one of two ways.
//
//   sse   client.responses.stream(); the whole conversation every time, store: false
//   ws    ResponsesWS; what is new and previous_response_id on one socket, store: false
//
// Prints one JSON line that says what happened.

import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";

import OpenAI from "openai";
import { ResponsesWS } from "openai/resources/responses/ws";

const INSTRUCTIONS = "You test a server. Use the tools.";
const PROMPT = "Call the tools one after another, then say what the last one answered.";
const TERMINAL = new Set(["response.completed", "response.failed", "response.incomplete"]);

const functionTool = (name, description, properties) => ({
  type: "function",
  name,
  description,
  parameters: { type: "object", properties, required: Object.keys(properties), additionalProperties: false },
  strict: true,
});

const TOOLS = [
  functionTool("add", "Add two whole numbers.", { a: { type: "integer" }, b: { type: "integer" } }),
  functionTool("note", "Write a note down.", { text: { type: "string" } }),
];

const { values: args } = parseArgs({
  options: { "base-url": { type: "string" }, model: { type: "string" }, mode: { type: "string" } },
});
const client = new OpenAI({ baseURL: args["base-url"], apiKey: "conform", maxRetries: 0 });
const common = { model: args.model, instructions: INSTRUCTIONS, tools: TOOLS, store: false };
const outputs = [];
let responses = 0;

/** Do what the tool promises. */
function toolOutput(name, { a, b, text }) {
  return name === "add" ? `sum: ${a + b}` : `noted: ${text}`;
}

/** Run the tools that a response called; return their outputs as input items. */
function answers(response) {
  if (response.status !== "completed") throw new Error(JSON.stringify(response));
  responses += 1;
  return response.output
    .filter((item) => item.type === "function_call")
    .map((call) => {
      const output = toolOutput(call.name, JSON.parse(call.arguments));
      outputs.push(output);
      return { type: "function_call_output", call_id: call.call_id, output };
    });
}

/** Return the text of a response; the helper property exists on HTTP answers only. */
function textOf(response) {
  return response.output
    .filter((item) => item.type === "message")
    .flatMap((item) => item.content)
    .map((part) => part.text)
    .join("");
}

/** Send the whole conversation every time. */
async function overHttp() {
  const history = [{ role: "user", content: PROMPT }];
  for (;;) {
    const response = await client.responses.stream({ ...common, input: history }).finalResponse();
    const added = answers(response);
    if (added.length === 0) return textOf(response);
    history.push(...response.output, ...added);
  }
}

/** Wait for the end of one turn; its events must be numbered from 0 without a gap. */
async function turn(messages) {
  let expected = 0;
  for (;;) {
    const { value, done } = await messages.next();
    if (done || value.type === "close") throw new Error("the socket closed in the middle of a turn");
    if (value.type === "error") throw value.error;
    if (value.type !== "message") continue;
    const event = value.message;
    if (event.sequence_number !== expected++) throw new Error(`gap before ${JSON.stringify(event)}`);
    if (TERMINAL.has(event.type)) return event.response;
  }
}

/** Send only what is new, on one socket. */
async function overSocket() {
  const socket = new ResponsesWS(client);
  const messages = socket.stream();
  try {
    let body = { input: [{ role: "user", content: PROMPT }] };
    for (;;) {
      socket.send({ type: "response.create", ...common, ...body });
      const response = await turn(messages);
      const added = answers(response);
      if (added.length === 0) return textOf(response);
      body = { input: added, previous_response_id: response.id };
    }
  } finally {
    socket.close();
  }
}

const text = await (args.mode === "ws" ? overSocket() : overHttp());
const { version } = JSON.parse(await readFile(new URL("./node_modules/openai/package.json", import.meta.url)));
console.log(
  JSON.stringify({ client: `openai ${version}`, instructions: INSTRUCTIONS, prompt: PROMPT, responses, outputs, text }),
);
