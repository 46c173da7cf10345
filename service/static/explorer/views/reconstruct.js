// The data's way through the model: input, encoder, code, sample, decoder, output, with the real sizes and a row flowing through.

import { Latest, decode, exhibit, post } from "../api.js";
import { EPSILON, MU, SIGMA, X, Z, button, card, fixed, h, hat, math, mi, mo, mn, number, row as mrow, s, slider, sub, sup, term, toggle } from "../dom.js";
import { figure, isPicture, normals, tile } from "../rows.js";
import { Place, say } from "../say.js";
import { RowSource } from "../source.js";
import { state } from "../state.js";

export const title = "Reconstruct";
const WIDTHS = { mlp: [256, 128], conv: [32, 64] }; // what training takes where nothing else is asked for
const SHOWN_LATENTS = 32;

export function render(place, { model, models }) {
  const view = new Reconstruct(place, model, models);
  view.start();
  return () => view.destroy();
}

class Reconstruct {
  constructor(place, model, models) {
    Object.assign(this, { place, model, noise: state.number("noise", 0), hide: state.number("hide", 0), seed: state.number("seed", 1), draws: state.get("draw") === "1" });
    this.like = models.filter((other) => other.shape.join() === model.shape.join());
    this.work = new Latest();
    this.rivals = new Latest();
    this.flow = new Place("flow-place", { "aria-live": "off" });
    this.table = new Place();
  }

  async start() {
    const { model, place } = this;
    place.append(h("p", { class: "lead" }, "A row ", math(X), " goes through the encoder into a code of ", String(model.latents), " numbers, and through the decoder back to ", math(hat(X)),
      ". What does not fit through the code is lost: the fine detail, and the noise. Training makes the loss ",
      math(mrow(mi("ℒ"), mo("="), `<mfrac><mn>1</mn><mi>N</mi></mfrac>`, `<munderover><mo>∑</mo><mrow><mi>i</mi><mo>=</mo><mn>1</mn></mrow><mi>N</mi></munderover>`, sup(mrow(mo("‖"), sub(X, mi("i")), mo("−"), sub(hat(X), mi("i")), mo("‖")), mn(2)))), " small."));
    let shown = null;
    try { shown = await exhibit(model, "held-out"); } catch (error) { place.append(say(error)); }
    this.source = new RowSource({ model, shown, onrow: (row, name) => { this.row = row; this.name = name; this.update(); } });
    place.append(card(`The way of a row through ${model.name}`, this.flow.element), h("div", { class: "recon" },
      h("section", { class: "card" }, h("h3", {}, "The row"), this.source.element, this.spoil()),
      card("Errors by model", h("p", { class: "quiet" }, "Mean squared error of a value, raw units, against the row before it was spoiled: a model that denoises lowers it. ", h("strong", {}, "spoiled"), " is the error if nothing is done."), this.table.element)));
    this.source.start();
  }

  spoil() {
    const set = (name) => (value) => { this[name] = value; state.set({ [name]: value || null }); this.update(); };
    return h("div", { class: "spoil" },
      slider(term("Noise", "The standard deviation of normal noise on every value, as a share of its range. A denoising model takes it away."), { min: 0, max: 1, step: 0.02, value: this.noise, show: (v) => `${fixed(100 * v, 0)} %`, oninput: set("noise") }),
      slider(term("Occlusion", "Hides part of the row: a square of a picture, or some features of a table, which then have their median."), { min: 0, max: 0.9, step: 0.05, value: this.hide, show: (v) => `${fixed(100 * v, 0)} %`, oninput: set("hide") }),
      button("Other noise", () => { this.seed += 1; state.set({ seed: this.seed }); this.update(); }));
  }

  /** The row with noise on it and part of it hidden. */
  spoiled() {
    const { model, noise, hide } = this, random = normals(model.width * 2, this.seed);
    const range = (i) => (isPicture(model) ? model.pixel_range : [model.features[i].minimum, model.features[i].maximum]);
    const hidden = isPicture(model) ? block(model.shape, hide) : (i) => 0.5 * (1 + erf(random[model.width + i] / Math.SQRT2)) < hide;
    return Array.from(this.row, (value, i) => {
      if (value === null) return null;
      const [low, high] = range(i);
      if (hidden(i)) return isPicture(model) ? low : model.features[i].median;
      const noisy = value + noise * (high - low) * random[i];
      return isPicture(model) && noise ? Math.max(low, Math.min(high, noisy)) : noisy;
    });
  }

