// The card that scores many rows and lists the most anomalous first.

import { scoreRows } from "../../lib/api.js";
import { fixed, number } from "../../lib/format.js";
import { fillMissing } from "../../lib/model.js";
import { readRowFile } from "../../lib/parse-rows.js";
import { state } from "../../lib/state.js";
import { LatestTask } from "../../lib/tasks.js";
import { button, card, field, rowFileInput, term } from "../../ui/controls.js";
import { h, scrollable, tableHead } from "../../ui/dom.js";
import { AsyncPanel, errorMessage } from "../../ui/messages.js";
import { thumbnail } from "../../ui/row-figure.js";

const MAX_ROWS = 5000;
const MAX_LISTED = 50;
const FEATURES_PER_ROW = 3;
const FALSE_DISCOVERY_RATE =
  "Benjamini-Hochberg procedure: on average, at most a share α of the rows that are called anomalous is normal. " +
  "Without this procedure, a share α of all normal rows is called anomalous.";

export class BatchCard {
  /** `alpha()` returns the current alpha; `oninspect(row)` gets the row that the user clicks. */
  constructor({ model, alpha, heldOut, oninspect }) {
    this.model = model;
    this.alpha = alpha;
    this.heldOut = heldOut;
    this.oninspect = oninspect;
    this.rows = null;
    this.omitted = 0; // number of rows in the file beyond MAX_ROWS; they are not scored
    this.task = new LatestTask();
    this.results = new AsyncPanel();
    this.element = card("Score a batch", this.controls(), this.results.element);
  }

  controls() {
    const input = rowFileInput("file of rows to score", (file) => this.scoreFile(file));
    const heldOut = this.heldOut ? button("Use the held-out rows", () => this.score(this.heldOut.inputs, 0)) : null;
    return h("div", { class: "controls" }, field("File (CSV, JSON or npy)", input), heldOut, this.fdrCheckbox());
  }

  fdrCheckbox() {
    this.fdr = h("input", {
      type: "checkbox",
      id: "fdr",
      "aria-label": "control the false discovery rate",
      checked: state.get("fdr") === "1",
      onchange: () => {
        state.set({ fdr: this.fdr.checked ? "1" : null });
        if (this.rows) this.score(this.rows, this.omitted);
      },
    });
    const label = h("label", { for: "fdr" }, "Control the ");
    return h(
      "span",
      { class: "check" },
      this.fdr,
      h("span", {}, label, term("false discovery rate", FALSE_DISCOVERY_RATE)),
    );
  }

  async scoreFile(file) {
    try {
      const rows = await readRowFile(file, this.model);
      this.score(rows.slice(0, MAX_ROWS), Math.max(0, rows.length - MAX_ROWS));
    } catch (error) {
      this.results.show(errorMessage(error));
    }
  }

  score(rows, omitted) {
    this.rows = rows;
    this.omitted = omitted;
    const alpha = this.alpha();
    const fdr = this.fdr.checked ? { fdr: alpha } : {};
    const body = { inputs: rows, alpha, explain: FEATURES_PER_ROW, ...fdr };
    this.results.load(() =>
      this.task.run(async (signal) => {
        const { results, errors } = await scoreRows(this.model, body, signal);
        const bySeverity = results.toSorted((a, b) => b.severity - a.severity);
        return [this.summary(bySeverity, errors, alpha), this.table(bySeverity), cutNote(bySeverity.length)];
      }),
    );
  }

  summary(results, errors, alpha) {
    const { rows, omitted } = this;
    const anomalous = results.filter((result) => result.is_anomaly).length;
    const expected = this.fdr.checked
      ? ", with the false discovery rate controlled."
      : `. If all rows were normal, about ${fixed(alpha * rows.length, 0)} would be called anomalous.`;
    const total = rows.length + omitted;
    const cut = omitted ? ` (the first of ${total} in the file; POST the rest to /anomaly)` : "";
    const failed = errors.length ? ` ${errors.length} rows could not be scored: ${errors[0].detail}.` : "";
    const count = h("strong", {}, `${anomalous} of ${rows.length} rows are anomalous`);
    return h("p", { role: "status" }, count, `${cut} at α ${number(alpha)}${expected}${failed}`);
  }

  table(results) {
    const head = tableHead(["row", "", "severity", "p-value", "top features"]);
    const body = results.slice(0, MAX_LISTED).map((result) => this.tableRow(result));
    const table = h("table", { class: "batch" }, head, h("tbody", {}, body));
    return scrollable("rows, the most anomalous first", table);
  }

  tableRow({ row, severity, features, p_value: pValue, is_anomaly: isAnomaly }) {
    const picture = fillMissing(this.rows[row], (i) => this.model.features[i].median);
    const attributes = { class: "link-button", "aria-label": `inspect row ${row}` };
    return h(
      "tr",
      { class: isAnomaly ? "anomalous" : "" },
      h(
        "th",
        { scope: "row" },
        button(String(row), () => this.oninspect(this.rows[row]), attributes),
      ),
      h("td", { class: "thumbnail-cell" }, thumbnail(this.model, picture, `row ${row}`)),
      h("td", { class: "num" }, `${fixed(severity)}${isAnomaly ? " anomalous" : ""}`),
      h("td", { class: "num" }, number(pValue)),
      h("td", {}, features.map((feature) => feature.name).join(", ")),
    );
  }

  stop() {
    this.task.stop();
  }
}

function cutNote(count) {
  if (count <= MAX_LISTED) return null;
  return h("p", { class: "muted" }, `The ${MAX_LISTED} most anomalous of ${count} rows are listed.`);
}
