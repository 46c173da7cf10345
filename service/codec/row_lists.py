"""Parse rows that JSON provides as lists of numbers into float32 arrays.

On the fast path, `struct` packs a list of Python floats straight into a float32 buffer, which costs 15 ns per number.
`struct` refuses strings, null, nested lists, a wrong number of values, and numbers that overflow. A row that `struct`
refuses takes the slow path, which flattens nested lists, replaces null by NaN where a value may be missing, and finds
the first invalid value.

`struct` accepts NaN, infinity, and also true and false, which are integers in Python. Body readers set
`may_contain_non_floats` if a body may contain any of these four values. Rows are checked for the four values only if
`may_contain_non_floats` is set.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from service.codec.budget import NO_LIMIT, Budget
from service.codec.float32 import missing_mask
from service.codec.json_rows import JsonRows
from service.codec.json_values import describe_value
from service.codec.row_errors import (
    PACKING_ERRORS,
    all_values_missing,
    first_bad_value,
    refuse_single_row,
    wrong_shape,
)
from service.codec.row_schema import Array, ParsedRows, RowError, RowSchema
from service.errors import InvalidRows


class RowPacker:
    """A float32 buffer to which rows are appended.

    Args:
        width: the number of values per row.
        may_contain_non_floats: whether values may be true, false, NaN or infinite.

    Attributes:
        row_bytes: the memory for one row, in bytes.
    """

    __slots__ = ("_buffer", "_may_contain_non_floats", "_row_count", "_width", "row_bytes")

    def __init__(self, width: int, may_contain_non_floats: bool) -> None:
        self.row_bytes = 4 * width
        self._width = width
        self._may_contain_non_floats = may_contain_non_floats
        self._buffer = bytearray()  # grows with each valid row, so that invalid rows take no memory here
        self._row_count = 0

    def append(self, row: Any, schema: RowSchema, keys: Sequence[str] = ()) -> None:
        """Append `row`. If it is invalid, append nothing and raise InvalidRows with a pointer relative to the row.

        Args:
            row: a flat or nested list.
            schema: the schema that the row must follow.
            keys: the names of the values, if the row was sent as an object.
        """
        try:
            packed = schema.packer.pack(*row)
        except PACKING_ERRORS:
            values = schema.flatten(row)
            if values is None:
                raise wrong_shape(schema, row) from None
            present = [value for value in values if value is not None] if schema.allows_missing else values
            if not present:
                raise all_values_missing() from None
            try:
                packed = schema.packer.pack(*_null_to_nan(values, schema))
            except PACKING_ERRORS:
                raise first_bad_value(schema, values, row, keys) from None
        else:
            values = present = row
        if self._may_contain_non_floats and (
            not all(map(math.isfinite, present))
            or (bool in set(map(type, present)) and not _are_allowed_booleans(schema, values))
        ):
            raise first_bad_value(schema, values, row, keys)
        self._buffer += packed
        self._row_count += 1

    def rows(self) -> Array:
        """Return the appended rows [N, D], without a copy."""
        count = self._row_count
        return np.frombuffer(self._buffer, np.float32, count * self._width).reshape(count, self._width)


def _are_allowed_booleans(schema: RowSchema, values: Sequence[Any]) -> bool:
    """Return whether all booleans among `values` [D] are values of features that are 0 or 1 in the training data."""
    return bool(schema.booleans) and all(
        type(value) is not bool or is_boolean for value, is_boolean in zip(values, schema.booleans, strict=True)
    )


def parse_rows(
    schema: RowSchema, rows: Any, pointer: str, may_contain_non_floats: bool, budget: Budget = NO_LIMIT
) -> Array:
    """Return all rows of `rows` as an array [N, D].

    Args:
        schema: the schema of each row.
        rows: a JSON value, which should be a list of rows.
        pointer: the JSON pointer to `rows`.
        may_contain_non_floats: whether values may be true, false, NaN or infinite.
        budget: counts the rows and their memory.

    Raises:
        InvalidRows: `rows` is not a list of rows, or a row is invalid. The error points to the first invalid row.
    """
    require_rows(schema, rows, pointer)
    packer = RowPacker(schema.width, may_contain_non_floats)
    counted = 0  # rows that `budget` has counted
    for index, row in enumerate(rows):
        if index >= counted:
            counted += budget.take_next_rows(packer.row_bytes)
        try:
            packer.append(row, schema)
        except InvalidRows as error:
            if index == 0 and (type(rows) is list or rows.text_length <= budget.max_row_bytes):
                refuse_single_row(schema, list(rows), pointer)
            error.pointer = f"{pointer}/{index}{error.pointer}"
            raise error
    return packer.rows()


def parse_row(schema: RowSchema, row: Any, pointer: str, may_contain_non_floats: bool) -> Array:
    """Return a single row as [1, D]; the arguments are those of `parse_rows`. Raises InvalidRows."""
    packer = RowPacker(schema.width, may_contain_non_floats)
    try:
        packer.append(row, schema)
    except InvalidRows as error:
        error.pointer = f"{pointer}{error.pointer}"
        raise
    return packer.rows()


def parse_valid_rows(
    schema: RowSchema, rows: Any, pointer: str, may_contain_non_floats: bool, budget: Budget = NO_LIMIT
) -> ParsedRows:
    """Return the valid rows of `rows`, and an error for each invalid row; the arguments are those of `parse_rows`.

    Raises:
        InvalidRows: `rows` is not a list of rows, or no row is valid.
    """
    require_rows(schema, rows, pointer)
    packer = RowPacker(schema.width, may_contain_non_floats)
    return append_valid_rows(packer, rows, pointer, lambda row: packer.append(row, schema), budget=budget)


def append_valid_rows(
    packer: RowPacker,
    rows: Iterable[Any],
    pointer: str,
    append: Callable[[Any], None],
    minimum: int = 1,
    budget: Budget = NO_LIMIT,
) -> ParsedRows:
    """Call `append` with each row of `rows`. Return the valid rows, and an error for each invalid row.

    `append` appends a valid row to `packer`, and raises InvalidRows for an invalid row. If fewer than `minimum` rows
    are valid, this function raises the error of the first invalid row. `budget` counts the rows and their memory.
    """
    valid: list[int] = []
    errors: list[RowError] = []
    counted = 0  # rows that `budget` has counted
    for index, row in enumerate(rows):
        if index >= counted:
            counted += budget.take_next_rows(packer.row_bytes)
        try:
            append(row)
            valid.append(index)
        except InvalidRows as error:
            error.pointer = f"{pointer}/{index}{error.pointer}"
            budget.take_bytes(error.text_length)
            errors.append(RowError(index, error.without_frames()))
    if len(valid) < minimum:
        first = errors[:1]
        errors.clear()
        raise first.pop().error  # not kept in a variable: the error's traceback would keep the body in memory
    x = packer.rows()
    return ParsedRows(x, valid, errors, missing_mask(x))


def require_rows(schema: RowSchema, rows: Any, pointer: str) -> None:
    """Raise InvalidRows unless `rows` is a list of at least one row."""
    if isinstance(rows, JsonRows):
        return
    if type(rows) is not list:
        got = describe_value(rows)
        raise InvalidRows(f"expected a list of rows, got {got}", pointer=pointer, expected="a list of rows", got=got)
    if not rows:
        raise InvalidRows("there are no rows", pointer=pointer, expected="at least one row", got="an empty list")
    if type(rows[0]) in (int, float):
        refuse_single_row(schema, rows, pointer)


def _null_to_nan(values: list[Any], schema: RowSchema) -> list[Any]:
    """Return `values` with NaN in place of null wherever the schema allows a missing value."""
    if not schema.allows_missing:
        return values
    pairs = zip(values, schema.optional, strict=True)
    return [math.nan if value is None and optional else value for value, optional in pairs]
