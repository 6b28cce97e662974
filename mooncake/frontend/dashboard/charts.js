// Line charts over the last minutes, as SVG. Gaps in the data stay gaps.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 190;
const MARGIN = { left: 58, right: 10, top: 10, bottom: 22 };
const NUM_TICKS = 4;
const NARROW = 360; // pixels of the time axis; below that every second minute is named

// series: [{name, values: [[time_ms, value or null], ...]}]; limit: a line to compare with, or null.
export function lineChart(place, { series, limit = null, limitName = "", format, now, span_ms }) {
  const width = Math.max(240, place.clientWidth);
  const values = series.flatMap((each) => each.values.map(([, value]) => value)).filter((value) => value !== null);
  const top = niceTop(Math.max(0, ...values, limit ?? 0));
  const x = (time) => MARGIN.left + (1 - (now - time) / span_ms) * (width - MARGIN.left - MARGIN.right);
  const y = (value) => HEIGHT - MARGIN.bottom - (value / top) * (HEIGHT - MARGIN.top - MARGIN.bottom);
  const svg = element("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  svg.append(...yAxis(top, width, y, format), ...xAxis(span_ms, now, x));
  if (limit !== null) {
    svg.append(element("line", { class: "limit", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(limit), y2: y(limit) }));
  }
  series.forEach((each, index) => {
    svg.append(element("path", { class: `series s${index}`, d: path(each.values, x, y) }));
  });
  svg.setAttribute("aria-label", describe(series, format));
  place.replaceChildren(svg, legend(series, limit === null ? null : `${limitName} ${format(limit)}`));
}

function yAxis(top, width, y, format) {
  return Array.from({ length: NUM_TICKS + 1 }, (_, index) => (top * index) / NUM_TICKS).flatMap((value) => [
    element("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }),
    text(format(value), { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }),
  ]);
}

function xAxis(span_ms, now, x) {
  const minutes = span_ms / 60_000, step = x(now) - x(now - span_ms) < NARROW ? 2 : 1;
  return Array.from({ length: Math.floor(minutes / step) + 1 }, (_, index) => index * step).map((ago) =>
    text(ago ? `−${ago} min` : "now", {
      x: x(now - ago * 60_000), y: HEIGHT - 6, "text-anchor": ago === minutes ? "start" : ago ? "middle" : "end",
    }));
}

function path(values, x, y) {
  let pen = "M";
  return values.map(([time, value]) => {
    if (value === null) {
      pen = "M";
      return "";
    }
    const step = `${pen}${x(time).toFixed(1)},${y(value).toFixed(1)}`;
    // A point without a neighbour would be invisible as a path: a short dash is drawn for it.
    const piece = pen === "M" ? `${step}h0.5` : step;
    pen = "L";
    return piece;
  }).join("");
}

// The next of 1, 2, 4, 8 times a power of ten: quarters of it are short numbers.
function niceTop(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 8, 10].map((factor) => factor * power).find((candidate) => candidate >= value);
}

function legend(series, limit) {
  const list = document.createElement("ul");
  list.className = "legend";
  series.forEach((each, index) => list.append(item(each.name, `c${index}`)));
  if (limit !== null) list.append(item(limit, "limit-key"));
  return list;
}

export function item(name, className) {
  const entry = document.createElement("li");
  entry.className = className;
  entry.textContent = name;
  return entry;
}

function describe(series, format) {
  return series.map(({ name, values }) => {
    const last = values.at(-1)?.[1] ?? null;
    return `${name}: ${last === null ? "no value" : format(last)}`;
  }).join(", ");
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function text(content, attributes) {
  const made = element("text", attributes);
  made.textContent = content;
  return made;
}
