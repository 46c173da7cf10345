// How strange a row is, how sure that is, and why; what changes if a feature does; and the strangest rows of a batch.

import { Latest, exhibit, post } from "../api.js";
import { X, announce, button, card, choice, fixed, h, hat, math, mi, mo, mn, number, row as mrow, slider, term, frac } from "../dom.js";
import { curves, histogram } from "../charts.js";
import { isPicture, paintSigned, readFile, tile } from "../rows.js";
import { Place, nothing, say } from "../say.js";
import { RowSource } from "../source.js";
import { state } from "../state.js";

export const title = "Anomaly";
const SWEEP = 41; // values of a feature that are tried
const LISTED = 12; // contributions
const BATCH_LISTED = 50;
const BATCH_MOST = 5000;

export function render(place, { model }) {
  const view = new Anomaly(place, model);
  view.start();
  return () => view.destroy();
}

class Anomaly {
  constructor(place, model) {
    Object.assign(this, { place, model, alpha: state.number("alpha", 0.05), base: null, feature: state.number("feature", -1), value: state.number("value", NaN) });
    this.judging = new Latest();
    this.sweeping = new Latest();
    this.batching = new Latest();
    this.verdict = new Place("verdict-place");
    this.chart = new Place();
    this.reasons = new Place();
    this.curve = new Place();
    this.batch = new Place();
  }

  async start() {
    const { model, place } = this;
    place.append(h("p", { class: "lead" }, "The score says how badly ", model.name, " explains a row; the ", term("p-value", "Split-conformal: the share of calibration rows, which trained nothing, that are at least as strange. At most α of normal rows fall below α, whatever the model."),
      " says how rare that is among normal rows: ", math(mrow(mi("p"), mo("="), frac(mrow(mn(1), mo("+"), mo("#"), mo("{"), mi("i"), mo(":"), `<msub><mi>s</mi><mi>i</mi></msub>`, mo("≥"), mi("s"), mo("}")), mrow(mi("n"), mo("+"), mn(1))))), ". A high reconstruction error alone would have no such meaning."));
    try {
      [this.shown, this.calibration] = await Promise.all([exhibit(model, "held-out"), exhibit(model, "calibration")]);
    } catch (error) {
      place.append(say(error));
    }
    this.source = new RowSource({ model, shown: this.shown, onrow: (row, name) => this.take(row, name) });
    place.append(h("div", { class: "recon" },
      h("section", { class: "card" }, h("h3", {}, "The row"), this.source.element, this.alphaSlider(), this.verdict.element),
      h("div", { class: "stack" }, card("Among the calibration rows", this.chart.element), card("Why", this.reasons.element))),
      this.perturbCard(), this.batchCard());
    this.source.start();
  }

  alphaSlider() {
    const exponent = Math.log10(this.alpha);
    return slider(["α, ", term("false alarms", "The share of normal rows that may be called anomalous.")], { min: -3, max: -0.3, step: 0.05, value: exponent, show: (v) => `${number(Number((100 * 10 ** v).toPrecision(2)))} %`,
      oninput: (v) => { this.alpha = Number((10 ** v).toPrecision(2)); state.set({ alpha: this.alpha }); this.judge(); } });
  }

  perturbCard() {
    const { model } = this;
    const options = [["-1", "none"], ...model.features.map((f, i) => [String(i), f.name])];
    this.choose = choice("Feature", options, String(this.feature), (k) => this.perturb(Number(k)));
    this.knob = h("div", { class: "perturb-knob" });
    return card("Perturb a feature and watch", h("p", { class: "quiet" }, isPicture(model) ? "Choose a pixel here or by clicking the row in “Why”." : "Choose a feature here or in “Why”.", " The curve is the score over the values it could have."),
      h("div", { class: "line" }, this.choose, this.knob, button("As it was", () => this.perturb(-1))), this.curve.element);
  }

  batchCard() {
    const input = h("input", { type: "file", accept: ".csv,.npy,.json,.txt", "aria-label": "a file of rows to judge", onchange: () => this.file(input.files[0]) });
    this.fdr = h("input", { type: "checkbox", id: "fdr", "aria-label": "control the false discovery rate", checked: state.get("fdr") === "1", onchange: () => { state.set({ fdr: this.fdr.checked ? "1" : null }); if (this.rows) this.judgeBatch(); } });
    return card("A batch, the strangest first", h("div", { class: "line" }, h("label", { class: "field" }, h("span", { class: "name" }, "File (CSV, JSON or npy)"), input),
      this.shown ? button("The held-out rows", () => { this.rows = this.shown.inputs; this.left = 0; this.judgeBatch(); }) : null,
      h("span", { class: "check" }, this.fdr, h("span", {}, h("label", { for: "fdr" }, "Control the "), term("false discovery rate", "Benjamini and Hochberg: of the rows called anomalous, at most a share α is normal, in the mean. Without it, α of all normal rows ring.")))), this.batch.element);
  }

  take(row, name) {
    Object.assign(this, { base: Array.from(row), name });
    if (this.feature >= this.model.width) this.feature = -1;
    this.perturb(this.feature, true);
  }

