// Small maps side by side, one for each model that takes rows of the same shape.

import { decode, describeModel } from "../../lib/api.js";
import { isAbort } from "../../lib/errors.js";
import { vector } from "../../lib/format.js";
import { kindName } from "../../lib/model.js";
import { ThrottledTask } from "../../lib/tasks.js";
import { LatentMap } from "../../map/latent-map.js";
import { priorInPlane } from "../../map/prior.js";
import { createPlane, PRINCIPAL_AXES } from "../../map/projection.js";
import { card, toggle } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { math, Z } from "../../ui/mathml.js";
import { AsyncPanel, errorMessage } from "../../ui/messages.js";
import { rowFigure } from "../../ui/row-figure.js";
import { centreOf, loadCodes } from "./codes.js";

const GRID_SIZE = 9; // decoded rows per side of a map
const PRELOAD_DISTANCE = "200px"; // a map is loaded at this distance from the visible part of the page
const DESCRIPTION =
  "The latents of the same rows in each model. An autoencoder leaves gaps between them, and points in a gap may " +
  "decode to implausible rows. A VAE fills the space of its prior, so points between the dots decode to plausible " +
  "rows. PCA changes a row along straight lines. Move the pointer over a map to decode a point.";

export class SideBySide {
  /** `models` have rows of the same shape. */
  constructor(models) {
    this.models = models;
    this.maps = [];
    this.container = h("div", { class: "side-by-side" });
    const gridToggle = toggle("Decoded grids", false, (isOn) => this.showGrids(isOn));
    const description = h("p", { class: "muted" }, DESCRIPTION);
    this.element = card("Side by side", description, h("div", { class: "controls" }, gridToggle), this.container);
    this.loadWhenNearViewport();
  }

  loadWhenNearViewport() {
    const onchange = (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      observer.disconnect();
      for (const model of this.models) this.loadMap(model);
    };
    const observer = new IntersectionObserver(onchange, { rootMargin: PRELOAD_DISTANCE });
    observer.observe(this.container);
  }

  loadMap(model) {
    const panel = new AsyncPanel();
    this.container.append(panel.element);
    panel.load(async () => {
      const described = await describeModel(model);
      const small = new SmallMap(described, await loadCodes(described));
      this.maps.push(small);
      return small.element;
    });
  }

  showGrids(isOn) {
    for (const map of this.maps) map.showGrid(isOn);
  }

  destroy() {
    for (const { map } of this.maps) map.destroy();
  }
}

class SmallMap {
  constructor(model, codes) {
    this.model = model;
    this.output = h("div", { class: "output" });
    this.coordinates = h("code", { class: "z" });
    this.decoding = new ThrottledTask((signal, z) => this.decode(signal, z));
    this.map = this.createMap(codes);
    this.decoding.update(this.map.current);
    const kind = h("span", { class: "muted" }, kindName(model));
    const caption = h("figcaption", {}, h("strong", {}, model.name), " ", kind);
    const position = h("span", {}, math(Z), " ", this.coordinates);
    const decoded = h("div", { class: "small-map-output" }, this.output, position);
    this.element = h("figure", { class: "small-map" }, caption, this.map.element, decoded);
  }

  createMap({ codes, points, samples }) {
    const { model } = this;
    const onmove = (z) => this.moveTo(z);
    const map = new LatentMap({
      model,
      label: `small map of ${model.name}; arrow keys move the point`,
      onhover: (z) => this.decoding.update(z),
      onleave: () => this.decoding.update(map.current),
      onmove,
      onpick: onmove,
    });
    const current = centreOf(model, codes);
    const plane = createPlane(codes, model.latents > 2 ? PRINCIPAL_AXES : "0,1", current);
    map.show({ plane, prior: priorInPlane(model, plane, samples), points, current });
    return map;
  }

  moveTo(z) {
    this.map.current = z;
    this.map.drawOverlay();
    this.decoding.update(z);
  }

  async decode(signal, z) {
    const { model } = this;
    try {
      const [row] = await decode(model, [z], signal);
      this.output.replaceChildren(rowFigure(model, row, `decoded by ${model.name} at ${vector(z, 4)}`));
      this.coordinates.textContent = vector(z, 3);
    } catch (error) {
      if (!isAbort(error)) this.output.replaceChildren(errorMessage(error));
    }
  }

  async showGrid(isOn) {
    const rows = isOn ? await decode(this.model, this.map.gridLatents(GRID_SIZE)) : null;
    this.map.decodedGrid = rows && { rows, count: GRID_SIZE };
    this.map.draw();
  }
}
