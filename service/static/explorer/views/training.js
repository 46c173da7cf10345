// The training view: the algorithm, the loss curves, the activity of the latents, and the model card.

import { getExhibit } from "../lib/api.js";
import { card, term } from "../ui/controls.js";
import { h } from "../ui/dom.js";
import { renderMarkdown } from "../ui/markdown.js";
import { DECODER, ENCODER, LOG, math, mi, mo, mrow, mtext, parens, sub, X, Z } from "../ui/mathml.js";
import { AsyncPanel, emptyMessage } from "../ui/messages.js";
import { activityCard } from "./training/activity.js";
import { algorithmCard } from "./training/algorithm.js";
import { LossCurves } from "./training/loss-curves.js";

export const title = "Training";
const ELBO =
  "The evidence lower bound is E[log p(x|z)] minus the KL divergence of q(z|x) from the prior. It is a lower bound " +
  "on log p(x), and training maximises it.";

export function render(container, { model }) {
  if (model.kind === "adopted") {
    container.append(h("p", { class: "lead" }, ADOPTED_INTRODUCTION), modelCard(model));
    return;
  }
  container.append(introduction(model), algorithmAndCurves(model), activityCard(model), modelCard(model));
}

/** The algorithm beside the loss curves. PCA is computed in one step, without a loss curve. */
function algorithmAndCurves(model) {
  if (model.kind === "pca") return algorithmCard(model);
  const curves = new LossCurves(model);
  const algorithm = algorithmCard(model, (step) => curves.select(step));
  return h("div", { class: "columns" }, algorithm, curves.element);
}

function modelCard(model) {
  const panel = new AsyncPanel("markdown");
  panel.load(async () => {
    const text = await getExhibit(model, "card");
    if (text === null)
      return emptyMessage(
        "This artifact has no model card. The training run wrote a model card to its folder under runs/.",
      );
    const [, ...withoutTitle] = renderMarkdown(text);
    return withoutTitle;
  });
  return card("Model card", panel.element);
}

const PCA_INTRODUCTION =
  "PCA is computed in one step: the eigenvectors of the covariance matrix span the subspace with the least squared " +
  "error of the reconstruction.";
const ADOPTED_INTRODUCTION =
  "This network was trained elsewhere, so how it was trained is not known. Elbo has fitted its anomaly score, its " +
  "calibration and its prior.";
const AUTOENCODER_INTRODUCTION =
  "An autoencoder learns by gradient descent: it minimises the squared error between rows and their reconstructions.";
const ENSEMBLE_INTRODUCTION =
  "An ensemble adds the anomaly scores of an autoencoder and of a nearest-neighbour detector. The autoencoder learns " +
  "by gradient descent; the detector keeps a sample of the training rows.";

function introduction({ kind }) {
  if (kind === "vae") return elboIntroduction();
  const texts = { pca: PCA_INTRODUCTION, ensemble: ENSEMBLE_INTRODUCTION };
  return h("p", { class: "lead" }, texts[kind] ?? AUTOENCODER_INTRODUCTION);
}

function elboIntroduction() {
  const evidence = mrow(LOG, mi("p"), parens(X));
  const expectation = mrow(sub(mi("𝔼"), mi("q")), mo("["), LOG, DECODER, mo("]"));
  const prior = mrow(mi("p"), parens(Z));
  const divergence = mrow(sub(mi("D"), mtext("KL")), parens(ENCODER, mo("‖"), prior));
  return h(
    "p",
    { class: "lead" },
    "A VAE maximises the ",
    term("ELBO", ELBO),
    ", the evidence lower bound, which gave this project its name: ",
    math(mrow(evidence, mo("≥"), expectation, mo("−"), divergence), true),
  );
}
