// Asks a gateway one question through the official SDK, whole and streamed, and prints both answers as JSON.

import OpenAI from "openai";

const { BASE_URL, MODEL, QUESTION } = process.env;
const client = new OpenAI({ baseURL: BASE_URL, apiKey: "not-needed" });
const call = { model: MODEL, messages: [{ role: "user", content: QUESTION }], temperature: 0, max_tokens: 48 };
const answer = await client.chat.completions.create(call);
let streamed = "";
for await (const chunk of await client.chat.completions.create({ ...call, stream: true })) {
  streamed += chunk.choices[0]?.delta?.content ?? "";
}
console.log(JSON.stringify({ whole: answer.choices[0].message.content, streamed, model: answer.model }));
