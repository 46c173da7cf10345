// The start view: the served models with samples, and what each kind of model is for.

import { describeModel, sampleImages, sampleRows } from "../lib/api.js";
import { number } from "../lib/format.js";
import { featureName, hasLatents, isImage, kindName } from "../lib/model.js";
import { button } from "../ui/controls.js";
import { definition, h, scrollable } from "../ui/dom.js";
import { AsyncPanel } from "../ui/messages.js";
import { thumbnail } from "../ui/row-figure.js";

export const title = "Models";
const SAMPLES = 12;
const SAMPLED_ROWS = 3;
const SAMPLED_FEATURES = 6;
const MAX_METRICS = 5;
const USE_CASES = [
  ["Reduce dimensions", "The encoder turns a row into a few latents. Explore the space of the latents.", "latent"],
  ["Compress", "Store the few latents instead of the row, and decode them when the row is needed.", "reconstruct"],
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
  ["Follow the training", "The algorithm step by step, the loss curves, and the active latents.", "training"],
];
const TAKEAWAYS = [
  ["Autoencoders", "Learn compressed representations through an encoder and a decoder."],
  ["PCA", "A linear autoencoder learns the subspace of PCA; nonlinear ones learn richer features."],
  ["VAEs", "A probabilistic latent space makes it possible to generate rows by sampling."],
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
    h("h3", {}, "Key takeaways"),
    h(
      "ul",
      { class: "use-cases" },
      TAKEAWAYS.map(([name, text]) => h("li", {}, h("strong", {}, name), h("p", {}, text))),
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
  const command = hasLatents(model)
    ? `curl -X POST '${location.origin}/sample?model=${model.name}&n=2'`
    : `curl '${location.origin}/models/${model.name}'`;
  const samples = hasLatents(model) ? new Samples(model) : null;
  const explore = () => navigate({ view: hasLatents(model) ? "latent" : "anomaly", model: model.name });
  return h(
    "article",
    { class: "card model" },
    h("h3", {}, model.name, " ", h("small", {}, `version ${model.version}${isDefault ? ", default model" : ""}`)),
    h("p", { class: "muted" }, kindName(model)),
    model.warnings.map((warning) => h("p", { class: "warning" }, warning)),
    samples?.element ?? h("p", { class: "muted" }, "It only reconstructs and scores rows."),
    h("dl", {}, facts(model)),
    h("pre", { tabindex: "0" }, h("code", {}, command)),
    h(
      "div",
      { class: "controls" },
      button("Explore", explore, { class: "primary", "aria-label": `explore ${model.name}` }),
      copyButton(command, model.name),
      samples?.button ?? null,
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

/** Samples of a model, with a button that draws new ones. */
class Samples {
  constructor(model) {
    const draw = isImage(model) ? samplePictures : sampleTable;
    const panel = new AsyncPanel("samples");
    const load = () => panel.load(() => draw(model));
    this.element = panel.element;
    this.button = button("Sample again", load, { "aria-label": `sample again from ${model.name}` });
    load();
  }
}

async function samplePictures(model) {
  const { images, seed } = await sampleImages(model, SAMPLES);
  const label = `${SAMPLES} samples from ${model.name}`;
  const tiles = images.map((row) => thumbnail(model, row, ""));
  const grid = h("div", { class: "strip pictures", role: "img", "aria-label": label }, tiles);
  return h("figure", {}, grid, h("figcaption", {}, `${SAMPLES} samples, seed ${seed}`));
}

/** A table of sampled rows: one line for each of the first features, one column for each sample. */
async function sampleTable(model) {
  const [{ outputs, seed }, described] = await Promise.all([sampleRows(model, SAMPLED_ROWS), describeModel(model)]);
  const lines = outputs[0].slice(0, SAMPLED_FEATURES).map((_, i) => {
    const cells = outputs.map((row) => h("td", { class: "num" }, number(row[i])));
    return h("tr", {}, h("th", { scope: "row" }, featureName(described, i)), cells);
  });
  const omitted = model.width - lines.length;
  const note = omitted > 0 ? `, the first ${lines.length} of ${model.width} features` : "";
  const caption = h("figcaption", {}, `${SAMPLED_ROWS} samples, seed ${seed}${note}`);
  const table = h("table", { class: "sampled" }, h("tbody", {}, lines));
  return h("figure", {}, scrollable(`${SAMPLED_ROWS} samples from ${model.name}`, table), caption);
}
