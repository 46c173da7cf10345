// PCA: the 3 x 2 example step by step, then the loaded model's spectrum, components, and its angles to a linear autoencoder.

import { decode, detail } from "../api.js";
import { button, card, choice, fixed, frac, h, math, matrix, mi, mn, mo, number, row, s, sub, sup, term, X } from "../dom.js";
import { covariance, eigen, mean, minus, dot, principalAngles, unit, zeros } from "../algebra.js";
import { bars } from "../charts.js";
import { isPicture, nameOf, paintSigned, tile } from "../rows.js";
import { Place, nothing } from "../say.js";
import { state } from "../state.js";
import { KINDS } from "./models.js";

export const title = "PCA";
const EXAMPLE = [[1, 2], [2, 3], [3, 5]];
const STEPS = ["Data", "Centre", "Covariance", "Eigenvectors", "Project"];
const BAR = `<mover accent="true">${X}<mo>¯</mo></mover>`;
const XC = sub(mi("X"), mi("c"));

export function render(place, { model, models }) {
  const pca = model.kind === "pca" ? model : models.find((m) => m.kind === "pca" && m.shape.join() === model.shape.join()) ?? models.find((m) => m.kind === "pca");
  place.append(h("p", { class: "lead" }, "PCA finds the directions in which data vary most. A linear autoencoder, trained by gradient descent on the squared error, ends in the same ",
    term("subspace", "The flat piece of space that the components span. The autoencoder's own axes may be turned and stretched within it; the subspace is the same (Baldi & Hornik 1989)."), "."), example());
  if (!pca) return void place.append(nothing("No PCA is served. Train one: ", h("code", {}, "elbo train DATA --model pca --name pca"), "."));
  const spectrum = new Place(), parts = new Place(), angles = new Place();
  place.append(h("h3", { class: "section" }, `The loaded model ${pca.name}`), h("div", { class: "columns" }, card("Spectrum", spectrum.element), card("Components", parts.element)), card("Against another model's subspace", angles.element));
  const whole = detail(pca);
  spectrum.fill(async () => scree(await whole));
  parts.fill(async () => components(await whole));
  angles.fill(async () => against(await whole, models));
}

/** The mathematics of the example, from the numbers that are in it. */
export function solve(data) {
  const centre = mean(data), centred = data.map((x) => minus(x, centre)), sigma = covariance(data, centre);
  const { values, vectors } = eigen(sigma);
  const signed = vectors.map((v) => (v[v.findIndex((c) => Math.abs(c) > 1e-9)] < 0 ? v.map((c) => -c) : v));
  return { data, centre, centred, sigma, values, vectors: signed, projected: centred.map((x) => dot(x, signed[0])) };
}

function example() {
  let data = state.numbers("x")?.length === 6 ? chunk(state.numbers("x")) : EXAMPLE, step = Math.max(1, Math.min(5, state.number("step", 5)));
  const text = h("div", { class: "step-text", "aria-live": "polite" }), plot = h("div", { class: "step-plot" });
  const buttons = STEPS.map((name, k) => button(`${k + 1} ${name}`, () => go(k + 1), { class: "toggle" }));
  const go = (next) => {
    step = Math.max(1, Math.min(5, next));
    state.set({ step });
    buttons.forEach((b, k) => b.setAttribute("aria-pressed", String(k + 1 === step)));
    previous.disabled = step === 1;
    next_.disabled = step === 5;
    const solved = solve(data);
    text.replaceChildren(...explain(step, solved, step === 1 ? entries() : null));
    plot.replaceChildren(picture(step, solved));
  };
  const entries = () => h("div", { class: "matrix-input", role: "group", "aria-label": "the data" }, data.flatMap((x, i) => x.map((value, j) =>
    h("input", { type: "number", step: "any", value: String(value), "aria-label": `row ${i + 1}, column ${j + 1}`, onchange: (event) => {
      const v = Number(event.target.value);
      if (!Number.isFinite(v)) return;
      data = data.map((r, a) => r.map((c, b) => (a === i && b === j ? v : c)));
      state.set({ x: data.flat().join(",") });
      go(1);
    } }))), button("The example's", () => { data = EXAMPLE; state.set({ x: null }); go(1); }));
  const previous = button("Back", () => go(step - 1)), next_ = button("Next", () => go(step + 1), { class: "primary" });
  go(step);
  return card("By hand: three rows, two columns", h("div", { class: "line steps" }, buttons), h("div", { class: "step" }, text, plot), h("div", { class: "line" }, previous, next_));
}

const chunk = (flat) => [0, 2, 4].map((i) => flat.slice(i, i + 2));

