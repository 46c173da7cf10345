// An interactive map of a plane through a latent space: points, contours of the prior, decoded rows, a movable point.

import { cssColour, labelVariable } from "../ui/colours.js";
import { h } from "../ui/dom.js";
import { paint } from "../ui/row-figure.js";
import {
  clearCanvas,
  fillBadge,
  fillOutlinedText,
  resizeCanvas,
  setFont,
  strokeCross,
  strokePath,
  strokeRing,
} from "./canvas.js";
import { contourSegments } from "./prior.js";
import { moveInPlane, project } from "./projection.js";

const DRAG_DISTANCE = 4; // pixels: if the pointer moves less than this during a press, the press is a click
const HIT_DISTANCE = 8; // pixels: the pointer is on a point if it is at most this far away
const KEY_STEP = 0.04; // step of an arrow key as a share of the visible half-width; FAST_KEY_STEP applies with Shift
const FAST_KEY_STEP = 0.2;
const MAX_ZOOM = 16;
const MIN_SIZE_FOR_AXIS_NAMES = 320; // pixels: a smaller map has no names at its axes
const MANY_CODES = 4000; // if there are more points, they are drawn as squares, because circles are too slow
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

/**
 * `onhover(z, i)` is called when the pointer moves; `i` is the index of the point under the pointer, or null.
 * `onleave()` is called when the pointer leaves the map.
 * `onmove(z)` is called during a drag and for the arrow keys. `onpick(z)` is called for a click, Enter or Space.
 * `onkey(key)` is called for all other keys. It returns true if it has used the key.
 *
 * The owner sets these fields before it calls `draw`: `showCodes`, `showContours`, `hiddenLabels`,
 * `decodedGrid` {rows, count}. It sets these fields before it calls `drawOverlay`: `current` z, `samples` [z],
 * `marks` [{z, text}], `path` [z].
 */
export class LatentMap {
  constructor({ model, label, onhover, onleave, onmove, onpick, onkey }) {
    this.model = model;
    this.handlers = { onhover, onleave, onmove, onpick, onkey };
    this.points = [];
    this.showCodes = true;
    this.showContours = true;
    this.hiddenLabels = new Set();
    this.decodedGrid = null;
    this.samples = [];
    this.marks = [];
    this.path = [];
    this.zoom = 1;
    this.pointer = null;
    this.createElements(label);
    this.addListeners();
  }

  createElements(label) {
    this.base = h("canvas", { "aria-hidden": "true" });
    const attributes = { tabindex: "0", role: "application", "aria-roledescription": "map", "aria-label": label };
    this.overlay = h("canvas", attributes);
    this.overlay.repaint = () => this.draw();
    this.element = h("div", { class: "map" }, this.base, this.overlay);
    this.resizeObserver = new ResizeObserver(() => this.draw());
    this.resizeObserver.observe(this.element);
  }

  /** Show another plane or other points. `points`: [{z, label}]. */
  show({ plane, prior, points, current }) {
    Object.assign(this, { plane, prior, points, current });
    this.projected = points.map((point) => project(plane, point.z));
    this.halfWidth = visibleHalfWidth(this.projected, prior);
    this.draw();
  }

  /** Zoom in or out by `factor`; null shows the whole map. */
  zoomBy(factor) {
    this.zoom = factor === null ? 1 : Math.max(1, Math.min(MAX_ZOOM, this.zoom * factor));
    this.draw();
  }

  /** Half the width of the visible square, in units of the plane. */
  get visibleRadius() {
    return this.halfWidth / this.zoom;
  }

  get pixelsPerUnit() {
    return this.size / (2 * this.visibleRadius);
  }

  /** The centre of the visible square: the origin, or the current point when zoomed in. */
  get centre() {
    return this.zoom > 1 ? project(this.plane, this.current) : [0, 0];
  }

  /** The pixel of a point in the plane. */
  toPixel([a, b]) {
    const [centreA, centreB] = this.centre;
    const middle = this.size / 2;
    return [middle + (a - centreA) * this.pixelsPerUnit, middle - (b - centreB) * this.pixelsPerUnit];
  }

  /** The point in the plane at a pixel. */
  toPlane([x, y]) {
    const [centreA, centreB] = this.centre;
    const middle = this.size / 2;
    return [centreA + (x - middle) / this.pixelsPerUnit, centreB - (y - middle) / this.pixelsPerUnit];
  }

  /** The latent vector at a pixel. It lies in the plane through the current point that is parallel to the map. */
  toLatent(pixel) {
    const [a, b] = this.toPlane(pixel);
    const [currentA, currentB] = project(this.plane, this.current);
    return moveInPlane(this.plane, this.current, a - currentA, b - currentB);
  }

