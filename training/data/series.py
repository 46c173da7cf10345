"""Measure how much rows that follow each other in a file resemble each other, as rows of a time series do."""

import numpy as np
import numpy.typing as npt

from training.data.row_store import RowStore, column_medians

MAX_PAIRS = 10_000  # the correlation is computed from at most this many pairs of neighbours
MAX_PAIR_VALUES = 1 << 20  # and from pairs that together have at most twice this many values
MIN_PAIRS = 20  # correlations of fewer pairs say nothing
SIGNIFICANCE = 5.0  # in standard errors: correlations below this may be a coincidence
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
    from scipy.stats import rankdata

    none = np.zeros(x.width)
    pairs = min(len(distinct) - 1, MAX_PAIRS, MAX_PAIR_VALUES // max(x.width, 1))
    if pairs < MIN_PAIRS:
        return none
    first = np.sort(np.random.RandomState(0).permutation(len(distinct) - 1)[:pairs])
    both = distinct[np.concatenate((first, first + 1))]
    rows = x.take(both)  # [2 pairs, D]
    rows = np.nan_to_num(np.where(np.isnan(rows), column_medians(x, both), rows), nan=0.0)
    ranks = rankdata(rows, axis=0) - (len(both) + 1) / 2
    varying = np.square(ranks).mean(axis=0) >= MIN_VARIATION * len(both) ** 2 / 12
    if labels is not None:
        for label in np.unique(labels[both]):
            members = labels[both] == label
            ranks[members] -= ranks[members].mean(axis=0)
    earlier, later = ranks[:pairs], ranks[pairs:]
    scale = np.sqrt(np.square(earlier).sum(axis=0) * np.square(later).sum(axis=0))  # [D]
    correlations = np.divide((earlier * later).sum(axis=0), scale, out=none, where=varying & (scale > 0))
    return np.where(np.abs(correlations) * np.sqrt(pairs) >= SIGNIFICANCE, correlations, 0.0)
