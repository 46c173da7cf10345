"""Find numbers that stand for missing values, such as -200, -9999 or 999: they pile up at an end of a column."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from models.errors import join_names
from training.data.row_store import MEDIAN_BYTES, MEDIAN_ROWS, RowStore

WHOLE = {-1, -9, -99, -200, -888, -999, -8888, -9999, -99999, -32768, -2147483648, 99, 888, 999, 8888, 9999, 99999,
         999999, 32767, 65535, 2147483647, 4294967295}  # fmt: skip
NINES = {sign * value for sign in (-1, 1) for value in (99.9, 99.99, 999.9, 999.99, 9999.9, 9999.99)}
USUAL = frozenset(float(np.float32(value)) for value in WHOLE | NINES)
MIN_COUNT = 3  # a value that occurs less often is an outlier, which --robust and the scores are for
MIN_DISTINCT = 3  # with fewer other values, the column is a category
USUAL_GAP, OTHER_GAP = 0.5, 3.0  # distance to the other values, as a share of the range of the other values
MAX_PER_COLUMN = 3
LISTED_COLUMNS = 3


def describe_sentinels(rows: RowStore, names: Sequence[str]) -> list[str]:
    """Return a note on the columns in which a number probably stands for missing values; [] if there are none.

    Of large tables, only every k-th row is looked at.
    """
    most = max(1, min(MEDIAN_ROWS, MEDIAN_BYTES // (4 * rows.width)))
    step = max(1, -(-len(rows) // most))
    columns = np.ascontiguousarray(rows.take(np.arange(0, len(rows), step)).T)  # [D, n]
    found = {name: list(_sentinels(column)) for name, column in zip(names, columns, strict=True)}
    listed = [f"{value:g} in {name}" for name, values in found.items() for value in values]
    if not listed:
        return []
    note = (
        "these values occur often, and far from all other values of their column: "
        f"{join_names(listed, LISTED_COLUMNS)}; if they stand for missing values, leave those cells empty"
    )
    return [note]


def _sentinels(column: npt.NDArray[np.float32]) -> Iterator[float]:
    different, counts = np.unique(column[~np.isnan(column)], return_counts=True)
    values = different.astype(np.float64)
    for _ in range(MAX_PER_COLUMN):
        if len(values) < MIN_DISTINCT + 2:
            return
        low, high = _count_far(values, counts), _count_far(-values[::-1], counts[::-1], sign=-1)
        if not low + high:
            return
        kept = slice(low, len(values) - high)
        yield from (float(value) for value in np.delete(values, np.arange(len(values))[kept]))
        values, counts = values[kept], counts[kept]


def _count_far(values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], sign: int = 1) -> int:
    """Return how many of the smallest values occur often and lie far below all others; 0 if none do.

    The largest value does not count, because it may be an outlier itself.

    Args:
        values: different values, ascending, [n].
        counts: how often each of them occurs, [n].
        sign: 1 or -1; `values` times `sign` are the values in the column.
    """
    for count in range(1, min(MAX_PER_COLUMN, len(values) - MIN_DISTINCT) + 1):
        if counts[count - 1] < MIN_COUNT:
            return 0
        usual = all(float(np.float32(sign * value)) in USUAL for value in values[:count])
        if count > 1 and not usual:
            return 0
        gap, spread = values[count] - values[count - 1], values[-2] - values[count]
        if gap > spread * (USUAL_GAP if usual else OTHER_GAP):
            return count
    return 0
