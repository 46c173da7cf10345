// How much each feature contributes to the score of a row.

import { number, withUnit } from "../../lib/format.js";
import { clamp } from "../../lib/linear-algebra.js";
import { fillMissing, isImage } from "../../lib/model.js";
import { button } from "../../ui/controls.js";
import { bar, h, scrollable, tableHead } from "../../ui/dom.js";
import { hat, math, X } from "../../ui/mathml.js";
import { paintSigned, thumbnail } from "../../ui/row-figure.js";

const MAX_LISTED = 12;

/** A table of the largest contributions and, for an image, three images. `onselect` gets the clicked feature. */
export function contributions(model, row, result, onselect) {
  const table = contributionTable(model, result, onselect);
  const byName = new Map(result.features.map((feature) => [feature.name, feature]));
  const inModelOrder = model.features.map(({ name }) => byName.get(name));
  if (!isImage(model) || inModelOrder.some((feature) => !feature)) return table;
  const details = h("details", {}, h("summary", {}, "As numbers"), table);
  return [contributionImages(model, row, inModelOrder, onselect), details];
}

function contributionTable(model, result, onselect) {
  const listed = result.features.slice(0, MAX_LISTED);
  const largest = Math.max(1e-12, ...listed.map((feature) => Math.abs(feature.contribution)));
  const hasOnsets = listed.some(({ lag }) => lag !== undefined);
  const tableRow = ({ name, value, expected, contribution, lag, since }) => {
    // A column of text has a feature per level; the first of them stands for the column.
    const isOf = (feature) => feature.name === name || feature.name.startsWith(`${name}=`);
    const index = model.features.findIndex(isOf);
    const unit = model.features[index]?.unit;
    const share = Math.abs(contribution) / largest;
    return h(
      "tr",
      {},
      h(
        "th",
        { scope: "row" },
        button(name, () => onselect(index), { class: "link-button" }),
      ),
      h("td", { class: "num" }, withUnit(value === null ? "missing" : number(value), unit)),
      h("td", { class: "num" }, withUnit(number(expected), unit)),
      h("td", { class: "bar-cell" }, bar(share, "positive"), h("small", {}, number(contribution))),
      hasOnsets && h("td", {}, onset(lag, since)),
    );
  };
  const titles = ["feature", "actual", "expected", "contribution"];
  const head = tableHead(hasOnsets ? [...titles, "since"] : titles);
  const table = h("table", { class: "contributions" }, head, h("tbody", {}, listed.map(tableRow)));
  return scrollable("contributions", table);
}

/** Since when a feature deviates: how many rows ago, and at which time if the rows have times. */
function onset(lag, since) {
  if (lag === undefined) return "";
  const rows = lag === 0 ? "this row" : `${lag} ${lag === 1 ? "row" : "rows"} before`;
  return since === undefined ? rows : `${rows}, ${new Date(1000 * since).toISOString().replace(".000Z", "Z")}`;
}

function contributionImages(model, row, features, onselect) {
  const filled = fillMissing(row, (i) => features[i].expected);
  const actual = thumbnail(model, filled, "the actual row; click a pixel to vary it");
  actual.addEventListener("click", (event) => onselect(featureAt(model, actual, event)));
  const expectedRow = features.map((feature) => feature.expected);
  const expected = thumbnail(model, expectedRow, "the row as the model expects it");
  const signed = features.map((feature) => feature.contribution);
  const contribution = thumbnail(model, signed, "contribution of each pixel", paintSigned);
  return h(
    "div",
    { class: "image-row" },
    captioned(actual, "actual ", math(X)),
    captioned(expected, "expected ", math(hat(X))),
    captioned(contribution, "contribution"),
  );
}

const captioned = (image, ...caption) => h("figure", {}, image, h("figcaption", {}, ...caption));

/** The feature of the pixel under the pointer. In a colour image, it is the pixel's first channel. */
function featureAt(model, image, event) {
  const box = image.getBoundingClientRect();
  const [height, width, channels = 1] = model.shape;
  const line = Math.floor(((event.clientY - box.top) / box.height) * height);
  const column = Math.floor(((event.clientX - box.left) / box.width) * width);
  return clamp((line * width + column) * channels, 0, model.width - 1);
}
