"""Recognise columns that tell when or where a row was written: times, counters and other functions of the row number.

A model of such a column flags all later rows, because their values lie beyond those of the training rows.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

MIN_ORDERED_ROWS = 20  # with fewer rows, an order may be a coincidence
ORDERED_CORRELATION = 0.98  # rank correlation with the row number from which on a column counts as ordered
MAX_SAMPLE_ROWS = 4_096  # a column is judged by at most twice this many evenly spaced rows
MAX_SAMPLE_VALUES = 4 << 20  # and tables with many columns by fewer rows
MIN_LEVELS = 10  # a column with fewer distinct values may be ordered because the file is sorted by class


@dataclass
class OrderDetector:
    """Keeps evenly spaced rows of D columns, and tells which columns are monotone functions of the row number.

    Args:
        width: D.
    """

    width: int
    _step: int = 1  # every `_step`-th row is kept
    _rows: int = 0  # number of rows so far
    _kept: list[npt.NDArray[np.float64]] = field(default_factory=list)  # each [n, D]

    def add(self, block: npt.NDArray[np.generic]) -> None:
        """Add the next rows [n, D] of any real dtype."""
        first = -self._rows % self._step
        if len(kept := block[first :: self._step]):
            self._kept.append(np.array(kept, np.float64))
        self._rows += len(block)
        most = max(64, min(MAX_SAMPLE_ROWS, MAX_SAMPLE_VALUES // max(self.width, 1)))
        while sum(map(len, self._kept)) > 2 * most:
            self._kept = [np.concatenate(self._kept)[::2]]
            self._step *= 2

    def directions(self) -> npt.NDArray[np.int64]:
        """Return, for each column, 1 if it rises with the row number, -1 if it falls, and 0 otherwise, [D]."""
        result = np.zeros(self.width, np.int64)
        if self._rows < MIN_ORDERED_ROWS:
            return result
        sample = np.concatenate(self._kept)
        complete = np.isfinite(sample).all(axis=0)
        result[complete] = _directions(sample[:, complete])
        for column in np.flatnonzero(~complete):
            present = sample[np.isfinite(sample[:, column]), column]
            result[column] = _directions(present[:, None])[0]
        return result


def _directions(values: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return, for each column of finite values [n, D], 1 or -1 if it rises or falls with the row, and 0 otherwise."""
    from scipy.stats import rankdata

    result = np.zeros(values.shape[1], np.int64)
    if len(values) < MIN_ORDERED_ROWS or not len(result):
        return result
    ranks = rankdata(values, axis=0) - (len(values) + 1) / 2  # [n, D]
    position = np.arange(len(values)) - (len(values) - 1) / 2
    scale = np.sqrt(np.square(ranks).sum(axis=0) * np.square(position).sum())  # [D], 0 for constant columns
    correlation = np.divide(position @ ranks, scale, out=np.zeros(len(result)), where=scale > 0)
    for column in np.flatnonzero(np.abs(correlation) >= ORDERED_CORRELATION):
        if len(np.unique(values[:, column])) >= MIN_LEVELS:
            result[column] = np.sign(correlation[column])
    return result


def describe_direction(direction: int) -> str:
    """Return why a column with `direction` 1 or -1 is not a measurement."""
    return f"a time or a counter: it {'rises' if direction > 0 else 'falls'} with the row number"
