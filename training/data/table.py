"""The table that every model is trained on: rows in raw units, with the names of their features.

`read` turns a source into a checked table, `read_like` does so for rows that an existing model shall see, and
`split` decides which rows fit the model, which judge it and which calibrate it.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.errors import join_names
from training.data.ingest import ColumnStatistics, full_disk_as_data_error, ingest
from training.data.readers import ReadOptions, format_option, load
from training.data.row_store import RowStore
from training.errors import DataError

if TYPE_CHECKING:
    from models.manifest import Manifest

__all__ = ["MINIMUM_ROWS", "DataError", "Split", "Table", "read_for_model", "read_table", "split_rows"]

MEMORY_BYTES = 512 << 20  # of float32 values: more stay on disk
MINIMUM_ROWS = 10  # fewer leave no row to calibrate on, or none to judge by
MAX_HELD_OUT_ROWS = 50_000  # that judge, and that calibrate: more would add nothing to either
MAX_HELD_OUT_BYTES = 64 << 20  # of float32 values in each of these: they are held in memory
DISTINCT = 256  # a column of which float32 tells fewer values apart deserves a warning
NAMED = 3  # features that one note lists before it says "and N more"
PIXEL_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))


@dataclass(frozen=True)
class Table:
    """Rows in raw units, finite or, where there is no value, NaN."""

    x: RowStore  # [N, D], in memory or on disk
    shape: tuple[int, ...]  # of one row; its product is D
    names: list[str]  # D feature names
    units: list[str | None]  # D units, None where unknown
    labels: npt.NDArray[np.int64] | None  # [N] where the source has them; never trained on
    pixel_range: tuple[float, float] | None  # images only: raw values of black and of white
    source: str  # what the user wrote
    notes: list[str] = field(default_factory=list)  # what was handled and the user must know
    missing: npt.NDArray[np.int64] = field(kw_only=True)  # [D] how many rows have no value there
    label_names: list[str] | None = field(default=None, kw_only=True)  # what labels 0, 1, ... mean, if they have names

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the shape, the names and the values: equal tables, equal fingerprints."""
        digest = hashlib.sha256(json.dumps([self.shape, self.names]).encode())
        for _, rows in self.x.blocks():
            values = np.ascontiguousarray(rows, dtype="<f4")
            values[np.isnan(values)] = np.nan  # of the many bit patterns that say so, one
            digest.update(values.data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """Row indices, disjoint and in random order; together they are all rows. They cost 8 bytes a row of the table."""

    fit: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    calibration: npt.NDArray[np.int64]


def split_rows(n: int, seed: int, width: int = 1) -> Split:
    """Deal `n` rows out at random: 70 % fit, 10 % are held out, 20 % calibrate, each at least one.

    The latter two are held in memory, so each has at most MOST_ROWS rows and, at `width` float32 values a row,
    MOST_BYTES; the fit has the rest. The same arguments (`seed` from 0 to 2^32 - 1) give the same split. Raises
    DataError below MINIMUM_ROWS.
    """
    if n < MINIMUM_ROWS:
        raise DataError(f"expected at least {MINIMUM_ROWS} rows to train, judge and calibrate on, got {n}: add rows")
    order = np.random.RandomState(seed).permutation(n)  # the legacy stream is frozen, Generator's may change
    most = min(MAX_HELD_OUT_ROWS, max(MINIMUM_ROWS, MAX_HELD_OUT_BYTES // (4 * width)))
    held_out, calibration = min(round(0.1 * n), most), min(round(0.2 * n), most)
    return Split(
        fit=order[held_out + calibration :],
        held_out=order[:held_out],
        calibration=order[held_out : held_out + calibration],
    )


def read_table(
    source: str,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    limit: int = MEMORY_BYTES,
) -> Table:
    """The table behind `source`: "digits", the path of an .npy, .npz, .csv or .parquet file, or a folder of pictures.

    Arrays of three or more dimensions are images, one a row. Raises DataError, in one line that says what to do.

    Args:
        drop: columns to leave out.
        keep: columns that measure something though they look like identifiers.
        size: height and width that pictures in a folder are resized to.
        limit: bytes of float32 values that are held in memory; more stay on disk.
    """
    with full_disk_as_data_error(source):
        raw = load(source, ReadOptions(drop=drop, keep=keep, size=size))
    rows, census, marks = ingest(raw, source, limit)
    names = raw.names or _numbered(raw.shape)
    census.refuse_infinite(source, names, raw.first_line)
    _refuse_empty(source, names, census)
    labels, about_labels = _whole(marks)
    _refuse_equal(source, census)
    pixel_range = raw.pixel_range or (_pixel_range(raw.dtype, census) if len(raw.shape) > 1 else None)
    return Table(
        rows,
        raw.shape,
        names,
        raw.units or [None] * len(names),
        labels,
        pixel_range,
        source,
        [*raw.notes, *about_labels, *_notes(names, census)],
        missing=census.missing,
        label_names=raw.label_names,
    )


def read_for_model(source: str, manifest: "Manifest", limit: int = MEMORY_BYTES) -> Table:
    """The rows behind `source` as the model of `manifest` expects them.

    CSV and Parquet columns are found by name, in any order; others are left alone, but for a column label or y,
    which gives the labels. Pictures are resized to the model's shape. Values may be missing where some were when the
    model was trained. Raises DataError.
    """
    names = [feature.name for feature in manifest.features]
    units = [feature.unit for feature in manifest.features]
    shape = tuple(manifest.shape)
    with full_disk_as_data_error(source):
        raw = load(source, ReadOptions(names=names, shape=shape, pixel_range=manifest.pixel_range))
    width = math.prod(raw.shape)
    if width != len(names):
        raise DataError(
            f"{source} has rows of {width} numbers: expected {len(names)}, "
            f"since model {manifest.name!r} takes rows of shape {manifest.shape}"
        )
    for name, unit, here in zip(names, units, raw.units or units, strict=True):
        if unit and here and unit != here:
            raise DataError(f"{source}: column {name!r} is in {here}: expected {unit}; convert it")
    rows, census, marks = ingest(raw, source, limit)
    census.refuse_infinite(source, names, raw.first_line)
    allowed = np.array([feature.missing > 0 for feature in manifest.features])
    census.refuse_missing(source, names, raw.first_line, allowed)
    labels, about_labels = _whole(marks)
    return Table(
        rows,
        shape,
        names,
        units,
        labels,
        manifest.pixel_range,
        source,
        [*raw.notes, *about_labels],
        missing=census.missing,
        label_names=raw.label_names,
    )


def _whole(labels: npt.NDArray[Any] | None) -> tuple[npt.NDArray[np.int64] | None, list[str]]:
    """The labels, if they are whole numbers; else a note."""
    if labels is None:
        return None, []
    if labels.dtype.kind not in "iub" and not (labels.dtype.kind == "f" and np.array_equal(labels, np.rint(labels))):
        return None, [f"labels are ignored: expected whole numbers, got {labels.dtype}"]
    return labels.astype(np.int64), []


def _numbered(shape: tuple[int, ...]) -> list[str]:
    word = "x" if len(shape) == 1 else "pixel"
    return [f"{word}[{','.join(map(str, index))}]" for index in np.ndindex(shape)]


def _refuse_empty(source: str, names: Sequence[str], census: ColumnStatistics) -> None:
    empty = [name for name, missing in zip(names, census.missing, strict=True) if missing == census.rows]
    if empty:
        subject = f"column {empty[0]!r} has" if len(empty) == 1 else f"columns {join_names(empty, NAMED)} have"
        raise DataError(f"{source}: {subject} no value in any row: add {format_option('--drop', empty)}")


def _refuse_equal(source: str, census: ColumnStatistics) -> None:
    if census.rows > 1 and (census.low.astype(np.float32) == census.high.astype(np.float32)).all():
        but = " but for missing values" if census.missing.any() else ""
        raise DataError(f"{source}: all {census.rows} rows are the same{but}: expected rows that differ, to learn from")


def _notes(names: Sequence[str], census: ColumnStatistics) -> list[str]:
    notes = []
    low, high = census.low, census.high
    if counts := {name: int(count) for name, count in zip(names, census.missing, strict=True) if count}:
        most = sorted(counts, key=lambda name: -counts[name])
        where = join_names([f"{name} {counts[name]:,}" for name in most], NAMED)
        notes.append(
            f"{sum(counts.values()):,} missing values in {len(counts)} of {len(names)} columns ({where}): "
            "the training median stands in"
        )
        if sparse := [name for name in most if 2 * counts[name] > census.rows]:
            notes.append(
                f"more than half of the values are missing in {join_names(sparse, NAMED)}: "
                f"consider {format_option('--drop', sparse)}"
            )
    constant = [name for name, same in zip(names, low == high, strict=True) if same]
    if constant and census.rows > 1:
        notes.append(
            f"{len(constant)} of {len(names)} features never change and teach nothing: {join_names(constant, NAMED)}"
        )
    step = np.spacing(np.maximum(np.abs(low), np.abs(high)).astype(np.float32))
    if coarse := [name for name, few in zip(names, (low < high) & (high - low < DISTINCT * step), strict=True) if few]:
        notes.append(
            f"features too large for what they vary by, in float32; subtract a constant: {join_names(coarse, NAMED)}"
        )
    return notes


def _pixel_range(dtype: np.dtype[Any], census: ColumnStatistics) -> tuple[float, float]:
    """Black and white: a customary range where the values fill most of one, else the values' own."""
    if dtype == np.uint8:
        return 0.0, 255.0
    low, high = float(np.nanmin(census.low)), float(np.nanmax(census.high))
    for black, white in PIXEL_RANGES:
        if black <= low and (white + black) / 2 < high <= white:
            return black, white
    if low == high:
        return low, low + 1.0
    digits = 2 - math.floor(math.log10(high - low))
    return round(low, digits), round(high, digits)
