// The reconstruction view: the path of a row through the encoder, the latents and the decoder.

import { decode, getExhibit, postJson, toInputs } from "../lib/api.js";
import { percent } from "../lib/format.js";
import { sameShape } from "../lib/model.js";
import { state } from "../lib/state.js";
import { LatestTask } from "../lib/tasks.js";
import { button, card, slider, term, toggle } from "../ui/controls.js";
import { h } from "../ui/dom.js";
import {
  DECODER,
  ENCODER,
  equation,
  hat,
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
  parens,
  REPARAMETERIZATION,
  SIGMA,
  sub,
  sumOver,
  sup,
  X,
  Z,
} from "../ui/mathml.js";
import { AsyncPanel, errorMessage } from "../ui/messages.js";
import { rowFigure } from "../ui/row-figure.js";
import { RowSource } from "../ui/row-source.js";
import { corrupt } from "./reconstruct/corruption.js";
import { codeChart, describeLayers, networkDiagrams } from "./reconstruct/diagrams.js";
import { errorTable, reconstructWithAll } from "./reconstruct/errors.js";

export const title = "Reconstruct";
const NOISE_HELP =
  "The standard deviation of the normal noise added to every value, as a share of the value's range. A denoising " +
  "model removes it.";
const OCCLUSION_HELP =
  "Hides part of the row: a square of an image, or some features of a table row. Hidden features are replaced by " +
  "their medians.";

export function render(container, { model, models }) {
  const view = new ReconstructView(container, model, models);
  view.start();
  return () => view.destroy();
}

class ReconstructView {
  constructor(container, model, models) {
    this.container = container;
    this.model = model;
    this.models = models.filter((other) => sameShape(other, model));
    this.noise = state.number("noise", 0);
    this.hide = state.number("hide", 0);
    this.seed = state.number("seed", 1);
    this.isSampling = state.get("draw") === "1";
    this.flowTask = new LatestTask();
    this.errorTask = new LatestTask();
    this.flow = new AsyncPanel("", { "aria-live": "off" });
    this.errors = new AsyncPanel();
  }

  async start() {
    const { model, container } = this;
    container.append(introduction(model));
    let heldOut = null;
    try {
      heldOut = await getExhibit(model, "held-out");
    } catch (error) {
      container.append(errorMessage(error));
    }
    const onrow = (row, name) => this.setRow(row, name);
    this.source = new RowSource({ model, heldOut, onrow, onreject: () => this.clear() });
    const source = card("Row", this.source.element, this.corruptionControls());
    const errors = card("Reconstruction errors", errorHelp(), this.errors.element);
    const layout = h("div", { class: "sidebar-layout" }, source, errors);
    container.append(card(`A row through ${model.name}`, this.flow.element), layout);
    this.source.start();
  }

  setRow(row, name) {
    this.row = row;
    this.rowName = name;
    this.update();
  }

  /** Remove the results: there is no row to which they belong. */
  clear() {
    this.row = null;
    this.flowTask.stop();
    this.errorTask.stop();
    for (const panel of [this.flow, this.errors]) panel.clear();
  }

  corruptionControls() {
    const setter = (name) => (value) => {
      this[name] = value;
      state.set({ [name]: value || null });
      this.update();
    };
    const noise = { min: 0, max: 1, step: 0.02, value: this.noise, format: percent, oninput: setter("noise") };
    const hide = { min: 0, max: 0.9, step: 0.05, value: this.hide, format: percent, oninput: setter("hide") };
    return h(
      "div",
      { class: "corruption" },
      slider(term("Noise", NOISE_HELP), noise),
      slider(term("Occlusion", OCCLUSION_HELP), hide),
      button("New noise", () => this.nextSeed()),
    );
  }

  nextSeed() {
    this.seed += 1;
    state.set({ seed: this.seed });
    this.update();
  }

  setSampling(isOn) {
    this.isSampling = isOn;
    state.set({ draw: isOn ? "1" : null });
    this.update();
  }

  update() {
    const { model, models, row, noise, hide, seed } = this;
    if (!row) return;
    const input = corrupt(model, row, { noise, hide, seed });
    this.flow.load(() => this.flowTask.run((signal) => this.encodeAndDecode(input, signal)));
    this.errors.load(() =>
      this.errorTask.run(async (signal) => {
        const outputs = await reconstructWithAll(models, input, signal);
        return errorTable({ model, models, clean: row, input, outputs });
      }),
    );
  }

