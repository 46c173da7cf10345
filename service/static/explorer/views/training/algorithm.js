// The training algorithm of a VAE in eleven steps.

import { button, card } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import {
  DECODER,
  ENCODER,
  equation,
  hat,
  indexedSet,
  LOG,
  MU,
  math,
  mfrac,
  mi,
  mn,
  mo,
  mrow,
  mtext,
  NOISE,
  PHI,
  parens,
  REPARAMETERIZATION,
  SIGMA,
  sub,
  sup,
  THETA,
  X,
} from "../../ui/mathml.js";
import { CURVES_OF_STEP } from "./loss-curves.js";

const loss = (name) => sub(mi("ℒ"), mtext(name));
const squared = (name) => sup(mi(name), mn(2));
const KL_TERMS = parens(mn(1), mo("+"), LOG, squared("σ"), mo("−"), squared("μ"), mo("−"), squared("σ"));

/** The steps, each as [indentation, ...content]. */
const steps = () => [
  [0, "Initialize encoder ", math(ENCODER), " and decoder ", math(DECODER)],
  [0, "for ", math(equation(mi("e"), mn(1), mo("…"), mi("E"))), ":"],
  [1, "Shuffle training data"],
  [1, "for each minibatch ", math(indexedSet("j", "m")), ":"],
  [2, "Encode: ", math(mrow(MU, mo(","), equation(sup(SIGMA, mn(2)), ENCODER)))],
  [2, "Sample: ", math(REPARAMETERIZATION), ", ", math(NOISE)],
  [2, "Decode: ", math(equation(hat(X), DECODER))],
  [2, "Reconstruction: ", math(equation(loss("rec"), mo("−"), LOG, DECODER))],
  [2, "KL: ", math(equation(loss("KL"), mo("−"), mfrac(mn(1), mn(2)), mo("∑"), KL_TERMS))],
  [2, "Total loss: ", math(equation(mi("ℒ"), loss("rec"), mo("+"), mi("β"), loss("KL")))],
  [2, "Update ", math(mrow(PHI, mo(","), THETA)), " via backpropagation"],
];

/** The list of steps. A click on "Show curve" calls `onselect` with the number of the step, as text. */
export function algorithmCard(model, onselect) {
  const hasCurve = (step) => CURVES_OF_STEP[step]?.some((name) => model.history?.some((epoch) => name in epoch));
  const items = steps().map(([indentation, ...content], i) => {
    const step = i + 1;
    const attributes = { class: "small", "aria-label": `show the curve of step ${step}` };
    const show = hasCurve(step) ? button("Show curve", () => onselect(String(step)), attributes) : null;
    return h("li", { class: `indent-${indentation}` }, h("span", {}, content), show);
  });
  const list = h("ol", { class: "algorithm" }, items);
  return card("Training a VAE in eleven steps", inputs(model), list, reparameterizationNote());
}

function inputs({ data, training, latents }) {
  const sizes = `${data.fit} training rows, batch size ${training.batch_size ?? "all"}, ${latents} latents.`;
  return h("p", { class: "muted" }, "Input: data ", math(indexedSet("i", "n")), `. This model: ${sizes}`);
}

const reparameterizationNote = () =>
  h(
    "p",
    { class: "callout" },
    h("strong", {}, "The reparameterization trick. "),
    "Written as ",
    math(REPARAMETERIZATION),
    ", the sample is a differentiable function of μ and σ, so the gradient of step 11 reaches the encoder.",
  );
