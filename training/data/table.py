"""The table that every model is trained on: rows in raw units, with the names of their features.

`read_table` reads and checks a source. `read_for_model` reads and checks rows that an existing model will score.
`split_rows` divides the rows into fit rows, held-out rows and calibration rows.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models.errors import join_names
from models.manifest import SERIES_CORRELATION
from training.data.categories import RowsWithLevels, place_categories
from training.data.conditions import (
    CodedConditions,
    ConditionValues,
    RowsWithConditions,
    check_levels,
    code_conditions,
    sorted_levels,
)
from training.data.copies import Copies, find_copies
from training.data.ingest import ColumnStatistics, full_disk_as_data_error, ingest
from training.data.labels import Labels, interpret
from training.data.layout import PIXEL_RANGES, Layout, recognise
from training.data.readers import InMemory, RawTable, ReadOptions, SourcePart, format_option, load
from training.data.readers.columns import refusal
from training.data.readers.row_order import RISES, OrderDetector
from training.data.row_store import RowStore, reorder
from training.data.sentinels import describe_sentinels
from training.data.series import Resemblance, find_resemblance, neighbour_correlations
from training.data.timeline import Timeline
from training.errors import DataError

if TYPE_CHECKING:
    from models.manifest import Category, Manifest

__all__ = ["MINIMUM_ROWS", "DataError", "Split", "Table", "read_for_model", "read_table", "rows_of_group", "split_rows"]

MEMORY_BYTES = 512 << 20  # tables with more bytes of float32 values stay on disk
MINIMUM_ROWS = 10  # with fewer rows, a part of the split would be empty
# The held-out set and the calibration set are kept in memory, so each has at most this many rows and this many bytes of
# float32 values. More rows would improve neither validation nor calibration.
MAX_HELD_OUT_ROWS = 50_000
MAX_HELD_OUT_BYTES = 64 << 20
MIN_DISTINCT = 256  # a note warns if float32 has fewer distinct values than this in the range of a column
MAX_EXACT_INTEGER = 2.0**24  # float32 holds all integers up to this value
FEW_GREYS = 16  # bytes up to this value are masks or images of few grey levels, and not dark images from 0 to 255
CHECKED_GROUPS = 5  # a column that rises, or falls, with the time in each of this many largest groups is a counter
FEW_VALUES = 10  # a note warns if a column has fewer values than this, and this many missing values or more
LISTED_NAMES = 3  # number of features that a note lists before "and N more"
SERIES_ADVICE = (
    "The false-alarm rate is promised only for rows exchangeable with the calibration rows, and rows of other days are "
    "not: expect many more false alarms on them. If the file has a column with the time of the rows, train with --time "
    "COLUMN (and --group COLUMN if it has rows of several hosts): the rows are then split by time, and the newest "
    "calibrate. Otherwise take days that are not in the file, measure the rate on them with elbo evaluate, and "
    "calibrate on them with elbo calibrate"
)


@dataclass(frozen=True)
class Table:
    """Rows in raw units: finite numbers, and NaN where a value is missing."""

    x: RowStore  # [N, D], in memory or on disk
    shape: tuple[int, ...]  # shape of one row; the product is D
    names: list[str]  # names of the D features
    units: list[str | None]  # units of the D features; None where unknown
    labels: npt.NDArray[np.int64] | None  # [N] if every row has a label; never used to train
    pixel_range: tuple[float, float] | None  # images only: the raw values of black and white
    source: str  # as given by the user
    notes: list[str] = field(default_factory=list)  # what the user should know about the data
    missing: npt.NDArray[np.int64] = field(kw_only=True)  # [D] number of missing values
    label_names: list[str] | None = field(default=None, kw_only=True)  # the meaning of labels 0, 1, ..., if known
    # [N] whether the label of a row means normal or anomalous. Both are false for a row without a label, and both are
    # None if the source has no labels, or if it is unknown which labels mean normal.
    normal: npt.NDArray[np.bool_] | None = field(default=None, kw_only=True)
    anomalous: npt.NDArray[np.bool_] | None = field(default=None, kw_only=True)
    # A warning if the rows are for a model of images but their pixel range is not the model's.
    pixel_warning: str | None = field(default=None, kw_only=True)
    present_labels: list[str] = field(default_factory=list, kw_only=True)  # the different labels of the source
    # When each row was measured, and its group; None if the times are unknown. If there is a timeline, the rows are
    # sorted by group and time.
    timeline: Timeline | None = field(default=None, kw_only=True)
    # The columns of text: their features, one per level, are the last ones.
    categories: tuple["Category", ...] = field(default=(), kw_only=True)
    conditions: tuple[ConditionValues, ...] = field(default=(), kw_only=True)  # the columns of --condition
    # The conditions as a model gets them, if the rows were read for a model that knows conditions; otherwise None.
    coded: CodedConditions | None = field(default=None, kw_only=True)

    @property
    def inputs(self) -> RowStore:
        """The inputs of the model for which the rows were read: [N, D]; [N, D + C] if it knows conditions."""
        return self.x if self.coded is None else RowsWithConditions(self.x, self.coded)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the row shape, the feature names, the values, and of the times, groups and conditions.

        The digits are hexadecimal.
        """
        digest = hashlib.sha256(json.dumps([self.shape, self.names]).encode())
        for _, rows in self.x.blocks():
            values = np.ascontiguousarray(rows, dtype="<f4")
            values[np.isnan(values)] = np.nan  # NaN has many bit patterns: give every NaN the same one
            digest.update(values.data)
        if self.timeline is not None:
            digest.update(np.ascontiguousarray(self.timeline.time, "<i8").data)
            digest.update(np.ascontiguousarray(self.timeline.group, "<i4").data)
            digest.update(json.dumps(self.timeline.groups).encode())
        for column in self.conditions:
            digest.update(json.dumps([column.name, column.levels]).encode())
            digest.update(np.ascontiguousarray(column.codes, "<i4").data)
        return digest.hexdigest()

    @cached_property
    def copies(self) -> Copies:
        """Which rows are copies of each other."""
        return find_copies(self.x)

    @cached_property
    def neighbour_correlations(self) -> npt.NDArray[np.float64]:
        """For each column, the rank correlation between a distinct row and the next distinct row in the file, [D]."""
        return neighbour_correlations(self.x, self.copies.first_rows, self.labels)

    @cached_property
    def resemblance(self) -> Resemblance:
        """How much rows resemble rows shortly before them in the file; 0 if the rows are known to be a series."""
        if self.timeline is not None or self.neighbour_correlations.max() >= SERIES_CORRELATION:
            return Resemblance(0.0, 0)  # known to be a series
        return find_resemblance(self.x, self.copies.first_rows, self.labels)

    @cached_property
    def warnings(self) -> list[str]:
        """What the user should know about rows that depend on each other, because the false-alarm rate suffers."""
        warnings = []
        if self.copies.distinct < len(self.x):
            warnings.append(_describe_copies(self.copies, len(self.x), self.timeline is not None))
        if self.timeline is not None:
            return warnings  # no further warning: the rows are split as a series should be
        if self.neighbour_correlations.max() >= SERIES_CORRELATION:
            warnings.append(_describe_series(self.names, self.neighbour_correlations))
        elif self.resemblance.correlation >= SERIES_CORRELATION:
            warnings.append(_describe_resemblance(self.resemblance))
        return warnings

    @property
    def series_correlation(self) -> float:
        """The largest rank correlation between a row and a row near it in the file; 0 if it may be a coincidence."""
        return max(float(self.neighbour_correlations.max()), self.resemblance.correlation)


