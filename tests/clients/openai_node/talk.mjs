// OpenAI's own client for JavaScript. What it takes and prints is said in common/shared.py.

import assert from "node:assert";
import { readFileSync } from "node:fs";
import OpenAI from "openai";

const [baseURL, model] = process.argv.slice(2);
const apiKey = process.env.OPENAI_API_KEY;

const streaming = (stream) => (stream ? { stream: true, stream_options: { include_usage: true } } : {});

async function chat(client, body, stream) {
  const answer = await client.chat.completions.create({ ...body, ...streaming(stream) });
  return gather(answer, stream, (choice, given) => {
    const said = given.delta ?? given.message;
    choice.text += said.content ?? "";
    (said.tool_calls ?? []).forEach((call, at) => addToolCall(choice.tools, call.index ?? at, call.function));
    for (const entry of given.logprobs?.content ?? []) {
      choice.logprobs.push([entry.token, entry.logprob, entry.top_logprobs.map((top) => [top.token, top.logprob])]);
    }
  });
}

async function text(client, body, stream) {
  const answer = await client.completions.create({ ...body, ...streaming(stream) });
  return gather(answer, stream, (choice, given) => {
    choice.text += given.text;
    (given.logprobs?.tokens ?? []).forEach((token, at) => {
      const { token_logprobs, top_logprobs } = given.logprobs;
      choice.logprobs.push([token, token_logprobs[at], Object.entries(top_logprobs[at])]);
    });
  });
}

async function gather(answer, stream, add) {
  const choices = [];
  let usage = null;
  for await (const piece of stream ? answer : [answer]) {
    for (const given of piece.choices) {
      const choice = (choices[given.index] ??= { text: "", tools: [], logprobs: [], finish: null });
      add(choice, given);
      choice.finish = given.finish_reason ?? choice.finish;
    }
    usage = piece.usage ?? usage;
  }
  for (const choice of choices) choice.tools = choice.tools.map(([name, given]) => [name, JSON.parse(given)]);
  const { prompt_tokens, completion_tokens, prompt_tokens_details } = usage;
  return { choices, usage: [prompt_tokens, completion_tokens, prompt_tokens_details.cached_tokens] };
}

function addToolCall(tools, at, { name, arguments: given }) {
  tools[at] ??= ["", ""];
  tools[at][0] += name ?? "";
  tools[at][1] += given ?? "";
}

async function responses(client, body, stream) {
  if (!stream) return responseFacts(await client.responses.create(body));
  const events = client.responses.stream(body);
  let pieces = "";
  for await (const event of events) if (event.type === "response.output_text.delta") pieces += event.delta;
  const facts = responseFacts(await events.finalResponse());
  assert.equal(pieces, facts.choices[0].text);
  return facts;
}

function responseFacts({ output_text, status, usage }) {
  const tokens = [usage.input_tokens, usage.output_tokens, usage.input_tokens_details.cached_tokens];
  return { choices: [{ text: output_text, finish: status }], usage: tokens };
}

async function models(client) {
  const found = [];
  for await (const each of client.models.list()) found.push(each.id);
  return { models: found };
}

async function embeddings(client, body) {
  const answer = await client.embeddings.create(body);
  return { vectors: answer.data.map((found) => found.embedding) };
}

function classesOf(error) {
  const names = [];
  for (let kind = error.constructor; kind.name; kind = Object.getPrototypeOf(kind)) names.push(kind.name);
  return names;
}

function faultOf(error) {
  const retryAfter = error.headers.get("retry-after");
  return {
    classes: classesOf(error),
    status: error.status,
    param: error.param ?? null,
    code: error.code ?? null,
    retry_after: retryAfter && Number(retryAfter),
  };
}

const kinds = { chat, text, responses, models, embeddings };
const found = {};
for (const request of JSON.parse(readFileSync(0, "utf8"))) {
  const client = new OpenAI({ baseURL, apiKey: request.key ?? apiKey, maxRetries: 0 });
  const body = { model: request.model ?? model, ...request.body };
  try {
    found[request.name] = await kinds[request.kind](client, body, request.stream);
  } catch (error) {
    if (!(error instanceof OpenAI.APIError)) throw error; // a fault of this script or of the client
    found[request.name] = { error: faultOf(error) };
  }
}
console.log(JSON.stringify(found));
