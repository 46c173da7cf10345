// The start view: the served models with samples, and what each kind of model is for.

import { samplePng } from "../lib/api.js";
import { number } from "../lib/format.js";
import { isImage, kindName } from "../lib/model.js";
import { button } from "../ui/controls.js";
import { definition, h } from "../ui/dom.js";
import { AsyncPanel } from "../ui/messages.js";

export const title = "Models";
const SAMPLES = 12;
const MAX_METRICS = 5;
const USE_CASES = [
  ["Compress and explore", "The encoder turns a row into a few latents. Explore the space of the latents.", "latent"],
  [
    "Denoise",
    "The few latents cannot hold the noise, so the reconstruction has less noise than the input.",
    "reconstruct",
  ],
  ["Learn features", "Each component or latent is a feature that is learned from the data.", "pca"],
  ["Generate", "Decode samples from the prior to get new rows.", "latent"],
  [
    "Detect anomalies",
    "A row that does not fit the model has a high score; its p-value says how rare such a score is.",
    "anomaly",
  ],
  ["Follow the training", "The algorithm in eleven steps, the loss curves, and the active latents.", "training"],
];

export function render(container, { models, failures, defaultModel, navigate }) {
  container.append(
    h(
      "p",
      { class: "lead" },
      "An autoencoder compresses each row into a few latents, and so learns the structure of the data. Below are the " +
        "models that this server serves. Choose one to explore it.",
    ),
    h(
      "div",
      { class: "cards" },
      models.map((model) => modelCard(model, model.name === defaultModel, navigate)),
    ),
    ...failures.map(failureMessage),
    h("h3", {}, "What the models are for"),
    h(
      "ul",
      { class: "use-cases" },
      USE_CASES.map((useCase) => useCaseItem(useCase, navigate)),
    ),
  );
}

const failureMessage = ({ name, version, detail }) =>
  h("p", { class: "error" }, version === null ? detail : `${name}@${version} is not served: ${detail}`);

function useCaseItem([name, text, view], navigate) {
  const onclick = (event) => {
    event.preventDefault();
    navigate({ view });
  };
  return h("li", {}, h("a", { href: `?view=${view}`, onclick }, name), h("p", {}, text));
}

function modelCard(model, isDefault, navigate) {
  const command = `curl -X POST '${location.origin}/sample?model=${model.name}&n=2'`;
  const samples = isImage(model) && model.pictures ? new SamplePicture(model) : null;
  const explore = () => navigate({ view: "latent", model: model.name });
  return h(
    "article",
    { class: "card model" },
    h("h3", {}, model.name, " ", h("small", {}, `version ${model.version}${isDefault ? ", default model" : ""}`)),
    h("p", { class: "muted" }, kindName(model)),
    samples?.element,
    h("dl", {}, facts(model)),
    h("pre", { tabindex: "0" }, h("code", {}, command)),
    h(
      "div",
      { class: "controls" },
      button("Explore", explore, { class: "primary", "aria-label": `explore ${model.name}` }),
      copyButton(command, model.name),
      samples?.button,
    ),
  );
}

function facts(model) {
  const metrics = Object.entries(model.metrics).slice(0, MAX_METRICS);
  return [
    ...definition("row shape", model.shape.join(" × ")),
    ...definition("latents", String(model.latents)),
    ...definition("calibration rows", String(model.calibration.rows)),
    ...metrics.flatMap(([name, value]) => definition(name.replaceAll("_", " "), number(value))),
  ];
}

function copyButton(command, name) {
  const copy = async () => {
    await navigator.clipboard.writeText(command);
    element.textContent = "Copied";
  };
  const element = button("Copy", copy, { "aria-label": `copy the command for ${name}` });
  return element;
}

/** An image of samples, with a button that draws new samples. */
class SamplePicture {
  constructor(model) {
    this.model = model;
    this.panel = new AsyncPanel("samples");
    this.element = this.panel.element;
    this.button = button("Sample again", () => this.draw(), { "aria-label": `sample again from ${model.name}` });
    this.draw();
  }

  draw() {
    this.panel.load(async () => {
      const { image, seed } = await samplePng(this.model, SAMPLES);
      return sampleFigure(this.model, image, seed);
    });
  }
}

function sampleFigure(model, blob, seed) {
  const image = h("img", { alt: `${SAMPLES} samples from ${model.name}` });
  image.src = URL.createObjectURL(blob);
  image.addEventListener("load", () => URL.revokeObjectURL(image.src));
  return h("figure", {}, image, h("figcaption", {}, `${SAMPLES} samples, seed ${seed}`));
}
