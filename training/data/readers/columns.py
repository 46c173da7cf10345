"""The columns of a CSV or Parquet file: choose them, convert cells to numbers, refuse columns of other values.

Columns are checked after all rows have been read, so that one message can name all columns to drop.
"""

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.columns import FALSE, MISSING, TRUE, parse_title
from models.errors import join_names
from training.data.categories import UNKNOWN_LEVEL, KnownLevels, LevelReader, one_hot
from training.data.labels import (
    LabelReader,
    ends_like_label_name,
    find_label_column,
    is_label_name,
    is_status_name,
    look_like_labels,
)
from training.data.line_numbers import LineNumbers, describe_row
from training.data.readers.condition_columns import ConditionReader
from training.data.readers.raw_table import Block, BlockDetails, RawTable, ReadOptions, format_option
from training.data.readers.row_order import OrderDetector, describe_direction
from training.data.readers.time_columns import GroupColumn, TimeColumn, TimelineReader
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl

DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T ].*)?|\d{1,2}:\d{2}(:.*)?")
# The case of the second alternative matters: it accepts CustomerId and rowNo, but not humid or volcano.
IDENTIFIER_NAME = re.compile(
    r"(?i:(.*[_\-. #])?(ids?|uuid|guid|index|idx|no|nr|num|number|key|pk|seq|sequence|serial|row|rownum|rowid)"
    r"|unnamed: \d+(\.\d+)*|__index_level_\d+__|level_\d+"
    r"|(customer|user|order|client|account|device|session|record|sample|event|transaction|item)(id|no))"
    r"|.*[a-z0-9](Id|ID|No|Nr|Num|Number|Key|Index|Seq)"
)
# An identifier, such as that of a customer, may occur in several rows. Only the column's name then shows what it is.
REPEATED_IDENTIFIER_NAME = re.compile(
    r"(?i:(.*[_\-. #])?(ids?|uuid|guid)|(customer|user|client|account|device)id)|.*[a-z](Id|ID)"
)
TIME_NAME = re.compile(
    r"(?i:t|(.*[_\-. ])?(time|timestamp|ts|epoch|date|datetime|unixtime|when|time_stamp)"
    r"([_\-. ]?\(?(s|sec|secs|seconds|ms|us|µs|ns|utc|unix|local)\)?)?|.*[_\-. ]at)|.*[a-z](Time|Timestamp|Date|At|Ts)"
)
DATE_NAME = re.compile(r"(?i:(.*[_\-. ])?date)|.*[a-z]Date")
# Unix times from 2001 to 2100, in s, ms, us and ns
UNIX_TIMES = tuple((1e9 * factor, 4.1e9 * factor) for factor in (1, 1e3, 1e6, 1e9))
# Times from 1970 to 2100 that are written as whole numbers, such as 20240131, 202401312359 and 20240131235959
WRITTEN_TIMES = tuple((19700101 * factor, 21001232 * factor) for factor in (1, 1e4, 1e6))
# Dates from 1990 to 2100 as days: as spreadsheets count them, and Julian days
DAYS = ((32874, 73051), (2447892, 2488070))
MIN_IDENTIFIER_ROWS = 10  # with fewer rows, consecutive integers may be a coincidence
CORRECTION = "correct the cell (a missing value is an empty cell), or drop the column"
MAX_SHOWN = 40  # maximum number of characters of a cell in a message

