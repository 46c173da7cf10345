// Which latents of a model are active.

import { fixed } from "../../lib/format.js";
import { range } from "../../lib/linear-algebra.js";
import { barChart } from "../../ui/charts.js";
import { card, term } from "../../ui/controls.js";
import { h } from "../../ui/dom.js";
import { emptyMessage } from "../../ui/messages.js";

const TITLE = "Active latents";
const POSTERIOR_COLLAPSE =
  "A latent becomes inactive if it costs more in the KL term than it saves in the reconstruction error. That happens " +
  "if its eigenvalue is below β times the variance of the decoder. The decoder then ignores the latent " +
  "(Lucas et al. 2019).";

export function activityCard(model) {
  const report = model.latent_report ?? [];
  if (!report.length) return card(TITLE, emptyMessage("This artifact has no report on its latents."));
  const hasKl = report.every((latent) => latent.kl !== null);
  const activity = (k) => (hasKl ? report[k].kl : report[k].variance);
  const order = range(report.length).sort((a, b) => activity(b) - activity(a));
  const quantity = hasKl ? "KL" : "variance";
  const chart = barChart({
    values: order.map(activity),
    isHighlighted: (i) => report[order[i]].active,
    xLabel: "latents, the most active first",
    yLabel: hasKl ? "KL, nats" : "variance",
    label: `${quantity} of each latent, the most active first`,
  });
  const names = order.map((k) => `${k + 1}${report[k].active ? "" : " (inactive)"}`);
  const list = h("p", { class: "muted" }, `In this order: ${names.join(", ")}.`);
  return card(TITLE, summary(report, hasKl), chart, list);
}

function summary(report, hasKl) {
  const inactive = report.filter((latent) => !latent.active).length;
  const count = inactive
    ? `${inactive} of ${report.length} latents are inactive. `
    : `All ${report.length} latents are active. `;
  if (!hasKl) return h("p", {}, h("strong", {}, count));
  const advice = inactive
    ? " is the cause: train with fewer latents, a lower β, or a warm-up of the KL term."
    : " has not occurred.";
  const collapse = term("Posterior collapse", POSTERIOR_COLLAPSE);
  return h("p", {}, h("strong", {}, count), collapse, advice, totalCost(report));
}

function totalCost(report) {
  const nats = report.reduce((sum, latent) => sum + latent.kl, 0);
  return ` The latents of a row cost ${fixed(nats, 1)} nats, or ${fixed(nats / Math.LN2, 1)} bits.`;
}
