"""Rows of any number: an array in memory, or a file of which what is asked for is read and never more is resident."""

import os
import tempfile
import weakref
from collections.abc import Iterator
from io import BytesIO
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt

from training.errors import DataError

BLOCK_BYTES = 4 << 20  # of float32 values: what is read from disk at a time
MEDIAN_ROWS = 100_000
MEDIAN_BYTES = 64 << 20

Floats = npt.NDArray[np.float32]


class FileArray:
    """An array [N, ...] in C order in a file, which is read as it is indexed: by a slice of rows or by their numbers.

    Not mapped: at random a call costs half of a page fault, what was read is not resident, and a disk that fails or a
    file that shrinks is an error and not a signal. The file may be closed, or have lost its name.
    """

    def __init__(self, file: BinaryIO, dtype: npt.DTypeLike, offset: int, shape: tuple[int, ...]) -> None:
        self.dtype, self.shape, self._offset = np.dtype(dtype), shape, offset
        self._row_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize
        self._descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """The rows [n, ...]. Raises DataError where the file has become shorter."""
        if isinstance(rows, slice):
            first, end, _ = rows.indices(len(self))
            found = np.empty((max(0, end - first), *self.shape[1:]), self.dtype)
            self._read(_bytes(found), first)
            return found
        found = np.empty((len(rows), *self.shape[1:]), self.dtype)
        content, size = _bytes(found), self._row_bytes
        for position, row in enumerate(rows.tolist()):
            self._read(content[position * size : (position + 1) * size], row)
        return found

    def _read(self, content: memoryview, row: int) -> None:
        """Fill `content` with what begins at `row`."""
        at = self._offset + row * self._row_bytes
        while content:
            count = os.preadv(self._descriptor, [content], at)
            if count == 0:
                raise DataError(f"the file of rows ends before row {row}: expected it to stay as it was; start again")
            content, at = content[count:], at + count


def _bytes(array: npt.NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


class RowStore:
    """N rows of D features, raw units, NaN where a value is missing. Everything that it gives is a float32 copy.

    Args:
        values: [N, D] of any real dtype.
    """

    def __init__(self, values: npt.NDArray[Any] | FileArray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @property
    def width(self) -> int:
        """D."""
        return int(self._values.shape[1])

    @property
    def on_disk(self) -> bool:
        """Whether reading costs disk, so that it is done in blocks, in order."""
        return isinstance(self._values, FileArray)

    @property
    def block(self) -> int:
        """Rows that are read from disk at a time."""
        return rows_per_block(self.width)

    def take(self, indices: npt.NDArray[np.int64]) -> Floats:
        """The rows [n, D] at `indices` [n], in that order."""
        return self._values[indices].astype(np.float32, copy=False)

    def span(self, start: int, stop: int) -> Floats:
        """The rows from `start` up to `stop`."""
        return np.array(self._values[start:stop], dtype=np.float32)

    def blocks(self) -> Iterator[tuple[int, Floats]]:
        """All rows in order, in blocks, each with the number of its first row."""
        for start in range(0, len(self), self.block):
            yield start, self.span(start, start + self.block)


class RowWriter:
    """Rows as they come in: in memory up to `limit` bytes of float32, beyond that in a file without a name.

    The file lies where `tempfile` puts files (TMPDIR). It is gone when the last that reads it is, whatever ends
    the process.

    Args:
        width: D.
        dtype: of the values in the file.
    """

    def __init__(self, width: int, dtype: npt.DTypeLike, limit: int) -> None:
        self._width, self._dtype, self._limit = width, np.dtype(dtype), limit
        self._file: BytesIO | BinaryIO = BytesIO()
        self._rows = 0

    def add(self, block: npt.NDArray[Any]) -> None:
        """Append rows [n, D]. Raises OSError where the disk is full."""
        self._rows += len(block)
        if isinstance(self._file, BytesIO) and not fits_in_memory(self._rows, self._width, self._limit):
            held = self._file.getbuffer()
            self._file = cast(BinaryIO, tempfile.TemporaryFile(buffering=0))  # noqa: SIM115  # see close
            _write(self._file, held)
        _write(self._file, _bytes(np.ascontiguousarray(block, self._dtype)))

    def rows(self) -> RowStore:
        """All of them; nothing can be added afterwards, but the spool can be closed."""
        shape = (self._rows, self._width)
        if isinstance(self._file, BytesIO):
            values = np.frombuffer(self._file.getbuffer(), self._dtype).reshape(shape)
            return RowStore(values.astype(np.float32, copy=False))
        return RowStore(FileArray(self._file, self._dtype, 0, shape))

    def close(self) -> None:
        """Let go of the file; rows that were given out keep it."""
        if not isinstance(self._file, BytesIO):  # whose bytes are the rows
            self._file.close()


def _write(file: BytesIO | BinaryIO, content: memoryview) -> None:
    """All of `content`: a file without a buffer may take less than it was given."""
    while content:
        content = content[file.write(content) :]


def fits_in_memory(rows: int, width: int, limit: int) -> bool:
    """Whether float32 [rows, width] stays within `limit` bytes."""
    return 4 * rows * width <= limit


def rows_per_block(width: int) -> int:
    """How many rows of `width` float32 values make a block."""
    return max(1, BLOCK_BYTES // (4 * width))


def column_medians(rows: RowStore, indices: npt.NDArray[np.int64]) -> Floats:
    """The median [D] of the values that the rows at `indices` have; NaN where they have none.

    Of more than MEDIAN_ROWS rows, or MEDIAN_BYTES, as many at equal steps are looked at.
    """
    most = max(1, min(MEDIAN_ROWS, MEDIAN_BYTES // (4 * rows.width)))
    taken = rows.take(np.sort(indices[:: max(1, -(-len(indices) // most))]))
    columns = np.ascontiguousarray(taken.T)  # [D, n]
    present = [column[~np.isnan(column)] for column in columns]
    return np.array([np.median(column) if len(column) else np.nan for column in present], np.float32)
