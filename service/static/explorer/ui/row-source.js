// The sources from which the user chooses a row: held-out rows, a drawing, or pasted numbers.

import { heldOutRowName, isImage, labelOf, medians } from "../lib/model.js";
import { parseRows } from "../lib/parse-rows.js";
import { state } from "../lib/state.js";
import { button, radioGroup } from "./controls.js";
import { h } from "./dom.js";
import { DrawingBoard } from "./drawing-board.js";
import { errorMessage } from "./messages.js";

const MAX_NUMBERS_IN_ADDRESS = 1000; // a longer row is not kept in the address

export class RowSource {
  /**
   * `heldOut` has the model's held-out rows, or is null. `onrow(row, name)` is called with every new row, and
   * `onreject()` when the user has entered a row that cannot be read: the results of the previous row are then stale.
   */
  constructor({ model, heldOut, onrow, onreject }) {
    this.model = model;
    this.heldOut = heldOut;
    this.onrow = onrow;
    this.onreject = onreject;
    this.body = h("div", { class: "source-body" });
    this.error = h("div");
    const sources = this.availableSources();
    const wanted = state.get("from", "held");
    this.source = sources.some(([source]) => source === wanted) ? wanted : "held";
    const choice = radioGroup("Source", sources, this.source, (source) => this.select(source));
    this.element = h("div", { class: "source" }, choice, this.body, this.error);
  }

  availableSources() {
    const isGreyImage = isImage(this.model) && this.model.shape.length === 2;
    return [
      ["held", this.heldOut ? "Held-out row" : "Median row"],
      ...(isGreyImage ? [["draw", "Draw"]] : []),
      ["paste", "Paste"],
    ];
  }

  /** Show the row that the address holds, or the first row if it holds none. */
  start() {
    this.ownRow = state.numbers("data", this.model.width);
    this.select(this.source);
  }

  select(source) {
    this.source = source;
    const isHeldOut = source === "held";
    state.set(isHeldOut ? { from: null, data: null } : { from: source, row: null });
    this.error.replaceChildren();
    this.body.replaceChildren(...this.sourceElements());
  }

  sourceElements() {
    if (this.source === "draw") return this.drawing();
    if (this.source === "paste") return this.pasteForm();
    return this.heldOut ? this.heldOutRows() : this.medianRow();
  }

  emit(row, name) {
    if (this.source !== "held") state.set({ data: toAddress(row) });
    this.onrow(row, name);
  }

  medianRow() {
    this.emit(medians(this.model), "the row of medians");
    const text =
      "This artifact has no held-out rows to show. The row has the median of each feature. Draw or paste another row.";
    return [h("p", { class: "muted" }, text)];
  }

  heldOutRows() {
    const { heldOut } = this;
    const count = heldOut.inputs.length;
    const label = `row, 0 to ${count - 1}`;
    const index = h("input", { type: "number", min: 0, max: count - 1, step: 1, "aria-label": label });
    const note = h("span", { class: "muted" });
    const goTo = (i) => {
      const wrapped = ((Math.round(i) % count) + count) % count;
      index.value = wrapped;
      state.set({ row: wrapped });
      const rowLabel = labelOf(heldOut, wrapped);
      note.textContent = `of ${count}${rowLabel ? `, label ${rowLabel}` : ""}`;
      this.emit(heldOut.inputs[wrapped], heldOutRowName(heldOut, wrapped));
    };
    const step = (by) => goTo(Number(index.value) + by);
    index.addEventListener("change", () => goTo(Number(index.value) || 0));
    goTo(state.number("row", 0));
    const previous = button("←", () => step(-1), { "aria-label": "previous row" });
    const next = button("→", () => step(1), { "aria-label": "next row" });
    const random = button("Random", () => goTo(Math.floor(Math.random() * count)), { "aria-label": "random row" });
    return [h("div", { class: "controls" }, previous, index, next, note, random)];
  }

  drawing() {
    const board = new DrawingBoard(this.model, this.ownRow, (row) => this.emit(row, "your drawing"));
    const help =
      "Draw with the pointer; hold Shift to erase. With the keyboard: arrow keys move, Space draws, Delete erases.";
    const clear = button("Clear", () => board.clear());
    return [board.element, h("div", { class: "controls" }, clear), h("p", { class: "muted" }, help)];
  }

  pasteForm() {
    const { width } = this.model;
    const text = h("textarea", {
      rows: 4,
      spellcheck: "false",
      "aria-label": `a row of ${width} numbers, as CSV or JSON`,
      placeholder: `${medians(this.model).slice(0, 3).map(toFourDigits).join(", ")}, …`,
    });
    const submit = () => this.submit(text.value);
    if (this.ownRow) {
      text.value = this.ownRow.join(", ");
      submit();
    }
    const note = h("span", { class: "muted" }, `${width} numbers, with or without a header`);
    return [text, h("div", { class: "controls" }, button("Use this row", submit), note)];
  }

  submit(text) {
    this.error.replaceChildren();
    try {
      this.emit(parseRows(text, this.model)[0], "the pasted row");
    } catch (error) {
      this.error.replaceChildren(errorMessage(error));
      this.onreject();
    }
  }
}

const toFourDigits = (value) => Number(Number(value).toPrecision(4));

/** A row in the format of the address; null if the row is too long. A missing value becomes an empty field. */
function toAddress(row) {
  if (row.length > MAX_NUMBERS_IN_ADDRESS) return null;
  return Array.from(row, (v) => (v === null ? "" : toFourDigits(v))).join(",");
}
