// What flows at this moment: exchanges in flight, plots of the last minutes, upstreams, workers, queues.

import { announce, failure, h, keyed, setText, table } from "./dom.js";
import { json, send, withQuery } from "./api.js";
import * as format from "./format.js";
import { timePlot } from "./plot.js";

const SPAN_S = 15 * 60;
const REFRESH_S = 5;
const MAX_POINTS = 1000;
const RECENT_S = 60;
const UPSTREAM_LOOK = { up: "good", unknown: "", down: "bad", disabled: "warn" };
const BREAKER_LOOK = { closed: "good", half_open: "warn", open: "bad" };
const PHASE_LOOK = { streaming: "good", reading: "good", queued: "warn", pausing: "warn", ending: "" };

export function create() {
  const tiles = ["In flight", "Tokens per second", "Queued", "Ended", "Failed", "Cost"].map((title) => {
    const value = h("dd", {}, "–");
    return { value, element: h("div", {}, h("dt", {}, title), value) };
  });
  const first = timePlot("Time to the first token", SPAN_S, (value) => format.seconds(value));
  const throughput = timePlot("Tokens per second", SPAN_S, (value) => format.compact(value));
  const live = table("Exchanges in flight", [
    "Request",
    "Model and target",
    "Phase",
    { title: "Age", number: true },
    { title: "Time left", number: true },
    { title: "Tokens/s", number: true },
    { title: "Events", number: true },
    { title: "Cost", number: true },
    "",
  ]);
  const more = h("p", { class: "quiet" });
  const upstreams = h("ul", { class: "cards" });
  const workers = table("Workers", ["Worker", "State", { title: "In flight", number: true }, { title: "Uptime", number: true }]);
  const queues = h("dl", { class: "pairs" });
  const trouble = h("div", {});
  const element = h(
    "div",
    {},
    h("h2", { class: "unseen" }, "Now"),
    trouble,
    h("dl", { class: "tiles" }, tiles.map((tile) => tile.element)),
    h("h2", {}, "Upstreams"),
    upstreams,
    h("h2", {}, "In flight"),
    live.element,
    more,
    h("h2", {}, "The last 15 minutes"),
    h("div", { class: "two" }, first.element, throughput.element),
    h("div", { class: "two" }, h("section", {}, h("h2", {}, "Workers"), workers.element), h("section", {}, h("h2", {}, "Queues"), queues)),
  );

  let records = [];
  let rates = [];
  let past = [];
  const watchedSince = Date.now() / 1000;
  let before = new Map();
  let beforeAt = 0;
  const states = new Map();
  let timer = null;

  // -- exchanges in flight

  function makeRow(row) {
    const cancel = h("button", { type: "button", class: "small danger", "aria-label": `Cancel ${row.id}` }, "Cancel");
    cancel.addEventListener("click", async () => {
      cancel.disabled = true;
      try {
        const answer = await send("DELETE", `/status/streams/${encodeURIComponent(row.id)}`);
        announce(answer.cancelled ? `Cancelled ${row.id}` : `${row.id} was ending already`);
      } catch (error) {
        announce(error.message);
        cancel.disabled = error.status === 404;
      }
    });
    const cells = {
      key: h("span", { class: "sub" }),
      model: h("span", {}),
      target: h("span", { class: "sub" }),
      attempts: h("ul", { class: "attempts" }),
      phase: h("span", { class: "badge" }),
      age: h("td", { class: "number" }),
      left: h("td", { class: "number" }),
      speed: h("td", { class: "number" }),
      events: h("td", { class: "number" }),
      cost: h("td", { class: "number" }),
    };
    const element = h(
      "tr",
      {},
      h("td", { class: "name" }, h("code", {}, row.id), cells.key),
      h("td", { class: "name" }, cells.model, cells.target, cells.attempts),
      h("td", {}, cells.phase),
      cells.age,
      cells.left,
      cells.speed,
      cells.events,
      cells.cost,
      h("td", {}, cancel),
    );
    element.cells2 = cells;
    return element;
  }

  function updateRow(element, row) {
    const cells = element.cells2;
    setText(cells.key, row.key ? `key ${row.key}` : "");
    setText(cells.model, row.model);
    setText(cells.target, row.target ?? "no target yet");
    const position = row.queue_position ? ` (${row.queue_position}.)` : "";
    setText(cells.phase, row.phase + position + (row.client_gone ? ", client gone" : ""));
    cells.phase.className = `badge ${PHASE_LOOK[row.phase] ?? ""}`;
    setText(cells.age, format.seconds(row.age_s));
    setText(cells.left, format.seconds(row.deadline_left_s));
    setText(cells.speed, format.rate(row.tokens_per_s));
    setText(cells.events, format.number(row.events));
    setText(cells.cost, format.microUsd(row.cost_microusd));
    keyed(
      cells.attempts,
      row.attempts.length > 1 || row.attempts.some((each) => each.outcome) ? row.attempts.map((each, index) => ({ ...each, index })) : [],
      (attempt) => String(attempt.index),
      () => h("li"),
      (line, attempt) =>
        setText(
          line,
          `${attempt.target}: ${attempt.phase ?? attempt.outcome}${attempt.status ? ` (${attempt.status})` : ""}, ${attempt.why}`,
        ),
    );
  }

  // -- upstreams

  function updateUpstream(card, { upstream, targets, at }) {
    const look = UPSTREAM_LOOK[upstream.state] ?? "";
    const isOpen = targets.some((target) => target.breaker === "open");
    const hasFailed = upstream.last_error_at !== null && at - Date.parse(upstream.last_error_at) / 1000 < RECENT_S;
    card.className = `card ${isOpen ? "bad" : hasFailed && upstream.state !== "down" ? "warn" : look}`;
    const [name, state, numbers, reason, breakers] = card.parts;
    setText(name, upstream.name);
    setText(state, upstream.state);
    state.className = `badge ${look}`;
    const queued = upstream.queued ? `, ${upstream.queued} queued` : "";
    setText(numbers, `${upstream.kind}: ${upstream.in_flight} of ${upstream.max_connections} in use${queued}, ${upstream.models} models`);
    const lastError = hasFailed ? `Last error: ${upstream.last_error}` : "";
    setText(reason, upstream.state === "up" ? lastError : upstream.reason ?? lastError);
    keyed(
      breakers,
      targets,
      (target) => `${target.worker} ${target.target} ${target.endpoint}`,
      () => {
        const badge = h("span", { class: "badge" });
        const line = h("li", {}, h("span", {}), " ", badge);
        line.badge = badge;
        return line;
      },
      (line, target) => {
        const first = target.first_token_s === null ? "" : `, first token ${format.seconds(target.first_token_s)}`;
        setText(line.firstElementChild, `${target.target}${target.endpoint}${first}`);
        const opens = target.breaker === "open" ? ` for ${format.seconds(target.opens_in_s)}` : "";
        setText(line.badge, `breaker ${target.breaker.replace("_", " ")}${opens}`);
        line.badge.className = `badge ${BREAKER_LOOK[target.breaker] ?? ""}`;
      },
    );
    const known = states.get(upstream.name);
    if (known !== undefined && known !== upstream.state) announce(`Upstream ${upstream.name} is ${upstream.state}`);
    states.set(upstream.name, upstream.state);
  }

  function makeUpstream() {
    const name = h("span");
    const state = h("span", { class: "badge" });
    const numbers = h("p", { class: "quiet" });
    const reason = h("p", {});
    const breakers = h("ul", { class: "attempts" });
    const card = h("li", { class: "card" }, h("h3", {}, name, state), numbers, reason, breakers);
    card.parts = [name, state, numbers, reason, breakers];
    return card;
  }

  // -- plots

  function drawFirst(now) {
    records = records.filter((record) => now - record.at < SPAN_S);
    const firsts = records.filter((record) => record.first !== null).map((record) => [record.at, record.first, record.failed]);
    const sorted = firsts.map((point) => point[1]).sort((a, b) => a - b);
    const middle = sorted.length ? `median ${format.seconds(sorted[Math.floor(sorted.length / 2)])}, ` : "";
    first.show(firsts, [], `${middle}${sorted.length} calls with content`, now);
    // what has ended before this page was opened, by the records; since then, what the samples say
    const slots = new Map();
    for (const record of records) {
      if (!record.tokens || record.at >= watchedSince) continue;
      const from = record.begun + (record.first ?? 0);
      const long = Math.max(record.at - from, 1);
      for (let at = Math.floor(from / 10) * 10; at < record.at; at += 10) {
        const share = Math.max(0, Math.min(record.at, at + 10) - Math.max(from, at)) / long;
        slots.set(at, (slots.get(at) ?? 0) + (record.tokens * share) / 10);
      }
    }
    past = [...slots].filter(([at]) => at < watchedSince).sort((a, b) => a[0] - b[0]);
  }

  function drawThroughput(now) {
    rates = rates.filter((rate) => now - rate[0] < SPAN_S);
    const line = [...past.filter(([at]) => now - at < SPAN_S), ...rates];
    const last = rates.length ? rates[rates.length - 1][1] : 0;
    throughput.show([], line, `${format.rate(last)} tokens per second now, counted as events of streams`, now);
  }

  async function refresh() {
    try {
      const from = new Date(Date.now() - SPAN_S * 1000).toISOString();
      const page = await json(withQuery("/v1/exchanges", { from, limit: MAX_POINTS }), { quiet: true });
      records = page.data
        .filter((row) => row.ended_at !== null)
        .map((row) => ({
          at: Date.parse(row.ended_at) / 1000,
          begun: Date.parse(row.started_at) / 1000,
          first: row.first_content_s,
          tokens: row.completion_tokens ?? 0,
          failed: !["complete", "cancelled", "finished"].includes(row.outcome),
        }));
      trouble.replaceChildren();
    } catch (error) {
      if (error.status !== 401) trouble.replaceChildren(failure(error));
    }
    drawFirst(Date.now() / 1000);
    drawThroughput(Date.now() / 1000);
  }

  return {
    element,
    show() {
      clearInterval(timer);
      timer = setInterval(() => document.hidden || refresh(), REFRESH_S * 1000);
      refresh();
    },
    hide() {
      clearInterval(timer);
    },
    reset() {
      records = [];
      rates = [];
      before = new Map();
      states.clear();
      keyed(live.body, [], String, makeRow, updateRow);
      keyed(upstreams, [], String, makeUpstream, updateUpstream);
    },
    take({ at, status, streams }) {
      const rows = streams.data;
      // tokens of this moment: the events since the last sample
      const events = new Map(rows.map((row) => [`${row.worker} ${row.id}`, row.events]));
      const passed = at - beforeAt;
      if (beforeAt && passed > 0 && passed < 10) {
        let sum = 0;
        for (const row of rows) {
          if (!row.stream) continue;
          sum += Math.max(0, row.events - (before.get(`${row.worker} ${row.id}`) ?? 0));
        }
        rates.push([at, sum / passed]);
      }
      before = events;
      beforeAt = at;
      const { totals, admission } = status;
      const speed = rates.length ? rates[rates.length - 1][1] : 0;
      const queued = (admission?.queued ?? 0) + status.upstreams.reduce((sum, upstream) => sum + upstream.queued, 0);
      [
        format.number(streams.count),
        format.rate(speed),
        format.number(queued),
        format.compact(totals.exchanges),
        format.compact(totals.failed),
        format.microUsd(totals.cost_microusd),
      ].forEach((value, index) => setText(tiles[index].value, value));
      keyed(
        upstreams,
        status.upstreams.map((upstream) => ({
          upstream,
          at,
          targets: status.targets.filter((target) => target.target.startsWith(`${upstream.name}/`)),
        })),
        (item) => item.upstream.name,
        makeUpstream,
        updateUpstream,
      );
      keyed(live.body, rows, (row) => `${row.worker} ${row.id}`, makeRow, updateRow);
      const rest = streams.count - rows.length;
      const missing = streams.missing_workers.length ? ` ${streams.missing_workers.length} workers did not answer in time.` : "";
      setText(more, (rest > 0 ? `The oldest ${rows.length} of ${format.number(streams.count)}.` : rows.length ? "" : "No call is in flight.") + missing);
      keyed(
        workers.body,
        status.workers,
        (worker) => worker.id,
        (worker) => h("tr", {}, h("td", { class: "name" }, h("code", {}, worker.id), h("span", { class: "sub" }, `process ${worker.pid}`)), h("td", {}), h("td", { class: "number" }), h("td", { class: "number" })),
        (row, worker) => {
          setText(row.children[1], worker.status);
          setText(row.children[2], format.number(worker.live));
          setText(row.children[3], format.seconds(worker.uptime_s));
        },
      );
      const pairs = [
        ["Admission", admission ? `${admission.in_flight} of ${admission.limit} in use, ${admission.queued} wait, ${admission.refused} refused` : "–"],
        ["Event loop", admission ? `late by ${format.seconds(admission.lag_s)}` : "–"],
        ["Sessions", status.sessions ? `${status.sessions.busy} busy, ${status.sessions.active} active of ${status.sessions.total}` : "–"],
        ["Deliveries", status.outbox ? `${status.outbox.depth} wait` : "–"],
        ["Ledger", status.ledger ? `${status.ledger.state}${status.ledger.dropped ? `, ${status.ledger.dropped} dropped` : ""}` : "–"],
        ["Store", `${status.store.state}${status.store.error ? `: ${status.store.error}` : ""}`],
      ];
      keyed(
        queues,
        pairs,
        (pair) => pair[0],
        (pair) => h("div", {}, h("dt", {}, pair[0]), h("dd", {})),
        (line, pair) => setText(line.lastElementChild, pair[1]),
      );
      drawThroughput(at);
    },
  };
}
