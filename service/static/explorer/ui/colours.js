// Colours of the style sheet, for painting on a canvas.

const LABEL_COLOURS = 12; // --label-0 to --label-11
/** The label of the user's own rows on the map. */
export const OWN_ROWS = -2;

/** The current value of the CSS variable `name`, in the light or the dark theme, as rgb(…). */
export function cssColour(name) {
  const probe = document.head; // an element that is not displayed
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}

export const toRgb = (colour) =>
  colour
    .match(/[\d.]+/g)
    .slice(0, 3)
    .map(Number);

/** The CSS variable with the colour of a label. */
export function labelVariable(label) {
  if (label === null || label === undefined) return "--unlabelled";
  return label < 0 ? "--positive" : `--label-${label % LABEL_COLOURS}`;
}

/** Whether the theme in use is dark. */
export function isDark() {
  const { theme } = document.documentElement.dataset;
  return theme ? theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
