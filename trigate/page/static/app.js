// The page: its views, the stream of samples that feeds them, and the key.

import { announce, failure, h, setText } from "./dom.js";
import { askKey, forgetKey, hasKey, onKey, readEvents, request } from "./api.js";
import * as now from "./now.js";

const VIEWS = [
  ["now", "Now"],
  ["history", "History"],
  ["usage", "Usage"],
  ["keys", "Keys"],
  ["sessions", "Sessions and channels"],
  ["config", "Configuration"],
  ["connect", "Connect"],
  ["playground", "Playground"],
];
const RETRY_MS = [500, 1000, 2000, 5000];

const main = document.getElementById("main");
const gateway = document.getElementById("gateway");
const keyButton = document.getElementById("key");
const opened = new Map();
let shown = null;
let sample = null;
let stop = new AbortController();

// -- the views ----------------------------------------------------------------------------------------------------

async function open(name) {
  if (!opened.has(name)) {
    // a view is loaded when it is first shown
    const module = name === "now" ? now : await import(`./${name}.js`);
    opened.set(name, module.create());
  }
  return opened.get(name);
}

async function show() {
  const [wanted, argument] = location.hash.slice(1).split("?");
  const name = VIEWS.some(([each]) => each === wanted) ? wanted : "now";
  const title = VIEWS.find(([each]) => each === name)[1];
  for (const link of document.querySelectorAll("#tabs a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.title = `${title} – Trigate`;
  let view;
  try {
    view = await open(name);
  } catch (error) {
    main.replaceChildren(failure(error));
    return;
  }
  const isOther = shown !== view;
  shown?.hide?.();
  shown = view;
  if (isOther) main.replaceChildren(view.element);
  if (sample !== null) view.take?.(sample);
  view.show?.(new URLSearchParams(argument ?? ""));
  if (isOther) scrollTo(0, 0);
  if (isOther && document.activeElement !== document.body) main.focus({ preventScroll: true });
}

for (const [name, title] of VIEWS)
  document.getElementById("tabs").append(h("li", {}, h("a", { href: `#${name}` }, title)));
addEventListener("hashchange", show);

// -- the samples --------------------------------------------------------------------------------------------------

function take(data) {
  sample = JSON.parse(data);
  const { status, streams } = sample;
  gateway.className = status.status === "ok" ? "" : "bad";
  setText(gateway, `${status.status === "ok" ? "Running" : "Draining"} · version ${status.version} · up ${status.uptime} · ${streams.count} in flight`);
  shown?.take?.(sample);
}

async function watch() {
  let failures = 0;
  for (;;) {
    stop = new AbortController();
    try {
      const response = await request("/status/events", { signal: stop.signal });
      failures = 0;
      await readEvents(response, take);
    } catch (error) {
      if (error.name !== "AbortError") {
        gateway.className = "bad";
        setText(gateway, error.message || "The connection was lost.");
      }
      if (error.status === 401 || error.status === 403) await changed();
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)]));
    if (document.hidden) await visible();
  }
}

function visible() {
  return new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true }));
}

// -- the key ------------------------------------------------------------------------------------------------------

const waiting = [];

/** Waits until another key has been given. */
function changed() {
  return new Promise((resolve) => waiting.push(resolve));
}

onKey(() => {
  setText(keyButton, hasKey() ? "Forget the key" : "Key");
  announce(hasKey() ? "The key is used from now on." : "The key is forgotten.");
  sample = null;
  for (const view of opened.values()) view.reset?.();
  stop.abort();
  for (const resolve of waiting.splice(0)) resolve();
  shown?.show?.(new URLSearchParams(location.hash.split("?")[1] ?? ""));
});

keyButton.addEventListener("click", () => {
  if (hasKey()) forgetKey();
  else askKey("Its key is sent with every request of this page.");
});

show();
watch();

