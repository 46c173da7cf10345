"""Measure how much rows that follow each other in a file resemble each other, as rows of a time series do."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from training.data.row_store import RowStore, column_medians

MAX_PAIRS = 10_000  # the correlation is computed from at most this many pairs of neighbours
MAX_PAIR_VALUES = 1 << 20  # maximum number of pairs, times the number of columns
MIN_PAIRS = 20  # correlations of fewer pairs say nothing
SIGNIFICANCE = 5.0  # in standard errors: correlations below this may be a coincidence
MAX_LAG = 10  # rows of up to this many hosts may alternate in a file
MAX_COMPONENTS = 5  # principal components that are compared
SAME_SHARE = 0.9  # the lag is the smallest whose correlation reaches this share of the largest correlation
MAX_STARTS = 1_000  # at most this many rows are compared, each with the MAX_LAG rows after it
MAX_START_VALUES = 1 << 19  # maximum number of values in all these rows and the rows after them
MIN_VARIATION = 0.14  # variance of the ranks of a column of which 95 % of the values are equal; 1 without equal values


def neighbour_correlations(
    x: RowStore, distinct: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None = None
) -> npt.NDArray[np.float64]:
    """Return, for each column, the rank correlation between the values of a row and of the next row, [D].

    It is near 0 if the order of the rows is random. Ranks make it robust to outliers. Columns of which nearly all
    values are equal, and correlations that may be a coincidence, count as 0.

    Args:
        distinct: indices of the rows to compare, ascending. Copies are left out, because they resemble each other.
        labels: [N]; differences between the means of classes do not count, because files are often sorted by class.
    """
    none = np.zeros(x.width)
    pairs = min(len(distinct) - 1, MAX_PAIRS, MAX_PAIR_VALUES // max(x.width, 1))
    if pairs < MIN_PAIRS:
        return none
    first = np.sort(np.random.RandomState(0).permutation(len(distinct) - 1)[:pairs])
    both = distinct[np.concatenate((first, first + 1))]
    ranks, varying = _ranks(x, both, labels)  # [2 pairs, D], [D]
    earlier, later = ranks[:pairs], ranks[pairs:]
    scale = np.sqrt(np.square(earlier).sum(axis=0) * np.square(later).sum(axis=0))  # [D]
    correlations = np.divide((earlier * later).sum(axis=0), scale, out=none, where=varying & (scale > 0))
    return np.where(np.abs(correlations) * np.sqrt(pairs) >= SIGNIFICANCE, correlations, 0.0)


class Resemblance(NamedTuple):
    """How much rows resemble the row `lag` rows before them."""

    correlation: float  # 0 if it may be a coincidence
    lag: int


def find_resemblance(
    x: RowStore, distinct: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None = None
) -> Resemblance:
    """Return the largest rank correlation between rows and the rows up to MAX_LAG rows before them, and a lag.

    This finds series that `neighbour_correlations` misses: many noisy columns that follow one load, and rows of several
    hosts that alternate. A correlation is computed for each lag and for each of the D columns and MAX_COMPONENTS
    principal components of their ranks. Only the largest of these 10 (D + 5) correlations is returned, with the
    smallest lag that gives nearly as large a correlation.

    A correlation r of m pairs counts only if r sqrt(m) is at least SIGNIFICANCE, which is 5. If the rows are
    independent, r sqrt(m) is about Gaussian, and the probability that any of the correlations counts is at most
    2.9e-6 (D + 5).

    Args:
        distinct: as for `neighbour_correlations`.
        labels: as for `neighbour_correlations`.
    """
    from scipy.stats import rankdata

    length = MAX_LAG + 1
    starts = min(len(distinct) - MAX_LAG, MAX_STARTS, MAX_START_VALUES // (max(x.width, 1) * length))
    if starts < MIN_PAIRS:
        return Resemblance(0.0, 0)
    first = np.sort(np.random.RandomState(0).permutation(len(distinct) - MAX_LAG)[:starts])
    ranks, varying = _ranks(x, distinct[(first[:, None] + np.arange(length)).reshape(-1)], labels)
    scale = np.sqrt(np.square(ranks).mean(axis=0))
    ranks = ranks[:, varying & (scale > 0)] / scale[varying & (scale > 0)]
    if not ranks.shape[1]:
        return Resemblance(0.0, 0)
    _, directions = np.linalg.eigh(ranks.T @ ranks)  # ascending
    components = rankdata(ranks @ directions[:, -MAX_COMPONENTS:], axis=0)
    components = (components - components.mean(axis=0)) / components.std(axis=0)
    values = np.column_stack((ranks, components)).reshape(starts, length, -1)
    correlations = (values[:, :1] * values[:, 1:]).mean(axis=0).max(axis=1)  # [MAX_LAG]
    largest = float(correlations.max())
    lag = int((correlations >= SAME_SHARE * largest).argmax())  # rows alike at lag 2 are as much alike at 4, 6, ...
    return Resemblance(largest, lag + 1) if largest * np.sqrt(starts) >= SIGNIFICANCE else Resemblance(0.0, 0)


def _ranks(
    x: RowStore, rows: npt.NDArray[np.int64], labels: npt.NDArray[np.int64] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return the centred ranks of the values in each column of `rows` [n, D], and whether each column varies, [D]."""
    from scipy.stats import rankdata

    values = x.take(rows)
    values = np.nan_to_num(np.where(np.isnan(values), column_medians(x, rows), values), nan=0.0)
    ranks = rankdata(values, axis=0) - (len(rows) + 1) / 2
    varying = np.square(ranks).mean(axis=0) >= MIN_VARIATION * len(rows) ** 2 / 12
    if labels is not None:
        for label in np.unique(labels[rows]):
            members = labels[rows] == label
            ranks[members] -= ranks[members].mean(axis=0)
    return ranks, varying
