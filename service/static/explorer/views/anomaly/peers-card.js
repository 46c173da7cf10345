// The card that compares the groups of a model, such as hosts, with their peers at this moment.

import { comparePeers } from "../../lib/api.js";
import { number } from "../../lib/format.js";
import { LatestTask } from "../../lib/tasks.js";
import { button, card, term } from "../../ui/controls.js";
import { h, scrollable, tableHead } from "../../ui/dom.js";
import { AsyncPanel } from "../../ui/messages.js";

const DEVIATION =
  "How far the newest row of a group is above the median of all groups, in robust standard deviations: in its " +
  "score or in the distance of its features, whichever is larger.";

export class PeersCard {
  constructor({ model }) {
    this.model = model;
    this.task = new LatestTask();
    this.results = new AsyncPanel();
    const text =
      "A group can be usual for its own past and still differ from its peers. The server compares the newest rows " +
      "of all groups that send rows to it.";
    const compare = button("Compare now", () => this.compare());
    const controls = h("div", { class: "controls" }, compare);
    this.element = card("Peers at this moment", h("p", { class: "muted" }, text), controls, this.results.element);
    this.element.classList.add("peers");
  }

  compare() {
    this.results.load(() => this.task.run(async (signal) => show(await comparePeers(this.model, signal))));
  }

  stop() {
    this.task.stop();
  }
}

function show({ time, compared, others, limit, groups }) {
  const different = groups.filter((group) => group.is_different);
  const names = different.map(({ group }) => group).join(", ");
  const moment = new Date(1000 * time).toISOString().slice(0, 19).replace("T", " ");
  const ignored = others ? ` ${others} more have no row of this time.` : "";
  return [
    h(
      "p",
      { role: "status" },
      h("strong", {}, different.length ? `${names} differ${different.length === 1 ? "s" : ""}` : "No group differs"),
      ` among ${compared} groups at ${moment}.${ignored}`,
    ),
    groupTable(groups),
    h(
      "p",
      { class: "muted" },
      "A group differs if its ",
      term("deviation", DEVIATION),
      ` is above ${number(limit)}. If no group differs, this happens at about 5 % of the moments or less.`,
    ),
  ];
}

function groupTable(groups) {
  const head = ["group", "deviation", "p-value", "features that differ most"];
  const rows = groups.map((group) =>
    h(
      "tr",
      { class: group.is_different ? "bad" : null },
      h("th", { scope: "row" }, group.group),
      h("td", { class: "num" }, number(group.deviation)),
      h("td", { class: "num" }, number(group.p_value)),
      h("td", {}, group.features.map(featureText).join(", ")),
    ),
  );
  return scrollable("groups by deviation", h("table", { class: "rehearsal" }, tableHead(head), h("tbody", {}, rows)));
}

const featureText = ({ name, value, peers }) => `${name} ${number(value)} (peers ${number(peers)})`;
