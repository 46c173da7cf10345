// The latent space view: the latents of held-out rows, the prior, and the decoded row of any point.

import { vector } from "../lib/format.js";
import { heldOutRowName, sameShape } from "../lib/model.js";
import { state, toParameter } from "../lib/state.js";
import { LatentMap } from "../map/latent-map.js";
import { term } from "../ui/controls.js";
import { announce, h } from "../ui/dom.js";
import { equation, math, mi, mrow, parens, STANDARD_NORMAL, Z } from "../ui/mathml.js";
import { errorMessage } from "../ui/messages.js";
import { centreOf, loadCodes } from "./latent/codes.js";
import { InterpolationCard } from "./latent/interpolation-card.js";
import { MapCard } from "./latent/map-card.js";
import { NeighboursCard } from "./latent/neighbours-card.js";
import { PointCard } from "./latent/point-card.js";
import { SamplingCard } from "./latent/sampling-card.js";
import { SideBySide } from "./latent/side-by-side.js";
import { SlidersCard } from "./latent/sliders-card.js";
import { WalkCard } from "./latent/walk-card.js";

export const title = "Latent space";
const LATENTS =
  "The encoder turns a row into its latents z: a few numbers from which the decoder reconstructs the row.";
const PRIOR =
  "The distribution that the model assumes for latents. The prior of a VAE is the standard normal distribution. That " +
  "of PCA is normal with the variances of its components. Latents do not fill the prior, so samples come from a " +
  "mixture of normal distributions that is fitted to the latents of the training rows. An autoencoder has no prior: " +
  "the lines are those of its mixture.";

export function render(container, { model, models }) {
  const view = new LatentView(container, model, models);
  view.start();
  return () => view.destroy();
}

class LatentView {
  constructor(container, model, models) {
    this.container = container;
    this.model = model;
    this.models = models;
    this.kept = []; // latents at which the user has sampled on the map
    this.drawn = []; // latents of the samples from the prior
    this.ends = { A: null, B: null };
    this.cards = [];
  }

  async start() {
    const { model, container } = this;
    model.condition = conditionFromState(model);
    container.append(introduction(model));
    try {
      this.codes = await loadCodes(model);
    } catch (error) {
      container.append(errorMessage(error));
      return;
    }
    this.centre = centreOf(model, this.codes.codes);
    this.current = state.numbers("z", model.latents) ?? this.centre;
    this.map = this.createMap();
    this.createCards();
    this.mapCard.updatePlane(this.current);
    this.moveTo(this.current);
    this.restoreFromState();
  }

  createMap() {
    const { name } = this.model;
    return new LatentMap({
      model: this.model,
      label:
        `map of the latent space of ${name}; arrow keys move the point, Enter samples there, ` +
        "A and B set the ends of an interpolation",
      onhover: (z, code) => this.pointCard.show(z, this.describeCode(code)),
      onleave: () => this.pointCard.show(this.current),
      onmove: (z) => this.moveTo(z),
      onpick: (z) => this.sampleAt(z),
      onkey: (key) => this.onKey(key),
    });
  }

  createCards() {
    const { model, map, codes } = this;
    this.mapCard = new MapCard({ model, codes, map, onaxes: () => this.moveTo(this.current) });
    this.pointCard = new PointCard({
      model,
      onsample: () => this.sampleAt(this.current),
      onend: (end) => this.setEnd(end),
      oncentre: () => this.moveTo(this.centre),
      onclear: () => this.clear(),
    });
    this.interpolation = new InterpolationCard({ model, onpath: (path) => this.showPath(path) });
    const onslide = (k, value) => this.onSlide(k, value);
    this.sliders = new SlidersCard({ model, codes: codes.codes, current: this.current, oninput: onslide });
    this.sampling = new SamplingCard({
      model,
      onsamples: (latents) => this.showSamples(latents),
      onselect: (z) => this.moveTo(z),
      oncondition: () => this.showCondition(),
    });
    const sameRows = this.models.filter((other) => sameShape(other, model));
    this.sideBySide = sameRows.length > 1 ? new SideBySide(sameRows) : null;
    const tools = this.createTools();
    this.cards = [this.mapCard, this.pointCard, this.interpolation, this.sampling, ...tools];
    this.container.append(
      h(
        "div",
        { class: "latent" },
        this.mapCard.element,
        h("div", { class: "stack" }, this.pointCard.element, this.interpolation.element),
      ),
      h("div", { class: "columns" }, this.sliders.element, this.sampling.element),
      h(
        "div",
        { class: "columns" },
        tools.map((tool) => tool.element),
      ),
      this.sideBySide?.element ?? "",
    );
  }

