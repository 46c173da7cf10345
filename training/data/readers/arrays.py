"""The bundled digits, .npy files, which stay where they are, and .npz archives, of which a member is streamed."""

import math
import mmap
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np

from training.data.readers.source import Array, Block, RawTable, ReadOptions
from training.data.row_store import FileArray, rows_per_block
from training.errors import DataError

DAMAGE = (ValueError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, NotImplementedError, UnicodeDecodeError)


def read_digits(request: ReadOptions) -> RawTable:
    """scikit-learn's 1797 digits, [8, 8], in [0, 1], with labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16.0
    _columns(images.shape, request, "digits")
    return RawTable(_spans(images, labels, None), (8, 8), rows=len(images), pixel_range=(0.0, 1.0))


def read_numpy(path: Path, request: ReadOptions) -> RawTable:
    """An array [N, ...] of real numbers, alone or as the member x of an archive. Raises DataError."""
    with _intact(path), path.open("rb") as file:
        if file.read(2) == b"PK":
            return _from_archive(path, request)
        file.seek(0)
        header = _header(file)
        _require_rows(header, str(path))
        return _from_file(file, header, None, path, request, [])


@contextmanager
def _intact(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise DataError(f"{path} is damaged or no NumPy file: write it again with numpy.save or numpy.savez") from error


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    by_columns: bool  # Fortran's order: a row does not lie in one piece
    dtype: np.dtype[Any]


def _header(file: IO[bytes]) -> _Header:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return _Header(*read(file))


def _require_rows(header: _Header, source: str) -> None:
    kind, shape = header.dtype, header.shape
    if kind.hasobject:
        raise DataError(f"{source} holds Python objects: expected numbers; save x.astype('float32')")
    if kind.kind not in "iuf":
        advice = "convert them with x.astype('float32')"
        raise DataError(f"{source}: expected an array of real numbers, got {kind}: {advice}")
    if len(shape) < 2:
        raise DataError(f"{source}: expected rows of features, [N, D], got shape {list(shape)}: reshape the array")
    if 0 in shape:
        raise DataError(f"{source} has no rows of numbers (shape {list(shape)}): expected at least one")


def _from_file(
    file: BinaryIO, header: _Header, labels: Array | None, path: Path, request: ReadOptions, notes: list[str]
) -> RawTable:
    """The array that follows its header in a file on disk."""
    size, start = os.fstat(file.fileno()).st_size, file.tell()
    if size - start < math.prod(header.shape) * header.dtype.itemsize:
        raise EOFError
    chosen = _columns(header.shape, request, str(path))
    stored = None if header.by_columns else FileArray(file, header.dtype, start, header.shape)
    flat = (header.shape[0], math.prod(header.shape[1:]))
    return RawTable(
        _spans(_by_columns(file, header) if stored is None else stored, labels, chosen),
        header.shape[1:] if chosen is None else (len(chosen),),
        _file_dtype(header.dtype),
        header.shape[0],
        _names(chosen),
        notes=notes,
        stored=FileArray(file, header.dtype, start, flat) if stored is not None and chosen is None else None,
    )


def _by_columns(file: BinaryIO, header: _Header) -> Array:
    """Mapped, since a row does not lie in one piece."""
    return np.memmap(file, header.dtype, mode="r", offset=file.tell(), shape=header.shape, order="F")


def _names(chosen: list[int] | None) -> list[str] | None:
    return None if chosen is None else [f"x[{index}]" for index in chosen]


def _file_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.uint8 if dtype == np.uint8 else np.float32)


def _columns(shape: tuple[int, ...], request: ReadOptions, source: str) -> list[int] | None:
    """The columns that are left when some are dropped, by their names x[0], x[1], ...; None for all."""
    if not request.drop:
        return None
    if len(shape) > 2:
        raise DataError(f"{source} has images, [N, ...], and no columns: leave --drop out")
    names = {f"x[{index}]": index for index in range(shape[1])}
    if unknown := [name for name in request.drop if name not in names]:
        raise DataError(f"{source} has no column {unknown[0]!r} to drop: expected x[0] to x[{shape[1] - 1}]")
    left = [index for name, index in names.items() if name not in request.drop]
    if not left:
        raise DataError(f"{source}: all {len(names)} columns are dropped: keep one to learn from")
    return left


def _spans(values: Array | FileArray, labels: Array | None, chosen: list[int] | None) -> Iterator[Block]:
    step = rows_per_block(math.prod(values.shape[1:]))
    for start in range(0, len(values), step):
        rows = values[start : start + step]
        rows = rows.reshape(len(rows), -1)
        yield rows if chosen is None else rows[:, chosen], None if labels is None else labels[start : start + step]
        if isinstance(values, np.memmap):
            mapping = values._mmap  # type: ignore[attr-defined]  # np.memmap has no public name for it
            mapping.madvise(mmap.MADV_DONTNEED)  # what was read need no longer be resident


# Archives


def _from_archive(path: Path, request: ReadOptions) -> RawTable:
    with zipfile.ZipFile(path) as archive:
        headers = {}
        for name in archive.namelist():
            with archive.open(name) as file:
                headers[name.removesuffix(".npy")] = _header(file)
        key = _rows_key(headers, path)
        header = headers[key]
        _require_rows(header, str(path))
        labels, notes = _labels(archive, headers, header.shape[0])
        if header.by_columns:
            with archive.open(f"{key}.npy") as member, tempfile.TemporaryFile() as copy:
                shutil.copyfileobj(member, copy, 1 << 20)
                copy.seek(0)
                return _from_file(copy, _header(copy), labels, path, request, notes)
    chosen = _columns(header.shape, request, str(path))
    return RawTable(
        _streamed(path, key, header, labels, chosen),
        header.shape[1:] if chosen is None else (len(chosen),),
        _file_dtype(header.dtype),
        header.shape[0],
        _names(chosen),
        notes=notes,
    )


def _rows_key(headers: dict[str, _Header], path: Path) -> str:
    tables = [key for key, header in headers.items() if len(header.shape) >= 2 and header.dtype.kind in "iuf"]
    named = [key for key in ("x", "X") if key in headers]
    if not named and len(tables) != 1:
        found = ", ".join(f"{key} {header.shape}" for key, header in headers.items()) or "nothing"
        advice = "save the rows with numpy.savez(path, x=rows)"
        raise DataError(f"{path}: expected an array named x, got {found}: {advice}")
    return (named or tables)[0]


def _labels(archive: zipfile.ZipFile, headers: dict[str, _Header], rows: int) -> tuple[Array | None, list[str]]:
    if "y" not in headers:
        return None, []
    if headers["y"].shape != (rows,):
        return None, [f"labels are ignored: expected {rows}, one a row, got shape {headers['y'].shape}"]
    if headers["y"].dtype.hasobject:
        return None, ["labels are ignored: expected whole numbers, got object"]
    with archive.open("y.npy") as file:
        labels: Array = np.lib.format.read_array(file)
    return labels, []


def _streamed(path: Path, key: str, header: _Header, labels: Array | None, chosen: list[int] | None) -> Iterator[Block]:
    width = math.prod(header.shape[1:])
    step = rows_per_block(width)
    with _intact(path), zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as file:
        _header(file)
        for start in range(0, header.shape[0], step):
            count = min(step, header.shape[0] - start)
            content = file.read(count * width * header.dtype.itemsize)
            rows = np.frombuffer(content, header.dtype).reshape(count, width)
            yield rows if chosen is None else rows[:, chosen], None if labels is None else labels[start : start + step]
        while file.read(1 << 20):  # to the end, where the checksum is compared
            pass
