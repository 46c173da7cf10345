// The latent space: where held-out rows lie, what the prior expects, and what any point in it decodes to.

import { Following, Latest, decode, encodeAll, exhibit, post } from "../api.js";
import { Z, announce, button, card, choice, fixed, h, math, mi, mo, number, row, segmented, slider, term, toggle, vector } from "../dom.js";
import { mean, zeros } from "../algebra.js";
import { LatentMap, planeOf, priorOf, tintName } from "../map.js";
import { figure, readFile, tile } from "../rows.js";
import { Place, say } from "../say.js";
import { rounded, state } from "../state.js";
import { labelOf } from "../source.js";
import { sideBySide } from "./sidebyside.js";

export const title = "Latent space";
const DRAWS = 250; // from a prior that has no formula, to estimate its contours
const GRID = 13; // decodings a side
const MOST_OWN = 20000; // rows of one's own on the map
const LISTED = 32; // latents with a slider each

export function render(place, { model, models }) {
  const view = new LatentView(place, model, models);
  view.start();
  return () => view.destroy();
}

/** What the map needs of a model: held-out codes, or draws from the prior where there are none. */
export async function survey(model, signal) {
  const shown = await exhibit(model, "held-out");
  const exact = model.kind === "vae" || (model.kind === "pca" && model.spectrum?.length >= model.latents);
  const draws = shown && exact ? [] : (await post("/sample", model, { n: DRAWS, seed: 0 }, signal)).latents;
  const codes = shown?.latents ?? draws;
  return { shown, draws, codes, points: codes.map((z, i) => ({ z, label: shown?.labels?.[i] ?? null })) };
}

class LatentView {
  constructor(place, model, models) {
    Object.assign(this, { place, model, models, sampled: [], drawn: [], ends: { A: null, B: null }, own: [], names: [] });
    this.following = new Following((signal, z) => this.decoded(signal, z));
    this.gridding = new Latest();
    this.walking = new Latest();
    this.sampling = new Latest();
  }

  async start() {
    const { model, place } = this;
    place.append(this.lead());
    try {
      this.seen = await survey(model);
    } catch (error) {
      return place.append(say(error));
    }
    const centre = model.kind === "vae" ? zeros(model.latents) : mean(this.seen.codes);
    const kept = state.numbers("z");
    this.current = kept?.length === model.latents ? kept : centre;
    this.centre = centre;
    this.map = new LatentMap({
      model, label: `map of the latent space of ${model.name}; arrow keys move the point, Enter samples there, A and B set the ends of an interpolation`,
      onhover: (z, near) => this.hovered(z, near), onleave: () => this.hovered(this.current, null),
      onmove: (z) => this.move(z), onpick: (z) => this.pick(z), onkey: (key) => this.key(key),
    });
    place.append(h("div", { class: "latent" }, this.mapCard(), h("div", { class: "stack" }, this.pointCard(), this.walkCard())), h("div", { class: "columns" }, this.slidersCard(), this.sampleCard()), sideBySide(this));
    this.restore();
    this.replane();
    this.move(this.current);
    if (state.get("grid")) this.setGrid(true);
  }

  lead() {
    const prior = { vae: row(mi("p"), mo("("), Z, mo(")"), mo("="), mi("𝒩"), mo("("), mi("0"), mo(","), mi("I"), mo(")")) }[this.model.kind];
    return h("p", { class: "lead" }, "Every point here is a ", term("code", "A code z is what the encoder makes of a row: a few numbers from which the decoder rebuilds it."),
      ", and every code decodes to a row. Dots are rows that the model never trained on; lines are the contours of the ",
      term("prior", "What the model believes of codes before it sees a row. A VAE's is a standard normal distribution; PCA's has the variances of its components; an autoencoder has none, so a mixture is fitted on its codes."),
      prior ? [" ", math(prior)] : null, ". Move over the map to decode what lies there.");
  }

