"""Rows for `elbo score`, read as a stream: a faulty row costs only itself, and the first rows come at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from models.categories import CategoryColumns
from models.errors import join_names
from models.manifest import MAX_LEVEL_NAME, ConditionColumn, Conditions, Manifest
from models.timestamps import to_unix_seconds
from training.data.conditions import LISTED_LEVELS, NO_LEVEL, code_cells, missing_column, one_hot
from training.data.ingest import full_disk_as_data_error
from training.data.readers import InMemory, RawTable
from training.data.row_store import Floats, all_finite
from training.data.table import open_for_model
from training.errors import DataError

if TYPE_CHECKING:
    import polars as pl

    from training.data.readers import SourcePart

T = TypeVar("T")
BATCH_ROWS = 1024
TIME, GROUP = "timestamp", "host"  # default names of the columns that are passed on, as in requests


@dataclass(frozen=True)
class StreamedRows:
    """Up to `RowStream.batch_rows` consecutive rows."""

    first: int  # number of the first row
    x: Floats  # [B, D], raw units; medians replace faulty rows, and missing values that the model cannot score
    missing: npt.NDArray[np.bool_]  # [B, D] whether the source has no value
    faults: dict[int, str]  # by position in x: why the row cannot be scored
    time: list[float | str | None] | None  # [B] Unix seconds, or the text as it is if it is not a timestamp
    group: list[str | None] | None  # [B]
    condition: Floats | None = None  # [B, C], one-hot; None if the model knows no conditions
    # By position in x: the column and the text of each level that the model does not know.
    unknown_levels: dict[int, list[tuple[str, str]]] = field(default_factory=dict)
    passed_on: "dict[str, pl.Series]" = field(default_factory=dict)  # by name: the cells [B] of `RowStream.passed_on`

    @property
    def inputs(self) -> Floats:
        """The inputs of a model that judges each row alone: the rows, [B, D], or with their conditions, [B, D + C]."""
        return self.x if self.condition is None else np.concatenate((self.x, self.condition), axis=1)


@dataclass(frozen=True)
class RowStream:
    """The rows of a source. They are read while `batches` is iterated."""

    source: str
    names: list[str]  # names of the D features
    total: int | None  # number of rows, possibly estimated
    time: str | None  # name of the column of times; None if the source has none
    group: str | None  # name of the column of groups; None if the source has none
    raw: RawTable = field(repr=False)
    medians: Floats = field(repr=False)  # [D]
    may_be_missing: npt.NDArray[np.bool_] = field(repr=False)  # [D] whether values were missing in training
    keeps_gaps: bool = False  # whether NaN stays in the place of a missing value
    known: Conditions | None = None  # the conditions that the model knows
    columns: CategoryColumns | None = None  # the columns of the table, if some are categories
    passed_on: tuple[str, ...] = ()  # the columns whose cells are passed on as they are, besides times and groups
    batch_rows: int = BATCH_ROWS

    @property
    def notes(self) -> list[str]:
        """What the user should know before the first row: columns of conditions that the source does not have."""
        if self.known is None or not self.raw.has_header:
            return []
        return [missing_column(column.name) for column in self.known.columns if column.name not in self.raw.extra]

    @property
    def max_missing(self) -> int:
        """The number of values that a row may lack among the features that always had a value in training.

        If the source names its columns, the number is half of these features, rounded down, as in requests. Otherwise
        it is 0.
        """
        return self._count(~self.may_be_missing) // 2 if self.raw.has_header else 0

    def _count(self, features: npt.NDArray[np.bool_]) -> int:
        """Return the number of columns of the `features` [..., D]. A category is one column."""
        return len(self._column_names(features))

    def _column_names(self, features: npt.NDArray[np.bool_]) -> list[str]:
        names = [self.names[place] for place in np.flatnonzero(features)]
        return names if self.columns is None else list(dict.fromkeys(self.columns.column_of[name] for name in names))

    def batches(self) -> Iterator[StreamedRows]:
        """Yield all rows in order.

        Raises:
            DataError: the source is damaged, so that its further rows cannot be told apart.
        """
        row = 0
        with full_disk_as_data_error(self.source):
            for block, labels in self.raw.blocks:
                for start in range(0, len(block), self.batch_rows):
                    of_batch = None if labels is None else labels[start : start + self.batch_rows]
                    yield self._batch(block[start : start + self.batch_rows], of_batch, row, start)
                row += len(block)
        if row == 0:
            raise DataError(
                f"{self.source} has no rows of numbers (shape [0, {len(self.names)}]): expected at least one"
            )

    def _batch(self, values: npt.NDArray[Any], labels: npt.NDArray[Any] | None, row: int, start: int) -> StreamedRows:
        """Return a batch of the block that begins at `row`. The batch begins at position `start` in the block."""
        first, details = row + start, self.raw.details
        with np.errstate(over="ignore", invalid="ignore"):
            x = values.astype(np.float32, order="C")  # a copy
        faults = _of_batch(details.faults, first, len(values))
        if all_finite(x) and not faults:
            missing = np.zeros(x.shape, bool)
        else:
            x, missing = self._without_faulty_values(values, x, faults)

        def cells(name: str | None) -> list[Any] | None:
            return None if name is None else details.cells[name][start : start + len(values)].to_list()

        condition = None
        if self.known is not None:
            codes = np.full((len(values), len(self.known.columns)), NO_LEVEL)
            for index, known in enumerate(self.known.columns):
                found = self._levels(known, labels, cells)
                if found is not None:
                    codes[:, index], unknown = code_cells(known.levels, found)
                    for position in unknown:
                        faults.setdefault(position, _unknown_level(known, found[position]))
            condition = one_hot(self.known, codes)
        times, groups = cells(self.time), cells(self.group)
        return StreamedRows(
            first=first,
            x=x,
            missing=missing,
            faults=faults,
            time=None if times is None else [_time(cell) for cell in times],
            group=None if groups is None else [None if cell in (None, "") else str(cell) for cell in groups],
            condition=condition,
            unknown_levels=_of_batch(details.unknown_levels, first, len(values)),
            passed_on={name: details.cells[name][start : start + len(values)] for name in self.passed_on},
        )

    def _without_faulty_values(
        self, values: npt.NDArray[Any], x: Floats, faults: dict[int, str]
    ) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Return x [B, D] as in `StreamedRows`, and a mask [B, D] of its missing values.

        Args:
            values: the rows as they were read, [B, D].
            x: the same in float32; it may be changed.
            faults: gets the rows that cannot be scored.
        """
        infinite, missing = np.isinf(x), np.isnan(x)
        for position in np.flatnonzero(missing.all(axis=1)).tolist():
            faults.setdefault(position, "the row has no value in any column")
        imputed = missing & ~self.may_be_missing
        for position in np.flatnonzero(imputed.sum(axis=1) > self.max_missing).tolist():
            self._add_missing(faults, position, imputed[position])
        for position, column in np.argwhere(infinite).tolist():
            faults.setdefault(position, self._infinite(column, float(values[position, column])))
        if self.keeps_gaps:
            x[list(faults)] = self.medians
        else:
            x = np.where(infinite | imputed, self.medians, x)
        return x, missing

    def _levels(
        self,
        column: ConditionColumn,
        labels: npt.NDArray[Any] | None,
        cells: Callable[[str | None], list[Any] | None],
    ) -> list[Any] | None:
        """Return the cells of a column of conditions in a batch; None if the source has no such column.

        In a source without columns, the labels are the condition.
        """
        if self.raw.has_header:
            return cells(column.name) if column.name in self.raw.extra else None
        names = self.raw.label_names
        return None if labels is None else [label if names is None else names[label] for label in labels.tolist()]

    def _add_missing(self, faults: dict[int, str], position: int, imputed: npt.NDArray[np.bool_]) -> None:
        """Add the fault of a row that lacks too many columns. `imputed` [D] are features that training rows all had."""
        if len(names := self._column_names(imputed)) > self.max_missing:
            faults.setdefault(position, self._too_many_missing(names))

    def _too_many_missing(self, names: list[str]) -> str:
        """Return the fault of a row that lacks values in the columns `names`, which were complete in training."""
        if not self.max_missing:
            return f"column {names[0]!r} has no value: the model was trained without missing values in this column"
        required = self._count(~self.may_be_missing)
        return (
            f"the row has no value for {join_names(names)}: expected numbers in at least "
            f"{required - self.max_missing} of the {required} columns that always had a value in training"
        )

    def _infinite(self, column: int, value: float) -> str:
        limit = ", beyond the range of float32 (3.4e38)" if np.isfinite(value) else ""
        return f"column {self.names[column]!r} has the value {value}{limit}: expected a finite number"


