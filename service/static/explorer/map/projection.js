// The plane through the latent space that the map shows. A plane is {origin, u, v, names}: u and v are unit vectors.

import { add, covariance, dot, eigen, mean, subtract, unitVector, zeros } from "../lib/linear-algebra.js";

/** The value of `axes` that selects the plane of the first two principal components. */
export const PRINCIPAL_AXES = "pc";

/**
 * The plane along two latents ("i,j"), or along the two principal components of `codes` ("pc"). The axes of the map
 * cross at latent 0. The axes of principal components cross at `centre` instead, the centre of the prior's contours.
 */
export function createPlane(codes, axes, centre) {
  const size = centre.length;
  if (size === 1) return { origin: [0], u: [1], v: [0], names: ["z₁", ""] };
  if (axes === PRINCIPAL_AXES) return principalPlane(codes, centre);
  const [i, j] = axes.split(",").map(Number);
  const names = [`latent ${i + 1}`, `latent ${j + 1}`];
  return { origin: zeros(size), u: unitVector(i, size), v: unitVector(j, size), names };
}

function principalPlane(codes, origin) {
  const { vectors } = eigen(covariance(codes, mean(codes)));
  return { origin, u: vectors[0], v: vectors[1], names: ["principal component 1", "principal component 2"] };
}

/** The coordinates [a, b] of the latent vector `z` in the plane. */
export function project(plane, z) {
  const difference = subtract(z, plane.origin);
  return [dot(plane.u, difference), dot(plane.v, difference)];
}

/** `z`, moved by (a, b) parallel to the plane. If there is only one latent, `b` is ignored. */
export const moveInPlane = (plane, z, a, b) => add(add(z, plane.u, a), plane.v, z.length > 1 ? b : 0);