  mapCard() {
    const { model, seen, map } = this;
    const options = Array.from({ length: model.latents }, (_, k) => [String(k), `latent ${k + 1}`]);
    const axes = state.get("axes", model.latents > 2 ? "pc" : "0,1");
    this.axes = axes === "pc" || axes.split(",").every((k) => Number(k) < model.latents) ? axes : "pc";
    const [i, j] = this.axes === "pc" ? ["pc", "pc"] : this.axes.split(",");
    const both = model.latents > 2 ? [["pc", "principal"], ...options] : options;
    const change = () => {
      let [a, b] = [x.select.value, y.select.value];
      if (a === "pc" || b === "pc") [a, b] = this.axes === "pc" ? (a === "pc" ? [b === "0" ? "1" : "0", b] : [a, a === "0" ? "1" : "0"]) : ["pc", "pc"];
      [x.select.value, y.select.value] = [a, b];
      this.axes = a === "pc" ? "pc" : `${a},${b}`;
      state.set({ axes: this.axes });
      this.replane();
      this.move(this.current);
      if (map.grid) this.setGrid(true);
    };
    const x = choice("Across", both, i, change), y = choice("Up", both, j, change);
    const zoom = (factor) => { map.zoom = factor ? Math.max(1, Math.min(16, map.zoom * factor)) : 1; map.draw(); if (map.grid) this.setGrid(true); };
    const redraw = (name) => (on) => { map[name] = on; map.draw(); };
    this.gridToggle = toggle("Decodings", Boolean(state.get("grid")), (on) => this.setGrid(on));
    this.status = h("p", { class: "quiet status" }, " ");
    return h("section", { class: "card map-card" },
      h("div", { class: "line tools-line" }, model.latents > 1 ? [x, y] : null,
        h("span", { class: "group" }, toggle("Codes", true, redraw("codes")), toggle("Contours", true, redraw("contours")), this.gridToggle),
        h("span", { class: "group" }, button("−", () => zoom(0.5), { "aria-label": "zoom out" }), button("+", () => zoom(2), { "aria-label": "zoom in" }), button("Whole", () => zoom(0)))),
      map.element, this.status, this.labels(), this.ownRows(),
      seen.shown ? null : h("p", { class: "nothing" }, `${model.name} carries no held-out rows (it was trained with --private, or by an earlier Elbo). Dots are draws from its prior.`));
  }

  labels() {
    const { shown } = this.seen;
    if (!shown?.labels) return null;
    const names = [...new Set(shown.labels)].sort((a, b) => a - b);
    return h("div", { class: "labels", role: "group", "aria-label": "labels that are shown" }, names.map((label) => {
      const swatch = h("span", { class: "swatch" });
      swatch.style.background = `var(${tintName(label)})`;
      return toggle([swatch, shown.label_names?.[label] ?? String(label)], true, (on) => {
        this.map.hidden[on ? "delete" : "add"](label);
        this.map.draw();
      });
    }));
  }

  /** Rows of the user's own on the map, from a file. */
  ownRows() {
    const told = h("span", { class: "quiet", role: "status" });
    const input = h("input", { type: "file", accept: ".csv,.npy,.json,.txt", "aria-label": "a file of rows to place on the map", onchange: async () => {
      try {
        const all = await readFile(input.files[0], this.model), rows = all.slice(0, MOST_OWN);
        const codes = await encodeAll(this.model, rows, (done) => (told.textContent = `encoding ${done} of ${rows.length} rows …`));
        this.own = codes.map((z) => ({ z, label: -2 }));
        told.textContent = all.length > MOST_OWN ? `the first ${MOST_OWN} of ${all.length} rows of yours, in orange` : `${rows.length} rows of yours, in orange`;
        this.replane();
      } catch (error) {
        told.replaceChildren(say(error));
      }
    } });
    return h("div", { class: "line own" }, h("span", { class: "quiet" }, "Your rows on the map:"), input, told);
  }

  pointCard() {
    this.output = h("div", { class: "output" });
    this.what = h("p", { class: "quiet" });
    this.zText = h("code", { class: "z" });
    this.count = h("output", {}, "0 points");
    this.tray = h("div", { class: "tray" });
    return h("section", { class: "card point-card" }, h("h3", {}, "Decoded"), this.output, this.what,
      h("dl", {}, h("dt", {}, "Current ", math(Z)), h("dd", {}, this.zText), h("dt", {}, "Sampled"), h("dd", {}, this.count)),
      h("div", { class: "line" }, button("Sample here", () => this.pick(this.current), { class: "primary" }),
        button("Set A", () => this.setEnd("A")), button("Set B", () => this.setEnd("B")), button("To the middle", () => this.move(this.centre)), button("Clear", () => this.clear())),
      this.tray);
  }

