// The PCA view: a worked example, then the spectrum and the components of the served PCA, compared with other models.

import { describeModel } from "../lib/api.js";
import { sameShape } from "../lib/model.js";
import { card, term } from "../ui/controls.js";
import { h } from "../ui/dom.js";
import { AsyncPanel, emptyMessage } from "../ui/messages.js";
import { compareSubspaces } from "./pca/comparison.js";
import { components } from "./pca/components.js";
import { workedExample } from "./pca/example.js";
import { spectrumCharts } from "./pca/spectrum.js";

export const title = "PCA";
const SUBSPACE =
  "The flat part of the data space that the components span. The latents of the autoencoder may be rotated and " +
  "scaled against the components, but they span the same subspace (Baldi & Hornik 1989).";

export function render(container, { model, models }) {
  container.append(introduction(), workedExample());
  const pca = choosePca(model, models);
  if (!pca) {
    const command = h("code", {}, "elbo train DATA --model pca --name pca");
    container.append(emptyMessage("No PCA model is served. Train one: ", command, "."));
    return;
  }
  const described = describeModel(pca);
  container.append(
    h("h3", { class: "section" }, `The served model ${pca.name}`),
    h(
      "div",
      { class: "columns" },
      card(
        "Spectrum",
        loaded(async () => spectrumCharts(await described)),
      ),
      card(
        "Components",
        loaded(async () => components(await described)),
      ),
    ),
    card(
      "Comparison with another model",
      loaded(async () => compareSubspaces(await described, models)),
    ),
  );
}

function loaded(work) {
  const panel = new AsyncPanel();
  panel.load(work);
  return panel.element;
}

/** The chosen model if it is a PCA, otherwise a PCA of the same rows, otherwise any PCA. */
function choosePca(model, models) {
  if (model.kind === "pca") return model;
  const all = models.filter((other) => other.kind === "pca");
  return all.find((other) => sameShape(other, model)) ?? all[0];
}

const introduction = () =>
  h(
    "p",
    { class: "lead" },
    "PCA finds the directions in which the data vary most. A linear autoencoder that is trained with the squared " +
      "error converges to the same ",
    term("subspace", SUBSPACE),
    ".",
  );
