// A canvas on which the user draws a grey-scale image, with the pointer or with the keyboard.

import { clamp } from "../lib/linear-algebra.js";
import { h } from "./dom.js";

const BOARD_SIZE = 256; // canvas pixels on the longer side; more if this gives each image pixel fewer than 8
const CURSOR_COLOUR = "#7aa5ff";
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const DRAW_KEYS = [" ", "Enter"];
const ERASE_KEYS = ["Delete", "Backspace"];

export class DrawingBoard {
  /** `row` is the initial image, or null for an empty image. `ondraw` gets a copy of the row after each stroke. */
  constructor(model, row, ondraw) {
    [this.height, this.width] = model.shape;
    [this.low, this.high] = model.pixel_range;
    this.row = row ? [...row] : new Array(this.width * this.height).fill(this.low);
    this.ondraw = ondraw;
    this.cursor = [this.height >> 1, this.width >> 1]; // line and column
    this.cell = Math.max(8, Math.floor(BOARD_SIZE / Math.max(this.height, this.width)));
    this.element = h("canvas", {
      class: "drawing-board",
      tabindex: "0",
      role: "application",
      "aria-roledescription": "drawing",
      "aria-label": `draw an image of ${this.height} by ${this.width} pixels`,
    });
    this.element.width = this.width * this.cell;
    this.element.height = this.height * this.cell;
    this.addListeners();
    this.changed();
  }

  addListeners() {
    const canvas = this.element;
    let last = null;
    const stop = () => {
      last = null;
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      last = this.positionOf(event);
      this.stroke(last, last, event.button === 2 || event.shiftKey);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (!last) return;
      const position = this.positionOf(event);
      this.stroke(last, position, event.shiftKey);
      last = position;
    });
    canvas.addEventListener("pointerup", stop);
    canvas.addEventListener("pointercancel", stop);
    canvas.addEventListener("keydown", (event) => this.onKey(event));
    canvas.addEventListener("focus", () => this.paint());
    canvas.addEventListener("blur", () => this.paint());
  }

  /** The line and the column under the pointer. They need not be whole numbers. */
  positionOf(event) {
    const box = this.element.getBoundingClientRect();
    const line = ((event.clientY - box.top) / box.height) * this.height - 0.5;
    const column = ((event.clientX - box.left) / box.width) * this.width - 0.5;
    return [line, column];
  }

  /** Draw or erase from one position to another, in steps of half a pixel. */
  stroke(from, to, erase = false) {
    const steps = Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) * 2) + 1;
    for (let step = 0; step < steps; step++) {
      const t = steps > 1 ? step / (steps - 1) : 0;
      this.dab(from[0] + t * (to[0] - from[0]), from[1] + t * (to[1] - from[1]), erase);
    }
    this.changed();
  }

  /** Draw or erase a soft dot. */
  dab(line, column, erase) {
    const radius = Math.max(0.55, Math.max(this.width, this.height) / 24);
    for (let i = 0; i < this.height; i++) {
      for (let j = 0; j < this.width; j++) {
        const squaredDistance = (i - line) ** 2 + (j - column) ** 2;
        const strength = Math.min(1, 1.2 * Math.exp(-squaredDistance / (2 * radius ** 2)));
        if (strength <= 0.05) continue;
        const k = i * this.width + j;
        const value = this.low + (this.high - this.low) * strength;
        this.row[k] = erase ? this.low : Math.max(this.row[k], value);
      }
    }
  }

  onKey(event) {
    if (event.key in ARROWS) this.moveCursor(...ARROWS[event.key]);
    else if (DRAW_KEYS.includes(event.key)) this.stroke(this.cursor, this.cursor);
    else if (ERASE_KEYS.includes(event.key)) this.stroke(this.cursor, this.cursor, true);
    else return;
    event.preventDefault();
    this.paint();
  }

  moveCursor(lines, columns) {
    const [line, column] = this.cursor;
    this.cursor = [clamp(line + lines, 0, this.height - 1), clamp(column + columns, 0, this.width - 1)];
  }

  clear() {
    this.row.fill(this.low);
    this.changed();
  }

  changed() {
    this.paint();
    this.ondraw([...this.row]);
  }

  paint() {
    const context = this.element.getContext("2d");
    const size = this.cell;
    this.row.forEach((value, k) => {
      const grey = Math.round((255 * (value - this.low)) / (this.high - this.low));
      context.fillStyle = `rgb(${grey},${grey},${grey})`;
      context.fillRect((k % this.width) * size, Math.floor(k / this.width) * size, size, size);
    });
    if (document.activeElement === this.element) this.paintCursor(context);
  }

  paintCursor(context) {
    const [line, column] = this.cursor;
    context.strokeStyle = CURSOR_COLOUR;
    context.lineWidth = 2;
    context.strokeRect(column * this.cell + 1, line * this.cell + 1, this.cell - 2, this.cell - 2);
  }
}
