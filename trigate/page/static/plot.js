// Small plots as SVG. A plot is a picture with a text: its numbers are beside it, or in a table.

import { h, setText, svg } from "./dom.js";

const WIDTH = 600;
const HEIGHT = 140;
const LEFT = 60;
const BOTTOM = 18;

/** The smallest of 1, 2, 5, 10, … that is not below a value. */
function niceTop(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((factor) => factor * power).find((top) => top >= value);
}

function frame(title) {
  const drawing = svg("g");
  const head = h("h3", {}, title);
  const words = h("p", { class: "quiet" });
  const picture = svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "plot", role: "img", "aria-label": title },
    drawing,
  );
  return { element: h("figure", {}, head, picture, words), drawing, words, picture };
}

/** A number on an axis: without zeros at its end. */
const onAxis = (text) => text.replace(/(\.\d*?)0+(?=\D*$)/, "$1").replace(/\.(?=\D*$)/, "");

function axes(top, unit, marks) {
  const lines = [0, top / 2, top].map((value) => {
    const y = HEIGHT - BOTTOM - (value / top) * (HEIGHT - BOTTOM - 8);
    return [
      svg("line", { x1: LEFT, x2: WIDTH, y1: y, y2: y, class: "grid" }),
      svg("text", { x: LEFT - 6, y: y + 4, class: "mark end" }, onAxis(unit(value))),
    ];
  });
  const below = marks.map(([x, text, where]) =>
    svg("text", { x: LEFT + x * (WIDTH - LEFT), y: HEIGHT - 4, class: `mark ${where}` }, text),
  );
  return [...lines, ...below];
}

/** A plot over the last so many seconds. show(points, line, words): each is a list of [POSIX seconds, value]. */
export function timePlot(title, spanS, unit) {
  const { element, drawing, words } = frame(title);
  const minutes = Math.round(spanS / 60);
  const show = (points, line, text, now) => {
    const top = niceTop(Math.max(0, ...points.map((point) => point[1]), ...line.map((point) => point[1])));
    const x = (at) => LEFT + Math.max(0, Math.min(1, 1 - (now - at) / spanS)) * (WIDTH - LEFT);
    const y = (value) => HEIGHT - BOTTOM - (Math.min(value, top) / top) * (HEIGHT - BOTTOM - 8);
    const parts = axes(top, unit, [
      [0, `${minutes} min ago`, "start"],
      [1, "now", "end"],
    ]).flat();
    if (line.length > 1) {
      const path = line.map(([at, value], index) => `${index ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`);
      parts.push(svg("path", { d: path.join(""), class: "line" }));
    }
    for (const [at, value, failed] of points)
      parts.push(svg("circle", { cx: x(at).toFixed(1), cy: y(value).toFixed(1), r: 3, class: failed ? "dot bad" : "dot" }));
    drawing.replaceChildren(...parts);
    setText(words, text);
  };
  return { element, show };
}

/** A plot of bars: show([[name, value], …], words). */
export function barPlot(title, unit) {
  const { element, drawing, words, picture } = frame(title);
  const show = (bars, text) => {
    const top = niceTop(Math.max(0, ...bars.map((bar) => bar[1])));
    const step = (WIDTH - LEFT) / Math.max(bars.length, 1);
    const every = Math.ceil(bars.length / 8);
    const parts = axes(top, unit, []).flat();
    bars.forEach(([name, value], index) => {
      const tall = (value / top) * (HEIGHT - BOTTOM - 8);
      parts.push(
        svg(
          "rect",
          {
            x: (LEFT + index * step + step * 0.1).toFixed(1),
            y: (HEIGHT - BOTTOM - tall).toFixed(1),
            width: (step * 0.8).toFixed(1),
            height: tall.toFixed(1),
            class: "bar",
          },
          svg("title", {}, `${name}: ${unit(value)}`),
        ),
      );
      if (index % every === 0 && bars.length <= 100)
        parts.push(svg("text", { x: LEFT + (index + 0.5) * step, y: HEIGHT - 4, class: "mark middle" }, name.slice(0, 18)));
    });
    drawing.replaceChildren(...parts);
    picture.setAttribute("aria-label", `${title}. ${text}`);
    setText(words, text);
  };
  return { element, show };
}

/** Times of an exchange as horizontal bars: parts are [label, start in s, length in s, class]. */
export function timeline(title, parts, totalS) {
  const rowHeight = 22;
  const left = 190;
  const span = Math.max(totalS, ...parts.map((part) => part[1] + part[2]), 0.001);
  const rows = parts.map(([label, start, length, kind, text], index) => {
    const x = left + (start / span) * (WIDTH - left - 70);
    const width = Math.max((length / span) * (WIDTH - left - 70), 2);
    return [
      svg("text", { x: left - 8, y: index * rowHeight + 15, class: "mark end" }, label.slice(0, 32)),
      svg("rect", { x, y: index * rowHeight + 4, width, height: rowHeight - 8, class: `part ${kind}` }),
      svg("text", { x: x + width + 4, y: index * rowHeight + 15, class: "mark start" }, text),
    ];
  });
  return svg(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${parts.length * rowHeight + 4}`, class: "plot", role: "img", "aria-label": title },
    rows.flat(),
  );
}
