// Elements, mathematics, tooltips, numbers as text, and what a screen reader is told.

/** An element: `h("p", {class: "x", onclick}, "text", child)`. A property that is null or false is left out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "disabled") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An SVG element, likewise. */
export function s(tag, properties = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** MathML from a literal of this page, in the line or, with `block`, in its own: on a phone it scrolls, by keys too. */
export function math(markup, block = false) {
  const holder = document.createElement("template");
  holder.innerHTML = `<math${block ? ' display="block" tabindex="0"' : ""}>${markup}</math>`;
  return holder.content.firstElementChild;
}

export const mi = (name) => `<mi>${name}</mi>`;
export const mo = (sign) => `<mo>${sign}</mo>`;
export const mn = (number) => `<mn>${String(number).replace("-", "−")}</mn>`;
export const sub = (base, index) => `<msub>${base}${index}</msub>`;
export const sup = (base, power) => `<msup>${base}${power}</msup>`;
export const hat = (base) => `<mover accent="true">${base}<mo>^</mo></mover>`;
export const frac = (above, below) => `<mfrac>${above}${below}</mfrac>`;
export const row = (...parts) => `<mrow>${parts.join("")}</mrow>`;
export const X = mi("𝐱"), Z = mi("𝐳"), MU = mi("𝛍"), SIGMA = mi("𝛔"), EPSILON = mi("𝛆");
export const matrix = (rows, digits) =>
  row(mo("["), `<mtable>${rows.map((cells) => `<mtr>${cells.map((c) => `<mtd>${typeof c === "number" ? mn(fixed(c, digits)) : c}</mtd>`).join("")}</mtr>`).join("")}</mtable>`, mo("]"));

let tips = 0;
/** A word with an explanation, for the pointer and for the keyboard. */
export function term(word, explanation) {
  const id = `tip-${++tips}`;
  const tip = h("span", { class: "tip", role: "tooltip", id }, explanation);
  const button = h("button", { type: "button", class: "term", "aria-describedby": id }, word);
  const place = h("span", { class: "with-tip" }, button, tip);
  const show = () => {
    place.classList.add("open");
    const box = tip.getBoundingClientRect();
    const over = Math.max(0, box.right - document.documentElement.clientWidth + 8) || Math.min(0, box.left - 8);
    tip.style.marginLeft = `${(parseFloat(tip.style.marginLeft) || 0) - over}px`;
  };
  const hide = () => place.classList.remove("open");
  place.addEventListener("pointerenter", show);
  place.addEventListener("pointerleave", hide);
  button.addEventListener("focus", show);
  button.addEventListener("blur", hide);
  button.addEventListener("click", show);
  button.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  return place;
}

/** The words of a label, without the explanations in it. */
function plain(label) {
  const copy = h("span", {}, [label].flat().map((part) => (part instanceof Node ? part.cloneNode(true) : part)));
  copy.querySelectorAll(".tip").forEach((tip) => tip.remove());
  return copy.textContent;
}

/** A labelled range. `show` turns its value into text; `oninput` gets the number. */
export function slider(label, { min, max, step, value, show = (v) => number(v), oninput, hint, className = "" }) {
  const output = h("output", {}, show(value));
  const input = h("input", { type: "range", min, max, step, value: String(value), "aria-label": plain(label) });
  const set = (next) => {
    input.value = next;
    output.textContent = show(next);
    input.setAttribute("aria-valuetext", show(next));
  };
  set(value);
  input.addEventListener("input", () => {
    set(Number(input.value));
    oninput(Number(input.value));
  });
  const field = h("div", { class: `field slider ${className}` }, h("span", { class: "name" }, label, hint), input, output);
  return Object.assign(field, { set, input });
}

/** A labelled choice. `options` are [value, text] pairs. */
export function choice(label, options, value, onchange) {
  const select = h("select", { onchange: () => onchange(select.value) },
    options.map(([key, text]) => h("option", { value: key }, text)));
  select.value = value;
  return Object.assign(h("label", { class: "field" }, h("span", { class: "name" }, label), select), { select });
}

/** A button that stays pressed. */
export function toggle(text, pressed, onchange) {
  const button = h("button", { type: "button", class: "toggle", "aria-pressed": String(pressed), onclick: () => {
    const now = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(now));
    onchange(now);
  } }, text);
  return button;
}

/** Several buttons of which one is chosen. */
export function segmented(label, options, value, onchange) {
  const name = `group-${++tips}`;
  const radios = options.map(([key, text]) => h("label", {},
    h("input", { type: "radio", name, value: key, checked: key === value, onchange: () => onchange(key) }), h("span", {}, text)));
  return h("fieldset", { class: "segmented" }, h("legend", {}, label), radios);
}

export const button = (text, onclick, properties = {}) => h("button", { type: "button", onclick, ...properties }, text);

export const card = (title, ...content) => h("section", { class: "card" }, title ? h("h3", {}, title) : null, ...content);

const spoken = document.getElementById("spoken");
let speaking;
/** Told to screen readers, once things have settled. */
export function announce(text) {
  clearTimeout(speaking);
  speaking = setTimeout(() => (spoken.textContent = text), 400);
}

export const fixed = (value, digits = 2) => {
  const text = value.toFixed(digits);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "−");
};

/** A number to four significant digits, as people write it. */
export function number(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1e6 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return text.replace("-", "−");
}

export const vector = (z, most = 8) => `[${Array.from(z.slice(0, most), (v) => fixed(v)).join(", ")}${z.length > most ? ", …" : ""}]`;

const probe = document.head; // where a colour resolves unseen
/** The colour that the style sheet gives `name` at the moment, light or dark, as rgb(...). */
export function colour(name) {
  probe.style.color = `var(${name})`;
  return getComputedStyle(probe).color;
}
