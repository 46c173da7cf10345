"""Read the bundled digits, .npy files and .npz archives. Files are read in place, and archives as a stream."""

import math
import mmap
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from models.errors import join_names
from training.data.labels import find_label_column, is_status_name
from training.data.layout import arrange
from training.data.readers.columns import refusal
from training.data.readers.raw_table import Array, Block, RawTable, ReadOptions, SourcePart
from training.data.readers.row_order import OrderDetector, describe_direction
from training.data.row_store import FileArray, rows_per_block
from training.errors import DataError

MAX_DIMENSIONS = 32
# the exceptions that NumPy and zipfile raise for a damaged file
DAMAGE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError, UnicodeDecodeError)


def read_digits(options: ReadOptions) -> RawTable:
    """Return scikit-learn's 1797 images of digits, [8, 8] with values in [0, 1], and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16.0
    _kept_columns(images.shape, options, "digits")  # refuses --drop
    return RawTable(blocks=_blocks(images, labels, None), shape=(8, 8), rows=len(images), pixel_range=(0.0, 1.0))


def read_numpy(path: Path, options: ReadOptions) -> RawTable:
    """Return an array [N, ...] of real numbers from an .npy file, or from the member x of an .npz archive.

    Raises:
        DataError: the file is damaged, or contains no such array.
    """
    with _damage_as_data_error(path), path.open("rb") as file:
        if file.read(2) == b"PK":
            return _with_column_check(_with_layout(_open_archive(path, options), path, options), path, options)
        file.seek(0)
        header = _read_header(file)
        _refuse_other_arrays(header, str(path))
        raw = _open_file(file, header, None, path, options, [])
        return _with_column_check(_with_layout(raw, path, options), path, options)


def read_array(values: Array, labels: Array | None, path: Path, options: ReadOptions) -> RawTable:
    """Return the array `values` [N, ...] of real numbers, with `labels` [N], as `read_numpy` returns that of a file.

    Args:
        path: name of the source, for messages.

    Raises:
        DataError: the array has no rows of real numbers.
    """
    _refuse_other_arrays(_Header(values.shape, fortran_order=False, dtype=values.dtype), str(path))
    columns = _kept_columns(values.shape, options, str(path))
    raw = RawTable(
        blocks=_blocks(values, labels, columns),
        shape=values.shape[1:] if columns is None else (len(columns),),
        dtype=_stored_dtype(values.dtype),
        rows=values.shape[0],
        names=_column_names(columns),
    )
    return _with_column_check(_with_layout(raw, path, options), path, options)


def _with_layout(table: RawTable, path: Path, options: ReadOptions) -> RawTable:
    """Return `table` in the layout that the options require.

    A model whose rows are [H, W, C] also takes rows [C, H, W].
    """
    layout, shape = options.layout, table.shape
    if options.shape is not None and len(shape) == 3 and shape != options.shape == (*shape[1:], shape[0]):
        layout = "nchw"
    arranged, axes = arrange(shape, layout, str(path))
    if axes is None:
        return replace(table, shape=arranged)
    blocks = (
        (rows.reshape(-1, *shape).transpose(axes).reshape(len(rows), -1), labels) for rows, labels in table.blocks
    )
    return replace(table, shape=arranged, blocks=blocks, file_array=None)


def _with_column_check(table: RawTable, path: Path, options: ReadOptions) -> RawTable:
    """Return `table` with blocks that raise DataError after the last one if a column follows the row number.

    Rows for an existing model are not checked, and neither are images.
    """
    if options.names is not None or len(table.shape) > 1:
        return table
    names = table.names or [f"x[{index}]" for index in range(table.shape[0])]
    if unknown := [name for name in options.keep if name not in names]:
        raise DataError(f"{path} has no column {unknown[0]!r} to keep: expected {names[0]} to {names[-1]}")
    return replace(table, blocks=_checked_blocks(table.blocks, names, path, options))


def _checked_blocks(blocks: Iterator[Block], names: list[str], path: Path, options: ReadOptions) -> Iterator[Block]:
    order = OrderDetector(len(names))
    for rows, labels in blocks:
        order.add(rows)
        yield rows, labels
    directions = zip(names, order.directions().tolist(), strict=True)
    ordered = {name: describe_direction(way) for name, way in directions if way and name not in options.keep}
    if ordered:
        raise refusal(path, ordered, list(ordered))


@contextmanager
def _damage_as_data_error(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise DataError(
            f"{path} is damaged or not a NumPy file: write it again with numpy.save or numpy.savez"
        ) from error


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran_order: bool  # the array is stored column by column, so a row is not contiguous
    dtype: np.dtype[Any]


def _read_header(file: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    header = _Header(*read(file))
    # NumPy accepts any Python integers here: negative ones, True, and more lengths than an array can have.
    if len(header.shape) > MAX_DIMENSIONS or not all(type(n) is int and n >= 0 for n in header.shape):
        raise ValueError("impossible shape")
    return header


def _refuse_other_arrays(header: _Header, source: str) -> None:
    """Raise DataError unless the array has rows of real numbers."""
    dtype, shape = header.dtype, header.shape
    if dtype.hasobject:
        raise DataError(f"{source} holds Python objects: expected numbers; save x.astype('float32')")
    if dtype.kind not in "iuf":
        advice = "convert them with x.astype('float32')"
        raise DataError(f"{source}: expected an array of real numbers, got {dtype}: {advice}")
    if len(shape) < 2:
        raise DataError(f"{source}: expected rows of features, [N, D], got shape {list(shape)}: reshape the array")
    if 0 in shape:
        raise DataError(f"{source} has no rows of numbers (shape {list(shape)}): expected at least one")


def _open_file(
    file: BinaryIO, header: _Header, labels: Array | None, path: Path, options: ReadOptions, notes: list[str]
) -> RawTable:
    """Return the array in `file`, which is positioned after the header."""
    size, start = os.fstat(file.fileno()).st_size, file.tell()
    if size - start < math.prod(header.shape) * header.dtype.itemsize:
        raise EOFError
    columns = _kept_columns(header.shape, options, str(path))
    file_array: FileArray | None = None
    values: FileArray | Array
    if header.fortran_order:  # a row is not contiguous, so the file is mapped into memory
        values = np.memmap(file, header.dtype, mode="r", offset=start, shape=header.shape, order="F")
    else:
        values = FileArray(file, header.dtype, start, header.shape)
        if columns is None:
            flat = (header.shape[0], math.prod(header.shape[1:]))
            file_array = FileArray(file, header.dtype, start, flat)
    return RawTable(
        blocks=_blocks(values, labels, columns, options.part),
        shape=header.shape[1:] if columns is None else (len(columns),),
        dtype=_stored_dtype(header.dtype),
        rows=header.shape[0] if options.part is None else options.part.stop - options.part.start,
        names=_column_names(columns),
        notes=notes,
        file_array=file_array,
    )


def _column_names(columns: list[int] | None) -> list[str] | None:
    return None if columns is None else [f"x[{index}]" for index in columns]


def _stored_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.uint8 if dtype == np.uint8 else np.float32)


def _kept_columns(shape: tuple[int, ...], options: ReadOptions, source: str) -> list[int] | None:
    """Return the indices of the columns that remain after --drop; None if all do. The names are x[0], x[1], ..."""
    if not options.drop:
        return None
    if len(shape) > 2:
        raise DataError(f"{source} has images, [N, ...], and no columns to drop: leave --drop out")
    names = {f"x[{index}]": index for index in range(shape[1])}
    if unknown := [name for name in options.drop if name not in names]:
        raise DataError(f"{source} has no column {unknown[0]!r} to drop: expected x[0] to x[{shape[1] - 1}]")
    kept = [index for name, index in names.items() if name not in options.drop]
    if not kept:
        raise DataError(f"{source}: all {len(names)} columns are dropped: keep at least one to learn from")
    return kept


def _blocks(
    values: Array | FileArray, labels: Array | None, columns: list[int] | None, part: SourcePart | None = None
) -> Iterator[Block]:
    step = rows_per_block(math.prod(values.shape[1:]))
    first, last = (0, len(values)) if part is None else (part.start, part.stop)
    for start in range(first, last, step):
        stop = min(start + step, last)
        rows = values[start:stop]
        rows = rows.reshape(len(rows), -1)
        yield (
            rows if columns is None else rows[:, columns],
            None if labels is None else labels[start:stop],
        )
        if isinstance(values, np.memmap):
            mapping = values._mmap  # type: ignore[attr-defined]  # np.memmap has no public name for it
            mapping.madvise(mmap.MADV_DONTNEED)  # free the pages of the block


# Archives


def _open_archive(path: Path, options: ReadOptions) -> RawTable:
    with zipfile.ZipFile(path) as archive:
        headers = {}
        for name in archive.namelist():
            with archive.open(name) as file:
                headers[name.removesuffix(".npy")] = _read_header(file)
        key = _find_rows(headers, path)
        header = headers[key]
        _refuse_other_arrays(header, str(path))
        label_column, labels, notes = _read_labels(archive, headers, key, path, options)
        if header.fortran_order:  # rows cannot be streamed, so the member is unpacked
            with archive.open(f"{key}.npy") as member, tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(member, copy, 1 << 20)
                copy.seek(0)
                raw = _open_file(copy, _read_header(copy), labels, path, options, notes)
                return replace(raw, label_column=label_column)
    columns = _kept_columns(header.shape, options, str(path))
    return RawTable(
        blocks=_stream_member(path, key, header, labels, columns),
        shape=header.shape[1:] if columns is None else (len(columns),),
        dtype=_stored_dtype(header.dtype),
        rows=header.shape[0],
        names=_column_names(columns),
        label_column=label_column,
        notes=notes,
    )


def _find_rows(headers: dict[str, _Header], path: Path) -> str:
    """Return the name of the array of rows: x or X if present, else the only numeric array of 2 or more dimensions."""
    tables = [key for key, header in headers.items() if len(header.shape) >= 2 and header.dtype.kind in "iuf"]
    named = [key for key in ("x", "X") if key in headers]
    if not named and len(tables) != 1:
        got = ", ".join(f"{key} {header.shape}" for key, header in headers.items()) or "nothing"
        advice = "save the rows with numpy.savez(path, x=rows)"
        raise DataError(f"{path}: expected an array named x, got {got}: {advice}")
    return (named or tables)[0]


def _read_labels(
    archive: zipfile.ZipFile, headers: dict[str, _Header], key: str, path: Path, options: ReadOptions
) -> tuple[str | None, Array | None, list[str]]:
    """Return the name of the array of labels, the labels [N], and notes. Both are None without usable labels.

    Args:
        key: the name of the array of rows.
    """
    others = [other for other in headers if other != key]
    if unknown := [name for name in options.label if name not in others] if options.names is None else []:
        raise DataError(f"{path} has no array {unknown[0]!r} to read as labels: it has {join_names(list(headers))}")
    given = [name for name in (*options.label, *options.condition) if name in others]
    name = given[0] if given else find_label_column([other for other in others if not is_status_name(other)])
    if name is None:
        return None, None, []
    rows, header = headers[key].shape[0], headers[name]
    if header.shape not in ((rows,), (rows, 1)):
        return None, None, [f"labels are ignored: expected one per row, shape [{rows}], got shape {list(header.shape)}"]
    if header.dtype.hasobject:
        return None, None, ["labels are ignored: expected integers or text, got Python objects; save y.astype(str)"]
    with archive.open(f"{name}.npy") as file:
        labels: Array = np.lib.format.read_array(file).reshape(-1)
    return name, labels.astype(np.str_) if labels.dtype.kind == "S" else labels, []


def _stream_member(
    path: Path, key: str, header: _Header, labels: Array | None, columns: list[int] | None
) -> Iterator[Block]:
    width = math.prod(header.shape[1:])
    step = rows_per_block(width)
    with _damage_as_data_error(path), zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        _read_header(file)
        for start in range(0, header.shape[0], step):
            count = min(step, header.shape[0] - start)
            content = file.read(count * width * header.dtype.itemsize)
            rows = np.frombuffer(content, header.dtype).reshape(count, width)
            yield (
                rows if columns is None else rows[:, columns],
                None if labels is None else labels[start : start + step],
            )
        while file.read(1 << 20):  # at the end of the member, zipfile verifies its checksum
            pass
