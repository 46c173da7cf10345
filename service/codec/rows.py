"""Parsed JSON and arrays to float32 rows, and the exact place of the first value that is not one.

The fast path costs 15 ns a number: `struct` packs a row of Python floats straight into float32, refuses strings, null,
lists, wrong counts and what overflows, and knows nothing of rows. Only when it refuses does a slow path look for why.
It lets booleans (integers to Python) and NaN pass; callers say when the body may hold any, by `careful`.

A missing value is null, in arrays NaN, and is read as NaN. Only features which lacked values in training may lack one,
and no row may lack all. Records may ask that others be imputed too, up to half of them.
"""

import json
import math
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from service.codec.float32 import as_float32, gaps_of
from service.errors import InvalidRows, escape

Array = npt.NDArray[np.float32]
GAPS = "a missing value is null (NaN in npy), for features of which GET /models/{name} says missing > 0"
_REFUSED = (struct.error, TypeError, OverflowError)  # what packing a row raises


@dataclass(frozen=True)
class RowError:
    """A row that cannot be read: its place in the request, and why."""

    row: int
    error: InvalidRows


@dataclass(frozen=True)
class Unreadable:
    """What stands among the rows for one that could not even be parsed."""

    detail: str
    expected: str
    got: str


class ParsedRows(NamedTuple):
    """The rows that could be read, x [G, D], which rows of the request they are, and the errors of the others."""

    x: Array
    rows: list[int]
    errors: list[RowError]
    missing: npt.NDArray[np.bool_] | None  # [G, D]: which values are; None if none is


