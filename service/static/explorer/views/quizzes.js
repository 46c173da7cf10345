// The quizzes: two questions with an explanation of each answer.

import { state } from "../lib/state.js";
import { button } from "../ui/controls.js";
import { announce, h } from "../ui/dom.js";
import { math, mo, mrow, NOISE, REPARAMETERIZATION } from "../ui/mathml.js";

export const title = "Quizzes";
const QUESTIONS = [
  {
    id: "q1",
    text: "What is the main difference between a standard autoencoder and PCA?",
    options: [
      {
        text: "PCA needs labels, an autoencoder does not",
        explanation: "Neither needs labels: both learn from the rows alone.",
      },
      {
        text: "An autoencoder can be nonlinear; PCA only projects linearly",
        explanation:
          "Right. PCA finds the best flat subspace. An autoencoder with nonlinear layers can learn a curved surface. " +
          "Without nonlinear layers it learns the subspace of PCA, as the principal angles in the PCA view show.",
      },
      {
        text: "PCA compresses, an autoencoder expands",
        explanation: "Both compress: there are fewer latents than numbers in the row.",
      },
      {
        text: "An autoencoder always reconstructs better",
        explanation:
          "Not always. A linear autoencoder cannot beat PCA, and a nonlinear autoencoder may be trained for too few " +
          "epochs or on too few rows. The model cards show which model is better here.",
      },
    ],
    correct: 1,
  },
  {
    id: "q2",
    text: "Why is the reparameterization trick necessary in VAEs?",
    options: [
      {
        text: "It makes the latent space smaller",
        explanation: "The number of latents is chosen before training; the trick does not change it.",
      },
      {
        text: "It removes the noise from sampling",
        explanation: "Sampling still adds noise, but the noise ε now comes from outside the network.",
      },
      {
        text: "It lets gradients flow through the sampling step",
        explanation:
          "Right. Drawing z directly is a random operation without a derivative. As a function of μ, σ and a " +
          "separate random ε, the sample is differentiable, so the encoder learns by backpropagation.",
      },
      {
        text: "It replaces the KL divergence",
        explanation: "The KL term stays in the loss. The trick concerns the expectation in the reconstruction term.",
      },
    ],
    correct: 2,
    formula: mrow(REPARAMETERIZATION, mo(","), NOISE),
  },
];

export function render(container) {
  const introduction = h("p", { class: "lead" }, "Two questions. Each answer is explained.");
  const quizzes = QUESTIONS.map((question, i) => new Quiz(question, i + 1).element);
  container.append(introduction, h("div", { class: "columns" }, quizzes));
}

class Quiz {
  constructor(question, index) {
    this.question = question;
    this.feedback = h("div", { class: "feedback", "aria-live": "polite" });
    this.options = question.options.map(({ text }, i) => this.createOption(text, i));
    this.element = h(
      "section",
      { class: "card quiz" },
      h("h3", {}, `Quiz ${index}`),
      h("fieldset", {}, h("legend", {}, question.text), this.options),
      this.feedback,
      button("Try again", () => this.reset()),
    );
    const kept = state.number(question.id, -1);
    if (question.options[kept]) {
      this.radio(kept).checked = true;
      this.answer(kept);
    }
  }

  createOption(text, i) {
    const attributes = { type: "radio", name: this.question.id, value: String(i), onchange: () => this.answer(i) };
    return h("label", { class: "option" }, h("input", attributes), h("span", {}, text));
  }

  radio(i) {
    return this.options[i].querySelector("input");
  }

  answer(chosen) {
    const { id, correct, options, formula } = this.question;
    const isCorrect = chosen === correct;
    const { explanation } = options[chosen];
    state.set({ [id]: chosen });
    this.clearMarks();
    this.options[chosen].classList.add(isCorrect ? "right" : "wrong");
    const mark = h("strong", {}, isCorrect ? "✓ " : "✗ ");
    const text = h("p", { class: isCorrect ? "good" : "bad" }, mark, explanation);
    this.feedback.replaceChildren(text, isCorrect && formula ? math(formula, true) : "");
    announce(explanation);
  }

  clearMarks() {
    for (const option of this.options) option.classList.remove("right", "wrong");
  }

  reset() {
    this.clearMarks();
    this.question.options.forEach((_, i) => {
      this.radio(i).checked = false;
    });
    this.feedback.replaceChildren();
    state.set({ [this.question.id]: null });
  }
}
