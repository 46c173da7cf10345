// The latents that a map of a latent space shows.

import { getExhibit, postJson } from "../../lib/api.js";
import { mean, zeros } from "../../lib/linear-algebra.js";
import { hasExactPrior } from "../../map/prior.js";

const PRIOR_SAMPLES = 250; // enough to estimate the contours of a prior that has no formula

/**
 * `heldOut`: the model's held-out rows, or null.
 * `samples`: latents drawn from the prior, or an empty list if the map does not need them.
 * `codes`: the latents of the held-out rows, or `samples` if there are no held-out rows.
 * `points`: `codes` as a list of {z, label}.
 */
export async function loadCodes(model) {
  const heldOut = await getExhibit(model, "held-out");
  const samples = heldOut && hasExactPrior(model) ? [] : await samplePrior(model);
  const codes = heldOut?.latents ?? samples;
  const points = codes.map((z, i) => ({ z, label: heldOut?.labels?.[i] ?? null }));
  return { heldOut, samples, codes, points };
}

async function samplePrior(model) {
  const { latents } = await postJson("/sample", model, { n: PRIOR_SAMPLES, seed: 0 });
  return latents;
}

/** The centre of the prior, where the current point starts. If the prior has no formula, it is the mean of `codes`. */
export const centreOf = (model, codes) => (hasExactPrior(model) ? zeros(model.latents) : mean(codes));