  slidersCard() {
    const { model, seen } = this, report = model.latent_report ?? [];
    const weight = (k) => report[k]?.kl ?? report[k]?.variance ?? 0;
    const most = Math.max(1e-12, ...report.map((_, k) => weight(k)));
    const order = Array.from({ length: model.latents }, (_, k) => k);
    const listed = model.latents > LISTED ? order.sort((a, b) => weight(b) - weight(a)).slice(0, LISTED) : order;
    this.sliders = listed.map((k) => {
      const far = Math.max(model.kind === "vae" ? 3 : 0, ...seen.codes.map((z) => Math.abs(z[k]))) * 1.05 || 3;
      const dead = report[k] && !report[k].active;
      const meter = h("span", { class: "activity", title: report[k]?.kl != null ? `${number(weight(k))} nats` : `variance ${number(weight(k))}` });
      const fill = h("span", {});
      fill.style.width = `${(100 * weight(k)) / most}%`;
      meter.append(fill);
      const field = slider([h("span", {}, `z`, h("sub", {}, String(k + 1)), dead ? h("em", { class: "dead" }, "dead") : null), meter],
        { min: -far, max: far, step: far / 200, value: this.current[k], show: (v) => fixed(v), className: dead ? "is-dead" : "",
          oninput: (v) => { const z = Array.from(this.current); z[k] = v; this.move(z, true); } });
      return Object.assign(field, { k });
    });
    const dead = report.filter((latent) => !latent.active).length;
    return card("Latents", h("p", { class: "quiet" }, "The bar under each name is its ",
      term("activity", "How much a latent carries: its KL divergence from the prior in nats, or, where the model charges none, the variance of its code over held-out rows. A dead latent says nothing: the decoder ignores it."),
      dead ? `; ${dead} of ${model.latents} are dead.` : `; all ${model.latents} are alive.`, model.latents > LISTED ? ` The ${LISTED} most active are listed.` : ""),
      h("div", { class: "sliders" }, this.sliders));
  }

  walkCard() {
    this.strip = new Place("strip");
    this.method = state.get("method") === "slerp" ? "slerp" : "linear";
    this.steps = state.number("steps", 9);
    return card("Interpolation", h("p", { class: "quiet" }, "Set two ends on the map: A, then B. A straight line crosses the middle, where a normal prior has little mass in many dimensions; ",
      term("slerp", "Spherical interpolation (White 2016): along the great circle between the two directions, while the length changes evenly."), " stays at the distance where codes live."),
      h("div", { class: "line" }, segmented("Way", [["linear", "Linear"], ["slerp", "Spherical"]], this.method, (method) => { this.method = method; state.set({ method }); this.walk(); }),
        slider("Steps", { min: 3, max: 16, step: 1, value: this.steps, show: String, oninput: (v) => { this.steps = v; state.set({ steps: v }); this.walk(); } })),
      this.strip.element);
  }

  sampleCard() {
    this.samples = new Place("strip samples");
    this.seed = state.number("seed", 7);
    this.temperature = state.number("t", 1);
    const seed = h("input", { type: "number", min: 0, step: 1, value: String(this.seed), onchange: () => { this.seed = Math.max(0, Math.round(Number(seed.value) || 0)); this.draw(); } });
    return card("Draws from the prior",
      h("div", { class: "line" }, h("label", { class: "field" }, h("span", { class: "name" }, "Seed"), seed),
        slider(term("Temperature", "Scales the noise: below 1 draws stay near the middle and look typical, above 1 they stray."), { min: 0, max: 2, step: 0.05, value: this.temperature, show: (v) => fixed(v), oninput: (v) => { this.temperature = v; this.draw(); } }),
        button("Draw", () => this.draw(), { class: "primary" }), button("Next seed", () => { this.seed += 1; seed.value = this.seed; this.draw(); })),
      this.samples.element);
  }

  replane() {
    const { model, seen, map } = this;
    const plane = planeOf(seen.codes, this.axes, model.latents);
    map.show({ plane, prior: priorOf(model, plane, seen.draws), points: [...seen.points, ...this.own], current: this.current });
  }

  /** The current point goes to z. */
  move(z, fromSlider = false) {
    this.current = this.map.current = Array.from(z);
    for (const field of fromSlider ? [] : this.sliders) field.set(z[field.k]);
    this.map.drawTop();
    state.set({ z: rounded(z) });
    this.hovered(this.current, null);
    announce(`z is ${vector(z, 4)}`);
  }

