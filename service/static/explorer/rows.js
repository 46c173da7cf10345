// Rows as people see them: pictures, or bars by feature name and unit. And rows as people give them: CSV, JSON, npy.

import { colour, h, number } from "./dom.js";
import { Problem, fromNpy } from "./api.js";

export const isPicture = (model) => Boolean(model.pixel_range) && (model.shape.length === 2 || (model.shape.length === 3 && [1, 3].includes(model.shape[2])));
const MOST_BARS = 48;

/** Paints a row on `canvas`, a pixel a number: grey or colour for pictures, one bar a feature for tables. */
export function paint(canvas, model, row) {
  if (!isPicture(model)) return paintBars(canvas, model, row);
  const [low, high] = model.pixel_range;
  const channels = model.shape[2] ?? 1;
  return pixels(canvas, model.shape, (p) => [0, 1, 2].map((c) => (255 * (row[p * channels + (channels === 3 ? c : 0)] - low)) / (high - low)));
}

/** Paints signed numbers, blue below zero and orange above; `most` is the full colour. */
export function paintSigned(canvas, model, row, most = Math.max(1e-12, ...row.map(Math.abs))) {
  if (!isPicture(model)) return paintBars(canvas, model, row, [-most, most]);
  const channels = model.shape[2] ?? 1;
  const [from, below, above] = ["--tile", "--below", "--above"].map((name) => rgb(colour(name)));
  return pixels(canvas, model.shape, (p) => {
    let value = 0;
    for (let c = 0; c < channels; c++) value += row[p * channels + c] / channels;
    const t = Math.min(1, Math.abs(value) / most), to = value < 0 ? below : above;
    return from.map((v, c) => v + t * (to[c] - v));
  });
}

function pixels(canvas, [height, width], colourOf) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let p = 0; p < width * height; p++) image.data.set([...colourOf(p).map((v) => Math.max(0, Math.min(255, v))), 255], 4 * p);
  context.putImageData(image, 0, 0);
  return canvas;
}

function paintBars(canvas, model, row, range = null) {
  const size = 64, count = row.length;
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  context.fillStyle = colour("--tile");
  context.fillRect(0, 0, size, size);
  context.fillStyle = colour("--accent");
  const height = size / count;
  for (let i = 0; i < count; i++) {
    const feature = model.features?.[i], [low, high] = range ?? [feature?.minimum ?? -3, feature?.maximum ?? 3];
    const at = (v) => size * Math.max(0, Math.min(1, (v - low) / (high - low || 1)));
    const [from, to] = [at(range ? 0 : low), at(row[i])];
    context.fillRect(Math.min(from, to), i * height, Math.max(1, Math.abs(to - from)), Math.max(0.75, height - 1));
  }
  return canvas;
}

const rgb = (text) => text.match(/[\d.]+/g).slice(0, 3).map(Number);

