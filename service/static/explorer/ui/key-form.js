// The form that asks for an API key, and the button that forgets the key.

import { apiKey } from "../lib/key.js";
import { h } from "./dom.js";

const forgetButton = document.getElementById("forget-key");

/** Show the button that forgets the key if there is a key. A click forgets the key and loads the page again. */
export function initForgetButton() {
  forgetButton.addEventListener("click", () => {
    apiKey.forget();
    location.reload();
  });
  showForgetButton();
}

/** Show the button if there is a key. Hide the links to JSON and metrics then, because a link cannot send the key. */
function showForgetButton() {
  forgetButton.hidden = !apiKey.get();
  document.getElementById("raw-links").hidden = !forgetButton.hidden;
}

/** A form for a key. `error` says why the last key was refused. `onkey` is called when the user has typed a key. */
export function keyForm(error, onkey) {
  const input = h("input", {
    id: "api-key",
    type: "password",
    autocomplete: "off",
    required: true,
    pattern: "\\s*[!-~]+\\s*",
    title: "a key as elbo key add prints it",
  });
  const submit = (event) => {
    event.preventDefault();
    apiKey.set(input.value.trim());
    showForgetButton();
    onkey();
  };
  const isFirst = !apiKey.get(); // no key has been refused
  document.getElementById("raw-links").hidden = true;
  return h(
    "form",
    { class: "key-form", onsubmit: submit },
    h("h2", { tabindex: "-1" }, "API key"),
    h(
      "p",
      {},
      "This server needs an API key. The page sends it to this server only, and keeps it until you close this tab.",
    ),
    isFirst ? null : h("p", { class: "error", role: "alert" }, error.message),
    h("label", { for: "api-key" }, "API key"),
    input,
    h("button", { type: "submit", class: "primary" }, "Use this key"),
  );
}
