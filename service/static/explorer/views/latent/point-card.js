// The card of the current point: its decoded row, its coordinates, and the samples that the user has kept.

import { decode } from "../../lib/api.js";
import { isAbort } from "../../lib/errors.js";
import { vector } from "../../lib/format.js";
import { ThrottledTask } from "../../lib/tasks.js";
import { button } from "../../ui/controls.js";
import { definition, h } from "../../ui/dom.js";
import { math, Z } from "../../ui/mathml.js";
import { errorMessage } from "../../ui/messages.js";
import { rowFigure, thumbnail } from "../../ui/row-figure.js";

const MAX_TRAY = 24;
const DIGITS_IN_LABEL = 4; // how many numbers of z are in the label of an image

export class PointCard {
  constructor({ model, onsample, onend, oncentre, onclear }) {
    this.model = model;
    this.decoding = new ThrottledTask((signal, z) => this.decode(signal, z));
    this.output = h("div", { class: "output" });
    this.note = h("p", { class: "muted" });
    this.coordinates = h("code", { class: "z" });
    this.count = h("output", {}, "0 points");
    this.tray = h("div", { class: "tray" });
    const buttons = h(
      "div",
      { class: "controls" },
      button("Sample here", onsample, { class: "primary" }),
      button("Set A", () => onend("A")),
      button("Set B", () => onend("B")),
      button("Go to centre", oncentre),
      button("Clear", onclear),
    );
    const position = definition(["Current ", math(Z)], this.coordinates);
    const facts = h("dl", {}, position, definition("Sampled", this.count));
    const title = h("h3", {}, "Decoded");
    this.element = h("section", { class: "card point-card" }, title, this.output, this.note, facts, buttons, this.tray);
  }

  /** Show `z` and its decoded row, with a note about the row whose latents are `z`. */
  show(z, note = " ") {
    this.coordinates.textContent = vector(z);
    this.note.textContent = note;
    this.decoding.update(z);
  }

  async decode(signal, z) {
    try {
      const [row] = await decode(this.model, [z], signal);
      this.output.replaceChildren(rowFigure(this.model, row, `decoded at ${vector(z, DIGITS_IN_LABEL)}`));
    } catch (error) {
      if (isAbort(error)) throw error;
      this.output.replaceChildren(errorMessage(error));
    }
  }

  async addToTray(z) {
    try {
      const [row] = await decode(this.model, [z]);
      this.tray.prepend(thumbnail(this.model, row, `sampled at ${vector(z, DIGITS_IN_LABEL)}`));
      while (this.tray.children.length > MAX_TRAY) this.tray.lastChild.remove();
    } catch (error) {
      this.tray.prepend(errorMessage(error));
    }
  }

  setCount(count) {
    this.count.textContent = `${count} point${count === 1 ? "" : "s"}`;
  }

  clear() {
    this.tray.replaceChildren();
  }

  stop() {
    this.decoding.stop();
  }
}
