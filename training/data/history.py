"""Read the rows of a table that has times, for `elbo backtest`. Faulty rows are left out and counted."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.manifest import Manifest
from training.data.row_fingerprints import find_known_rows
from training.data.row_store import Floats, RowStore
from training.data.row_stream import RowStream
from training.errors import DataError


@dataclass(frozen=True)
class HistoryRows:
    """The M rows of a source that can be judged, in the order of the source.

    Args:
        x: [M, D], raw units; NaN for a missing value that the model can impute.
        time: [M], Unix seconds.
        group: [M]; None if the source has no column of groups.
        source_rows: [M], number of the row in the source, from 0.
        faulty: number of rows that cannot be judged.
        first_fault: why the first of them cannot be judged; None if there is none.
    """

    x: Floats
    time: npt.NDArray[np.float64]
    group: list[str | None] | None
    source_rows: npt.NDArray[np.int64]
    faulty: int
    first_fault: str | None


def read_history(stream: RowStream, report: Callable[[int], None] = lambda _: None) -> HistoryRows:
    """Return the rows of `stream`. `report` is called with the number of rows read so far.

    Raises:
        DataError: the source has no column of times, or no row can be judged.
    """
    if stream.time is None:
        raise DataError(
            f"{stream.source} has no column of times: a backtest replays rows in order of time; name the column with "
            "--time"
        )
    blocks, times, rows = [], [], []
    groups: list[str | None] = []
    faulty, first_fault = 0, None
    for batch in stream.batches():
        assert batch.time is not None
        time = np.array([cell if isinstance(cell, float) else np.nan for cell in batch.time])
        valid = np.isfinite(time)
        valid[list(batch.faults)] = False
        if not valid.all():
            faulty += int((~valid).sum())
            place = int(np.flatnonzero(~valid)[0])
            fault = batch.faults.get(place, f"{stream.time!r} has {batch.time[place]!r}, which is not a timestamp")
            first_fault = first_fault or f"row {batch.first + place}: {fault}"
        blocks.append(batch.x[valid])
        times.append(time[valid])
        rows.append(batch.first + np.flatnonzero(valid))
        if batch.group is not None:
            groups += batch.group if valid.all() else [batch.group[place] for place in np.flatnonzero(valid).tolist()]
        report(batch.first + len(valid))
    x = np.concatenate(blocks)
    if not len(x):
        raise DataError(f"{stream.source}: no row can be judged ({first_fault}): correct the rows")
    return HistoryRows(
        x=x,
        time=np.concatenate(times),
        group=None if stream.group is None else groups,
        source_rows=np.concatenate(rows),
        faulty=faulty,
        first_fault=first_fault,
    )


def describe_trained_rows(rows: HistoryRows, manifest: Manifest, sketch: bytes | None) -> str | None:
    """Return a warning if many of `rows` trained the model, because such rows raise fewer alarms; None otherwise.

    Args:
        rows: the history.
        manifest: the manifest of the model.
        sketch: the hashes of the rows that trained the model; None if they are unknown.
    """
    known = None if sketch is None else find_known_rows(sketch, RowStore(rows.x), np.arange(len(rows.x)))
    if known is None or not known.significant:
        return None
    advice = "rehearse rows that the model has not seen"
    if manifest.timeline is not None:
        periods = [manifest.timeline.fit, manifest.timeline.held_out]
        advice += f", such as those after {max(period.last for period in periods)}"
    return (
        f"about {100 * known.share:.2g} % of the rows were used to train {manifest.name}, whose scores of them are too "
        f"low: later rows will raise more alarms; {advice}"
    )
