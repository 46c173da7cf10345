// The card of the interpolation between the ends A and B.

import { postJson } from "../../lib/api.js";
import { state } from "../../lib/state.js";
import { LatestTask } from "../../lib/tasks.js";
import { card, radioGroup, slider, term } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { AsyncPanel, emptyMessage } from "../../ui/messages.js";
import { thumbnail } from "../../ui/row-figure.js";

const METHODS = [
  ["linear", "Linear"],
  ["slerp", "Spherical"],
];
const SLERP =
  "Spherical linear interpolation (White 2016). Between two points at the same distance from the centre, the path is " +
  "an arc of a circle about the centre.";

export class InterpolationCard {
  /** `onpath(latents)` gets the latents between the ends, or an empty list. */
  constructor({ model, onpath }) {
    this.model = model;
    this.onpath = onpath;
    this.ends = {};
    this.task = new LatestTask();
    this.strip = new AsyncPanel("strip");
    this.method = state.get("method") === "slerp" ? "slerp" : "linear";
    this.steps = state.number("steps", 9);
    this.element = card("Interpolation", description(), this.controls(), this.strip.element);
  }

  controls() {
    const method = radioGroup("Method", METHODS, this.method, (value) => {
      this.method = value;
      state.set({ method: value });
      this.update();
    });
    const onsteps = (value) => {
      this.steps = value;
      state.set({ steps: value });
      this.update();
    };
    const steps = slider("Steps", { min: 3, max: 16, step: 1, value: this.steps, format: String, oninput: onsteps });
    return h("div", { class: "controls" }, method, steps);
  }

  /** Interpolate between `ends.A` and `ends.B`. */
  async update(ends = this.ends) {
    this.ends = ends;
    if (!ends.A || !ends.B) {
      this.task.stop();
      this.onpath([]);
      this.strip.show(emptyMessage(ends.A ? "A is set. Move the point and set B." : "Neither end is set yet."));
      return;
    }
    await this.strip.load(() => this.task.run((signal) => this.interpolate(signal)));
  }

  async interpolate(signal) {
    const { ends, steps, method, model } = this;
    const body = { start: { latent: ends.A }, end: { latent: ends.B }, steps, method };
    const { latents, outputs } = await postJson("/interpolate", model, body, signal);
    this.onpath(latents);
    return outputs.map((row, i) => thumbnail(model, row, `step ${i + 1} of ${outputs.length}`));
  }

  stop() {
    this.task.stop();
  }
}

const description = () =>
  h(
    "p",
    { class: "muted" },
    "Set the two ends on the map: A, then B. In many dimensions a straight line passes near the centre, where a " +
      "normal prior has little mass. The method ",
    term("slerp", SLERP),
    " keeps the distance from the centre at which most latents lie.",
  );
