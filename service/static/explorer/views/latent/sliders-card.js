// A slider for each latent, with the activity of the latent.

import { fixed, number } from "../../lib/format.js";
import { range } from "../../lib/linear-algebra.js";
import { card, slider, term } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";

const MAX_SLIDERS = 32;
const ACTIVITY =
  "How much information a latent carries: its KL divergence from the prior in nats or, for a model without a KL " +
  "term, its variance over held-out rows. The decoder ignores an inactive latent.";

export class SlidersCard {
  /** `oninput(k, value)` is called when the user moves the slider of latent k. */
  constructor({ model, codes, current, oninput }) {
    this.model = model;
    this.report = model.latent_report ?? [];
    this.latents = this.listedLatents();
    this.sliders = this.latents.map((k) => this.createSlider(k, codes, current[k], oninput));
    const description = h("p", { class: "muted" }, "The bar shows the ", term("activity", ACTIVITY), this.summary());
    this.element = card("Latents", description, h("div", { class: "sliders" }, this.sliders));
  }

  set(z) {
    this.sliders.forEach((field, i) => {
      field.set(z[this.latents[i]]);
    });
  }

  activity(k) {
    return this.report[k]?.kl ?? this.report[k]?.variance ?? 0;
  }

  isInactive(k) {
    return Boolean(this.report[k]) && !this.report[k].active;
  }

  /** All latents or, if there are too many, the most active ones. */
  listedLatents() {
    const all = range(this.model.latents);
    if (all.length <= MAX_SLIDERS) return all;
    return all.sort((a, b) => this.activity(b) - this.activity(a)).slice(0, MAX_SLIDERS);
  }

  summary() {
    const { latents } = this.model;
    const inactive = this.report.filter((latent) => !latent.active).length;
    const count = inactive ? `${inactive} of ${latents} are inactive.` : `all ${latents} are active.`;
    const cut = latents > MAX_SLIDERS ? ` The ${MAX_SLIDERS} most active are listed.` : "";
    return ` of a latent; ${count}${cut}`;
  }

  createSlider(k, codes, value, oninput) {
    const limit = sliderLimit(this.model, codes, k);
    return slider(this.label(k), {
      min: -limit,
      max: limit,
      step: limit / 200,
      value,
      format: (v) => fixed(v),
      className: this.isInactive(k) ? "is-inactive" : "",
      oninput: (v) => oninput(k, v),
    });
  }

  label(k) {
    const badge = this.isInactive(k) ? h("em", { class: "inactive" }, "inactive") : null;
    return [h("span", {}, "z", h("sub", {}, String(k + 1)), badge), this.activityMeter(k)];
  }

  activityMeter(k) {
    const highest = Math.max(1e-12, ...this.report.map((_, i) => this.activity(i)));
    const fill = h("span", {});
    fill.style.width = `${(100 * this.activity(k)) / highest}%`;
    const hasKl = this.report[k]?.kl !== null && this.report[k]?.kl !== undefined;
    const title = hasKl ? `${number(this.activity(k))} nats` : `variance ${number(this.activity(k))}`;
    return h("span", { class: "activity", title }, fill);
  }
}

/** The end of slider `k`: 5 % above the largest |value| of latent k in `codes`; for a VAE, at least 3.15. */
function sliderLimit(model, codes, k) {
  const least = model.kind === "vae" ? 3 : 0;
  return Math.max(least, ...codes.map((z) => Math.abs(z[k]))) * 1.05 || 3;
}
