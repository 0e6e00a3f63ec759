// A chat with any model through the gateway, beside a second one if wanted.

import { announce, codeBlock, failure, field, h, setText } from "./dom.js";
import { json, readEvents, request, withQuery } from "./api.js";
import { codeKey, curl, python, typescript } from "./code.js";
import * as format from "./format.js";

const MAX_IMAGE_BYTES = 8 * 1024 * 1024;
const MAX_IMAGES = 4;

export function create() {
  const models = h("datalist", { id: "playground-models" });
  const model = h("input", { list: "playground-models", value: "default", autocomplete: "off", spellcheck: "false", required: true });
  const second = h("input", { list: "playground-models", autocomplete: "off", spellcheck: "false", placeholder: "none" });
  const system = h("textarea", { rows: 2 });
  const temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, size: 6 });
  const topP = h("input", { type: "number", min: 0, max: 1, step: 0.05, size: 6 });
  const maxTokens = h("input", { type: "number", min: 1, step: 1, size: 8 });
  const streams = h("input", { type: "checkbox", checked: true });
  const text = h("textarea", { rows: 3, required: true });
  const file = h("input", { type: "file", accept: "image/png,image/jpeg,image/gif,image/webp", multiple: true });
  const attached = h("ul", { class: "quiet" });
  const sendButton = h("button", { type: "submit", class: "main" }, "Send");
  const stopButton = h("button", { type: "button", disabled: true }, "Stop");
  const again = h("button", { type: "button", disabled: true }, "Regenerate");
  const clear = h("button", { type: "button" }, "New chat");
  const chats = h("div", { class: "chats" });
  const trouble = h("div", {});
  const withKey = h("input", { type: "checkbox" });
  const codes = [
    ["curl", codeBlock("", "curl command")],
    ["Python", codeBlock("", "Python program")],
    ["TypeScript", codeBlock("", "TypeScript program")],
  ];
  const form = h(
    "form",
    {},
    h("div", { class: "fields" }, h("div", { class: "grow" }, field("Model", model)), h("div", { class: "grow" }, field("Compare with", second))),
    h(
      "details",
      {},
      h("summary", {}, "System prompt and parameters"),
      field("System prompt", system),
      h(
        "div",
        { class: "fields" },
        field("Temperature", temperature),
        field("top_p", topP),
        field("Most tokens", maxTokens),
        field("Stream the answer", streams),
      ),
    ),
    chats,
    field("Message", text, "Ctrl+Enter sends it."),
    h("div", { class: "fields" }, field("Images", file), attached),
    h("p", { class: "buttons" }, sendButton, stopButton, again, clear),
    trouble,
  );
  const element = h(
    "div",
    {},
    h("h2", { class: "unseen" }, "Playground"),
    models,
    form,
    h(
      "details",
      {},
      h("summary", {}, "This call as code"),
      h("p", { class: "buttons" }, field("With the key of this page", withKey)),
      codes.map(([title, block]) => [h("h3", {}, title), block]),
    ),
  );

  let images = []; // {name, url}: data URLs
  let turns = []; // {text, images}
  let sides = []; // {model, messages, element, …}
  let running = null;
  let isLoaded = false;

  // -- what is asked

  function userMessage(turn) {
    if (!turn.images.length) return { role: "user", content: turn.text };
    const pictures = turn.images.map((image) => ({ type: "image_url", image_url: { url: image.url } }));
    return { role: "user", content: [{ type: "text", text: turn.text }, ...pictures] };
  }

  function bodyFor(side, messages) {
    const body = { model: side.model, messages };
    if (system.value.trim()) body.messages = [{ role: "system", content: system.value.trim() }, ...messages];
    if (temperature.value !== "") body.temperature = Number(temperature.value);
    if (topP.value !== "") body.top_p = Number(topP.value);
    if (maxTokens.value !== "") body.max_tokens = Number(maxTokens.value);
    if (streams.checked) {
      body.stream = true;
      body.stream_options = { include_usage: true };
    }
    return body;
  }

  function showCode() {
    const side = sides[0] ?? { model: model.value || "default", messages: [] };
    const messages = side.messages.filter((message) => message.content !== "");
    const asked = messages.length ? messages.slice(0, messages.findLastIndex((message) => message.role === "user") + 1) : [];
    if (!asked.length) asked.push(userMessage({ text: text.value || "Hello", images }));
    const body = shortened(bodyFor({ model: model.value || "default" }, asked));
    const secret = codeKey(withKey.checked);
    const made = [curl("/v1/chat/completions", body, secret), python(body, secret), typescript(body, secret)];
    codes.forEach(([, block], index) => block.setCode(made[index]));
  }

  /** A body whose images are left out. */
  function shortened(body) {
    return JSON.parse(JSON.stringify(body), (name, value) =>
      name === "url" && typeof value === "string" && value.length > 200 ? `${value.slice(0, 40)}…` : value,
    );
  }

  // -- the answers

  function makeSide(name) {
    const messages = h("div", { class: "messages", role: "log", "aria-live": "off", "aria-label": `Chat with ${name}` });
    return { model: name, messages: [], list: messages, element: h("section", { class: "chat", "aria-label": name }, h("h3", {}, name), messages) };
  }

  function addMessage(side, who, content, pictures = []) {
    const words = h("div", { class: "text" }, content);
    const thoughts = h("div", {});
    const reasoning = h("details", { hidden: true }, h("summary", {}, "Reasoning"), thoughts);
    const measures = h("p", { class: "measures" });
    const element = h(
      "article",
      { class: `message ${who === "You" ? "user" : "assistant"}` },
      h("div", { class: "who" }, who),
      reasoning,
      words,
      pictures.map((image) => h("img", { src: image.url, alt: image.name })),
      measures,
    );
    side.list.append(element);
    return { element, words, measures, reasoning, thoughts };
  }

  async function ask(side, signal) {
    const shown = addMessage(side, side.model, "");
    const began = performance.now();
    const body = bodyFor(side, side.messages);
    const answer = { role: "assistant", content: "" };
    let firstMs = null;
    let events = 0;
    let usage = null;
    let id = "";
    const measure = (end) => {
      const passed = (performance.now() - began) / 1000;
      const first = firstMs === null ? "" : `first token ${format.seconds(firstMs / 1000)}`;
      const count = usage?.completion_tokens ?? events;
      const long = firstMs === null ? passed : passed - firstMs / 1000;
      const speed = count > 1 && long > 0.05 ? `${format.rate(count / long)} tokens/s` : "";
      const tokens = usage ? `${format.number(usage.prompt_tokens)} + ${format.number(usage.completion_tokens)} tokens` : "";
      setText(shown.measures, [first, speed, tokens, format.seconds(passed), side.cost, end].filter(Boolean).join(" · "));
    };
    side.cost = "";
    let end = "";
    try {
      const response = await request("/v1/chat/completions", {
        method: "POST",
        signal,
        headers: { "content-type": "application/json" },
        body: JSON.stringify(body),
      });
      id = response.headers.get("x-request-id") ?? "";
      const take = (delta) => {
        const thought = delta?.reasoning_content ?? delta?.reasoning;
        if (typeof delta?.content === "string" && delta.content) {
          firstMs ??= performance.now() - began;
          events += 1;
          answer.content += delta.content;
          shown.words.append(delta.content);
        }
        if (typeof thought === "string" && thought) {
          firstMs ??= performance.now() - began;
          events += 1;
          shown.reasoning.hidden = false;
          shown.thoughts.append(thought);
        }
      };
      if (body.stream) {
        let isDone = false;
        await readEvents(response, (data) => {
          if (data === "[DONE]") {
            isDone = true;
            return;
          }
          const event = JSON.parse(data);
          if (event.error) throw new Error(event.error.message ?? "The answer broke off.");
          usage = event.usage ?? usage;
          take(event.choices?.[0]?.delta);
          measure("");
        });
        if (!isDone) throw new Error("The answer broke off.");
      } else {
        const whole = await response.json();
        usage = whole.usage ?? null;
        take(whole.choices?.[0]?.message);
      }
    } catch (error) {
      if (error.name === "AbortError") end = "stopped";
      else shown.element.append(failure(error));
    }
    measure(end);
    side.messages.push(answer);
    side.lastAnswer = shown.element;
    if (id) {
      shown.measures.append(" · ", h("a", { href: `#history?id=${encodeURIComponent(id)}` }, id));
      const cost = await costOf(id);
      if (cost) shown.measures.prepend(`${cost} · `);
    }
  }

  /** What a call has cost; its record is written soon after its end. */
  async function costOf(id) {
    for (const waitMs of [150, 500, 1500]) {
      await new Promise((resolve) => setTimeout(resolve, waitMs));
      try {
        const page = await json(withQuery("/v1/exchanges", { id, limit: 1 }));
        if (page.data.length) return page.data[0].cost_usd === null ? "cost unknown" : format.usd(Number(page.data[0].cost_usd));
      } catch {
        return "";
      }
    }
    return "";
  }

  async function run() {
    running = new AbortController();
    sendButton.disabled = again.disabled = clear.disabled = true;
    stopButton.disabled = false;
    trouble.replaceChildren();
    const asked = Promise.all(sides.map((side) => ask(side, running.signal)));
    // the costs come later: what is on now is over when the streams are
    await Promise.race([asked, allAnswered()]);
    running = null;
    sendButton.disabled = again.disabled = clear.disabled = false;
    stopButton.disabled = true;
    announce("The answer has ended.");
    showCode();
  }

  async function allAnswered() {
    while (sides.some((side) => side.messages.at(-1)?.role !== "assistant")) await new Promise((resolve) => setTimeout(resolve, 50));
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (running || !text.value.trim()) return;
    const names = [model.value.trim(), second.value.trim()].filter(Boolean);
    const turn = { text: text.value, images };
    turns.push(turn);
    const kept = new Map(sides.map((side, index) => [`${index} ${side.model}`, side]));
    sides = names.map((name, index) => {
      const side = kept.get(`${index} ${name}`) ?? makeSide(name);
      if (!side.messages.length) {
        for (const earlier of turns.slice(0, -1)) {
          // another model begins with what was said before, without the other's answers
          side.messages.push(userMessage(earlier));
          addMessage(side, "You", earlier.text, earlier.images);
        }
      }
      side.messages.push(userMessage(turn));
      addMessage(side, "You", turn.text, turn.images);
      return side;
    });
    chats.classList.toggle("two-models", sides.length > 1);
    chats.replaceChildren(...sides.map((side) => side.element));
    text.value = "";
    images = [];
    file.value = "";
    showImages();
    run();
  });
  text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  stopButton.addEventListener("click", () => running?.abort());
  again.addEventListener("click", () => {
    if (running) return;
    for (const side of sides) {
      if (side.messages.at(-1)?.role === "assistant") side.messages.pop();
      side.lastAnswer?.remove();
    }
    run();
  });
  clear.addEventListener("click", () => {
    turns = [];
    sides = [];
    chats.replaceChildren();
    again.disabled = true;
    showCode();
    text.focus();
  });

  // -- images

  function showImages() {
    attached.replaceChildren(
      ...images.map((image) =>
        h(
          "li",
          {},
          `${image.name} `,
          h(
            "button",
            {
              type: "button",
              class: "small",
              "aria-label": `Remove ${image.name}`,
              onclick: () => {
                images = images.filter((each) => each !== image);
                showImages();
              },
            },
            "Remove",
          ),
        ),
      ),
    );
  }

  file.addEventListener("change", async () => {
    trouble.replaceChildren();
    for (const each of file.files) {
      if (images.length >= MAX_IMAGES || each.size > MAX_IMAGE_BYTES) {
        trouble.replaceChildren(failure(new Error(`At most ${MAX_IMAGES} images of at most ${format.bytes(MAX_IMAGE_BYTES)} each.`)));
        break;
      }
      const url = await new Promise((resolve, reject) => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.onerror = () => reject(reader.error);
        reader.readAsDataURL(each);
      });
      images.push({ name: each.name, url });
    }
    file.value = "";
    showImages();
    showCode();
  });
  for (const control of [model, system, temperature, topP, maxTokens, streams, text, withKey]) control.addEventListener("input", showCode);
  showCode();

  return {
    element,
    async show() {
      if (isLoaded) return;
      try {
        const found = await json("/v1/models");
        models.replaceChildren(...found.data.map((each) => h("option", { value: each.id })));
        if (found.data.length && !found.data.some((each) => each.id === model.value)) model.value = found.data[0].id;
        isLoaded = true;
        showCode();
      } catch (error) {
        trouble.replaceChildren(failure(error));
      }
    },
    reset() {
      isLoaded = false;
      running?.abort();
    },
  };
}