def _of_batch(details: Mapping[int, T], first: int, count: int) -> dict[int, T]:
    """Return the details of the `count` rows from row `first` on, by position instead of row."""
    return {number - first: detail for number, detail in details.items() if first <= number < first + count}


def _unknown_level(column: ConditionColumn, level: Any) -> str:
    known = join_names([repr(each) for each in column.levels], LISTED_LEVELS)
    return f"column {column.name!r} has the value {str(level)[:MAX_LEVEL_NAME]!r}: expected one of {known}"


def stream_for_model(
    source: str | InMemory,
    manifest: Manifest,
    *,
    time: str | None = None,
    group: str | None = None,
    escape: str | None = None,
    keeps_gaps: bool = False,
    ids: Sequence[str] = (),
    part: "SourcePart | None" = None,
) -> RowStream:
    """Open the rows in `source` in the form that the model of `manifest` takes.

    Args:
        source: as for `read_for_model`.
        manifest: the manifest of the model.
        time: name of the column of times; by default that of the training rows, or TIME, if the source has it.
        group: name of the column of groups; by default that of the training rows, or GROUP, if the source has it.
        escape: as for `read_for_model`.
        keeps_gaps: leave NaN in the place of missing values, because the model can score rows with missing values.
        ids: columns whose cells are passed on as they are, besides times and groups.
        part: the part of a .npy, CSV or Parquet file to read; None for the whole.

    Raises:
        DataError: the source cannot be used, or lacks the column `time` or `group` or one of `ids`.
    """
    trained = manifest.timeline
    times = [time] if time else [TIME] if trained is None else [trained.time_column, TIME]
    groups = (
        [group] if group else [GROUP] if trained is None or not trained.group_column else [trained.group_column, GROUP]
    )
    known = manifest.conditions
    conditions = [] if known is None else [column.name for column in known.columns]
    extra = (*times, *groups, *conditions, *ids)
    raw = open_for_model(source, manifest, escape=escape, tolerant=True, extra=extra, part=part)
    present = raw.extra
    if unknown := [name for name in ids if name not in present]:
        raise DataError(f"{source} has no column {unknown[0]!r} besides the features: correct --id, or leave it out")
    for option, name in (("--time", time), ("--group", group)):
        if name is not None and name not in present:
            raise DataError(f"{source} has no column {name!r} besides the features: correct {option}, or leave it out")
    return RowStream(
        source=str(source),
        names=[feature.name for feature in manifest.features],
        total=raw.rows,
        time=next((name for name in times if name in present), None),
        group=next((name for name in groups if name in present), None),
        raw=raw,
        medians=np.array([feature.median for feature in manifest.features], np.float32),
        may_be_missing=np.array([feature.missing > 0 for feature in manifest.features]),
        keeps_gaps=keeps_gaps,
        known=known,
        columns=manifest.category_columns,
        passed_on=tuple(ids),
    )


def _time(cell: Any) -> float | str | None:
    """Return a time as Unix seconds. Return text that is not a timestamp as it is."""
    if cell in (None, ""):
        return None
    value = cell if isinstance(cell, int | float | str) else str(cell)
    seconds = to_unix_seconds(value)
    return seconds if seconds == seconds else str(value)
