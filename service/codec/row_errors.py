"""Errors for invalid rows. Each error points to the first invalid value and states what was expected.

Functions that receive one row return pointers relative to that row. Their callers prepend the pointer to the row.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.codec.json_values import describe_value
from service.codec.row_schema import RowSchema, flatten
from service.errors import InvalidRows, escape

PACKING_ERRORS = (struct.error, TypeError, OverflowError)  # raised by `struct` for a row that it refuses
MISSING_VALUE_HINT = (
    "send null (NaN in npy) for a missing value; only features with missing > 0 in GET /models/{name} may lack one"
)
TIME_FORMATS = "Unix time in s, ms, us or ns, or ISO 8601"


@dataclass(frozen=True)
class MalformedRow:
    """The entry in a list of rows for a row that could not be read.

    `pointer` is relative to the row. For `is_partial`, see `InvalidRows`.
    """

    detail: str
    expected: str
    got: str
    pointer: str = ""
    hint: str | None = None
    is_partial: bool = False

    @classmethod
    def of(cls, error: InvalidRows) -> "MalformedRow":
        """Return the entry for a row that failed with `error`."""
        expected, got, pointer = error.expected or "", error.got or "", error.pointer or ""
        return cls(error.detail, expected, got, pointer, error.hint, error.is_partial)

    def error(self) -> InvalidRows:
        """Return the error to raise for the row."""
        error = InvalidRows(self.detail, pointer=self.pointer, expected=self.expected, got=self.got, hint=self.hint)
        error.is_partial = self.is_partial
        return error


def refuse_single_row(schema: RowSchema, rows: Any, pointer: str) -> None:
    """Raise InvalidRows if `rows` is one row rather than a list of rows."""
    values = schema.flatten(rows)
    if values is None or not all(type(value) in (int, float) for value in values):
        return
    raise InvalidRows(
        "expected a list of rows, got one row",
        pointer=pointer,
        expected=f"a list of rows, each {schema.description}",
        got="one row",
        hint="put the row into a list: [[...]]",
    )


def wrong_shape(schema: RowSchema, row: Any) -> InvalidRows:
    """Return the error for a row that is neither a flat list of D values nor nested as the schema requires."""
    pointer, part = _first_wrong_part(row, schema.shape_of(row), "")
    got = describe_value(part)
    return InvalidRows(
        f"expected {schema.description}, got {got}", pointer=pointer, expected=schema.description, got=got
    )


def not_a_timestamp(key: str, value: Any) -> InvalidRows:
    """Return the error for a row whose time, the value of `key`, cannot be read."""
    got = describe_value(value)
    return InvalidRows(
        f"{key} is not a timestamp: expected {TIME_FORMATS}, got {got}",
        pointer=f"/{escape(key)}",
        expected=TIME_FORMATS,
        got=got,
        hint="send null, or leave the key out, if the row has no time",
    )


def all_values_missing() -> InvalidRows:
    """Return the error for a row in which every value is missing."""
    return InvalidRows("every value of the row is missing", pointer="", expected="at least one number", got="none")


def first_bad_value(schema: RowSchema, values: list[Any], row: Any, keys: Sequence[str] = ()) -> InvalidRows:
    """Return the error for the first value of a row that is neither a finite float32 number nor an allowed null.

    Args:
        schema: the schema of the row.
        values: the D values, flat.
        row: the row as it was sent, flat or nested. Its nesting determines the pointer to the value.
        keys: the names of the values, if the row was sent as an object.
    """
    index = next(
        index
        for index, value in enumerate(values)
        if not (_fits_float32(value) or (value is None and schema.optional[index]) or _is_allowed(schema, index, value))
    )
    value = values[index]
    place = escape(keys[index]) if keys else "/".join(map(str, np.unravel_index(index, schema.shape_of(row))))
    if type(value) in (int, float):
        return _not_float32(f"/{place}", value, _missing_value_hint(schema, value))
    return InvalidRows(
        f"expected a number, got {describe_value(value)}",
        pointer=f"/{place}",
        expected="a finite number",
        got=describe_value(value),
        hint=_missing_value_hint(schema, value),
    )


def first_bad_array_value(schema: RowSchema, row: npt.NDArray[Any], bad: npt.NDArray[np.bool_]) -> InvalidRows:
    """Return the error for the first invalid value of one row of an array.

    `row` is [D] or has the shape of the schema. `bad` [D] marks the invalid values.
    """
    values = row.reshape(-1)
    if schema.allows_missing and np.isnan(values).all():
        return all_values_missing()
    index = int(np.flatnonzero(bad)[0])
    place = "/".join(map(str, np.unravel_index(index, row.shape)))
    value = float(values[index])
    return _not_float32(f"/{place}", value, _missing_value_hint(schema, value))


def _first_wrong_part(row: Any, shape: tuple[int, ...], pointer: str) -> tuple[str, Any]:
    """Return the pointer to the first wrong part of `row`, and that part.

    A part is wrong if `shape` requires a list of a certain length there, and the part is not such a list.
    """
    if type(row) is not list or len(row) != shape[0]:
        return pointer, row
    index = next(index for index, part in enumerate(row) if flatten(part, shape[1:]) is None)
    return _first_wrong_part(row[index], shape[1:], f"{pointer}/{index}")


def _is_allowed(schema: RowSchema, index: int, value: Any) -> bool:
    """Return whether `value` is true or false, and feature number `index` is 0 or 1 in the training data."""
    return type(value) is bool and bool(schema.booleans) and schema.booleans[index]


def _fits_float32(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        struct.pack("=f", value)
    except PACKING_ERRORS:
        return False
    return math.isfinite(value)


def _missing_value_hint(schema: RowSchema, value: Any) -> str | None:
    """Return the hint about missing values if `value` is null or NaN, otherwise None.

    There is no hint for latents, because latents may not be missing. The schema of latents has no names, unlike the
    schema of rows.
    """
    return MISSING_VALUE_HINT if schema.names and (value is None or value != value) else None


def _not_float32(pointer: str, value: float, hint: str | None) -> InvalidRows:
    if isinstance(value, int) or math.isfinite(value):
        got = f"{value:.3g}" if abs(value) < 1e308 else "a number beyond 1e308"
        return InvalidRows(
            f"{got} overflows float32", pointer=pointer, expected="a number within +-3.4028235e38", got=got
        )
    return InvalidRows(
        f"expected a finite number, got {value}", pointer=pointer, expected="a finite number", got=str(value), hint=hint
    )
