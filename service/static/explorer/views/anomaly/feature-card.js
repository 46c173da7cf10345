// The card that varies one feature of the row and shows the score over the feature's values.

import { scoreRows } from "../../lib/api.js";
import { nameWithUnit, number } from "../../lib/format.js";
import { range } from "../../lib/linear-algebra.js";
import { isImage } from "../../lib/model.js";
import { state } from "../../lib/state.js";
import { LatestTask } from "../../lib/tasks.js";
import { lineChart } from "../../ui/charts.js";
import { button, card, dropdown, slider } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { AsyncPanel } from "../../ui/messages.js";

const SWEEP_POINTS = 41; // the number of values of the feature that are scored
const NONE = -1;
const toParameter = (value) => Number(value.toPrecision(4));

export class FeatureCard {
  /** `alpha()` returns the current alpha; `onchange(row)` gets the row with the varied feature. */
  constructor({ model, alpha, onchange }) {
    this.model = model;
    this.alpha = alpha;
    this.onchange = onchange;
    this.feature = state.number("feature", NONE);
    this.value = state.number("value", Number.NaN);
    this.task = new LatestTask();
    this.chart = new AsyncPanel();
    this.dropdown = this.createDropdown();
    this.sliderSlot = h("div", { class: "feature-slider" });
    const reset = button("Reset", () => this.select(NONE));
    const controls = h("div", { class: "controls" }, this.dropdown, this.sliderSlot, reset);
    this.element = card("Vary a feature", h("p", { class: "muted" }, this.help()), controls, this.chart.element);
  }

  help() {
    const how = isImage(this.model)
      ? "Choose a pixel here, or click one in the row under “Feature contributions”."
      : "Choose a feature here, or click one under “Feature contributions”.";
    return `${how} The curve shows the score for each value of the feature.`;
  }

  createDropdown() {
    const features = this.model.features.map(({ name }, i) => [String(i), name]);
    const options = [[String(NONE), "none"], ...features];
    return dropdown("Feature", options, String(this.feature), (k) => this.select(Number(k)));
  }

  /** Take a new row. The feature keeps its varied value. */
  setRow(row) {
    this.original = Array.from(row);
    const isValid = this.feature < this.model.width;
    this.select(isValid ? this.feature : NONE, true);
  }

  /** Forget the row. */
  clear() {
    this.task.stop();
    this.original = null;
    this.sliderSlot.replaceChildren();
    this.chart.clear();
  }

  /** The row with the varied feature; null if there is no row. */
  get row() {
    if (!this.original) return null;
    const row = [...this.original];
    if (this.feature !== NONE && Number.isFinite(this.value)) row[this.feature] = this.value;
    return row;
  }

  /** Vary feature `k`. It starts at the value in the row, unless `keepValue` is true. */
  select(k, keepValue = false) {
    this.feature = k;
    if (!this.original) return;
    if (!keepValue || !Number.isFinite(this.value)) this.value = this.originalValue(k);
    this.dropdown.select.value = String(k);
    this.sliderSlot.replaceChildren();
    this.chart.clear();
    if (k === NONE) {
      state.set({ feature: null, value: null });
    } else {
      state.set({ feature: k, value: toParameter(this.value) });
      this.sliderSlot.append(this.createSlider());
      this.sweep();
    }
    this.onchange(this.row);
  }

  originalValue(k) {
    return k === NONE ? Number.NaN : (this.original[k] ?? this.model.features[k].median);
  }

  createSlider() {
    const [low, high] = this.valueRange();
    return slider(nameWithUnit(this.model.features[this.feature]), {
      min: low,
      max: high,
      step: (high - low) / 200,
      value: this.value,
      oninput: (value) => {
        this.value = value;
        state.set({ value: toParameter(value) });
        this.onchange(this.row);
        this.redraw();
      },
    });
  }

  /** The range of values to try: for a pixel its range, for a table feature twice the range of the training data. */
  valueRange() {
    const { model, feature } = this;
    const { minimum, maximum } = model.features[feature];
    const [low, high] = isImage(model) ? model.pixel_range : [minimum, maximum];
    const margin = isImage(model) ? 0 : 0.5 * (high - low || 1);
    const original = this.original[feature] ?? low;
    return [Math.min(low - margin, original), Math.max(high + margin, original)];
  }

  /** Score the row with `SWEEP_POINTS` values of the feature. */
  sweep() {
    const { feature, model } = this;
    const [low, high] = this.valueRange();
    const values = range(SWEEP_POINTS).map((i) => low + (i * (high - low)) / (SWEEP_POINTS - 1));
    const inputs = values.map((value) => this.original.map((v, i) => (i === feature ? value : v)));
    this.chart.load(() =>
      this.task.run(async (signal) => {
        const { results } = await scoreRows(model, { inputs, alpha: this.alpha(), explain: 0 }, signal);
        this.swept = { feature, points: results.map((result) => [values[result.row], result.score]) };
        return this.drawChart();
      }),
    );
  }

  setThreshold(threshold) {
    this.threshold = threshold;
    this.redraw();
  }

  redraw() {
    if (this.swept?.feature === this.feature) this.chart.show(this.drawChart());
  }

  drawChart() {
    const { points } = this.swept;
    const feature = this.model.features[this.swept.feature];
    const lines = [{ name: "score", series: 1, points }];
    if (Number.isFinite(this.threshold)) {
      const ends = [points[0], points.at(-1)].map(([x]) => [x, this.threshold]);
      lines.push({ name: "threshold", series: 2, dashed: true, points: ends });
    }
    return lineChart({
      lines,
      marks: [{ x: this.value, text: `now ${number(this.value)}`, series: 3 }],
      noteOffset: 1,
      height: 240,
      xLabel: nameWithUnit(feature),
      yLabel: "score",
      label: `score over values of ${feature.name}`,
    });
  }

  stop() {
    this.task.stop();
  }
}
