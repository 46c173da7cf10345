// The reconstruction errors of all models of the same rows.

import { postJson, toInputs } from "../../lib/api.js";
import { isAbort } from "../../lib/errors.js";
import { number } from "../../lib/format.js";
import { fillMissing } from "../../lib/model.js";
import { bar, h, tableHead } from "../../ui/dom.js";
import { errorMessage } from "../../ui/messages.js";
import { thumbnail } from "../../ui/row-figure.js";

/** The reconstruction {row} of `input` by each model, or the {error} of its request. */
export function reconstructWithAll(models, input, signal) {
  const reconstruct = async (model) => {
    try {
      const { outputs } = await postJson("/reconstruct", model, { inputs: toInputs(model, [input]) }, signal);
      return { row: outputs[0] };
    } catch (error) {
      if (isAbort(error)) throw error;
      return { error };
    }
  };
  return Promise.all(models.map(reconstruct));
}

/** A table of errors against the `clean` row: the error of the corrupted `input`, then the errors of `outputs`. */
export function errorTable({ model, models, clean, input, outputs }) {
  const errorOf = meanSquaredError(clean);
  const inputError = errorOf(fillMissing(input, (i) => clean[i]));
  const errors = outputs.map((output) => (output.error ? 0 : errorOf(output.row)));
  const largest = Math.max(inputError, ...errors, 1e-12);
  const picture = fillMissing(input, (i) => model.features[i].median);
  const rows = outputs.map(({ row, error }, i) => {
    if (error) return failedRow(models[i].name, error);
    return errorRow(model, models[i].name, row, errors[i], largest);
  });
  const body = h("tbody", {}, errorRow(model, "corrupted", picture, inputError, largest), rows);
  return h("table", { class: "errors" }, tableHead(["model", "output", "error", ""]), body);
}

/** A function that returns the mean squared error of a row against `clean`, over the values present in `clean`. */
function meanSquaredError(clean) {
  const present = Array.from(clean.keys()).filter((i) => clean[i] !== null);
  return (row) => present.reduce((sum, i) => sum + (clean[i] - row[i]) ** 2, 0) / present.length;
}

const errorRow = (model, name, row, error, largest) =>
  h(
    "tr",
    {},
    h("th", { scope: "row" }, name),
    h("td", { class: "thumbnail-cell" }, thumbnail(model, row, name)),
    h("td", { class: "num" }, number(error)),
    h("td", { class: "bar-cell" }, bar(error / largest)),
  );

const failedRow = (name, error) =>
  h("tr", {}, h("th", { scope: "row" }, name), h("td", { colspan: 3 }, errorMessage(error)));