  update() {
    const { model, row } = this, input = this.spoiled();
    this.flow.fill(() => this.work.run(async (signal) => {
      const code = await post("/encode", model, { inputs: [input] }, signal);
      const drawn = this.draws ? await post("/encode", model, { inputs: [input], sample: true, seed: this.seed }, signal) : code;
      const [output] = await decode(model, drawn.latents, signal);
      return this.stages(input, code.latents[0], code.std[0], drawn.latents[0], output);
    }));
    this.table.fill(() => this.rivals.run(async (signal) => {
      const answers = await Promise.all(this.like.map((other) => post("/reconstruct", other, { inputs: [input] }, signal).catch((error) => { if (error.name === "AbortError") throw error; return { error }; })));
      return this.errors(input, answers, row);
    }));
  }

  stages(input, mean, std, z, output) {
    const { model } = this, [encoder, decoder] = networks(model), random = std.some((v) => v > 0);
    const size = `${model.shape.length > 1 ? `${model.shape.join(" × ")} = ` : ""}${model.width} numbers`;
    const draw = toggle("Draw", this.draws, (on) => { this.draws = on; state.set({ draw: on ? "1" : null }); this.update(); });
    return h("ol", { class: "flow" },
      stage(["Input ", math(mrow(X, mo("∈"), sup(mi("ℝ"), mn(model.width))))], figure(model, input, `the input, ${this.name}`), size),
      stage(["Encoder", model.kind === "vae" ? [" ", math(mrow(sub(mi("q"), mi("φ")), mo("("), Z, mo("|"), X, mo(")")))] : null], encoder, describe(model)),
      stage(random ? ["Code ", math(mrow(MU, mo(","), sup(SIGMA, mn(2))))] : ["Code ", math(mrow(Z, mo("∈"), sup(mi("ℝ"), mn(model.latents))))], codeBars(mean, std), `${model.latents} numbers${random ? ", whiskers show σ" : ""}`),
      random ? stage(["Sample"], [h("p", { class: "formula" }, math(mrow(Z, mo("="), MU, this.draws ? mrow(mo("+"), SIGMA, mo("⊙"), EPSILON) : ""))), codeBars(z), draw, this.draws ? button("Again", () => { this.seed += 1; state.set({ seed: this.seed }); this.update(); }, { "aria-label": "draw again" }) : null],
        this.draws ? ["a draw, ", math(mrow(EPSILON, mo("∼"), mi("𝒩"), mo("("), mn(0), mo(","), mi("I"), mo(")")))] : "its mean") : null,
      stage(["Decoder", model.kind === "vae" ? [" ", math(mrow(sub(mi("p"), mi("θ")), mo("("), X, mo("|"), Z, mo(")")))] : null], decoder, "back again"),
      stage(["Output ", math(hat(X))], figure(model, output, `the output of ${model.name}`, input), size));
  }

  errors(input, answers, clean) {
    const present = clean.map((v, i) => [v, i]).filter(([v]) => v !== null);
    const error = (x) => present.reduce((sum, [v, i]) => sum + (v - x[i]) ** 2, 0) / present.length;
    const before = error(input.map((v, i) => v ?? clean[i]));
    const rows = this.like.map((other, i) => (answers[i].error ? { other, failed: answers[i].error } : { other, output: answers[i].outputs[0], value: error(answers[i].outputs[0]) }));
    const most = Math.max(before, ...rows.map((r) => r.value ?? 0), 1e-12);
    const line = (name, x, value) => {
      const bar = h("span", { class: "fill" });
      bar.style.width = `${(100 * value) / most}%`;
      return h("tr", {}, h("th", { scope: "row" }, name), h("td", { class: "pic" }, tile(this.model, x, `${name}`)), h("td", { class: "num" }, number(value)), h("td", { class: "wide" }, h("span", { class: "bar" }, bar)));
    };
    return h("table", { class: "errors" }, h("thead", {}, h("tr", {}, ["model", "output", "error", ""].map((name) => (name ? h("th", { scope: "col" }, name) : h("td", {}))))),
      h("tbody", {}, line("spoiled", input.map((v, i) => v ?? this.model.features[i].median), before),
        rows.map((r) => (r.failed ? h("tr", {}, h("th", { scope: "row" }, r.other.name), h("td", { colspan: 3 }, say(r.failed))) : line(r.other.name, r.output, r.value)))));
  }

