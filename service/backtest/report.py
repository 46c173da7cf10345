"""Summarise a replay: alarms a day by group, which incidents were found and after how long, the worst false alarms.

An alarm is a run of anomalous rows of one group. It begins with an anomalous row after one that is not anomalous, and
ends before the next row that is not. If incidents are known, an alarm is false if none of its rows lies in an incident
of its group. Without known incidents, every alarm may be a false one.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from service.backtest.incidents import Incident
from service.backtest.replay import Cause, Replay

DAY = 86_400.0  # seconds
WORST_ALARMS = 10


@dataclass(frozen=True)
class Alarm:
    """A run of anomalous rows of one group.

    Args:
        group: name of the group; empty if the rows have no groups.
        start: Unix seconds of the first row.
        end: Unix seconds of the last row.
        rows: number of rows.
        is_false: whether none of the rows lies in a known incident.
        first_row: index of the first row, in order of group and time.
        worst_row: index of the row with the largest severity.
        worst: time of this row.
        severity: its severity.
        p_value: its p-value.
        causes: the features that contribute most to its score; empty unless the alarm is one of the worst.
    """

    group: str
    start: float
    end: float
    rows: int
    is_false: bool
    first_row: int
    worst_row: int
    worst: float
    severity: float
    p_value: float
    causes: tuple[Cause, ...] = ()


@dataclass(frozen=True)
class AlphaSummary:
    """The alarms at one alpha.

    Args:
        alpha: the false-alarm rate.
        anomalous_rows: number of anomalous rows.
        anomalous_share: their share of all rows.
        alarms: number of alarms.
        false_alarms: number of alarms outside incidents.
        alarms_per_day: alarms of one group in one day, on average over groups.
        false_rate: share of the rows outside incidents that are anomalous.
        incidents_found: number of incidents with an anomalous row; None if no incidents are known.
        median_delay_seconds: median time from the start of a found incident to its first anomalous row.
    """

    alpha: float
    anomalous_rows: int
    anomalous_share: float
    alarms: int
    false_alarms: int
    alarms_per_day: float
    false_rate: float
    incidents_found: int | None
    median_delay_seconds: float | None


@dataclass(frozen=True)
class GroupSummary:
    """The alarms of one group. Lists have one number per alpha.

    Args:
        group: name of the group; empty if the rows have no groups.
        rows: number of rows.
        days: time that the rows cover.
        alarms: number of alarms.
        alarms_per_day: alarms divided by days.
        false_rate: share of the rows outside incidents that are anomalous.
        state: the state of the online calibration after the last row; None without online calibration.
    """

    group: str
    rows: int
    days: float
    alarms: list[int]
    alarms_per_day: list[float]
    false_rate: list[float]
    state: str | None


@dataclass(frozen=True)
class IncidentSummary:
    """Whether an incident was found.

    Args:
        start, end, group: as in `Incident`.
        rows: number of rows in it. An incident without rows cannot be found.
        delay_seconds: for each alpha, the time from its start to its first anomalous row; None if there is none.
    """

    start: float
    end: float
    group: str | None
    rows: int
    delay_seconds: list[float | None]


@dataclass(frozen=True)
class Report:
    """The result of a backtest. The lists of groups and alarms are sorted by the number of alarms and by severity."""

    model: str
    source: str
    rows: int
    faulty_rows: int
    warming_up_rows: int
    first: float
    last: float
    alphas: list[AlphaSummary]
    groups: list[GroupSummary]
    incidents: list[IncidentSummary]
    worst_false_alarms: list[Alarm]  # at the first alpha

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
    alarms = [find_alarms(replay, index, inside) for index in range(len(replay.alphas))]
    days = group_days(replay)
    return Report(
        model=model,
        source=source,
        rows=len(history),
        faulty_rows=faulty,
        warming_up_rows=int(replay.is_warming_up.sum()),
        first=float(history.time.min()),
        last=float(history.time.max()),
        alphas=[
            _summarise_alpha(replay, index, alarms[index], inside, days, found if incidents is not None else None)
            for index in range(len(replay.alphas))
        ],
        groups=_summarise_groups(replay, alarms, inside, days),
        incidents=found,
        worst_false_alarms=_worst(replay, alarms[0]),
    )


def _worst(replay: Replay, alarms: Sequence[Alarm]) -> list[Alarm]:
    """Return the most severe false alarms, with their causes."""
    false = sorted((alarm for alarm in alarms if alarm.is_false), key=lambda alarm: -alarm.severity)
    return [
        replace(alarm, causes=replay.causes_before(alarm.worst_row, alarm.worst_row - alarm.first_row + 1))
        for alarm in false[:WORST_ALARMS]
    ]


def _find(replay: Replay, incident: Incident, inside: npt.NDArray[np.bool_]) -> IncidentSummary:
    """Return whether an incident was found, and mark its rows in `inside`."""
    history = replay.history
    rows = (history.time >= incident.start) & (history.time <= incident.end)
    if incident.group is not None:
        if incident.group in history.groups:
            rows &= history.group == history.groups.index(incident.group)
        else:
            rows[:] = False
    inside |= rows
    delays: list[float | None] = []
    for anomalous in replay.is_anomaly:
        times = history.time[rows & anomalous]
        delays.append(float(times.min() - incident.start) if len(times) else None)
    return IncidentSummary(incident.start, incident.end, incident.group, int(rows.sum()), delays)


def runs(replay: Replay, index: int) -> npt.NDArray[np.intp]:
    """Return the first row of each alarm at alpha number `index`, and the row after its last, [A, 2]."""
    anomalous = replay.is_anomaly[index]
    group = replay.history.group
    before = np.concatenate(([False], anomalous[:-1] & (group[1:] == group[:-1])))
    after = np.concatenate((anomalous[1:] & (group[1:] == group[:-1]), [False]))
    starts, ends = np.flatnonzero(anomalous & ~before), np.flatnonzero(anomalous & ~after) + 1
    return np.column_stack((starts, ends))


def find_alarms(replay: Replay, index: int, inside: npt.NDArray[np.bool_]) -> list[Alarm]:
    """Return the alarms at alpha number `index`.

    Args:
        replay: the judged history.
        index: index of the alpha.
        inside: which rows lie in a known incident.
    """
    history, severity = replay.history, replay.severity[index]
    alarms = []
    for start, end in runs(replay, index).tolist():
        worst = start + int(severity[start:end].argmax())
        alarms.append(
            Alarm(
                group=history.groups[history.group[start]],
                start=float(history.time[start]),
                end=float(history.time[end - 1]),
                rows=end - start,
                is_false=not inside[start:end].any(),
                first_row=start,
                worst_row=worst,
                worst=float(history.time[worst]),
                severity=float(severity[worst]),
                p_value=float(replay.p_value[worst]),
            )
        )
    return alarms


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
    alarms: Sequence[Alarm],
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
        alarms=len(alarms),
        false_alarms=sum(alarm.is_false for alarm in alarms),
        alarms_per_day=_per_day(len(alarms), float(days.sum())),
        false_rate=_share(anomalous, ~inside),
        incidents_found=found,
        median_delay_seconds=delay,
    )


def _summarise_groups(
    replay: Replay,
    alarms: Sequence[Sequence[Alarm]],
    inside: npt.NDArray[np.bool_],
    days: npt.NDArray[np.float64],
) -> list[GroupSummary]:
    history = replay.history
    counts: list[dict[str, int]] = []
    for of_alpha in alarms:
        count: dict[str, int] = dict.fromkeys(history.groups, 0)
        for alarm in of_alpha:
            count[alarm.group] += 1
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
                alarms=own,
                alarms_per_day=[_per_day(count, float(days[index])) for count in own],
                false_rate=[_share(anomalous[rows], ~inside[rows]) for anomalous in replay.is_anomaly],
                state=None if replay.states is None else replay.states[rows.stop - 1],
            )
        )
    return sorted(summaries, key=lambda summary: (-summary.alarms[0], summary.group))


def _per_day(count: int, days: float) -> float:
    return count / days if days else 0.0


def _share(anomalous: npt.NDArray[np.bool_], chosen: npt.NDArray[np.bool_]) -> float:
    """Return the share of the chosen rows that are anomalous; 0 if no row is chosen."""
    return float(anomalous[chosen].mean()) if chosen.any() else 0.0
