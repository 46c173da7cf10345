// Charts in SVG: curves, bars and histograms, with an axis that says what it measures.

import { fixed, h, number, s } from "./dom.js";

const LEFT = 54, RIGHT = 14, TOP = 12, BOTTOM = 38;
const narrow = matchMedia("(max-width: 559px)");
let W = 640; // on a phone less, so that the words on a chart keep their size

/** A chart that is drawn anew when the window becomes a phone's, or no longer is. */
const adapting = (draw) => (options) => Object.assign(draw(options), { again: () => adapting(draw)(options) });
narrow.addEventListener("change", () => { for (const chart of document.querySelectorAll("svg.chart")) if (chart.again) chart.replaceWith(chart.again()); });

/** Round numbers from low to high, about `count` of them. */
export function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((m) => m * power >= raw) * power;
  const found = [];
  for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step) found.push(Math.abs(v) < step * 1e-9 ? 0 : v);
  return found;
}

function frame({ x, y, height, xLabel, yLabel, label, xTicks }) {
  W = narrow.matches ? 380 : 640;
  const H = height;
  const px = (v) => LEFT + ((v - x[0]) / (x[1] - x[0] || 1)) * (W - LEFT - RIGHT);
  const py = (v) => H - BOTTOM - ((v - y[0]) / (y[1] - y[0] || 1)) * (H - TOP - BOTTOM);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, class: "chart", role: "img", "aria-label": label });
  for (const v of ticks(...y, 4)) {
    svg.append(s("line", { x1: LEFT, x2: W - RIGHT, y1: py(v), y2: py(v), class: "rule" }),
      s("text", { x: LEFT - 8, y: py(v) + 4, class: "tick end" }, number(v)));
  }
  for (const v of xTicks ?? ticks(...x, 6)) svg.append(s("text", { x: px(v), y: H - BOTTOM + 17, class: "tick middle" }, number(v)));
  svg.append(s("text", { x: (LEFT + W - RIGHT) / 2, y: H - 4, class: "axis middle" }, xLabel));
  if (yLabel) svg.append(s("text", { x: LEFT - 40, y: TOP, class: "axis", transform: `rotate(-90 ${LEFT - 40} ${TOP}) translate(${-(H - TOP - BOTTOM) / 2}, 0)`, "text-anchor": "middle" }, yLabel));
  return { svg, px, py, H };
}

/** Curves over x. `lines`: [{name, points: [[x, y]], tone, dash}]; `marks`: [{x, text, tone}] are upright lines. */
export const curves = adapting(({ lines, marks = [], dots = [], height = 260, xLabel, yLabel, label, yRange }) => {
  const points = lines.flatMap((line) => line.points);
  const xs = points.map((p) => p[0]).concat(marks.map((m) => m.x)), ys = points.map((p) => p[1]);
  const spread = (v) => { const [a, b] = [Math.min(...v), Math.max(...v)]; return a === b ? [a - 1, b + 1] : [a, b]; };
  const y = yRange ?? spread(ys), pad = yRange ? 0 : 0.05 * (y[1] - y[0]);
  const { svg, px, py, H } = frame({ x: spread(xs), y: [y[0] - pad, y[1] + pad], height, xLabel, yLabel, label });
  upright(svg, marks, px, H);
  for (const line of lines) {
    svg.append(s("polyline", { class: `curve tone-${line.tone}${line.dash ? " dash" : ""}`, points: line.points.map(([a, b]) => `${px(a).toFixed(1)},${py(b).toFixed(1)}`).join(" ") }));
  }
  for (const dot of dots) svg.append(s("circle", { class: `dot tone-${dot.tone ?? 1}`, cx: px(dot.x), cy: py(dot.y), r: 5 }));
  return svg;
});

/** Bars at 1, 2, 3 ... `bars`: [{value, on, title}]. `line` is a curve over them in the same units. */
export const bars = adapting(({ values, on = () => true, line = null, height = 230, xLabel, yLabel, label, top }) => {
  const most = top ?? Math.max(1e-12, ...values, ...(line ?? []));
  const { svg, px, py } = frame({ x: [0.5, values.length + 0.5], y: [0, most * 1.04], height, xLabel, yLabel, label, xTicks: ticks(1, values.length, 8).filter((v) => v >= 1 && Number.isInteger(v)) });
  const width = Math.max(1, (px(1) - px(0)) * 0.72);
  values.forEach((value, i) => {
    svg.append(s("rect", { class: on(i) ? "col on" : "col off", x: px(i + 1) - width / 2, y: py(value), width, height: Math.max(1, py(0) - py(value)) },
      s("title", {}, `${i + 1}: ${number(value)}`)));
  });
  if (line) svg.append(s("polyline", { class: "curve tone-2", points: line.map((v, i) => `${px(i + 1)},${py(v)}`).join(" ") }));
  return svg;
});

/** How often `values` (ascending) fall where; `marks` as in `curves`, drawn over it. The axis leaves a mark far outside at the edge. */
export const histogram = adapting(({ values, marks, height = 220, xLabel, label }) => {
  const usual = values[Math.floor(0.98 * (values.length - 1))], most = values[values.length - 1];
  const cut = most > usual + 2 * (usual - values[0] || 1); // a few far ones would leave the others no room
  const inner = [values[0], cut ? usual : most];
  const reach = 0.9 * (inner[1] - inner[0] || 1);
  const shown = marks.map((m) => ({ ...m, x: Math.max(inner[0] - reach, Math.min(inner[1] + reach, m.x)), beyond: m.x > inner[1] + reach || m.x < inner[0] - reach }));
  const low = Math.min(inner[0], ...shown.map((m) => m.x)), high = Math.max(inner[1], ...shown.map((m) => m.x));
  const bins = 40, size = (inner[1] - inner[0]) / bins || 1, counts = new Array(bins).fill(0);
  for (const v of values) counts[Math.min(bins - 1, Math.floor((v - inner[0]) / size))] += 1;
  const share = counts.map((c) => c / values.length), pad = (high - low) * 0.03;
  const { svg, px, py, H } = frame({ x: [low - pad, high + pad], y: [0, Math.max(...share) * 1.12], height, xLabel: cut ? `${xLabel}; the last bar: and above` : xLabel, yLabel: "share of rows", label });
  share.forEach((v, i) => {
    if (v) svg.append(s("rect", { class: "col on", x: px(inner[0] + i * size), y: py(v), width: Math.max(1, px(inner[0] + size) - px(inner[0]) - 1), height: py(0) - py(v) }));
  });
  upright(svg, shown.map((m) => ({ ...m, text: m.beyond ? `${m.text} →` : m.text })), px, H);
  return svg;
});

function upright(svg, marks, px, H) {
  marks.forEach((mark, i) => {
    const x = px(mark.x), end = x > W * 0.7;
    svg.append(s("line", { class: `mark tone-${mark.tone ?? 2}`, x1: x, x2: x, y1: TOP, y2: H - BOTTOM }),
      s("text", { class: `note tone-${mark.tone ?? 2} ${end ? "end" : ""}`, x: x + (end ? -6 : 6), y: TOP + 11 + 17 * (i + (mark.down ?? 0)) }, mark.text));
  });
}

/** What the colours of `lines` mean, in words. */
export const legend = (lines) => h("ul", { class: "legend" }, lines.map((line) =>
  h("li", {}, h("span", { class: `swatch tone-${line.tone}` }), line.name)));

export { fixed };
