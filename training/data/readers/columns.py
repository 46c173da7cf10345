"""The columns of a CSV or Parquet file: which are wanted, and whether what streams through them is measurements."""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.errors import join_names
from training.data.readers.source import Block, RawTable, ReadOptions, describe_row, format_option
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl

LABEL_COLUMNS = ("label", "y")
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
TRUE = frozenset({"true", "yes"})
FALSE = frozenset({"false", "no"})
UNIT = re.compile(r"(?P<name>.*\S)\s+\[(?P<unit>[^\[\]]+)\]")
DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T ].*)?|\d{1,2}:\d{2}(:.*)?")
IDENTIFIER = re.compile(r"(.*_)?id|uuid|index", re.IGNORECASE)
ENOUGH = 10  # rows before whole numbers that go up may be called an identifier

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Odd:
    """The first cell of a column that is no number."""

    row: int
    value: Any
    kind: str  # of the column, as a refusal calls it: text, dates, or its type


@dataclass
class Counter:
    """Whether a column numbers the rows: it goes up by one each, or, if `named` so, no whole number comes twice.

    The latter is known from the numbers themselves, which are kept: 8 bytes a row.
    """

    named: bool
    rows: int = 0
    last: float = float("nan")
    by_one: bool = True
    whole: bool = True
    seen: list[Floats] = field(default_factory=list)

    def add(self, values: Floats) -> None:
        """Look at the next values [n] of the column."""
        if not len(values) or not (self.by_one or (self.named and self.whole)):
            return
        steps = np.diff(values, prepend=self.last if self.rows else values[0] - 1)
        self.rows += len(values)
        self.last = float(values[-1])
        self.whole = self.whole and bool((values == np.rint(values)).all())  # NaN is not itself
        self.by_one = self.by_one and self.whole and bool((steps == 1).all())
        if self.named and self.whole:
            self.seen.append(values)

    def verdict(self) -> str | None:
        """Why this is an identifier; None if it is none."""
        if self.rows < ENOUGH or not self.whole:
            return None
        if self.by_one:
            return "an identifier: counts the rows"
        if self.named and len(np.unique(np.concatenate(self.seen))) == self.rows:
            return "an identifier: another whole number in every row"
        return None


@dataclass
class Column:
    """What one column has shown so far."""

    name: str
    unit: str | None
    index: int  # in the file
    typed: bool = False  # the file says of what type it is, so one cell speaks for all
    numbers: int = 0
    words: int = 0
    first: Odd | None = None
    truth: Odd | None = None  # the first cell that was true or false, yes or no
    binary: bool = True  # no number but 0 and 1 so far
    counter: Counter = field(init=False)

    def __post_init__(self) -> None:
        self.counter = Counter(named=IDENTIFIER.fullmatch(self.name) is not None)

    def read(self, cells: "pl.Series", row: int) -> Floats:
        """The numbers [n] in `cells`, which begin at `row`: NaN where a value is missing, or is no number."""
        values = self._typed(cells, row) if self.typed else self._text(cells, row)
        present = values[~np.isnan(values)]
        self.numbers += len(present)
        self.binary = self.binary and bool(((present == 0) | (present == 1)).all())
        self.counter.add(values)
        return values

    def _text(self, cells: "pl.Series", row: int) -> Floats:
        import polars as pl

        text = cells.str.strip_chars()
        number = text.cast(pl.Float64, strict=False)
        if number.null_count():
            lower = text.str.to_lowercase()
            truth = lower.is_in(TRUE | FALSE)
            wrong = (number.is_null() & ~(text.is_null() | lower.is_in(MISSING) | truth)).arg_true()
            if truth.any():
                at = int(truth.arg_true()[0])
                self.truth = self.truth or Odd(row + at, text[at], "text")
                number = pl.select(
                    pl.when(truth).then(lower.is_in(TRUE).cast(pl.Float64)).otherwise(number)
                ).to_series()
            if len(wrong):
                self.words += len(wrong)
                value = text[int(wrong[0])]
                kind = "dates" if DATE.fullmatch(value) else "text"
                self.first = self.first or Odd(row + int(wrong[0]), value, kind)
        return number.fill_null(float("nan")).to_numpy()

    def _typed(self, cells: "pl.Series", row: int) -> Floats:
        import polars as pl

        kind = cells.dtype
        if kind == pl.Boolean and cells.null_count() < len(cells):
            at = int(cells.is_not_null().arg_max() or 0)
            self.truth = self.truth or Odd(row + at, cells[at], "booleans")
        if kind.is_numeric() or kind in (pl.Null, pl.Boolean):
            return cells.cast(pl.Float64).fill_null(float("nan")).to_numpy()
        if cells.null_count() < len(cells):
            at = int(cells.is_not_null().arg_max() or 0)
            texts = kind in (pl.String, pl.Categorical, pl.Enum)
            word = "text" if texts else "dates" if kind in (pl.Date, pl.Datetime, pl.Time) else str(kind)
            self.first = self.first or Odd(row + at, cells.slice(at, 1).to_list()[0], word)
            self.words += len(cells) - cells.null_count()
        return np.full(len(cells), np.nan)


