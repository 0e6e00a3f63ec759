// What the official TypeScript SDKs of OpenAI and Anthropic do with a gateway. Where it is, and where the scripted upstream behind it is, comes
// from the environment: test_sdk_typescript.py starts both, runs this file, and expects each test here by its name.

import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const { BASE_URL, KEY, UPSTREAM, TEXT } = process.env;
const client = new OpenAI({ baseURL: BASE_URL, apiKey: KEY });
const messages = [{ role: "user", content: "Hello" }];
const tools = [{ type: "function", function: { name: "temperature", parameters: { type: "object" } } }];
const usage = { prompt_tokens: 7, completion_tokens: 4, total_tokens: 11 };
const toolArguments = '{"city": "Köln"}';

// How soon the upstream's connection is closed after the client's, at the best of some tries: the machine may be busy.
const closesWithinMs = 50;
const tries = 3;

async function seen(model) {
  return (await fetch(`${UPSTREAM}/seen/${model}`)).json();
}

// Waits until the gateway has closed the connection of a model; gives the time at which it did, in ms.
async function closed(model) {
  const giveUpAt = Date.now() + 5000;
  while (Date.now() < giveUpAt) {
    const state = await seen(model);
    if (state.closed_at !== null && !state.open) return state.closed_at * 1000;
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  assert.fail(`the upstream's stream of ${model} is still open after 5 s`);
}

function assertSoon(lateMs) {
  assert.ok(Math.min(...lateMs) < closesWithinMs, `closed ${lateMs} ms after the client had left`);
  assert.ok(Math.max(...lateMs) < 1000, `closed ${lateMs} ms after the client had left`);
}

async function all(stream) {
  const pieces = [];
  for await (const piece of stream) pieces.push(piece);
  return pieces;
}

async function refused(call, kind) {
  try {
    await call();
  } catch (error) {
    assert.equal(error.constructor, kind, String(error));
    return error;
  }
  assert.fail(`${kind.name} did not come`);
}

test("models are listed", async () => {
  const owners = new Map((await all(client.models.list())).map((model) => [model.id, model.owned_by]));
  assert.equal(owners.get("default"), "them");
  assert.equal(owners.get("mock/org/deep/model"), "them");
});

test("a model is retrieved by an id with slashes", async () => {
  assert.equal((await client.models.retrieve("mock/org/deep/model")).id, "mock/org/deep/model");
  const error = await refused(() => client.models.retrieve("mock/org/deep/modell"), OpenAI.NotFoundError);
  assert.equal(error.code, "model_not_found");
});

test("a chat answers", async () => {
  const answer = await client.chat.completions.create({ model: "mock/hello", messages });
  assert.equal(answer.choices[0].message.content, TEXT);
  assert.equal(answer.choices[0].finish_reason, "stop");
  assert.equal(answer.model, "mock/hello");
  assert.deepEqual(answer.usage, usage);
  assert.deepEqual(answer.x_unknown, { kept: [1, 100] });
  assert.ok(answer._request_id);
});

test("default answers under that name", async () => {
  assert.equal((await client.chat.completions.create({ model: "default", messages })).model, "default");
});

test("a chat streams", async () => {
  const chunks = await all(await client.chat.completions.create({ model: "mock/hello", messages, stream: true }));
  assert.equal(chunks.map((chunk) => chunk.choices[0].delta.content ?? "").join(""), TEXT);
  assert.equal(chunks.at(-1).choices[0].finish_reason, "stop");
  assert.ok(chunks.every((chunk) => chunk.model === "mock/hello" && !chunk.usage));
});

test("a stream reports usage when asked", async () => {
  const call = { model: "mock/hello", messages, stream: true, stream_options: { include_usage: true } };
  const chunks = await all(await client.chat.completions.create(call));
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.deepEqual(chunks.at(-1).usage, usage);
});

test("tools make a round trip", async () => {
  const asked = (await client.chat.completions.create({ model: "mock/tools", messages, tools })).choices[0];
  assert.equal(asked.finish_reason, "tool_calls");
  const [tool] = asked.message.tool_calls;
  assert.deepEqual(tool.function, { name: "temperature", arguments: toolArguments });
  const result = { role: "tool", tool_call_id: tool.id, content: "21 °C" };
  const more = [...messages, asked.message, result];
  const answer = await client.chat.completions.create({ model: "mock/tools", messages: more, tools });
  assert.equal(answer.choices[0].message.content, "call-1 says 21 °C");
});

test("tools are streamed", async () => {
  const chunks = await all(await client.chat.completions.create({ model: "mock/tools", messages, tools, stream: true }));
  const fragments = chunks.flatMap((chunk) => chunk.choices[0].delta.tool_calls ?? []);
  assert.equal(fragments[0].id, "call-1");
  assert.ok(fragments.length > 2);
  assert.equal(fragments.map((fragment) => fragment.function.arguments).join(""), toolArguments);
  assert.equal(chunks.at(-1).choices[0].finish_reason, "tool_calls");
});

test("unknown fields pass through byte for byte", async () => {
  let sent;
  const spying = client.withOptions({
    fetch: (url, init) => {
      sent = init.body;
      return fetch(url, init);
    },
  });
  const odd = { x_float: [0.1, 1e300, 2], x_text: 'ü\u2028 \\ " 🌍', x_deep: { a: [{ b: {} }, [], null, true] } };
  await spying.chat.completions.create({ model: "mock/hello.node-odd", messages, ...odd });
  const { bodies } = await seen("hello.node-odd");
  assert.equal(typeof sent, "string");
  assert.deepEqual(bodies, [sent.replace('"mock/hello.node-odd"', '"hello.node-odd"')]);
});

test("the other endpoints answer", async () => {
  const model = "mock/hello.node-others";
  const embedding = await client.embeddings.create({ model, input: "a" });
  assert.deepEqual(embedding.data[0].embedding, [0.25, -1.5, 3]);
  assert.equal((await client.completions.create({ model, prompt: "a" })).choices[0].text, TEXT);
  assert.equal((await client.moderations.create({ model, input: "a" })).results[0].flagged, true);
  const image = await client.images.generate({ model, prompt: "a" });
  assert.equal(Buffer.from(image.data[0].b64_json, "base64").toString(), "not really a picture");
  const speech = await client.audio.speech.create({ model, voice: "alloy", input: "a" });
  assert.equal(speech.headers.get("content-type"), "audio/mpeg");
  const bytes = Buffer.from(await speech.arrayBuffer());
  assert.equal(bytes.length, 256 * 300);
  assert.ok(bytes.every((byte, at) => byte === at % 256));
});

test("responses answer and stream", async () => {
  const model = "mock/hello.node-responses";
  assert.equal((await client.responses.create({ model, input: "a" })).output_text, TEXT);
  const events = await all(await client.responses.create({ model, input: "a", stream: true }));
  const deltas = events.filter((event) => event.type === "response.output_text.delta");
  assert.equal(deltas.map((event) => event.delta).join(""), TEXT);
  assert.equal(events.at(-1).type, "response.completed");
  assert.equal(events.at(-1).response.model, model);
});

test("a response is kept, continued and deleted", async () => {
  const model = "mock/hello.node-kept";
  const made = await client.responses.stream({ model, input: "a" }).finalResponse();
  assert.equal(made.output_text, TEXT);
  assert.equal((await client.responses.retrieve(made.id)).output_text, TEXT);
  const next = await client.responses.create({ model, input: "b", previous_response_id: made.id });
  assert.equal(next.previous_response_id, made.id);
  const items = await all(client.responses.inputItems.list(next.id, { order: "asc" }));
  assert.deepEqual(items.map((item) => item.role), ["user", "assistant", "user"]);
  await client.responses.delete(made.id);
  await refused(() => client.responses.retrieve(made.id), OpenAI.NotFoundError);
});

test("a response in the background is polled", async () => {
  const model = "mock/hello.node-background";
  let made = await client.responses.create({ model, input: "a", background: true });
  assert.equal(made.status, "queued");
  for (let tries = 0; tries < 500 && ["queued", "in_progress"].includes(made.status); tries++) {
    await new Promise((resolve) => setTimeout(resolve, 10));
    made = await client.responses.retrieve(made.id);
  }
  assert.equal(made.status, "completed");
  assert.equal(made.output_text, TEXT);
});

test("refusals of the gateway have their class", async () => {
  const stranger = client.withOptions({ apiKey: "wrong" });
  const call = { model: "mock/hello.node-refused", messages };
  let error = await refused(() => stranger.chat.completions.create(call), OpenAI.AuthenticationError);
  assert.equal(error.code, "invalid_api_key");
  error = await refused(() => client.chat.completions.create({ ...call, messages: [] }), OpenAI.BadRequestError);
  assert.equal(error.param, "messages");
  error = await refused(() => client.chat.completions.create({ ...call, model: "helo" }), OpenAI.NotFoundError);
  assert.equal(error.code, "model_not_found");
  assert.equal((await seen("hello.node-refused")).hits, 0);
});

test("refusals of the upstream keep their class and are not retried", async () => {
  const kinds = {
    400: OpenAI.BadRequestError,
    401: OpenAI.AuthenticationError,
    403: OpenAI.PermissionDeniedError,
    404: OpenAI.NotFoundError,
    409: OpenAI.ConflictError,
    422: OpenAI.UnprocessableEntityError,
    429: OpenAI.RateLimitError,
    500: OpenAI.InternalServerError,
    503: OpenAI.InternalServerError,
  };
  for (const [status, kind] of Object.entries(kinds)) {
    const part = `status-${status}.node`;
    for (const stream of [false, true]) {
      const call = { model: `mock/${part}`, messages, stream };
      const error = await refused(() => client.chat.completions.create(call), kind);
      assert.match(error.message, /said the upstream/);
      assert.equal(error.code, status < 500 ? "some_code" : "upstream_unavailable");
      assert.equal(error.headers.get("x-should-retry"), "false");
    }
    // a provider that said when to come back is not asked before
    assert.equal((await seen(part)).hits, status === "429" ? 1 : 2);
  }
});

test("a cut stream is an error", async () => {
  for (const part of ["cut", "reset", "short"]) {
    const stream = await client.chat.completions.create({ model: `mock/${part}.node`, messages, stream: true });
    const words = [];
    const error = await refused(async () => {
      for await (const chunk of stream) words.push(chunk.choices[0].delta.content ?? "");
    }, OpenAI.APIError);
    assert.equal(error.code, "upstream_truncated");
    assert.ok(words.join("").length > 0);
    assert.ok(TEXT.startsWith(words.join("")));
  }
});

test("a timeout closes the upstream", async () => {
  for (const stream of [false, true]) {
    const late = [];
    for (let attempt = 0; attempt < tries; attempt++) {
      const model = `silent.node-${stream}-${attempt}`;
      const call = { model: `mock/${model}`, messages, stream };
      const hurried = { timeout: 150, maxRetries: 0 };
      await refused(() => client.chat.completions.create(call, hurried), OpenAI.APIConnectionTimeoutError);
      const leftAt = Date.now();
      late.push((await closed(model)) - leftAt);
    }
    assertSoon(late);
  }
});

test("an abort in the middle closes the upstream", async () => {
  const late = [];
  for (let attempt = 0; attempt < tries; attempt++) {
    const model = `endless.node-${attempt}`;
    const stream = await client.chat.completions.create({ model: `mock/${model}`, messages, stream: true });
    let count = 0;
    let leftAt;
    for await (const chunk of stream) {
      assert.equal(chunk.model, `mock/${model}`);
      if (++count === 3) {
        leftAt = Date.now();
        stream.controller.abort();
      }
    }
    late.push((await closed(model)) - leftAt);
  }
  assertSoon(late);
});

// -- Anthropic's SDK --------------------------------------------------------------------------------------------------

const claude = new Anthropic({ baseURL: BASE_URL.replace(/\/v1$/, ""), apiKey: KEY, maxRetries: 0 });
const asked = { max_tokens: 100, messages };
const weather = { name: "weather", input_schema: { type: "object", properties: { city: { type: "string" } } } };

test("Messages: an answer", async () => {
  const message = await claude.messages.create({ model: "mock/hello", ...asked });
  assert.deepEqual(message.content, [{ type: "text", text: TEXT }]);
  assert.equal(message.stop_reason, "end_turn");
  assert.equal(message.usage.input_tokens, 7);
});

test("Messages: a stream", async () => {
  const stream = claude.messages.stream({ model: "mock/hello", ...asked });
  const texts = [];
  stream.on("text", (text) => texts.push(text));
  const message = await stream.finalMessage();
  assert.equal(texts.join(""), TEXT);
  assert.ok(texts.length > 1);
  assert.deepEqual([message.stop_reason, message.usage.output_tokens], ["end_turn", 4]);
});

test("Messages: a tool and its result, streamed", async () => {
  const ask = { model: "mock/tools", max_tokens: 100, tools: [weather] };
  const { content, stop_reason } = await claude.messages.stream({ ...ask, messages }).finalMessage();
  assert.equal(stop_reason, "tool_use");
  const [call] = content;
  assert.deepEqual(call.input, { city: "Köln" });
  const result = { type: "tool_result", tool_use_id: call.id, content: "warm" };
  const turns = [...messages, { role: "assistant", content }, { role: "user", content: [result] }];
  const last = await claude.messages.stream({ ...ask, messages: turns }).finalMessage();
  assert.equal(last.content[0].text, `${call.id} says warm`);
});

test("Messages: errors are those of the SDK", async () => {
  for (const [model, kind] of [
    ["mock/status-400", Anthropic.BadRequestError],
    ["mock/status-429", Anthropic.RateLimitError],
    ["mock/status-503", Anthropic.OverloadedError],
    ["nobody/x", Anthropic.NotFoundError],
  ]) {
    await refused(() => claude.messages.create({ model, ...asked }), kind);
  }
});

test("Messages: the models are listed", async () => {
  const ids = (await all(claude.models.list())).map((model) => model.id);
  assert.ok(ids.includes("mock/org/deep/model"));
});

// -- chat completions over an upstream of Anthropic's, which refuses what Anthropic refuses

const overNative = "native/claude-opus-5";

test("a chat streams over Anthropic's format", async () => {
  const call = { model: `${overNative}.hello`, messages, stream: true, stream_options: { include_usage: true } };
  const chunks = await all(await client.chat.completions.create(call));
  assert.equal(chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "").join(""), TEXT);
  assert.equal(chunks.at(-2).choices[0].finish_reason, "stop");
  assert.equal(chunks.at(-1).usage.total_tokens, 16);
  const answer = await client.chat.completions.create({ model: `${overNative}.hello`, messages });
  assert.equal(answer.choices[0].message.content, TEXT);
  assert.deepEqual(answer.usage, chunks.at(-1).usage);
});

