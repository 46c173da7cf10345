"""The output of `elbo score NAME DATA OUTPUT` for a batch of rows, as a frame.

The columns of the verdict and of the features are those of `elbo score --format csv`. There is no column `detail`, and
the columns of times and groups are copied under their own names.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from models.artifact import Artifact
from models.manifest import Manifest
from training.data.row_stream import RowStream
from training.data.windowed_stream import JudgedBatch, judged_batches
from training.errors import DataError
from training.evaluation.score import Verdicts, explain_columns, judge, pixel_warning

VERDICT = ("row", "score", "p_value", "severity", "is_anomaly")
FEATURE = ("feature", "value", "expected", "contribution")
WINDOW = ("window_rows", "warming_up")
FILE = "file"
FEW_COLUMNS = 32


class FaultyRow(NamedTuple):
    """A row without a score, or one whose score is too large for float32."""

    row: int
    detail: str
    ids: dict[str, Any]  # by name: the cells of the columns `RowStream.passed_on`


class ScoredBatch(NamedTuple):
    """The output for a batch of rows."""

    frame: pl.DataFrame  # the rows that have a verdict, in order
    faulty: list[FaultyRow]
    rows: int  # number of rows, also of those without a verdict
    anomalies: int
    pixel_warning: str | None  # models of images: the rows are in another pixel range


def output_columns(manifest: Manifest, explain: int, passed_on: tuple[str, ...], has_file: bool = False) -> list[str]:
    """Return the names of the columns of the output.

    Args:
        manifest: the manifest of the model.
        explain: number of features to report per row.
        passed_on: the columns of the data that are copied into the output.
        has_file: whether the output has a column with the name of each row's file.

    Raises:
        DataError: a column that is copied has the name of another column of the output.
    """
    explained = range(1, min(explain, len(manifest.column_names)) + 1)
    window = () if manifest.window is None else WINDOW
    own = [*VERDICT[1:], *(f"{name}_{k}" for k in explained for name in FEATURE), *window]
    position = [*([FILE] if has_file else []), VERDICT[0]]
    if taken := [name for name in passed_on if name in {*position, *own}]:
        raise DataError(f"the output has a column {taken[0]!r} of its own: rename this column of the data")
    return [*position, *passed_on, *own]


def score_batches(
    artifact: Artifact,
    stream: RowStream,
    alpha: float,
    explain: int,
    extrapolated: bool,
    *,
    first_row: int = 0,
    file: str | None = None,
) -> Iterator[ScoredBatch]:
    """Yield the output for the rows of `stream`, a batch at a time.

    Args:
        artifact: the model.
        stream: the rows.
        alpha: false-alarm rate.
        explain: number of features to report per row.
        extrapolated: see `training.evaluation.score.severity_at`.
        first_row: the number of the first row of `stream` in its source.
        file: the value of the column FILE; None for an output without this column.
    """
    columns = output_columns(artifact.manifest, explain, stream.passed_on, file is not None)
    for batch in judged_batches(stream, artifact.manifest):
        verdicts = judge(artifact, stream, batch, alpha, extrapolated)
        count, first = len(batch.rows.x), first_row + batch.rows.first
        fields = _fields(artifact, stream, batch, verdicts, explain)
        fields[VERDICT[0]] = pl.Series(np.arange(first, first + count))
        if file is not None:
            fields[FILE] = pl.repeat(file, count, eager=True)
        kept = verdicts.usable.copy()
        kept[list(batch.rows.faults)] = False
        frame = pl.DataFrame({name: fields[name] for name in columns})
        frame = frame if kept.all() else frame.filter(pl.Series(kept))
        anomalies = int(frame["is_anomaly"].sum())
        faulty, warning = _faulty_rows(batch, verdicts, kept, first), pixel_warning(artifact, batch.rows.x)
        yield ScoredBatch(frame, faulty, count, anomalies, warning)


def _faulty_rows(batch: JudgedBatch, verdicts: Verdicts, kept: npt.NDArray[np.bool_], first: int) -> list[FaultyRow]:
    faulty = []
    for i in np.flatnonzero(~kept | verdicts.overflows).tolist():
        detail = verdicts.fault(i, batch.rows.faults.get(i))
        ids = {name: cells[i] for name, cells in batch.rows.passed_on.items()}
        faulty.append(FaultyRow(first + i, str(detail), ids))
    return faulty


def _fields(
    artifact: Artifact, stream: RowStream, batch: JudgedBatch, verdicts: Verdicts, explain: int
) -> dict[str, pl.Series]:
    """Return the columns of the output by name, except `row` and FILE, for all rows of `batch`, even faulty ones."""
    scores = verdicts.scores
    fields: dict[str, Any] = {
        **batch.rows.passed_on,
        "score": scores.score,
        "p_value": scores.p_value,
        "severity": scores.severity,
        "is_anomaly": (scores.severity > 1) & ~verdicts.silenced,
    }
    window = artifact.manifest.window
    if batch.counts is not None and window is not None:
        fields |= {"window_rows": batch.counts, "warming_up": batch.counts < window.rows}
    top = largest(verdicts.contribution, explain)
    if stream.columns is None:
        fields |= _explained(stream, batch, verdicts, top)
    else:
        fields |= _explained_columns(stream, batch, verdicts, top)
    return {name: values if isinstance(values, pl.Series) else pl.Series(values) for name, values in fields.items()}


def largest(contribution: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.intp]:
    """Return the indices [B, count] of the largest contributions [B, D] of each row, largest first.

    Equal contributions are in the order of their indices, as in a stable sort. Finding a few takes a tenth of the time
    of sorting all.
    """
    width = contribution.shape[1]
    count = min(count, width)
    if count > 8:
        return np.argsort(-contribution, axis=1, kind="stable")[:, :count]
    top = np.empty((len(contribution), count), np.intp)
    if width > FEW_COLUMNS:
        remaining = contribution.copy()
        every = np.arange(len(remaining))
        for k in range(count):
            top[:, k] = remaining.argmax(axis=1)
            remaining[every, top[:, k]] = -np.inf
        return top
    columns = np.array(contribution.T, order="C")  # [D, B], a copy
    every = np.arange(len(contribution))
    for k in range(count):
        top[:, k] = _argmax_of_columns(columns)
        columns[top[:, k], every] = -np.inf
    return top


def _argmax_of_columns(columns: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """Return for each row the index of the first of the largest values, [B]. `columns` [D, B], D at most FEW_COLUMNS.

    Without NaN, this is `columns.argmax(axis=0)`, which compares one value after another. Here each step compares many
    rows at once, which takes a fifth of the time if there are few columns.
    """
    largest_so_far, found = columns[0].copy(), np.zeros(columns.shape[1], np.int8)
    for index in range(1, len(columns)):
        is_larger = columns[index] > largest_so_far
        np.maximum(found, is_larger.view(np.int8) * np.int8(index), out=found)  # a later index is a larger number
        np.maximum(largest_so_far, columns[index], out=largest_so_far)
    return found


def _explained(
    stream: RowStream, batch: JudgedBatch, verdicts: Verdicts, top: npt.NDArray[np.intp]
) -> dict[str, pl.Series]:
    """Return the columns on the features with the largest contributions; `top` [B, k] has their indices."""
    names = pl.Series(stream.names, dtype=pl.Enum(stream.names))
    first = np.arange(len(top)) * len(stream.names)  # [B], the index of the first value of each row in `ravel()`
    has_gaps = bool(batch.rows.missing.any())
    fields: dict[str, pl.Series] = {}
    for k in range(top.shape[1]):
        index = first + top[:, k]
        value = batch.rows.x.ravel().take(index)
        if has_gaps:
            value[batch.rows.missing.ravel().take(index)] = np.nan
        values = (
            names.gather(top[:, k]),
            pl.Series(value, nan_to_null=True),
            pl.Series(verdicts.scores.expected.ravel().take(index)),
            pl.Series(verdicts.contribution.ravel().take(index)),
        )
        fields |= {f"{title}_{k + 1}": series for title, series in zip(FEATURE, values, strict=True)}
    return fields


def _explained_columns(
    stream: RowStream, batch: JudgedBatch, verdicts: Verdicts, top: npt.NDArray[np.intp]
) -> dict[str, pl.Series]:
    """Return the same columns as `_explained` for a model with categories. Numbers and levels are text."""
    shown = np.where(batch.rows.missing, np.float32(np.nan), batch.rows.x)
    rows = [
        explain_columns(stream.columns, verdicts.scores, shown, i, top[i], verdicts.contribution[i], batch.rows)
        for i in range(len(top))
    ]
    fields = {}
    for k in range(top.shape[1]):
        for title, name in zip(FEATURE, ("name", "value", "expected", "contribution"), strict=True):
            cells = [row["features"][k][name] for row in rows]
            is_number = name == "contribution"
            fields[f"{title}_{k + 1}"] = (
                pl.Series(cells, dtype=pl.Float32)
                if is_number
                else pl.Series([None if cell is None or cell != cell else str(cell) for cell in cells], dtype=pl.String)
            )
    return fields
