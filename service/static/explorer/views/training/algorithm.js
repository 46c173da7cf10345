// The training algorithm of a model, step by step.

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
  Z,
} from "../../ui/mathml.js";
import { curvesOfStep } from "./loss-curves.js";

const loss = (name) => sub(mi("ℒ"), mtext(name));
const squared = (name) => sup(mi(name), mn(2));
const CENTRED = sub(mi("𝐗"), mi("c"));
const ENCODE = equation(Z, mrow(mi("f"), parens(X)));
const DECODE = equation(hat(X), mrow(mi("g"), parens(Z)));
const KL_TERMS = parens(mn(1), mo("+"), LOG, squared("σ"), mo("−"), squared("μ"), mo("−"), squared("σ"));

const NUMBER_WORDS = { 5: "five", 8: "eight", 11: "eleven" };

/** The steps of a VAE, each as [indentation, ...content]. */
const vaeSteps = () => [
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

/** The steps of an autoencoder. */
const autoencoderSteps = () => [
  [0, "Initialize encoder ", math(ENCODE), " and decoder ", math(DECODE)],
  [0, "for ", math(equation(mi("e"), mn(1), mo("…"), mi("E"))), ":"],
  [1, "Shuffle training data"],
  [1, "for each minibatch ", math(indexedSet("j", "m")), ":"],
  [2, "Encode: ", math(ENCODE)],
  [2, "Decode: ", math(DECODE)],
  [2, "Squared error: ", math(equation(mi("ℒ"), sup(mrow(mo("‖"), X, mo("−"), hat(X), mo("‖")), mn(2))))],
  [2, "Update the weights of ", math(mi("f")), " and ", math(mi("g")), " via backpropagation"],
];

/** The steps of PCA. */
const pcaSteps = () => [
  [0, "Scale each feature and subtract its mean: ", math(CENTRED)],
  [
    0,
    "Compute the covariance matrix ",
    math(equation(mi("𝚺"), mfrac(mn(1), mi("n")), mrow(sup(CENTRED, mi("⊤")), CENTRED))),
  ],
  [0, "Compute its eigenvectors ", math(sub(mi("𝐯"), mi("k"))), " and eigenvalues ", math(sub(mi("λ"), mi("k")))],
  [0, "Keep the eigenvectors with the largest eigenvalues, one for each latent"],
  [0, "Encode by projecting on them: ", math(equation(Z, mrow(sup(mi("𝐕"), mi("⊤")), X)))],
];

const STEPS = { vae: vaeSteps, pca: pcaSteps };

/** The list of steps. A click on "Show curve" calls `onselect` with the number of the step, as text. */
export function algorithmCard(model, onselect) {
  const hasCurve = (step) => curvesOfStep(model, step).some((name) => model.history?.some((epoch) => name in epoch));
  const steps = (STEPS[model.kind] ?? autoencoderSteps)();
  const items = steps.map(([indentation, ...content], i) => {
    const step = i + 1;
    const attributes = { class: "small", "aria-label": `show the curve of step ${step}` };
    const show = hasCurve(step) ? button("Show curve", () => onselect(String(step)), attributes) : null;
    return h("li", { class: `indent-${indentation}` }, h("span", {}, content), show);
  });
  const list = h("ol", { class: "algorithm" }, items);
  const note = model.kind === "vae" ? reparameterizationNote() : null;
  return card(`${TASKS[model.kind] ?? TASKS.ae} in ${NUMBER_WORDS[steps.length]} steps`, inputs(model), list, note);
}

const TASKS = { vae: "Training a VAE", pca: "Computing PCA", ae: "Training an autoencoder" };

function inputs({ kind, data, training, latents }) {
  const batches = kind === "pca" ? "" : `, batch size ${training.batch_size ?? "all"}`;
  const sizes = `${data.fit} training rows${batches}, ${latents} latents.`;
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
