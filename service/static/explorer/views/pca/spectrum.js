// The share of the variance that each principal component explains.

import { fixed } from "../../lib/format.js";
import { barChart } from "../../ui/charts.js";
import { h } from "../../ui/dom.js";
import { emptyMessage } from "../../ui/messages.js";

const MIN_BARS = 24;

/** Two bar charts of the explained variance: of each component, and of all components up to it. */
export function spectrumCharts({ spectrum, total_variance: total, latents }) {
  if (!spectrum?.length)
    return emptyMessage("This artifact has no eigenvalues: its rows are too wide for a covariance.");
  const percents = spectrum.map((value) => (100 * value) / total);
  const cumulative = cumulativeSums(percents);
  const shown = Math.min(spectrum.length, Math.max(2 * latents, MIN_BARS));
  const isHighlighted = (i) => i < latents;
  const summary =
    `${latents} of ${spectrum.length} components are kept. Together they explain ` +
    `${fixed(cumulative[latents - 1], 1)} % of the variance.`;
  return [
    h("p", { class: "muted" }, summary),
    barChart({
      values: percents.slice(0, shown),
      isHighlighted,
      xLabel: "component",
      yLabel: "% of variance",
      label: `explained variance by component; the first ${latents} are kept`,
    }),
    barChart({
      values: cumulative.slice(0, shown),
      isHighlighted,
      top: 100,
      height: 170,
      xLabel: "number of components",
      yLabel: "% of variance",
      label: "explained variance of the first components together",
    }),
  ];
}

function cumulativeSums(values) {
  let sum = 0;
  return values.map((value) => {
    sum += value;
    return sum;
  });
}
