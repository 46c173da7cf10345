// The card of a walk from the current point towards a label.

import { postJson } from "../../lib/api.js";
import { fixed } from "../../lib/format.js";
import { LatestTask } from "../../lib/tasks.js";
import { button, card, dropdown, slider, term } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { AsyncPanel } from "../../ui/messages.js";
import { thumbnail } from "../../ui/row-figure.js";

const STEPS = 9;
const DIRECTION =
  "The direction leads to the mean latents of the rows with a label, from those of all other rows or of another label.";

export class WalkCard {
  /**
   * `point()` returns the current latents. `onpath(latents)` gets the latents of all steps of the walk, and
   * `onselect(z)` gets the latents of the step that the user clicks.
   */
  constructor({ model, point, onpath, onselect }) {
    this.model = model;
    this.point = point;
    this.onpath = onpath;
    this.onselect = onselect;
    this.task = new LatestTask();
    this.strip = new AsyncPanel("strip samples");
    [this.direction] = model.directions;
    this.awayFrom = "";
    this.amount = 1.5;
    this.element = card("Walk towards a label", description(), this.controls(), this.strip.element);
  }

  controls() {
    const labels = this.model.directions.map((label) => [label, label]);
    const towards = dropdown("Towards", labels, this.direction, (value) => {
      this.direction = value;
    });
    const awayFrom = dropdown("Away from", [["", "all others"], ...labels], "", (value) => {
      this.awayFrom = value;
    });
    const amount = slider("Amount", {
      min: -3,
      max: 3,
      step: 0.25,
      value: this.amount,
      format: (value) => fixed(value),
      oninput: (value) => {
        this.amount = value;
      },
    });
    const walk = button("Walk", () => this.walk(), { class: "primary" });
    return h("div", { class: "controls" }, towards, awayFrom, amount, walk);
  }

  async walk() {
    await this.strip.load(() => this.task.run((signal) => this.steps(signal)));
  }

  async steps(signal) {
    const { model, direction, amount } = this;
    const body = { latent: Array.from(this.point()), direction, amount, steps: STEPS };
    if (this.awayFrom) body.away_from = this.awayFrom;
    const { latents, outputs } = await postJson("/edit", model, body, signal);
    this.onpath(latents);
    return outputs.map((row, i) => {
      const attributes = { class: "tile-button", "aria-label": `go to step ${i + 1} of ${outputs.length}` };
      return button(thumbnail(model, row, ""), () => this.onselect(latents[i]), attributes);
    });
  }

  stop() {
    this.task.stop();
  }
}

const description = () =>
  h(
    "p",
    { class: "muted" },
    "Starts at the current point and follows the ",
    term("direction", DIRECTION),
    " of a label. With an amount of 1, the walk is as long as the distance between the two means.",
  );
