// The anomaly view: the score of a row, its p-value, the feature contributions, a feature to vary, and a batch of rows.

import { getExhibit, scoreRows } from "../lib/api.js";
import { number } from "../lib/format.js";
import { isImage } from "../lib/model.js";
import { state } from "../lib/state.js";
import { LatestTask } from "../lib/tasks.js";
import { histogram } from "../ui/charts.js";
import { card, slider, term } from "../ui/controls.js";
import { announce, definition, h } from "../ui/dom.js";
import { braces, equation, math, mfrac, mi, mn, mo, mrow, sub } from "../ui/mathml.js";
import { AsyncPanel, emptyMessage, errorMessage } from "../ui/messages.js";
import { RowSource } from "../ui/row-source.js";
import { BatchCard } from "./anomaly/batch-card.js";
import { contributions } from "./anomaly/contributions.js";
import { FeatureCard } from "./anomaly/feature-card.js";
import { PeersCard } from "./anomaly/peers-card.js";
import { RehearsalCard } from "./anomaly/rehearsal-card.js";

export const title = "Anomaly";
const P_VALUE =
  "Split-conformal p-value: (1 + the number of calibration rows that score at least as high) / (calibration rows + " +
  "1). The model was not trained on the calibration rows. Whatever the model, on average at most a share α of normal " +
  "rows gets a p-value of α or less, if these rows are exchangeable with the calibration rows.";
const SEVERITY =
  "The surprisal of the row's score divided by the surprisal of the threshold. For every model, it is above 1 if and " +
  "only if the row is anomalous at α.";
const FALSE_ALARMS = "The share of normal rows that may be called anomalous.";

export function render(container, { model }) {
  const view = new AnomalyView(container, model);
  view.start();
  return () => view.destroy();
}

class AnomalyView {
  constructor(container, model) {
    this.container = container;
    this.model = model;
    this.alpha = state.number("alpha", 0.05);
    this.scoring = new LatestTask();
    this.verdict = new AsyncPanel();
    this.distribution = new AsyncPanel();
    this.reasons = new AsyncPanel();
  }

  async start() {
    const { model, container } = this;
    const alpha = () => this.alpha;
    container.append(introduction(model));
    await this.loadExhibits();
    const onrow = (row) => this.feature.setRow(row);
    this.source = new RowSource({ model, heldOut: this.heldOut, onrow, onreject: () => this.clear() });
    this.feature = new FeatureCard({ model, alpha, onchange: (row) => this.score(row) });
    this.batch = new BatchCard({ model, alpha, heldOut: this.heldOut, oninspect: (row) => this.inspect(row) });
    this.rehearsal = isImage(model) ? null : new RehearsalCard({ model });
    container.append(this.rowAndVerdict(), this.feature.element, this.batch.element);
    this.peers = model.timeline?.group_column ? new PeersCard({ model }) : null;
    for (const extra of [this.peers, this.rehearsal]) if (extra) container.append(extra.element);
    this.source.start();
  }

  async loadExhibits() {
    const names = ["held-out", "calibration"];
    try {
      [this.heldOut, this.calibration] = await Promise.all(names.map((name) => getExhibit(this.model, name)));
    } catch (error) {
      this.container.append(errorMessage(error));
    }
  }

  rowAndVerdict() {
    const row = card("Row", this.source.element, this.alphaSlider(), this.verdict.element);
    const distribution = card("Calibration scores", this.distribution.element);
    const reasons = card("Feature contributions", this.reasons.element);
    return h("div", { class: "sidebar-layout" }, row, h("div", { class: "stack" }, distribution, reasons));
  }

  /** A slider for alpha on a logarithmic scale. */
  alphaSlider() {
    const toAlpha = (exponent) => Number((10 ** exponent).toPrecision(2));
    return slider(["α, ", term("false-alarm rate", FALSE_ALARMS)], {
      min: -3,
      max: -0.3,
      step: 0.05,
      value: Math.log10(this.alpha),
      format: (exponent) => `${number(Number((100 * 10 ** exponent).toPrecision(2)))} %`,
      oninput: (exponent) => {
        this.alpha = toAlpha(exponent);
        state.set({ alpha: this.alpha });
        if (this.feature.row) this.score(this.feature.row);
      },
    });
  }