# Notations of numbers that are not read as numbers, and how to write them instead. The first that matches counts.
DIGITS = r"[-+]?\d+(\.\d+)?"
MEASURE = (
    r"%|‰|°C?|°F|[nµum]?s|min|h|[kKMGT]i?B|[kKMGT]?bit|B|[kMG]?Hz|[mk]?V|[mµ]?A|[mkM]?W|kWh|[mcµk]?m|[mk]?g|m?l|[hkM]?Pa|bar"
    r"|rpm|dBm?|ppm|[€$£]|EUR|USD"
)
NOTATIONS = (
    (
        re.compile(rf"{DIGITS}\s*({MEASURE})"),
        "write the number alone, and its unit in the header, as in 'load [%]'",
    ),
    (re.compile(rf"[€$£]\s*{DIGITS}"), "write the number alone, and its unit in the header, as in 'price [€]'"),
    (re.compile(r"[-+]?\d{1,3}([ '_]\d{3})+(\.\d+)?"), "write the number without thousands separators"),
    (re.compile(r"[-+]?\d{1,3}(,\d{3})+\.\d+"), "write the number without thousands separators"),
    (re.compile(r"[-+]?\d{1,3}(\.\d{3}){2,}"), "write the number without thousands separators"),
    (
        re.compile(r"[−–]\s*\d+(\.\d+)?|\(\d+(\.\d+)?\)|\d+(\.\d+)?-"),
        "write a negative number with a hyphen before it, as in -5",
    ),
    (re.compile(r"[-+]?\d{1,3}(,\d{3})+"), "write a decimal point instead of the comma, or no thousands separators"),
    (re.compile(r"[-+]?[\d.]*,\d+([eE][-+]?\d+)?"), "write a decimal point instead of the decimal comma"),
)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NonNumericCell:
    """A cell that is not a number."""

    row: int
    value: Any
    kind: str  # kind of column, for a message: text, dates, booleans or the name of a type


@dataclass
class IdentifierDetector:
    """Detects whether a column identifies rows instead of measuring something.

    Args:
        has_identifier_name: whether the column is called id, uuid or the like. All values of such a column are kept, 8
            bytes per row, to find out whether they are unique.
    """

    has_identifier_name: bool
    has_time_name: bool = False
    has_date_name: bool = False
    rows: int = 0
    last: float = float("nan")
    consecutive: bool = True  # whether every value so far is the previous value plus 1
    integers: bool = True
    values: list[Floats] = field(default_factory=list)
    order: OrderDetector = field(default_factory=lambda: OrderDetector(1))
    low: float = math.inf
    high: float = -math.inf

    def add(self, values: Floats) -> None:
        """Add the next values [n] of the column."""
        self.order.add(values[:, None])
        self.low = float(np.fmin.reduce(values, initial=self.low))
        self.high = float(np.fmax.reduce(values, initial=self.high))
        complete = len(values)
        values = values[~np.isnan(values)]
        self.consecutive = self.consecutive and len(values) == complete
        if not len(values) or not (self.consecutive or (self.has_identifier_name and self.integers)):
            return
        with np.errstate(invalid="ignore"):  # infinity - infinity; infinite cells are refused later
            steps = np.diff(values, prepend=self.last if self.rows else values[0] - 1)
        self.rows += len(values)
        self.last = float(values[-1])
        self.integers = self.integers and bool((values == np.rint(values)).all())
        self.consecutive = self.consecutive and self.integers and bool((steps == 1).all())
        if self.has_identifier_name and self.integers:
            self.values.append(values)

    def reason(self) -> str | None:
        """Return why the column is an identifier, or None if it is not one."""
        if self.rows >= MIN_IDENTIFIER_ROWS and self.integers:
            if self.consecutive:
                return "an identifier: it counts the rows"
            if self.has_identifier_name and len(np.unique(np.concatenate(self.values))) == self.rows:
                return "an identifier: a different integer in every row"
        if self.has_time_name and self._is_within(UNIX_TIMES):
            return "a time: Unix time"
        if self.has_time_name and self._is_within(WRITTEN_TIMES):
            return "a time, written as a number"
        if self.has_date_name and self._is_within(DAYS):
            return "a date, as a number of days"
        direction = int(self.order.directions()[0])
        return describe_direction(direction) if direction else None

    def _is_within(self, ranges: Iterable[tuple[float, float]]) -> bool:
        return any(first <= self.low <= self.high <= last for first, last in ranges)


