// How a model learnt: the algorithm's eleven steps beside its own curves, its card, and which of its latents live.

import { exhibit } from "../api.js";
import { EPSILON, MU, SIGMA, X, Z, button, card, fixed, frac, h, hat, math, mi, mn, mo, number, row, segmented, sub, sup, term } from "../dom.js";
import { bars, curves, legend } from "../charts.js";
import { markdown } from "../markdown.js";
import { Place, nothing } from "../say.js";
import { state } from "../state.js";

export const title = "Training";
const LOG = "<mi>log</mi><mo>&#8289;</mo>";
const PHI = mi("φ"), THETA = mi("θ"), L = (name) => sub(mi("ℒ"), `<mtext>${name}</mtext>`);
const Q = row(sub(mi("q"), PHI), mo("("), Z, mo("|"), X, mo(")")), P = row(sub(mi("p"), THETA), mo("("), X, mo("|"), Z, mo(")"));
const m = (...parts) => math(row(...parts));
const STEPS = [
  ["Initialize encoder ", m(Q), " and decoder ", m(P)],
  ["for ", m(mi("e"), mo("="), mn(1), mo("…"), mi("E")), ":"],
  ["Shuffle training data"],
  ["for each minibatch ", m(sub(row(mo("{"), sup(X, mi("j")), mo("}")), row(mi("j"), mo("="), mn(1), mo("…"), mi("m")))), ":"],
  ["Encode: ", m(MU, mo(","), sup(SIGMA, mn(2)), mo("="), Q)],
  ["Sample: ", m(Z, mo("="), MU, mo("+"), SIGMA, mo("⊙"), EPSILON), ", ", m(EPSILON, mo("∼"), mi("𝒩"), mo("("), mn(0), mo(","), mi("I"), mo(")"))],
  ["Decode: ", m(hat(X), mo("="), P)],
  ["Reconstruction: ", m(L("rec"), mo("="), mo("−"), LOG, sub(mi("p"), THETA), mo("("), X, mo("|"), Z, mo(")"))],
  ["KL: ", m(L("KL"), mo("="), mo("−"), frac(mn(1), mn(2)), mo("∑"), mo("("), mn(1), mo("+"), LOG, sup(mi("σ"), mn(2)), mo("−"), sup(mi("μ"), mn(2)), mo("−"), sup(mi("σ"), mn(2)), mo(")"))],
  ["Total loss: ", m(mi("ℒ"), mo("="), L("rec"), mo("+"), mi("β"), L("KL"))],
  ["Update ", m(PHI, mo(","), THETA), " via backpropagation"],
];
const DEPTH = [0, 0, 1, 1, 2, 2, 2, 2, 2, 2, 2];
const TERMS = { 8: ["reconstruction", "reconstruction_error"], 9: ["kl"], 10: ["loss", "elbo", "held_out_loss"] };
const APART = ["epoch", "step", "seconds", "learning_rate", "beta", "kl_weight"];

export function render(place, { model }) {
  const view = { model, chosen: state.get("terms", "all"), redraw: () => {} };
  place.append(h("p", { class: "lead" }, "A VAE maximises the ", term("ELBO", "The evidence lower bound: E[log p(x|z)] minus the KL divergence of q(z|x) from the prior. It lies below log p(x), and training pushes it up."), ", the ",
    "evidence lower bound this project is named after: ", math(row(LOG, mi("p"), mo("("), X, mo(")"), mo("≥"), sub(mi("𝔼"), mi("q")), mo("["), LOG, P, mo("]"), mo("−"), sub(mi("D"), `<mtext>KL</mtext>`), mo("("), Q, mo("‖"), mi("p"), mo("("), Z, mo(")"), mo(")")), true)),
    h("div", { class: "columns" }, algorithm(view), losses(view)), collapse(model), modelCard(model));
}

function algorithm(view) {
  const lines = STEPS.map((parts, i) => {
    const terms = TERMS[i + 1]?.filter((name) => view.model.history?.some((epoch) => name in epoch));
    const place = h("li", { class: `depth-${DEPTH[i]}` }, h("span", {}, parts));
    if (terms?.length) place.append(button("its curve", () => view.choose(String(i + 1)), { class: "small", "aria-label": `show the curve of step ${i + 1}` }));
    return place;
  });
  const { data, training, latents } = view.model;
  return card("Train a VAE, in eleven steps", h("p", { class: "quiet" }, "Input: data ", m(sub(row(mo("{"), sup(X, mi("i")), mo("}")), row(mi("i"), mo("="), mn(1), mo("…"), mi("n")))), `. This model: ${data.fit} rows to fit, batches of ${training.batch_size ?? "all"}, ${latents} latents.`),
    h("ol", { class: "algorithm" }, lines), h("p", { class: "key" }, h("strong", {}, "The reparameterization trick. "), "Written as ", m(Z, mo("="), MU, mo("+"), SIGMA, mo("⊙"), EPSILON), ", the sample has a derivative, so step 11 reaches the encoder."));
}

