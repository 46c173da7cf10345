// Where a row comes from: one that was held out from training, one that is drawn, one that is pasted, or the usual one.

import { button, h, segmented } from "./dom.js";
import { isPicture, parseRows } from "./rows.js";
import { state } from "./state.js";
import { say } from "./say.js";

const LONGEST_IN_ADDRESS = 1000; // numbers of a row that is kept in the address

/** An element with a choice of sources. `onrow(row, {name, pixel})` is called with each new row. */
export class RowSource {
  constructor({ model, shown, onrow }) {
    Object.assign(this, { model, shown, onrow, place: h("div", { class: "source-body" }), problem: h("div") });
    const kinds = [["held", shown ? "Held-out row" : "Usual row"], ["draw", "Draw"], ["paste", "Paste"]];
    const offered = kinds.filter(([kind]) => kind !== "draw" || (isPicture(model) && model.shape.length === 2));
    const asked = state.get("from", "held");
    this.kind = offered.some(([kind]) => kind === asked) ? asked : "held";
    this.element = h("div", { class: "source" }, segmented("Where the row comes from", offered, this.kind, (kind) => this.choose(kind)), this.place, this.problem);
  }

  /** Begins with what the address says. */
  start() {
    const kept = state.numbers("data");
    this.own = kept?.length === this.model.width ? kept : null;
    this.choose(this.kind);
  }

  choose(kind) {
    this.kind = kind;
    state.set({ from: kind === "held" ? null : kind, ...(kind === "held" ? { data: null } : { row: null }) });
    this.problem.replaceChildren();
    this.place.replaceChildren(...{ held: () => this.held(), draw: () => this.draw(), paste: () => this.paste() }[kind]());
  }

  give(row, name) {
    this.row = row;
    if (this.kind !== "held") state.set({ data: row.length <= LONGEST_IN_ADDRESS ? Array.from(row, (v) => (v === null ? "" : Number(Number(v).toPrecision(4)))).join(",") : null });
    this.onrow(row, name);
  }

  held() {
    const { shown, model } = this;
    if (!shown) {
      this.give(model.features.map((f) => f.median), "the row of medians");
      return [h("p", { class: "quiet" }, "This artifact carries no held-out rows, so this is the row of medians. Draw or paste another.")];
    }
    const count = shown.inputs.length;
    const index = h("input", { type: "number", min: 0, max: count - 1, step: 1, "aria-label": `row, 0 to ${count - 1}` });
    const what = h("span", { class: "quiet" });
    const go = (i) => {
      const at = ((Math.round(i) % count) + count) % count;
      index.value = at;
      state.set({ row: at });
      const label = labelOf(shown, at);
      what.textContent = `of ${count}${label ? `, label ${label}` : ""}`;
      this.give(shown.inputs[at], `held-out row ${at}${label ? `, label ${label}` : ""}`);
    };
    index.addEventListener("change", () => go(Number(index.value) || 0));
    this.go = go;
    go(state.number("row", 0));
    return [h("div", { class: "line" }, button("←", () => go(Number(index.value) - 1), { "aria-label": "previous row" }), index,
      button("→", () => go(Number(index.value) + 1), { "aria-label": "next row" }), what,
      button("Any", () => go(Math.floor(Math.random() * count)), { "aria-label": "a row at random" }))];
  }

  draw() {
    const editor = new Drawing(this.model, this.own, (row) => this.give(row, "your drawing"));
    return [editor.element, h("div", { class: "line" }, button("Clear", () => editor.clear())),
      h("p", { class: "quiet" }, "Draw with the pointer, or move with the arrow keys and press Space; Delete rubs out.")];
  }

  paste() {
    const { model } = this;
    const area = h("textarea", { rows: 4, spellcheck: "false", "aria-label": `a row of ${model.width} numbers, as CSV or JSON`,
      placeholder: `${model.features.slice(0, 3).map((f) => Number(f.median.toPrecision(3))).join(", ")}, …` });
    if (this.own) area.value = this.own.join(", ");
    const use = () => {
      this.problem.replaceChildren();
      try {
        this.give(parseRows(area.value, model)[0], "the pasted row");
      } catch (error) {
        this.problem.replaceChildren(say(error));
      }
    };
    if (this.own) use();
    return [area, h("div", { class: "line" }, button("Use this row", use), h("span", { class: "quiet" }, `${model.width} numbers, a header is welcome`))];
  }
}

