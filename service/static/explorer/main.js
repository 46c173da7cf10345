// Entry point: loads the list of models and shows the view that the address names.

import { describeModel, listModels } from "./lib/api.js";
import { UserError } from "./lib/errors.js";
import { KEY_ERRORS } from "./lib/key.js";
import { hasLatents } from "./lib/model.js";
import { state } from "./lib/state.js";
import { initTheme } from "./theme.js";
import { announce, h } from "./ui/dom.js";
import { initForgetButton, keyForm } from "./ui/key-form.js";
import { emptyMessage, errorMessage } from "./ui/messages.js";

const VIEWS = {
  models: () => import("./views/models.js"),
  latent: () => import("./views/latent.js"),
  reconstruct: () => import("./views/reconstruct.js"),
  pca: () => import("./views/pca.js"),
  anomaly: () => import("./views/anomaly.js"),
  training: () => import("./views/training.js"),
  quizzes: () => import("./views/quizzes.js"),
};
const POLL_INTERVAL = 3000; // ms between two looks for new models
const NEED_LATENTS = ["latent", "reconstruct", "pca"]; // views that show nothing without an encoder and a decoder
const WITHOUT_MODEL_CHOICE = ["models", "quizzes"];
const main = document.getElementById("view");
const modelSelect = document.getElementById("model");
let served = { models: [], failures: [], default: null };
let destroyView = null;
let lastRender = 0; // the number of calls of render: only the latest call may show its view
let asksForKey = false; // whether the page shows the form for an API key in place of a view
let needsReload = false; // a browser does not load a module again after a failure: only a new page can show the view

/** Show the view and the model that the address names. With `moveFocus`, move the focus to the heading of the view. */
async function render(moveFocus = false) {
  if (asksForKey) return;
  const thisRender = ++lastRender;
  const name = VIEWS[state.get("view")] ? state.get("view") : "models";
  destroyView?.();
  destroyView = null;
  markCurrentLink(name);
  const model = findModel(state.get("model"));
  showModelChoice(name, model);
  try {
    const view = await VIEWS[name]().catch(explainMissingModule);
    const needsDescription = model && !WITHOUT_MODEL_CHOICE.includes(name);
    const described = needsDescription ? await describeModel(model) : model;
    if (thisRender !== lastRender) return;
    const content = mount(view.title, name, moveFocus);
    if (!model && name !== "quizzes") content.append(noModelMessage());
    else if (model && NEED_LATENTS.includes(name) && !hasLatents(model)) content.append(noLatentsMessage(model));
    else destroyView = view.render(content, viewContext(described)) ?? null;
  } catch (error) {
    if (thisRender === lastRender) main.replaceChildren(errorMessage(error));
  }
}

/** Throw a UserError in place of the error of an `import` that failed: the server does not answer. */
function explainMissingModule() {
  needsReload = true;
  throw new UserError(
    "Cannot load this view: the server does not answer. It may be stopped or restarting. The page reloads when the " +
      "server answers again.",
    "unreachable",
  );
}

const viewContext = (model) => ({
  model,
  models: served.models,
  failures: served.failures,
  defaultModel: served.default,
  navigate,
});

/** The model of the given name, or the default model if no model has that name. */
function findModel(name) {
  const find = (wanted) => served.models.find((model) => model.name === wanted);
  return find(name) ?? find(served.default);
}

/** Replace the content of the page by an empty view and return its element. */
function mount(title, name, moveFocus) {
  document.title = `${title} · Elbo`;
  const heading = h("h2", { tabindex: "-1" }, title);
  const content = h("div", { class: `view view-${name}` });
  main.replaceChildren(heading, content);
  main.removeAttribute("aria-busy");
  if (moveFocus) {
    heading.focus({ preventScroll: true });
    scrollTo(0, 0);
    announce(title);
  }
  return content;
}

const noModelMessage = () =>
  emptyMessage(
    "No model is served yet. Run ",
    h("code", {}, "elbo demo"),
    " or ",
    h("code", {}, "elbo train"),
    "; the model appears here within seconds.",
  );

