// Brings the page to life: which models there are, which view is looked at, light or dark.

import { catalogue, detail } from "./api.js";
import { announce, h } from "./dom.js";
import { nothing, say } from "./say.js";
import { state } from "./state.js";

const VIEWS = {
  models: () => import("./views/models.js"),
  latent: () => import("./views/latent.js"),
  reconstruct: () => import("./views/reconstruct.js"),
  pca: () => import("./views/pca.js"),
  anomaly: () => import("./views/anomaly.js"),
  training: () => import("./views/training.js"),
  quizzes: () => import("./views/quizzes.js"),
};
const NEEDS_NO_MODEL = ["models", "quizzes"];
const main = document.getElementById("view");
const select = document.getElementById("model");
const theme = document.getElementById("theme");
let served = { models: [], failures: [], default: null };
let leave = null;
let turn = 0;

/** The view that the address names, with the model that it names. */
async function show(focus = false) {
  const own = ++turn, name = VIEWS[state.get("view")] ? state.get("view") : "models";
  leave?.();
  leave = null;
  for (const link of document.querySelectorAll("nav a[data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  reveal();
  const model = pick(state.get("model"));
  document.getElementById("model-field").hidden = NEEDS_NO_MODEL.includes(name) || !served.models.length;
  select.value = model?.name ?? "";
  try {
    const view = await VIEWS[name]();
    const whole = model && !NEEDS_NO_MODEL.includes(name) ? { ...(await detail(model)), exhibits: model.exhibits } : model;
    if (own !== turn) return;
    document.title = `${view.title} · Elbo`;
    const heading = h("h2", { tabindex: "-1" }, view.title);
    const place = h("div", { class: `view view-${name}` });
    main.replaceChildren(heading, place);
    main.removeAttribute("aria-busy");
    if (focus) { heading.focus({ preventScroll: true }); scrollTo(0, 0); announce(view.title); }
    if (!model && name !== "quizzes") place.append(nothing("No model is served yet. Run ", h("code", {}, "elbo demo"), " or ", h("code", {}, "elbo train"), "; it appears here within seconds."));
    else leave = view.render(place, { model: whole, models: served.models, failures: served.failures, chosen: served.default, go }) ?? null;
  } catch (error) {
    if (own === turn) main.replaceChildren(say(error));
  }
}

const pick = (name) => served.models.find((m) => m.name === name) ?? served.models.find((m) => m.name === served.default);

function go(values) {
  state.go(values);
  show(true);
}

/** Light, dark, or as the system has it; what is painted on canvases is painted anew, and nothing else is touched. */
function dress(mode) {
  if (mode) document.documentElement.dataset.theme = mode;
  const dark = mode ? mode === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  theme.textContent = dark ? "Light" : "Dark";
  theme.setAttribute("aria-label", `switch to ${dark ? "light" : "dark"} colours`);
  theme.dataset.next = dark ? "light" : "dark";
  for (const canvas of document.querySelectorAll("canvas")) canvas.repaint?.();
}

/** On a phone not all views' names fit: the current one is in sight. */
function reveal() {
  const link = document.querySelector("nav a[aria-current]");
  if (link) link.parentElement.scrollLeft = link.offsetLeft - link.parentElement.offsetLeft - 16;
}

async function start() {
  dress(localStorage.getItem("theme"));
  theme.addEventListener("click", () => {
    localStorage.setItem("theme", theme.dataset.next);
    dress(theme.dataset.next);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dress(localStorage.getItem("theme")));
  addEventListener("resize", reveal);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // a step in the history would draw the view anew
    main.focus();
  });
  document.querySelector("nav").addEventListener("click", (event) => {
    const link = event.target.closest("a[data-view]");
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    go({ view: link.dataset.view });
  });
  select.addEventListener("change", () => go({ model: select.value, view: state.get("view") }));
  addEventListener("popstate", () => { state.read(); show(true); });
  const { models, ...rest } = await catalogue();
  const newest = models.filter((model, i) => models[i - 1]?.name !== model.name); // of each name the newest comes first
  served = { ...rest, models: newest };
  select.replaceChildren(...newest.map((model) => h("option", { value: model.name }, `${model.name} (${model.kind})`)));
  await show();
}

start().catch((error) => main.replaceChildren(say(error)));
