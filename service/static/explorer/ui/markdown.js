// Renders the subset of Markdown that Elbo's model cards use: headings, paragraphs, lists, tables and code.

import { h, scrollable } from "./dom.js";

const HEADING_OFFSET = 2; // "#" becomes <h3>, because the page has the <h1> and the view has the <h2>
const MAX_HEADING = 6;
const FENCE = "```";
const STARTS_BLOCK = /^(#|- |\||```)/;

/** The elements of `text`. */
export function renderMarkdown(text) {
  const lines = text.split("\n");
  const elements = [];
  while (lines.length) elements.push(takeBlock(lines));
  return elements.filter(Boolean);
}

/** Remove the next block from `lines` and return its element; null for a blank line. */
function takeBlock(lines) {
  const line = lines.shift();
  if (!line.trim()) return null;
  if (/^#+ /.test(line)) return heading(line);
  if (line.startsWith(FENCE)) return codeBlock(lines);
  if (line.startsWith("- ")) return list([line, ...takeWhile(lines, (next) => next.startsWith("- "))]);
  if (line.startsWith("|")) return table([line, ...takeWhile(lines, (next) => next.startsWith("|"))]);
  const rest = takeWhile(lines, (next) => next.trim() && !STARTS_BLOCK.test(next));
  return h("p", {}, inline([line, ...rest].join(" ")));
}

function takeWhile(lines, belongs) {
  const end = lines.findIndex((line) => !belongs(line));
  return lines.splice(0, end < 0 ? lines.length : end);
}

function heading(line) {
  const [, marks, text] = line.match(/^(#+) (.*)/);
  return h(`h${Math.min(MAX_HEADING, marks.length + HEADING_OFFSET)}`, {}, inline(text));
}

function codeBlock(lines) {
  const code = takeWhile(lines, (next) => !next.startsWith(FENCE));
  lines.shift(); // the closing fence
  return h("pre", { tabindex: "0" }, h("code", {}, code.join("\n")));
}

const list = (items) =>
  h(
    "ul",
    {},
    items.map((item) => h("li", {}, inline(item.slice(2)))),
  );

function table([head, , ...body]) {
  const headCells = splitCells(head).map((cell) => h("th", { scope: "col" }, inline(cell)));
  const bodyRows = body.map((line) =>
    h(
      "tr",
      {},
      splitCells(line).map((cell) => h("td", {}, inline(cell))),
    ),
  );
  return scrollable("table", h("table", {}, h("thead", {}, h("tr", {}, headCells)), h("tbody", {}, bodyRows)));
}

/** The cells of a table line. "\|" stands for a literal bar. */
const splitCells = (line) =>
  line
    .replace(/^\||\|$/g, "")
    .split(/(?<!\\)\|/)
    .map((cell) => cell.trim().replaceAll("\\|", "|"));

/** The nodes of a text in which `code` may occur. */
const inline = (text) => text.split(/`([^`]+)`/).map((part, i) => (i % 2 ? h("code", {}, part) : part));
