"""Metrics of anomaly scoring: rows, anomalies by group and by cause, p-values, missing values, drift and alerts."""

from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from prometheus_client.core import Metric

from service.anomaly.inputs import InputRows
from service.anomaly.smoothing import RunningMean
from service.anomaly.verdicts import Verdicts
from service.inference.registry import Catalogue
from service.inference.served_model import ServedModel
from service.monitoring.drift import DriftDetector
from service.monitoring.metric_types import Counter, Gauge, Histogram
from service.shared_memory import SharedCounters

P_VALUE_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Bucket bounds, each slightly above the exact value, because float32 may round a p-value up.
_TOLERANT_BOUNDS = tuple(bound * (1 + 1e-6) for bound in P_VALUE_BOUNDS)
_TOLERANT_BOUNDS_ARRAY = np.array(_TOLERANT_BOUNDS)
MAX_LOOP_ROWS = 4  # for at most this many rows, a Python loop is faster than NumPy
# Limit of the group labels, and of the feature labels, per model version. All further values are counted under OTHER.
MAX_LABELS = 100
OTHER = "other"
MODEL_LABELS = ("model", "version")
ModelLabels = tuple[str, str]


class AnomalyMetrics:
    """The metrics of anomaly scoring. Only the event loop's thread may update them.

    Args:
        counters: the counters of all processes.
        half_life: number of rows after which the weight of a row in the running mean severity of its group has halved.
    """

    def __init__(self, counters: SharedCounters, half_life: float) -> None:
        by_group = (*MODEL_LABELS, "group")
        by_feature = (*MODEL_LABELS, "feature")
        by_outcome = (*MODEL_LABELS, "outcome")
        self._scored = Counter(counters, "elbo_scored_rows", "Rows scored by /anomaly and remote write", MODEL_LABELS)
        self._anomalies = Counter(counters, "elbo_anomalies", "Rows flagged as anomalous, by group", by_group)
        self.alarms = Counter(
            counters, "elbo_alarms", "Rows at which the running mean severity of their group was above 1", by_group
        )
        self.causes = Counter(
            counters, "elbo_anomaly_causes", "Anomalous rows, by the feature that contributed most", by_feature
        )
        self._failed = Counter(counters, "elbo_unreadable_rows", "Rows that could not be read or scored", MODEL_LABELS)
        self._unknown = Counter(
            counters, "elbo_unknown_fields", "Values whose name is not a feature of the model", MODEL_LABELS
        )
        self._missing = Counter(
            counters, "elbo_missing_values", "Missing values that were imputed, by feature", by_feature
        )
        self._p_values = Histogram(
            counters,
            "elbo_p_value",
            "p-values of the scored rows; uniform unless the model is stale",
            MODEL_LABELS,
            P_VALUE_BOUNDS,
        )
        self._evidence = Gauge(
            counters, "elbo_drift_evidence", "log10 of the evidence against uniform p-values", MODEL_LABELS
        )
        self._stale = Gauge(
            counters, "elbo_drift_alarm", "1 if the drift evidence shows that the model is stale", MODEL_LABELS
        )
        self._samples = Counter(
            counters, "elbo_remote_samples", "Samples received by remote write, by outcome", by_outcome
        )
        self._waiting = Gauge(counters, "elbo_remote_waiting_rows", "Remote-write rows that wait for more samples")
        self._alerts = Gauge(counters, "elbo_alerts", "Alerts that are not resolved", ("model",))
        self._undelivered = Gauge(counters, "elbo_alerts_waiting", "Alerts not yet delivered to Alertmanager")
        self._pushes = Counter(counters, "elbo_alert_pushes", "Alerts posted to Alertmanager, by outcome", ("outcome",))
        self._counted_pushes = dict.fromkeys(("sent", "refused", "retried"), 0)
        self._half_life = half_life
        self._means: dict[tuple[ModelLabels, str], RunningMean] = {}  # by model and group label
        self._known_values: dict[tuple[str, str, str], set[str]] = {}  # by model, version and label name
        self._detectors: dict[ModelLabels, DriftDetector] = {}

    def count(self, served: ServedModel, input_rows: InputRows, verdicts: Verdicts | None) -> None:
        """Count the rows of `input_rows`. `verdicts` is None if no row could be read."""
        model = served.metric_labels
        scored = 0
        if verdicts is not None:
            scored = verdicts.scores.usable_count
            self._count_p_values(model, verdicts)
            self._count_alarms(model, verdicts)
            if True in verdicts.is_anomaly:
                self._count_anomalies(served, verdicts)
        self._scored.add(model, scored)
        if input_rows.unknown_fields:
            self._unknown.add(model, input_rows.unknown_fields)
        if input_rows.rows_received > scored:
            self._failed.add(model, input_rows.rows_received - scored)
        if input_rows.parsed.missing is not None:
            missing_per_column = input_rows.parsed.missing.sum(axis=0)
            for column in np.flatnonzero(missing_per_column):
                feature = self._limited(model, "feature", served.row_schema.names[column])
                self._missing.add((*model, feature), float(missing_per_column[column]))

    def count_samples(self, served: ServedModel, outcomes: Mapping[str, int]) -> None:
        """Count samples of remote write by outcome."""
        for outcome, count in outcomes.items():
            self._samples.add((*served.metric_labels, outcome), count)

    def set_waiting_rows(self, rows: int) -> None:
        """Set the number of remote-write rows in this process that wait for more samples."""
        self._waiting.local(())[0] = rows

    def _count_p_values(self, model: ModelLabels, verdicts: Verdicts) -> None:
        buckets = self._p_values.local(model)
        scores = verdicts.scores
        p_values = scores.p_value if scores.all_finite else scores.p_value[scores.usable]
        last = len(P_VALUE_BOUNDS) - 1
        if len(p_values) <= MAX_LOOP_ROWS:
            for p_value in p_values.tolist():
                buckets[min(bisect_left(_TOLERANT_BOUNDS, p_value), last)] += 1.0
                buckets[-1] += p_value
            return
        places = np.searchsorted(_TOLERANT_BOUNDS_ARRAY, p_values).clip(max=last)
        for place, count in enumerate(np.bincount(places).tolist()):
            if count:
                buckets[place] += count
        buckets[-1] += float(p_values.sum())

    def _count_alarms(self, model: ModelLabels, verdicts: Verdicts) -> None:
        """Update the mean severity of each group, row by row in time order. Count the rows where the mean exceeds 1."""
        severities = verdicts.scores.severity.tolist()
        time, groups = verdicts.input_rows.time, verdicts.input_rows.group
        order = range(len(severities)) if time is None else np.argsort(time, kind="stable").tolist()
        severities_by_group: dict[str, list[float]] = {}
        if groups is None:
            severities_by_group[""] = severities if time is None else [severities[row] for row in order]
        else:
            for row in order:
                severities_by_group.setdefault(groups[row] or "", []).append(severities[row])
        for name, group_severities in severities_by_group.items():
            group = self._limited(model, "group", name)
            if alarms := self._mean(model, group).count_above_one(group_severities):
                self.alarms.add((*model, group), alarms)

    def _mean(self, model: ModelLabels, group: str) -> RunningMean:
        mean = self._means.get((model, group))
        if mean is None:
            mean = self._means[model, group] = RunningMean(self._half_life)
        return mean

    def _count_anomalies(self, served: ServedModel, verdicts: Verdicts) -> None:
        """Count the flagged rows by group, and by the feature that contributed most."""
        model = served.metric_labels
        rows = [row for row, flag in enumerate(verdicts.is_anomaly) if flag]
        groups = verdicts.input_rows.group
        rows_by_group = Tally(groups[row] for row in rows) if groups else {None: len(rows)}
        for name, count in rows_by_group.items():
            self._anomalies.add((*model, self._limited(model, "group", name or "")), count)
        columns = verdicts.scores.contribution[rows].argmax(axis=1)
        for column, count in Tally(columns.tolist()).items():
            feature = self._limited(model, "feature", served.row_schema.names[column])
            self.causes.add((*model, feature), count)

    def _limited(self, model: ModelLabels, label: str, value: str) -> str:
        """Return `value`, or OTHER if `value` is new and the label already has MAX_LABELS values.

        The limit is needed because clients may send any number of different values.
        """
        known = self._known_values.setdefault((*model, label), set())
        if value in known:
            return value
        if len(known) >= MAX_LABELS:
            return OTHER
        known.add(value)
        return value

    def update_drift(self, catalogue: Catalogue) -> None:
        """Update the drift gauges from the p-values of all processes. Only the leader may call it."""
        for (name, version), (*buckets, _, _) in self._p_values.sums().items():
            served = catalogue.models.get(name, {}).get(int(version))
            if served is None:
                continue
            model = name, version
            detector = self._detectors.get(model)
            if detector is None:
                detector = DriftDetector(P_VALUE_BOUNDS, served.manifest.calibration.rows)
                detector.update([0.0] * len(P_VALUE_BOUNDS))
                self._detectors[model] = detector
            detector.update(buckets)
            self._evidence.local(model)[0] = detector.evidence
            self._stale.local(model)[0] = float(detector.alarm)

    def update_alerts(self, active: Iterable[tuple[str, str]], pending: int, outcomes: Mapping[str, int]) -> None:
        """Update the metrics of alerts. Only the leader may call it.

        Args:
            active: the model and the group of each alert that is not resolved.
            pending: the number of alerts that are not yet delivered.
            outcomes: the number of alerts since the start by outcome: sent, refused or retried.
        """
        active_per_model = Tally(model for model, _ in active)
        for model in {*active_per_model, *(labels[0] for labels in self._alerts.sums())}:
            self._alerts.local((model,))[0] = float(active_per_model[model])
        self._undelivered.local(())[0] = float(pending)
        for outcome, count in dict(outcomes).items():
            self._pushes.add((outcome,), count - self._counted_pushes[outcome])
            self._counted_pushes[outcome] = count

    def metrics(self) -> Iterator[Metric]:
        """Yield every metric of this class."""
        families = (
            self._scored, self._anomalies, self.alarms, self.causes, self._failed, self._unknown, self._missing,
            self._p_values, self._evidence, self._stale, self._samples,
            self._waiting, self._alerts, self._undelivered, self._pushes,
        )  # fmt: skip
        for family in families:
            yield family.metric()
