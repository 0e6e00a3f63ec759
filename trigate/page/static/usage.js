// What was used: tokens and cost by key, model, day, … as a plot and as a table.

import { failure, field, h, table } from "./dom.js";
import { json, request, withQuery } from "./api.js";
import * as format from "./format.js";
import { barPlot } from "./plot.js";

const GROUPS = [
  ["day", "Day"],
  ["model", "Model"],
  ["key", "Key"],
  ["key,model", "Key and model"],
  ["target", "Target"],
  ["upstream", "Upstream"],
  ["group", "Group"],
  ["tag", "Tag"],
  ["hour", "Hour"],
  ["month", "Month"],
  ["day,key,model", "Day, key and model"],
];
const MEASURES = [
  ["cost_usd", "Cost", (value) => format.usd(Number(value ?? 0))],
  ["calls", "Calls", format.compact],
  ["completion_tokens", "Tokens of answers", format.compact],
  ["prompt_tokens", "Tokens of prompts", format.compact],
  ["failed", "Failed calls", format.compact],
];
const MAX_ROWS = 500;
const MAX_BARS = 60;

export function create() {
  const by = h("select", {}, GROUPS.map(([value, title]) => h("option", { value }, title)));
  const measure = h("select", {}, MEASURES.map(([value, title]) => h("option", { value }, title)));
  const from = h("input", { type: "date" });
  const to = h("input", { type: "date" });
  const key = h("input", { autocomplete: "off", spellcheck: "false" });
  const model = h("input", { autocomplete: "off", spellcheck: "false" });
  const csv = h("button", { type: "button" }, "Download CSV");
  const plot = h("div", {});
  const place = h("div", {});
  const words = h("p", { class: "quiet", role: "status" });
  const trouble = h("div", {});
  const form = h(
    "form",
    {},
    h(
      "div",
      { class: "fields" },
      field("By", by),
      field("Plot", measure),
      field("From", from),
      field("To", to),
      field("Key", key),
      field("Model", model),
      h("button", { type: "submit", class: "main" }, "Show"),
      csv,
    ),
  );
  const element = h("div", {}, h("h2", { class: "unseen" }, "Usage"), form, trouble, words, plot, h("h2", {}, "Table"), place);
  let body = null;

  const asked = () => ({ group_by: by.value, from: from.value, to: to.value, key: key.value.trim(), model: model.value.trim() });
  const nameOf = (row) => body.group_by.map((column) => row[column] || "none").join(", ");

  function draw() {
    if (body === null) return;
    const [name, title, unit] = MEASURES.find((each) => each[0] === measure.value);
    const isTime = ["day", "hour", "month"].includes(body.group_by[0]);
    const rows = [...body.data].sort((a, b) => (isTime ? (nameOf(a) < nameOf(b) ? -1 : 1) : Number(b[name] ?? 0) - Number(a[name] ?? 0)));
    const bars = (isTime ? rows.slice(-MAX_BARS) : rows.slice(0, MAX_BARS)).map((row) => [nameOf(row), Number(row[name] ?? 0)]);
    const drawn = barPlot(`${title} by ${by.selectedOptions[0].textContent.toLowerCase()}`, unit);
    drawn.show(bars, `${unit(body.total[name] ?? 0)} in all${rows.length > bars.length ? `; ${bars.length} of ${rows.length} are drawn` : ""}`);
    plot.replaceChildren(drawn.element);
    const shown = table("Usage", [
      ...body.group_by.map((column) => column[0].toUpperCase() + column.slice(1)),
      ...["Calls", "Failed", "Prompt tokens", "Cached", "Answer tokens", "Cost", "Median time", "95 %", "First token, median"].map((each) => ({ title: each, number: true })),
    ]);
    const line = (row, names) =>
      h(
        "tr",
        {},
        names.map((each) => h("td", { class: "name" }, each)),
        [
          format.number(row.calls),
          format.number(row.failed),
          format.number(row.prompt_tokens),
          format.number(row.cached_tokens),
          format.number(row.completion_tokens),
          format.usd(Number(row.cost_usd ?? 0)) + (row.unpriced_calls ? "*" : ""),
          format.seconds(row.duration_p50_s),
          format.seconds(row.duration_p95_s),
          format.seconds(row.first_content_p50_s),
        ].map((each) => h("td", { class: "number" }, each)),
      );
    shown.body.append(...rows.slice(0, MAX_ROWS).map((row) => line(row, body.group_by.map((column) => row[column] || "none"))));
    shown.body.append(line(body.total, body.group_by.map((_, index) => (index ? "" : "All"))));
    place.replaceChildren(
      shown.element,
      h("p", { class: "quiet" }, body.total.unpriced_calls ? `* ${format.number(body.total.unpriced_calls)} calls without a known price are not in the cost.` : ""),
      rows.length > MAX_ROWS ? h("p", { class: "quiet" }, `The first ${MAX_ROWS} of ${rows.length} rows; the CSV has all.`) : "",
    );
  }

  async function load() {
    trouble.replaceChildren();
    try {
      body = await json(withQuery("/v1/usage", asked()));
      words.textContent = `From ${format.time(body.from)} to ${format.time(body.to)}: ${format.number(body.total.calls)} calls, ${format.number(body.total.prompt_tokens + body.total.completion_tokens)} tokens, ${format.usd(Number(body.total.cost_usd ?? 0))}`;
      draw();
    } catch (error) {
      trouble.replaceChildren(failure(error));
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    load();
  });
  by.addEventListener("change", load);
  measure.addEventListener("change", draw);
  csv.addEventListener("click", async () => {
    trouble.replaceChildren();
    try {
      const response = await request(withQuery("/v1/usage", { ...asked(), format: "csv" }));
      const url = URL.createObjectURL(await response.blob());
      h("a", { href: url, download: `usage-by-${by.value.replaceAll(",", "-")}.csv` }).click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    } catch (error) {
      trouble.replaceChildren(failure(error));
    }
  });
  return {
    element,
    show: load,
    reset() {
      body = null;
      plot.replaceChildren();
      place.replaceChildren();
      words.textContent = "";
    },
  };
}