  /** The cards that need held-out rows, or labels. */
  createTools() {
    const { model, codes } = this;
    const point = () => this.current;
    const onselect = (z) => this.moveTo(z);
    const tools = [];
    if (codes.heldOut) tools.push(new NeighboursCard({ model, heldOut: codes.heldOut, point, onselect }));
    const onpath = (path) => this.showPath(path);
    if (model.directions?.length) tools.push(new WalkCard({ model, point, onpath, onselect }));
    return tools;
  }

  restoreFromState() {
    for (const end of ["A", "B"]) this.ends[end] = state.numbers(end.toLowerCase(), this.model.latents);
    this.updateMarks();
    this.interpolation.update(this.ends);
    if (state.get("seed")) this.sampling.draw();
    if (this.mapCard.isGridOn()) this.mapCard.showGrid(true);
  }

  /** A note about the row with index `i` on the map; a blank if `i` is null. */
  describeCode(i) {
    if (i === null) return " ";
    if (i >= this.codes.points.length) return "one of your rows lies here";
    if (!this.codes.heldOut) return "a sample from the prior lies here";
    return `${heldOutRowName(this.codes.heldOut, i)} lies here`;
  }

  moveTo(z) {
    this.setCurrent(z);
    this.sliders.set(this.current);
  }

  onSlide(k, value) {
    const z = Array.from(this.current);
    z[k] = value;
    this.setCurrent(z);
  }

  setCurrent(z) {
    this.current = Array.from(z);
    this.map.current = this.current;
    this.map.drawOverlay();
    state.set({ z: toParameter(z) });
    this.pointCard.show(this.current);
    announce(`z is ${vector(z, 4)}`);
  }

  async sampleAt(z) {
    this.moveTo(z);
    this.kept.push(Array.from(z));
    this.updateMarks();
    await this.pointCard.addToTray(z);
  }

  showSamples(latents) {
    this.drawn = latents;
    this.updateMarks();
  }

  /** Decode everything that is shown again, because the user has chosen another condition. */
  showCondition() {
    this.moveTo(this.current);
    this.interpolation.update(this.ends);
    if (state.get("grid")) this.mapCard.showGrid(true);
  }

  showPath(latents) {
    this.map.path = latents;
    this.map.drawOverlay();
  }

  clear() {
    this.kept = [];
    this.drawn = [];
    this.ends = { A: null, B: null };
    this.pointCard.clear();
    this.sampling.clear();
    state.set({ a: null, b: null, seed: null, t: null });
    this.updateMarks();
    this.interpolation.update(this.ends);
  }

  updateMarks() {
    this.pointCard.setCount(this.kept.length);
    this.map.samples = [...this.kept, ...this.drawn];
    const set = Object.entries(this.ends).filter(([, z]) => z);
    this.map.marks = set.map(([text, z]) => ({ z, text }));
    this.map.drawOverlay();
  }

  onKey(key) {
    const end = key.toUpperCase();
    if (end !== "A" && end !== "B") return false;
    this.setEnd(end);
    return true;
  }

  setEnd(end) {
    this.ends[end] = Array.from(this.current);
    state.set({ [end.toLowerCase()]: toParameter(this.current) });
    announce(`${end} is set`);
    this.updateMarks();
    this.interpolation.update(this.ends);
  }

  destroy() {
    this.model.condition = undefined; // other views show rows whose condition they do not know
    for (const card of this.cards) card.stop();
    this.map?.destroy();
    this.sideBySide?.destroy();
  }
}

/** The condition in the address, or undefined if it is none that the model knows. */
function conditionFromState(model) {
  try {
    const found = Object.entries(JSON.parse(state.get("condition")) ?? {});
    const known = found.filter(([name, level]) => model.conditions?.[name]?.includes(level));
    return known.length ? Object.fromEntries(known) : undefined;
  } catch {
    return undefined;
  }
}

function introduction(model) {
  const prior = equation(mrow(mi("p"), parens(Z)), STANDARD_NORMAL);
  return h(
    "p",
    { class: "lead" },
    "Every point of this space is a vector of ",
    term("latents", LATENTS),
    ", which decodes to a row. The dots are rows that the model was not trained on. The lines are the contours of the ",
    term("prior", PRIOR),
    model.kind === "vae" ? [" ", math(prior)] : null,
    ". Move the pointer over the map to decode a point.",
  );
}
