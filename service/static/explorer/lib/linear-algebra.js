// Small linear algebra for the latent map, the PCA example and principal angles. A matrix is an array of rows.

const MAX_SWEEPS = 60;
const CONVERGED = 1e-24; // the share of the sum of squares that may remain off the diagonal

export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

/** a + factor * b */
export const add = (a, b, factor = 1) => Array.from(a, (v, i) => v + factor * b[i]);
export const subtract = (a, b) => Array.from(a, (v, i) => v - b[i]);
export const zeros = (size) => new Array(size).fill(0);
export const range = (size) => Array.from({ length: size }, (_, i) => i);
export const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

/** The k-th standard basis vector. */
export const unitVector = (k, size) => range(size).map((i) => (i === k ? 1 : 0));

/** The mean of rows [N][K]. */
export function mean(rows) {
  const sum = zeros(rows[0].length);
  for (const row of rows) {
    for (let i = 0; i < sum.length; i++) sum[i] += row[i];
  }
  return sum.map((v) => v / rows.length);
}

/** The covariance [K][K] of rows [N][K] about `centre`, divided by N - 1. */
export function covariance(rows, centre) {
  const size = centre.length;
  const matrix = range(size).map(() => zeros(size));
  for (const row of rows) {
    for (let i = 0; i < size; i++) {
      const deviation = row[i] - centre[i];
      for (let j = i; j < size; j++) matrix[i][j] += deviation * (row[j] - centre[j]);
    }
  }
  const divisor = Math.max(1, rows.length - 1);
  for (let i = 0; i < size; i++) {
    for (let j = i; j < size; j++) {
      matrix[i][j] /= divisor;
      matrix[j][i] = matrix[i][j];
    }
  }
  return matrix;
}

/** Eigenvalues of a symmetric matrix in descending order, and their unit eigenvectors (cyclic Jacobi method). */
export function eigen(symmetric) {
  const size = symmetric.length;
  const a = symmetric.map((row) => Array.from(row));
  const vectors = range(size).map((i) => unitVector(i, size));
  for (let sweep = 0; sweep < MAX_SWEEPS && !isDiagonal(a); sweep++) {
    for (let p = 0; p < size; p++) {
      for (let q = p + 1; q < size; q++) {
        if (a[p][q] !== 0) rotate(a, vectors, p, q);
      }
    }
  }
  const order = range(size).sort((i, j) => a[j][j] - a[i][i]);
  return { values: order.map((i) => a[i][i]), vectors: order.map((i) => vectors[i]) };
}

function isDiagonal(a) {
  let offDiagonal = 0;
  let total = 0;
  for (let i = 0; i < a.length; i++) {
    for (let j = 0; j < a.length; j++) {
      total += a[i][j] ** 2;
      if (i !== j) offDiagonal += a[i][j] ** 2;
    }
  }
  return offDiagonal <= CONVERGED * total;
}

/** One Jacobi rotation: make a[p][q] zero, and turn the vectors p and q with it. */
function rotate(a, vectors, p, q) {
  const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
  const t = (theta >= 0 ? 1 : -1) / (Math.abs(theta) + Math.hypot(theta, 1));
  const c = 1 / Math.hypot(t, 1);
  const s = t * c;
  for (const row of a) [row[p], row[q]] = [c * row[p] - s * row[q], s * row[p] + c * row[q]];
  for (const matrix of [a, vectors]) {
    const [x, y] = [matrix[p], matrix[q]];
    matrix[p] = x.map((v, k) => c * v - s * y[k]);
    matrix[q] = x.map((v, k) => s * v + c * y[k]);
  }
}

/** An orthonormal basis of the span of `rows` (Gram-Schmidt with reorthogonalization). Dependent rows are dropped. */
export function orthonormalBasis(rows) {
  const basis = [];
  for (const row of rows) {
    let rest = Array.from(row);
    for (let pass = 0; pass < 2; pass++) {
      for (const e of basis) rest = add(rest, e, -dot(rest, e));
    }
    const length = Math.sqrt(dot(rest, rest));
    if (length > 1e-6 * Math.sqrt(dot(row, row)) && length > 0) basis.push(rest.map((v) => v / length));
  }
  return basis;
}

/** Principal angles between the spans of two sets of rows, radians, ascending (Björck & Golub 1973, sections 1-2). */
export function principalAngles(first, second) {
  const a = orthonormalBasis(first);
  const b = orthonormalBasis(second);
  const cosines = a.map((x) => b.map((y) => dot(x, y)));
  const gram = cosines.map((x) => cosines.map((y) => dot(x, y)));
  const squares = eigen(gram).values.slice(0, Math.min(a.length, b.length));
  return squares.map((square) => Math.acos(Math.sqrt(clamp(square, 0, 1))));
}