  current() {
    const row = [...this.base];
    if (this.feature >= 0 && Number.isFinite(this.value)) row[this.feature] = this.value;
    return row;
  }

  perturb(k, kept = false) {
    const { model } = this;
    this.feature = k;
    if (!kept || !Number.isFinite(this.value)) this.value = k < 0 ? NaN : this.base[k] ?? model.features[k].median;
    this.choose.select.value = String(k);
    state.set({ feature: k < 0 ? null : k, value: k < 0 ? null : Number(this.value.toPrecision(4)) });
    this.knob.replaceChildren();
    this.curve.element.replaceChildren();
    if (k >= 0) {
      const [low, high] = this.range(k);
      this.knob.append(slider(`${model.features[k].name}${model.features[k].unit ? `, ${model.features[k].unit}` : ""}`, { min: low, max: high, step: (high - low) / 200, value: this.value, oninput: (v) => {
        this.value = v;
        state.set({ value: Number(v.toPrecision(4)) });
        this.judge();
        this.drawSweep();
      } }));
      this.sweep();
    }
    this.judge();
  }

  /** From well below to well above what training saw. */
  range(k) {
    const { minimum, maximum } = this.model.features[k], [low, high] = isPicture(this.model) ? this.model.pixel_range : [minimum, maximum];
    const more = isPicture(this.model) ? 0 : 0.5 * (high - low || 1), seen = this.base[k] ?? low;
    return [Math.min(low - more, seen), Math.max(high + more, seen)];
  }

  judge() {
    const { model } = this, row = this.current();
    this.verdict.fill(() => this.judging.run(async (signal) => {
      const answer = await post("/anomaly", model, { inputs: [row], alpha: this.alpha, explain: model.width }, signal);
      const [result] = answer.results;
      if (!result) return nothing(answer.errors[0]?.detail ?? "The model cannot judge this row.");
      this.threshold = answer.threshold;
      this.chart.fill(async () => this.calibrated(result, answer));
      this.reasons.fill(async () => this.why(row, result));
      if (this.swept) this.drawSweep();
      announce(`${result.is_anomaly ? "anomalous" : "normal"}, p-value ${number(result.p_value)}`);
      return this.words(result, answer);
    }));
  }

  words(result, answer) {
    const parts = Object.entries(result.parts ?? {}).map(([name, value]) => `${name} ${number(value)}`).join(" + ");
    return [h("p", { class: result.is_anomaly ? "stamp bad" : "stamp good" }, result.is_anomaly ? "Anomalous" : "Normal"),
      h("dl", {}, h("dt", {}, "score"), h("dd", {}, number(result.score)), h("dt", {}, "threshold"), h("dd", {}, number(answer.threshold)), h("dt", {}, "p-value"), h("dd", {}, `${number(result.p_value)}${result.p_value <= answer.calibration.floor * 1.0001 ? ", the floor" : ""}`),
        h("dt", {}, term("severity", "The surprisal of the score over that of the threshold: above 1 exactly where the row is anomalous at α, for every model.")), h("dd", {}, number(result.severity))),
      parts ? h("p", { class: "quiet" }, `score = ${parts}`) : null];
  }

  calibrated(result, answer) {
    const marks = [{ x: answer.threshold, text: `threshold ${number(answer.threshold)}`, tone: 2 }, { x: result.score, text: `this row ${number(result.score)}`, tone: result.is_anomaly ? 5 : 1 }];
    if (!this.calibration) return nothing("This artifact carries no calibration scores to draw. The threshold is ", number(answer.threshold), ", this row's score ", number(result.score), ".");
    return histogram({ values: this.calibration.scores, marks, xLabel: `score of ${this.calibration.rows} normal rows`, label: `histogram of calibration scores; threshold ${number(answer.threshold)}, this row ${number(result.score)}` });
  }

