// Noise and occlusion on a row.

import { clamp } from "../../lib/linear-algebra.js";
import { isImage } from "../../lib/model.js";
import { normalCdf, normals } from "../../lib/random.js";

/** `row` with normal noise on every value and the share `hide` of the values hidden. Missing values stay missing. */
export function corrupt(model, row, { noise, hide, seed }) {
  const random = normals(model.width * 2, seed);
  const noises = random.slice(0, model.width);
  const isHidden = isImage(model) ? hiddenPixels(model.shape, hide) : hiddenFeatures(random.slice(model.width), hide);
  return Array.from(row, (value, i) => {
    if (value === null) return null;
    if (isHidden(i)) return hiddenValue(model, i);
    return addNoise(model, i, value, noise * noises[i]);
  });
}

const hiddenValue = (model, i) => (isImage(model) ? model.pixel_range[0] : model.features[i].median);

/** `value` with noise, whose size is a share of the feature's range. A pixel stays in its range. */
function addNoise(model, i, value, noise) {
  if (noise === 0) return value;
  const [low, high] = isImage(model) ? model.pixel_range : featureRange(model.features[i]);
  const noisy = value + noise * (high - low);
  return isImage(model) ? clamp(noisy, low, high) : noisy;
}

const featureRange = ({ minimum, maximum }) => [minimum, maximum];

/** A predicate for the pixels of a central square that covers `share` of the image. */
function hiddenPixels([height, width, channels = 1], share) {
  const halfHeight = (Math.sqrt(share) * height) / 2;
  const halfWidth = (Math.sqrt(share) * width) / 2;
  return (i) => {
    const pixel = Math.floor(i / channels);
    const line = Math.floor(pixel / width) + 0.5;
    const column = (pixel % width) + 0.5;
    const isInside = Math.abs(line - height / 2) < halfHeight && Math.abs(column - width / 2) < halfWidth;
    return share > 0 && isInside;
  };
}

/** A predicate that hides each feature with probability `share`. */
const hiddenFeatures = (random, share) => (i) => normalCdf(random[i]) < share;
