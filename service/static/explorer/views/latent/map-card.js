// The card with the map: choice of axes, what is shown, zoom, labels, and the user's own rows.

import { decode, encodeInBatches } from "../../lib/api.js";
import { range } from "../../lib/linear-algebra.js";
import { isImage, labelName } from "../../lib/model.js";
import { readRowFile } from "../../lib/parse-rows.js";
import { state } from "../../lib/state.js";
import { LatestTask } from "../../lib/tasks.js";
import { priorInPlane } from "../../map/prior.js";
import { createPlane, PRINCIPAL_AXES } from "../../map/projection.js";
import { labelVariable, OWN_ROWS } from "../../ui/colours.js";
import { button, dropdown, rowFileInput, toggle } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { emptyMessage, errorMessage } from "../../ui/messages.js";
import { centreOf } from "./codes.js";

const GRID_SIZE = 13; // decoded rows per side of the map
const MAX_OWN_ROWS = 20000;

export class MapCard {
  /** `codes` is the result of `loadCodes`. `onaxes()` is called after the plane has changed. */
  constructor({ model, codes, map, onaxes }) {
    this.model = model;
    this.codes = codes;
    this.map = map;
    this.onaxes = onaxes;
    this.ownPoints = [];
    this.axes = axesFromState(model);
    this.gridTask = new LatestTask();
    this.status = h("p", { class: "muted status" }, " ");
    this.element = h(
      "section",
      { class: "card map-card" },
      this.controls(),
      map.element,
      this.status,
      this.labelToggles(),
      this.ownRowsInput(),
      codes.heldOut ? null : emptyMessage(missingRowsText(model)),
    );
  }

  /** Show the plane of the chosen axes. */
  updatePlane(current) {
    const { model, codes } = this;
    const plane = createPlane(codes.codes, this.axes, centreOf(model, codes.codes));
    const prior = priorInPlane(model, plane, codes.samples);
    this.map.show({ plane, prior, points: [...codes.points, ...this.ownPoints], current });
  }

  controls() {
    const isGridOn = this.isGridOn();
    return h(
      "div",
      { class: "controls" },
      this.model.latents > 1 ? this.axisDropdowns() : null,
      h(
        "span",
        { class: "group" },
        toggle("Codes", true, (isOn) => this.setLayer("showCodes", isOn)),
        toggle("Contours", true, (isOn) => this.setLayer("showContours", isOn)),
        toggle("Decoded grid", isGridOn, (isOn) => this.showGrid(isOn)),
      ),
      h(
        "span",
        { class: "group" },
        button("−", () => this.zoomBy(0.5), { "aria-label": "zoom out" }),
        button("+", () => this.zoomBy(2), { "aria-label": "zoom in" }),
        button("Reset zoom", () => this.zoomBy(null)),
      ),
    );
  }

  axisDropdowns() {
    const { latents } = this.model;
    const options = range(latents).map((k) => [String(k), `latent ${k + 1}`]);
    if (latents > 2) options.unshift([PRINCIPAL_AXES, "principal components"]);
    const [first, second] = this.axes === PRINCIPAL_AXES ? [PRINCIPAL_AXES, PRINCIPAL_AXES] : this.axes.split(",");
    const onchange = () => {
      const chosen = [horizontal.select.value, vertical.select.value];
      const [a, b] = completeAxes(chosen, this.axes === PRINCIPAL_AXES);
      horizontal.select.value = a;
      vertical.select.value = b;
      this.setAxes(a === PRINCIPAL_AXES ? PRINCIPAL_AXES : `${a},${b}`);
    };
    const horizontal = dropdown("Horizontal axis", options, first, onchange);
    const vertical = dropdown("Vertical axis", options, second, onchange);
    return [horizontal, vertical];
  }

  setAxes(axes) {
    this.axes = axes;
    state.set({ axes });
    this.updatePlane(this.map.current);
    this.onaxes();
    this.refreshGrid();
  }

  setLayer(name, isOn) {
    this.map[name] = isOn;
    this.map.draw();
  }

