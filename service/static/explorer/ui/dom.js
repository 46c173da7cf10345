// Creating HTML and SVG elements.

const SVG_NAMESPACE = "http://www.w3.org/2000/svg";
const SET_AS_PROPERTY = ["value", "checked", "disabled"];
const isAbsent = (value) => value === null || value === undefined || value === false;

/** Create an HTML element: h("p", { class: "x", onclick }, "text", child). Null and false are skipped. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (isAbsent(value)) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (SET_AS_PROPERTY.includes(name)) element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => !isAbsent(child)));
  return element;
}

/** Create an SVG element. Null and false are skipped. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG_NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (!isAbsent(value)) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => !isAbsent(child)));
  return element;
}

/** A horizontal bar that is filled to `share` (0 to 1) of its width. */
export function bar(share, className = "") {
  const fill = h("span", { class: `fill ${className}`.trim() });
  fill.style.width = `${100 * share}%`;
  return h("span", { class: "bar" }, fill);
}

/** A term and its definition, for a <dl>. */
export const definition = (name, ...value) => [h("dt", {}, name), h("dd", {}, ...value)];

/** A <thead> of column names. An empty name makes a <td>, not a <th>. */
export const tableHead = (names) =>
  h(
    "thead",
    {},
    h(
      "tr",
      {},
      names.map((name) => (name ? h("th", { scope: "col" }, name) : h("td", {}))),
    ),
  );

/** A region that the pointer and the keyboard can scroll. */
export const scrollable = (label, content) =>
  h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, content);

const liveRegion = document.getElementById("live-region");
const ANNOUNCE_DELAY = 400; // ms to wait for the next change: of several quick changes, only the last is read out
let announcement;

/** Make screen readers read `text`. */
export function announce(text) {
  clearTimeout(announcement);
  announcement = setTimeout(() => {
    liveRegion.textContent = text;
  }, ANNOUNCE_DELAY);
}
