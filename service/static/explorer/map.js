// The map of a latent space: a plane through it, the codes that lie there, the prior's contours, and a point that moves.

import { colour, h } from "./dom.js";
import { covariance, dot, eigen, mean, minus, plus, unit, zeros } from "./algebra.js";
import { isPicture, paint } from "./rows.js";

export const LEVELS = [0.393, 0.865, 0.989]; // of a plane Gaussian's mass within 1, 2 and 3 standard deviations
const GRAIN = 44; // cells a side of an estimated density

/** The plane through `codes` along latents i and j, or, for "pc", along their two principal directions. */
export function planeOf(codes, axes, size) {
  if (size === 1) return { origin: [0], u: [1], v: [0], names: ["z₁", ""] };
  if (axes !== "pc") {
    const [i, j] = axes.split(",").map(Number);
    return { origin: zeros(size), u: unit(i, size), v: unit(j, size), names: [`latent ${i + 1}`, `latent ${j + 1}`] };
  }
  const centre = mean(codes), { vectors } = eigen(covariance(codes, centre));
  return { origin: centre, u: vectors[0], v: vectors[1], names: ["principal direction 1", "principal direction 2"] };
}

export const project = (plane, z) => { const d = minus(z, plane.origin); return [dot(plane.u, d), dot(plane.v, d)]; };

/** The prior in the plane: exact for a VAE and for PCA, else estimated from `draws`. */
export function priorOf(model, plane, draws) {
  let variance = null;
  if (model.kind === "vae") variance = zeros(model.latents).map(() => 1);
  if (model.kind === "pca" && model.spectrum?.length >= model.latents) {
    const kept = model.spectrum.slice(0, model.latents), left = model.total_variance - kept.reduce((a, b) => a + b, 0);
    const noise = Math.max(0, left / Math.max(1, model.width - model.latents));
    variance = kept.map((value) => Math.max(1e-12, value - noise));
  }
  if (!variance) return draws.length ? density(draws.map((z) => project(plane, z))) : null;
  const inner = (a, b) => a.reduce((sum, v, i) => sum + v * variance[i] * b[i], 0);
  const cross = inner(plane.u, plane.v);
  const { values, vectors } = eigen([[inner(plane.u, plane.u), cross], [cross, inner(plane.v, plane.v)]]);
  return { centre: project(plane, zeros(model.latents)), radii: values.map(Math.sqrt), angle: Math.atan2(vectors[0][1], vectors[0][0]) };
}

/** A kernel density (Scott's rule) on a grid, and the heights that enclose LEVELS of the mass. */
function density(points) {
  const centre = mean(points), deviation = covariance(points, centre).map((row, i) => Math.sqrt(row[i]) || 1);
  const width = deviation.map((d) => d * points.length ** (-1 / 6));
  const low = centre.map((c, i) => c - 4 * deviation[i]), step = deviation.map((d) => (8 * d) / (GRAIN - 1));
  const at = ([a, b]) => points.reduce((sum, p) => sum + Math.exp(-0.5 * (((a - p[0]) / width[0]) ** 2 + ((b - p[1]) / width[1]) ** 2)), 0);
  const grid = Array.from({ length: GRAIN }, (_, j) => Array.from({ length: GRAIN }, (_, i) => at([low[0] + i * step[0], low[1] + j * step[1]])));
  const heights = points.map(at).sort((a, b) => b - a);
  return { grid, low, step, levels: LEVELS.map((mass) => heights[Math.min(heights.length - 1, Math.floor(mass * heights.length))]) };
}

/** Line segments where `grid` crosses `level` (marching squares). */
function* crossings(grid, level) {
  for (let j = 0; j + 1 < grid.length; j++) for (let i = 0; i + 1 < grid[0].length; i++) {
    const corners = [[i, j], [i + 1, j], [i + 1, j + 1], [i, j + 1]], found = [];
    corners.forEach(([a, b], k) => {
      const [c, d] = corners[(k + 1) % 4], [from, to] = [grid[b][a], grid[d][c]];
      if (from < level !== to < level) { const t = (level - from) / (to - from); found.push([a + t * (c - a), b + t * (d - b)]); }
    });
    for (let k = 0; k + 1 < found.length; k += 2) yield [found[k], found[k + 1]];
  }
}