@dataclass
class Column:
    """One column, and statistics of the cells that have been read."""

    name: str
    unit: str | None
    index: int  # position in the file
    typed: bool = False  # whether the file declares the type of the column's cells
    digits: int = 0  # number of cells that were numbers
    non_numbers: int = 0  # number of cells that were neither numbers, booleans nor missing
    first_non_number: NonNumericCell | None = None
    first_boolean: NonNumericCell | None = None  # the first cell that was true, false, yes or no
    other_cells: list[NonNumericCell] | None = None  # if a list: all cells that were not numbers are added
    binary: bool = True  # whether all numbers were 0 or 1
    levels: LevelReader | None = None  # in training: reads the cells as levels, in case that the column is a category
    known: KnownLevels | None = None  # for rows of a model: the levels that it knows, if the column is a category
    identifier: IdentifierDetector = field(init=False)

    def __post_init__(self) -> None:
        self.identifier = IdentifierDetector(
            IDENTIFIER_NAME.fullmatch(self.name) is not None,
            TIME_NAME.fullmatch(self.name) is not None,
            DATE_NAME.fullmatch(self.name) is not None,
        )

    @property
    def feature_names(self) -> list[str]:
        """The names of the features that the column becomes: several if it is a category that the model knows."""
        return [self.name] if self.known is None else self.known.category.feature_names

    def read(self, cells: "pl.Series", row: int) -> Floats:
        """Return `cells` as numbers [n], with NaN for missing values and for cells that are not numbers.

        In training, cells that may be levels of a category are 0 instead of NaN: their row has a value.

        Args:
            row: the row number of the first cell.
        """
        values = self._read_numbers(cells, row)
        if self.levels is not None and (codes := self._read_codes(cells, self.levels)) is not None:
            values = np.where(np.isnan(values) & (codes >= 0), 0.0, values)
        return values

    def _read_codes(self, cells: "pl.Series", levels: LevelReader) -> npt.NDArray[np.int16] | None:
        """Read `cells` as levels. Return their codes, or None if the column cannot be a category."""
        import polars as pl

        is_text = not self.typed or cells.dtype in (pl.String, pl.Categorical, pl.Enum)
        return levels.read(cells, self.first_non_number is not None) if is_text or levels.is_forced else None

    def _read_numbers(self, cells: "pl.Series", row: int) -> Floats:
        is_typed = self.typed or cells.dtype.is_numeric()
        values = self._read_typed(cells, row) if is_typed else self._read_text(cells, row)
        self.note_whether_binary(values)
        if self.other_cells is None:  # a known column of a model is a measurement
            self.identifier.add(values)
        return values

    def note_whether_binary(self, values: Floats) -> None:
        """Set `binary` to false if one of the values [n] is neither 0, 1 nor NaN."""
        self.binary = self.binary and bool(((values == 0) | (values == 1) | np.isnan(values)).all())

    def _read_text(self, cells: "pl.Series", row: int) -> Floats:
        import polars as pl

        text = cells.str.strip_chars()
        number = text.cast(pl.Float64, strict=False)
        self.digits += len(number) - number.null_count()
        if number.null_count():
            lower = text.str.to_lowercase()
            boolean = lower.is_in(TRUE | FALSE)
            if self.other_cells is not None and not self._is_binary_with(number):
                boolean = pl.zeros(len(number), pl.Boolean, eager=True)  # each costs its row, as in a request
            non_number = (number.is_null() & ~(text.is_null() | lower.is_in(MISSING) | boolean)).arg_true()
            if boolean.any():
                first = int(boolean.arg_true()[0])
                self.first_boolean = self.first_boolean or NonNumericCell(row + first, text[first], "text")
                number = pl.select(
                    pl.when(boolean).then(lower.is_in(TRUE).cast(pl.Float64)).otherwise(number)
                ).to_series()
            if len(non_number):
                self.non_numbers += len(non_number)
                first = int(non_number[0])
                kind = "dates" if DATE.fullmatch(text[first]) else "text"
                self.first_non_number = self.first_non_number or NonNumericCell(row + first, text[first], kind)
                if self.other_cells is not None:
                    self.other_cells += [NonNumericCell(row + index, text[index], "text") for index in non_number]
        return number.fill_null(float("nan")).to_numpy()

    def _is_binary_with(self, number: "pl.Series") -> bool:
        """Return whether 0 and 1 are the only numbers among the cells read so far and in `number`."""
        return self.binary and bool(number.drop_nulls().drop_nans().is_in([0.0, 1.0]).all())

    def _read_typed(self, cells: "pl.Series", row: int) -> Floats:
        import polars as pl

        dtype, present = cells.dtype, len(cells) - cells.null_count()
        first = int(cells.is_not_null().arg_max() or 0)  # index of the first cell that is present
        if dtype == pl.Boolean and present:
            self.first_boolean = self.first_boolean or NonNumericCell(row + first, cells[first], "booleans")
        if dtype.is_numeric() or dtype in (pl.Null, pl.Boolean):
            return cells.cast(pl.Float64).fill_null(float("nan")).to_numpy()
        if present:
            value = cells.slice(first, 1).to_list()[0]
            if dtype in (pl.String, pl.Categorical, pl.Enum):
                kind = "dates" if DATE.fullmatch(value.strip()) else "text"
            else:
                kind = "dates" if dtype in (pl.Date, pl.Datetime, pl.Time) else str(dtype)
            self.first_non_number = self.first_non_number or NonNumericCell(row + first, value, kind)
            self.non_numbers += present
        return np.full(len(cells), np.nan)


