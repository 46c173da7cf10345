"""Windows in a table whose rows have times: where they begin, their rows, and their summaries."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from models.manifest import Manifest, Window
from models.windows import count_earlier_rows, summarise, summary_width, take_windows
from training.data.row_store import Floats, RowStore, RowWriter
from training.data.timeline import SECOND, Timeline
from training.errors import DataError

REPAIRED_WINDOWS = 1024  # windows that are repaired at once, which limits the memory
SUMMARISED_VALUES = 1 << 18  # values that are summarised at once; more would leave the processor's cache


@dataclass(frozen=True)
class TableWindows:
    """The windows of the N rows of a table, which is sorted by group and time.

    Args:
        x: the rows, in raw units.
        window: how many rows a window has.
        earlier: how many rows of its stretch precede each row, [N]. A stretch begins with a group and after a gap.
    """

    x: RowStore
    window: Window
    earlier: npt.NDArray[np.int64]

    @property
    def judged(self) -> npt.NDArray[np.bool_]:
        """Whether the window of each row has enough rows to judge it, [N]."""
        return np.asarray(self.earlier >= self.window.least_rows - 1)

    def take(self, positions: npt.NDArray[np.int64]) -> Floats:
        """Return the windows [B, N, D] of the rows at `positions` [B], oldest row first. Absent rows are NaN."""
        ages = np.arange(self.window.rows)
        needed = np.unique(np.maximum(positions[:, None] - ages, 0))  # [R]
        places = np.searchsorted(needed, positions)
        # Rows that follow each other in the table do so in `needed`, at least as far back as a window reaches.
        return take_windows(self.x.take(needed), places, self.earlier[needed], self.window.rows)


def windows_of_timeline(
    x: RowStore, timeline: Timeline, window: Window, usual_step_seconds: float | None
) -> TableWindows:
    """Return the windows of rows with these times and groups.

    Args:
        usual_step_seconds: the usual time between two rows of a group, which says what a gap is; None if unknown.
    """
    longest = window.longest_gap_seconds(usual_step_seconds) * SECOND
    return TableWindows(x, window, count_earlier_rows((timeline.steps < 0) | (timeline.steps > longest)))


def windows_for_model(x: RowStore, timeline: Timeline | None, manifest: Manifest, source: str) -> TableWindows | None:
    """Return the windows that the model of `manifest` judges; None if it judges each row alone.

    Raises:
        DataError: the model judges windows, but the rows have no times.
    """
    if manifest.window is None:
        return None
    if timeline is None:
        refuse_rows_without_times(manifest, source)
    usual = manifest.timeline.usual_step_seconds if manifest.timeline else None
    return windows_of_timeline(x, timeline, manifest.window, usual)


def refuse_rows_without_times(manifest: Manifest, source: str) -> NoReturn:
    """Raise DataError: a model with a window needs the time of every row."""
    column = manifest.timeline.time_column if manifest.timeline else "time"
    rows = manifest.window.rows if manifest.window else 1
    raise DataError(
        f"{source} has no column {column!r} with the time of each row: {manifest.name} judges a row together with the "
        f"{rows - 1} rows before it, so it needs times to put the rows in order; add this column"
    )


def refuse_short_windows(windows: TableWindows, source: str) -> NoReturn:
    """Raise DataError: no window has enough rows."""
    raise DataError(
        f"{source}: no row has {windows.window.least_rows - 1} rows before it, in its group and without a gap, which "
        "the model needs to judge a row; add earlier rows"
    )


class Repair(NamedTuple):
    """How to summarise windows with values outside of the valid ranges.

    Args:
        is_outside: takes rows [n, D] in raw units, and returns which have a value outside of its range, [n].
        summarise: takes windows [B, N, D] in raw units, and returns their summaries [B, V] without such values.
    """

    is_outside: Callable[[Floats], npt.NDArray[np.bool_]]
    summarise: Callable[[Floats], Floats]


def summarise_table(
    windows: TableWindows,
    to_model_units: Callable[[Floats], Floats],
    scales: Sequence[int],
    limit: int,
    repair: Repair | None = None,
) -> RowStore:
    """Return the summaries [M, V] of those windows of a table that have enough rows.

    Args:
        windows: the windows.
        to_model_units: converts rows [n, D], and replaces missing values.
        scales: the scales of the window.
        limit: maximum size of a table in memory, as for `RowWriter`.
        repair: summarises windows with values outside of their valid ranges; by default, every value is valid.

    Raises:
        OSError: the disk is full.
    """
    judged = windows.judged
    with closing(RowWriter(summary_width(windows.x.width, scales), np.float32, limit)) as writer:
        for start, summaries in _summaries(windows, to_model_units, scales, repair):
            writer.add(summaries[judged[start : start + len(summaries)]])
        return writer.rows()


def _summaries(
    windows: TableWindows, to_model_units: Callable[[Floats], Floats], scales: Sequence[int], repair: Repair | None
) -> Iterator[tuple[int, Floats]]:
    """Yield the summaries of all rows in blocks, each with the index of its first row."""
    x, past = windows.x, scales[-1] - 1
    size = max(past + 1, SUMMARISED_VALUES // x.width)
    for start in range(0, len(x), size):
        first, stop = max(0, start - past), min(start + size, len(x))
        rows = x.read_range(first, stop)
        summaries = summarise(to_model_units(rows), windows.earlier[first:stop], scales)[start - first :]
        if repair is not None:
            outside = repair.is_outside(rows).cumsum()
            before = np.concatenate(([0], outside))[np.maximum(np.arange(len(rows)) - past, 0)]
            # Some windows are repaired needlessly: the value is in an earlier stretch, outside of the window.
            affected = np.flatnonzero((outside > before)[start - first :])
            for part in np.split(affected, range(REPAIRED_WINDOWS, len(affected), REPAIRED_WINDOWS)):
                summaries[part] = repair.summarise(windows.take(part + start))
        yield start, summaries
