"""Metrics of anomaly scoring: rows, anomalies by group and by cause, p-values, missing values, drift and alerts."""

import logging
import math
import time
from bisect import bisect_left
from collections import Counter as Tally
from collections.abc import Collection, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from models.errors import printable, shortened
from service.anomaly.alert_rule import MAX_ALERT_GROUPS
from service.anomaly.inputs import InputRows
from service.anomaly.online_calibration import State
from service.anomaly.smoothing import LastingAlarm, RunningMean
from service.anomaly.streams import STATES, JoinedRows, Outcome
from service.anomaly.verdicts import Scores, Verdicts
from service.inference.registry import Catalogue
from service.inference.served_model import ServedModel
from service.monitoring.alert_causes import MAX_CAUSES, MIN_SHARE, AlertCauses, Cause, format_cause
from service.monitoring.alert_states import AlertStates
from service.monitoring.drift import DriftDetector
from service.monitoring.metric_types import Counter, Gauge, Histogram, Values
from service.shared_memory import SharedCounters

P_VALUE_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
# Bucket bounds, each slightly above the exact value, because float32 may round a p-value up.
_TOLERANT_BOUNDS = tuple(bound * (1 + 1e-6) for bound in P_VALUE_BOUNDS)
_TOLERANT_BOUNDS_ARRAY = np.array(_TOLERANT_BOUNDS)
# Counting yields to the event loop after this many rows, or groups. A group with alarms takes up to 50 µs.
STEP_ROWS = 1000
STEP_GROUPS = 16
MAX_LOOP_ROWS = 4  # for at most this many rows, a Python loop is faster than NumPy
# Limit of the group labels, and of the feature labels, per model version. All further values are counted under OTHER.
MAX_LABELS = MAX_ALERT_GROUPS
MAX_LABEL = 128  # characters of a label value
OTHER = "other"
HISTORY_P_VALUES = "history_p_values"  # key in shared memory; no metric may have this name
MODEL_LABELS = ("model", "version")
ModelLabels = tuple[str, str]

log = logging.getLogger("elbo.anomalies")