function explain(step, { data, centre, centred, sigma, values, vectors, projected }, entries) {
  const column = (v) => matrix(v.map((c) => [c]), 4), eq = (...parts) => math(row(...parts), true);
  return {
    1: () => [h("h4", {}, "Step 1: the data"), eq(mi("X"), mo("="), matrix(data.map((r) => r.map((c) => mn(number(c))))), ), h("p", {}, "Three rows with two numbers each. They lie nearly on a line, so one number a row should do. Change them, if you like:"), entries],
    2: () => [h("h4", {}, "Step 2: centre it"), eq(BAR, mo("="), column(centre), mo(","), XC, mo("="), matrix(centred, 4)), h("p", {}, "Each column loses its mean, so that directions start at the middle of the data.")],
    3: () => [h("h4", {}, "Step 3: the covariance"), eq(mi("Σ"), mo("="), frac(mn(1), mn(data.length - 1)), sup(row(XC), mi("T")), XC, mo("="), matrix(sigma, 4)), h("p", {}, "On the diagonal each column's variance, off it how they vary together. Trace ", number(sigma[0][0] + sigma[1][1]), ", determinant ", number(sigma[0][0] * sigma[1][1] - sigma[0][1] ** 2), ".")],
    4: () => [h("h4", {}, "Step 4: eigenvalues and eigenvectors"), eq(sub(mi("λ"), mn(1)), mo("="), mn(fixed(values[0], 4)), mo(","), sub(mi("𝐯"), mn(1)), mo("="), mo("±"), column(vectors[0])), eq(sub(mi("λ"), mn(2)), mo("="), mn(fixed(values[1], 4)), mo(","), sub(mi("𝐯"), mn(2)), mo("="), mo("±"), column(vectors[1])),
      h("p", {}, "The sum of the eigenvalues is the trace, ", fixed(values[0] + values[1], 4), ", and their product the determinant, ", fixed(values[0] * values[1], 4), ". The first direction carries ", fixed((100 * values[0]) / (values[0] + values[1] || 1), 1), " % of the variance.")],
    5: () => [h("h4", {}, "Step 5: project"), eq(sub(mi("X"), mi("p")), mo("="), XC, sub(mi("𝐯"), mn(1)), mo("="), mo("±"), column(projected)), h("p", {}, "Two numbers a row have become one, with the greatest variance that one number can keep: ", fixed(values[0], 4), ". What is lost has variance ", fixed(values[1], 4), ".")],
  }[step]();
}

function picture(step, { data, centre, centred, vectors, values, projected }) {
  const rows = step === 1 ? data : centred, size = 260, far = Math.max(...data.flat().map(Math.abs), 1) * 1.2;
  const half = step === 1 ? far : Math.max(1, ...centred.flat().map(Math.abs)) * 1.35;
  const at = ([a, b]) => (step === 1 ? [30 + (a / far) * (size - 50), size - 30 - (b / far) * (size - 50)] : [size / 2 + (a / half) * (size / 2 - 8), size / 2 - (b / half) * (size / 2 - 8)]);
  const svg = s("svg", { viewBox: `0 0 ${size} ${size}`, class: "chart square", role: "img", "aria-label": `the three rows in the plane at step ${step}` });
  const [ox, oy] = at([0, 0]);
  svg.append(s("line", { class: "rule", x1: 0, x2: size, y1: oy, y2: oy }), s("line", { class: "rule", x1: ox, x2: ox, y1: 0, y2: size }));
  const along = (v, t) => at(v.map((c) => c * t));
  if (step === 3 || step === 4) {
    const scale = (size / 2 - 8) / half, angle = (-Math.atan2(vectors[0][1], vectors[0][0]) * 180) / Math.PI;
    svg.append(s("ellipse", { class: "ellipse", cx: ox, cy: oy, rx: Math.sqrt(Math.max(0, values[0])) * scale, ry: Math.max(1, Math.sqrt(Math.max(0, values[1])) * scale), transform: `rotate(${angle} ${ox} ${oy})` }));
  }
  if (step >= 4) {
    const [a, b] = [along(vectors[0], -2 * half), along(vectors[0], 2 * half)];
    svg.append(s("line", { class: "curve tone-1", x1: a[0], y1: a[1], x2: b[0], y2: b[1] }));
  }
  if (step === 4) { const b = along(vectors[1], Math.max(0.25 * half, Math.sqrt(Math.max(0, values[1])))); svg.append(s("line", { class: "curve tone-2", x1: ox, y1: oy, x2: b[0], y2: b[1] })); }
  rows.forEach((x, i) => {
    const p = at(x);
    if (step === 5) { const q = along(vectors[0], projected[i]); svg.append(s("line", { class: "drop", x1: p[0], y1: p[1], x2: q[0], y2: q[1] }), s("circle", { class: "dot tone-1", cx: q[0], cy: q[1], r: 4 })); }
    svg.append(s("circle", { class: "dot tone-3", cx: p[0], cy: p[1], r: 5 }));
  });
  if (step === 1) { const p = at(centre); svg.append(s("circle", { class: "hollow", cx: p[0], cy: p[1], r: 6 }), s("text", { class: "tick", x: p[0] + 10, y: p[1] + 12 }, "mean")); }
  return svg;
}

