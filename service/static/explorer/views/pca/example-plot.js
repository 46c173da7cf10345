// The plot of the worked example at each step.

import { svg } from "../../ui/dom.js";

const SIZE = 260;
const MARGIN = 8;

/** The plot of `step` (1 to 5) of a solution from `solve`. */
export function drawStep(step, solution) {
  const plane = step === 1 ? dataPlane(solution.data) : centredPlane(solution.centred);
  const label = `the three rows in the plane at step ${step}`;
  const viewBox = `0 0 ${SIZE} ${SIZE}`;
  const plot = svg("svg", { viewBox, class: "chart square", role: "img", "aria-label": label });
  plot.append(...axes(plane), ...axisNames(plane, step === 1 ? "column" : "centred column"));
  if (step === 3 || step === 4) plot.append(covarianceEllipse(plane, solution));
  if (step >= 4) plot.append(firstDirection(plane, solution));
  if (step === 4) plot.append(secondDirection(plane, solution));
  if (step === 5) plot.append(...projections(plane, solution));
  const rows = step === 1 ? solution.data : solution.centred;
  plot.append(...rows.map((row) => dot(plane.toPixel(row), 5, 3)));
  if (step === 1) plot.append(...meanMarker(plane, solution.centre));
  return plot;
}

/** A plane with the origin at the lower left. */
function dataPlane(data) {
  const largest = Math.max(...data.flat().map(Math.abs), 1) * 1.2;
  const scale = (SIZE - 50) / largest;
  return { toPixel: ([a, b]) => [30 + a * scale, SIZE - 30 - b * scale] };
}

/** A plane with the origin in the middle. `reach` is the largest coordinate in the plot. */
function centredPlane(centred) {
  const reach = Math.max(1, ...centred.flat().map(Math.abs)) * 1.35;
  const scale = (SIZE / 2 - MARGIN) / reach;
  return { toPixel: ([a, b]) => [SIZE / 2 + a * scale, SIZE / 2 - b * scale], scale, reach };
}

const line = ([x1, y1], [x2, y2], className) => svg("line", { class: className, x1, y1, x2, y2 });
const dot = ([cx, cy], r, series) => svg("circle", { class: `dot series-${series}`, cx, cy, r });
const along = (plane, vector, length) => plane.toPixel(vector.map((v) => v * length));
const deviation = (variance) => Math.sqrt(Math.max(0, variance));

function axes(plane) {
  const [x, y] = plane.toPixel([0, 0]);
  return [line([0, y], [SIZE, y], "rule"), line([x, 0], [x, SIZE], "rule")];
}

/** The name of each axis at its positive end: "column 1" and "column 2", or "centred column 1" and so on. */
function axisNames(plane, name) {
  const [x, y] = plane.toPixel([0, 0]);
  const horizontal = { class: "axis", x: SIZE - 4, y: y + 14, "text-anchor": "end" };
  const vertical = { class: "axis", x: x + 5, y: 12 };
  return [svg("text", horizontal, `${name} 1`), svg("text", vertical, `${name} 2`)];
}

function covarianceEllipse({ toPixel, scale }, { vectors, values }) {
  const [cx, cy] = toPixel([0, 0]);
  const degrees = (-Math.atan2(vectors[0][1], vectors[0][0]) * 180) / Math.PI;
  const rx = deviation(values[0]) * scale;
  const ry = Math.max(1, deviation(values[1]) * scale);
  return svg("ellipse", { class: "ellipse", cx, cy, rx, ry, transform: `rotate(${degrees} ${cx} ${cy})` });
}

const firstDirection = (plane, { vectors: [first] }) =>
  line(along(plane, first, -2 * plane.reach), along(plane, first, 2 * plane.reach), "curve series-1");

function secondDirection(plane, { vectors, values }) {
  const length = Math.max(0.25 * plane.reach, deviation(values[1]));
  return line(plane.toPixel([0, 0]), along(plane, vectors[1], length), "curve series-2");
}

function projections(plane, { centred, vectors, projected }) {
  return centred.flatMap((row, i) => {
    const foot = along(plane, vectors[0], projected[i]);
    return [line(plane.toPixel(row), foot, "residual"), dot(foot, 4, 1)];
  });
}

function meanMarker(plane, centre) {
  const [x, y] = plane.toPixel(centre);
  const circle = svg("circle", { class: "mean-marker", cx: x, cy: y, r: 6 });
  return [circle, svg("text", { class: "tick", x: x + 10, y: y + 12 }, "mean")];
}
