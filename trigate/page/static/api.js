// Requests to the gateway that serves this page. The key is kept in a variable, and nowhere else.

let secret = "";
let asking = null;
let isKnown = false; // whether the gateway has answered at all: until then, one request goes ahead of the others
let ahead = null;
const watchers = new Set();

export class ApiError extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const hasKey = () => secret !== "";
export const keyForCode = () => secret;

/** Calls a function whenever the key has changed. */
export function onKey(watcher) {
  watchers.add(watcher);
}

function setKey(given) {
  secret = given;
  for (const watcher of watchers) watcher();
}

export const forgetKey = () => setKey("");

/** Asks the reader for a key; all requests that need one meanwhile wait for the same answer. */
export function askKey(why) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("ask");
    const input = document.getElementById("ask-key");
    document.getElementById("ask-why").textContent = why;
    document.getElementById("ask-cancel").onclick = () => dialog.close("cancel");
    document.getElementById("ask-form").onsubmit = () => {
      dialog.returnValue = "use";
    };
    dialog.onclose = () => {
      const given = dialog.returnValue === "use" ? input.value.trim() : "";
      input.value = "";
      asking = null;
      if (given) setKey(given);
      resolve(given !== "");
    };
    dialog.returnValue = "";
    dialog.showModal();
    input.focus();
  });
  return asking;
}

export function headers(more) {
  return secret ? { authorization: `Bearer ${secret}`, ...more } : { ...more };
}

async function errorOf(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // it is no JSON
  }
  const error = body?.error ?? {};
  return new ApiError(response.status, error.code ?? "", error.message ?? `The gateway answered ${response.status}.`);
}

/** Sends a request, and returns its response. A 401 asks for a key, once more for each wrong one, unless it is quiet.
 * Throws ApiError, or the error of fetch. */
export async function request(path, { quiet = false, ...options } = {}) {
  for (;;) {
    while (asking) await asking;
    let arrived = () => {};
    if (!isKnown) {
      if (ahead) {
        await ahead;
        continue;
      }
      ahead = new Promise((resolve) => {
        arrived = () => {
          ahead = null;
          resolve();
        };
      });
    }
    const used = secret;
    let response;
    try {
      response = await fetch(path, {
        ...options,
        headers: headers(options.headers),
        credentials: "omit",
        cache: "no-store",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "unreachable", "The gateway cannot be reached.");
    } finally {
      if (response && response.status !== 401) isKnown = true;
      if (response?.status !== 401) arrived();
    }
    if (response.ok) return response;
    const error = await errorOf(response);
    if (response.status !== 401) throw error;
    isKnown = false;
    const other = used !== secret; // another request has got a key meanwhile
    const given = other || quiet ? false : askKey(error.message);
    arrived(); // the others wait for the same answer now
    if (!other && !(await given)) throw error;
  }
}

export async function json(path, options = {}) {
  const response = await request(path, options);
  return response.json();
}

export function send(method, path, body) {
  const options = { method };
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers = { "content-type": "application/json" };
  }
  return json(path, options);
}

/** Makes a path with a query of those values that are not empty. */
export function withQuery(path, values) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    if (value !== "" && value !== null && value !== undefined && value !== false) query.set(name, value);
  }
  const text = query.toString();
  return text ? `${path}?${text}` : path;
}

/** Calls take(data) with the data of each event of a stream, as a text. */
export async function readEvents(response, take) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split(/\r\n|\n|\r(?!$)/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (data.length) take(data.join("\n"));
        data = [];
      } else if (line.startsWith("data:")) {
        data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
  }
}
