// The loss curves of a training run.

import { number } from "../../lib/format.js";
import { state } from "../../lib/state.js";
import { legend, lineChart } from "../../ui/charts.js";
import { card, radioGroup } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { emptyMessage } from "../../ui/messages.js";

/** The recorded losses that a step of the algorithm computes, by the number of the step. */
const VAE_CURVES = {
  8: ["reconstruction", "reconstruction_error"],
  9: ["kl"],
  10: ["loss", "elbo", "held_out_loss"],
};
const AUTOENCODER_CURVES = { 7: ["squared_error", "loss", "held_out_loss"] };

/** The names of the losses that step number `step` computes. */
export const curvesOfStep = ({ kind }, step) => (kind === "vae" ? VAE_CURVES : AUTOENCODER_CURVES)[step] ?? [];

const NOT_LOSSES = ["epoch", "step", "seconds", "learning_rate", "beta", "kl_weight"];
const FINAL_METRICS = ["elbo", "reconstruction", "kl"];
const ALL = "all";
const SERIES_COLOURS = 6;

export class LossCurves {
  constructor(model) {
    this.model = model;
    this.history = model.history ?? [];
    this.names = lossNames(this.history);
    this.radios = h("div");
    this.chart = h("div");
    this.element = card("Loss curves", this.names.length ? this.content() : emptyMessage(MISSING));
    if (this.names.length) this.select(state.get("terms", ALL));
  }

  content() {
    return [this.radios, this.chart, this.finalMetrics()];
  }

  /** Show the curves of `selection`: the name of a loss, the number of a step, or "all". */
  select(selection) {
    const isKnown = curvesOfStep(this.model, selection).length > 0 || this.names.includes(selection);
    state.set({ terms: isKnown ? selection : null });
    const selected = this.namesOf(selection);
    const options = [[ALL, "All"], ...this.names.map((name) => [name, readable(name)])];
    const checked = selected.length === 1 ? selected[0] : ALL;
    this.radios.replaceChildren(radioGroup("Curve", options, checked, (name) => this.select(name)));
    const lines = selected.map((name) => this.line(name));
    this.chart.replaceChildren(legend(lines), this.drawChart(lines));
  }

  namesOf(selection) {
    const ofStep = curvesOfStep(this.model, selection);
    if (ofStep.length) return this.names.filter((name) => ofStep.includes(name));
    return this.names.includes(selection) ? [selection] : this.names;
  }

  line(name) {
    const recorded = this.history.filter((epoch) => Number.isFinite(epoch[name]));
    return {
      name: readable(name),
      series: (this.names.indexOf(name) % SERIES_COLOURS) + 1,
      dashed: name.startsWith("held"),
      points: recorded.map((epoch) => [epoch.epoch, epoch[name]]),
    };
  }

  drawChart(lines) {
    const published = publishedEpoch(this.model);
    const changes = lines.map(
      ({ name, points }) => `${name} from ${number(points[0][1])} to ${number(points.at(-1)[1])}`,
    );
    return lineChart({
      lines,
      marks: [{ x: published.epoch, text: `${published.kept} epoch ${published.epoch}`, series: 2 }],
      height: 300,
      xLabel: "epoch",
      yLabel: this.model.kind === "vae" ? "nats per row" : "loss",
      label: `${changes.join("; ")}, over ${this.history.length} epochs`,
    });
  }

  finalMetrics() {
    const { metrics } = this.model;
    const names = FINAL_METRICS.filter((name) => name in metrics);
    if (!names.length) return null;
    const values = names.map((name) => `${readable(name)} ${number(metrics[name])}`);
    return h("p", { class: "muted" }, `On held-out rows: ${values.join(", ")} nats per row.`);
  }
}

/** The names of the losses that the last epoch recorded. */
function lossNames(history) {
  const last = history.at(-1) ?? {};
  return Object.keys(last).filter((name) => !NOT_LOSSES.includes(name) && Number.isFinite(last[name]));
}

/** The epoch whose weights were published, and whether it is the "best" or the "last" one, as option --kept says. */
function publishedEpoch(model) {
  const { history, training } = model;
  const byDefault = model.pixel_range || training.patience !== null ? "best" : "last";
  const kept = training.kept ?? byDefault;
  if (kept === "last") return { kept, epoch: history.at(-1).epoch };
  const heldOutLoss = (epoch) => epoch.held_out_loss ?? Number.POSITIVE_INFINITY;
  const best = history.reduce((lowest, epoch) => (heldOutLoss(epoch) < heldOutLoss(lowest) ? epoch : lowest));
  return { kept, epoch: best.epoch };
}

const readable = (name) => ({ kl: "KL", elbo: "ELBO" })[name] ?? name.replaceAll("_", " ");

const MISSING = "This artifact has no training history.";
