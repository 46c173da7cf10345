// The principal angles between the subspace of PCA and that of another model.

import { describeModel } from "../../lib/api.js";
import { fixed } from "../../lib/format.js";
import { principalAngles } from "../../lib/linear-algebra.js";
import { isLinear, kindName, sameShape } from "../../lib/model.js";
import { state } from "../../lib/state.js";
import { barChart } from "../../ui/charts.js";
import { dropdown, term } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { math, mi, mn, mo, mrow, sub } from "../../ui/mathml.js";
import { AsyncPanel, emptyMessage } from "../../ui/messages.js";
import { decoderDirections } from "./directions.js";

const PRINCIPAL_ANGLES =
  "The first principal angle is the smallest angle between a direction in one subspace and a direction in the other. " +
  "Each further angle is the smallest between directions at right angles to all previous ones (Björck & Golub " +
  "1973). All angles are zero if the subspaces are equal.";
const LINEAR_NOTE =
  "This model is linear. The closer the angles are to 0°, the closer its subspace is to the subspace of PCA. The " +
  "last angle may be large: if two eigenvalues are nearly equal, the data do not determine the direction of a " +
  "component.";

/** A list of other models of the same rows, and the principal angles between `pca` and the selected model. */
export async function compareSubspaces(pca, models) {
  const candidates = models.filter((other) => other.name !== pca.name && sameShape(other, pca));
  if (!candidates.length) return noCandidateMessage();
  const panel = new AsyncPanel();
  const pcaDirections = decoderDirections(pca);
  const show = (name) => {
    const other = candidates.find((model) => model.name === name);
    panel.load(async () => comparison(pca, await pcaDirections, await describeModel(other)));
  };
  const initial = await initialCandidate(candidates);
  const options = candidates.map((model) => [model.name, `${model.name} (${kindName(model)})`]);
  const select = dropdown("Compare with", options, initial.name, (name) => {
    state.set({ against: name });
    show(name);
  });
  show(initial.name);
  return [help(), h("div", { class: "controls" }, select), panel.element];
}

const noCandidateMessage = () =>
  emptyMessage(
    "To compare, serve a second model of the same rows, such as a linear autoencoder: ",
    h("code", {}, "elbo train DATA --model ae --hidden none --name linear"),
    ".",
  );

/** The model that the address names; otherwise a linear autoencoder; otherwise the first model. */
async function initialCandidate(candidates) {
  const described = await Promise.all(candidates.map(describeModel));
  const wanted = state.get("against");
  const linear = described.find((model) => model.kind === "ae" && isLinear(model));
  return described.find((model) => model.name === wanted) ?? linear ?? described[0];
}

async function comparison(pca, pcaDirections, other) {
  const radians = principalAngles(pcaDirections, await decoderDirections(other));
  const angles = radians.map((angle) => (angle * 180) / Math.PI);
  const median = angles[angles.length >> 1];
  const summary = `Median angle ${fixed(median, 1)}°, largest ${fixed(angles.at(-1), 1)}°. `;
  const list = angles.map((angle) => fixed(angle, 1)).join(", ");
  return [
    h("p", {}, h("strong", {}, summary), isLinear(other) ? LINEAR_NOTE : nonlinearNote(other)),
    barChart({
      values: angles,
      top: 90,
      xLabel: "principal angle, ascending",
      yLabel: "degrees",
      label: `principal angles between ${pca.name} and ${other.name}: ${list} degrees`,
    }),
  ];
}

const nonlinearNote = (model) =>
  `The decoder of this ${kindName(model)} is nonlinear. The angles are those of its directions at the origin of the ` +
  "latent space.";

function help() {
  const latents = mrow(mn(0), mo(","), sub(mi("𝐞"), mn(1)), mo(","), mo("…"));
  return h(
    "p",
    { class: "muted" },
    "The ",
    term("principal angles", PRINCIPAL_ANGLES),
    " between the subspaces that the two decoders span, found by decoding ",
    math(latents),
    ".",
  );
}