class AnomalyMetrics:
    """The metrics of anomaly scoring. Only the event loop's thread may update them.

    Args:
        counters: the counters of all processes.
        half_life: number of rows after which the weight of a row in the running mean severity of its group has halved.
        max_age: age in seconds above which a row with a timestamp is history. History is scored and counted, but raises
            no alerts and is no evidence of drift.
    """

    def __init__(self, counters: SharedCounters, half_life: float, max_age: float = math.inf) -> None:
        by_group = (*MODEL_LABELS, "group")
        by_feature = (*MODEL_LABELS, "feature")
        by_state = (*MODEL_LABELS, "state")
        by_outcome = (*MODEL_LABELS, "outcome")
        self._scored = Counter(counters, "elbo_scored_rows", "Rows scored by /anomaly and remote write", MODEL_LABELS)
        self._anomalies = Counter(counters, "elbo_anomalies", "Rows flagged as anomalous, by group", by_group)
        self.alarms = Counter(
            counters, "elbo_alarms", "Rows at which the running mean severity of their group was above 1", by_group
        )
        self.causes = Counter(
            counters, "elbo_anomaly_causes", "Anomalous rows, by the feature that contributed most", by_feature
        )
        self._unobserved = Counter(
            counters, "elbo_unobserved_rows", "Rows of requests that are not live traffic (observe=false)", MODEL_LABELS
        )
        self._history = Counter(
            counters,
            "elbo_history_rows",
            "Scored rows whose timestamp is older than ELBO_ALERT_MAX_AGE_SECONDS: they raise no alerts",
            MODEL_LABELS,
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
        self._incidents = Counter(
            counters, "elbo_incidents", "Incidents begun: alarms of a group outnumbered its other rows", by_group
        )
        self._changes = Counter(
            counters, "elbo_changes", "Incidents that lasted so long that their rows became the new normal", by_group
        )
        self._groups = Gauge(
            counters, "elbo_groups", "Groups that are remembered, by the state of their calibration", by_state
        )
        self._forgotten = Counter(
            counters, "elbo_forgotten_groups", "Groups forgotten because ELBO_MAX_GROUPS was reached", MODEL_LABELS
        )
        self._warming_up = Counter(counters, "elbo_warming_up_rows", "Rows whose window was not full yet", MODEL_LABELS)
        self._repeated = Counter(
            counters, "elbo_repeated_rows", "Rows whose group already had a row of the same time", MODEL_LABELS
        )
        self._late = Counter(
            counters, "elbo_late_rows", "Rows that were older than the newest row of their group", MODEL_LABELS
        )
        self._silenced = Counter(
            counters, "elbo_silenced_rows", "Rows for which a silence of the model's policy held", MODEL_LABELS
        )
        self._feedback = Counter(
            counters, "elbo_feedback_rows", "Rows of POST /feedback, by verdict", (*MODEL_LABELS, "verdict")
        )
        self._waiting = Gauge(counters, "elbo_remote_waiting_rows", "Remote-write rows that wait for more samples")
        self._alerts = Gauge(counters, "elbo_alerts", "Alerts that are not resolved", ("model",))
        self._alerts_by_state = Gauge(
            counters,
            "elbo_alerts_by_state",
            "Alerts that are not resolved, by the state of the calibration of their group",
            ("model", "state"),
        )
        self._undelivered = Gauge(counters, "elbo_alerts_waiting", "Alerts not yet delivered to Alertmanager")
        self._pushes = Counter(counters, "elbo_alert_pushes", "Alerts posted to Alertmanager, by outcome", ("outcome",))
        self._counted_pushes = dict.fromkeys(("sent", "refused", "retried"), 0)
        # The p-values of history, which the drift statistic subtracts from `elbo_p_value`.
        self._history_p_values = Histogram(counters, HISTORY_P_VALUES, "", MODEL_LABELS, P_VALUE_BOUNDS)
        self.exported = (
            self._scored, self._anomalies, self.alarms, self.causes, self._unobserved, self._history, self._failed,
            self._unknown, self._missing,
            self._p_values, self._evidence, self._stale, self._samples,
            self._incidents, self._changes, self._groups, self._forgotten, self._warming_up, self._repeated, self._late,
            self._silenced, self._feedback, self._waiting, self._alerts, self._alerts_by_state, self._undelivered,
            self._pushes,
        )  # fmt: skip
        self.all = (*self.exported, self._history_p_values)
        self._alert_causes = AlertCauses(counters)
        self.alert_states = AlertStates(counters, max_age)
        self._half_life = half_life
        self._max_age = max_age
        self._models_with_history: set[ModelLabels] = set()  # models whose history has been logged
        self._means: dict[tuple[ModelLabels, str], RunningMean] = {}  # by model and group label
        self._lasting: dict[tuple[ModelLabels, str], LastingAlarm] = {}  # of models whose alarms must last
        # Label values by the values that clients have sent, by model, version and label name.
        self._known_values: dict[tuple[str, str, str], dict[str, str]] = {}
        self._detectors: dict[ModelLabels, DriftDetector] = {}

    def count(self, served: ServedModel, input_rows: InputRows, verdicts: Verdicts | None) -> None:
        """Count the rows of `input_rows`, which are live traffic. `verdicts` is None if no row could be read."""
        for _ in self.count_in_steps(served, input_rows, verdicts):
            pass

    def count_in_steps(self, served: ServedModel, input_rows: InputRows, verdicts: Verdicts | None) -> Iterator[None]:
        """Count as `count` does. Yield after each step, so that other requests have their turn."""
        model = served.metric_labels
        scored = 0
        if verdicts is not None:
            scored = verdicts.scores.usable_count
            scores, silenced = verdicts.scores, verdicts.input_rows.silenced
            p_values = scores.p_value if scores.all_finite else scores.p_value[scores.usable]
            if silenced is not None:  # silenced rows are no evidence of drift
                if count := int((scores.usable & silenced).sum()):
                    self._silenced.add(model, count)
                p_values = scores.p_value[scores.usable & ~silenced]
            _count_p_values(self._p_values.local(model), p_values)
            yield from self._count_alarms(served, verdicts, self._live_rows(model, verdicts))
            if True in verdicts.is_anomaly:
                yield from self._count_anomalies(served, verdicts)
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

    def count_past(self, served: ServedModel, joined: JoinedRows, verdicts: Verdicts, forgotten: int) -> None:
        """Count what the past of the groups says about live rows.

        Args:
            served: the model.
            joined: the rows with their pasts.
            verdicts: the verdicts on them.
            forgotten: how many groups were forgotten meanwhile.
        """
        model, past = served.metric_labels, verdicts.past
        if past is None:
            return
        numbers = (
            (self._repeated, joined.outcomes.count(Outcome.REPEATED)),
            (self._late, joined.outcomes.count(Outcome.LATE)),
            (self._forgotten, forgotten),
            (self._warming_up, sum(rows < past.full_window for rows in past.window_rows or ())),
        )
        for counter, number in numbers:
            if number:
                counter.add(model, number)
        if joined.has_calibration:
            self._record_states(model, joined, verdicts.input_rows)
        for counter, groups in ((self._incidents, past.incidents), (self._changes, past.changes)):
            for group in groups:
                counter.add((*model, self._limited(model, "group", group)), 1)

    def _record_states(self, model: ModelLabels, joined: JoinedRows, input_rows: InputRows) -> None:
        """Record for the alerts the state of each group after its live rows.

        Rows that are old or silenced must not keep an alert open: a group that has no other rows counts as usual.
        Groups that share the label OTHER get no state, because they have none in common.
        """
        oldest = time.time() - self._max_age
        times, silenced = input_rows.time, input_rows.silenced
        for name, rows in joined.order.items():
            group = self._limited(model, "group", name)
            calibration = joined.groups[name].calibration
            if calibration is None or group == OTHER:
                continue
            state = calibration.state
            if state != "usual":
                is_live = np.ones(len(rows), bool) if times is None else ~(times[rows] < oldest)
                if silenced is not None:
                    is_live &= ~silenced[rows]
                state = state if is_live.any() else "usual"
            self.alert_states.record((*model, group), state)

    def count_feedback(self, served: ServedModel, verdict: str, rows: int) -> None:
        """Count the rows that feedback was about."""
        self._feedback.add((*served.metric_labels, verdict), rows)

    def set_groups(self, served: ServedModel, tally: Mapping[int, int]) -> None:
        """Set the number of groups that are remembered, by index of their state. Only the leader may call it."""
        for index, state in enumerate(STATES):
            self._groups.local((*served.metric_labels, state))[0] = float(tally.get(index, 0))

    def count_unobserved(self, served: ServedModel, input_rows: InputRows) -> None:
        """Count the rows of a request that is not live traffic. They count in no other metric of this class."""
        self._unobserved.add(served.metric_labels, input_rows.rows_received)

    def count_samples(self, served: ServedModel, outcomes: Mapping[str, int]) -> None:
        """Count samples of remote write by outcome."""
        for outcome, count in outcomes.items():
            self._samples.add((*served.metric_labels, outcome), count)

    def set_waiting_rows(self, rows: int) -> None:
        """Set the number of remote-write rows in this process that wait for more samples."""
        self._waiting.local(())[0] = rows

    def _live_rows(self, model: ModelLabels, verdicts: Verdicts) -> list[int] | None:
        """Return the rows that may raise an alert, in order of time; None if these are all rows in the given order."""
        times = verdicts.input_rows.time
        if times is None:
            return None
        if len(times) == 1 and not times[0] < time.time() - self._max_age:
            return [0]
        order = np.argsort(times, kind="stable")
        is_history = times < time.time() - self._max_age  # False for a row without a timestamp
        if is_history.any():
            self._count_history(model, verdicts.scores, is_history, verdicts.input_rows.silenced)
            order = order[~is_history[order]]
        rows: list[int] = order.tolist()
        return rows

    def _count_history(
        self,
        model: ModelLabels,
        scores: Scores,
        is_history: npt.NDArray[np.bool_],
        silenced: npt.NDArray[np.bool_] | None,
    ) -> None:
        self._history.add(model, float(is_history.sum()))
        counted = is_history & scores.usable if silenced is None else is_history & scores.usable & ~silenced
        _count_p_values(self._history_p_values.local(model), scores.p_value[counted])
        if model not in self._models_with_history:
            self._models_with_history.add(model)
            log.warning(
                "rows are older than ELBO_ALERT_MAX_AGE_SECONDS (%g s): they are scored and counted, but raise no "
                "alerts; if these rows are live, check the clock and the time zone of the sender",
                self._max_age,
                extra={"fields": {"model": model[0], "version": model[1], "rows": int(is_history.sum())}},
            )

    def _count_alarms(self, served: ServedModel, verdicts: Verdicts, rows: Sequence[int] | None) -> Iterator[None]:
        """Update the mean severity of each group, row by row. Count the rows where the mean exceeds 1.

        Yield after each step. `rows`: the rows to use, in order; None for all rows.
        """
        model = served.metric_labels
        severities, groups = verdicts.scores.severity.tolist(), verdicts.input_rows.group
        if verdicts.input_rows.silenced is not None:
            severities = np.where(verdicts.input_rows.silenced, np.nan, verdicts.scores.severity).tolist()
        rows = range(len(severities)) if rows is None else rows
        rows_by_group: Mapping[str, Sequence[int]] = {"": rows}
        if groups is not None:
            lists: dict[str, list[int]] = {}
            for row in rows:
                lists.setdefault(groups[row] or "", []).append(row)
            rows_by_group = lists
        if len(rows) > STEP_ROWS:
            yield
        for number, (name, group_rows) in enumerate(rows_by_group.items(), 1):
            if number % STEP_GROUPS == 0:
                yield
            group = self._limited(model, "group", name)
            if alarms := self._count_lasting(
                served, group, verdicts, [severities[row] for row in group_rows], group_rows
            ):
                self._record_causes((*model, group), verdicts, group_rows)
                self.alarms.add((*model, group), alarms)

    def _record_causes(self, labels: tuple[str, str, str], verdicts: Verdicts, rows: Sequence[int]) -> None:
        """Keep the causes of the most severe row of `rows` for the alert of a group, unless every row is normal."""
        scores = verdicts.scores
        candidates = np.asarray(rows)
        candidates = candidates[scores.usable[candidates]]
        if not len(candidates):
            return
        row = int(candidates[scores.severity[candidates].argmax()])
        if scores.severity[row] > 1:
            self._alert_causes.record(labels, time.time(), _causes(verdicts, row))

    def causes_of_alert(self, catalogue: Catalogue, labels: tuple[str, ...]) -> list[str]:
        """Return the causes of the latest abnormal row of a group as text, largest contribution first.

        Args:
            catalogue: the models that this process has loaded.
            labels: model, version and group.
        """
        name, version, _ = labels
        served = catalogue.models.get(name, {}).get(int(version))
        if served is None:
            return []
        features = served.manifest.features
        causes = [(features[cause.column], cause) for cause in self._alert_causes.latest(labels)]
        return [format_cause(feature.name, feature.unit, cause) for feature, cause in causes]

    def _count_lasting(
        self, served: ServedModel, group: str, verdicts: Verdicts, severities: list[float], rows: Sequence[int]
    ) -> int:
        """Add the severities of `rows` to the mean of their group. Return after how many of them there is an alarm."""
        mean, policy = self._mean(served.metric_labels, group), served.manifest.policy
        if policy is None or (policy.rules.alarms.rows == 1 and not policy.rules.alarms.seconds):
            return mean.count_above_one(severities)
        rule, key = policy.rules.alarms, (served.metric_labels, group)
        if key not in self._lasting:
            self._lasting[key] = LastingAlarm(mean, rule.rows, rule.seconds)
        now, given = time.time(), verdicts.input_rows.time
        times = [now] * len(rows) if given is None else np.where(np.isnan(given), now, given)[rows].tolist()
        return len(self._lasting[key].find_alarms(severities, times))

    def _mean(self, model: ModelLabels, group: str) -> RunningMean:
        mean = self._means.get((model, group))
        if mean is None:
            mean = self._means[model, group] = RunningMean(self._half_life)
        return mean

    def _count_anomalies(self, served: ServedModel, verdicts: Verdicts) -> Iterator[None]:
        """Count the flagged rows by group, and by the feature that contributed most. Yield after each step."""
        model = served.metric_labels
        rows = [row for row, flag in enumerate(verdicts.is_anomaly) if flag]
        groups = verdicts.input_rows.group
        rows_by_group = Tally(groups[row] for row in rows) if groups else {None: len(rows)}
        for number, (name, count) in enumerate(rows_by_group.items(), 1):
            if number % STEP_GROUPS == 0:
                yield
            self._anomalies.add((*model, self._limited(model, "group", name or "")), count)
        columns: Tally[int] = Tally()
        for start in range(0, len(rows), STEP_ROWS):
            if start:
                yield
            columns.update(verdicts.scores.contribution[rows[start : start + STEP_ROWS]].argmax(axis=1).tolist())
        for column, count in columns.items():
            feature = self._limited(model, "feature", served.row_schema.names[column])
            self.causes.add((*model, feature), count)

    def _limited(self, model: ModelLabels, label: str, value: str) -> str:
        """Return the label value for `value`, or OTHER if `value` is new and the label already has MAX_LABELS values.

        The limit is needed because clients may send any number of different values. A value of more than MAX_LABEL
        characters is shortened, because shared memory, every scrape and every alert contain it. Control characters are
        escaped, so that they reach neither Prometheus nor the people who read an alert.
        """
        value = shortened(value, MAX_LABEL)
        known = self._known_values.setdefault((*model, label), {})
        if value in known:
            return known[value]
        if len(known) >= MAX_LABELS:
            return OTHER
        known[value] = shortened(printable(value), MAX_LABEL)
        return known[value]

    def update_drift(self, catalogue: Catalogue) -> None:
        """Update the drift gauges from the p-values of all processes. Only the leader may call it."""
        history = self._history_p_values.sums()
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
            *old, _, _ = history.get(model, [0.0] * (len(buckets) + 2))
            detector.update([count - count_of_old for count, count_of_old in zip(buckets, old, strict=True)])
            self._evidence.local(model)[0] = detector.evidence
            self._stale.local(model)[0] = float(detector.alarm)

    def update_alerts(
        self, active: Sequence[tuple[str, State | None]], pending: int, outcomes: Mapping[str, int]
    ) -> None:
        """Update the metrics of alerts. Only the leader may call it.

        Args:
            active: the model of each alert that is not resolved, and the state of its group if it has one.
            pending: the number of alerts that are not yet delivered.
            outcomes: the number of alerts since the start by outcome: sent, refused or retried.
        """
        active_per_model = Tally(model for model, _ in active)
        for model in {*active_per_model, *(labels[0] for labels in self._alerts.sums())}:
            self._alerts.local((model,))[0] = float(active_per_model[model])
        per_state = Tally(active)
        for model in {model for model, state in active if state} | {
            labels[0] for labels in self._alerts_by_state.sums()
        }:
            for state in STATES:
                self._alerts_by_state.local((model, state))[0] = float(per_state[model, state])
        self._undelivered.local(())[0] = float(pending)
        for outcome, count in dict(outcomes).items():
            self._pushes.add((outcome,), count - self._counted_pushes[outcome])
            self._counted_pushes[outcome] = count

    def forget(self, versions: Collection[tuple[str, ...]]) -> None:
        """Forget what this process knows of `versions`, which are no longer served. Each is given as `ModelLabels`."""
        self._models_with_history.difference_update(versions)
        self._means = {key: mean for key, mean in self._means.items() if key[0] not in versions}
        self._lasting = {key: alarm for key, alarm in self._lasting.items() if key[0] not in versions}
        self._known_values = {key: known for key, known in self._known_values.items() if key[:2] not in versions}
        self._detectors = {model: detector for model, detector in self._detectors.items() if model not in versions}


def _count_p_values(buckets: Values, p_values: npt.NDArray[np.float32]) -> None:
    """Count p-values [G] in the numbers of a histogram with the bounds P_VALUE_BOUNDS."""
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


def _causes(verdicts: Verdicts, row: int) -> list[Cause]:
    """Return the features that contribute most to the score of a row, largest contribution first."""
    contribution, expected = verdicts.scores.contribution[row], verdicts.scores.expected[row]
    x = verdicts.input_rows.parsed.x[row]
    columns = np.argsort(-contribution, kind="stable")[:MAX_CAUSES]
    columns = columns[contribution[columns] >= MIN_SHARE * contribution[columns[0]]]
    causes = [Cause(column, float(x[column]), float(expected[column])) for column in columns.tolist()]
    if verdicts.past is None or verdicts.past.onsets is None or verdicts.past.onsets.times_of is None:
        return causes
    (found,) = verdicts.past.onsets.find(np.array([row]), columns[None], contribution[None])
    return [
        cause._replace(since=onset.since) if (onset := found.get(cause.column)) and onset.since is not None else cause
        for cause in causes
    ]