@dataclass(frozen=True)
class Split:
    """Three disjoint sets of row indices, each in random order.

    Together they contain all rows, except for further copies of held-out and calibration rows.
    """

    fit: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    calibration: npt.NDArray[np.int64]


def split_rows(count: int, seed: int, width: int = 1, copies: Copies | None = None) -> Split:
    """Split `count` rows at random: 70 % fit, 10 % held out, 20 % calibration, at least one row each.

    Copies of a row stay together. The percentages are those of the distinct rows. If a row is a fit row, all its copies
    are fit rows. If it is a held-out row or a calibration row, its further copies are in none of the three sets,
    because calibration counts a row only once.

    Held-out and calibration rows are kept in memory, so each of these sets has at most MAX_HELD_OUT_ROWS rows and
    MAX_HELD_OUT_BYTES bytes. All other rows are fit rows. The same arguments give the same split.

    Args:
        seed: at least 0 and below 2^32.
        width: values per row.
        copies: which rows are copies of each other; None if no row has a copy.

    Raises:
        DataError: there are fewer than MINIMUM_ROWS distinct rows.
    """
    if count < MINIMUM_ROWS:
        raise DataError(
            f"expected at least {MINIMUM_ROWS} rows to fit, validate and calibrate a model, got {count}: add rows"
        )
    distinct = count if copies is None else copies.distinct
    if distinct < MINIMUM_ROWS:
        raise DataError(
            f"the {count} rows are copies of only {distinct} rows: expected at least {MINIMUM_ROWS} rows that differ, "
            "because a copy of a training row cannot validate or calibrate a model; add rows"
        )
    random = np.random.RandomState(seed)  # NumPy may change the numbers of Generator, never those of RandomState
    order = random.permutation(distinct)
    most = most_kept_rows(width)
    held_out, calibration = min(round(0.1 * distinct), most), min(round(0.2 * distinct), most)
    split = Split(
        fit=order[held_out + calibration :],
        held_out=order[:held_out],
        calibration=order[held_out : held_out + calibration],
    )
    if copies is None or distinct == count:
        return split
    in_fit = np.zeros(distinct, bool)
    in_fit[split.fit] = True
    first = copies.first_rows
    return Split(
        fit=random.permutation(np.flatnonzero(in_fit[copies.groups])),
        held_out=first[split.held_out],
        calibration=first[split.calibration],
    )