test("tools run over Anthropic's format", async () => {
  for (const stream of [false, true]) {
    const cities = [];
    const runner = client.chat.completions.runTools({
      model: `${overNative}.tools`,
      messages,
      stream,
      reasoning_effort: "high",
      tools: [
        {
          type: "function",
          function: {
            name: "temperature",
            parameters: { type: "object", properties: { city: { type: "string" } } },
            parse: JSON.parse,
            function: ({ city }) => cities.push(city) && "21 °C",
          },
        },
      ],
    });
    assert.equal(await runner.finalContent(), "toolu_0 says 21 °C");
    assert.deepEqual(cities, ["Köln"]);
    const [, asked] = runner.messages;
    assert.equal(asked.reasoning_content, "Let me think.");
  }
});

test("a truncated stream over Anthropic's format is an error", async () => {
  for (const part of ["cut", "short", "overloaded"]) {
    const stream = await client.chat.completions.create({ model: `${overNative}.${part}`, messages, stream: true });
    const words = [];
    const error = await refused(async () => {
      for await (const chunk of stream) words.push(chunk.choices[0].delta.content ?? "");
    }, OpenAI.APIError);
    assert.equal(error.type, part === "overloaded" ? "overloaded_error" : "upstream_error");
    assert.ok(words.join("") && TEXT.startsWith(words.join("")));
  }
});

test("an error of Anthropic's has the class of its status", async () => {
  const call = (part) => () => client.chat.completions.create({ model: `${overNative}.${part}`, messages });
  const error = await refused(call("status-404"), OpenAI.NotFoundError);
  assert.equal(error.type, "not_found_error");
  assert.match(error.message, /said Anthropic/);
  await refused(call("status-529"), OpenAI.InternalServerError);
});
