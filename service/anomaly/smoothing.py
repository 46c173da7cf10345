"""Smoothing in time: an exponentially weighted mean over each group's rows, for anomalies that last longer than a row.

What is smoothed for verdicts is the severity: the surprisal -log p of a row, tail-extrapolated beyond the floor of the
p-values, in units of the surprisal at which a row is anomalous at alpha. A p-value stays its own row's: a mean of
neighbours, which depend on each other, has no calibration rows to be ranked among. A smoothed severity above 1 says
that its group has lately been, in the mean, stranger than a row on the border of alpha.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.float64]
LARGEST = 3.4e38


def exponential_mean(
    values: npt.ArrayLike,
    half_life: float,
    time: npt.ArrayLike | None = None,
    group: Sequence[Any] | npt.NDArray[Any] | None = None,
    *,
    by_rows: bool = False,
) -> Numbers:
    """The exponentially weighted mean of each row's past in its group, itself included: [N].

    Row i gets sum_j w_ij values_j / sum_j w_ij over the rows j of its group that are not later, w_ij = 2^(-d_ij /
    half_life): the finite-sample form of Roberts' EWMA ("Control chart tests based on geometric moving averages",
    Technometrics 1959), whose weights add up to 1 from the first row on. The distance d_ij is the time between the
    two, so that after a long silence a row speaks for itself again; or, with `by_rows` or without times, how many rows
    of the group lie between them. Where rows have times, the order in which they are given decides nothing.

    Args:
        values: [N]. A NaN weighs nothing, and stays NaN.
        half_life: > 0, in the unit of `time` (seconds, say), or in rows.
        time: [N]; without it the rows' own order is that of time. Rows of one time and group count for each other in
            full, and get the same mean (by rows: one after the other, as given). A row whose time is NaN keeps its own
            value and counts for no other.
        group: [N], anything hashable; without it all rows are one group.
        by_rows: whether half_life is in rows though there are times.

    Raises ValueError if half_life is not above 0, or the lengths differ.
    """
    numbers = np.asarray(values, np.float64)
    times = np.arange(len(numbers), dtype=np.float64) if time is None else np.asarray(time, np.float64)
    labels = _codes([None] * len(numbers) if group is None else group)
    if not len(numbers) == len(times) == len(labels):
        raise ValueError(f"{len(numbers)} values, {len(times)} times and {len(labels)} groups do not fit together")
    if not half_life > 0:
        raise ValueError(f"the half-life must be above 0, got {half_life}")
    smoothed, counting = numbers.copy(), np.flatnonzero(~np.isnan(times) & ~np.isnan(numbers))
    order = counting[np.lexsort((times[counting], labels[counting]))]  # stable: by group, by time, as given
    for rows in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if len(rows):
            smoothed[rows] = _run(numbers[rows], None if by_rows else times[rows], half_life)
    return smoothed


def _run(values: Numbers, times: Numbers | None, half_life: float) -> list[float]:
    """One group's means, its rows in the order of time."""
    count = len(values)
    steps = np.ones(count) if times is None else np.diff(times, prepend=times[0])
    total = weight = 0.0
    means: list[float] = []
    for value, kept in zip(values.tolist(), np.exp2(-steps / half_life).tolist(), strict=True):
        total = kept * total + value
        weight = kept * weight + 1.0
        means.append(total / weight)
    if times is not None:
        for index in range(count - 2, -1, -1):  # the last of those that are simultaneous has seen them all
            if steps[index + 1] == 0.0:
                means[index] = means[index + 1]
    return means


def _codes(group: Sequence[Any] | npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """A number for each group, [N]."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in group], np.intp)


class RunningMean:
    """The same mean, its rows given in their order as they come; one counts half after `half_life` more."""

    __slots__ = ("_kept", "_total", "_weight")

    def __init__(self, half_life: float) -> None:
        self._kept = 2.0 ** (-1.0 / half_life) if half_life else 0.0
        self._total = self._weight = 0.0

    def above(self, values: list[float]) -> int:
        """Take in the next values; at how many of them the mean is above 1.

        NaN is left out; infinity counts as the largest float32, and passes away.
        """
        kept, total, weight, count = self._kept, self._total, self._weight, 0
        for value in values:
            if value == value:
                total = kept * total + (value if value < LARGEST else LARGEST)
                weight = kept * weight + 1.0
                count += total > weight
        self._total, self._weight = total, weight
        return count
