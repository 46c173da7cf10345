"""Smoothing over time: an exponentially weighted mean per group detects anomalies that last longer than one row.

/anomaly smooths severities. The severity of a row is its surprisal -log p, divided by the surprisal at the threshold
for alpha. Below the smallest p-value that the calibration set can give, a fitted tail extrapolates p. A smoothed
severity above 1 means that the group's recent rows are, on average, stranger than a row at the threshold.

P-values are not smoothed, because neighbouring rows depend on each other, and because no calibration set exists for
means of p-values.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
MAX_FLOAT32 = 3.4e38


def exponential_mean(
    values: npt.ArrayLike,
    half_life: float,
    time: npt.ArrayLike | None = None,
    group: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    by_rows: bool = False,
) -> Numbers:
    """Return, for each row, the exponentially weighted mean of that row and the earlier rows of its group, [N].

    The mean of row i is sum_j w_ij values_j / sum_j w_ij, where w_ij = 2^(-d_ij / half_life), and j runs over the rows
    of the same group that are not later than row i. This is Roberts' EWMA ("Control chart tests based on geometric
    moving averages", Technometrics 1959), with weights that are normalised to sum to 1 from the first row on. The
    distance d_ij is the time between rows j and i, so that after a long gap, earlier rows hardly count. With `by_rows`,
    or without times, d_ij is the number of steps from row j to row i within the group. If `time` is given, the rows may
    be in any order.

    Args:
        values: [N]. A NaN has weight 0 in the means of other rows. The row itself gets the mean NaN.
        half_life: above 0. It is a number of rows if `by_rows` is true or there are no times, and otherwise it is in
            the unit of `time`.
        time: [N]; by default, rows are in order of time. Rows of the same group and time have distance 0 and get the
            same mean. With `by_rows`, rows of the same time instead count as successive rows, in the given order. A row
            whose time is NaN keeps its own value and does not count for other rows.
        group: [N], any hashable values; by default all rows are in one group.
        by_rows: whether to measure distances and `half_life` in rows, even if `time` is given.

    Raises:
        ValueError: `half_life` is not above 0, or the lengths differ.
    """
    numbers = np.asarray(values, np.float64)
    times = np.arange(len(numbers), dtype=np.float64) if time is None else np.asarray(time, np.float64)
    group_numbers = _number_groups([None] * len(numbers) if group is None else group)
    if not len(numbers) == len(times) == len(group_numbers):
        raise ValueError(
            f"expected as many times and groups as values, got {len(numbers)} values, {len(times)} times and "
            f"{len(group_numbers)} groups"
        )
    if not half_life > 0:
        raise ValueError(f"the half-life must be above 0, got {half_life}")
    smoothed = numbers.copy()
    counting = np.flatnonzero(~np.isnan(times) & ~np.isnan(numbers))
    # Sort by group, then by time; the sort is stable, so simultaneous rows keep the given order.
    order = counting[np.lexsort((times[counting], group_numbers[counting]))]
    for rows in np.split(order, np.flatnonzero(np.diff(group_numbers[order])) + 1):
        if len(rows):
            smoothed[rows] = _means_of_group(numbers[rows], None if by_rows else times[rows], half_life)
    return smoothed


def _means_of_group(values: Numbers, times: Numbers | None, half_life: float) -> list[float]:
    """Return the means of one group, whose rows are in order of time."""
    count = len(values)
    steps = np.ones(count) if times is None else np.diff(times, prepend=times[0])
    total = weight = 0.0
    means: list[float] = []
    with np.errstate(over="ignore"):  # with a tiny half-life, only rows at the same time count
        decays = np.exp2(-steps / half_life)
    for value, decay in zip(values.tolist(), decays.tolist(), strict=True):
        total = decay * total + value
        weight = decay * weight + 1.0
        means.append(total / weight)
    if times is not None:
        # Of several simultaneous rows, only the last row's mean includes all of them. Copy that mean to the other rows.
        for index in range(count - 2, -1, -1):
            if steps[index + 1] == 0.0:
                means[index] = means[index + 1]
    return means


def _number_groups(group: Sequence[Any] | npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Return, for each row, the number that identifies its group, [N]."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in group], np.intp)


class RunningMean:
    """The exponentially weighted mean of a stream of values.

    `half_life` is a number of values. If it is 0, the mean is the last value.
    """

    __slots__ = ("_decay", "_total", "_weight")

    def __init__(self, half_life: float) -> None:
        self._decay = 2.0 ** (-1.0 / half_life) if half_life else 0.0
        self._total = self._weight = 0.0

    def count_above_one(self, values: list[float]) -> int:
        """Add `values` one by one. Return how many of them leave the mean above 1. See `find_above_one`."""
        return len(self.find_above_one(values))

    def find_above_one(self, values: list[float]) -> list[int]:
        """Add `values` one by one. Return the index of each value after which the mean is above 1.

        NaN is skipped. Infinity counts as the largest float32, so that its effect decays.
        """
        decay, total, weight = self._decay, self._total, self._weight
        places: list[int] = []
        for place, value in enumerate(values):
            if value == value:
                total = decay * total + (value if value < MAX_FLOAT32 else MAX_FLOAT32)
                weight = decay * weight + 1.0
                if total > weight:
                    places.append(place)
        self._total, self._weight = total, weight
        return places


class LastingAlarm:
    """The stretch of a stream of values in which their running mean is above 1.

    Args:
        mean: the running mean.
        rows: an alarm needs this many values in one stretch.
        seconds: and this much time from the first of them.
    """

    __slots__ = ("_mean", "_rows", "_seconds", "_since", "_values")

    def __init__(self, mean: RunningMean, rows: int, seconds: float) -> None:
        self._mean, self._rows, self._seconds = mean, rows, seconds
        self._values, self._since = 0, 0.0

    def find_alarms(self, values: list[float], times: list[float]) -> list[int]:
        """Add `values` one by one. Return the index of each value at which there is an alarm. NaN is skipped.

        Args:
            values: the values.
            times: their times in seconds.
        """
        if self._rows == 1 and not self._seconds:
            return self._mean.find_above_one(values)
        alarms: list[int] = []
        for place, (value, time) in enumerate(zip(values, times, strict=True)):
            if value != value:
                continue
            if not self._mean.find_above_one([value]):
                self._values = 0
                continue
            if not self._values:
                self._since = time
            self._values += 1
            if self._values >= self._rows and time - self._since >= self._seconds:
                alarms.append(place)
        return alarms
