"""The rows of a stream as a model takes them: one by one, or each with the rows before it in its group.

For windows, the whole source is read into memory before the first row is judged, because its rows may be in any order.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from models.manifest import Manifest
from models.windows import count_earlier_rows
from training.data.row_store import Floats, RowStore
from training.data.row_stream import RowStream, StreamedRows
from training.data.windows import TableWindows, refuse_rows_without_times


class JudgedBatch(NamedTuple):
    """Rows of a stream, and the inputs of the model for them."""

    rows: StreamedRows
    inputs: Floats  # [B, D], or windows [B, N, D]; NaN for a row with a fault that has no window
    counts: npt.NDArray[np.int64] | None  # [B], how many rows each window has; None if the model judges rows alone


def judged_batches(stream: RowStream, manifest: Manifest) -> Iterator[JudgedBatch]:
    """Yield all rows of `stream` in their order, with what the model of `manifest` takes for each of them.

    In a window, rows are in the order of their times. Faulty rows are in no window. A row with the group and the time
    of an earlier row of the source repeats it, as in the service: it is judged with the same past, and is in no other
    window.

    Raises:
        DataError: the source is damaged, or it has no times although the model has a window.
    """
    if manifest.window is None:
        yield from (JudgedBatch(rows, rows.inputs, None) for rows in stream.batches())
        return
    if stream.time is None:
        refuse_rows_without_times(manifest, stream.source)
    batches = [_with_faulty_times(rows, stream.time) for rows in stream.batches()]
    windows, places = _windows(batches, manifest)
    first = 0
    for rows in batches:
        at = places[first : first + len(rows.x)]  # [B], -1 for faulty rows
        inputs = np.full((len(at), manifest.window.rows, rows.x.shape[1]), np.nan, np.float32)
        found = np.flatnonzero(at >= 0)
        inputs[found] = windows.take(at[found])
        inputs[found, -1] = rows.x[found]
        counts = np.where(at >= 0, np.minimum(windows.earlier[at] + 1, manifest.window.rows), 0)
        yield JudgedBatch(rows, inputs, counts)
        first += len(at)


def _with_faulty_times(rows: StreamedRows, column: str) -> StreamedRows:
    """Return `rows` with a fault for each row whose time is missing or is no time."""
    assert rows.time is not None
    fault = f"the row has no time in column {column!r}: the model judges a row together with the rows before it"
    faults = {i: fault for i, time in enumerate(rows.time) if not isinstance(time, float)}
    return replace(rows, faults=faults | rows.faults)


def _windows(batches: list[StreamedRows], manifest: Manifest) -> tuple[TableWindows, npt.NDArray[np.int64]]:
    """Return the windows of the rows without a fault, sorted by group and time, and the place of each row in them."""
    assert manifest.window is not None
    valid = np.array([i not in rows.faults for rows in batches for i in range(len(rows.x))], bool)  # [n]
    x = np.concatenate([rows.x for rows in batches])[valid]
    times = [time if isinstance(time, float) else np.nan for rows in batches for time in rows.time or ()]
    groups = [group for rows in batches for group in rows.group or [None] * len(rows.x)]
    time = np.array(times)[valid]
    group = np.unique(np.array(["" if name is None else f"={name}" for name in groups])[valid], return_inverse=True)[1]
    order = np.lexsort((time, group))  # [m], stable
    x, time, group = x[order], time[order], group[order]
    is_first = np.append(True, group[1:] != group[:-1])[: len(x)]  # also for no rows
    steps = np.diff(time, prepend=time[:1])
    repeats = ~is_first & (steps == 0)
    longest = manifest.window.longest_gap_seconds(manifest.timeline.usual_step_seconds if manifest.timeline else None)
    earlier = count_earlier_rows((is_first | (steps > longest))[~repeats])
    places = np.full(len(valid), -1)
    places[np.flatnonzero(valid)[order]] = np.cumsum(~repeats) - 1
    return TableWindows(RowStore(x[~repeats]), manifest.window, earlier), places
