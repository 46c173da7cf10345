"""Windows of rows in numpy: their scales, their rows, and the summaries of a long table. This module imports no torch.

A window is a row and the rows before it in its group, at most N rows. `models.windowed` computes the summaries of
windows inside an artifact. `summarise` computes the same summaries for all rows of a table. This is much faster,
because neighbouring windows share most of their rows. Training and the replay of a history use it.

A window begins anew with a new group, and after a gap (`models.manifest.Window.longest_gap_seconds`). The rows between
two such places are a stretch.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SUMMARIES_PER_SCALE = 2  # mean and standard deviation

Doubles = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]


def default_scales(rows: int) -> tuple[int, ...]:
    """Return the scales of a window of `rows` rows, ascending: N / 10, N / 3 and N rows.

    A mean over s rows shows shifts that last about s rows, so a geometric series of scales misses few. Scales of one
    row are left out: they would repeat the row itself.
    """
    return tuple(sorted({scale for scale in (round(rows / 10), round(rows / 3), rows) if scale > 1}))


def summary_width(features: int, scales: Sequence[int]) -> int:
    """Return the number of summaries of a window: the row itself, and mean and deviation of each feature and scale."""
    return features * (1 + SUMMARIES_PER_SCALE * len(scales))


def summary_names(names: Sequence[str], scales: Sequence[int]) -> list[str]:
    """Return the names of the summaries, in the order in which `summarise` returns them."""
    means = [f"mean of {scale} rows: {name}" for scale in scales for name in names]
    deviations = [f"deviation of {scale} rows: {name}" for scale in scales for name in names]
    return [*names, *means, *deviations]


def count_earlier_rows(begins: npt.NDArray[np.bool_]) -> Integers:
    """Return how many rows of its stretch precede each row, [n].

    Args:
        begins: whether a row begins a stretch, [n]. The first row always does.
    """
    index = np.arange(len(begins))
    return index - np.maximum.accumulate(np.where(begins, index, 0))


def take_windows(x: Floats, positions: Integers, earlier: Integers, rows: int) -> Floats:
    """Return the windows [B, N, D] of the rows of x [n, D] at `positions` [B], oldest row first.

    Rows that are not there are NaN.

    Args:
        earlier: how many rows of its stretch precede each row, [n].
        rows: N, the number of rows of a window.
    """
    ages = np.arange(rows - 1, -1, -1)  # [N]
    index = positions[:, None] - ages  # [B, N]
    windows: Floats = x[np.maximum(index, 0)].astype(np.float32, copy=False)  # [B, N, D], a copy
    windows[ages > earlier[positions][:, None]] = np.nan
    return windows


def summarise(u: npt.NDArray[np.floating], earlier: Integers, scales: Sequence[int]) -> Floats:
    """Return the summaries [n, D (1 + 2 S)] of the windows that end at each row of u [n, D].

    They are the row, then for each scale the means of the last rows, then for each scale their standard deviations. A
    scale with fewer rows in the stretch uses those that are there.

    Windows of 2, 4, 8, ... rows are merged from halves, and every scale from these (Chan, Golub & LeVeque, "Algorithms
    for computing the sample variance", 1983, eq. 2.1). Nothing is subtracted that was added before, as with cumulative
    sums, so the deviation of equal rows is exactly 0.

    Args:
        u: rows in model units, without missing values.
        earlier: how many rows of its stretch precede each row, [n]. Rows before the first row of `u` do not count. To
            compute a table in parts, let each part begin with the last N - 1 rows of the previous part, and drop
            their summaries.
        scales: the scales, ascending.
    """
    x = u.astype(np.float64)  # [n, D]
    there = np.minimum(earlier, np.arange(len(x))) + 1  # [n], rows of the stretch up to this row
    halves = [(np.ones(len(x)), x, np.zeros_like(x))]  # halves[j]: count, mean, squares of the last 2^j rows
    while 2 ** len(halves) <= scales[-1]:
        length = 2 ** (len(halves) - 1)
        halves.append(_merged(halves[-1], _earlier(halves[-1], length, length, there)))
    means, deviations = [], []
    for scale in scales:
        total, length = None, 0
        for power in reversed(range(scale.bit_length())):
            if scale >> power & 1:
                part = _earlier(halves[power], length, 2**power, there)
                total = part if total is None else _merged(total, part)
                length += 2**power
        assert total is not None
        count, mean, squares = total
        means.append(mean)
        deviations.append(np.sqrt(squares / count[:, None]))
    return np.concatenate([x, *means, *deviations], axis=1).astype(np.float32)


_Sums = tuple[Doubles, Doubles, Doubles]  # count [n], mean [n, D], and sum of squared deviations from the mean [n, D]


def _earlier(sums: _Sums, age: int, length: int, there: Integers) -> _Sums:
    """Return the sums over `length` rows that end `age` rows before each row, without rows of earlier stretches."""
    if age == 0:
        return sums
    mean, squares = (np.concatenate((np.zeros_like(values[:age]), values[:-age])) for values in sums[1:])
    return np.clip(there - age, 0, length).astype(np.float64), mean, squares


def _merged(one: _Sums, other: _Sums) -> _Sums:
    """Return the sums over both sets of rows. `one` has at least one row, and `other` may have none."""
    count = one[0] + other[0]  # [n]
    share = (other[0] / count)[:, None]  # [n, 1]
    difference = other[1] - one[1]  # [n, D]
    squares = one[2] + np.where(share > 0, other[2], 0.0) + np.square(difference) * (share * one[0][:, None])
    return count, one[1] + share * difference, squares
