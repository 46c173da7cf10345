// Numbers as text, with a real minus sign (U+2212).

const withMinusSign = (text) => text.replace("-", "−");

/** `value` with `digits` decimals. A value that rounds to zero gets no minus sign. */
export function fixed(value, digits = 2) {
  const text = value.toFixed(digits);
  return withMinusSign(Number(text) === 0 ? text.replace("-", "") : text);
}

/** `value` with four significant digits; scientific notation for very large and very small numbers. */
export function number(value) {
  if (typeof value === "string") return value; // the level of a column of text
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return withMinusSign(text);
}

/** The first `limit` numbers of `z` in brackets. */
export function vector(z, limit = 8) {
  const numbers = Array.from(z.slice(0, limit), (v) => fixed(v));
  return `[${numbers.join(", ")}${z.length > limit ? ", …" : ""}]`;
}

export const percent = (share) => `${fixed(100 * share, 0)} %`;

/** "value unit", or only the value if the feature has no unit. */
export const withUnit = (text, unit) => (unit ? `${text} ${unit}` : text);

/** "name, unit", or only the name if the feature has no unit. */
export const nameWithUnit = ({ name, unit }) => (unit ? `${name}, ${unit}` : name);