/** Half the side of the square around what there is to see. */
function reach(points, prior) {
  const far = points.map((p) => Math.max(Math.abs(p[0]), Math.abs(p[1]))).sort((a, b) => a - b);
  const wide = prior?.radii ? Math.max(...prior.centre.map(Math.abs)) + 3.1 * prior.radii[0] : 0;
  return Math.max(wide, 1.08 * (far[Math.floor(0.995 * (far.length - 1))] ?? 0)) || 3;
}

/**
 * A canvas that shows it. `onhover(z)` follows the pointer, `onmove(z)` a drag or the arrow keys, `onpick(z)` a click or Enter.
 * What is shown: `points` [{z, label}], `tints` by label, `prior`, `grid` of decodings, and `marks` [{z, text, tone}], `path` [z], `dots` [z].
 */
export class LatentMap {
  constructor({ model, label, onhover, onleave, onmove, onpick, onkey }) {
    Object.assign(this, { model, points: [], dots: [], marks: [], path: [], grid: null, zoom: 1, hidden: new Set(), codes: true, contours: true, hover: null });
    this.base = h("canvas", { "aria-hidden": "true" });
    this.top = h("canvas", { tabindex: "0", role: "application", "aria-roledescription": "map", "aria-label": label });
    this.top.repaint = () => this.draw();
    this.element = h("div", { class: "map" }, this.base, this.top);
    this.calls = { onhover, onleave, onmove, onpick, onkey };
    this.listen();
    this.watch = new ResizeObserver(() => this.draw());
    this.watch.observe(this.element);
  }

  /** Another plane, or another model. */
  show({ plane, prior, points, current }) {
    Object.assign(this, { plane, prior, points, current });
    this.flat = points.map((point) => project(plane, point.z));
    this.half = reach(this.flat.length ? this.flat : [[3, 3]], prior);
    this.draw();
  }

  get span() { return this.half / this.zoom; }

  /** Where the view's middle lies: at the origin, or when zoomed in at the current point. */
  get middle() { return this.zoom > 1 ? project(this.plane, this.current) : [0, 0]; }

  toPixel([a, b]) {
    const [c, d] = this.middle;
    return [this.size * (0.5 + (a - c) / (2 * this.span)), this.size * (0.5 - (b - d) / (2 * this.span))];
  }

  /** The latent at a pixel: in the plane that is parallel to the map's and goes through the current point. */
  toZ(x, y) {
    const [c, d] = this.middle, [a, b] = project(this.plane, this.current);
    const [p, q] = [c + (x / this.size - 0.5) * 2 * this.span, d - (y / this.size - 0.5) * 2 * this.span];
    return plus(plus(this.current, this.plane.u, p - a), this.plane.v, this.model.latents > 1 ? q - b : 0);
  }