  destroy() {
    this.work.stop();
    this.rivals.stop();
  }
}

const stage = (name, content, note) => h("li", {}, h("h4", {}, name), h("div", { class: "stage" }, content), h("p", { class: "quiet" }, note));

/** Which places of a picture lie in a square at its middle that covers `share` of it. */
function block([height, width, channels = 1], share) {
  const [a, b] = [Math.sqrt(share) * height, Math.sqrt(share) * width];
  return (i) => {
    const p = Math.floor(i / channels), y = Math.floor(p / width), x = p % width;
    return share > 0 && Math.abs(y + 0.5 - height / 2) < a / 2 && Math.abs(x + 0.5 - width / 2) < b / 2;
  };
}

/** Abramowitz & Stegun 7.1.26. */
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const y = 1 - ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t * Math.exp(-x * x);
  return x < 0 ? -y : y;
}

const layers = (model) => (model.kind === "pca" ? [] : (model.training.hidden ?? WIDTHS[model.training.network] ?? []));

function describe(model) {
  if (model.kind === "pca") return "a projection on the principal components";
  const widths = layers(model);
  if (!widths.length) return "one linear map";
  return `${model.training.network === "conv" ? "convolutions of" : "layers of"} ${[...widths, ...(model.training.dense ?? [])].join(", ")}`;
}

/** Two pictures: layers from wide to narrow, and from narrow to wide. */
function networks(model) {
  const widths = [model.width, ...layers(model), ...(model.training.dense ?? []), model.latents * (model.kind === "vae" ? 2 : 1)];
  const out = [model.latents, ...(model.training.dense ?? []).slice().reverse(), ...layers(model).slice().reverse(), model.width];
  return [picture(widths, `encoder: ${widths.join(" to ")}`), picture(out, `decoder: ${out.join(" to ")}`)];
}

function picture(widths, label) {
  const W = 150, H = 130, most = Math.log2(Math.max(...widths) + 1);
  const at = (i) => 14 + (i * (W - 28)) / (widths.length - 1), half = (w) => 6 + (44 * Math.log2(w + 1)) / most;
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, class: "network", role: "img", "aria-label": label });
  svg.append(s("polygon", { class: "funnel", points: [...widths.map((w, i) => `${at(i)},${58 - half(w)}`), ...widths.map((w, i) => `${at(i)},${58 + half(w)}`).reverse()].join(" ") }));
  svg.append(s("path", { class: "stream", d: `M 4 58 H ${W - 4}` }));
  widths.forEach((w, i) => svg.append(s("rect", { class: "layer", x: at(i) - 3, y: 58 - half(w), width: 6, height: 2 * half(w), rx: 3 }), s("text", { class: "tick middle", x: at(i), y: i % 2 ? 127 : 118 }, String(w))));
  return svg;
}

/** A code as upright bars about zero, with a standard deviation as whiskers. */
function codeBars(z, std = null) {
  const shown = z.slice(0, SHOWN_LATENTS), W = 150, H = 120, most = Math.max(1e-9, ...shown.map((v, i) => Math.abs(v) + (std?.[i] ?? 0)));
  const step = W / shown.length, y = (v) => H / 2 - (v / most) * (H / 2 - 4);
  const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, class: "code", role: "img", "aria-label": `code: ${shown.map((v) => fixed(v)).join(", ")}` });
  svg.append(s("line", { class: "rule", x1: 0, x2: W, y1: H / 2, y2: H / 2 }));
  shown.forEach((v, i) => {
    svg.append(s("rect", { class: v < 0 ? "below" : "above", x: i * step + step * 0.15, width: step * 0.7, y: Math.min(y(v), H / 2), height: Math.max(0.5, Math.abs(y(v) - H / 2)) }, s("title", {}, `z${i + 1} = ${number(v)}${std?.[i] ? `, σ ${number(std[i])}` : ""}`)));
    if (std?.[i]) svg.append(s("line", { class: "whisker", x1: (i + 0.5) * step, x2: (i + 0.5) * step, y1: y(v - std[i]), y2: y(v + std[i]) }));
  });
  return svg;
}
