// Configurations of clients, with the address of this gateway and a key of one's own.

import { codeBlock, failure, field, h } from "./dom.js";
import { hasKey, json } from "./api.js";
import { baseUrl, codeKey, curl, python, typescript, word } from "./code.js";

const shell = (lines) => lines.join("\n");

/** What to write, and where, for each client. */
export function recipes(address, secret, model) {
  const body = { model, messages: [{ role: "user", content: "Name three colors." }], stream: true };
  const settings = (value) => JSON.stringify(value, null, 2);
  const host = address.replace(/^https?:\/\//, "");
  return [
    [
      "Claude Code",
      "In a shell. The address has no /v1.",
      shell([
        `export ANTHROPIC_BASE_URL=${address}`,
        `export ANTHROPIC_AUTH_TOKEN=${word(secret)}`,
        `export ANTHROPIC_DEFAULT_HAIKU_MODEL=${word(model)}`,
        `claude --model ${word(model)}`,
      ]),
    ],
    [
      "Codex",
      "In ~/.codex/config.toml; the key is in the environment variable TRIGATE_KEY.",
      shell([
        `model = ${JSON.stringify(model)}`,
        'model_provider = "trigate"',
        "",
        "[model_providers.trigate]",
        'name = "Trigate"',
        `base_url = "${address}/v1"`,
        'env_key = "TRIGATE_KEY"',
        'wire_api = "responses"',
        "",
        "# in the shell:",
        `# export TRIGATE_KEY=${word(secret)}`,
      ]),
    ],
    [
      "Gemini CLI",
      "In a shell. The address has no version.",
      shell([`export GOOGLE_GEMINI_BASE_URL=${address}`, `export GEMINI_API_KEY=${word(secret)}`, `gemini --model ${word(model)}`]),
    ],
    [
      "opencode",
      "In opencode.json of the project, or in ~/.config/opencode/opencode.json.",
      settings({
        $schema: "https://opencode.ai/config.json",
        provider: {
          trigate: {
            npm: "@ai-sdk/openai-compatible",
            name: "Trigate",
            options: { baseURL: `${address}/v1`, apiKey: secret },
            models: { [model]: { name: model } },
          },
        },
        model: `trigate/${model}`,
      }),
    ],
    [
      "Cline",
      "In its settings, choose the API provider “OpenAI Compatible”, and fill in:",
      shell([`Base URL: ${address}/v1`, `API Key:  ${secret}`, `Model ID: ${model}`]),
    ],
    [
      "Copilot CLI",
      "In a shell. The model must call tools.",
      shell([
        `export COPILOT_PROVIDER_BASE_URL=${address}/v1`,
        "export COPILOT_PROVIDER_TYPE=openai",
        `export COPILOT_PROVIDER_API_KEY=${word(secret)}`,
        `export COPILOT_MODEL=${word(model)}`,
        "copilot",
      ]),
    ],
    [
      "Copilot in VS Code",
      "Run “Chat: Manage Language Models”, choose Add Models and then Custom Endpoint. The file that opens gets:",
      settings([
        {
          name: "Trigate",
          vendor: "customendpoint",
          apiKey: secret,
          models: [
            {
              id: model,
              name: model,
              url: `${address}/v1/chat/completions`,
              apiType: "chat-completions",
              toolCalling: true,
              streaming: true,
            },
          ],
        },
      ]),
    ],
    ["Ollama’s clients", "For programs that speak Ollama’s API and have no field for a key, while the gateway has no keys.", `export OLLAMA_HOST=${host}`],
    ["curl", "", curl("/v1/chat/completions", body, secret)],
    ["Python", "pip install openai", python(body, secret)],
    ["TypeScript", "npm install openai", typescript(body, secret)],
  ];
}

export function create() {
  const models = h("datalist", { id: "connect-models" });
  const model = h("input", { list: "connect-models", value: "default", autocomplete: "off", spellcheck: "false" });
  const withKey = h("input", { type: "checkbox" });
  const keyField = field("With the key of this page", withKey);
  const trouble = h("div", {});
  const blocks = recipes(baseUrl(), "", "").map(([title, words, text]) => {
    const block = codeBlock(text, `configuration for ${title}`);
    return { block, element: h("section", {}, h("h2", {}, title), words ? h("p", {}, words) : null, block) };
  });
  const element = h(
    "div",
    {},
    h("p", {}, "The address of this gateway is ", h("code", {}, baseUrl()), "; OpenAI’s clients need ", h("code", {}, `${baseUrl()}/v1`), "."),
    h("div", { class: "fields" }, field("Model", model), keyField),
    models,
    trouble,
    blocks.map((each) => each.element),
  );

  function draw() {
    keyField.hidden = !hasKey();
    const made = recipes(baseUrl(), codeKey(withKey.checked && hasKey()), model.value.trim() || "default");
    made.forEach(([, , text], index) => blocks[index].block.setCode(text));
  }

  model.addEventListener("input", draw);
  withKey.addEventListener("input", draw);
  return {
    element,
    async show() {
      draw();
      try {
        const found = await json("/v1/models");
        models.replaceChildren(...found.data.map((each) => h("option", { value: each.id })));
        trouble.replaceChildren();
      } catch (error) {
        trouble.replaceChildren(failure(error));
      }
    },
    reset() {
      withKey.checked = false;
      draw();
    },
  };
}
