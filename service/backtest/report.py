"""Summarise a replay: alerts a day by group, which incidents were found and after how long, the worst false alerts.

An alert is what the server sends to Alertmanager as one alert: see `service.anomaly.alert_rule`. If incidents are
known, an alert is false if none of its rows lies in an incident of its group. Without known incidents, every alert may
be a false one.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from service.anomaly.alert_rule import find_alerts
from service.backtest.incidents import Incident
from service.backtest.replay import Cause, Replay
from service.codec.long_work import pause_if_due

DAY = 86_400.0  # seconds
WORST_ALERTS = 10


@dataclass(frozen=True)
class Alert:
    """An alert of one group.

    Args:
        group: name of the group; empty if the rows have no groups.
        start: Unix seconds of the row that opens it.
        end: Unix seconds of the last row that keeps it open.
        rows: number of rows from `start` to `end`.
        anomalous_rows: how many of these rows are anomalous.
        is_false: whether none of the rows lies in a known incident.
        first_row: index of the row at `start` if rows are ordered by group and time.
        worst_row: index of the row with the largest severity, among the rows of the alert and the anomalous rows right
            before it.
        worst: time of the worst row, in Unix seconds.
        severity: severity of the worst row.
        p_value: p-value of the worst row.
        state: state of the group after the last row: "changed" if the rows became the new normal. None without online
            calibration.
        causes: the features that contribute most to the score of the worst row; empty unless the alert is one of the
            worst.
    """

    group: str
    start: float
    end: float
    rows: int
    anomalous_rows: int
    is_false: bool
    first_row: int
    worst_row: int
    worst: float
    severity: float
    p_value: float
    state: str | None
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True)
class AlphaSummary:
    """The alerts at one alpha.

    Args:
        alpha: the false-alarm rate.
        anomalous_rows: number of anomalous rows.
        anomalous_share: share of all rows that are anomalous.
        alerts: number of alerts.
        false_alerts: number of alerts outside incidents.
        alerts_per_day: alerts of one group in one day, on average over groups.
        false_rate: share of the rows outside incidents that are anomalous.
        incidents_found: number of incidents that were found; None if no incidents are known.
        median_delay_seconds: median time from the start of a found incident to its alert.
    """

    alpha: float
    anomalous_rows: int
    anomalous_share: float
    alerts: int
    false_alerts: int
    alerts_per_day: float
    false_rate: float
    incidents_found: int | None
    median_delay_seconds: float | None


@dataclass(frozen=True)
class GroupSummary:
    """The alerts of one group. Lists have one number per alpha.

    Args:
        group: name of the group; empty if the rows have no groups.
        rows: number of rows.
        days: time that the rows cover.
        alerts: number of alerts.
        alerts_per_day: alerts divided by days.
        false_rate: share of the rows outside incidents that are anomalous.
        state: the state of the online calibration after the last row; None without online calibration.
    """

    group: str
    rows: int
    days: float
    alerts: list[int]
    alerts_per_day: list[float]
    false_rate: list[float]
    state: str | None


@dataclass(frozen=True)
class IncidentSummary:
    """Whether an incident was found: whether one of its rows is an alarm, which opens an alert or keeps one open.

    Args:
        start, end, group: as in `Incident`.
        rows: number of rows in the incident. An incident without rows cannot be found.
        delay_seconds: for each alpha, the time from the start of the incident to the first alarm in it; None if
            there is none.
    """

    start: float
    end: float
    group: str | None
    rows: int
    delay_seconds: list[float | None]


@dataclass(frozen=True)
class AlertRules:
    """When an alert opens and ends.

    Args:
        half_life_rows: half-life, in rows, of the running mean of the severity of a group.
        rows: how many rows the running mean must be above 1 before an alert opens.
        seconds: how long it must be above 1 before an alert opens.
        calm_seconds: an alert ends after this time without an alarm and without an incident, see `AlertRule`.
        per_day: the budget of the policy: accepted false alerts for each day and group; None without a budget.
    """

    half_life_rows: float
    rows: int
    seconds: float
    calm_seconds: float
    per_day: float | None


@dataclass(frozen=True)
class Report:
    """The result of a backtest. The groups with the most alerts come first, and the most severe alerts."""

    model: str
    source: str
    rows: int
    faulty_rows: int
    warming_up_rows: int
    first: float
    last: float
    rules: AlertRules
    alphas: list[AlphaSummary]
    groups: list[GroupSummary]
    incidents: list[IncidentSummary]
    worst_false_alerts: list[Alert]  # at the first alpha

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)


def make_report(replay: Replay, incidents: Sequence[Incident] | None, model: str, source: str, faulty: int) -> Report:
    """Return the report of a replay.

    Args:
        replay: the judged history.
        incidents: the known incidents; None if none are known.
        model: name and version of the model.
        source: the file of the history.
        faulty: number of rows of the file that could not be judged.
    """
    history = replay.history
    inside = np.zeros(len(history), bool)
    found = [_find(replay, incident, inside) for incident in incidents or ()]
    alerts = [list_alerts(replay, index, inside) for index in range(len(replay.alphas))]
    days = group_days(replay)
    return Report(
        model=model,
        source=source,
        rows=len(history),
        faulty_rows=faulty,
        warming_up_rows=int(replay.is_warming_up.sum()),
        first=float(history.time.min()),
        last=float(history.time.max()),
        rules=_rules_of(replay),
        alphas=[
            _summarise_alpha(replay, index, alerts[index], inside, days, found if incidents is not None else None)
            for index in range(len(replay.alphas))
        ],
        groups=_summarise_groups(replay, alerts, inside, days),
        incidents=found,
        worst_false_alerts=_worst(replay, alerts[0]),
    )


def _rules_of(replay: Replay) -> AlertRules:
    options, rule = replay.options, replay.alarm_rule
    return AlertRules(options.alert_half_life, rule.rows, rule.seconds, replay.calm_seconds, rule.per_day)


def _worst(replay: Replay, alerts: Sequence[Alert]) -> list[Alert]:
    """Return the most severe false alerts, with their causes."""
    false = sorted((alert for alert in alerts if alert.is_false), key=lambda alert: -alert.severity)
    return [
        replace(alert, causes=replay.causes_before(alert.worst_row, _first_anomalous_row(replay, 0, alert.first_row)))
        for alert in false[:WORST_ALERTS]
    ]


def _find(replay: Replay, incident: Incident, inside: npt.NDArray[np.bool_]) -> IncidentSummary:
    """Return whether an incident was found, and mark its rows in `inside`."""
    pause_if_due()
    history = replay.history
    rows = (history.time >= incident.start) & (history.time <= incident.end)
    if incident.group is not None:
        if incident.group in history.groups:
            rows &= history.group == history.groups.index(incident.group)
        else:
            rows[:] = False
    inside |= rows
    delays: list[float | None] = []
    for is_alarm in replay.is_alarm:
        times = history.time[rows & is_alarm]
        delays.append(float(times.min() - incident.start) if len(times) else None)
    return IncidentSummary(incident.start, incident.end, incident.group, int(rows.sum()), delays)


def find_alert_rows(replay: Replay, index: int) -> npt.NDArray[np.intp]:
    """Return for each of A alerts its first row and the row after its last row, [A, 2]. `index`: index of the alpha."""
    history, options = replay.history, replay.options
    found: list[tuple[int, int]] = []
    for group in range(len(history.groups)):
        pause_if_due()
        rows = history.rows_of(group)
        alarms = np.flatnonzero(replay.is_alarm[index, rows])
        if not len(alarms):
            continue
        incidents = np.flatnonzero(replay.is_incident[rows])
        alerts = find_alerts(
            history.time[rows].tolist(),
            alarms.tolist(),
            incidents.tolist(),
            replay.calm_seconds,
            options.incident_seconds,
        )
        found += [(rows.start + first, rows.start + last + 1) for first, last in alerts]
    return np.array(found, np.intp).reshape(-1, 2)


def list_alerts(replay: Replay, index: int, inside: npt.NDArray[np.bool_]) -> list[Alert]:
    """Return the alerts at one alpha.

    Args:
        replay: the judged history.
        index: index of the alpha.
        inside: which rows lie in a known incident.
    """
    history, severity = replay.history, replay.severity[index]
    alerts = []
    for start, end in find_alert_rows(replay, index).tolist():
        begin = _first_anomalous_row(replay, index, start)
        worst = begin + int(severity[begin:end].argmax())
        alerts.append(
            Alert(
                group=history.groups[history.group[start]],
                start=float(history.time[start]),
                end=float(history.time[end - 1]),
                rows=end - start,
                anomalous_rows=int((severity[start:end] > 1).sum()),
                is_false=not inside[start:end].any(),
                first_row=start,
                worst_row=worst,
                worst=float(history.time[worst]),
                severity=float(severity[worst]),
                p_value=float(replay.p_value[worst]),
                state=None if replay.states is None else replay.states[end - 1],
            )
        )
    return alerts


def _first_anomalous_row(replay: Replay, index: int, row: int) -> int:
    """Return the first of the anomalous rows right before `row` in its group; `row` if there are none."""
    severity, first = replay.severity[index], replay.history.starts[replay.history.group[row]]
    while row > first and severity[row - 1] > 1:
        row -= 1
    return row


def group_days(replay: Replay) -> npt.NDArray[np.float64]:
    """Return the days that each group's rows cover, including the step after its last row."""
    history = replay.history
    days = np.empty(len(history.groups))
    for index in range(len(history.groups)):
        times = history.time[history.rows_of(index)]
        steps = np.diff(times)
        usual = float(np.median(steps[steps > 0])) if (steps > 0).any() else 0.0
        days[index] = (times[-1] - times[0] + usual) / DAY
    return days


