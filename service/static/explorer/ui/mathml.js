// MathML as strings. Every string comes from a literal of this page or from a number, never from the user.

import { fixed } from "../lib/format.js";

/** A <math> element. With `block` it has a line of its own that the pointer and the keyboard can scroll. */
export function math(markup, block = false) {
  const template = document.createElement("template");
  template.innerHTML = `<math${block ? ' display="block" tabindex="0"' : ""}>${markup}</math>`;
  return template.content.firstElementChild;
}

export const mi = (name) => `<mi>${name}</mi>`;
export const mo = (operator) => `<mo>${operator}</mo>`;
export const mn = (number) => `<mn>${String(number).replace("-", "−")}</mn>`;
export const mtext = (text) => `<mtext>${text}</mtext>`;
export const mrow = (...parts) => `<mrow>${parts.join("")}</mrow>`;
export const mfrac = (numerator, denominator) => `<mfrac>${numerator}${denominator}</mfrac>`;
export const sub = (base, index) => `<msub>${base}${index}</msub>`;
export const sup = (base, power) => `<msup>${base}${power}</msup>`;
export const sumOver = (from, to) => `<munderover><mo>∑</mo>${from}${to}</munderover>`;
export const hat = (base) => `<mover accent="true">${base}<mo>^</mo></mover>`;
export const bar = (base) => `<mover accent="true">${base}<mo>¯</mo></mover>`;
export const parens = (...parts) => mrow(mo("("), ...parts, mo(")"));
export const braces = (...parts) => mrow(mo("{"), ...parts, mo("}"));

/** "a = b", with one or more parts on either side of the operator. */
export const equation = (left, ...right) => mrow(left, mo("="), ...right);

export const X = mi("𝐱");
export const Z = mi("𝐳");
export const MU = mi("𝛍");
export const SIGMA = mi("𝛔");
export const EPSILON = mi("𝛆");
export const PHI = mi("φ");
export const THETA = mi("θ");
export const LOG = "<mi>log</mi><mo>&#8289;</mo>";

/** 𝒩(0, I) */
export const STANDARD_NORMAL = mrow(mi("𝒩"), parens(mn(0), mo(","), mi("I")));
/** q_φ(z | x), the encoder's distribution */
export const ENCODER = mrow(sub(mi("q"), PHI), parens(Z, mo("|"), X));
/** p_θ(x | z), the decoder's distribution */
export const DECODER = mrow(sub(mi("p"), THETA), parens(X, mo("|"), Z));
/** z = μ + σ ⊙ ε */
export const REPARAMETERIZATION = equation(Z, MU, mo("+"), SIGMA, mo("⊙"), EPSILON);
/** ε ∼ 𝒩(0, I) */
export const NOISE = mrow(EPSILON, mo("∼"), STANDARD_NORMAL);

/** {x^index} for index = 1 … last */
export const indexedSet = (index, last) =>
  sub(braces(sup(X, mi(index))), equation(mi(index), mn(1), mo("…"), mi(last)));

/** A matrix. A cell is a number, shown with `digits` decimals, or markup. */
export function matrix(rows, digits) {
  const cell = (value) => `<mtd>${typeof value === "number" ? mn(fixed(value, digits)) : value}</mtd>`;
  const body = rows.map((cells) => `<mtr>${cells.map(cell).join("")}</mtr>`).join("");
  return mrow(mo("["), `<mtable>${body}</mtable>`, mo("]"));
}
