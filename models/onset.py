"""Estimate since when a feature deviates, from the rows of a window. This module imports no torch.

The estimate is the most probable change point of a series of rows (Samuel, Pignatiello & Calvin, "Identifying the time
of a step change with X-bar control charts", 1998), here for a change of the mean, of the variance, or of both. Before
the change, the mean of the series over a window may differ between groups: it is normally distributed with the variance
`between`, as in an analysis of variance with random effects. So a group whose level always differs from that of other
groups does not count as changed. After the change, the mean is unknown, and the variance is at least `within`.

Two series are examined for each feature: its deviation from its usual level, and its deviation from its prediction by
the other features of the same row. The second series does not contain variation that all features share, such as the
cycle of a day. The series with the clearer change decides.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.windows import SUMMARIES_PER_SCALE

NOISE = 0.01  # added to each variance, as a share of it: keeps the correlations invertible if columns are copies
MIN_VARIANCE = 1e-4  # smallest variance of a series, as a share of the variance of the feature
MAX_DEVIATION = 1e6  # in standard deviations; larger ones are clipped, so that squares stay finite

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class UsualCourse:
    """How the D features of normal rows vary within a window and between windows.

    Args:
        level: the mean of each feature in raw units, [D].
        series: maps x - level [D] to the two series of each feature, in standard deviations of the feature, [2, D, D].
        within: variance of the series within a window, in squared standard deviations of the feature, [2, D].
        between: variance of the mean of the series over a window, in the same unit, [2, D].
    """

    level: Doubles
    series: Doubles
    within: Doubles
    between: Doubles

    def find_onsets(self, windows: npt.NDArray[np.float32], features: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Return how many rows before the newest row the deviation of each feature began, [A, E]: 0 for the newest row.

        If all rows of the window deviate, the deviation began at the oldest row. A missing value counts as the usual
        level.

        Args:
            windows: windows of rows in raw units, oldest row first, [A, N, D]. A row is absent if all its values are
                NaN.
            features: the features to examine, [A, E].
        """
        rows, count = features.shape
        is_there = np.flip(~np.isnan(windows).all(axis=2), axis=1)  # [A, N], newest row first
        centred = np.flip(np.nan_to_num(windows - self.level, nan=0.0), axis=1)  # [A, N, D]
        scale = self.within[:, features, None]  # [2, A, E, 1]
        y = self.series[:, features] @ centred.transpose(0, 2, 1) / np.sqrt(scale)  # [2, A, E, N]
        y = np.where(is_there[:, None], y.clip(-MAX_DEVIATION, MAX_DEVIATION), 0.0)
        lags, gains = _find_changes(
            y.reshape(2 * rows * count, -1),
            np.tile(np.repeat(is_there, count, axis=0), (2, 1)),
            (self.between[:, features, None] / scale).reshape(-1, 1),
        )
        lag_of_level, lag_of_prediction = lags.reshape(2, rows, count)
        gain_of_level, gain_of_prediction = gains.reshape(2, rows, count)
        return np.where(gain_of_prediction > gain_of_level, lag_of_prediction, lag_of_level)


def describe_course(level: Doubles, deviation: Doubles, correlation: Doubles, features: int) -> UsualCourse:
    """Return the usual course of D features, computed from statistics of the V summaries of their windows.

    Args:
        level: the mean of each summary in raw units, [V], in the order of `models.windows.summarise`.
        deviation: the standard deviation of each summary in raw units, positive, [V].
        correlation: the correlations of the summaries, [V, V].
        features: D.
    """
    scales = (len(level) // features - 1) // SUMMARIES_PER_SCALE
    means = slice(scales * features, (scales + 1) * features)  # the means over the whole window
    unit = deviation[:features]  # [D]
    of_rows = correlation[:features, :features]
    relative = deviation[means] / unit
    of_means = correlation[means, means] * np.outer(relative, relative)  # [D, D], covariances in squared units
    precision = np.linalg.inv(of_rows + NOISE * np.eye(features))
    maps = np.stack((np.eye(features), precision / precision.diagonal()[:, None]))  # [2, D, D]
    within, between = (
        np.maximum(np.einsum("sij,jk,sik->si", maps, covariance, maps), MIN_VARIANCE)
        for covariance in (of_rows - of_means, of_means)
    )
    return UsualCourse(level[:features], maps / unit, within, between)


def _find_changes(y: Doubles, is_there: npt.NDArray[np.bool_], ratio: Doubles) -> tuple[npt.NDArray[np.intp], Doubles]:
    """Return how many rows before the newest row each series most probably changed, [S], and the gain, [S].

    The gain is the cost without a change minus the cost with the change. Costs are -2 log likelihoods up to a constant.

    Args:
        y: S series in units of the square root of `within`, newest row first, [S, N]; 0 for an absent row.
        is_there: which rows are not absent, [S, N]: the newest row, and an unbroken run of rows before it.
        ratio: `between` divided by `within`, [S, 1].
    """
    sums, squares = y.cumsum(axis=1), np.square(y).cumsum(axis=1)  # over the rows from each row to the newest
    after = is_there.cumsum(axis=1)  # number of these rows
    before = after[:, -1:] - after  # number of earlier rows
    variance = np.maximum(squares / after - np.square(sums / after), 0.0)
    # The most probable variance after the change is the observed one, but at least 1, which is `within` in these units.
    cost = after * np.where(variance <= 1.0, variance, 1.0 + np.log(np.maximum(variance, 1.0)))
    cost += _usual_cost(sums[:, -1:] - sums, squares[:, -1:] - squares, before, ratio)
    cost[~is_there] = np.inf
    lag = cost.argmin(axis=1)
    unchanged = _usual_cost(sums[:, -1:], squares[:, -1:], after[:, -1:], ratio)[:, 0]
    return lag, unchanged - cost.min(axis=1)


def _usual_cost(sums: Doubles, squares: Doubles, count: npt.NDArray[np.intp], ratio: Doubles) -> Doubles:
    """Return the cost of rows without a change, from their sum, sum of squares and number; 0 without rows."""
    some = np.maximum(count, 1)
    mean = sums / some
    cost = np.maximum(squares - sums * mean, 0.0) + np.square(mean) / (ratio + 1.0 / some) + np.log1p(count * ratio)
    return np.where(count > 0, cost, 0.0)
