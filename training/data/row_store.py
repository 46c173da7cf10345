"""Rows of a table, in memory or in a file on disk. A file is read in parts and is never loaded as a whole."""

import os
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import closing
from io import BytesIO
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from training.errors import DataError

BLOCK_BYTES = 4 << 20  # size of a block that is read from disk, in bytes of float32 values
MEDIAN_ROWS = 100_000  # medians are computed from at most this many rows
MEDIAN_BYTES = 64 << 20  # medians are computed from rows that together have at most this many bytes of float32 values

Floats = npt.NDArray[np.float32]


def all_finite(values: npt.NDArray[Any]) -> bool:
    """Return whether no number is NaN or infinite."""
    # NaN and infinity stay in a sum, and a sum takes a fifth of the time of np.isfinite. Large finite numbers can also
    # make the sum infinite, so then np.isfinite decides.
    with np.errstate(over="ignore", invalid="ignore"):
        total = values.sum()
    return bool(np.isfinite(total) or np.isfinite(values).all())


class FileArray:
    """An array [N, ...] in C order in a file. Indexing the array with a slice or with row numbers reads those rows.

    The file is read with pread. Mapping it into memory would have three disadvantages: random reads take twice as
    long, rows that were read stay resident, and a disk error or a truncated file raises a signal instead of an
    exception.

    The file's descriptor is duplicated, so the caller may close or delete the file.

    Args:
        offset: position of the first row in the file, in bytes.
    """

    def __init__(self, file: BinaryIO, dtype: npt.DTypeLike, offset: int, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self._offset = np.dtype(dtype), shape, offset
        self._row_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Return the selected rows, [n, ...].

        Raises:
            DataError: the file was truncated after it was opened.
        """
        if isinstance(rows, slice):
            first, end, _ = rows.indices(len(self))
            values = np.empty((max(0, end - first), *self.shape[1:]), self.dtype)
            self._read_into(_bytes(values), first)
            return values
        values = np.empty((len(rows), *self.shape[1:]), self.dtype)
        content, size = _bytes(values), self._row_bytes
        for position, row in enumerate(rows.tolist()):
            self._read_into(content[position * size : (position + 1) * size], row)
        return values

    def _read_into(self, content: memoryview, row: int) -> None:
        """Fill `content` with bytes of the file, from the start of `row` on."""
        position = self._offset + row * self._row_bytes
        while content:
            count = os.preadv(self._descriptor, [content], position)
            if count == 0:
                raise DataError(
                    f"the data file ends before row {row}: it was truncated while it was read; "
                    "restore the file and start again"
                )
            content, position = content[count:], position + count


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


class RowStore:
    """N rows of D features in raw units, NaN where a value is missing. Every method returns a float32 copy.

    Args:
        values: [N, D] of any real dtype.
    """

    def __init__(self, values: npt.NDArray[Any] | FileArray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @property
    def width(self) -> int:
        """The number of features, D."""
        return int(self._values.shape[1])

    @property
    def on_disk(self) -> bool:
        """Whether the rows are in a file. A file is read fastest in order, block by block."""
        return isinstance(self._values, FileArray)

    @property
    def block_rows(self) -> int:
        """The number of rows in a block."""
        return rows_per_block(self.width)

    def take(self, indices: npt.NDArray[np.int64]) -> Floats:
        """Return the rows [n, D] at `indices` [n], in that order."""
        return self._values[indices].astype(np.float32, copy=False)

    def read_range(self, start: int, stop: int) -> Floats:
        """Return the rows from `start` up to, not including, `stop`."""
        return np.array(self._values[start:stop], dtype=np.float32)

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """Yield all rows in order, in blocks, each with the index of its first row."""
        for start in range(0, len(self), self.block_rows):
            yield start, self.read_range(start, start + self.block_rows)


class RowWriter:
    """Collects rows in memory, or in a temporary file once they exceed `limit` bytes of float32 values.

    The temporary file is created in the folder of `tempfile` (TMPDIR) and has no name. The system therefore frees the
    space when the last descriptor of the file is closed, even if the process is killed.

    Args:
        width: number of features D.
        dtype: type of the stored values.
    """

    def __init__(self, width: int, dtype: npt.DTypeLike, limit: int) -> None:
        self._width, self._dtype, self._limit = width, np.dtype(dtype), limit
        self._file: BytesIO | BinaryIO = BytesIO()
        self._count = 0

    def add(self, block: npt.NDArray[Any]) -> None:
        """Append rows [n, D].

        Raises:
            OSError: the disk is full.
        """
        self._count += len(block)
        if isinstance(self._file, BytesIO) and not fits_in_memory(self._count, self._width, self._limit):
            in_memory = self._file.getbuffer()
            self._file = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115  # `close` closes it
            _write_all(self._file, in_memory)
        _write_all(self._file, _bytes(np.ascontiguousarray(block, self._dtype)))

    def rows(self) -> RowStore:
        """Return all rows. After that, the writer can be closed, but no rows can be added."""
        shape = (self._count, self._width)
        if isinstance(self._file, BytesIO):
            values = np.frombuffer(self._file.getbuffer(), self._dtype).reshape(shape)
            return RowStore(values.astype(np.float32, copy=False))
        return RowStore(FileArray(self._file, self._dtype, 0, shape))

    def close(self) -> None:
        """Close the temporary file. The result of `rows` stays readable, because it has a descriptor of its own."""
        if not isinstance(self._file, BytesIO):  # a BytesIO must stay open: the returned rows use its memory
            self._file.close()


def reorder(rows: RowStore, order: npt.NDArray[np.int64], limit: int) -> RowStore:
    """Return the rows at the positions `order`, in that order.

    Args:
        limit: maximum size of a table in memory, as for `RowWriter`.

    Raises:
        OSError: the disk is full.
    """
    if np.array_equal(order, np.arange(len(rows))):
        return rows
    if not rows.on_disk:
        return RowStore(rows.take(order))
    with closing(RowWriter(rows.width, np.float32, limit)) as writer:
        for start in range(0, len(order), rows.block_rows):
            writer.add(rows.take(order[start : start + rows.block_rows]))
        return writer.rows()


def _write_all(file: BytesIO | BinaryIO, content: memoryview) -> None:
    """Write all of `content`. A single `write` to an unbuffered file may write only a part."""
    while content:
        content = content[file.write(content) :]


def fits_in_memory(rows: int, width: int, limit: int) -> bool:
    """Return whether `rows` rows of `width` float32 values take at most `limit` bytes."""
    return 4 * rows * width <= limit


def rows_per_block(width: int) -> int:
    """Return the number of rows in a block, for rows of `width` float32 values."""
    return max(1, BLOCK_BYTES // (4 * width))


def column_medians(rows: RowStore, indices: npt.NDArray[np.int64]) -> Floats:
    """Return the median of each column, [D], over the rows at `indices`.

    Missing values are ignored. A column without values has the median NaN. If the rows exceed MEDIAN_ROWS
    or MEDIAN_BYTES, only every k-th row is used.
    """
    most = max(1, min(MEDIAN_ROWS, MEDIAN_BYTES // (4 * rows.width)))
    step = max(1, -(-len(indices) // most))
    values = rows.take(np.sort(indices[::step]))
    columns = np.ascontiguousarray(values.T)  # [D, n]
    present = [column[~np.isnan(column)] for column in columns]
    return np.array([np.median(column) if len(column) else np.nan for column in present], np.float32)
