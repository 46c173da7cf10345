"""Read the columns of a CSV or Parquet file that hold the time and the group of each row."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.columns import MISSING
from models.timestamps import MAX_NANOSECONDS, NUMBER_UNITS, Form, to_moment
from training.data.line_numbers import LineNumbers, describe_row
from training.data.timeline import Timeline
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl

NO_TIME = np.iinfo(np.int64).min  # in place of a time that is missing or cannot be read
NO_GROUP = -1
EXPECTED = (
    "expected ISO 8601, such as 2024-01-31T12:00:00Z, or Unix time in s, ms, us or ns, between the years 1678 and 2261"
)
MIN_ROWS_PER_GROUP = 2  # on average; a column with fewer holds identifiers of rows, not groups
NANOSECONDS_PER_DAY = 86_400 * 10**9
UNITS = {"ms": 10**6, "us": 10**3, "ns": 1}
EARLY = 315_532_800 * 10**9  # 1980, in nanoseconds: earlier numbers are probably not Unix times
MAX_SHOWN = 40  # maximum number of characters of a cell in a message
WRITTEN_DATES = {8: "%Y%m%d", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}  # by number of digits

Nanoseconds = npt.NDArray[np.int64]


@dataclass
class Cell:
    """A cell of a column, for a message."""

    row: int
    value: Any


@dataclass
class TimeColumn:
    """A column of times, and what has been read of it."""

    name: str
    index: int  # position in the file
    blocks: list[Nanoseconds] = field(default_factory=list)
    first_of_form: dict[Form, Cell] = field(default_factory=dict)
    faults: list[Cell] = field(default_factory=list)  # one per block: the first cell that is not a time
    fault_count: int = 0
    other_than_date: bool = False  # whether a number was read that is not a date such as 20240131
    rows: int = 0

    def read(self, cells: "pl.Series") -> None:
        """Read the next cells of the column.

        Raises:
            DataError: the column has a type that cannot hold times.
        """
        import polars as pl

        dtype = cells.dtype
        if dtype.is_integer():
            times = self._read_integers(cells, cells)
        elif dtype in (pl.Datetime, pl.Date):
            times = self._read_dates(cells)
        elif dtype in (pl.Categorical, pl.Enum):
            times = self._read_distinct(cells.cast(pl.String))
        elif dtype == pl.String:
            times = self._read_text(cells)
        elif dtype.is_float() or dtype.is_decimal():
            times = self._read_distinct(cells.cast(pl.Float64).fill_nan(None))
        elif dtype == pl.Null:
            times = np.full(len(cells), NO_TIME)
        else:
            raise DataError(f"column {self.name!r} of --time holds {dtype}: {EXPECTED}")
        self.blocks.append(times)
        self.rows += len(cells)

    def _read_text(self, cells: "pl.Series") -> Nanoseconds:
        import polars as pl

        text = cells.str.strip_chars()
        text = text.set(text.str.to_lowercase().is_in(MISSING), None)
        whole = text.cast(pl.Int64, strict=False)
        # Text of a whole number is read as a number at once, because a file may have millions of such rows.
        return (
            self._read_integers(whole, text) if whole.null_count() == text.null_count() else self._read_distinct(text)
        )

    def _read_integers(self, numbers: "pl.Series", cells: "pl.Series") -> Nanoseconds:
        """Read whole numbers. `cells` holds the same values in the form that they have in the file, for messages."""
        import polars as pl

        present = cells.is_not_null().to_numpy()
        # `strict=False` makes unsigned numbers null if they are too large for 64 bits with a sign.
        values = numbers.cast(pl.Int64, strict=False).fill_null(NO_TIME).to_numpy()
        self._note_other_than_date(values[present])
        size = np.abs(values)
        size[values == NO_TIME] = MAX_NANOSECONDS  # the absolute value of NO_TIME is too large for 64 bits
        times = np.full(len(values), NO_TIME)
        unread = present.copy()
        for limit, form, length in NUMBER_UNITS:
            here = unread & (size < min(limit, MAX_NANOSECONDS))
            unread &= ~here
            fits = here & (size <= MAX_NANOSECONDS // length)
            times[fits] = values[fits] * length
            if fits.any():
                self._note_form(form, int(fits.argmax()), cells)
        self._note_faults(present & (times == NO_TIME), cells)
        return times

    def _read_dates(self, cells: "pl.Series") -> Nanoseconds:
        import polars as pl

        is_date = cells.dtype == pl.Date
        length = NANOSECONDS_PER_DAY if is_date else UNITS[cells.dtype.time_unit]  # type: ignore[attr-defined]
        present = cells.is_not_null().to_numpy()
        values = cells.to_physical().cast(pl.Int64).fill_null(0).to_numpy()
        fits = present & (np.abs(values) <= MAX_NANOSECONDS // length)
        times = np.full(len(values), NO_TIME)
        times[fits] = values[fits] * length
        if fits.any():
            has_zone = not is_date and cells.dtype.time_zone is not None  # type: ignore[attr-defined]
            self._note_form("zone" if has_zone else "no zone", int(fits.argmax()), cells)
        self._note_faults(present & ~fits, cells)
        return times

    def _read_distinct(self, cells: "pl.Series") -> Nanoseconds:
        """Read text or fractions. Each distinct value is parsed only once."""
        import polars as pl

        distinct = cells.drop_nulls().unique(maintain_order=True)
        values = distinct.to_list()
        moments = [to_moment(value) for value in values]
        seen: set[Form] = set()
        for value, moment in zip(values, moments, strict=True):
            if moment is not None and moment.form not in seen:
                seen.add(moment.form)
                self._note_form(moment.form, int((cells == value).arg_max() or 0), cells)
        numbers = [float(value) for value, moment in zip(values, moments, strict=True) if _is_number(moment)]
        self._note_other_than_date(np.array(numbers))
        read = [NO_TIME if moment is None else moment.nanoseconds for moment in moments]
        if not len(distinct):
            return np.full(len(cells), NO_TIME)
        times = cells.replace_strict(distinct, pl.Series(read, dtype=pl.Int64), default=NO_TIME, return_dtype=pl.Int64)
        result = times.fill_null(NO_TIME).to_numpy().copy()
        self._note_faults(cells.is_not_null().to_numpy() & (result == NO_TIME), cells)
        return result

    def _note_form(self, form: Form, position: int, cells: "pl.Series") -> None:
        self.first_of_form.setdefault(form, Cell(self.rows + position, cells[position]))

    def _note_faults(self, faulty: npt.NDArray[np.bool_], cells: "pl.Series") -> None:
        if faulty.any():
            position = int(faulty.argmax())
            self.fault_count += int(faulty.sum())
            self.faults.append(Cell(self.rows + position, cells[position]))

    def _note_other_than_date(self, numbers: npt.NDArray[Any]) -> None:
        if not self.other_than_date:
            some = [*numbers[:50].tolist(), *numbers[::1000].tolist()]
            self.other_than_date = not all(map(_is_written_date, some))

    def check(self, path: Path, lines: LineNumbers | None) -> None:
        """Raise DataError if a cell is not a time, or if the times have different forms."""
        if self.faults:
            cell = self.faults[0]
            others = f" and in {self.fault_count - 1:,} more rows" if self.fault_count > 1 else ""
            raise DataError(
                f"{path}: column {self.name!r}: {_shorten(cell.value)} in {describe_row(cell.row, lines)}{others} is "
                f"not a time: {EXPECTED}"
            )
        forms = dict(sorted(self.first_of_form.items(), key=lambda item: item[1].row))
        numbers = [form for form in forms if form in {"s", "ms", "us", "ns"}]
        if "no zone" in forms and len(forms) > 1:
            other = next(form for form in forms if form != "no zone")
            self._refuse_mixture(path, lines, "no zone", other, "write all times in UTC, as in 2024-01-31T12:00:00Z")
        if numbers and "zone" in forms:
            self._refuse_mixture(path, lines, numbers[0], "zone", "write all times in one form")
        if len(numbers) > 1:
            self._refuse_mixture(path, lines, numbers[0], numbers[1], "write all times in one unit")
        if numbers and not self.other_than_date:
            cell = forms[numbers[0]]
            raise DataError(
                f"{path}: column {self.name!r} holds dates such as {_shorten(cell.value)} "
                f"({describe_row(cell.row, lines)}), which would be read as Unix time: write them as 2024-01-31"
            )

    def _refuse_mixture(self, path: Path, lines: LineNumbers | None, one: Form, other: Form, advice: str) -> None:
        one, other = sorted((one, other), key=lambda form: self.first_of_form[form].row)
        first, second = self.first_of_form[one], self.first_of_form[other]
        raise DataError(
            f"{path}: column {self.name!r} mixes times: {_shorten(first.value)} in {describe_row(first.row, lines)} is "
            f"{_describe(one)}, but {_shorten(second.value)} in {describe_row(second.row, lines)} is "
            f"{_describe(other)}: {advice}"
        )

    @property
    def has_numbers(self) -> bool:
        """Whether times were written as numbers."""
        return not self.first_of_form.keys() & {"zone", "no zone"}

    def notes(self) -> list[str]:
        """Return what was assumed about the times."""
        if "no zone" in self.first_of_form:
            return [f"the times in {self.name!r} have no time zone: they are read as UTC"]
        forms = [form for form in self.first_of_form if form != "zone"]
        return [f"the numbers in {self.name!r} are read as Unix time in {forms[0]}"] if forms else []


@dataclass
class GroupColumn:
    """A column of groups, such as hosts, and what has been read of it.

    Groups are numbered in the order in which they appear.
    """

    name: str
    index: int
    codes: dict[str, int] = field(default_factory=dict)  # number of each group, by name
    blocks: list[npt.NDArray[np.int64]] = field(default_factory=list)

    def read(self, cells: "pl.Series") -> None:
        """Read the next cells of the column. Raise DataError if it holds lists, structs or bytes."""
        import polars as pl

        if cells.dtype.is_nested() or cells.dtype == pl.Binary:
            raise DataError(f"column {self.name!r} of --group holds {cells.dtype}: expected text or whole numbers")
        if cells.dtype.is_float() and (cells.drop_nulls() == cells.drop_nulls().round()).all():
            cells = cells.cast(pl.Int64)
        text = cells.cast(pl.String).str.strip_chars()
        text = text.set(text == "", None)
        distinct = text.drop_nulls().unique(maintain_order=True)
        codes = [self.codes.setdefault(value, len(self.codes)) for value in distinct.to_list()]
        if not len(distinct):
            self.blocks.append(np.full(len(cells), NO_GROUP))
            return
        found = text.replace_strict(distinct, pl.Series(codes, dtype=pl.Int64), default=NO_GROUP, return_dtype=pl.Int64)
        self.blocks.append(found.fill_null(NO_GROUP).to_numpy())


class TimelineReader:
    """Reads the columns of times and groups, which are not features."""

    def __init__(self, path: Path, time: TimeColumn, group: GroupColumn | None) -> None:
        self._path, self._time, self._group = path, time, group

    @property
    def columns(self) -> Sequence[TimeColumn | GroupColumn]:
        """The columns that are read: the column of times, and the column of groups if there is one."""
        return [self._time] if self._group is None else [self._time, self._group]

    def read(self, frame: "pl.DataFrame") -> None:
        """Read the next rows of the file."""
        try:
            for column in self.columns:
                column.read(frame.to_series(column.index))
        except DataError as error:
            raise DataError(f"{self._path}: {error}") from error

    def finish(
        self, source_rows: npt.NDArray[np.int64], lines: LineNumbers | None
    ) -> tuple[Timeline, npt.NDArray[np.int64], list[str]]:
        """Return the timeline of the rows, the order of its rows, and notes for the user.

        Args:
            source_rows: [N] the rows of the source that are rows of the table, as ascending row numbers.

        Returns:
            Three values: the timeline; an array [N] with the position in `source_rows` of each row of the timeline; the
            notes.

        Raises:
            DataError: a row has no time or no group, the times have different forms, or the column of groups
                does not hold groups.
        """
        self._time.check(self._path, lines)
        time = np.concatenate(self._time.blocks)[source_rows]
        self._refuse_missing(self._time.name, "time", time == NO_TIME, source_rows, lines)
        names, group = [""], np.zeros(len(time), np.int64)
        if self._group is not None:
            group = np.concatenate(self._group.blocks)[source_rows]
            self._refuse_missing(self._group.name, "group", group == NO_GROUP, source_rows, lines)
            present = np.unique(group)
            names = list(self._group.codes)
            self._refuse_many_groups(self._group.name, len(present), len(time))
            ordered = sorted(present.tolist(), key=names.__getitem__)
            rank = np.zeros(len(names), np.int64)
            rank[ordered] = np.arange(len(ordered))
            group, names = rank[group], [names[code] for code in ordered]
        order = np.lexsort((time, group))  # stable: rows at the same time stay in the order of the file
        timeline = Timeline(
            time=time[order],
            group=group[order].astype(np.int32),
            groups=tuple(names),
            time_column=self._time.name,
            group_column=None if self._group is None else self._group.name,
            source_rows=source_rows[order],
            lines=lines,
        )
        notes = self._time.notes()
        if self._time.has_numbers and time.max() < EARLY:
            notes.append(
                f"the times in {self._time.name!r} lie before 1980: if they count from a start and not from 1970, the "
                "order and the split are right, but the dates in messages mean nothing"
            )
        return timeline, order, notes

    def _refuse_missing(
        self,
        column: str,
        what: str,
        missing: npt.NDArray[np.bool_],
        source_rows: npt.NDArray[np.int64],
        lines: LineNumbers | None,
    ) -> None:
        if missing.any():
            row, count = int(source_rows[missing.argmax()]), int(missing.sum())
            others = f" and in {count - 1:,} more rows" if count > 1 else ""
            raise DataError(
                f"{self._path}: column {column!r} has no {what} in {describe_row(row, lines)}{others}: fill in the "
                "cells, or remove those rows"
            )

    def _refuse_many_groups(self, column: str, groups: int, rows: int) -> None:
        if rows < MIN_ROWS_PER_GROUP * groups:
            raise DataError(
                f"{self._path}: column {column!r} has {groups:,} groups in {rows:,} rows: expected a column that names "
                "the host or device of a row, with many rows in each group"
            )


def _is_number(moment: Any) -> bool:
    return moment is not None and moment.form in {"s", "ms", "us", "ns"}


def _is_written_date(number: float) -> bool:
    """Return whether `number` is a date from 1970 to 2100 written as a whole number, such as 20240131."""
    text = str(int(number)) if number == int(number) else ""
    if len(text) not in WRITTEN_DATES or not "1970" <= text[:4] <= "2100":
        return False
    try:
        datetime.strptime(text, WRITTEN_DATES[len(text)])  # noqa: DTZ007  # only its validity counts
    except ValueError:
        return False
    return True


def _describe(form: Form) -> str:
    if form in {"zone", "no zone"}:
        return "text with a time zone" if form == "zone" else "text without a time zone"
    return f"Unix time in {form}"


def _shorten(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
