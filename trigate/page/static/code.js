// The same call as a command or a program.

import { keyForCode } from "./api.js";

export const baseUrl = () => location.origin;

/** A text in single quotes of a shell. */
export const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The same where it is needed. */
export const word = (text) => (/^[\w.:/@%+-]+$/.test(text) ? text : quoted(text));

const SECRET = "YOUR_GATEWAY_KEY";

/** The key for a piece of code: the one that is used, if the reader wants it in there. */
export const codeKey = (isShown) => (isShown && keyForCode()) || SECRET;

export function curl(path, body, secret = SECRET) {
  const lines = [
    `curl -N ${quoted(baseUrl() + path)}`,
    `  -H ${quoted(`Authorization: Bearer ${secret}`)}`,
    `  -H "Content-Type: application/json"`,
    `  -d ${quoted(JSON.stringify(body, null, 2))}`,
  ];
  return lines.join(" \\\n");
}

/** A value as a literal of Python. */
export function pythonValue(value, indent = 0) {
  const inner = " ".repeat(indent + 4);
  const outer = " ".repeat(indent);
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (Array.isArray(value)) {
    if (!value.length) return "[]";
    return `[\n${value.map((each) => `${inner}${pythonValue(each, indent + 4)},\n`).join("")}${outer}]`;
  }
  if (typeof value === "object")
    return `{${Object.entries(value)
      .map(([name, each]) => `${JSON.stringify(name)}: ${pythonValue(each, indent)}`)
      .join(", ")}}`;
  // the escapes of JSON mean the same in Python; surrogates are written in pairs there
  return typeof value === "string" ? JSON.stringify(value).replace(/[\ud800-\udfff]/g, (half) => `\\u${half.charCodeAt(0).toString(16)}`) : String(value);
}

export function python(body, secret = SECRET) {
  const { stream, stream_options: _, ...fields } = body;
  const values = Object.entries(fields).map(([name, value]) => `    ${name}=${pythonValue(value, 4)},\n`);
  const head = `from openai import OpenAI\n\nclient = OpenAI(base_url=${JSON.stringify(`${baseUrl()}/v1`)}, api_key=${JSON.stringify(secret)})\n`;
  if (stream)
    return (
      `${head}stream = client.chat.completions.create(\n${values.join("")}    stream=True,\n)\n` +
      "for chunk in stream:\n    if chunk.choices:\n        print(chunk.choices[0].delta.content or \"\", end=\"\", flush=True)\n"
    );
  return `${head}answer = client.chat.completions.create(\n${values.join("")})\nprint(answer.choices[0].message.content)\n`;
}

export function typescript(body, secret = SECRET) {
  const { stream, stream_options: _, ...fields } = body;
  const shown = JSON.stringify(stream ? { ...fields, stream: true } : fields, null, 2);
  const head = `import OpenAI from "openai";\n\nconst client = new OpenAI({ baseURL: ${JSON.stringify(`${baseUrl()}/v1`)}, apiKey: ${JSON.stringify(secret)} });\n`;
  if (stream)
    return (
      `${head}const stream = await client.chat.completions.create(${shown});\n` +
      "for await (const chunk of stream) process.stdout.write(chunk.choices[0]?.delta?.content ?? \"\");\n"
    );
  return `${head}const answer = await client.chat.completions.create(${shown});\nconsole.log(answer.choices[0].message.content);\n`;
}
