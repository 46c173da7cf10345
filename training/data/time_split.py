"""Split the rows of a table into fit rows, held-out rows and calibration rows: by time if the rows have times."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models import manifest
from training.data.table import MINIMUM_ROWS, Split, Table, most_kept_rows, split_rows
from training.data.timeline import Timeline, describe_period, format_moment, list_groups, to_iso
from training.errors import DataError

# Number of rows of each group that are left out between two parts. If a gap is as long as the window of rows that a
# model judges, the windows on both sides of the gap share no row. For a model that judges each row alone, the window is
# one row.
GAP_ROWS = 1
BEFORE_HELD_OUT, BEFORE_CALIBRATION = 0.7, 0.8  # share of the rows that are older than the part


@dataclass(frozen=True)
class TimeSplit(Split):
    """A split by time: all fit rows are older than all held-out rows, which are older than all calibration rows.

    Rows of the gaps are in none of the three sets. If a set is too large to be kept in memory, it is a random sample of
    its period.
    """

    gap_rows: int  # rows of each group that are left out before the held-out rows and before the calibration rows
    held_out_period: npt.NDArray[np.int64]  # all rows of the period of the held-out rows, ascending
    calibration_period: npt.NDArray[np.int64]  # all rows of the period of the calibration rows, ascending


def split_table(table: Table, seed: int, gap_rows: int = GAP_ROWS) -> Split:
    """Split the rows of `table`: by time if it has a timeline, at random otherwise.

    Args:
        seed: at least 0 and below 2^32.
        gap_rows: as for `split_by_time`.

    Raises:
        DataError: there are too few rows.
    """
    if table.timeline is None:
        return split_rows(len(table.x), seed, table.x.width, table.copies)
    if table.copies.distinct < MINIMUM_ROWS:
        split_rows(len(table.x), seed, table.x.width, table.copies)  # raises DataError
    return split_by_time(table.timeline, seed, table.x.width, gap_rows)


def split_by_time(timeline: Timeline, seed: int, width: int = 1, gap_rows: int = GAP_ROWS) -> TimeSplit:
    """Split rows by time: about the oldest 70 % fit, the next 10 % are held out, and the newest 20 % calibrate.

    Two moments divide the parts, the same for all groups. Each copy of a row counts at its own time, because a value
    that normally returns every day must count as often as it returns.

    Args:
        seed: determines the order of the rows within each part.
        width: values per row.
        gap_rows: number of rows of each group that are left out after each of the two moments.

    Raises:
        DataError: there are too few rows or moments for three parts and the gaps between them.
    """
    first, second = _moments(timeline)
    held_out, calibration = [], []
    for start, end in zip(timeline.starts[:-1], timeline.starts[1:], strict=True):
        begin, middle = start + np.searchsorted(timeline.time[start:end], (first, second))
        held_out.append(np.arange(begin + gap_rows, middle))
        calibration.append(np.arange(middle + gap_rows, end))
    random = np.random.RandomState(seed)  # NumPy may change the numbers of Generator, never those of RandomState
    most = most_kept_rows(width)
    held_out_period, calibration_period = np.concatenate(held_out), np.concatenate(calibration)
    split = TimeSplit(
        fit=random.permutation(np.flatnonzero(timeline.time < first)),
        held_out=random.permutation(held_out_period)[:most],
        calibration=random.permutation(calibration_period)[:most],
        gap_rows=gap_rows,
        held_out_period=held_out_period,
        calibration_period=calibration_period,
    )
    if not len(split.fit) or not len(split.held_out) or not len(split.calibration):
        _refuse(timeline, gap_rows)
    return split


def _moments(timeline: Timeline) -> tuple[int, int]:
    """Return the moments at which the held-out part and the calibration part begin."""
    moments, counts = np.unique(timeline.time, return_counts=True)
    before = np.cumsum(counts) - counts  # number of rows before each moment
    if len(timeline) < MINIMUM_ROWS or len(moments) < 3:
        _refuse(timeline, 0)
    first = int(np.abs(before[1:-1] - BEFORE_HELD_OUT * len(timeline)).argmin()) + 1
    second = int(np.abs(before[first + 1 :] - BEFORE_CALIBRATION * len(timeline)).argmin()) + first + 1
    return int(moments[first]), int(moments[second])


def _refuse(timeline: Timeline, gap_rows: int) -> None:
    gap = f" and {gap_rows} row{'s' * (gap_rows != 1)} of each group between two parts" if gap_rows else ""
    raise DataError(
        f"too few rows to split by time (rows: {len(timeline):,}, different times: {len(np.unique(timeline.time)):,}, "
        f"groups: {len(timeline.groups):,}): expected at least {MINIMUM_ROWS} rows at different times, enough for 70 % "
        f"that fit, 10 % held out and 20 % that calibrate{gap}; add rows"
    )


def summarise(timeline: Timeline, split: TimeSplit) -> manifest.Timeline:
    """Return what the manifest says about the times of the rows and their split."""
    return manifest.Timeline(
        time_column=timeline.time_column,
        group_column=timeline.group_column,
        groups=len(timeline.groups),
        usual_step_seconds=timeline.usual_step / 1e9 or None,
        gap_rows=split.gap_rows,
        fit=period_of(timeline, split.fit),
        held_out=period_of(timeline, split.held_out),
        calibration=period_of(timeline, split.calibration),
    )


def period_of(timeline: Timeline, rows: npt.NDArray[np.int64]) -> manifest.Period:
    """Return the period that the rows with the indices `rows` cover."""
    times = timeline.time[rows]
    return manifest.Period(first=to_iso(int(times.min())), last=to_iso(int(times.max())))


def describe_split(timeline: Timeline, split: TimeSplit) -> list[str]:
    """Return notes: which period each part covers, and which groups are not in all parts."""
    parts = (("fit", split.fit), ("held out", split.held_out), ("calibration", split.calibration))
    periods = (
        f"{name} {describe_period(int(timeline.time[rows].min()), int(timeline.time[rows].max()))} ({len(rows):,} rows)"
        for name, rows in parts
    )
    notes = [f"split by time: {', '.join(periods)}"]
    if timeline.group_column is None:
        return notes
    for rows, what, effect in (
        (split.fit, f"before {format_moment(int(timeline.time[split.held_out].min()))} UTC", "the model is not fitted"),
        (split.calibration, "among the calibration rows", "the threshold is not calibrated"),
    ):
        absent = np.setdiff1d(np.arange(len(timeline.groups)), np.unique(timeline.group[rows]))
        if len(absent):
            notes.append(
                f"WARNING: {len(absent):,} of {len(timeline.groups):,} groups have no rows {what}, so {effect} to "
                f"them: {list_groups(timeline, absent)}"
            )
    return notes
