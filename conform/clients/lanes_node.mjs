// Conversations on the lanes of one socket with the stock `openai` package for Node.
//
// `ResponsesWebSocketSession` routes the events of a socket to lanes. Three lanes run a tool loop each, at the same
// time. Then the first conversation goes on twice at once: on its own lane, and forked, on the second one. The third
// lane goes on meanwhile.
//
// Prints one JSON line that says what happened.

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { parseArgs } from "node:util";

import OpenAI from "openai";
import { ResponsesWebSocketSession } from "openai/lib/responses/responses-websocket-session";
import { ResponsesWS } from "openai/resources/responses/ws";

const INSTRUCTIONS = "You test a server. Use the tools.";
const PROMPT = "Call the tools one after another, then say what the last one answered.";
const LANES = ["north", "south.1", "East_2-b"];
const TERMINAL = new Set(["response.completed", "response.failed", "response.incomplete"]);
const LIMITS = { maxLanes: LANES.length, maxBufferedEvents: 10_000, maxBufferedBytes: 64 * 1024 * 1024 };

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
const common = { model: args.model, instructions: INSTRUCTIONS, tools: TOOLS, store: false };
const outputs = [];
let responses = 0;

/** Do what the tool promises. */
function toolOutput(name, { a, b, text }) {
  return name === "add" ? `sum: ${a + b}` : `noted: ${text}`;
}

/** Run the tools that a response called; return their outputs as input items. */
function answers(branch, response) {
  assert.equal(response.status, "completed", JSON.stringify(response));
  return response.output
    .filter((item) => item.type === "function_call")
    .map((call) => {
      const output = `${branch.name}: ${toolOutput(call.name, JSON.parse(call.arguments))}`;
      outputs.push(output);
      branch.said.push(["tool", output]);
      return { type: "function_call_output", call_id: call.call_id, output };
    });
}

/** Ask on a lane, run the tools that were called, ask again, until there are no calls. */
async function talk(lane, branch) {
  const prompt = `${branch.name}: ${PROMPT}`;
  branch.said.push(["user", prompt]);
  let input = [{ role: "user", content: prompt }];
  for (;;) {
    const parent = branch.latest ? { previous_response_id: branch.latest } : {};
    lane.create({ ...common, ...parent, input });
    const response = await lane.finalResponse();
    responses += 1;
    branch.latest = response.id;
    input = answers(branch, response);
    if (input.length === 0) {
      branch.said.push(["assistant", response.output_text]);
      return;
    }
  }
}

/** Hold all conversations; return them. */
async function converse(lanes, socket) {
  const [north, south, east] = lanes;
  const [first, second, third] = LANES.map((name) => ({ name, said: [], latest: undefined }));
  await Promise.all([talk(north, first), talk(south, second), talk(east, third)]);
  const forked = { ...first, name: "forked", said: [...first.said] };

  // With `store: false` only the latest response of a lane is kept: the fork must have got hold of it.
  const bound = new Promise((resolve) => {
    socket.on("response.in_progress", (event) => event.stream_id === LANES[1] && resolve());
  });
  await Promise.all([talk(south, forked), bound.then(() => talk(north, first)), talk(east, third)]);
  return [first, second, third, forked];
}

/** Read along: each event must be of a lane, and those of a response numbered without a gap. */
function watch(socket) {
  const expected = new Map(LANES.map((lane) => [lane, 0]));
  socket.on("event", (event) => {
    const { stream_id: lane, sequence_number: number, type } = event;
    assert.equal(number, expected.get(lane), `out of place: ${JSON.stringify(event)}`);
    expected.set(lane, TERMINAL.has(type) ? 0 : number + 1);
  });
}

const client = new OpenAI({ baseURL: args["base-url"], apiKey: "conform", maxRetries: 0 });
const socket = new ResponsesWS(client);
watch(socket);
await new Promise((resolve, reject) => {
  socket.socket.on("open", resolve);
  socket.on("error", reject);
});
const session = new ResponsesWebSocketSession(socket, LIMITS);
const branches = await converse(
  LANES.map((name) => session.lane(name)),
  socket,
);
session.close();
socket.close();
const { version } = JSON.parse(await readFile(new URL("./node_modules/openai/package.json", import.meta.url)));
console.log(
  JSON.stringify({
    client: `openai ${version}`,
    responses,
    outputs,
    text: branches.at(-1).said.at(-1)[1],
    branches: branches.map(({ name, said }) => ({ name, said })),
  }),
);