  listen() {
    const where = (event) => { const box = this.top.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    let pressed = null, dragged = false;
    this.top.addEventListener("pointerdown", (event) => {
      pressed = where(event);
      dragged = false;
      this.top.setPointerCapture(event.pointerId);
    });
    this.top.addEventListener("pointermove", (event) => {
      if (!this.plane) return;
      const at = where(event);
      if (pressed && Math.hypot(at[0] - pressed[0], at[1] - pressed[1]) > 4) dragged = true;
      if (pressed && dragged) { this.hover = null; this.calls.onmove?.(this.toZ(...at)); }
      else { this.hover = at; this.calls.onhover?.(this.toZ(...at), this.nearest(at)); this.drawTop(); }
    });
    this.top.addEventListener("pointerup", (event) => {
      if (pressed && !dragged && this.plane) this.calls.onpick?.(this.toZ(...where(event)), this.nearest(where(event)));
      pressed = null;
    });
    this.top.addEventListener("pointercancel", () => (pressed = null));
    this.top.addEventListener("pointerleave", () => { this.hover = null; this.calls.onleave?.(); this.drawTop(); });
    this.top.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (steps && this.plane) {
      const size = (event.shiftKey ? 0.2 : 0.04) * this.span;
      this.calls.onmove?.(plus(plus(this.current, this.plane.u, steps[0] * size), this.plane.v, this.model.latents > 1 ? steps[1] * size : 0));
    } else if (event.key === "Enter" || event.key === " ") this.calls.onpick?.(this.current, null);
    else if (!this.calls.onkey?.(event.key)) return;
    event.preventDefault();
  }

  /** The shown point within 8 pixels of `at`, if any. */
  nearest(at) {
    if (!this.codes) return null;
    const [c, d] = this.middle, scale = this.size / (2 * this.span);
    const x = c + (at[0] - this.size / 2) / scale, y = d - (at[1] - this.size / 2) / scale;
    let best = null, least = (8 / scale) ** 2;
    for (let i = 0; i < this.flat.length; i++) {
      const distance = (this.flat[i][0] - x) ** 2 + (this.flat[i][1] - y) ** 2;
      if (distance < least && !this.hidden.has(this.points[i].label)) [best, least] = [i, distance];
    }
    return best;
  }

  draw() {
    const size = this.element.clientWidth;
    if (!size || !this.plane) return;
    this.size = size;
    const ratio = window.devicePixelRatio || 1;
    for (const canvas of [this.base, this.top]) canvas.width = canvas.height = Math.round(size * ratio);
    const context = this.base.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, size, size);
    if (this.grid) this.drawGrid(context);
    this.drawAxes(context);
    if (this.codes) this.drawPoints(context);
    if (this.contours && this.prior) this.drawPrior(context);
    this.drawTop();
  }

  drawPoints(context) {
    const many = this.points.length > 4000, radius = many ? 1.3 : this.points.length > 800 ? 2.2 : 3;
    for (const label of new Set(this.points.map((point) => point.label))) {
      if (this.hidden.has(label)) continue;
      context.fillStyle = tint(label);
      context.globalAlpha = this.grid ? 0.9 : many ? 0.55 : 0.8;
      context.beginPath();
      this.flat.forEach((p, i) => {
        if (this.points[i].label !== label) return;
        const [x, y] = this.toPixel(p);
        if (many) context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
        else { context.moveTo(x + radius, y); context.arc(x, y, radius, 0, 7); }
      });
      context.fill();
    }
    context.globalAlpha = 1;
  }

  drawAxes(context) {
    const [x, y] = this.toPixel([0, 0]);
    context.strokeStyle = colour("--line");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(0, y + 0.5); context.lineTo(this.size, y + 0.5); context.moveTo(x + 0.5, 0); context.lineTo(x + 0.5, this.size);
    context.stroke();
    if (this.size < 320) return; // no room for their names
    context.fillStyle = colour("--quiet");
    context.font = "12px system-ui, sans-serif";
    const [a, b] = this.plane.names;
    words(context, `${a} →`, this.size - context.measureText(`${a} →`).width - 8, this.size - 8);
    context.save();
    context.translate(14, 8 + context.measureText(`${b} →`).width);
    context.rotate(-Math.PI / 2);
    words(context, `${b} →`, 0, 0);
    context.restore();
  }

