"""Recognise columns that tell when or where a row was written: times, counters and other functions of the row number.

A model of such a column flags all later rows, because their values lie beyond those of the training rows.
"""

import bisect
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

MIN_ORDERED_ROWS = 20  # with fewer rows, an order may be a coincidence
ORDERED_CORRELATION = 0.98  # rank correlation with the row number from which on a column counts as ordered
MAX_SAMPLE_ROWS = 4_096  # a column is judged by at most twice this many evenly spaced rows
MAX_SAMPLE_VALUES = 4 << 20  # and tables with many columns by fewer rows
MIN_LEVELS = 10  # a column with fewer distinct values may be ordered because the file is sorted by class
MAX_SOURCES = 10  # mixed rows of more sources than this are not recognised
MAX_RESTARTS = 3  # a column with more restarts is a measurement that repeats, such as the wear of tools
MIXED_SHARE = 0.1  # rows of several sources are mixed if at least this share of the values is below the previous one
SEQUENCE_LEVELS = 20  # minimum of distinct values per sequence; a column with fewer may be the hour of a day
COARSE_STEP = 8  # the second search for sequences takes every eighth row, in which small fluctuations are rarer
MIN_COARSE_ROWS = 400
RISES, FALLS, RISES_IN_SEQUENCES, FALLS_IN_SEQUENCES = 1, -1, 2, -2  # directions; 0 is none


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
        """Return, for each column, RISES, FALLS, RISES_IN_SEQUENCES, FALLS_IN_SEQUENCES or 0, [D]."""
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
    """Return the direction of each column of finite values [n, D]."""
    from scipy.stats import rankdata

    result = np.zeros(values.shape[1], np.int64)
    if len(values) < MIN_ORDERED_ROWS or not len(result):
        return result
    ranks = rankdata(values, axis=0) - (len(values) + 1) / 2  # [n, D]
    position = np.arange(len(values)) - (len(values) - 1) / 2
    scale = np.sqrt(np.square(ranks).sum(axis=0) * np.square(position).sum())  # [D], 0 for constant columns
    correlation = np.divide(position @ ranks, scale, out=np.zeros(len(result)), where=scale > 0)
    for column in range(len(result)):
        if abs(correlation[column]) >= ORDERED_CORRELATION:
            if len(np.unique(values[:, column])) >= MIN_LEVELS:
                result[column] = RISES if correlation[column] > 0 else FALLS
        elif _is_in_sequences(values[:, column]):
            result[column] = RISES_IN_SEQUENCES
        elif _is_in_sequences(-values[:, column]):
            result[column] = FALLS_IN_SEQUENCES
    return result


def _is_in_sequences(values: npt.NDArray[np.float64]) -> bool:
    """Return whether `values` [n] are a few rising sequences, one after the other or mixed.

    Examples: a counter that restarts; the times of several hosts whose rows are mixed.
    """
    coarse = values[::COARSE_STEP]
    return _are_few_sequences(values) or (len(coarse) >= MIN_COARSE_ROWS and _are_few_sequences(coarse))


def _are_few_sequences(values: npt.NDArray[np.float64]) -> bool:
    are_mixed = (np.diff(values) < 0).mean() >= MIXED_SHARE
    most = MAX_SOURCES if are_mixed else 1 + MAX_RESTARTS
    count = _count_sequences(values, most)
    return count <= most and len(np.unique(values)) >= SEQUENCE_LEVELS * count


def _count_sequences(values: npt.NDArray[np.float64], most: int) -> int:
    """Return the smallest number of sequences that never fall into which `values` can be split.

    The result is `most` + 1 if the number is larger than `most`.
    """
    ends: list[float] = []  # the last value of each sequence, ascending
    for value in values.tolist():
        index = bisect.bisect_right(ends, value)
        if index:
            ends[index - 1] = value
        elif len(ends) < most:
            ends.insert(0, value)
        else:
            return most + 1
    return len(ends)


def describe_direction(direction: int) -> str:
    """Return why a column with `direction`, which is not 0, is not a measurement."""
    verb = "rises" if direction > 0 else "falls"
    if direction in (RISES, FALLS):
        return f"a time or a counter: it {verb} with the row number, or the file is sorted by it"
    return f"a time or a counter: it {verb} with the row number, but restarts or belongs to several sources"
