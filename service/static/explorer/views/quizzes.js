// The two questions, with what is right or wrong about each answer.

import { EPSILON, MU, SIGMA, Z, announce, button, h, math, mi, mo, row } from "../dom.js";
import { state } from "../state.js";

export const title = "Quizzes";
const QUESTIONS = [
  {
    id: "q1",
    ask: "What is the main difference between a standard autoencoder and PCA?",
    options: [
      ["PCA needs labels, an autoencoder does not", "Neither needs labels: both learn from the rows alone."],
      ["An autoencoder can be nonlinear; PCA only projects linearly", "Right. PCA finds the best flat subspace. Layers with a nonlinearity between them let an autoencoder bend the subspace to the data; without the nonlinearity it learns PCA's subspace again, as the principal angles in the PCA view show."],
      ["PCA compresses, an autoencoder enlarges", "Both compress: the code has fewer numbers than the row."],
      ["An autoencoder always reconstructs better", "Not always: a linear one cannot beat PCA, and a nonlinear one may be trained too briefly or on too few rows. The model card says which won here."],
    ],
    right: 1,
  },
  {
    id: "q2",
    ask: "Why is the reparameterization trick necessary in VAEs?",
    options: [
      ["It makes the latent space smaller", "The number of latents is chosen beforehand; the trick leaves it alone."],
      ["It removes the noise from sampling", "The noise stays: it only comes from outside, as ε."],
      ["It lets gradients flow through the sampling step", "Right. Drawing z directly is a random act without a derivative. Written as a function of μ and σ with the randomness in ε apart, the same draw can be differentiated, so the encoder learns by backpropagation."],
      ["It replaces the KL divergence", "The KL term stays in the loss; the trick concerns the expectation over z in the reconstruction term."],
    ],
    right: 2,
    formula: () => math(row(Z, mo("="), MU, mo("+"), SIGMA, mo("⊙"), EPSILON, mo(","), EPSILON, mo("∼"), mi("𝒩"), mo("("), mi("0"), mo(","), mi("I"), mo(")")), true),
  },
];

export function render(place) {
  place.append(h("p", { class: "lead" }, "Two questions. Each answer tells why it is right or wrong."), h("div", { class: "columns" }, QUESTIONS.map(quiz)));
}

function quiz(question, index) {
  const verdict = h("div", { class: "verdict", "aria-live": "polite" });
  const radios = question.options.map(([text], k) => h("label", { class: "option" },
    h("input", { type: "radio", name: question.id, value: String(k), onchange: () => judge(k) }), h("span", {}, text)));
  const judge = (k) => {
    state.set({ [question.id]: k });
    radios.forEach((radio, i) => radio.classList.toggle("wrong", i === k && k !== question.right));
    radios.forEach((radio, i) => radio.classList.toggle("right", i === k && k === question.right));
    const right = k === question.right;
    verdict.replaceChildren(h("p", { class: right ? "good" : "bad" }, h("strong", {}, right ? "✓ " : "✗ "), question.options[k][1]), right && question.formula ? question.formula() : "");
    announce(question.options[k][1]);
  };
  const again = button("Try again", () => {
    radios.forEach((radio) => { radio.querySelector("input").checked = false; radio.classList.remove("right", "wrong"); });
    verdict.replaceChildren();
    state.set({ [question.id]: null });
  });
  const kept = state.number(question.id, -1);
  if (question.options[kept]) { radios[kept].querySelector("input").checked = true; judge(kept); }
  return h("section", { class: "card quiz" }, h("h3", {}, `Quiz ${index + 1}`),
    h("fieldset", {}, h("legend", {}, question.ask), radios), verdict, again);
}