/** A small picture of a row, with words for those who do not see it. */
export function tile(model, row, label, painter = paint) {
  const canvas = h("canvas", { class: isPicture(model) ? "tile" : "tile bars", ...(label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" }) });
  canvas.repaint = () => painter(canvas, model, row); // in the colours of the moment
  canvas.repaint();
  return canvas;
}

/** A row at full size: a picture, or a table of bars with names, units and values. `beside` is another row to compare with. */
export function figure(model, row, label, beside = null) {
  if (isPicture(model)) return tile(model, row, label);
  const order = row.length > MOST_BARS ? `the first ${MOST_BARS} of ${row.length} features` : null;
  const lines = Array.from(row.slice(0, MOST_BARS), (value, i) => {
    const feature = model.features[i];
    const at = (v) => Math.max(0, Math.min(1, (v - feature.minimum) / (feature.maximum - feature.minimum || 1)));
    const bar = h("span", { class: "bar" }), fill = h("span", { class: "fill" });
    fill.style.width = `${100 * at(value)}%`;
    bar.append(fill);
    if (beside) {
      const mark = h("span", { class: "mark" });
      mark.style.left = `${100 * at(beside[i])}%`;
      bar.append(mark);
    }
    return h("div", { class: "feature" }, h("span", { class: "name", title: feature.name }, feature.name), bar,
      h("span", { class: "value" }, Number.isNaN(value) || value === null ? "missing" : number(value), feature.unit ? ` ${feature.unit}` : ""));
  });
  return h("div", { class: "features", role: "group", "aria-label": label, tabindex: lines.length > 8 ? "0" : null }, lines, order ? h("p", { class: "quiet" }, order) : null);
}

/** What a number in a row is called. */
export const nameOf = (model, i) => model.features?.[i]?.name ?? `value ${i + 1}`;

/** The rows in `text`: JSON (a list, or {"inputs": ...}) or CSV with or without a header. Raises Problem. */
export function parseRows(text, model) {
  const trimmed = text.trim();
  if (!trimmed) throw new Problem("There is nothing to read: paste numbers, with commas between them.");
  const rows = /^[[{]/.test(trimmed) ? fromJson(trimmed, model) : fromCsv(trimmed, model);
  if (!rows.length) throw new Problem("There is a header and nothing below it.");
  rows.forEach((row, i) => {
    if (row.length !== model.width) throw new Problem(`Row ${i + 1} has ${row.length} numbers; ${model.name} expects ${model.width}.`);
    const bad = row.findIndex((v) => v !== null && !Number.isFinite(v));
    if (bad >= 0) throw new Problem(`Row ${i + 1}, ${nameOf(model, bad)}: this is no number.`);
  });
  return rows;
}

function fromJson(text, model) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Problem("This begins like JSON and is none.");
  }
  value = value.inputs ?? value.records ?? value;
  const list = Array.isArray(value) && (Array.isArray(value[0]) || typeof value[0] === "object") ? value : [value];
  const single = model.shape.length > 1 && Array.isArray(list[0]) && list[0].length === model.shape[1] && list.length === model.shape[0] && typeof list[0][0] === "number";
  return (single ? [list] : list).map((row) => (Array.isArray(row) ? row.flat(3) : model.features.map((f) => row[f.name] ?? null)));
}

function fromCsv(text, model) {
  const lines = text.split(/\r?\n/).filter((line) => line.trim()).map((line) => line.split(/[,;\t]/).map((cell) => cell.trim().replace(/^"(.*)"$/, "$1")));
  const headed = lines[0].some((cell) => cell !== "" && !Number.isFinite(Number(cell)) && cell.toLowerCase() !== "nan");
  const value = (cell) => (cell === "" || cell === undefined || cell.toLowerCase() === "nan" ? null : Number(cell));
  if (!headed) return lines.map((cells) => cells.map(value));
  const names = lines[0].map((name) => name.replace(/\s*\[[^\]]*\]$/, ""));
  const places = model.features.map((f) => { const at = names.indexOf(f.name); return at < 0 ? lines[0].indexOf(f.name) : at; });
  const missing = model.features.filter((_, i) => places[i] < 0).map((f) => f.name);
  if (missing.length) throw new Problem(`The header lacks ${missing.slice(0, 3).join(", ")}${missing.length > 3 ? ` and ${missing.length - 3} more` : ""}.`);
  return lines.slice(1).map((cells) => places.map((at) => value(cells[at])));
}

/** The rows of a file that the user chose: .npy, CSV or JSON. */
export async function readFile(file, model) {
  if (!file.name.endsWith(".npy")) return parseRows(await file.text(), model);
  const rows = fromNpy(await file.arrayBuffer());
  if (rows[0].length !== model.width) throw new Problem(`The rows of ${file.name} have ${rows[0].length} numbers; ${model.name} expects ${model.width}.`);
  return rows.map((row) => Array.from(row, (v) => (Number.isNaN(v) ? null : v)));
}

/** Reproducible noise: Mulberry's generator, and Box and Muller's normal numbers. */
export function normals(count, seed) {
  let a = seed >>> 0;
  const uniform = () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
  return Array.from({ length: count }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}
