// The prior in the plane of the map. It is exact for a VAE and for PCA, and estimated from samples for other models.

import { covariance, eigen, mean, range, zeros } from "../lib/linear-algebra.js";
import { project } from "./projection.js";

const CONTOUR_MASSES = [0.393, 0.865, 0.989]; // a 2-D Gaussian's mass within 1, 2 and 3 standard deviations
const GRID_SIZE = 44; // cells per side of an estimated density

/** Whether the variance of the prior is known, so that no samples are needed to draw it. */
export const hasExactPrior = (model) =>
  model.kind === "vae" || (model.kind === "pca" && model.spectrum?.length >= model.latents);

/** {ellipse} if the prior is exact, otherwise {density}, estimated from `samples`. Null if there are no samples. */
export function priorInPlane(model, plane, samples) {
  if (hasExactPrior(model)) return { ellipse: ellipseInPlane(priorVariance(model), plane) };
  if (!samples.length) return null;
  return { density: estimateDensity(samples.map((z) => project(plane, z))) };
}

/** The variance of each latent under a VAE's or PCA's prior. */
function priorVariance(model) {
  if (model.kind === "vae") return new Array(model.latents).fill(1);
  const kept = model.spectrum.slice(0, model.latents);
  const discarded = model.total_variance - kept.reduce((a, b) => a + b, 0);
  const noise = Math.max(0, discarded / Math.max(1, model.width - model.latents));
  return kept.map((value) => Math.max(1e-12, value - noise));
}

/** The centre, the standard deviations and the angle of a centred Gaussian in the plane. */
function ellipseInPlane(variance, plane) {
  const { u, v } = plane;
  const product = (a, b) => a.reduce((sum, value, i) => sum + value * variance[i] * b[i], 0);
  const { values, vectors } = eigen([
    [product(u, u), product(u, v)],
    [product(u, v), product(v, v)],
  ]);
  return {
    centre: project(plane, zeros(variance.length)),
    radii: values.map(Math.sqrt),
    angle: Math.atan2(vectors[0][1], vectors[0][0]),
  };
}

/** A kernel density estimate on a grid (Scott's rule), and the levels that enclose CONTOUR_MASSES. */
function estimateDensity(points) {
  const centre = mean(points);
  const deviation = covariance(points, centre).map((row, i) => Math.sqrt(row[i]) || 1);
  const [bandwidthX, bandwidthY] = deviation.map((d) => d * points.length ** (-1 / 6));
  const kernel = ([a, b], [x, y]) => Math.exp(-0.5 * (((a - x) / bandwidthX) ** 2 + ((b - y) / bandwidthY) ** 2));
  const densityAt = (point) => points.reduce((sum, other) => sum + kernel(point, other), 0);
  const low = centre.map((c, i) => c - 4 * deviation[i]);
  const step = deviation.map((d) => (8 * d) / (GRID_SIZE - 1));
  const toPoint = ([i, j]) => [low[0] + i * step[0], low[1] + j * step[1]];
  const grid = range(GRID_SIZE).map((j) => range(GRID_SIZE).map((i) => densityAt(toPoint([i, j]))));
  return { grid, toPoint, levels: levelsEnclosing(points.map(densityAt)) };
}

function levelsEnclosing(densities) {
  const descending = densities.sort((a, b) => b - a);
  const last = descending.length - 1;
  return CONTOUR_MASSES.map((mass) => descending[Math.min(last, Math.floor(mass * descending.length))]);
}

/** The line segments of a density's contour at `level`, as pairs of points in the plane (marching squares). */
export function* contourSegments({ grid, toPoint }, level) {
  for (let j = 0; j + 1 < grid.length; j++) {
    for (let i = 0; i + 1 < grid[0].length; i++) {
      const crossings = cellCrossings(grid, i, j, level);
      for (let k = 0; k + 1 < crossings.length; k += 2) {
        yield [toPoint(crossings[k]), toPoint(crossings[k + 1])];
      }
    }
  }
}

/** Where the contour crosses the edges of a cell, in grid coordinates. */
function cellCrossings(grid, i, j, level) {
  const corners = [
    [i, j],
    [i + 1, j],
    [i + 1, j + 1],
    [i, j + 1],
  ];
  const crossings = [];
  corners.forEach(([a, b], k) => {
    const [c, d] = corners[(k + 1) % 4];
    const [from, to] = [grid[b][a], grid[d][c]];
    if (from < level === to < level) return;
    const t = (level - from) / (to - from);
    crossings.push([a + t * (c - a), b + t * (d - b)]);
  });
  return crossings;
}