  why(row, result) {
    const { model } = this, byName = new Map(result.features.map((f) => [f.name, f]));
    const ordered = model.features.map((f) => byName.get(f.name)), top = result.features.slice(0, LISTED), most = Math.max(1e-12, ...top.map((f) => Math.abs(f.contribution)));
    const list = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "contributions" }, h("table", { class: "reasons" }, h("thead", {}, h("tr", {}, ["feature", "seen", "expected", "contribution"].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, top.map((f) => {
        const fill = h("span", { class: "fill above" }), feature = model.features.findIndex((g) => g.name === f.name), unit = model.features[feature]?.unit;
        fill.style.width = `${(100 * Math.abs(f.contribution)) / most}%`;
        return h("tr", {}, h("th", { scope: "row" }, button(f.name, () => this.perturb(feature), { class: "linklike" })), h("td", { class: "num" }, f.value === null ? "missing" : number(f.value), unit ? ` ${unit}` : ""), h("td", { class: "num" }, number(f.expected), unit ? ` ${unit}` : ""), h("td", { class: "wide" }, h("span", { class: "bar" }, fill), h("small", {}, number(f.contribution))));
      }))));
    if (!isPicture(model) || ordered.some((f) => !f)) return list;
    const seen = tile(model, row.map((v, i) => v ?? ordered[i].expected), "the row as it was seen; click a pixel to perturb it");
    seen.addEventListener("click", (event) => {
      const box = seen.getBoundingClientRect(), [height, width] = model.shape, channels = model.shape[2] ?? 1;
      const [y, x] = [Math.floor(((event.clientY - box.top) / box.height) * height), Math.floor(((event.clientX - box.left) / box.width) * width)];
      this.perturb(Math.max(0, Math.min(model.width - 1, (y * width + x) * channels)));
    });
    return [h("div", { class: "triple" }, h("figure", {}, seen, h("figcaption", {}, "seen ", math(X))), h("figure", {}, tile(model, ordered.map((f) => f.expected), "the row as it was expected"), h("figcaption", {}, "expected ", math(hat(X)))),
      h("figure", {}, tile(model, ordered.map((f) => f.contribution), "contribution of each pixel", paintSigned), h("figcaption", {}, "contribution"))), h("details", {}, h("summary", {}, "As numbers"), list)];
  }

  sweep() {
    const { model, feature } = this, [low, high] = this.range(feature);
    const values = Array.from({ length: SWEEP }, (_, i) => low + (i * (high - low)) / (SWEEP - 1));
    this.curve.fill(() => this.sweeping.run(async (signal) => {
      const { results } = await post("/anomaly", model, { inputs: values.map((v) => this.base.map((b, i) => (i === feature ? v : b))), alpha: this.alpha, explain: 0 }, signal);
      this.swept = { feature, points: results.map((r) => [values[r.row], r.score]) };
      return this.sweepChart();
    }));
  }

  drawSweep() {
    if (this.swept?.feature === this.feature) this.curve.element.replaceChildren(this.sweepChart());
  }

  sweepChart() {
    const { model, swept } = this, f = model.features[swept.feature];
    const lines = [{ name: "score", tone: 1, points: swept.points }];
    if (Number.isFinite(this.threshold)) lines.push({ name: "threshold", tone: 2, dash: true, points: [swept.points[0], swept.points.at(-1)].map(([x]) => [x, this.threshold]) });
    return curves({ lines, marks: [{ x: this.value, text: `now ${number(this.value)}`, tone: 3, down: 1 }], height: 240, xLabel: `${f.name}${f.unit ? `, ${f.unit}` : ""}`, yLabel: "score", label: `score over values of ${f.name}` });
  }

  async file(file) {
    try {
      const all = await readFile(file, this.model);
      this.rows = all.slice(0, BATCH_MOST);
      this.left = all.length - this.rows.length;
      this.judgeBatch();
    } catch (error) {
      this.batch.element.replaceChildren(say(error));
    }
  }

  judgeBatch() {
    const { model, rows } = this;
    this.batch.fill(() => this.batching.run(async (signal) => {
      const answer = await post("/anomaly", model, { inputs: rows, alpha: this.alpha, explain: 3, ...(this.fdr.checked ? { fdr: this.alpha } : {}) }, signal);
      const found = answer.results.toSorted((a, b) => b.severity - a.severity), anomalous = found.filter((r) => r.is_anomaly).length;
      return [h("p", { role: "status" }, h("strong", {}, `${anomalous} of ${rows.length} rows are anomalous`), this.left ? ` (the first of ${rows.length + this.left} in the file; POST the rest to /anomaly)` : "", ` at α ${number(this.alpha)}${this.fdr.checked ? ", false discovery rate controlled" : `; about ${fixed(this.alpha * rows.length, 0)} would be if all were normal`}.`, answer.errors.length ? ` ${answer.errors.length} could not be judged: ${answer.errors[0].detail}.` : ""),
        h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "rows, the strangest first" }, h("table", { class: "batch" }, h("thead", {}, h("tr", {}, ["row", "", "severity", "p-value", "because of"].map((name) => (name ? h("th", { scope: "col" }, name) : h("td", {}))))),
          h("tbody", {}, found.slice(0, BATCH_LISTED).map((r) => h("tr", { class: r.is_anomaly ? "anomalous" : "" }, h("th", { scope: "row" }, button(String(r.row), () => this.inspect(r.row), { class: "linklike", "aria-label": `look at row ${r.row}` })),
            h("td", { class: "pic" }, tile(model, rows[r.row].map((v, i) => v ?? model.features[i].median), `row ${r.row}`)), h("td", { class: "num" }, `${fixed(r.severity)}${r.is_anomaly ? " anomalous" : ""}`), h("td", { class: "num" }, number(r.p_value)), h("td", {}, r.features.map((f) => f.name).join(", "))))))),
        found.length > BATCH_LISTED ? h("p", { class: "quiet" }, `The ${BATCH_LISTED} strangest of ${found.length} are listed.`) : null];
    }));
  }

  inspect(i) {
    this.take(this.rows[i], `row ${i} of the batch`);
    this.place.scrollIntoView();
  }

  destroy() {
    for (const work of [this.judging, this.sweeping, this.batching]) work.stop();
  }
}