function scree(pca) {
  const { spectrum, total_variance: total, latents } = pca;
  if (!spectrum?.length) return nothing("This artifact tells no eigenvalues: its rows are too wide for a covariance.");
  let sum = 0;
  const cumulated = spectrum.map((v) => (sum += v) / total);
  const shown = Math.min(spectrum.length, Math.max(2 * latents, 24));
  return [h("p", { class: "quiet" }, `${latents} of ${spectrum.length} components are kept. They carry ${fixed(100 * cumulated[latents - 1], 1)} % of the variance.`),
    bars({ values: spectrum.slice(0, shown).map((v) => (100 * v) / total), on: (i) => i < latents, xLabel: "component", yLabel: "% of variance", label: `share of the variance by component; the first ${latents} are kept` }),
    bars({ values: cumulated.slice(0, shown).map((v) => 100 * v), on: (i) => i < latents, top: 100, height: 170, xLabel: "components together", yLabel: "% of variance", label: "share of the variance that the first components carry together" })];
}

/** The rows that a step along each latent adds to the output, raw units: decode(e_k) - decode(0). */
async function directions(model) {
  const outputs = await decode(model, [zeros(model.latents), ...Array.from({ length: model.latents }, (_, k) => unit(k, model.latents))]);
  return outputs.slice(1).map((x) => Array.from(minus(x, outputs[0])));
}

async function components(pca) {
  const rows = await directions(pca);
  const said = h("p", { class: "quiet", role: "status" }, isPicture(pca) ? "Orange pixels brighten along the component, blue ones darken." : "Choose a component to see its features.");
  const loadings = h("div", { class: "features" });
  const show = (k) => {
    const order = rows[k].map((v, i) => i).sort((a, b) => Math.abs(rows[k][b]) - Math.abs(rows[k][a])).slice(0, 12), most = Math.abs(rows[k][order[0]]) || 1;
    state.set({ component: k + 1 });
    said.textContent = `Component ${k + 1}: what one unit of its score adds, in raw units, largest first.`;
    loadings.replaceChildren(...order.map((i) => {
      const fill = h("span", { class: rows[k][i] < 0 ? "fill below" : "fill above" });
      fill.style.width = `${(100 * Math.abs(rows[k][i])) / most}%`;
      return h("div", { class: "feature" }, h("span", { class: "name" }, nameOf(pca, i)), h("span", { class: "bar" }, fill), h("span", { class: "value" }, number(rows[k][i]), pca.features[i].unit ? ` ${pca.features[i].unit}` : ""));
    }));
  };
  const kept = state.number("component", 0);
  if (rows[kept - 1]) show(kept - 1);
  return [said, h("div", { class: "strip components" }, rows.map((v, k) => h("button", { type: "button", class: "tile-button", "aria-label": `component ${k + 1}`, onclick: () => show(k) }, tile(pca, v, "", paintSigned), h("small", {}, String(k + 1))))), loadings];
}

async function against(pca, models) {
  const like = models.filter((m) => m.name !== pca.name && m.shape.join() === pca.shape.join());
  if (!like.length) return nothing("Serve a second model of the same rows to compare with, such as a linear autoencoder: ", h("code", {}, "elbo train DATA --model ae --hidden none --name linear"), ".");
  const linear = (await Promise.all(like.map(detail))).find((m) => m.kind === "ae" && m.training.hidden?.length === 0);
  const asked = state.get("against");
  const first = like.find((m) => m.name === asked)?.name ?? linear?.name ?? like[0].name;
  const result = new Place(), own = directions(pca);
  const compare = (name) => result.fill(async () => {
    const other = await detail(like.find((m) => m.name === name));
    const found = principalAngles(await own, await directions(other)).map((a) => (a * 180) / Math.PI);
    const flat = other.kind === "pca" || (other.kind === "ae" && other.training.hidden?.length === 0);
    const middle = found[found.length >> 1];
    return [h("p", {}, h("strong", {}, `Median angle ${fixed(middle, 1)}°, largest ${fixed(found.at(-1), 1)}°. `), flat ? "This model is linear: the closer to 0°, the more its subspace is PCA's. A last angle may stay large: where two eigenvalues are nearly equal, the direction between them is free to turn." : `This is ${KINDS[other.kind] ?? other.kind} with a curved decoder; these are the directions in which it leaves the middle of its code.`),
      bars({ values: found, top: 90, xLabel: "principal angle, ascending", yLabel: "degrees", label: `principal angles between ${pca.name} and ${other.name}: ${found.map((a) => fixed(a, 1)).join(", ")} degrees` })];
  });
  const select = choice("Compare with", like.map((m) => [m.name, `${m.name} (${KINDS[m.kind] ?? m.kind})`]), first, (name) => { state.set({ against: name }); compare(name); });
  compare(first);
  return [h("p", { class: "quiet" }, "The ", term("principal angles", "Between two subspaces: the smallest angle between a direction of one and a direction of the other, then the smallest at right angles to those, and so on (Björck & Golub 1973). All are zero where the subspaces are the same."), " between what both decoders span, found by decoding ", math(row(mn(0), mo(","), sub(mi("𝐞"), mn(1)), mo(","), mo("…"))), "."), h("div", { class: "line" }, select), result.element];
}

