// Exchanges that have ended: search, and what happened in one of them.

import { announce, codeBlock, failure, field, h, table } from "./dom.js";
import { json, withQuery } from "./api.js";
import { codeKey, curl } from "./code.js";
import * as format from "./format.js";
import { timeline } from "./plot.js";

const LIMIT = 50;
const WELL = ["complete", "cancelled", "finished"];
const OUTCOMES = [...WELL, "lost", "upstream_unavailable", "upstream_timeout", "rate_limited", "stream_cancelled", "model_not_found", "client_stalled"];

export const look = (outcome) => (outcome === "complete" ? "good" : WELL.includes(outcome) ? "warn" : "bad");

export function create() {
  const id = h("input", { autocomplete: "off", spellcheck: "false" });
  const key = h("input", { autocomplete: "off", spellcheck: "false" });
  const model = h("input", { autocomplete: "off", spellcheck: "false" });
  const outcomes = h("datalist", { id: "history-outcomes" }, OUTCOMES.map((each) => h("option", { value: each })));
  const outcome = h("input", { list: "history-outcomes", autocomplete: "off", spellcheck: "false" });
  const from = h("input", { type: "datetime-local" });
  const to = h("input", { type: "datetime-local" });
  const failed = h("input", { type: "checkbox" });
  const found = table("Exchanges that have ended", [
    "Request",
    "Started",
    "Model and target",
    "Outcome",
    { title: "Duration", number: true },
    { title: "First token", number: true },
    { title: "Tokens", number: true },
    { title: "Cost", number: true },
  ]);
  const older = h("button", { type: "button", hidden: true }, "Older");
  const words = h("p", { class: "quiet", role: "status" });
  const trouble = h("div", {});
  const detail = h("div", {});
  const form = h(
    "form",
    { role: "search", "aria-label": "Search exchanges" },
    h(
      "div",
      { class: "fields" },
      field("Id of the request or the exchange", id),
      field("Key", key),
      field("Model", model),
      field("Outcome", outcome),
      field("From", from),
      field("To", to),
      field("Failed only", failed),
      h("button", { type: "submit", class: "main" }, "Search"),
    ),
    outcomes,
  );
  const element = h("div", {}, h("h2", { class: "unseen" }, "History"), form, trouble, detail, words, found.element, h("p", { class: "buttons" }, older));
  let last = null;
  let count = 0;

  const moment = (input) => (input.value ? new Date(input.value).toISOString() : "");

  function row(record) {
    const button = h("button", { type: "button", class: "link", onclick: () => open(record, button) }, record.request_id);
    return h(
      "tr",
      {},
      h("td", { class: "name" }, button, record.key ? h("span", { class: "sub" }, `key ${record.key}`) : null),
      h("td", {}, format.time(record.started_at)),
      h("td", { class: "name" }, record.model, h("span", { class: "sub" }, record.target ?? "no target")),
      h("td", {}, h("span", { class: `badge ${look(record.outcome)}` }, record.outcome), record.status ? h("span", { class: "sub" }, String(record.status)) : null),
      h("td", { class: "number" }, format.seconds(record.duration_s)),
      h("td", { class: "number" }, format.seconds(record.first_content_s)),
      h("td", { class: "number" }, record.prompt_tokens === null ? "–" : `${format.number(record.prompt_tokens)} + ${format.number(record.completion_tokens)}`),
      h("td", { class: "number" }, record.cost_usd === null ? "–" : format.usd(Number(record.cost_usd))),
    );
  }

  async function search(isMore) {
    trouble.replaceChildren();
    try {
      const page = await json(
        withQuery("/v1/exchanges", {
          id: id.value.trim(),
          key: key.value.trim(),
          model: model.value.trim(),
          outcome: outcome.value.trim(),
          from: moment(from),
          to: moment(to),
          failed: failed.checked ? "true" : "",
          limit: LIMIT,
          after: isMore ? last : "",
        }),
      );
      if (!isMore) {
        found.body.replaceChildren();
        count = 0;
      }
      found.body.append(...page.data.map(row));
      count += page.data.length;
      last = page.data.length ? page.data[page.data.length - 1].id : last;
      older.hidden = !page.has_more;
      words.textContent = count ? `${count} exchanges${page.has_more ? ", and there are older ones" : ""}` : "No exchange that has ended is like that.";
      if (!isMore && id.value.trim() && page.data.length === 1) open(page.data[0], null);
    } catch (error) {
      trouble.replaceChildren(failure(error));
    }
  }

  // -- one exchange

  /** The parts of an attempt, each [label, start, length, class, text]. */
  function partsOf(attempt, index) {
    const whole = attempt.duration_s ?? 0;
    const name = `${index + 1}.`;
    const marks = [
      ["waits for a slot", attempt.requested_s, "wait"],
      ["connects, until the head", attempt.head_s, ""],
      ["until the first token", attempt.first_content_s, ""],
    ].filter((mark) => mark[1] !== null && mark[1] !== undefined && (mark[2] !== "wait" || mark[1] >= 0.001));
    const parts = [];
    let at = 0;
    for (const [label, end, kind] of marks) {
      parts.push([`${name} ${label}`, attempt.started_s + at, Math.max(0, end - at), kind, format.seconds(Math.max(0, end - at))]);
      at = end;
    }
    const isWell = WELL.includes(attempt.outcome) || attempt.outcome === "superseded";
    const label = attempt.first_content_s === null ? attempt.outcome : "answer";
    parts.push([`${name} ${label}`, attempt.started_s + at, Math.max(0, whole - at), isWell ? "good" : "bad", format.seconds(Math.max(0, whole - at))]);
    return parts;
  }

  function open(record, opener) {
    const parts = [];
    // the table below has the names of the targets
    if (record.waited_s >= 0.001) parts.push(["queue", 0, record.waited_s, "wait", format.seconds(record.waited_s)]);
    record.attempts.forEach((attempt, index) => parts.push(...partsOf(attempt, index)));
    const end = record.duration_s ?? 0;
    const attempts = table("Attempts", ["Attempt", "Why", { title: "Began", number: true }, { title: "First token", number: true }, { title: "Duration", number: true }, "Outcome"]);
    attempts.body.append(
      ...record.attempts.map((attempt, index) =>
        h(
          "tr",
          {},
          h("td", { class: "name" }, `${index + 1}. ${attempt.target}`),
          h("td", {}, attempt.why),
          h("td", { class: "number" }, format.seconds(attempt.started_s)),
          h("td", { class: "number" }, format.seconds(attempt.first_content_s)),
          h("td", { class: "number" }, format.seconds(attempt.duration_s)),
          h("td", {}, attempt.outcome + (attempt.status ? ` (${attempt.status})` : "")),
        ),
      ),
    );
    const heading = h("h3", { tabindex: "-1" }, `Exchange ${record.request_id}`);
    const close = h("button", {
      type: "button",
      onclick: () => {
        detail.replaceChildren();
        opener?.focus();
      },
    });
    close.append("Close");
    const facts = [
      ["Id", record.id],
      ["Key", record.key || "none"],
      ["Group", record.group],
      ["Endpoint", record.endpoint],
      ["Model", record.model],
      ["Target", record.target],
      ["Outcome", record.outcome + (record.status ? ` (${record.status})` : "")],
      ["Started", format.time(record.started_at)],
      ["Duration", format.seconds(record.duration_s)],
      ["Events, bytes", `${format.number(record.events)}, ${format.bytes(record.bytes)}`],
      [
        "Tokens",
        record.prompt_tokens === null
          ? null
          : `${format.number(record.prompt_tokens)} of the prompt (${format.number(record.cached_tokens)} cached), ${format.number(record.completion_tokens)} of the answer${record.counted ? ", estimated" : ""}`,
      ],
      ["Cost", record.cost_usd === null ? "unknown" : `${record.cost_usd} USD`],
      ["Worker", record.worker],
    ].filter((fact) => fact[1]);
    const body = { model: record.model, messages: [{ role: "user", content: "…" }], ...(record.stream ? { stream: true } : {}) };
    const failedOne = !WELL.includes(record.outcome);
    const path = record.endpoint.startsWith("/v1") || record.endpoint.startsWith("/api") ? record.endpoint : `/v1${record.endpoint}`;
    detail.replaceChildren(
      h(
        "section",
        { class: "panel", "aria-label": `Exchange ${record.request_id}` },
        heading,
        failedOne
          ? h("p", { class: "failure" }, `It ended with ${record.outcome}${record.status ? `, status ${record.status}` : ""}. Texts of errors are not recorded; the log has the lines of ${record.request_id}.`)
          : null,
        parts.length ? timeline(`Time line of ${record.request_id}: ${parts.map((part) => `${part[0]} ${part[4]}`).join(", ")}`, parts, end) : null,
        record.attempts.length ? attempts.element : h("p", { class: "quiet" }, "No attempt was made."),
        h("dl", { class: "pairs" }, facts.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)])),
        h("h3", {}, "Repeat it"),
        h("p", { class: "quiet" }, "What was asked is not recorded: put it in the place of …"),
        codeBlock(curl(path, body, codeKey(false)), "curl command that repeats it"),
        h("p", { class: "buttons" }, close),
      ),
    );
    heading.focus();
    announce(`Exchange ${record.request_id} is open`);
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    detail.replaceChildren();
    search(false);
  });
  older.addEventListener("click", () => search(true));
  return {
    element,
    show(asked) {
      if (asked.has("id")) id.value = asked.get("id");
      if (asked.has("key")) key.value = asked.get("key");
      search(false);
    },
    reset() {
      found.body.replaceChildren();
      detail.replaceChildren();
    },
  };
}