  async encodeAndDecode(input, signal) {
    const { model, seed } = this;
    const inputs = toInputs(model, [input]);
    const code = await postJson("/encode", model, { inputs }, signal);
    const sampled = this.isSampling ? await postJson("/encode", model, { inputs, sample: true, seed }, signal) : code;
    const [output] = await decode(model, sampled.latents, signal);
    return this.stages({ input, mean: code.latents[0], std: code.std[0], z: sampled.latents[0], output });
  }

  /** The stages from input to output. A deterministic model has no sampling stage. */
  stages({ input, mean, std, z, output }) {
    const { model } = this;
    const isRandom = std.some((v) => v > 0);
    const [encoder, decoder] = networkDiagrams(model);
    const isVae = model.kind === "vae";
    const size = sizeText(model);
    const inputSpace = math(mrow(X, mo("∈"), sup(mi("ℝ"), mn(model.width))));
    return h(
      "ol",
      { class: "flow" },
      stage(["Input ", inputSpace], rowFigure(model, input, `the input, ${this.rowName}`), size),
      stage(["Encoder ", isVae ? math(ENCODER) : null], encoder, describeLayers(model)),
      isRandom ? gaussianCodeStage(model, mean, std) : codeStage(model, mean),
      isRandom ? this.samplingStage(z) : null,
      stage(["Decoder ", isVae ? math(DECODER) : null], decoder, "the encoder's layers in reverse"),
      stage(["Output ", math(hat(X))], rowFigure(model, output, `the output of ${model.name}`, input), size),
    );
  }

  samplingStage(z) {
    const { isSampling } = this;
    const formula = h("p", { class: "formula" }, math(isSampling ? REPARAMETERIZATION : equation(Z, MU)));
    const draw = toggle("Draw", isSampling, (isOn) => this.setSampling(isOn));
    const again = isSampling ? button("Draw again", () => this.nextSeed()) : null;
    const note = isSampling ? ["a sample, ", math(NOISE)] : "the mean of the latents";
    return stage(["Sample"], [formula, codeChart(z), draw, again], note);
  }

  destroy() {
    this.flowTask.stop();
    this.errorTask.stop();
  }
}

const stage = (name, content, note) =>
  h("li", {}, h("h4", {}, name), h("div", { class: "stage" }, content), h("p", { class: "muted" }, note));

const gaussianCodeStage = (model, mean, std) =>
  stage(
    ["Latents ", math(mrow(MU, mo(","), sup(SIGMA, mn(2))))],
    codeChart(mean, std),
    `${model.latents} numbers, whiskers show σ`,
  );

const codeStage = (model, z) =>
  stage(
    ["Latents ", math(mrow(Z, mo("∈"), sup(mi("ℝ"), mn(model.latents))))],
    codeChart(z),
    `${model.latents} numbers`,
  );

function sizeText({ shape, width }) {
  return shape.length > 1 ? `${shape.join(" × ")} = ${width} numbers` : `${width} numbers`;
}

const errorHelp = () =>
  h(
    "p",
    { class: "muted" },
    "Mean squared error per value, in raw units, against the row before it was corrupted. ",
    h("strong", {}, "corrupted"),
    " is the error of the corrupted input. A model that removes noise has a lower error.",
  );

/** The squared error of an autoencoder or PCA. */
function squaredError() {
  const difference = mrow(mo("‖"), sub(X, mi("i")), mo("−"), sub(hat(X), mi("i")), mo("‖"));
  const sum = sumOver(equation(mi("i"), mn(1)), mi("N"));
  return equation(mi("ℒ"), mfrac(mn(1), mi("N")), sum, sup(difference, mn(2)));
}

/** The negative ELBO of a VAE. */
function negativeElbo() {
  const expectation = mrow(sub(mi("𝔼"), mi("q")), mo("["), LOG, DECODER, mo("]"));
  const divergence = mrow(sub(mi("D"), mtext("KL")), parens(ENCODER, mo("‖"), mrow(mi("p"), parens(Z))));
  return equation(mi("ℒ"), mo("−"), expectation, mo("+"), mi("β"), divergence);
}

function introduction(model) {
  const loss = model.kind === "vae" ? negativeElbo() : squaredError();
  return h(
    "p",
    { class: "lead" },
    "The encoder compresses a row ",
    math(X),
    ` to ${model.latents} latents, and the decoder turns the latents into a reconstruction `,
    math(hat(X)),
    ". Details and noise that do not fit into the latents are lost. Training minimises the loss",
    math(loss, true),
  );
}