def choose_columns(header: Sequence[str], path: Path, options: ReadOptions, typed: bool) -> list[Column]:
    """Return the columns to read: the features, and if `options.tolerant` is set, the extra columns.

    Args:
        header: the column names in the file, with units in brackets.
        typed: whether the file declares the types of its columns.

    Raises:
        DataError: a column that an option names does not exist, or no column remains.
    """
    columns = _parse_header(header, path, typed)
    names = [column.name for column in columns]
    if options.names is not None:
        indices = _find_columns(names, options.names, path)
        if options.tolerant:
            extra = [name for name in options.extra if name in names and name not in options.names]
            indices += map(names.index, dict.fromkeys(extra))
        known = {category.name: KnownLevels(category) for category in options.categories}
        for name in options.names:
            columns[names.index(name)].known = known.get(name)
        return [columns[index] for index in indices]
    for purpose, listed in (
        ("drop", options.drop),
        ("keep", options.keep),
        ("read as labels", options.label),
        ("read as a category", options.category),
    ):
        if unknown := [name for name in listed if name not in names]:
            raise DataError(f"{path} has no column {unknown[0]!r} to {purpose}: {_similar_names(unknown[0], names)}")
    if both := [name for name in options.label if name in {*options.drop, *options.keep}]:
        other = "--keep" if both[0] in options.keep else "--drop"
        raise DataError(f"{path}: --label and {other} both name {both[0]!r}: a label is no feature, so leave one out")
    others = {*options.drop, *options.label, *options.condition, options.time, options.group}
    kept = [column for column in columns if column.name not in others]
    for column in kept:
        column.levels = LevelReader(is_forced=column.name in options.category)
    if not kept and options.label:
        raise DataError(f"{path} has no column except labels: expected measurements to learn from")
    if not kept:
        reason = "are dropped" if options.time is None else "are dropped, or are times and groups"
        raise DataError(f"{path}: all {len(names)} columns {reason}: keep at least one to learn from")
    return kept


def _similar_names(name: str, names: Sequence[str]) -> str:
    """Return a hint for a user who gave `name`: the columns in `names` that are called similarly, or else `names`."""
    similar = difflib.get_close_matches(name, names, n=3)
    return f"did you mean {' or '.join(map(repr, similar))}?" if similar else f"it has {join_names(names)}"


