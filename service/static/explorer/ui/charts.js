// SVG charts with labelled axes: line charts, bar charts and histograms.

import { number } from "../lib/format.js";
import { clamp, zeros } from "../lib/linear-algebra.js";
import { h, svg } from "./dom.js";

const MARGIN = { left: 54, right: 14, top: 12, bottom: 38 };
const BINS = 40;
const EPSILON = 1e-12; // avoids a division by zero
// A phone gets a smaller coordinate system, so that the text keeps its size on the screen.
const phone = matchMedia("(max-width: 559px)");
const chartWidth = () => (phone.matches ? 380 : 640);

phone.addEventListener("change", () => {
  for (const chart of document.querySelectorAll("svg.chart")) {
    if (chart.redraw) chart.replaceWith(chart.redraw());
  }
});

/** A function like `draw` whose charts are redrawn when the window becomes narrower or wider than a phone. */
function responsive(draw) {
  const drawWithRedraw = (options) => Object.assign(draw(options), { redraw: () => drawWithRedraw(options) });
  return drawWithRedraw;
}

/** About `count` round numbers from `low` to `high`. */
function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find((multiple) => multiple * power >= raw) * power;
  const tolerance = step * 1e-9;
  const values = [];
  for (let v = Math.ceil(low / step) * step; v <= high + tolerance; v += step) {
    values.push(Math.abs(v) < tolerance ? 0 : v);
  }
  return values;
}

/** An SVG with axes. `x` and `y` are their ranges [low, high]; `toX` and `toY` map a value to a coordinate. */
function createAxes({ x, y, height, xLabel, yLabel, label, xTicks }) {
  const width = chartWidth();
  const plotWidth = width - MARGIN.left - MARGIN.right;
  const plotHeight = height - MARGIN.top - MARGIN.bottom;
  const bottom = height - MARGIN.bottom;
  const toX = (v) => MARGIN.left + ((v - x[0]) / (x[1] - x[0] || 1)) * plotWidth;
  const toY = (v) => bottom - ((v - y[0]) / (y[1] - y[0] || 1)) * plotHeight;
  const element = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
  for (const v of ticks(...y, 4)) {
    const line = { x1: MARGIN.left, x2: width - MARGIN.right, y1: toY(v), y2: toY(v), class: "rule" };
    element.append(svg("line", line));
    element.append(svg("text", { x: MARGIN.left - 8, y: toY(v) + 4, class: "tick end" }, number(v)));
  }
  for (const v of xTicks ?? ticks(...x, 6)) {
    element.append(svg("text", { x: toX(v), y: bottom + 17, class: "tick middle" }, number(v)));
  }
  const middle = (MARGIN.left + width - MARGIN.right) / 2;
  element.append(svg("text", { x: middle, y: height - 4, class: "axis middle" }, xLabel));
  if (yLabel) element.append(verticalLabel(yLabel, plotHeight));
  return { element, toX, toY, width, bottom };
}

function verticalLabel(text, plotHeight) {
  const x = MARGIN.left - 40;
  const transform = `rotate(-90 ${x} ${MARGIN.top}) translate(${-plotHeight / 2}, 0)`;
  return svg("text", { x, y: MARGIN.top, class: "axis", transform, "text-anchor": "middle" }, text);
}

const polylinePoints = (points) => points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" ");

/** The range of `values`, widened if it is empty. */
function extent(values) {
  const low = Math.min(...values);
  const high = Math.max(...values);
  return low === high ? [low - 1, high + 1] : [low, high];
}

/**
 * A line chart. `lines`: [{name, points: [[x, y]], series, dashed}].
 * `marks`: [{x, text, series}] are vertical lines with a note. The notes move down by `noteOffset` lines of text.
 */
export const lineChart = responsive(({ lines, marks = [], noteOffset = 0, height = 260, xLabel, yLabel, label }) => {
  const points = lines.flatMap((line) => line.points);
  const x = extent([...points.map((point) => point[0]), ...marks.map((mark) => mark.x)]);
  const [low, high] = extent(points.map((point) => point[1]));
  const padding = 0.05 * (high - low);
  const axes = createAxes({ x, y: [low - padding, high + padding], height, xLabel, yLabel, label });
  drawMarks(axes, marks, noteOffset);
  for (const line of lines) {
    const coordinates = line.points.map(([a, b]) => [axes.toX(a), axes.toY(b)]);
    const className = `curve series-${line.series}${line.dashed ? " dashed" : ""}`;
    axes.element.append(svg("polyline", { class: className, points: polylinePoints(coordinates) }));
  }
  return axes.element;
});