class RowFormat:
    """How one row looks: a flat list of D numbers, or nested lists of `shape`, whose product is D.

    Args:
        shape: of one row.
        names: of the D values, for `read_records`.
        optional: whether each of the D values may be missing; by default none may.
        medians: of the D values, which `filled` puts where others are missing.
    """

    def __init__(
        self,
        shape: Sequence[int],
        names: Sequence[str] = (),
        optional: Sequence[bool] = (),
        medians: Sequence[float] = (),
    ) -> None:
        self.shape = tuple(shape)
        self.width = math.prod(self.shape)
        self.names = tuple(names)
        self.expected = f"a list of {self.width} numbers"
        if len(self.shape) > 1:
            self.expected += f", or lists nested {'x'.join(map(str, self.shape))}"
        self.known = frozenset(names)
        self._optional = tuple(optional) or (False,) * self.width
        self._required = [name for name, optional in zip(names, self._optional, strict=False) if not optional]
        self.gaps = any(self._optional)  # whether a row may lack a value
        self._medians = np.array(medians, np.float32)
        self._packer = struct.Struct(f"={self.width}f")

    def read(self, rows: Any, pointer: str, careful: bool) -> Array:
        """Every row of `rows`, [N, D]. Raises InvalidRows at the first that is not one.

        Args:
            rows: what JSON gave.
            pointer: where it stood in the body.
            careful: whether true, false, NaN or infinity may be among the values.
        """
        count = self.count(rows, pointer)
        buffer = bytearray(count * self._packer.size)
        for index in range(count):
            try:
                self._pack(rows[index], buffer, index, careful, f"{pointer}/{index}")
            except InvalidRows as error:
                if index == 0:
                    self._refuse_single_row(rows, pointer)
                raise error
        return np.frombuffer(buffer, np.float32).reshape(count, self.width)

    def read_one(self, row: Any, pointer: str, careful: bool) -> Array:
        """A single row as [1, D]. Raises InvalidRows."""
        buffer = bytearray(self._packer.size)
        self._pack(row, buffer, 0, careful, pointer)
        return np.frombuffer(buffer, np.float32).reshape(1, self.width)

    def read_each(self, rows: Any, pointer: str, careful: bool) -> ParsedRows:
        """Like `read`, but a bad row costs only itself. Raises InvalidRows when no row can be read."""
        count = self.count(rows, pointer)
        return self._collect(count, lambda i, buffer, at: self._pack(rows[i], buffer, at, careful, f"{pointer}/{i}"))

    def count(self, rows: Any, pointer: str) -> int:
        """How many rows `rows` has. Raises InvalidRows if it is no list of at least one row."""
        if type(rows) is not list:
            raise InvalidRows("expected a list of rows", pointer=pointer, expected="a list of rows", got=describe(rows))
        if not rows:
            raise InvalidRows("there are no rows", pointer=pointer, expected="at least one row", got="an empty list")
        if type(rows[0]) in (int, float):
            self._refuse_single_row(rows, pointer)
        return len(rows)

    def read_array(self, array: npt.NDArray[Any], pointer: str) -> Array:
        """An array of real numbers [N, D] or [N, *shape] as float32 [N, D]. Raises InvalidRows."""
        x, finite = self._shaped(array, pointer)
        if finite:
            return x
        bad = self._bad(x)
        if bad.any():
            raise self._not_finite(array, bad, int(np.flatnonzero(bad.any(axis=1))[0]), pointer)
        return x

    def read_array_each(self, array: npt.NDArray[Any], pointer: str) -> ParsedRows:
        """Like `read_array`, but a row that is not finite costs only itself."""
        x, finite = self._shaped(array, pointer)
        if finite:
            return ParsedRows(x, list(range(len(x))), [], None)
        bad = self._bad(x)
        good = ~bad.any(axis=1)
        if good.all():
            return ParsedRows(x, list(range(len(x))), [], gaps_of(x))
        errors = [RowError(int(row), self._not_finite(array, bad, int(row), pointer)) for row in np.flatnonzero(~good)]
        if len(errors) == len(x):
            raise errors[0].error
        return ParsedRows(x[good], np.flatnonzero(good).tolist(), errors, gaps_of(x[good]))

    @cached_property
    def lenient(self) -> "RowFormat":
        """The same, of which every value may be missing."""
        return RowFormat(self.shape, self.names, (True,) * self.width)

    def read_records(
        self,
        records: Any,
        pointer: str,
        careful: bool,
        impute: bool = False,
        ignored: Collection[str] = (),
        least: int = 1,
    ) -> tuple[ParsedRows, int]:
        """Objects by feature name, in any order; also how many of their values had a name that is no feature's.

        Args:
            records: what JSON gave, an `Unreadable` in the place of what was no JSON. Beside objects there may be lists
                where a reader gives them: they are rows as `read` takes them.
            pointer, careful: as for `read`.
            impute: whether features that lacked no value in training may be missing too, up to half of them.
            ignored: names that count neither as features nor as unknown.
            least: how many must be readable.
        """
        if not isinstance(records, list) or not records:
            got = describe(records)
            raise InvalidRows("there are no records", pointer=pointer, expected="a list of objects", got=got)
        form, mixed = self.lenient if impute else self, type(records) is not list

        def place(index: int, buffer: bytearray, at: int) -> None:
            record, where = records[index], f"{pointer}/{index}"
            if mixed and type(record) is list:
                self._pack(record, buffer, at, careful, where)
            else:
                form._pack(self._ordered(record, where, impute), buffer, at, careful, where, self.names)

        known = self.known.union(ignored)
        unknown = sum(len(record.keys() - known) for record in records if type(record) is dict)
        return self._collect(len(records), place, least), unknown

    def filled(self, reading: ParsedRows) -> Array:
        """Its rows [G, D] with the medians where a value is missing that the model itself has no stand-in for."""
        if reading.missing is None:
            return reading.x
        return np.where(reading.missing & ~np.array(self._optional), self._medians, reading.x)

    def _collect(self, count: int, place: Any, least: int = 1) -> ParsedRows:
        buffer = bytearray(count * self._packer.size)
        kept: list[int] = []
        errors: list[RowError] = []
        for index in range(count):
            try:
                place(index, buffer, len(kept))
                kept.append(index)
            except InvalidRows as error:
                errors.append(RowError(index, error))
        if len(kept) < least:
            raise errors[0].error
        x = np.frombuffer(buffer, np.float32).reshape(count, self.width)[: len(kept)]
        return ParsedRows(x, kept, errors, gaps_of(x))

    def _ordered(self, record: Any, pointer: str, impute: bool) -> list[Any]:
        if type(record) is Unreadable:
            raise InvalidRows(record.detail, pointer=pointer, expected=record.expected, got=record.got)
        if type(record) is not dict:
            raise InvalidRows("a record is an object", pointer=pointer, expected="an object", got=describe(record))
        try:
            values = [record[name] for name in self.names]
            if not (impute and None in values):
                return values
        except KeyError:
            values = [record.get(name) for name in self.names]
        missing = [name for name in self._required if (record.get(name) is None if impute else name not in record)]
        if 2 * len(missing) <= len(self._required) * impute:
            return values
        listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        least = "half" if impute else "each"
        raise InvalidRows(
            f"the record has no value for {listed}",
            pointer=pointer,
            expected=f"a number for {least} of {len(self._required)} features",
            got=f"{len(self._required) - len(missing)} of them",
            hint="GET /models/{name} lists the features",
        )

    def _pack(
        self, row: Any, buffer: bytearray, at: int, careful: bool, pointer: str, keys: Sequence[str] = ()
    ) -> None:
        """Write `row` as row number `at` of `buffer`. Raises InvalidRows."""
        try:
            self._packer.pack_into(buffer, at * self._packer.size, *row)
        except _REFUSED:
            values = self._values(row, pointer)
            present = [value for value in values if value is not None] if self.gaps else values
            if not present:
                raise _empty(pointer) from None
            try:
                self._packer.pack_into(buffer, at * self._packer.size, *self._with_gaps(values))
            except _REFUSED:
                raise self._first_bad(values, row, pointer, keys) from None
        else:
            values = present = row
        if careful and (bool in set(map(type, present)) or not all(map(math.isfinite, present))):
            raise self._first_bad(values, row, pointer, keys)

    def _with_gaps(self, values: list[Any]) -> list[Any]:
        """`values` with NaN for each null that may be there."""
        if not self.gaps:
            return values
        pairs = zip(values, self._optional, strict=True)
        return [math.nan if value is None and optional else value for value, optional in pairs]

    def _form(self, row: Any) -> tuple[int, ...]:
        nested = len(self.shape) > 1 and type(row) is list and bool(row) and type(row[0]) is list
        return self.shape if nested else (self.width,)

    def _values(self, row: Any, pointer: str) -> list[Any]:
        """The D values of a flat or nested row, whatever they are. Raises InvalidRows."""
        form = self._form(row)
        values = _flattened(row, form)
        if values is None:
            place, misfit = _first_misfit(row, form, pointer)
            got = describe(misfit)
            raise InvalidRows(f"expected {self.expected}, got {got}", pointer=place, expected=self.expected, got=got)
        return values

    def _first_bad(self, values: list[Any], row: Any, pointer: str, keys: Sequence[str]) -> InvalidRows:
        index = next(i for i, v in enumerate(values) if not (_is_float32(v) or (v is None and self._optional[i])))
        place = escape(keys[index]) if keys else "/".join(map(str, np.unravel_index(index, self._form(row))))
        value = values[index]
        if type(value) in (int, float):
            return _no_float32(f"{pointer}/{place}", value, self._hint(value))
        return InvalidRows(
            f"expected a number, got {describe(value)}",
            pointer=f"{pointer}/{place}",
            expected="a finite number",
            got=describe(value),
            hint=self._hint(value),
        )

    def _hint(self, value: Any) -> str | None:
        """What to do about `value` if it seems to stand for a missing one. Codes, which have no names, lack none."""
        return GAPS if self.names and (value is None or value != value) else None

    def _refuse_single_row(self, rows: Any, pointer: str) -> None:
        """Raise if `rows` is itself one row: a mistake that deserves its own hint."""
        values = _flattened(rows, self._form(rows))
        if values is None or not all(type(value) in (int, float) for value in values):
            return
        raise InvalidRows(
            "expected a list of rows, got one row",
            pointer=pointer,
            expected=f"a list of rows, each {self.expected}",
            got="one row",
            hint="put the row into a list: [[...]]",
        )

    def _shaped(self, array: npt.NDArray[Any], pointer: str) -> tuple[Array, bool]:
        """`array` as float32 [N, D], and whether all of it is finite. Raises InvalidRows."""
        if array.shape[1:] not in ((self.width,), self.shape) or not len(array):
            shapes = [f"[N, {', '.join(map(str, shape))}]" for shape in dict.fromkeys(((self.width,), self.shape))]
            single = array.shape in ((self.width,), self.shape)
            raise InvalidRows(
                f"expected an array {' or '.join(shapes)}, got {list(array.shape)}",
                pointer=pointer,
                expected=f"{' or '.join(shapes)} with N >= 1",
                got=str(list(array.shape)),
                hint="send one row as x[None]" if single else None,
            )
        x, finite = as_float32(array.reshape(len(array), self.width))
        return x if x.flags.aligned else x.copy(), finite

    def _bad(self, x: Array) -> npt.NDArray[np.bool_]:
        """Which values of rows x [N, D] are neither finite nor rightly missing: [N, D], whole rows that lack all."""
        bad = ~np.isfinite(x)
        if self.gaps and bad.any():
            missing = np.isnan(x)
            bad &= ~(missing & np.array(self._optional))
            bad[missing.all(axis=1)] = True
        return bad

    def _not_finite(self, array: npt.NDArray[Any], bad: npt.NDArray[np.bool_], row: int, pointer: str) -> InvalidRows:
        """Why row number `row` is refused, given which values are `bad` [N, D]."""
        values = array.reshape(bad.shape)[row]
        if self.gaps and np.isnan(values).all():
            return _empty(f"{pointer}/{row}")
        index = int(np.flatnonzero(bad[row])[0])
        place = "/".join(map(str, np.unravel_index(index, array.shape[1:])))
        value = float(values[index])
        return _no_float32(f"{pointer}/{row}/{place}", value, self._hint(value))


