// The Markdown that Elbo's model cards are written in: headings, paragraphs, lists, tables, code.

import { h } from "./dom.js";

/** Elements of `text`, its headings two steps lower. */
export function markdown(text) {
  const found = [], lines = text.split("\n");
  while (lines.length) found.push(block(lines));
  return found.filter(Boolean);
}

function block(lines) {
  const line = lines.shift();
  if (!line.trim()) return null;
  const heading = line.match(/^(#+) (.*)/);
  if (heading) return h(`h${Math.min(6, heading[1].length + 2)}`, {}, inline(heading[2]));
  if (line.startsWith("```")) return h("pre", { tabindex: "0" }, h("code", {}, take(lines, (next) => !next.startsWith("```"), 1).join("\n")));
  if (line.startsWith("- ")) {
    const items = [line, ...take(lines, (next) => next.startsWith("- "))];
    return h("ul", {}, items.map((item) => h("li", {}, inline(item.slice(2)))));
  }
  if (line.startsWith("|")) return table([line, ...take(lines, (next) => next.startsWith("|"))]);
  return h("p", {}, inline([line, ...take(lines, (next) => next.trim() && !/^(#|- |\||```)/.test(next))].join(" ")));
}

function take(lines, belongs, more = 0) {
  let end = lines.findIndex((line) => !belongs(line));
  if (end < 0) end = lines.length;
  const taken = lines.splice(0, end);
  lines.splice(0, more);
  return taken;
}

function table([head, , ...body]) {
  const cells = (line) => line.replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "table" }, h("table", {},
    h("thead", {}, h("tr", {}, cells(head).map((cell) => h("th", { scope: "col" }, inline(cell))))),
    h("tbody", {}, body.map((line) => h("tr", {}, cells(line).map((cell) => h("td", {}, inline(cell))))))));
}

const inline = (text) => text.split(/`([^`]+)`/).map((part, i) => (i % 2 ? h("code", {}, part) : part));
