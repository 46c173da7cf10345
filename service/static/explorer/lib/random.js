// Reproducible random numbers.

/** A generator of uniform numbers in [0, 1): mulberry32 by Tommy Ettinger. */
function mulberry32(seed) {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

/** `count` standard normal numbers (Box-Muller transform). */
export function normals(count, seed) {
  const uniform = mulberry32(seed);
  return Array.from({ length: count }, () => {
    const radius = Math.sqrt(-2 * Math.log(1 - uniform()));
    return radius * Math.cos(2 * Math.PI * uniform());
  });
}

/** The standard normal cumulative distribution function (Abramowitz & Stegun 7.1.26). */
export const normalCdf = (x) => 0.5 * (1 + erf(x / Math.SQRT2));

function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const polynomial = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t;
  const y = 1 - polynomial * Math.exp(-x * x);
  return x < 0 ? -y : y;
}
