// Small linear algebra: what the map's directions, the PCA example and the principal angles need.

export const dot = (a, b) => { let sum = 0; for (let i = 0; i < a.length; i++) sum += a[i] * b[i]; return sum; };
export const plus = (a, b, factor = 1) => Array.from(a, (v, i) => v + factor * b[i]);
export const minus = (a, b) => Array.from(a, (v, i) => v - b[i]);
export const unit = (k, size) => Array.from({ length: size }, (_, i) => (i === k ? 1 : 0));
export const zeros = (size) => new Array(size).fill(0);

/** The mean of rows [N][K]. */
export function mean(rows) {
  const sum = zeros(rows[0].length);
  for (const row of rows) for (let i = 0; i < sum.length; i++) sum[i] += row[i];
  return sum.map((v) => v / rows.length);
}

/** The covariance [K][K] of rows [N][K] about `centre`, divided by N - 1. */
export function covariance(rows, centre) {
  const size = centre.length;
  const found = Array.from({ length: size }, () => zeros(size));
  for (const row of rows) {
    for (let i = 0; i < size; i++) {
      const a = row[i] - centre[i];
      for (let j = i; j < size; j++) found[i][j] += a * (row[j] - centre[j]);
    }
  }
  for (let i = 0; i < size; i++) for (let j = i; j < size; j++) found[j][i] = found[i][j] /= Math.max(1, rows.length - 1);
  return found;
}

/** Eigenvalues of a symmetric matrix, descending, and their unit vectors, by Jacobi's rotations. */
export function eigen(symmetric) {
  const size = symmetric.length;
  const a = symmetric.map((row) => Array.from(row));
  const v = Array.from({ length: size }, (_, i) => unit(i, size)); // rows are the vectors
  for (let sweep = 0; sweep < 60; sweep++) {
    let off = 0, all = 0;
    for (let i = 0; i < size; i++) for (let j = 0; j < size; j++) { all += a[i][j] ** 2; if (i !== j) off += a[i][j] ** 2; }
    if (off <= 1e-24 * all) break;
    for (let p = 0; p < size; p++) for (let q = p + 1; q < size; q++) if (a[p][q] !== 0) rotate(a, v, p, q);
  }
  const order = a.map((_, i) => i).sort((i, j) => a[j][j] - a[i][i]);
  return { values: order.map((i) => a[i][i]), vectors: order.map((i) => v[i]) };
}

function rotate(a, v, p, q) {
  const theta = (a[q][q] - a[p][p]) / (2 * a[p][q]);
  const t = (theta >= 0 ? 1 : -1) / (Math.abs(theta) + Math.hypot(theta, 1));
  const c = 1 / Math.hypot(t, 1), s = t * c;
  for (let k = 0; k < a.length; k++) [a[k][p], a[k][q]] = [c * a[k][p] - s * a[k][q], s * a[k][p] + c * a[k][q]];
  for (let k = 0; k < a.length; k++) {
    [a[p][k], a[q][k]] = [c * a[p][k] - s * a[q][k], s * a[p][k] + c * a[q][k]];
    [v[p][k], v[q][k]] = [c * v[p][k] - s * v[q][k], s * v[p][k] + c * v[q][k]];
  }
}

/** An orthonormal basis of what the rows span (Gram and Schmidt, twice); rows that add nothing are left out. */
export function basis(rows) {
  const found = [];
  for (const row of rows) {
    let rest = Array.from(row);
    for (let round = 0; round < 2; round++) for (const e of found) rest = plus(rest, e, -dot(rest, e));
    const length = Math.sqrt(dot(rest, rest));
    if (length > 1e-6 * Math.sqrt(dot(row, row)) && length > 0) found.push(rest.map((v) => v / length));
  }
  return found;
}

/** The principal angles between the spans of two sets of rows, radians, ascending (Björck & Golub 1973, sections 1-2). */
export function principalAngles(first, second) {
  const [a, b] = [basis(first), basis(second)];
  const inner = a.map((x) => b.map((y) => dot(x, y)));
  const gram = inner.map((x) => inner.map((y) => dot(x, y)));
  return eigen(gram).values.slice(0, Math.min(a.length, b.length)).map((c) => Math.acos(Math.sqrt(Math.min(1, Math.max(0, c)))));
}
