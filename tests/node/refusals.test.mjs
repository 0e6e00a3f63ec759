// What the official TypeScript SDKs make of the refusals of keys, limits and budgets. test_sdk_refusals.py starts the gateway with the
// keys, runs this file, and expects each test here by its name.

import assert from "node:assert/strict";
import { test } from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import OpenAI from "openai";

const { GATEWAY } = process.env;
const messages = [{ role: "user", content: "Hello" }];
const asked = { model: "mock/hello", messages, max_tokens: 4 };

// A client whose requests are counted. Keys of Node's own end in -node.
function counting(kind, key) {
  const wire = { requests: 0, headers: null };
  const counted = async (url, init) => {
    wire.requests++;
    const answer = await fetch(url, init);
    wire.headers = answer.headers;
    return answer;
  };
  const baseURL = kind === OpenAI ? `${GATEWAY}/v1` : GATEWAY;
  return [new kind({ baseURL, apiKey: `${key}-node`, fetch: counted, maxRetries: 2 }), wire];
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

// Calls until a call is refused, so many times at most.
async function refusedWithin(calls, call, kind) {
  for (let number = 0; number < calls; number++) {
    try {
      await call();
    } catch (error) {
      assert.equal(error.constructor, kind, String(error));
      return error;
    }
  }
  assert.fail(`${calls} calls were allowed`);
}

test("an unknown and an expired key are refused once, in the same words", async () => {
  const said = new Set();
  for (const key of ["nobody", "late"]) {
    const [client, wire] = counting(OpenAI, key);
    const error = await refused(() => client.chat.completions.create(asked), OpenAI.AuthenticationError);
    assert.equal(error.code, "invalid_api_key");
    assert.equal(wire.requests, 1);
    said.add(error.message);
    const [claude, other] = counting(Anthropic, key);
    await refused(() => claude.messages.create(asked), Anthropic.AuthenticationError);
    assert.equal(other.requests, 1);
  }
  assert.equal(said.size, 1);
});

test("a model that the key may not use is refused once", async () => {
  const [client, wire] = counting(OpenAI, "chooser");
  const call = { ...asked, model: "mock/endless" };
  const error = await refused(() => client.chat.completions.create(call), OpenAI.PermissionDeniedError);
  assert.equal(error.code, "model_not_allowed");
  assert.equal(wire.requests, 1);
  const [claude] = counting(Anthropic, "chooser");
  await refused(() => claude.messages.create(call), Anthropic.PermissionDeniedError);
});

test("a call over the rate is tried again when the refusal said", async () => {
  const [client, wire] = counting(OpenAI, "patient");
  let number = 0;
  while (wire.requests === number && number < 90) {
    await client.chat.completions.create(asked);
    number++;
  }
  assert.equal(wire.requests, number + 1);
});

test("a call over the tokens of a minute is a RateLimitError", async () => {
  const [client, wire] = counting(OpenAI, "tokens");
  const call = () => client.chat.completions.create(asked, { maxRetries: 0 });
  const error = await refusedWithin(6, call, OpenAI.RateLimitError);
  assert.equal(error.code, "tokens_exceeded");
  assert.equal(wire.headers.get("x-ratelimit-limit-tokens"), "30");
  assert.ok(Number(wire.headers.get("retry-after-ms")) > 0);
});

test("a budget is a RateLimitError after one request", async () => {
  const [client, wire] = counting(OpenAI, "poor");
  const error = await refusedWithin(6, () => client.chat.completions.create(asked), OpenAI.RateLimitError);
  assert.equal(error.code, "insufficient_quota");
  wire.requests = 0;
  await refused(() => client.chat.completions.create(asked), OpenAI.RateLimitError);
  assert.equal(wire.requests, 1);
});

test("Messages: a budget is a RateLimitError after one request", async () => {
  const [claude, wire] = counting(Anthropic, "grouped");
  const error = await refusedWithin(6, () => claude.messages.create(asked), Anthropic.RateLimitError);
  assert.equal(error.error.error.type, "billing_error");
  wire.requests = 0;
  await refused(() => claude.messages.create(asked), Anthropic.RateLimitError);
  assert.equal(wire.requests, 1);
  assert.equal(wire.headers.get("x-should-retry"), "false");
});

test("a plain answer says what it cost", async () => {
  const [client, wire] = counting(OpenAI, "free");
  await client.chat.completions.create(asked);
  assert.equal(Number(wire.headers.get("x-trigate-cost-usd")), 0.000015);
});
