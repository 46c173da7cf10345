// Rows from the user: CSV, JSON or npy.

import { UserError } from "./errors.js";
import { featureName } from "./model.js";
import { fromNpy } from "./npy.js";

const NAMES_IN_MESSAGE = 3;

/** The rows in `text`: JSON (a list, or {"inputs": …}) or CSV, with or without a header. Throws UserError. */
export function parseRows(text, model) {
  const trimmed = text.trim();
  if (!trimmed) throw new UserError("The text is empty. Paste numbers separated by commas.");
  const rows = /^[[{]/.test(trimmed) ? fromJson(trimmed, model) : fromCsv(trimmed, model);
  if (!rows.length) throw new UserError("There are no rows below the header.");
  rows.forEach((row, i) => {
    checkRow(row, i, model);
  });
  return rows;
}

/** The rows of a file: .npy, CSV or JSON. A missing value is null. Throws UserError. */
export async function readRowFile(file, model) {
  if (!file.name.endsWith(".npy")) return parseRows(await file.text(), model);
  const rows = fromNpy(await file.arrayBuffer());
  if (rows[0].length !== model.width) {
    throw new UserError(
      `The rows of ${file.name} have ${rows[0].length} numbers; ${model.name} expects ${model.width}.`,
    );
  }
  return rows.map((row) => Array.from(row, (v) => (Number.isNaN(v) ? null : v)));
}

function checkRow(row, i, model) {
  if (row.length !== model.width) {
    throw new UserError(`Row ${i + 1} has ${row.length} numbers; ${model.name} expects ${model.width}.`);
  }
  const invalid = row.findIndex((v) => v !== null && !Number.isFinite(v));
  if (invalid >= 0) throw new UserError(`Row ${i + 1}, ${featureName(model, invalid)}: the value is not a number.`);
}

function fromJson(text, model) {
  const parsed = parseJson(text);
  const value = parsed.inputs ?? parsed.records ?? parsed;
  const isList = Array.isArray(value) && (Array.isArray(value[0]) || typeof value[0] === "object");
  const list = isList ? value : [value];
  const rows = isSingleNestedRow(list, model) ? [list] : list;
  return rows.map((row) => (Array.isArray(row) ? row.flat(3) : fromRecord(row, model)));
}

/**
 * The values of a record in the order of the features; null for an absent key. A key may have a unit: "cpu [%]".
 * Throws UserError if the record lacks a feature and has a key that is not a feature, as /anomaly does.
 */
function fromRecord(record, model) {
  const byName = Object.fromEntries(Object.entries(record).map(([key, value]) => [withoutUnit(key), value]));
  const features = model.features.map(({ name }) => name);
  const known = new Set([...features, "timestamp", "host"]);
  const unknown = Object.keys(record).filter((key) => !known.has(key) && !known.has(withoutUnit(key)));
  const absent = features.filter((name) => !(name in record || name in byName));
  if (absent.length && unknown.length) {
    throw new UserError(`A record lacks ${summarize(absent)}, and ${summarize(unknown)} is not a feature.`);
  }
  return features.map((name) => record[name] ?? byName[name] ?? null);
}

function parseJson(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new UserError("The text looks like JSON, but it is not valid JSON.");
  }
}

/** Whether `list` is a single image (a list of lines of pixels) instead of a list of rows. */
function isSingleNestedRow(list, model) {
  const [height, width] = model.shape;
  if (model.shape.length < 2 || !Array.isArray(list[0])) return false;
  return list.length === height && list[0].length === width && typeof list[0][0] === "number";
}

function fromCsv(text, model) {
  const lines = text
    .split(/\r?\n/)
    .filter((line) => line.trim())
    .map(splitCells);
  if (!isHeader(lines[0])) return lines.map((cells) => cells.map(toNumber));
  const columns = findColumns(lines[0], model);
  return lines.slice(1).map((cells) => columns.map((column) => toNumber(cells[column])));
}

const withoutUnit = (title) => title.replace(/\s*\[[^\]]*\]$/, "").trim();

const splitCells = (line) => line.split(/[,;\t]/).map((cell) => cell.trim().replace(/^"(.*)"$/, "$1"));

const isHeader = (cells) =>
  cells.some((cell) => cell !== "" && !Number.isFinite(Number(cell)) && cell.toLowerCase() !== "nan");

const toNumber = (cell) => (!cell || cell.toLowerCase() === "nan" ? null : Number(cell));

/** The column index of each feature. A name may have a unit: "cpu [%]". Throws UserError if a feature has no column. */
function findColumns(header, model) {
  const withoutUnits = header.map(withoutUnit);
  const columns = model.features.map(({ name }) => {
    const column = withoutUnits.indexOf(name);
    return column < 0 ? header.indexOf(name) : column;
  });
  const missing = model.features.filter((_, i) => columns[i] < 0).map((feature) => feature.name);
  if (missing.length) throw new UserError(`The header lacks ${summarize(missing)}.`);
  return columns;
}

function summarize(names) {
  const more = names.length - NAMES_IN_MESSAGE;
  return names.slice(0, NAMES_IN_MESSAGE).join(", ") + (more > 0 ? ` and ${more} more` : "");
}
