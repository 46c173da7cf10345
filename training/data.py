"""The table that every model is trained on: finite float32 rows in raw units, with the names of their features.

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

from training.readers import DataError, Raw, load, place

if TYPE_CHECKING:
    from models.manifest import Manifest

__all__ = ["MINIMUM_ROWS", "DataError", "Split", "Table", "read", "read_like", "split"]

MINIMUM_ROWS = 10  # fewer leave no row to calibrate on, or none to judge by
DISTINCT = 256  # a column of which float32 tells fewer values apart deserves a warning
NAMED = 3  # features that one note lists before it says "and N more"
PIXEL_RANGES = ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0))


@dataclass(frozen=True)
class Table:
    """Rows in raw units, all finite."""

    x: npt.NDArray[np.float32]  # [N, D]
    shape: tuple[int, ...]  # of one row; its product is D
    names: list[str]  # D feature names
    units: list[str | None]  # D units, None where unknown
    labels: npt.NDArray[np.int64] | None  # [N] where the source has them; never trained on
    pixel_range: tuple[float, float] | None  # images only: raw values of black and of white
    source: str  # what the user wrote
    notes: list[str] = field(default_factory=list)  # what was handled and the user must know

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the shape, the names and the values: equal tables, equal fingerprints."""
        digest = hashlib.sha256(json.dumps([self.shape, self.names]).encode())
        digest.update(np.ascontiguousarray(self.x, dtype="<f4").data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """Row indices, disjoint and in random order; together they are all rows."""

    fit: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    calibration: npt.NDArray[np.int64]


def split(n: int, seed: int) -> Split:
    """Deal `n` rows out at random: 70 % fit, 10 % are held out, 20 % calibrate, each at least one.

    The same `n` and `seed` (0 to 2^32 - 1) give the same split. Raises DataError below MINIMUM_ROWS.
    """
    if n < MINIMUM_ROWS:
        raise DataError(f"expected at least {MINIMUM_ROWS} rows to train, judge and calibrate on, got {n}: add rows")
    order = np.random.RandomState(seed).permutation(n)  # the legacy stream is frozen, Generator's may change
    held_out, calibration = round(0.1 * n), round(0.2 * n)
    return Split(
        fit=order[held_out + calibration :],
        held_out=order[:held_out],
        calibration=order[held_out : held_out + calibration],
    )


def read(source: str) -> Table:
    """The table behind `source`: "digits", or the path of an .npy, .npz, .csv or .parquet file.

    Arrays of three or more dimensions are images, one a row. Raises DataError, in one line that says what to do.
    """
    raw = load(source)
    _require_rows(raw, source)
    shape = raw.values.shape[1:]
    names = raw.names or _numbered(shape)
    x, notes = _checked(raw, names, source)
    if len(x) > 1 and (x == x[0]).all():
        raise DataError(f"{source}: all {len(x)} rows are the same: expected rows that differ, to learn from")
    pixel_range = raw.pixel_range or (_pixel_range(raw.values) if len(shape) > 1 else None)
    return Table(x, shape, names, raw.units or [None] * len(names), _whole(raw.labels), pixel_range, source, notes)


def read_like(source: str, manifest: "Manifest") -> Table:
    """The rows behind `source` as the model of `manifest` expects them.

    CSV and Parquet columns are found by name, in any order; others are left alone, but for a column label or y,
    which gives the labels. Raises DataError.
    """
    names = [feature.name for feature in manifest.features]
    units = [feature.unit for feature in manifest.features]
    raw = load(source, names)
    _require_rows(raw, source)
    width = math.prod(raw.values.shape[1:])
    if width != len(names):
        raise DataError(
            f"{source} has rows of {width} numbers: expected {len(names)}, "
            f"since model {manifest.name!r} takes rows of shape {manifest.shape}"
        )
    for name, unit, here in zip(names, units, raw.units or units, strict=True):
        if unit and here and unit != here:
            raise DataError(f"{source}: column {name!r} is in {here}: expected {unit}; convert it")
    x, _ = _checked(raw, names, source)
    shape = tuple(manifest.shape)
    return Table(x, shape, names, units, _whole(raw.labels), manifest.pixel_range, source, raw.notes)


def _require_rows(raw: Raw, source: str) -> None:
    kind, shape = raw.values.dtype, raw.values.shape
    if kind.kind not in "iuf":
        advice = "convert them with x.astype('float32')"
        raise DataError(f"{source}: expected an array of real numbers, got {kind}: {advice}")
    if len(shape) < 2:
        raise DataError(f"{source}: expected rows of features, [N, D], got shape {list(shape)}: reshape the array")
    if 0 in shape:
        raise DataError(f"{source} has no rows of numbers (shape {list(shape)}): expected at least one")


def _whole(labels: npt.NDArray[Any] | None) -> npt.NDArray[np.int64] | None:
    return None if labels is None else labels.astype(np.int64)


def _numbered(shape: tuple[int, ...]) -> list[str]:
    word = "x" if len(shape) == 1 else "pixel"
    return [f"{word}[{','.join(map(str, index))}]" for index in np.ndindex(shape)]


def _checked(raw: Raw, names: Sequence[str], source: str) -> tuple[npt.NDArray[np.float32], list[str]]:
    """float32 [N, D], and notes. Raises DataError where a value is no finite float32."""
    rows = raw.values.reshape(len(raw.values), -1)
    with np.errstate(over="ignore"):
        x = rows.astype(np.float32)
    if not np.isfinite(x).all():
        raise DataError(f"{source}: {_first_bad(rows, x, names, raw.first_line)}")
    low, high = (bound.astype(np.float64) for bound in (rows.min(axis=0), rows.max(axis=0)))
    notes = list(raw.notes)
    constant = [name for name, same in zip(names, low == high, strict=True) if same]
    if constant and len(x) > 1:
        notes.append(f"{len(constant)} of {len(names)} features never change and teach nothing: {_some(constant)}")
    step = np.spacing(np.maximum(np.abs(low), np.abs(high)).astype(np.float32))
    if coarse := [name for name, few in zip(names, (low < high) & (high - low < DISTINCT * step), strict=True) if few]:
        notes.append(f"features too large for what they vary by, in float32; subtract a constant: {_some(coarse)}")
    return x, notes


def _first_bad(rows: npt.NDArray[Any], x: npt.NDArray[np.float32], names: Sequence[str], first_line: int | None) -> str:
    column = int(np.argmin(np.isfinite(x).all(axis=0)))
    bad = ~np.isfinite(x[:, column])
    row, count = int(np.argmax(bad)), int(bad.sum())
    value = rows[row, column]
    what = "no value (NaN)" if np.isnan(value) else f"the value {value}"
    limit = " (float32 ends at 3.4e38)" if np.isfinite(value) else ""
    more = f" and in {count - 1} more" if count > 1 else ""
    return (
        f"column {names[column]!r} has {what}{limit} in {place(row, first_line)}{more}: "
        "expected finite numbers; fill them in, or drop those rows or the column"
    )


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:NAMED])
    return listed if len(names) <= NAMED else f"{listed} and {len(names) - NAMED} more"


def _pixel_range(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Black and white: a customary range where the values fill most of one, else the values' own."""
    if values.dtype == np.uint8:
        return 0.0, 255.0
    low, high = float(values.min()), float(values.max())
    for black, white in PIXEL_RANGES:
        if black <= low and (white + black) / 2 < high <= white:
            return black, white
    if low == high:
        return low, low + 1.0
    digits = 2 - math.floor(math.log10(high - low))
    return round(low, digits), round(high, digits)