  addListeners() {
    const canvas = this.overlay;
    let pressedAt = null;
    let isDragging = false;
    const positionOf = (event) => {
      const box = canvas.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    canvas.addEventListener("pointerdown", (event) => {
      pressedAt = positionOf(event);
      isDragging = false;
      canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!this.plane) return;
      const position = positionOf(event);
      if (pressedAt && distance(position, pressedAt) > DRAG_DISTANCE) isDragging = true;
      if (pressedAt && isDragging) this.dragTo(position);
      else this.hoverAt(position);
    });
    canvas.addEventListener("pointerup", (event) => {
      if (pressedAt && !isDragging && this.plane) this.handlers.onpick?.(this.toLatent(positionOf(event)));
      pressedAt = null;
    });
    canvas.addEventListener("pointercancel", () => {
      pressedAt = null;
    });
    canvas.addEventListener("pointerleave", () => {
      this.pointer = null;
      this.handlers.onleave?.();
      this.drawOverlay();
    });
    canvas.addEventListener("keydown", (event) => this.onKey(event));
  }

  dragTo(position) {
    this.pointer = null;
    this.handlers.onmove?.(this.toLatent(position));
  }

  hoverAt(position) {
    this.pointer = position;
    this.handlers.onhover?.(this.toLatent(position), this.codeAt(position));
    this.drawOverlay();
  }

  onKey(event) {
    if (event.key in ARROWS && this.plane) {
      const step = (event.shiftKey ? FAST_KEY_STEP : KEY_STEP) * this.visibleRadius;
      const [right, up] = ARROWS[event.key];
      this.handlers.onmove?.(moveInPlane(this.plane, this.current, right * step, up * step));
    } else if (event.key === "Enter" || event.key === " ") {
      this.handlers.onpick?.(this.current);
    } else if (!this.handlers.onkey?.(event.key)) {
      return;
    }
    event.preventDefault();
  }

  /** The index of the visible point nearest to a pixel; null if no point is near. */
  codeAt(pixel) {
    if (!this.showCodes) return null;
    const [a, b] = this.toPlane(pixel);
    let nearest = null;
    let least = (HIT_DISTANCE / this.pixelsPerUnit) ** 2;
    for (let i = 0; i < this.projected.length; i++) {
      const squared = (this.projected[i][0] - a) ** 2 + (this.projected[i][1] - b) ** 2;
      if (squared < least && !this.hiddenLabels.has(this.points[i].label)) {
        nearest = i;
        least = squared;
      }
    }
    return nearest;
  }

  draw() {
    const size = this.element.clientWidth;
    if (!size || !this.plane) return;
    this.size = size;
    resizeCanvas(this.overlay, size);
    const context = resizeCanvas(this.base, size);
    if (this.decodedGrid) this.drawDecodedGrid(context);
    this.drawAxes(context);
    if (this.showCodes) this.drawCodes(context);
    if (this.showContours && this.prior) this.drawPrior(context);
    this.drawOverlay();
  }

  drawCodes(context) {
    const labels = new Set(this.points.map((point) => point.label));
    for (const label of labels) {
      if (!this.hiddenLabels.has(label)) this.drawCodesOf(context, label);
    }
    context.globalAlpha = 1;
  }

  drawCodesOf(context, label) {
    const isDense = this.points.length > MANY_CODES;
    const radius = this.codeRadius();
    context.fillStyle = cssColour(labelVariable(label));
    context.globalAlpha = this.codeOpacity();
    context.beginPath();
    this.projected.forEach((point, i) => {
      if (this.points[i].label !== label) return;
      const [x, y] = this.toPixel(point);
      if (isDense) {
        context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
      } else {
        context.moveTo(x + radius, y);
        context.arc(x, y, radius, 0, 2 * Math.PI);
      }
    });
    context.fill();
  }

  codeRadius() {
    if (this.points.length > MANY_CODES) return 1.3;
    return this.points.length > 800 ? 2.2 : 3;
  }

  codeOpacity() {
    if (this.decodedGrid) return 0.9;
    return this.points.length > MANY_CODES ? 0.55 : 0.8;
  }

  drawAxes(context) {
    const [x, y] = this.toPixel([0, 0]);
    context.strokeStyle = cssColour("--border");
    context.lineWidth = 1;
    strokePath(context, [
      [0, y + 0.5],
      [this.size, y + 0.5],
    ]);
    strokePath(context, [
      [x + 0.5, 0],
      [x + 0.5, this.size],
    ]);
    if (this.size >= MIN_SIZE_FOR_AXIS_NAMES) this.drawAxisNames(context);
  }

