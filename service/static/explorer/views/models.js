// What is served, with living pictures of what it makes, and what each kind of model is for.

import { ask } from "../api.js";
import { button, h, number } from "../dom.js";
import { isPicture } from "../rows.js";
import { Place } from "../say.js";

export const title = "Models";
export const KINDS = { pca: "principal component analysis", ae: "autoencoder", vae: "variational autoencoder", ensemble: "ensemble" };
const SAMPLES = 12;
const USES = [
  ["Compress and explore", "A row becomes a code of a few numbers. Walk through the space of codes.", "latent"],
  ["Denoise", "Through the narrow code and back, noise is left behind.", "reconstruct"],
  ["Learn features", "Each component, each latent, is a feature that the data chose.", "pca"],
  ["Generate", "New rows are drawn from the prior, decoded.", "latent"],
  ["Find anomalies", "What cannot be explained scores high, and a p-value says how rare that is.", "anomaly"],
  ["See how it learns", "Eleven steps, three curves, and latents that live or die.", "training"],
];

export function render(place, { models, failures, chosen, go }) {
  place.append(
    h("p", { class: "lead" }, "An autoencoder squeezes data through a narrow code and learns what matters on the way. These are the models that are served here. Take one and look inside."),
    h("div", { class: "cards" }, models.map((model) => modelCard(model, model.name === chosen, go))),
    failures.map((f) => h("p", { class: "problem" }, `${f.name}@${f.version} is not served: ${f.detail}`)),
    h("h3", {}, "What they are for"),
    h("ul", { class: "uses" }, USES.map(([name, text, view]) => h("li", {}, h("a", { href: `?view=${view}`, onclick: (event) => { event.preventDefault(); go({ view }); } }, name), h("p", {}, text)))),
  );
}

function modelCard(model, isDefault, go) {
  const pictures = new Place("samples"), line = `curl -X POST '${location.origin}/sample?model=${model.name}&n=2'`;
  const draw = () => pictures.fill(() => sample(model));
  if (isPicture(model) && model.pictures) draw();
  const copy = button("Copy", () => navigator.clipboard.writeText(line).then(() => (copy.textContent = "Copied")), { "aria-label": `copy the request to ${model.name}` });
  const facts = [["a row", model.shape.join(" × ")], ["latents", model.latents], ["calibration rows", model.calibration.rows],
    ...Object.entries(model.metrics).slice(0, 5).map(([name, value]) => [name.replaceAll("_", " "), number(value)])];
  return h("article", { class: "card model" },
    h("h3", {}, model.name, " ", h("small", {}, `version ${model.version}${isDefault ? ", answers by default" : ""}`)),
    h("p", { class: "quiet" }, KINDS[model.kind] ?? model.kind),
    isPicture(model) && model.pictures ? pictures.element : null,
    h("dl", {}, facts.map(([name, value]) => [h("dt", {}, name), h("dd", {}, String(value))])),
    h("pre", { tabindex: "0" }, h("code", {}, line)),
    h("div", { class: "line" },
      button("Look inside", () => go({ view: "latent", model: model.name }), { class: "primary", "aria-label": `look inside ${model.name}` }), copy,
      isPicture(model) && model.pictures ? button("Sample again", draw, { "aria-label": `sample again from ${model.name}` }) : null));
}

async function sample(model) {
  const response = await ask(`/sample?model=${model.name}@${model.version}&n=${SAMPLES}&seed=${Math.floor(Math.random() * 10000)}`, { method: "POST", headers: { Accept: "image/png" } });
  const image = h("img", { alt: `${SAMPLES} samples from ${model.name}` });
  image.src = URL.createObjectURL(await response.blob());
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  return h("figure", {}, image, h("figcaption", {}, `${SAMPLES} samples, seed ${response.headers.get("elbo-seed")}`));
}