def describe(value: Any) -> str:
    """A JSON value in a few words, for a person."""
    if isinstance(value, list):
        return "an empty list" if not value else f"a list of {len(value)}"
    if isinstance(value, dict):
        return "an object"
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:36] + "..."


def _flattened(row: Any, shape: tuple[int, ...]) -> list[Any] | None:
    """The values in nested lists, or None if a list is not as long as `shape` says."""
    level = [row]
    for size in shape:
        if not all(type(part) is list and len(part) == size for part in level):
            return None
        level = list(chain.from_iterable(level))
    return level


def _first_misfit(row: Any, shape: tuple[int, ...], pointer: str) -> tuple[str, Any]:
    """Where the first list that is not as `shape` says stands in `row`, and what stands there."""
    if type(row) is not list or len(row) != shape[0]:
        return pointer, row
    index = next(i for i, part in enumerate(row) if _flattened(part, shape[1:]) is None)
    return _first_misfit(row[index], shape[1:], f"{pointer}/{index}")


def _is_float32(value: Any) -> bool:
    if type(value) not in (int, float):
        return False
    try:
        struct.pack("=f", value)
    except _REFUSED:
        return False
    return math.isfinite(value)


def _empty(pointer: str) -> InvalidRows:
    return InvalidRows("every value of the row is missing", pointer=pointer, expected="at least one number", got="none")


def _no_float32(pointer: str, value: float, hint: str | None) -> InvalidRows:
    if isinstance(value, int) or math.isfinite(value):
        got = f"{value:.3g}" if abs(value) < 1e308 else "a number beyond 1e308"
        return InvalidRows(
            f"{got} overflows float32", pointer=pointer, expected="a number within +-3.4028235e38", got=got
        )
    return InvalidRows(f"{value} is no number", pointer=pointer, expected="a finite number", got=str(value), hint=hint)
