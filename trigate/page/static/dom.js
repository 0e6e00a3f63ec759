// Makes elements. Texts are always set as text: nothing here parses HTML.

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled" || name === "selected" || name === "open")
      element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Makes an element: h("p", {class: "quiet"}, "text", otherElement). */
export function h(tag, properties, ...children) {
  return fill(document.createElement(tag), properties, children);
}

/** The same for an element of SVG. */
export function svg(tag, properties, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), properties, children);
}

/** Sets the text of an element, if it is another one: a screen reader then stays where it is. */
export function setText(element, text) {
  const shown = text === null || text === undefined ? "" : String(text);
  if (element.textContent !== shown) element.textContent = shown;
}

/** Shows items as the children of an element. An item that is still there keeps its element, and so the focus.
 * make(item) makes an element; update(element, item) shows the item in it. */
export function keyed(parent, items, keyOf, make, update) {
  const known = (parent.known ??= new Map());
  const wanted = new Set();
  let place = parent.firstElementChild;
  for (const item of items) {
    let key = keyOf(item);
    while (wanted.has(key)) key += "\u0000";
    wanted.add(key);
    let element = known.get(key);
    if (element === undefined) {
      element = make(item);
      known.set(key, element);
    }
    update(element, item);
    if (element === place) place = place.nextElementSibling;
    else parent.insertBefore(element, place);
  }
  for (const [key, element] of known) {
    if (!wanted.has(key)) {
      element.remove();
      known.delete(key);
    }
  }
}

/** Says something to screen readers, when they have nothing else to say. */
export function announce(text) {
  setText(document.getElementById("news"), text);
}

let labels = 0;

/** A label and its control, as one block. */
export function field(label, control, hint) {
  control.id ||= `control-${++labels}`;
  let described = null;
  if (hint) {
    described = h("small", { id: `${control.id}-hint`, class: "quiet" }, hint);
    control.setAttribute("aria-describedby", described.id);
  }
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, described);
}

/** A button that copies a text, which is asked for when it is pressed. */
export function copyButton(text, what) {
  const button = h("button", { type: "button", class: "small", "aria-label": `Copy ${what}` }, "Copy");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text());
      setText(button, "Copied");
      announce(`Copied ${what}`);
    } catch {
      setText(button, "Not allowed");
    }
    setTimeout(() => setText(button, "Copy"), 2000);
  });
  return button;
}

/** A block of code with its button. */
export function codeBlock(text, what) {
  const code = h("code", {}, text);
  const block = h(
    "div",
    { class: "code" },
    copyButton(() => code.textContent, what),
    h("pre", { tabindex: "0", role: "region", "aria-label": what }, code),
  );
  block.setCode = (changed) => setText(code, changed);
  return block;
}

/** A table that scrolls sideways where it is too wide. Returns {element, body}. */
export function table(caption, heads) {
  const body = h("tbody");
  const element = h(
    "div",
    { class: "wide", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", { class: "unseen" }, caption),
      h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col", class: head.number ? "number" : null }, head.title ?? head)))),
      body,
    ),
  );
  return { element, body };
}

/** Shows an error where something was asked for. */
export function failure(error) {
  return h("p", { class: "failure", role: "alert" }, error.message ?? String(error));
}
