// Facts about a model and its rows, from the model's description.

export const KIND_NAMES = {
  pca: "principal component analysis",
  ae: "autoencoder",
  vae: "variational autoencoder",
  ensemble: "ensemble",
  adopted: "adopted network",
};

/** Whether the model encodes rows and decodes latents. An adopted network may only reconstruct and score rows. */
export const hasLatents = (model) => model.latents > 0;

/** The name of the model's kind in words. A kind that this page does not know is returned unchanged. */
export const kindName = (model) => KIND_NAMES[model.kind] ?? model.kind;

/** Whether the rows are images: of shape [height, width], or [height, width, channels] with 1 or 3 channels. */
export function isImage(model) {
  const { shape } = model;
  const hasImageShape = shape.length === 2 || (shape.length === 3 && [1, 3].includes(shape[2]));
  return Boolean(model.pixel_range) && hasImageShape;
}

export const featureName = (model, i) => model.features?.[i]?.name ?? `value ${i + 1}`;

export const medians = (model) => model.features.map((feature) => feature.median);

/** `row` with each missing value replaced by `fallback(i)`, where `i` is its index. */
export const fillMissing = (row, fallback) => row.map((value, i) => value ?? fallback(i));

export const sameShape = (a, b) => a.shape.join() === b.shape.join();

/** Whether the model is linear. The outputs of a linear decoder form a flat subspace. */
export const isLinear = (model) => model.kind === "pca" || (model.kind === "ae" && model.training.hidden?.length === 0);

/** The label of held-out row `i`, or "". */
export function labelOf(heldOut, i) {
  if (!heldOut?.labels) return "";
  return labelName(heldOut, heldOut.labels[i]);
}

export const labelName = (heldOut, label) => heldOut.label_names?.[label] ?? String(label);

/** The name of a held-out row, such as "held-out row 3, label 7". */
export function heldOutRowName(heldOut, i) {
  const label = labelOf(heldOut, i);
  return `held-out row ${i}${label ? `, label ${label}` : ""}`;
}