def most_kept_rows(width: int) -> int:
    """Return the maximum size of the held-out set, and of the calibration set, in rows of `width` values."""
    return min(MAX_HELD_OUT_ROWS, max(MINIMUM_ROWS, MAX_HELD_OUT_BYTES // (4 * width)))


def read_table(
    source: str | InMemory,
    drop: Sequence[str] = (),
    keep: Sequence[str] = (),
    size: tuple[int, int] | None = None,
    limit: int = MEMORY_BYTES,
    escape: str | None = None,
    layout: Layout | None = None,
    label: Sequence[str] = (),
    *,
    time: str | None = None,
    group: str | None = None,
    condition: Sequence[str] = (),
    category: Sequence[str] = (),
) -> Table:
    """Return the table in `source`: "digits", a .npy, .npz, .csv or .parquet file, a folder of images, or `InMemory`.

    The rows of an array with three or more dimensions are images, or series whose channels have ranges of their own.

    Args:
        drop: columns to leave out.
        keep: columns that are measurements although they look like identifiers.
        size: height and width to which the images of a folder are resized.
        limit: maximum size of a table in memory, in bytes of float32 values. Larger tables stay on disk.
        escape: how CSV writes a quotation mark inside a quoted cell: "double" (two marks) or "backslash".
        layout: what the dimensions of an array mean; None to recognise it by the shape and the values.
        label: columns of labels, which are no features; the first is read. Empty to find one by its name.
        time: column with the time of each row. The rows are then sorted by group and, within a group, by time.
        group: column with the group of each row, such as its host.
        condition: columns of conditions, which are no features. For a source without columns: "label", or the name of
            the array of labels.
        category: columns whose values are levels of a category although they are numbers. Columns of text are found.

    Raises:
        DataError: the source cannot be used. The message is one line that says what to do.
    """
    name = str(source)
    with full_disk_as_data_error(name):
        options = ReadOptions(
            drop=drop,
            keep=keep,
            size=size,
            escape=escape,
            layout=layout,
            label=label,
            time=time,
            group=group,
            condition=condition,
            category=category,
        )
        raw = load(source, options)
    rows, statistics, raw_labels = ingest(raw, name, limit)
    names = raw.names or numbered_names(raw.shape, "x")
    statistics.refuse_infinite(name, names, raw.lines)
    _refuse_empty_columns(name, names, statistics)
    labels = interpret(raw_labels, raw.label_names, column=raw.label_column)
    numbers = [column for column, each in enumerate(names) if each not in raw.categories]
    if not raw.categories:
        _refuse_equal_rows(name, statistics)
    pixel_range, layout_notes = raw.pixel_range, []
    if raw.dtype == np.uint16:
        pixel_range = (0.0, _white(float(np.nanmax(statistics.high))))
        layout_notes = [f"the images have 16 bits: 0 is read as black and {pixel_range[1]:g} as white"]
    elif pixel_range is None and len(raw.shape) > 1:
        recognised = layout or recognise(raw.shape, raw.dtype, statistics.low, statistics.high)
        if recognised == "nchw" and layout is None:
            return read_table(
                source, drop, keep, size, limit, escape, recognised, label, time=time, group=group, condition=condition
            )
        if recognised != "ntc":
            pixel_range = guess_pixel_range(raw.dtype, statistics.low, statistics.high)
        layout_notes = [_describe_layout(raw.shape, pixel_range, recognised)]
    if raw.names is None and pixel_range is not None:
        names = numbered_names(raw.shape, "pixel")
    table = Table(
        x=rows,
        shape=raw.shape,
        names=names,
        units=raw.units or [None] * len(names),
        labels=labels.values,
        pixel_range=pixel_range,
        source=name,
        notes=[
            *raw.notes,
            *layout_notes,
            *_training_notes(labels),
            *_notes([names[column] for column in numbers], statistics.select(numbers)),
            *(describe_sentinels(rows, names) if pixel_range is None else []),
        ],
        missing=statistics.missing,
        label_names=labels.names,
        normal=labels.normal,
        anomalous=labels.anomalous,
        present_labels=labels.present,
        conditions=_read_conditions(raw, statistics, labels, condition, name),
    )
    if raw.categories:
        table = _with_categories(table, raw, statistics, numbers, group)
    table = _in_order_of_time(table, raw, statistics, limit)
    _refuse_counters(table, keep)
    return table


def rows_of_group(table: Table, group: int) -> Table:
    """Return the rows of one group as a table of their own, in memory. The group keeps its name.

    Args:
        table: a table with a timeline.
        group: index of the group in the timeline.

    Raises:
        DataError: a column has no value in these rows, or the rows are all equal.
    """
    timeline = table.timeline
    if timeline is None:
        raise ValueError("the table has no groups")
    rows = slice(int(timeline.starts[group]), int(timeline.starts[group + 1]))

    def cut(values: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        return None if values is None else values[rows]

    x = table.x.read_range(rows.start, rows.stop)
    statistics = ColumnStatistics(table.x.width)
    statistics.add(x)
    source = f"{table.source}, group {timeline.groups[group]!r}"
    _refuse_empty_columns(source, table.names, statistics)
    if not table.categories:
        _refuse_equal_rows(source, statistics)
    numbers = len(table.names) - sum(len(category.levels) for category in table.categories)
    own = replace(
        timeline,
        time=timeline.time[rows],
        group=np.zeros(len(x), np.int32),
        groups=(timeline.groups[group],),
        source_rows=timeline.source_rows[rows],
    )
    return replace(
        table,
        x=RowStore(x),
        labels=cut(table.labels),
        normal=cut(table.normal),
        anomalous=cut(table.anomalous),
        missing=np.isnan(x).sum(axis=0),
        timeline=own,
        notes=[*own.notes(), *_notes(table.names[:numbers], statistics.select(range(numbers)))],
        conditions=(),
    )


def _with_categories(
    table: Table, raw: RawTable, statistics: ColumnStatistics, numbers: list[int], group: str | None
) -> Table:
    """Return `table` with the features of the levels in place of the columns of text.

    Args:
        table: the table, still with a column for each column of text.
        numbers: the columns that hold numbers.
        group: the column of groups, if there is one.

    Raises:
        DataError: a column has the name of a level.
    """
    filled = statistics.filled_rows()
    values = place_categories(
        [reader.finish(name, filled) for name, reader in raw.categories.items()], numbers=len(numbers)
    )
    places = np.array(
        [*numbers, *(table.names.index(each.category.name) for each in values for _ in each.category.levels)]
    )
    names = [table.names[column] for column in numbers]
    names += [name for each in values for name in each.category.feature_names]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{table.source}: a column and a level of a category are both named {twice!r}: rename one")
    notes = [each.describe() for each in values]
    if raw.timeline is not None and group is None:
        first = values[0].category.name
        notes.append(
            f"if {first!r} names the host of a row, use it with {format_option('--group', [first])} instead: it is "
            "then no feature"
        )
    return replace(
        table,
        x=RowsWithLevels(table.x, np.array(numbers, np.int64), values),
        shape=(len(names),),
        names=names,
        units=[table.units[place] if index < len(numbers) else None for index, place in enumerate(places.tolist())],
        missing=table.missing[places],
        categories=tuple(each.category for each in values),
        notes=[*table.notes, *notes],
    )


def _read_conditions(
    raw: RawTable, statistics: ColumnStatistics, labels: Labels, condition: Sequence[str], source: str
) -> tuple[ConditionValues, ...]:
    """Return the columns of conditions. In a source without columns, the labels of the rows are the condition.

    Raises:
        DataError: the source has no such labels, or they are not the levels of a condition.
    """
    if not condition or raw.conditions or raw.has_header:
        return tuple(reader.finish(statistics.filled_rows()) for reader in raw.conditions)
    known = {"label", raw.label_column}
    if len(condition) > 1 or condition[0] not in known:
        got = join_names([repr(name) for name in condition])
        raise DataError(
            f"{source} has no named columns, so its labels are the only condition: expected --condition label, got "
            f"{got}"
        )
    if labels.values is None:
        reason = labels.notes[-1] if labels.notes else "it has none"
        raise DataError(f"{source}: --condition needs a label of each row ({reason})")
    values = _labels_as_condition(condition[0], labels.values, labels.names)
    check_levels(source, condition[0], values.levels)
    return (values,)


def _labels_as_condition(name: str, labels: npt.NDArray[np.int64], names: list[str] | None) -> ConditionValues:
    """Return the labels [N] as the condition `name`. If `names` is given, each label is an index of it."""
    if names is not None:
        return sorted_levels(name, names, labels)
    numbers, codes = np.unique(labels, return_inverse=True)
    return sorted_levels(name, [str(number) for number in numbers.tolist()], codes.astype(np.int64))


def _refuse_counters(table: Table, keep: Sequence[str]) -> None:
    """Raise DataError if a column rises, or falls, with the time in each of the largest groups, as counters do.

    The readers have refused only columns that rise or fall with the row number, but the rows of a file may be in any
    order.
    """
    if table.timeline is None:
        return
    starts = table.timeline.starts
    largest = np.argsort(-np.diff(starts), kind="stable")[:CHECKED_GROUPS]
    directions = np.zeros((len(largest), table.x.width), np.int64)
    for index, group in enumerate(largest):
        order = OrderDetector(table.x.width)
        for start in range(starts[group], starts[group + 1], table.x.block_rows):
            order.add(table.x.read_range(start, min(start + table.x.block_rows, int(starts[group + 1]))))
        directions[index] = order.directions()
    same = (directions == directions[0]).all(axis=0) & (np.abs(directions[0]) == RISES)
    found = {
        table.names[column]: f"a counter: it {'rises' if directions[0, column] == RISES else 'falls'} with the time"
        for column in np.flatnonzero(same)
        if table.names[column] not in keep
    }
    if found:
        raise refusal(Path(table.source), found, list(found))


def _in_order_of_time(table: Table, raw: RawTable, statistics: ColumnStatistics, limit: int) -> Table:
    """Return `table` with a timeline, and its rows in the order of the timeline, if `raw` has times.

    A row that repeats the previous row of its group, with the same time and the same values, is left out.

    Args:
        table: the rows that `raw` contained, in the order of the source.
        limit: as for `read_table`.

    Raises:
        DataError: the times or the groups cannot be used.
    """
    if raw.timeline is None:
        return table
    timeline, order, notes = raw.timeline.finish(statistics.filled_rows(), raw.lines)
    repeated = np.flatnonzero(timeline.steps == 0)  # the same group and time as the row before
    later, earlier = table.x.take(order[repeated]), table.x.take(order[repeated - 1])
    repeated = repeated[((later == earlier) | (np.isnan(later) & np.isnan(earlier))).all(axis=1)]
    missing = table.missing
    if len(repeated):
        missing = missing - np.isnan(table.x.take(order[repeated])).sum(axis=0)
        timeline, order = timeline.without(repeated), np.delete(order, repeated)
        notes.append(f"rows that repeat a row of the same time and group are left out: {len(repeated):,}")

    def ordered(values: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        return None if values is None else values[order]

    with full_disk_as_data_error(table.source, 4 * len(order) * table.x.width):
        rows = reorder(table.x, order, limit)
    return replace(
        table,
        x=rows,
        labels=ordered(table.labels),
        normal=ordered(table.normal),
        anomalous=ordered(table.anomalous),
        missing=missing,
        timeline=timeline,
        notes=[*notes, *timeline.notes(), *table.notes],
    )


def read_for_model(
    source: str | InMemory,
    manifest: "Manifest",
    limit: int = MEMORY_BYTES,
    escape: str | None = None,
    normal: Sequence[str] = (),
    label: str | None = None,
) -> Table:
    """Return the rows in `source` in the form that the model of `manifest` takes.

    Columns of CSV and Parquet files are found by name, in any order. If a column has the name of a label column and is
    not a feature, it contains the labels. All other columns are ignored. Images are resized to the model's shape.
    Values may be missing only in columns where values were missing in the training data. If the model was trained with
    times and the source has this column, the rows are in the order of their times, as in `read_table`.

    Args:
        limit: as for `read_table`.
        escape: as for `read_table`; by default as in training.
        normal: the labels that mean normal; empty to recognise them.
        label: the column of labels; by default as in training, or else found by its name.

    Raises:
        DataError: the source cannot be used. The message is one line that says what to do.
    """
    raw = open_for_model(source, manifest, escape=escape, label=label)
    name, names = str(source), [feature.name for feature in manifest.features]
    rows, statistics, raw_labels = ingest(raw, name, limit)
    statistics.refuse_infinite(name, names, raw.lines)
    allowed = np.array([feature.missing > 0 for feature in manifest.features])
    statistics.refuse_missing(name, names, raw.lines, allowed)
    labels = interpret(raw_labels, raw.label_names, normal, raw.label_column)
    low, high = np.fmin.reduce(statistics.low), np.fmax.reduce(statistics.high)
    pixel_warning = manifest.pixel_warning(float(low), float(high))
    table = Table(
        x=rows,
        shape=tuple(manifest.shape),
        names=names,
        units=[feature.unit for feature in manifest.features],
        labels=labels.values,
        pixel_range=manifest.pixel_range,
        source=name,
        notes=[*raw.notes, *labels.notes, *([f"WARNING: {pixel_warning}"] if pixel_warning else [])],
        pixel_warning=pixel_warning,
        missing=statistics.missing,
        label_names=labels.names,
        normal=labels.normal,
        anomalous=labels.anomalous,
        present_labels=labels.present,
        categories=tuple(manifest.categories),
        conditions=_conditions_for_model(raw, statistics, labels, manifest),
    )
    if manifest.conditions is not None:
        coded = code_conditions(manifest.conditions, table.conditions, len(rows))
        table = replace(table, coded=coded, notes=[*table.notes, *coded.notes])
    return _in_order_of_time(table, raw, statistics, limit)


def _conditions_for_model(
    raw: RawTable, statistics: ColumnStatistics, labels: Labels, manifest: "Manifest"
) -> tuple[ConditionValues, ...]:
    """Return the columns of conditions that the source has: columns, or the labels if it has no columns."""
    if manifest.conditions is None:
        return ()
    if raw.has_header:
        return tuple(reader.finish(statistics.filled_rows()) for reader in raw.conditions)
    if labels.values is None:
        return ()
    return (_labels_as_condition(manifest.conditions.columns[0].name, labels.values, labels.names),)


def open_for_model(
    source: str | InMemory,
    manifest: "Manifest",
    *,
    escape: str | None = None,
    tolerant: bool = False,
    extra: Sequence[str] = (),
    label: str | None = None,
    part: SourcePart | None = None,
) -> RawTable:
    """Open `source` for the model of `manifest`: check its shape, columns and units, and read no rows yet.

    Args:
        escape: as for `read_for_model`.
        tolerant: whether faulty rows are recorded instead of raising DataError.
        extra: names of further columns whose cells are recorded; ignored unless `tolerant` is true.
        label: as for `read_for_model`.
        part: the part of a .npy, CSV or Parquet file to read; None for the whole.

    Raises:
        DataError: the source does not exist, or the model cannot take its rows.
    """
    names = [feature.name for feature in manifest.features]
    units = [feature.unit for feature in manifest.features]
    shape = tuple(manifest.shape)
    with full_disk_as_data_error(str(source)):
        options = ReadOptions(
            names=manifest.column_names,
            categories=manifest.categories,
            shape=shape,
            pixel_range=manifest.pixel_range,
            escape=escape or manifest.training.get("escape"),
            label=[label] if label else manifest.training.get("label") or (),
            tolerant=tolerant,
            extra=extra,
            time=None if tolerant or manifest.timeline is None else manifest.timeline.time_column,
            group=None if tolerant or manifest.timeline is None else manifest.timeline.group_column,
            timeline_optional=True,
            condition=() if manifest.conditions is None else [column.name for column in manifest.conditions.columns],
            part=part,
        )
        raw = load(source, options)
    width = math.prod(raw.shape)
    if width != len(names):
        raise DataError(
            f"{source} has rows of {width} numbers: expected {len(names)}, "
            f"because model {manifest.name!r} takes rows of shape {manifest.shape}"
        )
    for name, expected, unit in zip(names, units, raw.units or units, strict=True):
        if expected and unit and expected != unit:
            raise DataError(f"{source}: column {name!r} is in {unit}, expected {expected}: convert it")
    return raw


def _describe_copies(copies: Copies, rows: int, have_times: bool) -> str:
    near = "" if copies.equal == copies.distinct else " or nearly equal"
    effect = (
        "each counts at its own time"
        if have_times
        else "copies of a row are never both trained on and calibrated on, and the calibration counts them once"
    )
    return (
        f"only {copies.distinct:,} of the {rows:,} rows are distinct, and the others are equal{near} to one of them: "
        f"{effect}"
    )


def _describe_series(names: Sequence[str], correlations: npt.NDArray[np.float64]) -> str:
    strongest = [
        index for index in np.argsort(-correlations, kind="stable") if correlations[index] >= SERIES_CORRELATION
    ]
    listed = join_names([f"{names[index]} {correlations[index]:.2f}" for index in strongest], LISTED_NAMES)
    return (
        f"WARNING: rows that follow each other in the file resemble each other (rank correlation: {listed}), as in a "
        f"time series. {SERIES_ADVICE}"
    )


def _describe_resemblance(resemblance: Resemblance) -> str:
    lag = resemblance.lag
    which = "the row before them" if lag == 1 else f"the row {lag} rows before them"
    hosts = "" if lag == 1 else f" of {lag} hosts whose rows alternate"
    return (
        f"WARNING: rows in the file resemble {which} (rank correlation of a column or a principal component: "
        f"{resemblance.correlation:.2f}), as in time series{hosts}. {SERIES_ADVICE}"
    )


def _training_notes(labels: Labels) -> list[str]:
    """Return the notes on labels in training data. Labels whose meaning is unknown need none: training ignores them."""
    if labels.anomalous is None:
        return [note for note in labels.notes if "ignored" in note]
    count = int(labels.anomalous.sum())
    if not count:
        return []
    return [
        labels.notes[-1].replace("; --normal LABEL changes this", ""),
        f"the model also learns from the {count:,} anomalous rows: remove them, or add --robust",
    ]


def _describe_layout(shape: tuple[int, ...], pixel_range: tuple[float, float] | None, layout: Layout) -> str:
    """Return a note that says how Elbo understood the dimensions of an array."""
    text = " x ".join(map(str, shape))
    if pixel_range is None:
        return (
            f"each row is read as {text} measurements, each with a range of its own; if the rows are images, add "
            "--layout nhwc or --layout nchw"
        )
    where = ", whose channels come first in the file and last in the model" if layout == "nchw" else ""
    return (
        f"each row is read as an image of {text} pixels from {pixel_range[0]:g} to {pixel_range[1]:g}{where}; "
        "if the rows are series or other measurements, add --layout ntc or --layout flat"
    )


def numbered_names(shape: tuple[int, ...], word: str) -> list[str]:
    """Return a name for each value of a row of `shape`, such as pixel[0,3] for the word "pixel"."""
    return [f"{word}[{','.join(map(str, index))}]" for index in np.ndindex(shape)]


def _refuse_empty_columns(source: str, names: Sequence[str], statistics: ColumnStatistics) -> None:
    empty = [name for name, missing in zip(names, statistics.missing, strict=True) if missing == statistics.rows]
    if empty:
        subject = f"column {empty[0]!r} has" if len(empty) == 1 else f"columns {join_names(empty, LISTED_NAMES)} have"
        raise DataError(f"{source}: {subject} no value in any row: add {format_option('--drop', empty)}")


def _refuse_equal_rows(source: str, statistics: ColumnStatistics) -> None:
    equal = statistics.low.astype(np.float32) == statistics.high.astype(np.float32)
    if statistics.rows > 1 and equal.all() and (largest := np.abs(statistics.low).max()) >= MAX_EXACT_INTEGER:
        raise DataError(
            f"{source}: in float32, which holds 7 digits, all {statistics.rows} rows are equal, because values near "
            f"{largest:.3g} differ too little: subtract a constant from each column, such as its smallest value"
        )
    if statistics.rows > 1 and equal.all():
        exception = " except for missing values" if statistics.missing.any() else ""
        raise DataError(
            f"{source}: all {statistics.rows} rows are equal{exception}: expected rows that differ, to learn from"
        )


def _notes(names: Sequence[str], statistics: ColumnStatistics) -> list[str]:
    notes = []
    low, high = statistics.low, statistics.high
    if counts := {name: int(count) for name, count in zip(names, statistics.missing, strict=True) if count}:
        by_count = sorted(counts, key=lambda name: -counts[name])
        listed = join_names([f"{name} {counts[name]:,}" for name in by_count], LISTED_NAMES)
        notes.append(
            f"{sum(counts.values()):,} missing values in {len(counts)} of {len(names)} columns ({listed}): "
            "they are replaced by the column's training median"
        )
        if nearly_empty := [name for name in by_count if statistics.rows - counts[name] < FEW_VALUES <= counts[name]]:
            notes.append(
                f"WARNING: fewer than {FEW_VALUES} rows have a value in {join_names(nearly_empty, LISTED_NAMES)}: a "
                f"model cannot learn from so few, add {format_option('--drop', nearly_empty)}"
            )
            by_count = [name for name in by_count if name not in nearly_empty]
        if sparse := [name for name in by_count if 2 * counts[name] > statistics.rows]:
            notes.append(
                f"more than half of the values are missing in {join_names(sparse, LISTED_NAMES)}: "
                f"consider {format_option('--drop', sparse)}"
            )
    large = np.abs(low) >= 2.0**53  # integers that float64 rounds: values that are equal here may differ in the source
    constant = [name for name, same in zip(names, (low == high) & ~large, strict=True) if same]
    if constant and statistics.rows > 1:
        listed = join_names(constant, LISTED_NAMES)
        notes.append(f"{len(constant)} of {len(names)} features are constant and carry no information: {listed}")
    step = np.spacing(np.maximum(np.abs(low), np.abs(high)).astype(np.float32))
    too_coarse = ((low < high) | large) & (high - low < MIN_DISTINCT * step)
    if coarse := [name for name, found in zip(names, too_coarse, strict=True) if found]:
        notes.append(
            "some features lose precision in float32, because their values are large compared with their spread: "
            f"{join_names(coarse, LISTED_NAMES)}; subtract a constant from them"
        )
    return notes


def _white(largest: float) -> float:
    """Return the value of white, 2^bits - 1, for the smallest number of bits, at least 9, that can hold `largest`."""
    return float(2 ** max(9, int(largest).bit_length()) - 1)


def guess_pixel_range(
    dtype: np.dtype[Any], lowest: npt.NDArray[np.float64], highest: npt.NDArray[np.float64]
) -> tuple[float, float]:
    """Return the values that stand for black and white: 0 and 255 for bytes, unless the largest is FEW_GREYS or less.

    For other types, choose the first range in PIXEL_RANGES that contains all values and has the largest value in
    its upper half. If there is no such range, return the smallest and the largest value, rounded.

    Args:
        lowest: the smallest value of each pixel, [D].
        highest: the largest value of each pixel, [D].
    """
    low, high = float(np.nanmin(lowest)), float(np.nanmax(highest))
    if dtype == np.uint8 and high > FEW_GREYS:
        return 0.0, 255.0
    for black, white in PIXEL_RANGES:
        if black <= low and (white + black) / 2 < high <= white:
            return black, white
    if low == high:
        return low, low + 1.0
    digits = 2 - math.floor(math.log10(high - low))
    return round(low, digits), round(high, digits)