function losses(view) {
  const { model } = view, history = model.history ?? [];
  const names = history.length ? Object.keys(history[history.length - 1]).filter((name) => !APART.includes(name) && Number.isFinite(history.at(-1)[name])) : [];
  if (!names.length) return card("Loss curves", nothing(model.kind === "pca" ? "PCA has no curve: it is found at once, by eigendecomposition. Choose a VAE or an autoencoder above." : "This artifact recorded no history."));
  const options = [["all", "All"], ...names.map((name) => [name, readable(name)])];
  const place = h("div"), radios = h("div");
  view.choose = (asked) => {
    const wanted = TERMS[asked] ?? (names.includes(asked) ? [asked] : names);
    view.chosen = TERMS[asked] || names.includes(asked) ? asked : "all";
    state.set({ terms: view.chosen === "all" ? null : view.chosen });
    const chosen = names.filter((name) => wanted.includes(name));
    radios.replaceChildren(segmented("Curve", options, chosen.length === 1 ? chosen[0] : "all", view.choose));
    const lines = chosen.map((name) => ({ name: readable(name), tone: (names.indexOf(name) % 6) + 1, dash: name.startsWith("held"), points: history.filter((e) => Number.isFinite(e[name])).map((e) => [e.epoch, e[name]]) }));
    const best = history.reduce((a, b) => ((b.held_out_loss ?? Infinity) < (a.held_out_loss ?? Infinity) ? b : a));
    place.replaceChildren(legend(lines), curves({ lines, marks: [{ x: best.epoch, text: `best epoch ${best.epoch}`, tone: 2 }], height: 300, xLabel: "epoch", yLabel: model.kind === "vae" ? "nats a row" : "loss", label: `${lines.map((l) => `${l.name} from ${number(l.points[0][1])} to ${number(l.points.at(-1)[1])}`).join("; ")}, over ${history.length} epochs` }));
  };
  view.choose(view.chosen);
  const figures = ["elbo", "reconstruction", "kl"].filter((name) => name in model.metrics);
  return card("Loss curves", radios, place, figures.length ? h("p", { class: "quiet" }, "On held-out rows now: ", figures.map((name) => `${readable(name)} ${number(model.metrics[name])}`).join(", "), " nats a row.") : null);
}

const readable = (name) => ({ kl: "KL", elbo: "ELBO" })[name] ?? name.replaceAll("_", " ");

function collapse(model) {
  const report = model.latent_report ?? [];
  if (!report.length) return card("Which latents live", nothing("This artifact has no report of its latents."));
  const priced = report.every((latent) => latent.kl !== null), dead = report.filter((latent) => !latent.active).length;
  const order = report.map((_, i) => i).sort((a, b) => (priced ? report[b].kl - report[a].kl : report[b].variance - report[a].variance));
  const total = report.reduce((sum, latent) => sum + (latent.kl ?? 0), 0);
  return card("Which latents live", h("p", {}, dead ? h("strong", {}, `${dead} of ${report.length} latents are dead. `) : h("strong", {}, `All ${report.length} latents are alive. `),
    term("Posterior collapse", "A latent dies where telling it costs more KL than its reconstruction gains: its eigenvalue lies below β times the decoder's variance. The decoder then ignores it (Lucas et al. 2019)."),
    dead ? " cost these: ask for fewer latents, lower β, or warm the KL term up." : " has spared them.", priced ? ` A code costs ${fixed(total, 1)} nats, ${fixed(total / Math.LN2, 1)} bits.` : ""),
    bars({ values: order.map((i) => (priced ? report[i].kl : report[i].variance)), on: (i) => report[order[i]].active, xLabel: "latents, the most active first", yLabel: priced ? "KL, nats" : "variance", label: `${priced ? "KL" : "variance"} of each latent, the most active first` }),
    h("p", { class: "quiet" }, "In this order: ", order.map((i) => `${i + 1}${report[i].active ? "" : " (dead)"}`).join(", "), "."));
}

function modelCard(model) {
  const place = new Place("markdown");
  place.fill(async () => {
    const text = await exhibit(model, "card");
    return text === null ? nothing("This artifact carries no card; one lies in runs/ where it was trained.") : markdown(text).slice(1);
  });
  return card("Model card", place.element);
}
