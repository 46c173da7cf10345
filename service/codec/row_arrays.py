"""Parse rows that npy, safetensors or the fast JSON reader provide as one array."""

from typing import Any

import numpy as np
import numpy.typing as npt

from service.codec.budget import NO_LIMIT, ROW_BYTES, Budget
from service.codec.float32 import as_float32, missing_mask
from service.codec.row_errors import first_bad_array_value
from service.codec.row_schema import Array, ParsedRows, RowError, RowSchema
from service.errors import InvalidRows


def parse_array(schema: RowSchema, array: npt.NDArray[Any], pointer: str) -> Array:
    """Return an array of real numbers, [N, D] or [N, *shape], as float32 [N, D].

    The result shares memory with `array` if `array` is aligned float32 in C order.

    Raises:
        InvalidRows: the shape is wrong, or a value is infinite, or a value is NaN where no value may be missing. The
            error points to the first invalid value.
    """
    x, finite = _to_float32(schema, array, pointer)
    if finite:
        return x
    bad = _bad_values(schema, x)
    if bad.any():
        raise _row_error(schema, array, bad, int(np.flatnonzero(bad.any(axis=1))[0]), pointer)
    return x


def parse_valid_array_rows(
    schema: RowSchema, array: npt.NDArray[Any], pointer: str, budget: Budget = NO_LIMIT
) -> ParsedRows:
    """Return the valid rows of an array, [N, D] or [N, *shape], and an error for each invalid row.

    Raises:
        InvalidRows: the shape is wrong, or no row is valid.
        BodyTooLarge, Overloaded, DeadlineExceeded: see `Budget`.
    """
    x, finite = _to_float32(schema, array, pointer)
    if finite:
        return ParsedRows(x, list(range(len(x))), [], None)
    bad = _bad_values(schema, x)
    valid = ~bad.any(axis=1)
    if valid.all():
        return ParsedRows(x, list(range(len(x))), [], missing_mask(x))
    invalid = np.flatnonzero(~valid).tolist()
    if len(invalid) == len(x):
        raise _row_error(schema, array, bad, 0, pointer)
    errors = []
    for row in invalid:
        budget.take_bytes(ROW_BYTES)
        budget.check_time()
        errors.append(RowError(row, _row_error(schema, array, bad, row, pointer)))
    return ParsedRows(x[valid], np.flatnonzero(valid).tolist(), errors, missing_mask(x[valid]))


def _to_float32(schema: RowSchema, array: npt.NDArray[Any], pointer: str) -> tuple[Array, bool]:
    """Return `array` as float32 [N, D], and whether every value is finite. Raises InvalidRows if the shape is wrong."""
    if array.shape[1:] not in ((schema.width,), schema.shape) or not len(array):
        row_shapes = dict.fromkeys(((schema.width,), schema.shape))
        expected = " or ".join(f"[N, {', '.join(map(str, shape))}]" for shape in row_shapes)
        is_single_row = array.shape in row_shapes
        raise InvalidRows(
            f"expected an array {expected}, got {list(array.shape)}",
            pointer=pointer,
            expected=f"{expected} with N >= 1",
            got=str(list(array.shape)),
            hint="send one row as x[None]" if is_single_row else None,
        )
    x, finite = as_float32(array.reshape(len(array), schema.width))
    return x if x.flags.aligned else x.copy(), finite


def _bad_values(schema: RowSchema, x: Array) -> npt.NDArray[np.bool_]:
    """Return a mask [N, D] of the invalid values of x [N, D]: infinity, and NaN where no value may be missing.

    In a row without any value, all values are invalid.
    """
    bad = ~np.isfinite(x)
    if schema.allows_missing and bad.any():
        missing = np.isnan(x)
        bad &= ~(missing & np.array(schema.optional))
        bad[missing.all(axis=1)] = True
    return bad


def _row_error(
    schema: RowSchema, array: npt.NDArray[Any], bad: npt.NDArray[np.bool_], row: int, pointer: str
) -> InvalidRows:
    """Return the error for row number `row` of an array; `bad` [N, D] marks the invalid values."""
    error = first_bad_array_value(schema, array[row], bad[row])
    error.pointer = f"{pointer}/{row}{error.pointer}"
    return error