def choose_timeline_columns(header: Sequence[str], path: Path, options: ReadOptions) -> TimelineReader | None:
    """Return a reader of the columns that hold the time and the group of a row; None if no option names them.

    Raises:
        DataError: a column does not exist although it must, or options contradict each other.
    """
    if options.time is None:
        return None
    names = [column.name for column in _parse_header(header, path, typed=False)]
    wanted = [("--time", options.time)] + ([] if options.group is None else [("--group", options.group)])
    for option, name in wanted:
        if name not in names and not options.timeline_optional:
            raise DataError(f"{path} has no column {name!r} for {option}: {_similar_names(name, names)}")
        for other, listed in (("--keep", options.keep), ("--label", options.label)):
            if name in listed:
                raise DataError(f"{path}: {option} and {other} both name {name!r}: leave one out")
    if options.time not in names:
        return None
    group = options.group if options.group in names else None
    return TimelineReader(
        path,
        TimeColumn(options.time, names.index(options.time)),
        None if group is None else GroupColumn(group, names.index(group)),
    )


def choose_condition_columns(header: Sequence[str], path: Path, options: ReadOptions) -> list[ConditionReader]:
    """Return readers of the columns of conditions. In training, the file must have all of them.

    Raises:
        DataError: a column does not exist although it must, or options contradict each other.
    """
    names = [column.name for column in _parse_header(header, path, typed=False)] if options.condition else []
    in_training = options.names is None
    for name in options.condition if in_training else ():
        if name not in names:
            raise DataError(f"{path} has no column {name!r} for --condition: {_similar_names(name, names)}")
        for other, listed in (("--keep", options.keep), ("--drop", options.drop)):
            if name in listed:
                raise DataError(
                    f"{path}: --condition and {other} both name {name!r}: a condition is no feature, so leave one out"
                )
    present = [name for name in options.condition if name in names]
    return [ConditionReader(path, name, names.index(name), limited=in_training) for name in present]


def _parse_header(header: Sequence[str], path: Path, typed: bool) -> list[Column]:
    """Return the columns of the file: `load [%]` is the column "load" with the unit "%"."""
    columns: list[Column] = []
    positions: dict[str, int] = {}
    for index, title in enumerate(header):
        name, unit = parse_title(title)
        if not name:
            raise DataError(f"{path}: column {index + 1} has no name: name it (pandas: write with index=False)")
        if name in positions:
            first = positions[name] + 1
            raise DataError(f"{path}: columns {first} and {index + 1} are both named {name!r}: rename one")
        positions[name] = index
        columns.append(Column(name, unit, index, typed))
    return columns


def _find_columns(names: Sequence[str], wanted: Sequence[str], path: Path) -> list[int]:
    """Return the indices of the wanted columns."""
    indices = {name: index for index, name in enumerate(names)}
    absent = [name for name in wanted if name not in indices]
    if absent:
        raise DataError(
            f"{path} lacks {len(absent)} of the model's {len(wanted)} columns (the first is {absent[0]!r}): "
            f"expected a column of that name, got {join_names(names)}"
        )
    return [indices[name] for name in wanted]


def choose_label_column(header: Sequence[str], path: Path, options: ReadOptions) -> LabelReader | None:
    """Return a reader of the label column, or None if there is none.

    The label column is the first column of `options.label` that the file has. If the file has none of these, the label
    column is one that is named like labels and is not a feature. In training, `build_raw_table` then examines its
    cells: if they do not look like labels, the column is a feature.
    """
    if options.tolerant:
        return None
    others = {*(options.names or ()), *options.drop, *options.keep, options.time, options.group}
    names = [column.name for column in _parse_header(header, path, typed=False)]
    given = [name for name in options.label if name in names and name not in others]
    name = given[0] if given else find_label_column([name for name in names if name not in others])
    return None if name is None else LabelReader(name, names.index(name))


