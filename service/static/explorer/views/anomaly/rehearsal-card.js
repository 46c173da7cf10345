// The card that replays a history from a file: the alerts that the server would have sent.

import { rehearse } from "../../lib/api.js";
import { UserError } from "../../lib/errors.js";
import { number } from "../../lib/format.js";
import { listsIncidents, parseIncidents } from "../../lib/incidents.js";
import { LatestTask } from "../../lib/tasks.js";
import { card, field } from "../../ui/controls.js";
import { h, scrollable, tableHead } from "../../ui/dom.js";
import { AsyncPanel, errorMessage } from "../../ui/messages.js";

const TYPES = { csv: "text/csv", ndjson: "application/x-ndjson", jsonl: "application/x-ndjson" };
const HEADER_BYTES = 10_000; // of a CSV file, read to tell a list of incidents from a history
const MAX_ALERT_GROUPS = 100; // as in service/anomaly/alert_rule.py
const TOO_LARGE = ["too_many_rows", "body_too_large"];

export class RehearsalCard {
  constructor({ model }) {
    this.model = model;
    this.file = null;
    this.known = null; // the file of known incidents
    this.task = new LatestTask();
    this.results = new AsyncPanel();
    this.element = card("Rehearse alerts", this.introduction(), this.controls(), this.results.element);
    this.element.classList.add("rehearsal");
    this.acceptDrops();
  }

  introduction() {
    const text =
      "Drop a file of rows with times here: the server judges them in order of time, as if each arrived at its time, " +
      "and says which alerts it would have sent. Nothing is remembered. With a file of known incidents, it also says " +
      "which of them were found, and which alerts were false.";
    return h("p", { class: "muted" }, text);
  }

  controls() {
    const input = h("input", {
      type: "file",
      accept: ".csv,.ndjson,.jsonl",
      "aria-label": "file of the history",
      onchange: () => this.accept(input.files),
    });
    const incidents = h("input", {
      type: "file",
      accept: ".csv",
      "aria-label": "file of the known incidents",
      onchange: () => this.setKnown(incidents.files[0] ?? null),
    });
    this.time = this.columnInput();
    this.group = this.columnInput();
    return h(
      "div",
      { class: "controls" },
      field("History (CSV or NDJSON)", input),
      field("Known incidents (CSV: start, end, group)", incidents),
      field("Column of times", this.time),
      field("Column of groups", this.group),
    );
  }

  /** An input for the name of a column. If it is empty, the server takes the column of the training data. */
  columnInput() {
    const onchange = () => this.replay();
    return h("input", { type: "text", placeholder: "as in training", spellcheck: "false", onchange });
  }

  acceptDrops() {
    const mark = (isOver) => this.element.classList.toggle("drop-target", isOver);
    this.element.addEventListener("dragover", (event) => {
      event.preventDefault(); // otherwise the browser opens the file
      mark(true);
    });
    this.element.addEventListener("dragleave", () => mark(false));
    this.element.addEventListener("drop", (event) => {
      event.preventDefault();
      mark(false);
      this.accept(event.dataTransfer.files);
    });
  }

  /** Replay with these files: a history, a list of incidents, or both. The header of a CSV file says which it is. */
  async accept(files) {
    for (const file of files) {
      const isKnown = /\.csv$/i.test(file.name) && listsIncidents(await file.slice(0, HEADER_BYTES).text());
      if (isKnown) this.known = file;
      else this.file = file;
    }
    this.replay();
  }

  setKnown(file) {
    this.known = file;
    this.replay();
  }

  replay() {
    const { file, known } = this;
    if (!file) {
      if (known) this.results.show(h("p", { role: "status" }, `Known incidents: ${known.name}. Now drop a history.`));
      return;
    }
    const type = TYPES[file.name.split(".").pop().toLowerCase()];
    if (!type) {
      this.task.stop();
      this.results.show(errorMessage(new UserError(`${file.name} is neither a CSV nor an NDJSON file.`, "wrong_file")));
      return;
    }
    const options = { time: this.time.value.trim(), group: this.group.value.trim() };
    this.results.load(() =>
      this.task.run(async (signal) => {
        try {
          const incidents = known && JSON.stringify(parseIncidents(await known.text(), options.group));
          return show(await rehearse(this.model, file, type, { ...options, incidents }, signal), file.name);
        } catch (error) {
          if (!TOO_LARGE.includes(error.code)) throw error;
          const hint = `For a larger history, use the command elbo backtest ${this.model.name} ${file.name}.`;
          throw new UserError(`${error.message} ${hint}`, error.code, error.requestId);
        }
      }),
    );
  }

  stop() {
    this.task.stop();
  }
}

function show({ report, drawings, errors }, name) {
  const [first] = report.alphas;
  const isMany = report.groups.length > 1;
  const isKnown = first.incidents_found !== null;
  const groups = isMany ? ` of ${report.groups.length} groups` : "";
  const faulty = errors.length
    ? ` ${report.faulty_rows} rows cannot be judged; row ${errors[0].row}: ${errors[0].detail}.`
    : "";
  const period = `${moment(report.first)} to ${moment(report.last)}`;
  const count = h("strong", {}, `${first.alerts} ${plural(first.alerts, "alert")} at α ${number(first.alpha)}`);
  return [
    h("p", { role: "status" }, count, ` in ${report.rows} rows${groups}, ${period}.${faulty}`),
    h("p", { class: "muted" }, rulesText(report.rules) + sharedAlertsText(report.groups.length)),
    alphaTable(report.alphas),
    isMany ? groupTable(report) : null,
    isKnown ? incidentTable(report) : null,
    h("h4", {}, "Severities"),
    h(
      "p",
      { class: "muted" },
      `A row above the dashed line is anomalous at α ${number(first.alpha)}. Red marks are alerts` +
        `${isKnown ? ", shaded bands known incidents" : ""}. The scale is logarithmic.`,
    ),
    drawings.groups.map((text, i) => figure(`${report.groups[i].group || name}: ${alertText(report.groups[i])}`, text)),
    report.worst_false_alerts.length ? h("h4", {}, isKnown ? "Worst false alerts" : "Worst alerts") : null,
    report.worst_false_alerts.map((alert, i) => figure(causesText(alert), drawings.alerts[i])),
  ].flat();
}

