"""One pass over a source: its rows into memory or onto disk, and what must be known of every column on the way."""

import errno
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from training.data.readers import RawTable, describe_row
from training.data.row_store import RowStore, RowWriter, fits_in_memory
from training.errors import DataError

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

Array = npt.NDArray[Any]


@dataclass
class Infinite:
    """The values of one column that float32 cannot hold."""

    row: int  # of the first
    value: float
    count: int


class ColumnStatistics:
    """What D columns hold, block by block."""

    def __init__(self, width: int) -> None:
        self.rows = 0
        self.low = np.full(width, np.nan)  # [D] in float64; NaN where there is no value
        self.high = np.full(width, np.nan)
        self.missing = np.zeros(width, np.int64)  # [D] values that are not there
        self.first_missing = np.full(width, -1)  # [D] row of the first of them
        self.infinite: dict[int, Infinite] = {}  # by column

    def add(self, block: Array) -> npt.NDArray[np.float32]:
        """Count rows [n, D] of any real dtype in, and give them as float32."""
        with np.errstate(over="ignore", invalid="ignore"):
            x = block.astype(np.float32)
            total = x.sum(dtype=np.float64)
        if not np.isfinite(total):  # a sum is cheaper than two masks, and mostly enough
            self._count_missing(np.isnan(x))
            self._count_infinite(np.isinf(x), block)
        self.low = np.fmin(self.low, np.fmin.reduce(block, axis=0).astype(np.float64))
        self.high = np.fmax(self.high, np.fmax.reduce(block, axis=0).astype(np.float64))
        self.rows += len(block)
        return x

    def _count_missing(self, missing: npt.NDArray[np.bool_]) -> None:
        counts = missing.sum(axis=0)
        new = (self.first_missing < 0) & (counts > 0)
        self.first_missing[new] = self.rows + missing[:, new].argmax(axis=0)
        self.missing += counts

    def _count_infinite(self, infinite: npt.NDArray[np.bool_], block: Array) -> None:
        for column in np.flatnonzero(infinite.any(axis=0)).tolist():
            row, count = int(infinite[:, column].argmax()), int(infinite[:, column].sum())
            known = self.infinite.setdefault(column, Infinite(self.rows + row, float(block[row, column]), 0))
            known.count += count

    def refuse_infinite(self, source: str, names: Sequence[str], first_line: int | None) -> None:
        """Raise DataError for the first column that holds what is no float32."""
        for column, found in sorted(self.infinite.items())[:1]:
            limit = " (float32 ends at 3.4e38)" if np.isfinite(found.value) else ""
            raise DataError(
                f"{source}: column {names[column]!r} has the value {found.value}{limit} in "
                f"{describe_row(found.row, first_line)}{_more(found.count)}: "
                "expected finite numbers; fill them in, or drop those rows or the column"
            )

    def refuse_missing(
        self, source: str, names: Sequence[str], first_line: int | None, allowed: npt.NDArray[np.bool_]
    ) -> None:
        """Raise DataError for the first column that lacks a value where none may be lacking (`allowed` [D])."""
        for column in np.flatnonzero((self.missing > 0) & ~allowed)[:1]:
            raise DataError(
                f"{source}: column {names[column]!r} has no value (NaN) in "
                f"{describe_row(int(self.first_missing[column]), first_line)}{_more(int(self.missing[column]))}: "
                "expected finite numbers, since the model was trained without missing values there; "
                "fill them in, or drop those rows"
            )


def _more(count: int) -> str:
    return f" and in {count - 1} more" if count > 1 else ""


def ingest(raw: RawTable, source: str, limit: int) -> tuple[RowStore, ColumnStatistics, Array | None]:
    """The rows of `raw`, in memory if they take up to `limit` bytes as float32; what they hold; their labels [N].

    Raises DataError.
    """
    width = int(np.prod(raw.shape))
    census, labels = ColumnStatistics(width), []
    stored = raw.stored if raw.stored is not None and not fits_in_memory(len(raw.stored), width, limit) else None
    needed = (raw.rows or 0) * width * raw.dtype.itemsize
    with full_disk_as_data_error(source, needed), closing(RowWriter(width, raw.dtype, limit)) as spool:
        for block, marks in raw.blocks:
            x = census.add(block)
            if stored is None:
                spool.add(x)
            if marks is not None:
                labels.append(marks)
        if census.rows == 0:
            raise DataError(f"{source} has no rows of numbers (shape [0, {width}]): expected at least one")
        rows = spool.rows() if stored is None else RowStore(stored)
    return rows, census, np.concatenate(labels) if labels else None


@contextmanager
def full_disk_as_data_error(source: str, needed: int = 0) -> Iterator[None]:
    """Turn a full disk into a DataError that says how many bytes are needed, if that is known, and where."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        size = f"about {max(needed / 1e9, 0.001):.3g} GB" if needed else "more room"
        raise DataError(
            f"{source}: its rows do not fit into {tempfile.gettempdir()} ({error.strerror}): they need {size}; "
            "set TMPDIR to a folder with that much room"
        ) from error