def build_raw_table(
    frames: "Iterator[pl.DataFrame]",
    columns: list[Column],
    labels: LabelReader | None,
    options: ReadOptions,
    path: Path,
    rows: int | None,
    lines: LineNumbers | None = None,
    notes: list[str] | None = None,
    details: BlockDetails | None = None,
    timeline: TimelineReader | None = None,
    conditions: Sequence[ConditionReader] = (),
) -> RawTable:
    """Return the table in `frames`. Each frame has the columns of the file.

    Args:
        columns: the result of `choose_columns`.
        labels: the label column, if there is one. In training, it is a feature if its cells are no labels.
        rows: the number of rows, possibly estimated.
        lines: the lines of the rows, for text files; None for other files. Complete when `frames` is exhausted.
        notes: notes for the user; the list grows while `frames` is iterated.
        details: where `frames` records faulty rows if `options.tolerant` is set.
        timeline: the columns of times and groups, if there are any.
        conditions: the columns of conditions.

    Raises:
        DataError: no feature remains.
    """
    features = columns if options.names is None else columns[: len(options.names)]
    notes = [] if notes is None else notes
    if labels is not None and (first := next(frames, None)) is not None:
        frames = chain([first], frames)
        cells = first.to_series(labels.index)
        if cells.dtype.is_nested():
            if labels.name in options.label:
                raise DataError(f"{path}: column {labels.name!r} holds lists: expected one label in each row")
            labels = None  # lists are no labels
        elif labels.name in options.label:
            pass  # the user says that these are labels
        elif options.names is None or is_status_name(labels.name):
            labels = labels if look_like_labels(labels.name, cells.cast(str).unique().to_list()) else None
    is_read_otherwise = labels is not None and labels.name in {*options.label, *options.condition}
    if labels is not None and options.names is None and not is_read_otherwise:
        features = [column for column in features if column.name != labels.name]
        notes.append(
            f"column {labels.name!r} holds labels, so it is not a feature: "
            f"add {format_option('--keep', [labels.name])} to learn from it"
        )
    if options.names is None:
        if not features:
            raise DataError(f"{path} has no column except labels: expected measurements to learn from")
        notes += [
            _note_on_labels(column.name)
            for column in features
            if is_label_name(column.name) and column.name not in options.keep
        ]
    categories: dict[str, LevelReader] = {}
    check = _ColumnCheck(path, options, lines, notes, categories)
    details = details or BlockDetails()
    if options.tolerant:
        blocks = _read_blocks_tolerantly(frames, columns, len(features), details, check)
    else:
        blocks = _read_blocks(frames, features, labels, timeline, conditions, check)
    return RawTable(
        blocks=blocks,
        shape=(sum(len(column.feature_names) for column in features),),
        rows=rows,
        names=[name for column in features for name in column.feature_names],
        units=[column.unit for column in features for _ in column.feature_names],
        has_header=True,
        lines=lines,
        extra=tuple(column.name for column in columns[len(features) :]) if options.tolerant else (),
        details=details,
        label_column=None if labels is None else labels.name,
        label_names=None if labels is None else labels.texts,
        timeline=timeline,
        conditions=conditions,
        categories=categories,
        notes=notes,
    )


def _note_on_labels(name: str) -> str:
    return f"column {name!r} is a feature: if it holds labels, add {format_option('--drop', [name])}"


def _read_blocks(
    frames: "Iterator[pl.DataFrame]",
    features: list[Column],
    labels: LabelReader | None,
    timeline: TimelineReader | None,
    conditions: Sequence[ConditionReader],
    check: "_ColumnCheck",
) -> Iterator[Block]:
    row = 0
    for frame in frames:
        values = np.concatenate([_read_features(column, frame, row) for column in features], axis=1)
        if timeline is not None:
            timeline.read(frame)
        for condition in conditions:
            condition.read(frame.to_series(condition.index))
        yield values, None if labels is None else labels.read(frame.to_series(labels.index))
        row += frame.height
    check.finish(features)


def _read_features(
    column: Column, frame: "pl.DataFrame", row: int, unknown_levels: dict[int, list[tuple[str, str]]] | None = None
) -> Floats:
    """Return the features [n, 1], or [n, L] for a category, of one column. `row`: the number of the first row.

    If `unknown_levels` is given, record there the levels that the model does not know.
    """
    cells = frame.to_series(column.index)
    if column.known is None:
        return column.read(cells, row)[:, None]
    codes = column.known.codes(cells)
    if unknown_levels is not None:
        for place in np.flatnonzero(codes == UNKNOWN_LEVEL).tolist():
            unknown_levels.setdefault(row + place, []).append((column.name, str(cells[place]).strip()))
    return one_hot(codes, len(column.known.category.levels)).astype(np.float64)


