// The card of the held-out rows whose latents are nearest to the current point.

import { postJson } from "../../lib/api.js";
import { number } from "../../lib/format.js";
import { labelOf } from "../../lib/model.js";
import { LatestTask } from "../../lib/tasks.js";
import { button, card } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { AsyncPanel } from "../../ui/messages.js";
import { thumbnail } from "../../ui/row-figure.js";

const COUNT = 8;

export class NeighboursCard {
  /** `heldOut`: the held-out rows; `point()` returns the current latents; `onselect(z)` gets a row's latents. */
  constructor({ model, heldOut, point, onselect }) {
    this.model = model;
    this.heldOut = heldOut;
    this.point = point;
    this.onselect = onselect;
    this.task = new LatestTask();
    this.panel = new AsyncPanel("neighbours");
    const find = button("Find neighbours", () => this.find(), { class: "primary" });
    this.element = card("Neighbours", description(), h("div", { class: "controls" }, find), this.panel.element);
  }

  async find() {
    await this.panel.load(() => this.task.run((signal) => this.neighbours(signal)));
  }

  async neighbours(signal) {
    const body = { latents: [this.point()], n: COUNT };
    const answer = await postJson("/neighbours", this.model, body, signal);
    const [[indices], [distances]] = [answer.indices, answer.distances];
    const usual = answer.usual_distance;
    const note = usual === null ? "" : `The usual distance between two neighbours is ${number(usual)}.`;
    const tiles = indices.map((index, i) => this.tile(index, distances[i]));
    return [h("div", { class: "strip samples" }, tiles), h("p", { class: "muted" }, note)];
  }

  tile(index, distance) {
    const { model, heldOut } = this;
    const row = heldOut.inputs[index];
    const label = labelOf(heldOut, index);
    const caption = `${label ? `${label}, ` : ""}at ${number(distance)}`;
    const attributes = { class: "tile-button", "aria-label": `go to held-out row ${index}, ${caption}` };
    const figure = row ? thumbnail(model, row, "") : h("span", {}, `row ${index}`);
    const select = () => this.onselect(heldOut.latents[index]);
    return button([figure, h("small", {}, caption)], select, attributes);
  }

  stop() {
    this.task.stop();
  }
}

const description = () =>
  h("p", { class: "muted" }, "The held-out rows whose latents are nearest to the current point, and their distances.");
