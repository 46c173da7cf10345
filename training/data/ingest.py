"""Read all blocks of a source once: store the rows in memory or on disk, and collect statistics of every column."""

import errno
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from training.data.line_numbers import LineNumbers, describe_row
from training.data.readers import RawTable
from training.data.row_store import RowStore, RowWriter, fits_in_memory
from training.errors import DataError

DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

Array = npt.NDArray[Any]


@dataclass
class InfiniteValues:
    """The values of one column that are infinite in float32."""

    first_row: int
    first_value: float
    count: int


class ColumnStatistics:
    """Range, missing values and infinite values of D columns, collected block by block."""

    def __init__(self, width: int) -> None:
        self.rows = 0  # number of rows that have at least one value
        self.empty_rows = 0  # number of rows without any value
        self.low = np.full(width, np.nan)  # [D] float64; NaN for a column without values
        self.high = np.full(width, np.nan)
        self.missing = np.zeros(width, np.int64)  # [D] number of missing values
        self.first_missing = np.full(width, -1)  # [D] row of the first missing value; -1 if there is none
        self.infinite: dict[int, InfiniteValues] = {}  # infinite values by column number
        self._empty: list[npt.NDArray[np.int64]] = []  # numbers of the rows without any value

    def add(self, block: Array) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_] | None]:
        """Update the statistics with rows [n, D] of any real dtype.

        Return the rows that have at least one value, as float32, and the mask [n] of these rows. The mask is None if
        all rows have a value.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            x = block.astype(np.float32)
            total = x.sum(dtype=np.float64)
        # The sum is finite unless a value is missing or infinite. One sum is cheaper than checking every value twice.
        filled: npt.NDArray[np.bool_] | None = None
        if not np.isfinite(total):
            missing = np.isnan(x)
            if missing.all(axis=1).any():
                filled = np.asarray(~missing.all(axis=1))
                missing[~filled] = False
            self._count_missing(missing)
            self._count_infinite(np.isinf(x), block)
        self.low = np.fmin(self.low, np.fmin.reduce(block, axis=0).astype(np.float64))
        self.high = np.fmax(self.high, np.fmax.reduce(block, axis=0).astype(np.float64))
        count = len(block) if filled is None else int(filled.sum())
        if filled is not None:
            self._empty.append(self.rows + self.empty_rows + np.flatnonzero(~filled))
        self.rows += count
        self.empty_rows += len(block) - count
        return (x if filled is None else x[filled]), filled

    def select(self, columns: Sequence[int]) -> "ColumnStatistics":
        """Return the statistics of some columns."""
        chosen = ColumnStatistics(len(columns))
        chosen.rows, chosen.empty_rows = self.rows, self.empty_rows
        for name in ("low", "high", "missing", "first_missing"):
            setattr(chosen, name, getattr(self, name)[list(columns)])
        return chosen

    def filled_rows(self) -> npt.NDArray[np.int64]:
        """Return the numbers of the rows of the source that have at least one value, ascending."""
        numbers = np.arange(self.rows + self.empty_rows)
        return np.delete(numbers, np.concatenate(self._empty)) if self._empty else numbers

    def _count_missing(self, missing: npt.NDArray[np.bool_]) -> None:
        counts = missing.sum(axis=0)
        new = (self.first_missing < 0) & (counts > 0)
        self.first_missing[new] = self.rows + self.empty_rows + missing[:, new].argmax(axis=0)
        self.missing += counts

    def _count_infinite(self, infinite: npt.NDArray[np.bool_], block: Array) -> None:
        for column in np.flatnonzero(infinite.any(axis=0)).tolist():
            first = int(infinite[:, column].argmax())
            found = self.infinite.setdefault(
                column, InfiniteValues(self.rows + self.empty_rows + first, float(block[first, column]), count=0)
            )
            found.count += int(infinite[:, column].sum())

    def refuse_infinite(self, source: str, names: Sequence[str], lines: LineNumbers | None) -> None:
        """Raise DataError for the first column with a value that is infinite in float32."""
        for column, found in sorted(self.infinite.items())[:1]:
            limit = ", beyond the range of float32 (3.4e38)," if np.isfinite(found.first_value) else ""
            raise DataError(
                f"{source}: column {names[column]!r} has the value {found.first_value}{limit} in "
                f"{describe_row(found.first_row, lines)}{_and_others(found.count)}: "
                "expected finite numbers; correct the values, or drop those rows or the column"
            )

    def refuse_missing(
        self, source: str, names: Sequence[str], lines: LineNumbers | None, allowed: npt.NDArray[np.bool_]
    ) -> None:
        """Raise DataError for the first column that has missing values and is false in `allowed` [D]."""
        for column in np.flatnonzero((self.missing > 0) & ~allowed)[:1]:
            raise DataError(
                f"{source}: column {names[column]!r} has no value (NaN) in "
                f"{describe_row(int(self.first_missing[column]), lines)}"
                f"{_and_others(int(self.missing[column]))}: "
                "expected a number, because the model was trained without missing values in this column; "
                "fill in the values, or drop those rows"
            )


def _and_others(count: int) -> str:
    """Return the end of a message that names the first of `count` rows: how many other rows there are, if any."""
    return f" and in {count - 1} more" if count > 1 else ""


def ingest(raw: RawTable, source: str, limit: int) -> tuple[RowStore, ColumnStatistics, Array | None]:
    """Read `raw`. Return its rows, the statistics of its columns, and its labels [N] if there are any.

    Rows without any value are left out, as blank lines are: replaced by medians, they would teach a model that such
    rows are normal.

    Args:
        source: the name of the source, for messages.
        limit: maximum size of a table in memory, in bytes of float32 values. Larger tables stay on disk.

    Raises:
        DataError: the source is damaged, empty or not numeric, or the disk is full.
    """
    width = int(np.prod(raw.shape))
    statistics, labels = ColumnStatistics(width), []
    file_array = raw.file_array
    if file_array is not None and fits_in_memory(len(file_array), width, limit):
        file_array = None
    needed = (raw.rows or 0) * width * raw.dtype.itemsize
    with full_disk_as_data_error(source, needed), closing(RowWriter(width, raw.dtype, limit)) as writer:
        for block, block_labels in raw.blocks:
            x, filled = statistics.add(block)
            if file_array is None:
                writer.add(x)
            elif filled is not None:
                row = statistics.rows + statistics.empty_rows - len(block) + int(filled.argmin())
                raise DataError(f"{source}: row {row} has no value: save the array without such rows")
            if block_labels is not None:
                labels.append(block_labels if filled is None else block_labels[filled])
        if statistics.empty_rows:
            raw.notes.append(f"rows without any value are left out: {statistics.empty_rows:,}")
        if statistics.rows == 0:
            raise DataError(f"{source} has no rows of numbers (shape [0, {width}]): expected at least one")
        rows = writer.rows() if file_array is None else RowStore(file_array)
    return rows, statistics, np.concatenate(labels) if labels else None


@contextmanager
def full_disk_as_data_error(source: str, needed: int = 0) -> Iterator[None]:
    """Turn the OSError of a full disk into a DataError that names the folder.

    Args:
        needed: number of bytes that the rows need; 0 if unknown.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        size = f"about {max(needed / 1e9, 0.001):.3g} GB" if needed else "more space"
        raise DataError(
            f"{source}: the rows do not fit into {tempfile.gettempdir()} ({error.strerror}): they need {size}; "
            "free some space there, or set TMPDIR to a folder with enough space"
        ) from error
