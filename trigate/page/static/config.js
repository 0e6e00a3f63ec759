// The configuration that is in force, without its secrets, and its warnings.

import { codeBlock, failure, field, h } from "./dom.js";
import { json } from "./api.js";

/** A value as TOML has it. */
function toml(value) {
  if (value === null || value === undefined) return "(not set)";
  if (Array.isArray(value)) return `[${value.map(toml).join(", ")}]`;
  if (typeof value === "object") {
    const entries = Object.entries(value);
    return entries.length ? `{ ${entries.map(([name, each]) => `${JSON.stringify(name)} = ${toml(each)}`).join(", ")} }` : "{}";
  }
  return typeof value === "string" ? JSON.stringify(value) : String(value);
}

const NAMED = ["upstreams", "models", "keys", "groups", "prices", "hooks", "channels"];

function write(body, isAll) {
  const changed = new Set(body.changed);
  const lines = [];
  const table = (path, settings) => {
    if (settings === null || typeof settings !== "object" || Array.isArray(settings)) {
      if (isAll || changed.has(path)) lines.push(`${path} = ${toml(settings)}`, "");
      return;
    }
    const shown = Object.entries(settings).filter(([name]) => isAll || changed.has(`${path}.${name}`));
    if (!shown.length && !isAll && !NAMED.includes(path.split(".")[0])) return;
    lines.push(`[${path}]`);
    for (const [name, value] of shown) lines.push(`${value === null ? "# " : ""}${name} = ${toml(value)}`);
    lines.push("");
  };
  for (const [name, section] of Object.entries(body.sections)) {
    if (NAMED.includes(name)) {
      for (const [entry, settings] of Object.entries(section ?? {})) table(`${name}.${/^[\w-]+$/.test(entry) ? entry : JSON.stringify(entry)}`, settings);
    } else table(name, section);
  }
  return lines.join("\n").trim() || "# Everything is as by default.";
}

export function create() {
  const trouble = h("div", {});
  const source = h("p", {});
  const warnings = h("div", {});
  const all = h("input", { type: "checkbox" });
  const code = codeBlock("", "configuration");
  const shown = h("div", {}, source, h("h2", {}, "Warnings"), warnings, h("h2", {}, "Settings"), field("Also those that are as by default", all), code);
  const element = h("div", {}, h("h2", { class: "unseen" }, "Configuration"), trouble, shown);
  let body = null;
  const draw = () => body && code.setCode(write(body, all.checked));
  all.addEventListener("change", draw);
  return {
    element,
    async show() {
      trouble.replaceChildren();
      try {
        body = await json("/status/config");
        shown.hidden = false;
        source.replaceChildren("Read from ", h("code", {}, body.source), ". Secrets are shown as •••, or as the place that they are read from.");
        warnings.replaceChildren(...(body.warnings.length ? body.warnings.map((each) => h("p", { class: "warning" }, each)) : [h("p", { class: "quiet" }, "None.")]));
        draw();
      } catch (error) {
        shown.hidden = true;
        trouble.replaceChildren(error.status === 403 ? h("p", { class: "quiet" }, error.message) : failure(error));
      }
    },
    reset() {
      body = null;
      code.setCode("");
      warnings.replaceChildren();
    },
  };
}
