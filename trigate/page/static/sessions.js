// Remembered conversations, and the channels by which messages come.

import { announce, failure, field, h, keyed, setText, table } from "./dom.js";
import { json, send, withQuery } from "./api.js";
import * as format from "./format.js";

const LOOK = { connected: "good", connecting: "warn", disconnected: "bad", disabled: "warn" };
const MAX_CHARS = 20000;

function textOf(message) {
  const content = message?.content;
  if (typeof content === "string") return content;
  if (!Array.isArray(content)) return JSON.stringify(message);
  return content.map((part) => (typeof part.text === "string" ? part.text : `[${part.type ?? "part"}]`)).join("\n");
}

export function create() {
  const trouble = h("div", {});
  const owner = h("input", { autocomplete: "off", spellcheck: "false" });
  const form = h("form", {}, h("div", { class: "fields" }, field("Owner", owner, "Empty = this key. Another one needs the admin's key."), h("button", { type: "submit" }, "Show")));
  const list = table("Sessions", ["Session", "Last active", { title: "Turns", number: true }, { title: "Messages", number: true }, { title: "Tokens", number: true }, "State", ""]);
  const more = h("button", { type: "button", hidden: true }, "More");
  const detail = h("div", {});
  const channels = table("Channels", ["Channel", "State", "Last event", { title: "Received", number: true }, { title: "Replied", number: true }, { title: "Queued", number: true }, "Last error"]);
  const element = h("div", {}, h("h2", {}, "Channels"), channels.element, h("h2", {}, "Sessions"), form, trouble, detail, list.element, h("p", { class: "buttons" }, more));
  let last = null;

  const path = (session, tail = "", query = {}) => withQuery(`/v1/sessions/${encodeURIComponent(session.id)}${tail}`, { ...query, owner: owner.value.trim() });

  async function attempt(action) {
    trouble.replaceChildren();
    try {
      await action();
    } catch (error) {
      trouble.replaceChildren(failure(error));
    }
  }

  function row(session) {
    const opener = h("button", { type: "button", class: "link", onclick: () => attempt(() => open(session, opener)) }, session.id);
    const reset = h("button", { type: "button", class: "small danger", "aria-label": `Reset ${session.id}` }, "Reset");
    reset.addEventListener("click", () =>
      attempt(async () => {
        if (reset.textContent === "Reset") {
          // once more, to be sure
          reset.textContent = "Really reset";
          return;
        }
        await send("POST", path(session, "/reset"));
        announce(`${session.id} is reset`);
        await load(false);
      }),
    );
    return h(
      "tr",
      {},
      h("td", { class: "name" }, opener),
      h("td", {}, format.time(session.active_at)),
      h("td", { class: "number" }, format.number(session.turns)),
      h("td", { class: "number" }, format.number(session.messages)),
      h("td", { class: "number" }, format.number(session.tokens)),
      h("td", {}, session.busy ? h("span", { class: "badge warn" }, "busy") : "idle"),
      h("td", {}, reset),
    );
  }

  async function open(session, opener) {
    const found = await json(path(session, "/messages", { limit: 100 }));
    const heading = h("h3", { tabindex: "-1" }, `Session ${session.id}`);
    const close = h(
      "button",
      {
        type: "button",
        onclick: () => {
          detail.replaceChildren();
          opener.focus();
        },
      },
      "Close",
    );
    detail.replaceChildren(
      h(
        "section",
        { class: "panel", "aria-label": `Session ${session.id}` },
        heading,
        h(
          "div",
          { class: "messages" },
          found.data.map((each) =>
            h(
              "article",
              { class: `message ${each.message?.role === "user" ? "user" : ""}` },
              h("div", { class: "who" }, `${each.message?.role ?? "?"}, ${format.time(each.created_at)}${each.partial ? ", truncated" : ""}`),
              h("div", { class: "text" }, textOf(each.message).slice(0, MAX_CHARS)),
            ),
          ),
        ),
        found.has_more ? h("p", { class: "quiet" }, "There are more messages.") : found.data.length ? "" : h("p", { class: "quiet" }, "It has no message since its last reset."),
        h("p", { class: "buttons" }, close),
      ),
    );
    heading.focus();
  }

  async function load(isMore) {
    const page = await json(withQuery("/v1/sessions", { limit: 50, after: isMore ? last : "", owner: owner.value.trim() }));
    if (!isMore) list.body.replaceChildren();
    list.body.append(...page.data.map(row));
    if (!page.data.length && !isMore) list.body.append(h("tr", {}, h("td", { colspan: 7, class: "quiet" }, "No conversation is remembered.")));
    last = page.last_id;
    more.hidden = !page.has_more;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    detail.replaceChildren();
    attempt(() => load(false));
  });
  more.addEventListener("click", () => attempt(() => load(true)));

  return {
    element,
    show: () => attempt(() => load(false)),
    reset() {
      list.body.replaceChildren();
      detail.replaceChildren();
    },
    take({ status }) {
      keyed(
        channels.body,
        status.channels,
        (channel) => channel.name,
        () => {
          const state = h("span", { class: "badge" });
          const line = h("tr", {}, h("td", { class: "name" }), h("td", {}, state), h("td", {}), h("td", { class: "number" }), h("td", { class: "number" }), h("td", { class: "number" }), h("td", { class: "name" }));
          line.state = state;
          return line;
        },
        (line, channel) => {
          setText(line.children[0], `${channel.name} (${channel.type})`);
          setText(line.state, channel.status);
          line.state.className = `badge ${LOOK[channel.status] ?? ""}`;
          setText(line.children[2], format.time(channel.last_event_at));
          setText(line.children[3], format.number(channel.received));
          setText(line.children[4], format.number(channel.replied));
          setText(line.children[5], format.number(channel.queued));
          setText(line.children[6], channel.last_error ?? "");
        },
      );
    },
  };
}
