// Messages in place of a result, and panels whose content is loaded asynchronously.

import { UserError } from "../lib/errors.js";
import { h } from "./dom.js";

/** An error message with the request id. The same id is in the server's log. */
export function errorMessage(error) {
  if (!(error instanceof UserError)) console.error(error); // a bug in this page
  const requestId = error.requestId
    ? [" ", h("span", { class: "muted" }, "Request ", h("code", {}, error.requestId))]
    : null;
  return h("p", { class: "error", role: "alert" }, error.message, requestId);
}

/** A message that says why there is nothing to show and what the user can do. */
export const emptyMessage = (...text) => h("p", { class: "empty" }, ...text);

/** An element whose content is the result of asynchronous work. It is dimmed while the work runs. */
export class AsyncPanel {
  constructor(className = "", attributes = {}) {
    this.element = h("div", { class: `panel ${className}`, ...attributes });
  }

  /** Show the elements to which `work` resolves, or its error. If it resolves to undefined, change nothing. */
  async load(work) {
    const isLatest = this.begin();
    try {
      const content = await work();
      if (isLatest() && content !== undefined) this.show(content);
    } catch (error) {
      if (isLatest()) this.show(errorMessage(error));
    }
    if (isLatest()) this.element.removeAttribute("aria-busy");
  }

  /** Mark the panel busy. Return a function that tells whether this is still the latest load. */
  begin() {
    const token = {};
    this.token = token;
    this.element.setAttribute("aria-busy", "true");
    return () => this.token === token;
  }

  /** Replace the content by an element or a list of elements. Null and false are skipped. */
  show(content) {
    this.element.replaceChildren(...[content].flat().filter(Boolean));
  }

  /** Remove the content. The result of work that still runs is not shown. */
  clear() {
    this.token = null;
    this.element.removeAttribute("aria-busy");
    this.element.replaceChildren();
  }
}
