// Diagrams of a model's networks and of the latents of a row.

import { fixed, number } from "../../lib/format.js";
import { svg } from "../../ui/dom.js";

const DEFAULT_LAYERS = { mlp: [256, 128], conv: [32, 64] }; // layer widths if training has no --hidden
const MAX_LATENTS = 32; // the maximum number of bars in the diagram of the latents
const NETWORK = { width: 150, height: 130, centre: 58 };
const CODE = { width: 150, height: 120 };

const hiddenLayers = ({ kind, training }) =>
  kind === "pca" ? [] : (training.hidden ?? DEFAULT_LAYERS[training.network] ?? []);

/** The networks in words, such as "layers of 256, 128". */
export function describeLayers(model) {
  if (model.kind === "pca") return "a projection on the principal components";
  const { network, dense } = model.training;
  const hidden = hiddenLayers(model);
  if (!hidden.length) return "one linear map";
  return `${network === "conv" ? "convolutions of" : "layers of"} ${[...hidden, ...(dense ?? [])].join(", ")}`;
}

/** A diagram of the encoder and one of the decoder. */
export function networkDiagrams(model) {
  const layers = [...hiddenLayers(model), ...(model.training.dense ?? [])];
  const codeWidth = model.latents * (model.kind === "vae" ? 2 : 1); // a VAE has a mean and a variance per latent
  const encoder = [model.width, ...layers, codeWidth];
  const decoder = [model.latents, ...layers.toReversed(), model.width];
  return [
    networkDiagram(encoder, `encoder: ${encoder.join(" to ")}`),
    networkDiagram(decoder, `decoder: ${decoder.join(" to ")}`),
  ];
}

/** Layers as vertical bars. The height of a bar grows with the logarithm of the layer's width. */
function networkDiagram(widths, label) {
  const { width, height, centre } = NETWORK;
  const largest = Math.log2(Math.max(...widths) + 1);
  const x = (i) => 14 + (i * (width - 28)) / (widths.length - 1);
  const halfHeight = (w) => 6 + (44 * Math.log2(w + 1)) / largest;
  const above = widths.map((w, i) => `${x(i)},${centre - halfHeight(w)}`);
  const below = widths.map((w, i) => `${x(i)},${centre + halfHeight(w)}`);
  const diagram = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "network", role: "img", "aria-label": label });
  diagram.append(svg("polygon", { class: "funnel", points: [...above, ...below.reverse()].join(" ") }));
  diagram.append(svg("path", { class: "data-flow", d: `M 4 ${centre} H ${width - 4}` }));
  widths.forEach((w, i) => {
    const bar = { x: x(i) - 3, y: centre - halfHeight(w), width: 6, height: 2 * halfHeight(w), rx: 3 };
    diagram.append(svg("rect", { class: "layer", ...bar }));
    // Neighbouring numbers alternate between two heights, so that they do not overlap.
    diagram.append(svg("text", { class: "tick middle", x: x(i), y: i % 2 ? 127 : 118 }, String(w)));
  });
  return diagram;
}

/** The latents of a row as vertical bars about zero, with their standard deviations as whiskers. */
export function codeChart(z, std = null) {
  const { width, height } = CODE;
  const shown = z.slice(0, MAX_LATENTS);
  const deviation = (i) => std?.[i] ?? 0;
  const largest = Math.max(1e-9, ...shown.map((v, i) => Math.abs(v) + deviation(i)));
  const middle = height / 2;
  const y = (v) => middle - (v / largest) * (middle - 4);
  const step = width / shown.length;
  const label = `latents: ${shown.map((v) => fixed(v)).join(", ")}`;
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "code", role: "img", "aria-label": label });
  chart.append(svg("line", { class: "rule", x1: 0, x2: width, y1: middle, y2: middle }));
  shown.forEach((v, i) => {
    const top = Math.min(y(v), middle);
    const box = { x: (i + 0.15) * step, width: step * 0.7, y: top, height: Math.max(0.5, Math.abs(y(v) - middle)) };
    const text = `z${i + 1} = ${number(v)}${deviation(i) ? `, σ ${number(deviation(i))}` : ""}`;
    chart.append(svg("rect", { class: v < 0 ? "negative" : "positive", ...box }, svg("title", {}, text)));
    if (deviation(i)) chart.append(whisker((i + 0.5) * step, y(v - deviation(i)), y(v + deviation(i))));
  });
  return chart;
}

const whisker = (x, y1, y2) => svg("line", { class: "whisker", x1: x, x2: x, y1, y2 });