const noLatentsMessage = (model) =>
  emptyMessage(
    `${model.name} only reconstructs and scores rows, because its network was adopted without an encoder and a ` +
      "decoder. The anomaly view shows what it can do.",
  );

function navigate(values) {
  state.push(values);
  render(true);
}

function markCurrentLink(name) {
  for (const link of document.querySelectorAll("nav a[data-view]")) {
    if (link.dataset.view === name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  scrollToCurrentLink();
}

/** The navigation bar scrolls sideways on a phone: bring the current link into sight. */
function scrollToCurrentLink() {
  const link = document.querySelector("nav a[aria-current]");
  if (link) link.parentElement.scrollLeft = link.offsetLeft - link.parentElement.offsetLeft - 16;
}

function showModelChoice(viewName, model) {
  const isHidden = WITHOUT_MODEL_CHOICE.includes(viewName) || !served.models.length;
  document.getElementById("model-field").hidden = isHidden;
  modelSelect.value = model?.name ?? "";
}

function addListeners() {
  addEventListener("resize", scrollToCurrentLink);
  addEventListener("popstate", () => {
    state.reload();
    render(true);
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // following the link would add a history entry and render the view again
    main.focus();
  });
  document.querySelector("nav").addEventListener("click", (event) => {
    const link = event.target.closest("a[data-view]");
    const opensNewTab = event.metaKey || event.ctrlKey || event.shiftKey;
    if (!link || opensNewTab) return;
    event.preventDefault();
    navigate({ view: link.dataset.view });
  });
  modelSelect.addEventListener("change", () => navigate({ model: modelSelect.value, view: state.get("view") }));
}

/** Load the newest version of each served model. The service lists the newest version of a name first. */
async function loadModels() {
  const { models, ...rest } = await listModels();
  const newest = models.filter((model, i) => models[i - 1]?.name !== model.name);
  served = { ...rest, models: newest };
  const option = (model) => h("option", { value: model.name }, `${model.name} (${model.kind})`);
  modelSelect.replaceChildren(...newest.map(option));
}

/** Look for new models every POLL_INTERVAL, as long as the page is visible. */
function pollModels() {
  setInterval(async () => {
    if (document.hidden || asksForKey) return;
    try {
      await takeUpNewModels();
    } catch (error) {
      if (!(error instanceof UserError)) throw error;
      if (KEY_ERRORS.includes(error.code)) askForKey(error);
      // An unreachable server is asked again at the next turn.
    }
  }, POLL_INTERVAL);
}

/** Show models that have appeared or disappeared. A view of a model that is still served keeps its state. */
async function takeUpNewModels() {
  const listed = () => JSON.stringify([served.models.map(identity), served.failures, served.default]);
  const shown = findModel(state.get("model"));
  const before = listed();
  await loadModels();
  if (needsReload) location.reload();
  modelSelect.value = shown?.name ?? "";
  if (listed() === before) return;
  const isStillServed = shown && served.models.some((model) => identity(model) === identity(shown));
  const showsList = !VIEWS[state.get("view")] || state.get("view") === "models";
  if (showsList || !isStillServed) await render();
  else showModelChoice(state.get("view"), shown);
}

const identity = ({ name, version }) => `${name}@${version}`;

/** Show the form for an API key in place of the view. With the key, start again. */
function askForKey(error) {
  asksForKey = true;
  destroyView?.();
  destroyView = null;
  lastRender++; // a view that is loading is not shown
  document.title = "API key · Elbo";
  main.replaceChildren(keyForm(error, show));
  main.removeAttribute("aria-busy");
  document.getElementById("api-key").focus();
}

/** Load the models and show the view; or ask for an API key if the server needs another one. */
async function show() {
  try {
    await loadModels();
    asksForKey = false;
    await render();
  } catch (error) {
    if (KEY_ERRORS.includes(error.code)) askForKey(error);
    else main.replaceChildren(errorMessage(error));
  }
}

initTheme();
initForgetButton();
addListeners();
pollModels();
show();
