"""Split the rows of a table into fit rows, held-out rows and calibration rows: by time if the rows have times.

There are two splits by time. "newest": the oldest 70 % of the rows fit, the next 10 % are held out, and the newest 20 %
calibrate. "blocks": the shares are the same, but the history is cut into several blocks, and each of them has fit rows,
held-out rows and calibration rows.

A model that is split in blocks has seen the whole of a history that changes. The price: there are fit
rows of the same days, so held-out rows and calibration rows are more like the fit rows than later rows will be.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
import numpy.typing as npt

from models import manifest
from models.windows import count_earlier_rows
from training.data.table import MINIMUM_ROWS, Split, Table, most_kept_rows, split_rows
from training.data.timeline import Timeline, describe_period, format_moment, list_groups, to_iso
from training.errors import DataError

# Number of rows of each group that are left out between two parts. If a gap is as long as the window of rows that a
# model judges, the windows on both sides of the gap share no row. For a model that judges each row alone, the window is
# one row.
GAP_ROWS = 1
HELD_OUT_SHARE, CALIBRATION_SHARE = Fraction(1, 10), Fraction(2, 10)
FIT_SHARE = 1 - HELD_OUT_SHARE - CALIBRATION_SHARE
PARTS = 3  # of a block: fit rows, held-out rows, calibration rows
SplitName = Literal["newest", "blocks"]
# Where the held-out rows of each block begin. The calibration rows follow them directly. The fit rows of a block are
# cut into as many equal pieces as there are blocks, and the number is how many of these pieces come before the held-out
# rows. The numbers differ, because the calibration rows would otherwise all be from the same hours or weekdays if a
# block lasts a day or a week. Whether hours and weekdays remain without calibration rows depends on the length of the
# history. Of all orders that end with the newest rows, this one leaves the fewest at the worst length. More blocks
# would need more rows, because a gap follows each part.
HELD_OUT_STARTS: dict[SplitName, tuple[int, ...]] = {"newest": (1,), "blocks": (4, 2, 1, 3, 5)}


@dataclass(frozen=True)
class TimeSplit(Split):
    """A split by time. Fit rows, held-out rows and calibration rows follow each other, once or in each block.

    Rows of the gaps are in none of the three sets. If there are too many held-out rows or calibration rows to keep
    in memory, the set is a random sample of the rows of its periods.
    """

    gap_rows: int  # rows of each group that are left out between two parts
    held_out_period: npt.NDArray[np.int64]  # all rows of the periods of the held-out rows, ascending
    calibration_period: npt.NDArray[np.int64]  # all rows of the periods of the calibration rows, ascending
    cuts: tuple[int, ...]  # times at which a part ends and the next one begins, in nanoseconds, ascending

    @property
    def blocks(self) -> int:
        """How many blocks the history was cut into; 1 if the newest rows calibrate."""
        return (len(self.cuts) + 1) // PARTS


def split_table(table: Table, seed: int, gap_rows: int = GAP_ROWS, split: SplitName = "newest") -> Split:
    """Split the rows of `table`: by time if it has a timeline, at random otherwise.

    Args:
        seed: at least 0 and below 2^32.
        gap_rows: as for `split_by_time`.
        split: how rows with times are split.

    Raises:
        DataError: there are too few rows.
    """
    if table.timeline is None:
        return split_rows(len(table.x), seed, table.x.width, table.copies)
    if table.copies.distinct < MINIMUM_ROWS:
        split_rows(len(table.x), seed, table.x.width, table.copies)  # raises DataError
    return split_by_time(table.timeline, seed, table.x.width, gap_rows, split)


def split_by_time(
    timeline: Timeline, seed: int, width: int = 1, gap_rows: int = GAP_ROWS, split: SplitName = "newest"
) -> TimeSplit:
    """Split rows by time: about 70 % fit, 10 % are held out, and 20 % calibrate. The newest rows calibrate.

    The moments that divide the parts are the same for all groups. Copies of a row are separate rows, each with its own
    time, because a value that normally returns every day must count as often as it returns.

    Args:
        seed: determines the order of the rows within each part.
        width: values per row.
        gap_rows: number of rows of each group that are left out after each of the moments.
        split: whether the parts occur once, or in each of several blocks.

    Raises:
        DataError: there are too few rows or moments for the parts and the gaps between them.
    """
    cuts = _moments(timeline, gap_rows, HELD_OUT_STARTS[split])
    part = np.searchsorted(cuts, timeline.time, side="right")  # [N]
    begins = timeline.steps < 0
    begins[1:] |= part[1:] != part[:-1]
    kept = (part == 0) | (count_earlier_rows(begins) >= gap_rows)
    if not np.bincount(part[kept], minlength=len(cuts) + 1).all():
        _refuse(timeline, gap_rows, len(HELD_OUT_STARTS[split]))
    fit, held_out, calibration = (np.flatnonzero(kept & (part % PARTS == index)) for index in range(PARTS))
    random = np.random.RandomState(seed)  # NumPy may change the numbers of Generator, never those of RandomState
    most = most_kept_rows(width)
    return TimeSplit(
        fit=random.permutation(fit),
        held_out=random.permutation(held_out)[:most],
        calibration=random.permutation(calibration)[:most],
        gap_rows=gap_rows,
        held_out_period=held_out,
        calibration_period=calibration,
        cuts=tuple(cuts),
    )


def _shares(starts: tuple[int, ...]) -> list[float]:
    """Return the share of the rows before each part except the first, ascending. `starts`: see HELD_OUT_STARTS."""
    shares = []
    for block, start in enumerate(starts):
        fit = block + FIT_SHARE * start / len(starts)
        shares += [fit, fit + HELD_OUT_SHARE, fit + HELD_OUT_SHARE + CALIBRATION_SHARE]
    return [float(share / len(starts)) for share in shares[:-1]]


def _moments(timeline: Timeline, gap_rows: int, starts: tuple[int, ...]) -> list[int]:
    """Return the moments at which the parts begin, except the first part. `starts`: see HELD_OUT_STARTS."""
    moments, counts = np.unique(timeline.time, return_counts=True)
    before = np.cumsum(counts) - counts  # number of rows before each moment
    if len(timeline) < MINIMUM_ROWS or len(moments) < PARTS * len(starts):
        _refuse(timeline, gap_rows, len(starts))
    chosen, shares = [0], _shares(starts)
    for later, share in zip(reversed(range(len(shares))), shares, strict=True):
        first, end = chosen[-1] + 1, len(moments) - later  # each later part needs a moment of its own
        chosen.append(first + int(np.abs(before[first:end] - share * len(timeline)).argmin()))
    return [int(moments[index]) for index in chosen[1:]]


def _refuse(timeline: Timeline, gap_rows: int, blocks: int) -> None:
    gap = f" and {_count(gap_rows)} of each group between two parts" if gap_rows else ""
    expected = f"at least {MINIMUM_ROWS} rows at different times, enough for"
    advice = "add rows"
    if blocks > 1:
        needed = int(blocks * (gap_rows + 1) / HELD_OUT_SHARE)
        expected = f"about {needed:,} rows of a group, enough for {blocks} blocks, each with"
        shorter = ", shorten --window" if gap_rows > GAP_ROWS else ""
        advice = f"add rows{shorter}, or leave out --split blocks"
    raise DataError(
        f"too few rows to split by time (rows: {len(timeline):,}, different times: {len(np.unique(timeline.time)):,}, "
        f"groups: {len(timeline.groups):,}): expected {expected} 70 % that fit, 10 % held out and 20 % that "
        f"calibrate{gap}; {advice}"
    )


def _count(rows: int) -> str:
    return f"{rows:,} row{'s' * (rows != 1)}"


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
        blocks=_blocks(timeline, split) if split.blocks > 1 else [],
    )


def _blocks(timeline: Timeline, split: TimeSplit) -> list[manifest.Block]:
    """Return the periods of the fit rows, held-out rows and calibration rows of each block."""

    def periods(rows: npt.NDArray[np.int64]) -> list[manifest.Period | None]:
        block = np.searchsorted(split.cuts, timeline.time[rows], side="right") // PARTS
        own = [rows[block == each] for each in range(split.blocks)]
        return [period_of(timeline, some) if len(some) else None for some in own]

    columns = periods(split.fit), periods(split.held_out), periods(split.calibration)
    return [
        manifest.Block(fit=fit, held_out=held_out, calibration=calibration)
        for fit, held_out, calibration in zip(*columns, strict=True)
    ]


def period_of(timeline: Timeline, rows: npt.NDArray[np.int64]) -> manifest.Period:
    """Return the period that the rows with the indices `rows` cover."""
    times = timeline.time[rows]
    return manifest.Period(first=to_iso(int(times.min())), last=to_iso(int(times.max())))


def describe_split(timeline: Timeline, split: TimeSplit) -> list[str]:
    """Return notes: which periods the parts cover, and which groups are not in all parts."""
    in_blocks = f" into {split.blocks} blocks" if split.blocks > 1 else ""
    parts = (("fit", split.fit), ("held out", split.held_out), ("calibration", split.calibration))
    periods = (
        f"{name} {describe_period(int(timeline.time[rows].min()), int(timeline.time[rows].max()))} ({len(rows):,} rows)"
        for name, rows in parts
    )
    notes = [f"split by time{in_blocks}: {', '.join(periods)}"]
    if split.blocks > 1:
        notes.append(
            f"fit rows, held-out rows and calibration rows alternate in time, with gaps of {_count(split.gap_rows)} of "
            "each group: figures on held-out rows are better than those on later rows will be, and more than alpha of "
            "the later rows may raise a false alarm. Measure both on later rows with elbo evaluate and elbo backtest"
        )
    if timeline.group_column is None:
        return notes
    fit_period = (
        "among the fit rows"
        if split.blocks > 1
        else f"before {format_moment(int(timeline.time[split.held_out].min()))} UTC"
    )
    for rows, what, effect in (
        (split.fit, fit_period, "the model is not fitted"),
        (split.calibration, "among the calibration rows", "the threshold is not calibrated"),
    ):
        absent = np.setdiff1d(np.arange(len(timeline.groups)), np.unique(timeline.group[rows]))
        if len(absent):
            notes.append(
                f"WARNING: {len(absent):,} of {len(timeline.groups):,} groups have no rows {what}, so {effect} to "
                f"them: {list_groups(timeline, absent)}"
            )
    return notes
