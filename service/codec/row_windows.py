"""Parse windows, which a model judges as a whole: a row and the rows before it, oldest first.

A window is sent as N lists of D numbers, or as one row of an array [B, N, D]. Rows that are not there, before the first
row of a group, are null (NaN in an array) in all values. They come first.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from service.codec.budget import NO_LIMIT, Budget
from service.codec.float32 import missing_mask
from service.codec.json_rows import JsonRows
from service.codec.row_arrays import parse_array, parse_valid_array_rows
from service.codec.row_errors import MISSING_VALUE_HINT
from service.codec.row_lists import parse_rows, parse_valid_rows
from service.codec.row_schema import Array, ParsedRows, RowError, RowSchema
from service.errors import InvalidRows


class WindowSchema:
    """The schema of a window.

    Args:
        rows: N, the number of rows.
        row: the schema of each row, of D numbers.
    """

    def __init__(self, rows: int, row: RowSchema) -> None:
        self.rows = rows
        self.row = row
        self.width = rows * row.width
        self.flat = RowSchema((rows, row.width), optional=(True,) * self.width)
        self.flat.description = (
            f"a window of {rows} rows of {row.width} numbers, oldest first, with null in rows that are not there"
        )
        self._required = ~np.array(row.optional)  # [D]

    def fault(self, window: Array) -> InvalidRows | None:
        """Return the error for a window [N, D] with missing values that may not be missing; None if there are none."""
        missing = np.isnan(window)
        absent = np.asarray(missing.all(axis=1))  # [N]
        if absent[-1]:
            return _fault(f"/{self.rows - 1}", "the newest row of the window has no value")
        present = np.flatnonzero(~absent)
        first = int(present[0])
        if len(present) < self.rows - first:
            place = first + int(np.argmax(absent[first:]))
            return _fault(f"/{place}", f"row {place} of the window has no value, but an earlier row has")
        bad = np.argwhere(missing[first:] & self._required)
        if len(bad):
            place, column = first + int(bad[0, 0]), int(bad[0, 1])
            name = self.row.names[column]
            return _fault(f"/{place}/{column}", f"{name!r} has no value in row {place} of the window")
        return None


def _fault(pointer: str, detail: str) -> InvalidRows:
    expected = "numbers; rows that are not there come first, with null in all values"
    return InvalidRows(detail, pointer=pointer, expected=expected, got="null", hint=MISSING_VALUE_HINT)


def are_windows(rows: Any) -> bool:
    """Return whether `rows`, an array or a JSON value, are windows and not rows: lists of lists of lists."""
    if isinstance(rows, np.ndarray):
        return rows.ndim == 3
    first = next(iter(rows), None) if isinstance(rows, list | JsonRows) else None
    return type(first) is list and bool(first) and type(first[0]) is list


def parse_windows(
    schema: WindowSchema, rows: Any, pointer: str, may_contain_non_floats: bool, budget: Budget = NO_LIMIT
) -> Array:
    """Return windows [B, N, D], with NaN for missing values. For the arguments, see `parse_rows`.

    Raises:
        InvalidRows: `rows` are not windows, or a window is invalid. The error points to the first invalid window.
    """
    if not are_windows(rows):
        raise _not_windows(schema, rows, pointer)
    if isinstance(rows, np.ndarray):
        x = parse_array(schema.flat, rows, pointer)
    else:
        x = parse_rows(schema.flat, rows, pointer, may_contain_non_floats, budget)
    windows = x.reshape(len(x), schema.rows, -1)
    for index in _incomplete(windows):
        if error := schema.fault(windows[index]):
            error.pointer = f"{pointer}/{index}{error.pointer}"
            raise error
    return windows


def parse_window(schema: WindowSchema, window: Any, pointer: str, may_contain_non_floats: bool) -> Array:
    """Return a single window as [1, N, D]. Raises InvalidRows."""
    try:
        return parse_windows(schema, [window], pointer, may_contain_non_floats)
    except InvalidRows as error:
        error.pointer = f"{pointer}{(error.pointer or pointer).removeprefix(pointer).removeprefix('/0')}"
        raise


def parse_valid_windows(
    schema: WindowSchema, rows: Any, pointer: str, may_contain_non_floats: bool, budget: Budget = NO_LIMIT
) -> tuple[ParsedRows, Array]:
    """Return the newest rows of the valid windows, an error for each invalid window, and the windows [G, N, D].

    For the arguments, see `parse_valid_rows`.

    Raises:
        InvalidRows: no window is valid.
    """
    if isinstance(rows, np.ndarray):
        parsed = parse_valid_array_rows(schema.flat, rows, pointer, budget)
    else:
        parsed = parse_valid_rows(schema.flat, rows, pointer, may_contain_non_floats, budget)
    windows = parsed.x.reshape(len(parsed.x), schema.rows, -1)
    valid = np.ones(len(windows), bool)
    errors = list(parsed.errors)
    for index in _incomplete(windows):
        if error := schema.fault(windows[index]):
            error.pointer = f"{pointer}/{parsed.rows[index]}{error.pointer}"
            budget.take_bytes(error.text_length)
            errors.append(RowError(parsed.rows[index], error))
            valid[index] = False
    if not valid.any():
        raise min(errors, key=lambda failed: failed.row).error
    if not valid.all():
        windows = windows[valid]
    newest = np.ascontiguousarray(windows[:, -1])
    numbers = [row for row, is_valid in zip(parsed.rows, valid.tolist(), strict=True) if is_valid]
    errors.sort(key=lambda failed: failed.row)
    return ParsedRows(newest, numbers, errors, missing_mask(newest)), windows


def count_rows(windows: Array) -> npt.NDArray[np.int64]:
    """Return how many rows are there in each of the windows [B, N, D], [B]."""
    return np.asarray((~np.isnan(windows).all(axis=2)).sum(axis=1))


def count_missing(windows: Array) -> int:
    """Return how many values are missing in the rows that are there."""
    missing = np.isnan(windows)
    absent = np.asarray(missing.all(axis=2))
    return int(missing.sum()) - int(absent.sum()) * int(windows.shape[2])


def _incomplete(windows: Array) -> list[int]:
    """Return which of the windows [B, N, D] lack values."""
    found: list[int] = np.flatnonzero(np.isnan(windows).any(axis=(1, 2))).tolist()
    return found


def _not_windows(schema: WindowSchema, rows: Any, pointer: str) -> InvalidRows:
    expected = f"a list of windows, each {schema.flat.description}: [B, {schema.rows}, {schema.row.width}]"
    got = str(list(rows.shape)) if isinstance(rows, np.ndarray) else "rows"
    return InvalidRows(
        f"this model takes each row together with the {schema.rows - 1} rows before it: expected {expected}, got {got}",
        pointer=pointer,
        expected=expected,
        got=got,
        hint="send windows; for rows that are not there, send null in all values, first. POST /anomaly also takes "
        "records with times, and joins each row to the past of its group",
    )
