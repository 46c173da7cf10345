"""What is counted of verdicts: rows, anomalies by group, their causes, p-values, gaps, and what follows from these."""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from prometheus_client.core import Metric

from service.anomaly.inputs import InputRows
from service.anomaly.smoothing import RunningMean
from service.anomaly.verdicts import Verdicts
from service.inference.registry import Catalogue, ServedModel
from service.monitoring.drift import Drift
from service.monitoring.metric_types import Counter, Gauge, Histogram
from service.shared_memory import SharedCounters

P_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_TOLERANT = tuple(bound * (1 + 1e-6) for bound in P_BOUNDS)  # p-values are fractions rounded to float32
_EDGES = np.array(_TOLERANT)
FEW = 4  # rows up to which a loop is faster than NumPy
MOST_LABELS = 100  # groups, and features, of one model that get a label of their own
OTHER = "other"
WHO = ("model", "version")
Who = tuple[str, str]


class AnomalyMetrics:
    """Counts verdicts. The event loop's thread alone writes.

    Args:
        counts: of this process and its siblings.
        half_life: rows, of the mean severity by which a group raises an alarm.
    """

    def __init__(self, counts: SharedCounters, half_life: float) -> None:
        self._scored = Counter(counts, "elbo_scored_rows", "Rows judged by /anomaly and remote write", WHO)
        self._anomalies = Counter(counts, "elbo_anomalies", "Rows called anomalous", (*WHO, "group"))
        self.alarms = Counter(
            counts, "elbo_alarms", "Rows at which a group's mean severity was above 1", (*WHO, "group")
        )
        self.causes = Counter(
            counts, "elbo_anomaly_causes", "Anomalous rows by the feature that contributed most", (*WHO, "feature")
        )
        self._failed = Counter(counts, "elbo_unreadable_rows", "Rows among others that could not be judged", WHO)
        self._unknown = Counter(counts, "elbo_unknown_fields", "Values whose name is no feature's", WHO)
        self._missing = Counter(counts, "elbo_missing_values", "Values that were imputed", (*WHO, "feature"))
        self._p_values = Histogram(counts, "elbo_p_value", "Of judged rows; uniform for a healthy model", WHO, P_BOUNDS)
        self._evidence = Gauge(counts, "elbo_drift_evidence", "log10 of the evidence against uniform p-values", WHO)
        self._stale = Gauge(counts, "elbo_drift_alarm", "1 where that evidence says that the model is stale", WHO)
        self._samples = Counter(counts, "elbo_remote_samples", "Samples of remote write", (*WHO, "outcome"))
        self._waiting = Gauge(counts, "elbo_remote_waiting_rows", "Rows that wait for their last sample")
        self._alerts = Gauge(counts, "elbo_alerts", "Alerts that are not resolved", ("model",))
        self._unsent = Gauge(counts, "elbo_alerts_waiting", "Alerts that Alertmanager has not taken yet")
        self._pushes = Counter(counts, "elbo_alert_pushes", "Alerts posted to Alertmanager", ("outcome",))
        self._told = dict.fromkeys(("sent", "refused", "retried"), 0)
        self._half_life = half_life
        self._means: dict[tuple[Who, str], RunningMean] = {}
        self._labels: dict[tuple[str, str, str], set[str]] = {}
        self._drifts: dict[Who, Drift] = {}

    def count(self, served: ServedModel, input_rows: InputRows, verdicts: Verdicts | None) -> None:
        """Verdicts have been given on the rows of `input_rows` that could be read, if there were any."""
        who, judged = served.who, 0
        if verdicts is not None:
            judged = verdicts.scores.usable_count
            self._observe(who, verdicts)
            self._follow(who, verdicts)
            if True in verdicts.is_anomaly:
                self._blame(served, verdicts)
        self._scored.add(who, judged)
        if input_rows.unknown_fields:
            self._unknown.add(who, input_rows.unknown_fields)
        if input_rows.rows_received > judged:
            self._failed.add(who, input_rows.rows_received - judged)
        if input_rows.parsed.missing is not None:
            columns = input_rows.parsed.missing.sum(axis=0)
            for column in np.flatnonzero(columns):
                name = self._bounded(*who, "feature", served.row_schema.names[column])
                self._missing.add((*who, name), float(columns[column]))

    def count_samples(self, served: ServedModel, outcomes: Mapping[str, int]) -> None:
        """What has become of samples that came by remote write."""
        for outcome, count in outcomes.items():
            self._samples.add((*served.who, outcome), count)

    def waiting(self, rows: int) -> None:
        """So many rows wait for their last sample."""
        self._waiting.mine(())[0] = rows

    def _observe(self, who: Who, verdicts: Verdicts) -> None:
        numbers, scores = self._p_values.mine(who), verdicts.scores
        p_values = scores.p_value if scores.all_finite else scores.p_value[scores.usable]
        if len(p_values) <= FEW:
            for p_value in p_values.tolist():
                numbers[min(bisect_left(_TOLERANT, p_value), len(P_BOUNDS) - 1)] += 1.0
                numbers[-1] += p_value
            return
        places = np.searchsorted(_EDGES, p_values).clip(max=len(P_BOUNDS) - 1)
        for place, count in enumerate(np.bincount(places).tolist()):
            if count:
                numbers[place] += count
        numbers[-1] += float(p_values.sum())

    def _follow(self, who: Who, verdicts: Verdicts) -> None:
        """Follow each group's mean severity, in the order of its rows' times."""
        severities, input_rows = verdicts.scores.severity.tolist(), verdicts.input_rows
        rows = (
            range(len(severities)) if input_rows.time is None else np.argsort(input_rows.time, kind="stable").tolist()
        )
        found: dict[str, list[float]] = {}
        if input_rows.group is None:
            found[""] = severities if input_rows.time is None else [severities[row] for row in rows]
        else:
            for row in rows:
                found.setdefault(input_rows.group[row] or "", []).append(severities[row])
        for name, values in found.items():
            group, mean = self._followed(who, name)
            if alarms := mean.count_above_one(values):
                self.alarms.add((*who, group), alarms)

    def _followed(self, who: Who, name: str) -> tuple[str, RunningMean]:
        group = self._bounded(*who, "group", name)
        mean = self._means.get((who, group))
        if mean is None:
            mean = self._means[who, group] = RunningMean(self._half_life)
        return group, mean

    def _blame(self, served: ServedModel, verdicts: Verdicts) -> None:
        """Count anomalies by group, and by the feature that contributed most."""
        who, rows = served.who, [row for row, flag in enumerate(verdicts.is_anomaly) if flag]
        groups = verdicts.input_rows.group
        ill = Tally(groups[row] for row in rows) if groups else {None: len(rows)}
        for name, count in ill.items():
            self._anomalies.add((*who, self._bounded(*who, "group", name or "")), count)
        causes = verdicts.scores.contribution[rows].argmax(axis=1)
        for column, count in Tally(causes.tolist()).items():
            self.causes.add((*who, self._bounded(*who, "feature", served.row_schema.names[column])), count)

    def _bounded(self, model: str, version: str, kind: str, value: str) -> str:
        """`value`, or OTHER if that many others are known already: labels that senders choose must not fill memory."""
        known = self._labels.setdefault((model, version, kind), set())
        if value in known:
            return value
        if len(known) >= MOST_LABELS:
            return OTHER
        known.add(value)
        return value

    def look_for_drift(self, catalogue: Catalogue) -> None:
        """Update the gauges of drift from the sums of all processes. For one of them to call, now and then."""
        for who, (*counts, _, _) in self._p_values.sums().items():
            served = catalogue.models.get(who[0], {}).get(int(who[1]))
            if served is None:
                continue
            key: Who = (who[0], who[1])
            if key not in self._drifts:
                self._drifts[key] = Drift(P_BOUNDS, served.manifest.calibration.rows)
                self._drifts[key].look([0.0] * len(P_BOUNDS))
            drift = self._drifts[key]
            drift.look(counts)
            self._evidence.mine(key)[0] = drift.evidence
            self._stale.mine(key)[0] = float(drift.alarm)

    def tell_of_alerts(self, active: Iterable[tuple[str, str]], waiting: int, outcomes: Mapping[str, int]) -> None:
        """Count the alerts that last, by (model, group), those that wait, and what has become of the others."""
        lasting = Tally(model for model, _ in active)
        for model in {*lasting, *(labels[0] for labels in self._alerts.sums())}:
            self._alerts.mine((model,))[0] = float(lasting[model])
        self._unsent.mine(())[0] = float(waiting)
        for outcome, count in dict(outcomes).items():
            self._pushes.add((outcome,), count - self._told[outcome])
            self._told[outcome] = count

    def metrics(self) -> Iterator[Metric]:
        """For Prometheus."""
        families = (
            self._scored, self._anomalies, self.alarms, self.causes, self._failed, self._unknown, self._missing,
            self._p_values, self._evidence, self._stale, self._samples,
            self._waiting, self._alerts, self._unsent, self._pushes,
        )  # fmt: skip
        for family in families:
            yield family.metric()
