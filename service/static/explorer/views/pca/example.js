// PCA of three rows with two columns, step by step.

import { fixed, number } from "../../lib/format.js";
import { clamp, covariance, dot, eigen, mean, subtract } from "../../lib/linear-algebra.js";
import { state } from "../../lib/state.js";
import { button, card } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { bar, equation, math, matrix, mfrac, mi, mn, mo, mrow, sub, sup, X } from "../../ui/mathml.js";
import { drawStep } from "./example-plot.js";

const DEFAULT_DATA = [
  [1, 2],
  [2, 3],
  [3, 5],
];
const STEPS = ["Data", "Centre", "Covariance", "Eigenvectors", "Project"];
const DIGITS = 4;
const CENTRED = sub(mi("X"), mi("c"));

/** PCA of `data`, three rows of two numbers. The first nonzero number of each eigenvector is positive. */
function solve(data) {
  const centre = mean(data);
  const centred = data.map((row) => subtract(row, centre));
  const sigma = covariance(data, centre);
  const { values, vectors } = eigen(sigma);
  const signed = vectors.map(withPositiveStart);
  const projected = centred.map((row) => dot(row, signed[0]));
  return { data, centre, centred, sigma, values, vectors: signed, projected };
}

function withPositiveStart(vector) {
  const first = vector.find((v) => Math.abs(v) > 1e-9);
  return first < 0 ? vector.map((v) => -v) : vector;
}

export function workedExample() {
  return new WorkedExample().element;
}

class WorkedExample {
  constructor() {
    const kept = state.numbers("x", 6);
    this.data = kept ? [kept.slice(0, 2), kept.slice(2, 4), kept.slice(4)] : DEFAULT_DATA;
    this.text = h("div", { class: "step-text", "aria-live": "polite" });
    this.plot = h("div", { class: "step-plot" });
    this.stepButtons = STEPS.map((name, i) => button(`${i + 1} ${name}`, () => this.goTo(i + 1), { class: "toggle" }));
    this.back = button("Back", () => this.goTo(this.step - 1));
    this.next = button("Next", () => this.goTo(this.step + 1), { class: "primary" });
    this.goTo(state.number("step", 1));
    this.element = card(
      "Worked example: three rows, two columns",
      h("div", { class: "controls" }, this.stepButtons),
      h("div", { class: "step" }, this.text, this.plot),
      h("div", { class: "controls" }, this.back, this.next),
    );
  }

  goTo(step) {
    this.step = clamp(step, 1, STEPS.length);
    state.set({ step: this.step });
    this.stepButtons.forEach((element, i) => {
      element.setAttribute("aria-pressed", String(i + 1 === this.step));
    });
    this.back.disabled = this.step === 1;
    this.next.disabled = this.step === STEPS.length;
    const solution = solve(this.data);
    this.text.replaceChildren(...EXPLANATIONS[this.step - 1](solution));
    if (this.step === 1) this.text.append(this.dataInputs());
    this.plot.replaceChildren(drawStep(this.step, solution));
  }

  dataInputs() {
    const inputs = this.data.flatMap((row, i) => row.map((value, j) => this.dataInput(i, j, value)));
    const reset = button("Reset", () => {
      state.set({ x: null });
      this.setData(DEFAULT_DATA);
    });
    return h("div", { class: "matrix-input", role: "group", "aria-label": "the data" }, inputs, reset);
  }

  dataInput(i, j, value) {
    const label = `row ${i + 1}, column ${j + 1}`;
    const input = h("input", { type: "number", step: "any", value: String(value), "aria-label": label });
    input.addEventListener("change", () => {
      const entered = Number(input.value);
      if (!Number.isFinite(entered)) return;
      const data = this.data.map((row) => [...row]);
      data[i][j] = entered;
      state.set({ x: data.flat().join(",") });
      this.setData(data);
    });
    return input;
  }

  setData(data) {
    this.data = data;
    this.goTo(1);
  }
}

const blockMath = (...parts) => math(mrow(...parts), true);
const column = (values) =>
  matrix(
    values.map((v) => [v]),
    DIGITS,
  );
const heading = (text) => h("h4", {}, text);
const text = (...parts) => h("p", {}, ...parts);
const EXPLANATIONS = [explainData, explainCentring, explainCovariance, explainEigenvectors, explainProjection];

function explainData({ data }) {
  const cells = data.map((row) => row.map((v) => mn(number(v))));
  const explanation =
    "Three rows of two numbers. The rows lie almost on a line, so one number describes a row almost completely. " +
    "Change the numbers to see the effect:";
  return [heading("Step 1: the data"), blockMath(equation(mi("X"), matrix(cells))), text(explanation)];
}

function explainCentring({ centre, centred }) {
  const formula = blockMath(equation(bar(X), column(centre)), mo(","), equation(CENTRED, matrix(centred, DIGITS)));
  return [
    heading("Step 2: centre"),
    formula,
    text("Subtract the mean of each column, so that directions start at the centre of the data."),
  ];
}

function explainCovariance({ data, sigma }) {
  const factor = mfrac(mn(1), mn(data.length - 1));
  const product = mrow(sup(mrow(CENTRED), mi("T")), CENTRED);
  const determinant = sigma[0][0] * sigma[1][1] - sigma[0][1] ** 2;
  const explanation =
    "The diagonal contains the variance of each column. The other entries are the covariance of the two columns. The " +
    `trace is ${number(sigma[0][0] + sigma[1][1])}, and the determinant is ${number(determinant)}.`;
  return [
    heading("Step 3: the covariance matrix"),
    blockMath(equation(mi("Σ"), factor, product, mo("="), matrix(sigma, DIGITS))),
    text(explanation),
  ];
}

function explainEigenvectors({ values: [first, second], vectors }) {
  const pair = (i, value, vector) =>
    blockMath(
      equation(sub(mi("λ"), mn(i)), mn(fixed(value, DIGITS))),
      mo(","),
      equation(sub(mi("𝐯"), mn(i)), mo("±"), column(vector)),
    );
  const share = (100 * first) / (first + second || 1);
  const explanation =
    `The eigenvalues sum to the trace, ${fixed(first + second, DIGITS)}, and their product is the determinant, ` +
    `${fixed(first * second, DIGITS)}. The first component explains ${fixed(share, 1)} % of the variance.`;
  return [
    heading("Step 4: eigenvalues and eigenvectors"),
    pair(1, first, vectors[0]),
    pair(2, second, vectors[1]),
    text(explanation),
  ];
}

function explainProjection({ values: [first, second], projected }) {
  const product = mrow(CENTRED, sub(mi("𝐯"), mn(1)));
  const explanation =
    "One number now replaces the two numbers of each row. It keeps the largest variance that one number can keep, " +
    `${fixed(first, DIGITS)}. The variance that is lost is ${fixed(second, DIGITS)}.`;
  return [
    heading("Step 5: project"),
    blockMath(equation(sub(mi("X"), mi("p")), product, mo("="), mo("±"), column(projected))),
    text(explanation),
  ];
}
