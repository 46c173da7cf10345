"""Windows in a table whose rows have times: where they begin, their rows, and their summaries."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import numpy as np
import numpy.typing as npt

from models.manifest import Window
from models.windows import count_earlier_rows, summarise, summary_width, take_windows
from training.data.row_store import Floats, RowStore, RowWriter
from training.data.timeline import SECOND, Timeline

SUMMARISED_VALUES = 1 << 18  # values that are summarised at once; more would leave the processor's cache


def find_earlier_rows(timeline: Timeline, window: Window, usual_step_seconds: float | None) -> npt.NDArray[np.int64]:
    """Return how many rows precede each row in its stretch: since its group began, and since the last gap, [N].

    Args:
        timeline: the times and groups of the rows.
        window: the window, whose length says what a gap is.
        usual_step_seconds: the usual time between two rows of a group; None if it is unknown.
    """
    longest = window.longest_gap_seconds(usual_step_seconds) * SECOND
    return count_earlier_rows((timeline.steps < 0) | (timeline.steps > longest))


def take_table_windows(x: RowStore, start: int, stop: int, earlier: npt.NDArray[np.int64], rows: int) -> Floats:
    """Return the windows [B, N, D] that end at the rows `start` up to, not including, `stop`. See `take_windows`."""
    first = max(0, start - rows + 1)
    block = x.read_range(first, stop)
    return take_windows(block, np.arange(start - first, stop - first), earlier[first:stop], rows)


def summarise_table(
    x: RowStore,
    to_model_units: Callable[[Floats], Floats],
    earlier: npt.NDArray[np.int64],
    scales: Sequence[int],
    least: int,
    limit: int,
) -> RowStore:
    """Return the summaries [M, V] of the windows of a table that have at least `least` rows.

    Args:
        x: the rows in raw units, sorted by group and time.
        to_model_units: converts rows [n, D], and replaces missing values.
        earlier: the result of `find_earlier_rows`.
        scales: the scales of the window.
        least: the smallest number of rows that a window must have.
        limit: maximum size of a table in memory, as for `RowWriter`.

    Raises:
        OSError: the disk is full.
    """
    with closing(RowWriter(summary_width(x.width, scales), np.float32, limit)) as writer:
        for start, summaries in _summaries(x, to_model_units, earlier, scales):
            writer.add(summaries[earlier[start : start + len(summaries)] >= least - 1])
        return writer.rows()


def _summaries(
    x: RowStore, to_model_units: Callable[[Floats], Floats], earlier: npt.NDArray[np.int64], scales: Sequence[int]
) -> Iterator[tuple[int, Floats]]:
    """Yield the summaries of all rows in blocks, each with the index of its first row."""
    past = scales[-1] - 1
    size = max(past + 1, SUMMARISED_VALUES // x.width)
    for start in range(0, len(x), size):
        first, stop = max(0, start - past), min(start + size, len(x))
        u = to_model_units(x.read_range(first, stop))
        yield start, summarise(u, earlier[first:stop], scales)[start - first :]