def _read_numeric_columns(columns: Sequence[Column], frame: "pl.DataFrame") -> Floats | None:
    """Return columns of a frame [n, D], with NaN for missing values; None if a column is a category, or not numeric.

    Reading them together takes a sixth of the time of reading them one by one.
    """
    import polars as pl

    types = frame.dtypes
    if any(column.known is not None or not types[column.index].is_numeric() for column in columns):
        return None
    selected = frame.select(pl.nth([column.index for column in columns]))
    if selected.dtypes != [pl.Float32] * len(columns):
        selected = selected.cast(pl.Float64)
    values = selected.to_numpy()
    for column, cells in zip(columns, values.T, strict=True):
        column.note_whether_binary(cells)
    return values


def _read_blocks_tolerantly(
    frames: "Iterator[pl.DataFrame]",
    columns: list[Column],
    width: int,
    details: BlockDetails,
    check: "_ColumnCheck",
) -> Iterator[Block]:
    """Yield the first `width` columns as features.

    Record unknown levels, faulty cells, and the cells of the other columns.
    """
    row = 0
    for frame in frames:
        numbers = _read_numeric_columns(columns[:width], frame)
        features = [] if numbers is None else [numbers]
        for column in columns[:width] if numbers is None else ():
            column.other_cells = []
            features.append(_read_features(column, frame, row, details.unknown_levels))
            if column.typed and column.first_non_number:
                check.refuse_cell(column, column.first_non_number, "convert the column to numbers")
            for cell in column.other_cells:
                fault = f"column {column.name!r}: expected a number, got {_shorten(cell.value)}"
                if advice := _advice_on_notation(cell.value):
                    fault += f": {advice}"
                details.faults.setdefault(cell.row, fault)
        for position in range(width, len(columns)):
            details.cells[columns[position].name] = frame.to_series(columns[position].index)
        yield np.concatenate(features, axis=1), None
        details.faults.clear()
        details.unknown_levels.clear()
        row += frame.height