  drawPrior(context) {
    context.strokeStyle = colour("--contour");
    context.lineWidth = 1.5;
    const prior = this.prior;
    if (!prior.radii) {
      for (const level of prior.levels) {
        context.beginPath();
        for (const ends of crossings(prior.grid, level)) {
          const [a, b] = ends.map(([i, j]) => this.toPixel([prior.low[0] + i * prior.step[0], prior.low[1] + j * prior.step[1]]));
          context.moveTo(...a); context.lineTo(...b);
        }
        context.stroke();
      }
      return;
    }
    const [x, y] = this.toPixel(prior.centre), scale = this.size / (2 * this.span);
    for (const level of [1, 2, 3]) {
      context.strokeStyle = colour("--contour");
      context.lineWidth = 1.5;
      context.beginPath();
      context.ellipse(x, y, level * prior.radii[0] * scale, Math.max(1e-6, level * prior.radii[1] * scale), -prior.angle, 0, 2 * Math.PI);
      context.stroke();
      const at = x + level * prior.radii[0] * scale * Math.cos(prior.angle), height = y - level * prior.radii[0] * scale * Math.sin(prior.angle);
      context.fillStyle = colour("--contour");
      context.font = "11px system-ui, sans-serif";
      if (at < this.size - 16) words(context, `${level}σ`, at + 4, height - 4);
    }
  }

  drawGrid(context) {
    const { rows, count } = this.grid, side = this.size / count;
    const canvas = document.createElement("canvas");
    context.imageSmoothingEnabled = false;
    rows.forEach((row, k) => {
      paint(canvas, this.model, row);
      context.drawImage(canvas, (k % count) * side, Math.floor(k / count) * side, side - 1, side - 1);
    });
    if (this.codes) { context.fillStyle = colour("--veil"); context.fillRect(0, 0, this.size, this.size); }
  }

  /** The latents at the middle of count x count cells of the map, row by row. */
  lattice(count) {
    const side = this.size / count;
    return Array.from({ length: count * count }, (_, k) => this.toZ(((k % count) + 0.5) * side, (Math.floor(k / count) + 0.5) * side));
  }

  drawTop() {
    if (!this.size) return;
    const context = this.top.getContext("2d"), ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, this.size, this.size);
    const at = (z) => this.toPixel(project(this.plane, z));
    if (this.path.length) {
      context.strokeStyle = colour("--ink");
      context.lineWidth = 1.5;
      context.setLineDash([5, 4]);
      context.beginPath();
      this.path.forEach((z, i) => context[i ? "lineTo" : "moveTo"](...at(z)));
      context.stroke();
      context.setLineDash([]);
    }
    for (const z of this.dots) cross(context, ...at(z));
    for (const mark of this.marks) badge(context, ...at(mark.z), mark.text);
    ring(context, ...at(this.current), colour("--accent"));
    if (this.hover) ring(context, ...this.hover, colour("--quiet"), 5);
  }

  destroy() { this.watch.disconnect(); }
}

function ring(context, x, y, ink, radius = 8) {
  for (const [style, width] of [[colour("--card"), 5], [ink, 2.5]]) {
    context.strokeStyle = style;
    context.lineWidth = width;
    context.beginPath();
    context.arc(x, y, radius, 0, 7);
    context.stroke();
  }
}

function cross(context, x, y) {
  for (const [style, width] of [[colour("--card"), 5], [colour("--ink"), 2]]) {
    context.strokeStyle = style;
    context.lineWidth = width;
    context.beginPath();
    context.moveTo(x - 4, y - 4); context.lineTo(x + 4, y + 4); context.moveTo(x + 4, y - 4); context.lineTo(x - 4, y + 4);
    context.stroke();
  }
}

/** Text with a rim, readable on whatever lies under it. */
function words(context, text, x, y) {
  context.strokeStyle = colour("--card");
  context.lineWidth = 3;
  context.strokeText(text, x, y);
  context.fillText(text, x, y);
}

function badge(context, x, y, text) {
  context.fillStyle = colour("--ink");
  context.beginPath();
  context.arc(x, y, 10, 0, 7);
  context.fill();
  context.fillStyle = colour("--card");
  context.font = "bold 12px system-ui, sans-serif";
  context.textAlign = "center";
  context.fillText(text, x, y + 4);
  context.textAlign = "start";
}

export const TINTS = 12;
/** What the style sheet calls the colour of label k; without a label the quiet one, for a user's own rows (-2) that of warnings. */
export const tintName = (label) => (label === null || label === undefined ? "--code" : label < 0 ? "--above" : `--tint-${label % TINTS}`);
const tint = (label) => colour(tintName(label));

export { isPicture };