export const labelOf = (shown, i) => (shown?.labels ? shown.label_names?.[shown.labels[i]] ?? String(shown.labels[i]) : "");

/** A grey picture to draw on. */
class Drawing {
  constructor(model, row, ondraw) {
    const [height, width] = model.shape, [low, high] = model.pixel_range;
    Object.assign(this, { height, width, low, high, ondraw, row: row ? [...row] : new Array(width * height).fill(low), at: [height >> 1, width >> 1] });
    this.canvas = h("canvas", { class: "drawing", tabindex: "0", role: "application", "aria-roledescription": "drawing", "aria-label": `draw a picture of ${height} by ${width} pixels` });
    this.cell = Math.max(8, Math.floor(256 / Math.max(height, width)));
    Object.assign(this.canvas, { width: width * this.cell, height: height * this.cell });
    let last = null;
    const where = (event) => { const box = this.canvas.getBoundingClientRect(); return [((event.clientY - box.top) / box.height) * height - 0.5, ((event.clientX - box.left) / box.width) * width - 0.5]; };
    this.canvas.addEventListener("pointerdown", (event) => { this.canvas.setPointerCapture(event.pointerId); last = where(event); this.stroke(last, last, event.button === 2 || event.shiftKey); });
    this.canvas.addEventListener("pointermove", (event) => { if (last) { const to = where(event); this.stroke(last, to, event.shiftKey); last = to; } });
    for (const name of ["pointerup", "pointercancel"]) this.canvas.addEventListener(name, () => (last = null));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    for (const name of ["focus", "blur"]) this.canvas.addEventListener(name, () => this.paint());
    this.element = this.canvas;
    this.paint();
    ondraw(this.row);
  }

  stroke(from, to, rub = false) {
    const radius = Math.max(0.55, Math.max(this.width, this.height) / 24);
    const steps = Math.ceil(Math.hypot(to[0] - from[0], to[1] - from[1]) * 2) + 1;
    for (let step = 0; step < steps; step++) {
      const t = steps > 1 ? step / (steps - 1) : 0, y = from[0] + t * (to[0] - from[0]), x = from[1] + t * (to[1] - from[1]);
      for (let i = 0; i < this.height; i++) for (let j = 0; j < this.width; j++) {
        const ink = this.low + (this.high - this.low) * Math.min(1, 1.2 * Math.exp(-((i - y) ** 2 + (j - x) ** 2) / (2 * radius ** 2)));
        const k = i * this.width + j;
        if (ink - this.low > 0.05 * (this.high - this.low)) this.row[k] = rub ? this.low : Math.max(this.row[k], ink);
      }
    }
    this.paint();
    this.ondraw([...this.row]);
  }

  key(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (move) this.at = [Math.max(0, Math.min(this.height - 1, this.at[0] + move[0])), Math.max(0, Math.min(this.width - 1, this.at[1] + move[1]))];
    else if (event.key === " " || event.key === "Enter") this.stroke(this.at, this.at);
    else if (event.key === "Delete" || event.key === "Backspace") this.stroke(this.at, this.at, true);
    else return;
    event.preventDefault();
    this.paint();
  }

  clear() {
    this.row.fill(this.low);
    this.paint();
    this.ondraw([...this.row]);
  }

  paint() {
    const context = this.canvas.getContext("2d"), size = this.cell;
    this.row.forEach((value, k) => {
      const grey = Math.round((255 * (value - this.low)) / (this.high - this.low));
      context.fillStyle = `rgb(${grey},${grey},${grey})`;
      context.fillRect((k % this.width) * size, Math.floor(k / this.width) * size, size, size);
    });
    if (document.activeElement !== this.canvas) return;
    context.strokeStyle = "#7aa5ff";
    context.lineWidth = 2;
    context.strokeRect(this.at[1] * size + 1, this.at[0] * size + 1, size - 2, size - 2);
  }
}