  hovered(z, near) {
    this.zText.textContent = vector(z);
    const label = near === null || near >= this.seen.points.length ? "" : labelOf(this.seen.shown, near);
    this.what.textContent = near === null ? " " : near >= this.seen.points.length ? "one of your rows lies here" : `held-out row ${near}${label ? `, label ${label}` : ""} lies here`;
    this.following.want(z);
  }

  async decoded(signal, z) {
    try {
      const [x] = await decode(this.model, [z], signal);
      this.output.replaceChildren(figure(this.model, x, `decoded at ${vector(z, 4)}`));
      this.shownAt = performance.now();
      this.last = x;
    } catch (error) {
      if (error.name === "AbortError") throw error;
      this.output.replaceChildren(say(error));
    }
  }

  /** A click: a sample there. */
  async pick(z) {
    this.move(z);
    this.sampled.push(Array.from(z));
    this.tell();
    try {
      const [x] = await decode(this.model, [z]);
      this.tray.prepend(tile(this.model, x, `sampled at ${vector(z, 4)}`));
      while (this.tray.children.length > 24) this.tray.lastChild.remove();
    } catch (error) {
      this.tray.prepend(say(error));
    }
  }

  clear() {
    this.sampled = [];
    this.drawn = [];
    this.ends = { A: null, B: null };
    this.tray.replaceChildren();
    this.strip.element.replaceChildren();
    this.samples.element.replaceChildren();
    state.set({ a: null, b: null, seed: null, t: null });
    this.tell();
    this.walk();
  }

  tell() {
    const count = this.sampled.length;
    this.count.textContent = `${count} point${count === 1 ? "" : "s"}`;
    this.map.dots = [...this.sampled, ...this.drawn];
    this.map.marks = ["A", "B"].filter((end) => this.ends[end]).map((end) => ({ z: this.ends[end], text: end }));
    this.map.drawTop();
  }

  key(key) {
    const end = key.toUpperCase();
    if (end !== "A" && end !== "B") return false;
    this.setEnd(end);
    return true;
  }

  setEnd(end) {
    this.ends[end] = Array.from(this.current);
    state.set({ [end.toLowerCase()]: rounded(this.current) });
    announce(`${end} is set`);
    this.tell();
    this.walk();
  }

  async walk() {
    const { A, B } = this.ends;
    if (!A || !B) {
      this.map.path = [];
      this.map.drawTop();
      this.strip.element.replaceChildren(h("p", { class: "nothing" }, A ? "A is set; move on and set B." : "Neither end is set yet."));
      return;
    }
    await this.strip.fill(() => this.walking.run(async (signal) => {
      const body = { start: { latent: A }, end: { latent: B }, steps: this.steps, method: this.method };
      const { latents, outputs } = await post("/interpolate", this.model, body, signal);
      this.map.path = latents;
      this.map.drawTop();
      return outputs.map((x, i) => tile(this.model, x, `step ${i + 1} of ${outputs.length}`));
    }));
  }

  async draw() {
    state.set({ seed: this.seed, t: this.temperature });
    await this.samples.fill(() => this.sampling.run(async (signal) => {
      const { latents, outputs } = await post("/sample", this.model, { n: 16, seed: this.seed, temperature: this.temperature }, signal);
      this.drawn = latents;
      this.tell();
      return outputs.map((x, i) => h("button", { type: "button", class: "tile-button", "aria-label": `go to sample ${i + 1}`, onclick: () => this.move(latents[i]) }, tile(this.model, x, "")));
    }));
  }

  async setGrid(on) {
    state.set({ grid: on ? "1" : null });
    if (!on) {
      this.gridding.stop();
      this.map.grid = null;
      return this.map.draw();
    }
    try {
      const rows = await this.gridding.run((signal) => decode(this.model, this.map.lattice(GRID), signal));
      if (rows) this.map.grid = { rows, count: GRID };
      this.map.draw();
    } catch (error) {
      this.status.replaceChildren(say(error));
    }
  }

  restore() {
    for (const end of ["A", "B"]) {
      const kept = state.numbers(end.toLowerCase());
      if (kept?.length === this.model.latents) this.ends[end] = kept;
    }
    this.map.current = this.current;
    queueMicrotask(() => { this.tell(); this.walk(); });
    if (state.get("seed")) this.draw();
  }

  destroy() {
    for (const work of [this.following, this.gridding, this.walking, this.sampling]) work.stop();
    this.map?.destroy();
    this.beside?.forEach((map) => map.destroy());
  }
}