  score(row) {
    this.verdict.load(() =>
      this.scoring.run(async (signal) => {
        const body = { inputs: [row], alpha: this.alpha, explain: this.model.width };
        const response = await scoreRows(this.model, body, signal);
        const [result] = response.results;
        if (!result) return emptyMessage(response.errors[0]?.detail ?? "The model cannot score this row.");
        this.showDetails(row, result, response);
        return verdict(result, response);
      }),
    );
  }

  /** Remove the results: there is no row to which they belong. */
  clear() {
    this.scoring.stop();
    this.feature.clear();
    for (const panel of [this.verdict, this.distribution, this.reasons]) panel.clear();
  }

  showDetails(row, result, { threshold }) {
    const select = (feature) => this.feature.select(feature);
    this.distribution.load(async () => this.scoreHistogram(result, threshold));
    this.reasons.load(async () => contributions(this.model, row, result, select));
    this.feature.setThreshold(threshold);
    announce(`${result.is_anomaly ? "anomalous" : "normal"}, p-value ${number(result.p_value)}`);
  }

  scoreHistogram({ score, is_anomaly: isAnomaly }, threshold) {
    if (!this.calibration) {
      return emptyMessage(
        "This artifact has no calibration scores to show. ",
        `The threshold is ${number(threshold)}, and the score of this row is ${number(score)}.`,
      );
    }
    const { scores, rows } = this.calibration;
    const text = `threshold ${number(threshold)}, this row ${number(score)}`;
    return histogram({
      values: scores,
      marks: [
        ...(threshold === null ? [] : [{ x: threshold, text: `threshold ${number(threshold)}`, series: 2 }]),
        { x: score, text: `this row ${number(score)}`, series: isAnomaly ? 5 : 1 },
      ],
      xLabel: `score of ${rows} normal rows`,
      label: `histogram of calibration scores; ${text}`,
    });
  }

  /** Show a row of the batch at the top of the view. */
  inspect(row) {
    this.feature.setRow(row);
    this.container.scrollIntoView();
  }

  destroy() {
    this.scoring.stop();
    this.feature?.stop();
    this.batch?.stop();
    this.peers?.stop();
    this.rehearsal?.stop();
  }
}

function verdict(result, { threshold, calibration }) {
  const isAtFloor = result.p_value <= calibration.floor * 1.0001;
  const pValue = `${number(result.p_value)}${isAtFloor ? ", the smallest possible" : ""}`;
  const parts = Object.entries(result.parts ?? {}).map(([name, value]) => `${name} ${number(value)}`);
  const badge = result.is_anomaly ? ["verdict bad", "Anomalous"] : ["verdict good", "Normal"];
  return [
    h("p", { class: badge[0] }, badge[1]),
    h(
      "dl",
      {},
      definition("score", number(result.score)),
      threshold === null ? null : definition("threshold", number(threshold)),
      definition("p-value", pValue),
      definition(term("severity", SEVERITY), number(result.severity)),
    ),
    threshold === null ? floorNote(calibration) : null,
    parts.length ? h("p", { class: "muted" }, `score = ${parts.join(" + ")}`) : null,
  ];
}

const floorNote = ({ rows, floor }) =>
  h(
    "p",
    { class: "muted" },
    `At this α, no row is called anomalous: with ${rows} calibration rows, the smallest possible p-value is `,
    `${number(floor)}.`,
  );

function introduction(model) {
  const atLeastAsHigh = braces(mi("i"), mo(":"), sub(mi("s"), mi("i")), mo("≥"), mi("s"));
  const numerator = mrow(mn(1), mo("+"), mo("#"), atLeastAsHigh);
  const pValue = equation(mi("p"), mfrac(numerator, mrow(mi("n"), mo("+"), mn(1))));
  return h(
    "p",
    { class: "lead" },
    `The score measures how badly a row fits ${model.name}. The `,
    term("p-value", P_VALUE),
    " says how rare such a score is among normal rows: ",
    math(pValue),
    ". Unlike a reconstruction error, a p-value means the same for every model.",
  );
}