@dataclass(frozen=True)
class _ColumnCheck:
    """Refuses columns that are not measurements, and adds notes on boolean columns, after all rows have been read.

    `categories` gets the columns of text that are categories.
    """

    path: Path
    options: ReadOptions
    lines: LineNumbers | None
    notes: list[str]
    categories: dict[str, LevelReader]

    def finish(self, columns: Sequence[Column]) -> None:
        """Raise DataError if a column does not contain measurements."""
        for column in columns:
            if self._is_text(column):
                continue
            if column.first_non_number and (advice := _advice_on_notation(column.first_non_number.value)):
                self.refuse_cell(column, column.first_non_number, advice)
            mostly_numbers = column.digits > column.non_numbers
            if column.first_non_number and (self.options.names is not None or mostly_numbers):
                option = format_option("--category", [column.name])
                advice = "" if column.levels is None else f"; if its values are names, add {option}"
                self.refuse_cell(column, column.first_non_number, f"{CORRECTION}{advice}")
            if column.first_boolean and not column.binary:
                self.refuse_cell(column, column.first_boolean, "write 0 and 1")
        if self.options.names is None:
            self._refuse_other_columns(columns)
            self._note_repeated_identifiers(columns)
            self.notes.extend(
                _note_on_labels(column.name)
                for column in columns
                if column.binary and not is_label_name(column.name) and ends_like_label_name(column.name)
                if column.name not in self.options.keep
            )
        booleans = [column.name for column in columns if column.first_boolean and column.name not in self.categories]
        if booleans:
            self.notes.append(f"true and yes are read as 1, false and no as 0: {join_names(booleans)}")

    def _is_text(self, column: Column) -> bool:
        """Return whether `column` holds text that may be levels of a category."""
        if column.levels is None or column.name in self.options.category:
            return column.levels is not None
        cell = column.first_non_number
        return (
            cell is not None
            and cell.kind == "text"
            and column.digits <= column.non_numbers
            and _advice_on_notation(cell.value) is None
        )

    def _note_repeated_identifiers(self, columns: Sequence[Column]) -> None:
        found = [
            column.name
            for column in columns
            if REPEATED_IDENTIFIER_NAME.fullmatch(column.name)
            and column.name not in self.categories
            and column.identifier.integers
            and not column.binary
            and column.name not in self.options.keep
        ]
        if found:
            self.notes.append(
                f"{join_names(found)} {'is a feature' if len(found) == 1 else 'are features'}: a model flags all rows "
                f"with new identifiers, so if this is what they are, add {format_option('--drop', found)}"
            )

    def refuse_cell(self, column: Column, cell: NonNumericCell, advice: str) -> None:
        """Raise DataError for a cell that is not a number."""
        got = f"{_shorten(cell.value)} in {describe_row(cell.row, self.lines)}"
        if column.typed:
            got = f"{cell.kind} ({got})"
        raise DataError(f"{self.path}: column {column.name!r}: expected numbers, got {got}: {advice}")

    def _refuse_other_columns(self, columns: Sequence[Column]) -> None:
        """If there are columns of text, dates or identifiers, raise a DataError that names all of them."""
        texts = {}
        for column in columns:
            cell, reason = column.first_non_number, None
            if column.levels is not None and self._is_text(column):
                reason = column.levels.refusal()
                if reason is None:
                    self.categories[column.name] = column.levels
                    continue
            where = "" if cell is None else f"{_shorten(cell.value)} in {describe_row(cell.row, self.lines)}"
            if cell is not None:
                is_plain = reason is None or reason == cell.kind
                texts[column.name] = f"{cell.kind}, {where}" if is_plain else f"{reason}, such as {where}"
            elif reason is not None:
                texts[column.name] = reason
        identifiers = {
            column.name: reason
            for column in columns
            if column.name not in self.options.keep
            and column.name not in texts
            and column.name not in self.categories
            and (reason := column.identifier.reason())
        }
        reasons = texts | identifiers
        if not reasons:
            return
        refused = {column.name: reasons[column.name] for column in columns if column.name in reasons}
        error = refusal(self.path, refused, list(identifiers))
        hint = self._hint_at_timeline([column for column in columns if column.name in refused])
        raise DataError(f"{error}; {hint}") if hint else error

    def _hint_at_timeline(self, columns: Sequence[Column]) -> str | None:
        """Return a hint to use one of the refused `columns` as time or group, or None if none looks like one."""
        texts = [column for column in columns if column.first_non_number and column.first_non_number.kind == "text"]
        if self.options.time is None:
            times = [
                column
                for column in columns
                if (column.first_non_number and column.first_non_number.kind == "dates")
                or (column.identifier.has_time_name and not column.first_non_number)
            ]
            option = format_option("--time", [times[0].name]) if times else ""
            return f"if {times[0].name!r} is the time of a row, use it with {option}" if times else None
        if self.options.group is None and texts:
            option = format_option("--group", [texts[0].name])
            return f"if {texts[0].name!r} names the host of a row, use it with {option}"
        return None


def refusal(path: Path, reasons: Mapping[str, str], keepable: Sequence[str]) -> DataError:
    """Return the error that the columns in `reasons` are not measurements, and what to do.

    Args:
        reasons: why each column is refused, in the order of the columns.
        keepable: the columns that --keep accepts.
    """
    listed = ", ".join(f"{name!r} ({reason})" for name, reason in reasons.items())
    subject = f"column {listed} is not a measurement" if len(reasons) == 1 else f"columns {listed} are not measurements"
    advice = f"add {format_option('--drop', list(reasons))}"
    if keepable:
        advice += f", or {format_option('--keep', keepable)} to learn from {join_names(keepable)} anyway"
    return DataError(f"{path}: {subject}: {advice}")


def _advice_on_notation(value: Any) -> str | None:
    """Return how to write `value` as a number if it is one in a notation that is not read; None otherwise."""
    if not isinstance(value, str):
        return None
    return next((advice for notation, advice in NOTATIONS if notation.fullmatch(value.strip())), None)


def _shorten(value: Any) -> str:
    text = repr(value) if isinstance(value, str | list) else str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