/** Bars at 1, 2, 3 … Bar i has the accent colour if `isHighlighted(i)`. `top` is the upper end of the y axis. */
export const barChart = responsive(
  ({ values, isHighlighted = () => true, height = 230, xLabel, yLabel, label, top }) => {
    const highest = top ?? Math.max(EPSILON, ...values);
    const xTicks = ticks(1, values.length, 8).filter((v) => v >= 1 && Number.isInteger(v));
    const x = [0.5, values.length + 0.5];
    const axes = createAxes({ x, y: [0, highest * 1.04], height, xLabel, yLabel, label, xTicks });
    const width = Math.max(1, (axes.toX(1) - axes.toX(0)) * 0.72);
    values.forEach((value, i) => {
      const y = axes.toY(value);
      const box = { x: axes.toX(i + 1) - width / 2, y, width, height: Math.max(1, axes.toY(0) - y) };
      const className = isHighlighted(i) ? "col on" : "col off";
      axes.element.append(svg("rect", { class: className, ...box }, svg("title", {}, `${i + 1}: ${number(value)}`)));
    });
    return axes.element;
  },
);

/**
 * The distribution of `values` (ascending), with `marks` as in `lineChart`.
 * A few extreme values share the last bar. A mark far outside is drawn at the edge with an arrow.
 */
export const histogram = responsive(({ values, marks, height = 220, xLabel, label }) => {
  const { low, high, isCut } = binRange(values);
  const visibleMarks = marks.map((mark) => moveInside(mark, low, high));
  const positions = visibleMarks.map((mark) => mark.x);
  const [left, right] = [Math.min(low, ...positions), Math.max(high, ...positions)];
  const padding = (right - left) * 0.03;
  const shares = binShares(values, low, high);
  const axes = createAxes({
    x: [left - padding, right + padding],
    y: [0, Math.max(...shares) * 1.12],
    height,
    xLabel: isCut ? `${xLabel}; the last bar holds all higher scores` : xLabel,
    yLabel: "share of rows",
    label,
  });
  drawBins(axes, shares, low, binSize(low, high));
  drawMarks(axes, visibleMarks);
  return axes.element;
});

/** The range of the bins. It ends at the 98th percentile if the largest value is far above that. */
function binRange(values) {
  const low = values[0];
  const usual = values[Math.floor(0.98 * (values.length - 1))];
  const largest = values[values.length - 1];
  const isCut = largest > usual + 2 * (usual - low || 1);
  return { low, high: isCut ? usual : largest, isCut };
}

const binSize = (low, high) => (high - low) / BINS || 1;

function binShares(values, low, high) {
  const counts = zeros(BINS);
  for (const v of values) counts[Math.min(BINS - 1, Math.floor((v - low) / binSize(low, high)))] += 1;
  return counts.map((count) => count / values.length);
}

function drawBins({ element, toX, toY }, shares, low, size) {
  const width = Math.max(1, toX(low + size) - toX(low) - 1);
  shares.forEach((share, i) => {
    if (share === 0) return;
    const box = { x: toX(low + i * size), y: toY(share), width, height: toY(0) - toY(share) };
    element.append(svg("rect", { class: "col on", ...box }));
  });
}

/** `mark`, moved to at most 0.9 times the range outside [low, high]. A mark that has been moved gets an arrow. */
function moveInside(mark, low, high) {
  const reach = 0.9 * (high - low || 1);
  const x = clamp(mark.x, low - reach, high + reach);
  return { ...mark, x, text: x === mark.x ? mark.text : `${mark.text} →` };
}

function drawMarks({ element, toX, width, bottom }, marks, noteOffset = 0) {
  marks.forEach((mark, i) => {
    const x = toX(mark.x);
    const isRightmost = x > width * 0.7;
    const line = { x1: x, x2: x, y1: MARGIN.top, y2: bottom };
    element.append(svg("line", { class: `mark series-${mark.series}`, ...line }));
    const note = { x: x + (isRightmost ? -6 : 6), y: MARGIN.top + 11 + 17 * (i + noteOffset) };
    element.append(
      svg("text", { class: `note series-${mark.series} ${isRightmost ? "end" : ""}`, ...note }, mark.text),
    );
  });
}

/** The legend: the name of each line beside the colour of the line. */
export function legend(lines) {
  const item = (line) => h("li", {}, h("span", { class: `swatch series-${line.series}` }), line.name);
  return h("ul", { class: "legend" }, lines.map(item));
}
