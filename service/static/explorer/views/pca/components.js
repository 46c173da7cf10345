// The principal components, as images and as loadings.

import { number, withUnit } from "../../lib/format.js";
import { range } from "../../lib/linear-algebra.js";
import { featureName, isImage } from "../../lib/model.js";
import { state } from "../../lib/state.js";
import { button } from "../../ui/controls.js";
import { bar, h } from "../../ui/dom.js";
import { paintSigned, thumbnail } from "../../ui/row-figure.js";
import { decoderDirections } from "./directions.js";

const MAX_LOADINGS = 12;

/** The components. A click on a component lists its largest loadings. */
export async function components(pca) {
  const directions = await decoderDirections(pca);
  const status = h("p", { class: "muted", role: "status" }, help(pca));
  const loadings = h("div", { class: "features" });
  const select = (k) => {
    state.set({ component: k + 1 });
    status.textContent = `Component ${k + 1}: change of each feature per unit of the score, in raw units.`;
    loadings.replaceChildren(...largestLoadings(pca, directions[k]));
  };
  const selected = state.number("component", 0);
  if (directions[selected - 1]) select(selected - 1);
  const tiles = directions.map((direction, k) => componentButton(pca, direction, k, select));
  return [status, h("div", { class: "strip components" }, tiles), loadings];
}

const help = (pca) =>
  isImage(pca)
    ? "Along a component, the orange pixels become brighter and the blue ones darker."
    : "Choose a component to see its loadings.";

function componentButton(pca, direction, k, select) {
  const picture = thumbnail(pca, direction, "", paintSigned);
  const content = [picture, h("small", {}, String(k + 1))];
  return button(content, () => select(k), { class: "tile-button", "aria-label": `component ${k + 1}` });
}

function largestLoadings(pca, direction) {
  const size = (i) => Math.abs(direction[i]);
  const order = range(direction.length).sort((a, b) => size(b) - size(a));
  const largest = size(order[0]) || 1;
  return order.slice(0, MAX_LOADINGS).map((i) => {
    const text = withUnit(number(direction[i]), pca.features[i].unit);
    return h(
      "div",
      { class: "feature" },
      h("span", { class: "name" }, featureName(pca, i)),
      bar(size(i) / largest, direction[i] < 0 ? "negative" : "positive"),
      h("span", { class: "value" }, text),
    );
  });
}
