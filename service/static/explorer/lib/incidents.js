// The list of known incidents from a CSV file.

import { UserError } from "./errors.js";

const NAMES = ["start", "end"];
const MAX_INCIDENTS = 200; // they are sent in the query, beside the rows in the body

/** Whether a CSV file with this text lists incidents: whether its header has the columns start and end. */
export const listsIncidents = (text) => NAMES.every((name) => header(text).includes(name));

/**
 * The incidents in `text`, CSV with the columns start and end, and perhaps a column of groups. The column of groups is
 * called `group` or as `groupColumn` says, or it is the only other column. Throws UserError.
 */
export function parseIncidents(text, groupColumn = "") {
  const names = header(text);
  const missing = NAMES.filter((name) => !names.includes(name));
  if (missing.length) {
    const expected = "a CSV file whose first line is start,end or start,end,group";
    throw new UserError(`The incidents have no column ${missing.join(", ")}: expected ${expected}.`, "wrong_file");
  }
  const [start, end] = NAMES.map((name) => names.indexOf(name));
  const others = names.filter((name) => !NAMES.includes(name));
  const groupName = others.find((name) => name === "group" || name === groupColumn) ?? others[0];
  const hasGroups = others.length === 1 || ["group", groupColumn].includes(groupName);
  const group = hasGroups ? names.indexOf(groupName) : -1;
  const incidents = lines(text)
    .slice(1)
    .map(splitCells)
    .filter((cells) => cells.some(Boolean))
    .map((cells) => ({ start: cells[start] ?? "", end: cells[end] ?? "", group: cells[group] || null }));
  if (incidents.length > MAX_INCIDENTS) {
    const advice = "for more, use the command elbo backtest with --labels";
    throw new UserError(`Got ${incidents.length} incidents, expected at most ${MAX_INCIDENTS}: ${advice}.`, "too_many");
  }
  return incidents;
}

const header = (text) => splitCells(lines(text)[0] ?? "");

const lines = (text) => text.replace(/^\ufeff/, "").split(/\r?\n|\r/);

const splitCells = (line) => line.split(",").map((cell) => cell.trim().replace(/^"(.*)"$/, "$1"));