  drawAxisNames(context) {
    context.fillStyle = cssColour("--muted");
    setFont(context, "12px");
    const [across, up] = this.plane.names.map((name) => `${name} →`);
    fillOutlinedText(context, across, this.size - context.measureText(across).width - 8, this.size - 8);
    context.save();
    context.translate(14, 8 + context.measureText(up).width);
    context.rotate(-Math.PI / 2);
    fillOutlinedText(context, up, 0, 0);
    context.restore();
  }

  drawPrior(context) {
    context.strokeStyle = cssColour("--contour");
    context.fillStyle = cssColour("--contour");
    context.lineWidth = 1.5;
    if (this.prior.ellipse) this.drawEllipses(context, this.prior.ellipse);
    else this.drawContours(context, this.prior.density);
  }

  drawContours(context, density) {
    for (const level of density.levels) {
      context.beginPath();
      for (const [from, to] of contourSegments(density, level)) {
        context.moveTo(...this.toPixel(from));
        context.lineTo(...this.toPixel(to));
      }
      context.stroke();
    }
  }

  /** Ellipses at one, two and three standard deviations. */
  drawEllipses(context, { centre, radii, angle }) {
    const [x, y] = this.toPixel(centre);
    for (const deviations of [1, 2, 3]) {
      const [major, minor] = radii.map((radius) => deviations * radius * this.pixelsPerUnit);
      context.strokeStyle = cssColour("--contour"); // the name of the previous ellipse has changed it
      context.lineWidth = 1.5;
      context.beginPath();
      context.ellipse(x, y, major, Math.max(1e-6, minor), -angle, 0, 2 * Math.PI);
      context.stroke();
      this.drawEllipseName(context, `${deviations}σ`, x + major * Math.cos(angle), y - major * Math.sin(angle));
    }
  }

  drawEllipseName(context, text, x, y) {
    if (x >= this.size - 16) return;
    setFont(context, "11px");
    fillOutlinedText(context, text, x + 4, y - 4);
  }

  drawDecodedGrid(context) {
    const { rows, count } = this.decodedGrid;
    const side = this.size / count;
    const canvas = document.createElement("canvas");
    rows.forEach((row, k) => {
      paint(canvas, this.model, row);
      context.drawImage(canvas, (k % count) * side, Math.floor(k / count) * side, side - 1, side - 1);
    });
    if (!this.showCodes) return;
    context.fillStyle = cssColour("--overlay");
    context.fillRect(0, 0, this.size, this.size);
  }

  /** Divide the map into `count` by `count` squares. Return the latent vectors at their centres, line by line. */
  gridLatents(count) {
    const side = this.size / count;
    const centre = (k) => [((k % count) + 0.5) * side, (Math.floor(k / count) + 0.5) * side];
    return Array.from({ length: count * count }, (_, k) => this.toLatent(centre(k)));
  }

  /** Draw what changes while the pointer moves. */
  drawOverlay() {
    if (!this.size) return;
    const context = clearCanvas(this.overlay, this.size);
    const toPixel = (z) => this.toPixel(project(this.plane, z));
    if (this.path.length) drawDashedPath(context, this.path.map(toPixel));
    for (const z of this.samples) strokeCross(context, toPixel(z));
    for (const mark of this.marks) fillBadge(context, toPixel(mark.z), mark.text);
    strokeRing(context, toPixel(this.current), cssColour("--accent"));
    if (this.pointer) strokeRing(context, this.pointer, cssColour("--muted"), 5);
  }

  destroy() {
    this.resizeObserver.disconnect();
  }
}

const distance = ([a, b], [c, d]) => Math.hypot(a - c, b - d);

function drawDashedPath(context, pixels) {
  context.strokeStyle = cssColour("--text");
  context.lineWidth = 1.5;
  context.setLineDash([5, 4]);
  strokePath(context, pixels);
  context.setLineDash([]);
}

/** Half the side of a square around the origin that shows 99.5 % of the points and three σ of the prior. */
function visibleHalfWidth(points, prior) {
  const distances = points.map(([a, b]) => Math.max(Math.abs(a), Math.abs(b))).sort((a, b) => a - b);
  const last = distances.length - 1;
  const codes = points.length ? distances[Math.floor(0.995 * last)] : 3;
  const ellipse = prior?.ellipse;
  const priorReach = ellipse ? Math.max(...ellipse.centre.map(Math.abs)) + 3.1 * ellipse.radii[0] : 0;
  return Math.max(priorReach, 1.08 * codes) || 3;
}
