"""The alpha that keeps a budget of false alarms a day, computed from the calibration rows."""

import math

import numpy as np
import numpy.typing as npt

from models.policy_rules import AlarmRule
from training.data.row_store import Floats
from training.data.timeline import Timeline
from training.errors import FitError

DAY = 86_400.0
MAX_ALPHA = 0.5
Rows = npt.NDArray[np.int64]


def allowed_alarms(rule: AlarmRule, rows: int, step_seconds: float | None) -> float:
    """Return the number of false alarms that `rule` accepts in n + 1 rows of one group, where n = `rows` calibrate.

    Args:
        rule: a rule with a budget.
        rows: the number of calibration rows.
        step_seconds: usual time between two rows of a group; None if it is unknown.

    Raises:
        FitError: the step is unknown, or less than one alarm is accepted, so that no alpha can keep the budget.
    """
    assert rule.per_day is not None
    if step_seconds is None:
        raise FitError(
            "alarms.per_day of the policy needs to know how many rows a day has: name the column of the times with "
            "--time when you train"
        )
    allowed = rule.per_day * (rows + 1) * step_seconds / DAY
    if allowed < 1.0:
        raise FitError(
            f"{rule.per_day:g} alarms a day need calibration rows of at least {1.0 / rule.per_day:.3g} days of one "
            f"group, got {rows:,} rows, one every {step_seconds:g} s: add rows, or raise alarms.per_day in the policy"
        )
    return allowed


def step_of(timeline: Timeline | None) -> float | None:
    """Return the usual time between two rows of a group in seconds; None if it is unknown."""
    return None if timeline is None or not timeline.usual_step else timeline.usual_step / 1e9


def alpha_of_budget(
    rule: AlarmRule, scores: Floats, timeline: Timeline | None, rows: Rows, step_seconds: float | None = None
) -> float:
    """Return the alpha up to which a group raises at most `rule.per_day` false alarms a day, at most MAX_ALPHA.

    An alarm is a stretch of successive anomalous rows of one group that lasts as long as `rule` demands. At alpha
    k / (n + 1), a calibration row is anomalous if its score is among the k - 1 highest of n. One more alarm is added,
    because a new row can also exceed all of them. For rows that do not depend on each other, the expected number of
    alarms is then exact.

    Args:
        rule: a rule with a budget, and with the shortest duration of an alarm.
        scores: the scores of the n calibration rows, [n].
        timeline: the times of all rows; None if they are unknown: every anomalous row then counts as an alarm.
        rows: numbers of the calibration rows in `timeline`, [n].
        step_seconds: usual time between two rows of a group, if there is no timeline.

    Raises:
        FitError: see `allowed_alarms`.
    """
    count = len(scores)
    allowed = allowed_alarms(rule, count, step_seconds if timeline is None else step_of(timeline))
    if timeline is None:
        return min(MAX_ALPHA, math.floor(allowed) / (count + 1))
    alarms = _Alarms(rule, timeline, rows)
    anomalous = 1  # k
    for row in np.argsort(-scores, kind="stable")[: int(MAX_ALPHA * (count + 1)) - 1].tolist():
        alarms.add(row)
        if alarms.count + 1 > allowed:
            break
        anomalous += 1
    return anomalous / (count + 1)


class _Alarms:
    """Counts the stretches of anomalous rows, to which rows are added one by one.

    Rows are successive if they are neighbours in the timeline, so a row that does not calibrate ends a stretch.
    """

    def __init__(self, rule: AlarmRule, timeline: Timeline, rows: Rows) -> None:
        self._rule, self._time, self._group, self._rows = rule, timeline.time, timeline.group, rows
        self._first: dict[int, int] = {}  # by the last row of a stretch
        self._last: dict[int, int] = {}  # by the first row of a stretch
        self.count = 0

    def add(self, index: int) -> None:
        """Make the calibration row number `index` anomalous."""
        first = last = row = int(self._rows[index])
        if row - 1 in self._first and self._group[row - 1] == self._group[row]:
            first = self._first.pop(row - 1)
            self.count -= self._is_alarm(first, row - 1)
        if row + 1 in self._last and self._group[row + 1] == self._group[row]:
            last = self._last.pop(row + 1)
            self.count -= self._is_alarm(row + 1, last)
        self._first[last], self._last[first] = first, last
        self.count += self._is_alarm(first, last)

    def _is_alarm(self, first: int, last: int) -> bool:
        long_enough = (self._time[last] - self._time[first]) / 1e9 >= self._rule.seconds
        return bool(last - first + 1 >= self._rule.rows and long_enough)
