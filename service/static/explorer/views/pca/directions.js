// The directions in data space along which a decoder moves.

import { decode } from "../../lib/api.js";
import { range, subtract, unitVector, zeros } from "../../lib/linear-algebra.js";

/** decode(e_k) - decode(0) for each latent k, in raw units. The directions of a linear model span its subspace. */
export async function decoderDirections(model) {
  const { latents } = model;
  const units = range(latents).map((k) => unitVector(k, latents));
  const [origin, ...outputs] = await decode(model, [zeros(latents), ...units]);
  return outputs.map((output) => subtract(output, origin));
}