function alphaTable(alphas) {
  const rows = alphas.map((at) => [
    number(at.alpha),
    `${at.anomalous_rows} (${number(100 * at.anomalous_share)} %)`,
    at.alerts,
    number(at.alerts_per_day),
    ...(at.incidents_found === null ? [] : knownCells(at)),
  ]);
  const head = ["α", "anomalous rows", "alerts", "a day and group"];
  const known = alphas[0].incidents_found === null ? [] : KNOWN_HEAD;
  return table("alerts by α", [...head, ...known], rows);
}

const KNOWN_HEAD = ["false alerts", "false-alarm rate", "incidents found", "median delay"];

const knownCells = ({
  false_alerts: alerts,
  false_rate: rate,
  incidents_found: found,
  median_delay_seconds: delay,
}) => [alerts, `${number(100 * rate)} %`, found, delay === null ? "" : duration(delay)];

/** Each known incident, and how long after its start it was found at each α. */
function incidentTable({ incidents, alphas }) {
  const rows = incidents.map(({ start, end, group, rows: count, delay_seconds: delays }) => [
    moment(start),
    moment(end),
    group ?? "(all groups)",
    ...delays.map((delay) => (count === 0 ? "no rows" : delay === null ? "not found" : duration(delay))),
  ]);
  return table("known incidents", ["start", "end", "group", ...alphas.map(({ alpha }) => `α ${number(alpha)}`)], rows);
}

/** A duration in the largest unit that gives at least one: `2.5 h`. */
function duration(seconds) {
  const [unit, length] = UNITS.find(([, length]) => seconds >= length) ?? ["s", 1];
  return `${number(seconds / length)} ${unit}`;
}

const UNITS = [
  ["d", 86_400],
  ["h", 3600],
  ["min", 60],
];

function groupTable({ groups }) {
  const rows = groups.map((group) => [
    group.group || "(no group)",
    group.rows,
    group.alerts[0],
    number(group.alerts_per_day[0]),
    group.state ?? "",
  ]);
  return table("alerts by group", ["group", "rows", "alerts", "a day", "state at the end"], rows);
}

function table(label, head, rows) {
  const cells = ([name, ...others]) => [
    h("th", { scope: "row" }, String(name)),
    others.map((value) => h("td", { class: "num" }, String(value))),
  ];
  const body = rows.map((row) => h("tr", {}, cells(row)));
  return scrollable(label, h("table", { class: "rehearsal" }, tableHead(head), h("tbody", {}, body)));
}

/** A drawing of the server, which is SVG, with a title. */
function figure(title, text) {
  const drawn = text ? new DOMParser().parseFromString(text, "text/html").querySelector("svg") : null;
  return h("figure", {}, h("figcaption", {}, title), drawn ? document.importNode(drawn, true) : null);
}

function rulesText({ half_life_rows: halfLife, rows, seconds, calm_seconds: calm, per_day: perDay }) {
  const mean = halfLife ? `the mean severity of half-life ${number(halfLife)} rows` : "the severity";
  const duration = [rows > 1 ? `for ${rows} rows` : "", seconds ? `for ${number(seconds)} s` : ""].filter(Boolean);
  const budget = perDay === null ? "" : ` The policy accepts ${number(perDay)} a day and group.`;
  const lasting = duration.length ? ` ${duration.join(" and ")}` : "";
  const end = `ends after ${number(calm)} s without such a row`;
  return `An alert opens when ${mean} is above 1${lasting}, and ${end}.${budget}`;
}

/** Why the alerts of the server differ from those of the report, if there are many groups. */
const sharedAlertsText = (groups) =>
  groups > MAX_ALERT_GROUPS
    ? ` The server sends alerts for the first ${MAX_ALERT_GROUPS} groups that it sees. The other groups share the ` +
      "alert of the group “other”, so their alerts differ from those counted here."
    : "";

function causesText({ group, start, rows, severity, causes, state }) {
  const names = causes.map(
    ({ name, value, expected }) =>
      `${name} ${value === null ? "is missing" : number(value)} (expected ${number(expected)})`,
  );
  const where = group ? `${group}, ` : "";
  const change = state === "changed" ? "; these rows became the new normal" : "";
  const length = `${rows} ${plural(rows, "row")}`;
  return `${where}${moment(start)}: severity ${number(severity)}, ${length}; ${names.join(", ")}${change}`;
}

const alertText = ({ alerts, alerts_per_day: perDay }) =>
  `${alerts[0]} ${plural(alerts[0], "alert")}, ${number(perDay[0])} a day`;

const plural = (count, word) => (count === 1 ? word : `${word}s`);

/** Unix seconds as date and time in UTC; as a number if no calendar has the date. */
function moment(seconds) {
  const date = new Date(1000 * seconds);
  return Number.isNaN(date.getTime()) ? String(seconds) : date.toISOString().slice(0, 19).replace("T", " ");
}
