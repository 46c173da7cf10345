// The card of samples from the prior.

import { postJson } from "../../lib/api.js";
import { fixed } from "../../lib/format.js";
import { state } from "../../lib/state.js";
import { LatestTask } from "../../lib/tasks.js";
import { button, card, dropdown, field, slider, term } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { AsyncPanel } from "../../ui/messages.js";
import { thumbnail } from "../../ui/row-figure.js";

const SAMPLES = 16;
const TEMPERATURE =
  "A factor on the noise. Below 1, samples stay near the centre and look typical. Above 1, samples are more varied.";

export class SamplingCard {
  /**
   * `onsamples(latents)` gets the latents of the samples; `onselect(z)` gets the latents of the clicked sample;
   * `oncondition()` is called when the user has chosen another `model.condition`.
   */
  constructor({ model, onsamples, onselect, oncondition }) {
    this.model = model;
    this.onsamples = onsamples;
    this.onselect = onselect;
    this.oncondition = oncondition;
    this.task = new LatestTask();
    this.panel = new AsyncPanel("strip samples");
    this.seed = state.number("seed", 7);
    this.temperature = state.number("t", 1);
    this.levels = Object.entries(model.conditions ?? {}).map(([name, levels]) => this.levelOf(name, levels));
    this.element = card("Samples", this.controls(), this.panel.element);
  }

  controls() {
    const setSeed = (seed) => {
      this.seed = seed;
      this.draw();
    };
    const input = h("input", { type: "number", min: 0, step: 1, value: String(this.seed) });
    input.addEventListener("change", () => setSeed(Math.max(0, Math.round(Number(input.value) || 0))));
    const temperature = slider(term("Temperature", TEMPERATURE), {
      min: 0,
      max: 2,
      step: 0.05,
      value: this.temperature,
      format: (v) => fixed(v),
      oninput: (value) => {
        this.temperature = value;
        this.draw();
      },
    });
    const next = button("Next seed", () => {
      input.value = this.seed + 1;
      setSeed(this.seed + 1);
    });
    const draw = button("Draw", () => this.draw(), { class: "primary" });
    return h("div", { class: "controls" }, ...this.levels, field("Seed", input), temperature, draw, next);
  }

  /** The list from which the user chooses a level of the condition `name`; the empty text means any level. */
  levelOf(name, levels) {
    const options = [["", "any"], ...levels.map((level) => [level, level])];
    return dropdown(name, options, this.model.condition?.[name] ?? "", (level) => {
      const { [name]: _, ...others } = this.model.condition ?? {};
      this.setCondition(level ? { ...others, [name]: level } : others);
      this.oncondition();
      this.draw();
    });
  }

  /** Show rows under `condition` from now on; without levels, under none. */
  setCondition(condition) {
    const isEmpty = Object.keys(condition).length === 0;
    this.model.condition = isEmpty ? undefined : condition;
    state.set({ condition: isEmpty ? null : JSON.stringify(condition) });
    const names = Object.keys(this.model.conditions ?? {});
    for (const [i, name] of names.entries()) this.levels[i].select.value = condition[name] ?? "";
  }

  async draw() {
    state.set({ seed: this.seed, t: this.temperature });
    await this.panel.load(() => this.task.run((signal) => this.sample(signal)));
  }

  async sample(signal) {
    const body = { n: SAMPLES, seed: this.seed, temperature: this.temperature };
    const { latents, outputs, conditions } = await postJson("/sample", this.model, body, signal);
    this.onsamples(latents);
    return outputs.map((row, i) => {
      const attributes = { class: "tile-button", "aria-label": `go to sample ${i + 1}` };
      return button(thumbnail(this.model, row, ""), () => this.select(latents[i], conditions?.[i]), attributes);
    });
  }

  /** Go to a sample. If it was drawn for a condition, decode under this condition from now on. */
  select(z, condition) {
    if (condition) this.setCondition(condition);
    this.onselect(z);
  }

  clear() {
    this.panel.clear();
  }

  stop() {
    this.task.stop();
  }
}