  zoomBy(factor) {
    this.map.zoomBy(factor);
    this.refreshGrid();
  }

  refreshGrid() {
    if (this.map.decodedGrid) this.showGrid(true);
  }

  /** Whether the address asks for the grid. By default, it is shown if the map is the whole latent space of images. */
  isGridOn() {
    const isWholeSpace = this.model.latents === 2 && isImage(this.model);
    return state.get("grid", isWholeSpace ? "1" : "0") === "1";
  }

  async showGrid(isOn) {
    state.set({ grid: isOn ? "1" : "0" });
    if (!isOn) {
      this.gridTask.stop();
      this.setLayer("decodedGrid", null);
      return;
    }
    try {
      const rows = await this.gridTask.run((signal) => decode(this.model, this.map.gridLatents(GRID_SIZE), signal));
      if (rows) this.setLayer("decodedGrid", { rows, count: GRID_SIZE });
    } catch (error) {
      this.status.replaceChildren(errorMessage(error));
    }
  }

  labelToggles() {
    const { heldOut } = this.codes;
    if (!heldOut?.labels) return null;
    const labels = [...new Set(heldOut.labels)].sort((a, b) => a - b);
    const labelToggle = (label) => {
      const swatch = h("span", { class: "swatch" });
      swatch.style.background = `var(${labelVariable(label)})`;
      return toggle([swatch, labelName(heldOut, label)], true, (isOn) => this.setLabelVisible(label, isOn));
    };
    return h("div", { class: "labels", role: "group", "aria-label": "visible labels" }, labels.map(labelToggle));
  }

  setLabelVisible(label, isVisible) {
    if (isVisible) this.map.hiddenLabels.delete(label);
    else this.map.hiddenLabels.add(label);
    this.map.draw();
  }

  ownRowsInput() {
    const status = h("span", { class: "muted", role: "status" });
    const onfile = async (file) => {
      try {
        await this.showOwnRows(file, status);
      } catch (error) {
        status.replaceChildren(errorMessage(error));
      }
    };
    const input = rowFileInput("file of rows to show on the map", onfile);
    return h(
      "div",
      { class: "controls own-rows" },
      h("span", { class: "muted" }, "Your rows on the map:"),
      input,
      status,
    );
  }

  async showOwnRows(file, status) {
    const all = await readRowFile(file, this.model);
    const rows = all.slice(0, MAX_OWN_ROWS);
    const latents = await encodeInBatches(this.model, rows, (count) => {
      status.textContent = `encoding ${count} of ${rows.length} rows …`;
    });
    this.ownPoints = latents.map((z) => ({ z, label: OWN_ROWS }));
    const isCut = all.length > rows.length;
    const count = isCut ? `the first ${rows.length} of ${all.length}` : `${rows.length}`;
    status.textContent = `${count} rows from your file, in orange`;
    this.updatePlane(this.map.current);
  }

  stop() {
    this.gridTask.stop();
  }
}

/** The axes that the address names, or the principal components if the model lacks one of the named latents. */
function axesFromState(model) {
  const axes = state.get("axes", model.latents > 2 ? PRINCIPAL_AXES : "0,1");
  const isValid = axes.split(",").every((k) => Number(k) < model.latents);
  return isValid ? axes : PRINCIPAL_AXES;
}

/** The axes after the user has changed one of them: either both are principal components, or both are latents. */
function completeAxes([horizontal, vertical], wasPrincipal) {
  if (horizontal !== PRINCIPAL_AXES && vertical !== PRINCIPAL_AXES) return [horizontal, vertical];
  if (!wasPrincipal) return [PRINCIPAL_AXES, PRINCIPAL_AXES];
  const otherThan = (latent) => (latent === "0" ? "1" : "0");
  return horizontal === PRINCIPAL_AXES ? [otherThan(vertical), vertical] : [horizontal, otherThan(horizontal)];
}

const missingRowsText = (model) =>
  `${model.name} has no held-out rows to show: it was trained with --private or by an older version of Elbo, or ` +
  "your API key may not read them. " +
  "The dots are samples from its prior.";