def choose_columns(header: Sequence[str], path: Any, request: ReadOptions, typed: bool) -> list[Column]:
    """The columns of the file that are asked for; with a label after them, as one more, if names are asked for."""
    every = _named(header, path, typed)
    names = [column.name for column in every]
    if request.names is not None:
        return [every[index] for index in _found(names, request.names, path)]
    for verb, listed in (("drop", request.drop), ("keep", request.keep)):
        if unknown := [name for name in listed if name not in names]:
            near = difflib.get_close_matches(unknown[0], names, n=3)
            there = f"did you mean {' or '.join(map(repr, near))}?" if near else f"it has {join_names(names)}"
            raise DataError(f"{path} has no column {unknown[0]!r} to {verb}: {there}")
    left = [column for column in every if column.name not in request.drop]
    if not left:
        raise DataError(f"{path}: all {len(names)} columns are dropped: keep one to learn from")
    return left


def _named(header: Sequence[str], path: Any, typed: bool) -> list[Column]:
    """`load [%]` is the column "load" in "%"."""
    columns: list[Column] = []
    first: dict[str, int] = {}
    for index, title in enumerate(header):
        line = " ".join(title.split())
        match = UNIT.fullmatch(line)
        name = match["name"] if match else line
        if not name:
            raise DataError(f"{path}: column {index + 1} has no name: name it (pandas: write with index=False)")
        if name in first:
            raise DataError(f"{path}: columns {first[name] + 1} and {index + 1} are both named {name!r}: rename one")
        first[name] = index
        columns.append(Column(name, match["unit"].strip() if match else None, index, typed))
    return columns


def _found(names: Sequence[str], wanted: Sequence[str], path: Any) -> list[int]:
    where = {name: index for index, name in enumerate(names)}
    absent = [name for name in wanted if name not in where]
    if absent:
        raise DataError(
            f"{path} lacks {len(absent)} of the model's {len(wanted)} columns, first {absent[0]!r}: "
            f"expected a column of that name, got {join_names(names)}"
        )
    label = [name for name in LABEL_COLUMNS if name in where and name not in wanted]
    return [where[name] for name in [*wanted, *label[:1]]]


def raw_table(
    frames: "Iterator[pl.DataFrame]",
    columns: list[Column],
    request: ReadOptions,
    path: Any,
    rows: int | None,
    first_line: int | None = None,
) -> RawTable:
    """The numbers in `frames`, which hold just `columns`, as they stream through."""
    features = columns if request.names is None else columns[: len(request.names)]
    notes: list[str] = []
    return RawTable(
        _stream(frames, columns, len(features), _Judge(path, request, first_line, notes)),
        (len(features),),
        rows=rows,
        names=[column.name for column in features],
        units=[column.unit for column in features],
        first_line=first_line,
        notes=notes,
    )


def _stream(frames: "Iterator[pl.DataFrame]", columns: list[Column], width: int, judge: "_Judge") -> Iterator[Block]:
    row = 0
    for frame in frames:
        values = np.empty((frame.height, len(columns)))
        for position, column in enumerate(columns):
            values[:, position] = column.read(frame.to_series(position), row)
        yield values[:, :width], values[:, width] if len(columns) > width else None
        row += frame.height
    judge.sum_up(columns)


@dataclass(frozen=True)
class _Judge:
    """What is said of columns when all rows have been through them."""

    path: Any
    request: ReadOptions
    first_line: int | None
    notes: list[str]

    def sum_up(self, columns: Sequence[Column]) -> None:
        """Raise DataError if a column is no measurements; else note what was turned into numbers."""
        for column in columns:
            if column.first and (self.request.names is not None or column.numbers > column.words):
                self._refuse_cell(column, column.first, "drop the column, or turn it into numbers")
            if column.truth and not column.binary:
                self._refuse_cell(column, column.truth, "write 0 and 1")
        if self.request.names is None:
            self._refuse_what_measures_nothing(columns)
        if truths := [column.name for column in columns if column.truth]:
            self.notes.append(f"true and yes are read as 1, false and no as 0: {join_names(truths)}")

    def _refuse_cell(self, column: Column, cell: Odd, advice: str) -> None:
        where = describe_row(cell.row, self.first_line)
        got = f"{cell.kind} ({_shown(cell.value)} in {where})" if column.typed else f"{_shown(cell.value)} in {where}"
        raise DataError(f"{self.path}: column {column.name!r} expected numbers, got {got}: {advice}")

    def _refuse_what_measures_nothing(self, columns: Sequence[Column]) -> None:
        texts = {
            column.name: f"{odd.kind}, {_shown(odd.value)} in {describe_row(odd.row, self.first_line)}"
            for column in columns
            if (odd := column.first)
        }
        counts = {
            column.name: verdict
            for column in columns
            if column.name not in self.request.keep and not column.first and (verdict := column.counter.verdict())
        }
        if not texts and not counts:
            return
        said = texts | counts
        bad = [column.name for column in columns if column.name in said]
        which = ", ".join(f"{name!r} ({said[name]})" for name in bad)
        subject = f"column {which} is no measurement" if len(bad) == 1 else f"columns {which} are no measurements"
        keeping = (
            f"; to learn from {join_names(list(counts))} all the same: {format_option('--keep', list(counts))}"
            if counts
            else ""
        )
        raise DataError(f"{self.path}: {subject}: add {format_option('--drop', bad)}{keeping}")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str | list) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
