// The keys of the gateway: what each may do, and what is left of its limits.

import { announce, codeBlock, failure, field, h, table } from "./dom.js";
import { json, send, withQuery } from "./api.js";
import * as format from "./format.js";

const NUMBERS = [
  ["rpm", "Requests per minute"],
  ["tpm", "Tokens per minute"],
  ["max_exchanges", "Calls at once"],
  ["budget_usd", "Budget in USD"],
];

function limitText(limit) {
  if (!limit.setting.startsWith("budgets.")) return `${limit.setting}: ${format.number(limit.left)} of ${format.number(limit.limit)} left`;
  const until = limit.ends_at ? ` until ${format.time(limit.ends_at).slice(0, 10)}` : "";
  return `${limit.setting.slice(8)}: ${format.microUsd(limit.left)} of ${format.microUsd(limit.limit)} left${until}`;
}

const limitLines = (limits) =>
  limits.length
    ? h("ul", { class: "attempts" }, limits.map((limit) => h("li", {}, `${limit.scope} ${limitText(limit)}`)))
    : h("p", { class: "quiet" }, "No limit.");

export function create() {
  const trouble = h("div", {});
  const secretPlace = h("div", { role: "status" });
  const own = h("div", {});
  const list = table("Keys", ["Name", "Limits and what is left", "Settings", "Created", "State", ""]);
  const more = h("button", { type: "button", hidden: true }, "More");
  const inputs = new Map();
  const name = h("input", { required: true, maxlength: 64, pattern: "[A-Za-z0-9._@\\-]+", autocomplete: "off", spellcheck: "false" });
  const models = h("input", { autocomplete: "off", spellcheck: "false", placeholder: "all" });
  const period = h("select", {}, ["month", "week", "day", "total"].map((each) => h("option", { value: each }, each)));
  const rest = h("textarea", { rows: 2, spellcheck: "false", placeholder: '{"priority": 5}' });
  for (const [setting, title] of NUMBERS)
    inputs.set(setting, [title, h("input", { type: "number", min: 0, step: setting === "budget_usd" ? "any" : 1 })]);
  const editing = h("p", { class: "warning", hidden: true });
  const submit = h("button", { type: "submit", class: "main" }, "Create the key");
  const leave = h("button", { type: "button", hidden: true }, "Leave it as it is");
  const form = h(
    "form",
    { class: "panel", "aria-label": "Key" },
    editing,
    h(
      "div",
      { class: "fields" },
      field("Name", name),
      field("Models", models, "Ids, with commas between; * stands for any text."),
      [...inputs.values()].map(([title, input]) => field(title, input)),
      field("Budget period", period),
    ),
    h("details", {}, h("summary", {}, "More settings"), field("Settings of [keys.NAME] as JSON", rest)),
    h("p", { class: "buttons" }, submit, leave),
  );
  const configured = table("Keys of the configuration", ["Name", "Limits and what is left"]);
  const ofFile = h("div", { hidden: true }, h("h2", {}, "Keys of the configuration"), configured.element);
  const administration = h("div", {}, h("h2", {}, "Keys made here"), secretPlace, list.element, h("p", { class: "buttons" }, more), h("h2", {}, "Create a key"), form);
  const element = h("div", {}, h("h2", {}, "This key"), own, trouble, ofFile, administration);
  let last = null;
  let changing = null;

  function settings() {
    const given = rest.value.trim() ? JSON.parse(rest.value) : {};
    const unset = changing ? null : undefined;
    given.models = models.value.trim() ? models.value.split(",").map((each) => each.trim()).filter(Boolean) : unset;
    for (const [setting, [, input]] of inputs) given[setting] = input.value === "" ? unset : Number(input.value);
    if (inputs.get("budget_usd")[1].value !== "") given.budget_period = period.value;
    return given;
  }

  function showSecret(key) {
    secretPlace.replaceChildren(
      h("div", { class: "panel" }, h("p", {}, `The secret of ${key.name}. It is shown this once: the gateway keeps only its digest.`), codeBlock(key.secret, "secret")),
    );
    secretPlace.scrollIntoView({ block: "nearest" });
  }

  async function attempt(action) {
    trouble.replaceChildren();
    try {
      await action();
      await load(false);
    } catch (error) {
      trouble.replaceChildren(failure(error));
      trouble.scrollIntoView({ block: "nearest" });
    }
  }

  function edit(key) {
    changing = key;
    const { models: listed, budget_period, ...others } = key.settings;
    name.value = key.name;
    name.disabled = true;
    models.value = listed ? listed.join(", ") : "";
    for (const [setting, [, input]] of inputs) {
      input.value = others[setting] ?? "";
      delete others[setting];
    }
    period.value = budget_period ?? "month";
    rest.value = Object.keys(others).length ? JSON.stringify(others) : "";
    editing.hidden = leave.hidden = false;
    editing.textContent = `These are the settings of ${key.name}.`;
    submit.textContent = "Change the key";
    models.focus();
  }

  function clear() {
    changing = null;
    form.reset();
    name.disabled = false;
    editing.hidden = leave.hidden = true;
    submit.textContent = "Create the key";
  }

  function limitsOf(name) {
    const limits = h("td", { class: "name" }, "…");
    json(withQuery("/v1/limits", { key: name })).then(
      (found) => limits.replaceChildren(limitLines(found.data)),
      (error) => limits.replaceChildren(failure(error)),
    );
    return limits;
  }

  function row(key) {
    const limits = key.revoked_at === null ? limitsOf(key.name) : h("td", {}, "–");
    const shown = Object.entries(key.settings).map(([setting, value]) => h("li", {}, `${setting}: ${typeof value === "string" ? value : JSON.stringify(value)}`));
    const path = `/v1/keys/${encodeURIComponent(key.id)}`;
    const button = (title, kind, action) => h("button", { type: "button", class: `small ${kind}`, "aria-label": `${title} ${key.name}`, onclick: action }, title);
    const confirmed = (title, words, action) => {
      const ask = button(title, "danger", () => {
        const yes = h("button", { type: "button", class: "small danger", onclick: () => attempt(action) }, words);
        const no = button("No", "", () => place.replaceWith(ask));
        const place = h("span", { class: "buttons" }, yes, no);
        ask.replaceWith(place);
        yes.focus();
      });
      return ask;
    };
    const state = key.revoked_at !== null ? ["bad", `revoked ${format.time(key.revoked_at)}`] : ["good", "valid"];
    const actions =
      key.revoked_at !== null
        ? []
        : [
            button("Change", "", () => edit(key)),
            confirmed("Rotate", `Rotate ${key.name}: the old secret ends now`, async () => showSecret(await send("POST", `${path}/rotate`, {}))),
            confirmed("Revoke", `Revoke ${key.name} for good`, async () => {
              await send("DELETE", path);
              announce(`${key.name} is revoked`);
            }),
          ];
    return h(
      "tr",
      {},
      h("td", { class: "name" }, h("a", { href: `#history?key=${encodeURIComponent(key.name)}` }, key.name), h("span", { class: "sub" }, `${key.secret_begins_with}…`)),
      limits,
      h("td", { class: "name" }, h("ul", { class: "attempts" }, shown)),
      h("td", {}, format.time(key.created_at)),
      h("td", {}, h("span", { class: `badge ${state[0]}` }, state[1])),
      h("td", {}, h("span", { class: "buttons" }, actions)),
    );
  }

  async function load(isMore) {
    const page = await json(withQuery("/v1/keys", { limit: 50, after: isMore ? last : "" }));
    if (!isMore) list.body.replaceChildren();
    list.body.append(...page.data.map(row));
    if (!page.data.length && !isMore) list.body.append(h("tr", {}, h("td", { colspan: 6, class: "quiet" }, "No key has been made yet.")));
    last = page.data.length ? page.data[page.data.length - 1].id : last;
    more.hidden = !page.has_more;
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    attempt(async () => {
      const given = settings();
      if (changing) {
        await send("PATCH", `/v1/keys/${encodeURIComponent(changing.id)}`, given);
        announce(`${changing.name} is changed`);
      } else showSecret(await send("POST", "/v1/keys", { name: name.value.trim(), ...given }));
      clear();
    });
  });
  leave.addEventListener("click", clear);
  more.addEventListener("click", () => load(true));

  return {
    element,
    async show() {
      trouble.replaceChildren();
      try {
        const found = await json("/v1/limits");
        own.replaceChildren(h("p", {}, found.key ? `Its name is ${found.key}.` : "The gateway has no keys: anybody who reaches it may call."), limitLines(found.data));
      } catch (error) {
        own.replaceChildren(failure(error));
      }
      try {
        const names = Object.keys((await json("/status/config")).sections.keys);
        configured.body.replaceChildren(
          ...names.map((each) => h("tr", {}, h("td", { class: "name" }, h("a", { href: `#history?key=${encodeURIComponent(each)}` }, each)), limitsOf(each))),
        );
        ofFile.hidden = !names.length;
      } catch {
        ofFile.hidden = true; // another key than the admin's does not see them
      }
      try {
        await load(false);
        administration.hidden = false;
      } catch (error) {
        administration.hidden = true;
        trouble.replaceChildren(error.status === 403 ? h("p", { class: "quiet" }, error.message) : failure(error));
      }
    },
    reset() {
      list.body.replaceChildren();
      configured.body.replaceChildren();
      secretPlace.replaceChildren();
      own.replaceChildren();
      clear();
    },
  };
}
