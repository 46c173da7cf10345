"""Prepare the user's rows for an adopted model: check them, and split them for calibration and statistics."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.errors import join_names
from training.adoption.arguments import argument, by_interface, setting
from training.data.layout import recognise
from training.data.row_store import Floats, RowStore
from training.data.table import Split, Table, guess_pixel_range, most_kept_rows, numbered_names
from training.errors import AdoptionError
from training.fitting.prepared_data import PreparedData, prepare_data

MIN_CALIBRATION_ROWS = 19  # with fewer, no p-value can be as small as 0.05
MIN_HELD_OUT_ROWS = 10  # rows for the statistics of the score
CALIBRATION_SHARE = 2 / 3  # of the calibration rows; the others are for the statistics of the score
SHARE_WITHOUT_FIT_ROWS = 1 / 2  # the same, if there are no fit rows
HELD_OUT_SHARE = 1 / 3  # of the rows for statistics, if there are no fit rows


def prepare_rows(
    calibration_rows: Any,
    fit_rows: Any,
    *,
    shape: tuple[int, ...] | None,
    feature_names: Sequence[str] | None,
    images: bool | None,
    source: str,
    seed: int,
) -> tuple[PreparedData, tuple[int, ...]]:
    """Return the rows, split for calibration and for statistics, and the shape in which a row was given.

    Args:
        calibration_rows: normal rows that did not train the network, [N, D] or [N, ...].
        fit_rows: rows that may have trained the network; None if there are none.
        shape: the shape of one row; None to take it from the array.
        feature_names: D names, or as many as the last dimension of `shape` has places.
        images: whether the rows are images; None to recognise it.
        source: where the rows come from, for the manifest.
        seed: seed of the split.

    Raises:
        AdoptionError: the rows do not have the same shape, are not finite, or are too few.
    """
    rows, given = _as_rows(calibration_rows, "calibration_rows", shape)
    fit = rows[:0] if fit_rows is None else _as_rows(fit_rows, "fit_rows", given)[0]
    if fit.shape[1] != rows.shape[1]:
        raise AdoptionError(
            f"{argument('fit_rows')} have {fit.shape[1]} values each, and {argument('calibration_rows')} "
            f"{rows.shape[1]}: expected the same number"
        )
    x = np.concatenate((fit, rows))
    kept, pixel_range, note = _layout(given, x, images)
    table = Table(
        x=RowStore(x),
        shape=kept,
        names=_names(feature_names, kept, x.shape[1], is_image=pixel_range is not None),
        units=[None] * x.shape[1],
        labels=None,
        pixel_range=pixel_range,
        source=source,
        notes=note,
        missing=np.zeros(x.shape[1], np.int64),
    )
    split, notes = _split(table, len(fit), seed)
    return prepare_data(replace(table, notes=[*table.notes, *notes]), split), given


def _as_rows(values: Any, name: str, shape: tuple[int, ...] | None) -> tuple[Floats, tuple[int, ...]]:
    """Return the rows [N, D] of the argument `name` as float32, and the shape of one row."""
    name = argument(name)
    detach = getattr(values, "detach", None)
    array = np.asarray(values if detach is None else detach().cpu().numpy())
    if array.dtype.kind not in "fiub":
        raise AdoptionError(f"{name} have values of the type {array.dtype}: expected numbers")
    if array.ndim < 2 or not len(array):
        raise AdoptionError(f"{name} have the shape {list(array.shape)}: expected [N, D] or [N, ...], N rows")
    width = math.prod(array.shape[1:])
    if shape is not None and math.prod(shape) != width:
        raise AdoptionError(
            f"{name} have rows of the shape {list(array.shape[1:])}, which are {width} values, and "
            f"{setting('shape', list(shape))} has {math.prod(shape)}: give the shape of one row"
        )
    rows = np.ascontiguousarray(array.reshape(len(array), width), np.float32)
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        what = "NaN" if np.isnan(rows[row, column]) else "infinite"
        raise AdoptionError(
            f"{name}[{row}] has a value that is {what} (value {column} of the row), and so have "
            f"{int((~finite.all(axis=1)).sum())} rows: leave them out, or fill in the missing values"
        )
    return rows, tuple(array.shape[1:]) if shape is None else shape


def _layout(
    shape: tuple[int, ...], x: Floats, images: bool | None
) -> tuple[tuple[int, ...], tuple[float, float] | None, list[str]]:
    """Return the shape that the artifact has, the values of black and white if the rows are images, and notes."""
    kept = tuple(size for size in shape if size > 1) if len(shape) == 3 else shape
    if len(kept) not in (2, 3) or images is False:
        return kept if images is not False else shape, None, []
    low, high = x.min(axis=0).astype(np.float64), x.max(axis=0).astype(np.float64)
    layout = recognise(kept, x.dtype, low, high)
    text = " x ".join(map(str, kept))
    if images is None and layout != "nhwc":
        return (
            kept,
            None,
            [
                f"each row is read as {text} measurements"
                + by_interface("; if the rows are images, give images=True", "")
            ],
        )
    black, white = guess_pixel_range(x.dtype, low, high)
    return (
        kept,
        (black, white),
        [
            f"each row is read as an image of {text} pixels from {black:g} to {white:g}"
            + by_interface("; if it is none, give images=False", "")
        ],
    )


def _names(given: Sequence[str] | None, shape: tuple[int, ...], width: int, *, is_image: bool) -> list[str]:
    if given is None:
        return numbered_names(shape, "pixel" if is_image else "x")
    names = [str(name) for name in given]
    if len(names) == shape[-1] and len(shape) > 1:  # the columns of a window: one name for each of its rows
        names = [f"{name}[{','.join(map(str, place))}]" for place in np.ndindex(shape[:-1]) for name in names]
    if len(names) != width:
        raise AdoptionError(
            f"{argument('feature_names')} has {len(names)} names: expected {width}, one for each value of a row"
            + (f", or {shape[-1]}, one for each column" if len(shape) > 1 else "")
        )
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < width else []
    if twice:
        raise AdoptionError(
            f"{argument('feature_names')} has names twice: {join_names(twice)}; give each feature a name of its own"
        )
    if not all(name and name.isprintable() for name in names):
        raise AdoptionError(
            f"{argument('feature_names')} has an empty name, or one with characters that do not print: rename it"
        )
    return names


def _split(table: Table, fit_rows: int, seed: int) -> tuple[Split, list[str]]:
    """Return the split of the rows, of which the first `fit_rows` are fit rows, and notes.

    A row that equals a fit row, or another calibration row, calibrates nothing.
    """
    groups = table.copies.groups
    first = np.zeros(len(groups), bool)
    first[np.unique(groups, return_index=True)[1]] = True  # the first row of each group of equal rows
    own = np.flatnonzero(first[fit_rows:]) + fit_rows
    dropped = len(groups) - fit_rows - len(own)
    has_fit_rows = fit_rows > 0
    share = CALIBRATION_SHARE if has_fit_rows else SHARE_WITHOUT_FIT_ROWS
    needed = _rows_needed(share, 1 if has_fit_rows else HELD_OUT_SHARE)
    if len(own) < needed:
        why = f" ({dropped} more equal other rows{' or fit rows' if has_fit_rows else ''})" if dropped else ""
        raise AdoptionError(
            f"{argument('calibration_rows')} has {len(own)} distinct rows{why}: expected at least {needed}, so that "
            f"{MIN_CALIBRATION_ROWS} calibrate the score and the others give its statistics"
            + ("" if has_fit_rows else f"; or give the rows that trained the network as {setting('fit_rows')}")
        )
    order = own[np.random.RandomState(seed).permutation(len(own))]
    most = most_kept_rows(table.x.width)
    calibration = min(math.ceil(share * len(own)), most)
    calibrating, others = order[:calibration], order[calibration:]
    notes = [f"{dropped} calibration rows equal other rows and are left out"] if dropped else []
    if has_fit_rows:
        fit: npt.NDArray[np.int64] = np.random.RandomState(seed).permutation(fit_rows)
        return Split(fit=fit, held_out=others[:most], calibration=calibrating), notes
    held_out = min(math.ceil(HELD_OUT_SHARE * len(others)), most)
    return Split(fit=others[held_out:], held_out=others[:held_out], calibration=calibrating), notes


def _rows_needed(share: float, of_others: float) -> int:
    """Return the smallest number of rows that gives MIN_CALIBRATION_ROWS and MIN_HELD_OUT_ROWS.

    Args:
        share: share of the rows that calibrate.
        of_others: share of the other rows that are held out.
    """
    count = MIN_CALIBRATION_ROWS
    while (
        math.ceil(share * count) < MIN_CALIBRATION_ROWS
        or math.ceil(of_others * (count - math.ceil(share * count))) < MIN_HELD_OUT_ROWS
    ):
        count += 1
    return count
