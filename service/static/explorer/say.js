// What is shown instead of a result: that it is on its way, that it failed and why, or that there is nothing.

import { Problem } from "./api.js";
import { h } from "./dom.js";

/** An error as a sentence, with the request's id to look up in the log. */
export function say(error) {
  if (!(error instanceof Problem)) console.error(error); // a fault of this page
  return h("p", { class: "problem", role: "alert" }, error.message, error.id ? [" ", h("span", { class: "quiet" }, "Request ", h("code", {}, error.id))] : null);
}

/** Nothing here, and what to do about it. */
export const nothing = (...text) => h("p", { class: "nothing" }, ...text);

/** A place for results: `fill` shows what `work` gives, and until then that it is on its way. */
export class Place {
  constructor(className = "", properties = {}) {
    this.element = h("div", { class: `place ${className}`, ...properties });
  }

  /** Shows the elements that `work` promises; undefined, from work that was aborted, changes nothing. */
  async fill(work) {
    this.element.setAttribute("aria-busy", "true");
    const own = (this.turn = {});
    try {
      const content = await work();
      if (own === this.turn && content !== undefined) this.element.replaceChildren(...[content].flat().filter(Boolean));
    } catch (error) {
      if (own === this.turn) this.element.replaceChildren(say(error));
    }
    if (own === this.turn) this.element.removeAttribute("aria-busy");
  }
}
