// A figure of a row: the image itself, or one bar per feature.

import { number, withUnit } from "../lib/format.js";
import { clamp } from "../lib/linear-algebra.js";
import { isImage } from "../lib/model.js";
import { cssColour, toRgb } from "./colours.js";
import { bar, h } from "./dom.js";

const MAX_BARS = 48;
const MAX_BARS_WITHOUT_SCROLLING = 8;
const THUMBNAIL_SIZE = 64; // pixels: the width and height of the small figure of a table row
const DEFAULT_RANGE = [-3, 3]; // for a feature whose range is not in the model's description
const EPSILON = 1e-12; // avoids a division by zero

/** Paint a row on `canvas`: an image is painted pixel by pixel, a table row as one bar per feature. */
export function paint(canvas, model, row) {
  if (!isImage(model)) {
    const ranges = Array.from(row, (_, i) => featureRange(model, i));
    paintBars(canvas, row, ranges, ([low]) => low);
    return;
  }
  const [low, high] = model.pixel_range;
  const channels = model.shape[2] ?? 1;
  const toByte = (value) => (255 * (value - low)) / (high - low);
  paintPixels(canvas, model.shape, (pixel) =>
    [0, 1, 2].map((c) => toByte(row[pixel * channels + (channels === 3 ? c : 0)])),
  );
}

/** Paint signed numbers: orange above zero, blue below. The largest magnitude gets the full colour. */
export function paintSigned(canvas, model, row) {
  const largest = Math.max(EPSILON, ...row.map(Math.abs));
  if (!isImage(model)) {
    paintBars(canvas, row, new Array(row.length).fill([-largest, largest]), () => 0);
    return;
  }
  const [neutral, negative, positive] = ["--tile", "--negative", "--positive"].map((name) => toRgb(cssColour(name)));
  const channels = model.shape[2] ?? 1;
  paintPixels(canvas, model.shape, (pixel) => {
    const value = meanOfChannels(row, pixel, channels);
    const strength = Math.min(1, Math.abs(value) / largest);
    const target = value < 0 ? negative : positive;
    return neutral.map((v, c) => v + strength * (target[c] - v));
  });
}

function meanOfChannels(row, pixel, channels) {
  let sum = 0;
  for (let c = 0; c < channels; c++) sum += row[pixel * channels + c];
  return sum / channels;
}

/** Paint an image from `colourOf(pixel)`, which returns [red, green, blue]. */
function paintPixels(canvas, [height, width], colourOf) {
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let pixel = 0; pixel < width * height; pixel++) {
    const rgb = colourOf(pixel).map((v) => clamp(v, 0, 255));
    image.data.set([...rgb, 255], 4 * pixel);
  }
  context.putImageData(image, 0, 0);
}

/** Paint each row[i] as a horizontal bar. The canvas spans `ranges[i]`. The bar starts at `baseline(ranges[i])`. */
function paintBars(canvas, row, ranges, baseline) {
  const size = THUMBNAIL_SIZE;
  canvas.width = size;
  canvas.height = size;
  const context = canvas.getContext("2d");
  context.fillStyle = cssColour("--tile");
  context.fillRect(0, 0, size, size);
  context.fillStyle = cssColour("--accent");
  const height = size / row.length;
  ranges.forEach(([low, high], i) => {
    const toX = (value) => size * clamp((value - low) / (high - low || 1), 0, 1);
    const [from, to] = [toX(baseline([low, high])), toX(row[i])];
    const width = Math.max(1, Math.abs(to - from));
    context.fillRect(Math.min(from, to), i * height, width, Math.max(0.75, height - 1));
  });
}

function featureRange(model, i) {
  const feature = model.features?.[i];
  return [feature?.minimum ?? DEFAULT_RANGE[0], feature?.maximum ?? DEFAULT_RANGE[1]];
}

/** A small figure of a row. Without a label it is hidden from screen readers. */
export function thumbnail(model, row, label, painter = paint) {
  const accessibility = label ? { role: "img", "aria-label": label } : { "aria-hidden": "true" };
  const canvas = h("canvas", { class: isImage(model) ? "tile" : "tile bars", ...accessibility });
  canvas.repaint = () => painter(canvas, model, row); // called when the theme changes
  canvas.repaint();
  return canvas;
}

/** A row at full size: an image, or bars with names, units and values. `reference` is a row to compare with. */
export function rowFigure(model, row, label, reference = null) {
  if (isImage(model)) return thumbnail(model, row, label);
  const features = Array.from(row.slice(0, MAX_BARS), (value, i) => featureBar(model, i, value, reference));
  const isCut = row.length > MAX_BARS;
  const note = isCut ? h("p", { class: "muted" }, `The first ${MAX_BARS} of ${row.length} features.`) : null;
  const canScroll = features.length > MAX_BARS_WITHOUT_SCROLLING;
  const attributes = { class: "features", role: "group", "aria-label": label, tabindex: canScroll ? "0" : null };
  return h("div", attributes, features, note);
}

/** A feature's name, its value, and a bar on a scale from its minimum to its maximum, with a mark at the reference. */
function featureBar(model, i, value, reference) {
  const { name, unit, minimum, maximum } = model.features[i];
  const share = (v) => clamp((v - minimum) / (maximum - minimum || 1), 0, 1);
  const element = bar(share(value));
  if (reference) {
    const mark = h("span", { class: "mark" });
    mark.style.left = `${100 * share(reference[i])}%`;
    element.append(mark);
  }
  const text = value === null || Number.isNaN(value) ? "missing" : number(value);
  const nameCell = h("span", { class: "name", title: name }, name);
  return h("div", { class: "feature" }, nameCell, element, h("span", { class: "value" }, withUnit(text, unit)));
}
