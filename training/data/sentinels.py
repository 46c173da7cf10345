"""Find numbers that stand for missing values, such as -200, -9999 or 999: they pile up at an end of a column."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from models.errors import join_names
from training.data.row_store import MEDIAN_BYTES, MEDIAN_ROWS, RowStore

USUAL = frozenset({-1, -9, -99, -200, -999, -9999, -99999, -32768, -2147483648, 99, 999, 9999, 99999, 999999, 32767,
                   65535, 2147483647, 4294967295})  # fmt: skip
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
    values, counts = np.unique(column[~np.isnan(column)], return_counts=True)
    values = values.astype(np.float64)
    for _ in range(MAX_PER_COLUMN):
        if len(values) < MIN_DISTINCT + 2:
            return
        between = values[1:-1]
        spread = between[-1] - between[0]
        ends = ((0, between[0] - values[0]), (-1, values[-1] - between[-1]))
        far = [
            end
            for end, gap in ends
            if counts[end] >= MIN_COUNT and gap > spread * (USUAL_GAP if values[end] in USUAL else OTHER_GAP)
        ]
        if not far:
            return
        yield from (float(values[end]) for end in far)
        kept = slice(1 if 0 in far else 0, len(values) - 1 if -1 in far else len(values))
        values, counts = values[kept], counts[kept]
