// Labelled form controls, buttons and tooltips.

import { number } from "../lib/format.js";
import { h } from "./dom.js";

let lastId = 0;
const uniqueId = (prefix) => `${prefix}-${++lastId}`;

export const button = (text, onclick, attributes = {}) => h("button", { type: "button", onclick, ...attributes }, text);

export const card = (title, ...content) =>
  h("section", { class: "card" }, title ? h("h3", {}, title) : null, ...content);

/** A word with a tooltip that explains it. The pointer and the keyboard open the tooltip. */
export function term(word, explanation) {
  const id = uniqueId("tooltip");
  const tooltip = h("span", { class: "tooltip", role: "tooltip", id }, explanation);
  const trigger = h("button", { type: "button", class: "term", "aria-describedby": id }, word);
  const element = h("span", { class: "with-tooltip" }, trigger, tooltip);
  const show = () => {
    element.classList.add("open");
    moveIntoViewport(tooltip);
  };
  const hide = () => element.classList.remove("open");
  element.addEventListener("pointerenter", show);
  element.addEventListener("pointerleave", hide);
  trigger.addEventListener("focus", show);
  trigger.addEventListener("blur", hide);
  trigger.addEventListener("click", show);
  trigger.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  return element;
}

function moveIntoViewport(tooltip) {
  const box = tooltip.getBoundingClientRect();
  const rightOverflow = Math.max(0, box.right - document.documentElement.clientWidth + 8);
  const leftOverflow = Math.min(0, box.left - 8);
  const margin = Number.parseFloat(tooltip.style.marginLeft) || 0;
  tooltip.style.marginLeft = `${margin - (rightOverflow || leftOverflow)}px`;
}

/** The text of a label without the text of its tooltips. */
function labelText(label) {
  const parts = [label].flat().map((part) => (part instanceof Node ? part.cloneNode(true) : part));
  const copy = h("span", {}, parts);
  for (const tooltip of copy.querySelectorAll(".tooltip")) tooltip.remove();
  return copy.textContent;
}

/** A control below its visible label. */
export const field = (name, control) => h("label", { class: "field" }, h("span", { class: "name" }, name), control);

/**
 * A range input with its label and its value as text.
 * `format` turns the value into text. `oninput` gets the value as a number. The element's method `set` changes the
 * value without a call of `oninput`.
 */
export function slider(label, { min, max, step, value, format = number, oninput, className = "" }) {
  const output = h("output", {});
  const input = h("input", { type: "range", min, max, step, value: String(value), "aria-label": labelText(label) });
  const set = (next) => {
    input.value = next;
    output.textContent = format(next);
    input.setAttribute("aria-valuetext", format(next));
  };
  set(value);
  input.addEventListener("input", () => {
    set(Number(input.value));
    oninput(Number(input.value));
  });
  const name = h("span", { class: "name" }, label);
  return Object.assign(h("div", { class: `field slider ${className}` }, name, input, output), { set });
}

/** A drop-down list. `options` are [value, text] pairs. The property `select` of the element is the <select>. */
export function dropdown(label, options, value, onchange) {
  const items = options.map(([key, text]) => h("option", { value: key }, text));
  const select = h("select", { onchange: () => onchange(select.value) }, items);
  select.value = value;
  return Object.assign(field(label, select), { select });
}

/** A button that is on or off. */
export function toggle(text, isOn, onchange) {
  const flip = () => {
    const next = element.getAttribute("aria-pressed") !== "true";
    element.setAttribute("aria-pressed", String(next));
    onchange(next);
  };
  const element = button(text, flip, { class: "toggle", "aria-pressed": String(isOn) });
  return element;
}

/** Radio buttons that look like one row of buttons. `options` are [value, text] pairs. */
export function radioGroup(label, options, value, onchange) {
  const name = uniqueId("group");
  const radio = ([key, text]) => {
    const attributes = { type: "radio", name, value: key, checked: key === value, onchange: () => onchange(key) };
    return h("label", {}, h("input", attributes), h("span", {}, text));
  };
  return h("fieldset", { class: "segmented" }, h("legend", {}, label), options.map(radio));
}

/** A file input for rows. `onfile` gets the chosen file. */
export function rowFileInput(label, onfile) {
  const input = h("input", {
    type: "file",
    accept: ".csv,.npy,.json,.txt",
    "aria-label": label,
    onchange: () => onfile(input.files[0]),
  });
  return input;
}