def _summarise_alpha(
    replay: Replay,
    index: int,
    alerts: Sequence[Alert],
    inside: npt.NDArray[np.bool_],
    days: npt.NDArray[np.float64],
    incidents: Sequence[IncidentSummary] | None,
) -> AlphaSummary:
    anomalous = replay.is_anomaly[index]
    found: int | None = None
    delay: float | None = None
    if incidents is not None:
        delays = [one for incident in incidents if (one := incident.delay_seconds[index]) is not None]
        found = len(delays)
        delay = float(np.median(delays)) if delays else None
    return AlphaSummary(
        alpha=replay.alphas[index],
        anomalous_rows=int(anomalous.sum()),
        anomalous_share=float(anomalous.mean()),
        alerts=len(alerts),
        false_alerts=sum(alert.is_false for alert in alerts),
        alerts_per_day=_per_day(len(alerts), float(days.sum())),
        false_rate=_share(anomalous, ~inside),
        incidents_found=found,
        median_delay_seconds=delay,
    )


def _summarise_groups(
    replay: Replay,
    alerts: Sequence[Sequence[Alert]],
    inside: npt.NDArray[np.bool_],
    days: npt.NDArray[np.float64],
) -> list[GroupSummary]:
    history = replay.history
    counts: list[dict[str, int]] = []
    for of_alpha in alerts:
        count: dict[str, int] = dict.fromkeys(history.groups, 0)
        for alert in of_alpha:
            count[alert.group] += 1
        counts.append(count)
    summaries = []
    for index, name in enumerate(history.groups):
        rows = history.rows_of(index)
        own = [count[name] for count in counts]
        summaries.append(
            GroupSummary(
                group=name,
                rows=rows.stop - rows.start,
                days=float(days[index]),
                alerts=own,
                alerts_per_day=[_per_day(count, float(days[index])) for count in own],
                false_rate=[_share(anomalous[rows], ~inside[rows]) for anomalous in replay.is_anomaly],
                state=None if replay.states is None else replay.states[rows.stop - 1],
            )
        )
    return sorted(summaries, key=lambda summary: (-summary.alerts[0], summary.group))


def _per_day(count: int, days: float) -> float:
    return count / days if days else 0.0


def _share(anomalous: npt.NDArray[np.bool_], chosen: npt.NDArray[np.bool_]) -> float:
    """Return the share of the chosen rows that are anomalous; 0 if no row is chosen."""
    return float(anomalous[chosen].mean()) if chosen.any() else 0.0
