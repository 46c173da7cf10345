"""`elbo score`: score the rows of a table with a published model, as NDJSON or CSV."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import torch

from models.artifact import Artifact
from models.artifact import score as score_with_gaps
from models.categories import CategoryColumns
from models.manifest import Manifest, Window
from models.silences import Silences
from training.data.row_store import Floats, all_finite
from training.data.row_stream import BATCH_ROWS, RowStream, StreamedRows
from training.data.table import DataError, Table
from training.data.windowed_stream import JudgedBatch, judged_batches
from training.data.windows import TableWindows

Counts = npt.NDArray[np.int64]

SCORE_OVERFLOW = "the score overflows float32: it is given as the largest float32"
MAX_FLOAT32 = np.finfo(np.float32).max
SILENCED: dict[str, Any] = {"is_anomaly": False, "silenced": True}  # fields of a row for which a silence holds
OVERFLOW = "the row is so far from the training data that the model's output for it overflows float32"


@dataclass(frozen=True)
class Scores:
    """The output of a model for B rows at one alpha, with D features and P parts of the score."""

    score: Floats  # [B]
    p_value: Floats  # [B]
    severity: Floats  # [B], above 1 if and only if the row is anomalous
    parts: Floats  # [B, P]
    contribution: Floats  # [B, D]
    expected: Floats  # [B, D], raw units

    @cached_property
    def all_finite(self) -> bool:
        """Whether every number is finite. This is the case for almost every batch."""
        return all(map(all_finite, (self.score, self.severity, self.parts, self.contribution, self.expected)))

    @property
    def usable(self) -> npt.NDArray[np.bool_]:
        """A mask [B] of the rows that get a verdict: no number is NaN, and all expected values are finite."""
        if self.all_finite:
            return np.ones(len(self.score), bool)
        numbers = np.column_stack((self.score, self.severity, self.parts, self.contribution))
        return np.asarray(~np.isnan(numbers).any(axis=1) & np.isfinite(self.expected).all(axis=1))

    def clipped(self) -> "Scores":
        """Return the same scores with the largest float32 in place of infinity."""
        if self.all_finite:
            return self
        names = ("score", "severity", "parts", "contribution")
        return replace(self, **{name: np.clip(getattr(self, name), -MAX_FLOAT32, MAX_FLOAT32) for name in names})


def score_rows(artifact: Artifact, x: Floats, alpha: float, extrapolated: bool = False) -> Scores:
    """Return the scores of rows x [B, D], or of windows x [B, N, D], at `alpha`.

    See `severity_at` for `extrapolated`.
    """
    with torch.inference_mode():
        score, parts, contribution, expected = score_with_gaps(artifact.module, torch.from_numpy(x).to(artifact.device))
        p_value = artifact.module.p_value(score)
        severity = severity_at(artifact, score, alpha, extrapolated)
    return Scores(
        score=score.cpu().numpy(),
        p_value=p_value.cpu().numpy(),
        severity=severity.cpu().numpy(),
        parts=parts.cpu().numpy(),
        contribution=contribution.cpu().numpy(),
        expected=expected.cpu().numpy(),
    )


def severity_at(artifact: Artifact, score: torch.Tensor, alpha: float, extrapolated: bool = False) -> torch.Tensor:
    """Return the severities [B] of scores [B].

    If `alpha` is below the smallest possible p-value, severities are at most 1, so that no row is anomalous, unless
    `extrapolated` is true.
    """
    severity: torch.Tensor = artifact.module.severity(score, alpha)
    reached = extrapolated or artifact.manifest.calibration.reaches(alpha)
    return severity if reached else severity.clamp(max=1.0)


def flagged_at(artifact: Artifact, scores: Floats, alpha: float) -> npt.NDArray[np.bool_]:
    """Return which of the scores [N] the calibration of `artifact` flags at `alpha`, [N]."""
    with torch.inference_mode():
        severity = severity_at(artifact, torch.from_numpy(scores).to(artifact.device), alpha)
    flagged: npt.NDArray[np.bool_] = (severity > 1).cpu().numpy()
    return flagged


def pixel_warning(artifact: Artifact, x: Floats) -> str | None:
    """Return a warning if the rows x [B, D] are in another pixel range than that of the model; None otherwise."""
    if artifact.manifest.pixel_range is None:
        return None
    low, high = np.fmin.reduce(x, axis=None), np.fmax.reduce(x, axis=None)
    return artifact.manifest.pixel_warning(float(low), float(high))


@dataclass
class Tally:
    """Counts of the rows that have been scored."""

    rows: int = 0
    faulty: int = 0
    first_fault: str | None = None  # describes the first faulty row
    pixel_warning: str | None = None  # models of images: the rows are in another pixel range

    def add_fault(self, row: int, fault: str) -> None:
        """Count a faulty row."""
        self.faulty += 1
        self.first_fault = self.first_fault or f"row {row}: {fault}"

    def note_pixels(self, artifact: Artifact, x: Floats) -> None:
        """Note if the rows x [B, D] are in another pixel range than that of the model."""
        self.pixel_warning = self.pixel_warning or pixel_warning(artifact, x)

    def refuse_faulty(self, source: str) -> None:
        """Raise DataError if there are faulty rows."""
        if self.faulty:
            verb = "rows is" if self.faulty == 1 else "rows are"
            others = "no row is scored" if self.faulty == self.rows else "the other rows are scored"
            raise DataError(
                f"{source}: {self.faulty:,} of {self.rows:,} {verb} faulty (the first is {self.first_fault}); {others}"
            )


def ndjson_lines(
    artifact: Artifact, stream: RowStream, alpha: float, explain: int, tally: Tally, extrapolated: bool = False
) -> Iterator[str]:
    """Yield NDJSON, several lines at a time. Each row is an object with the same fields as a result of /anomaly.

    A row without a score has the fields `row` and `detail`, as an error of /anomaly. A row whose score is too large for
    float32 has all fields.
    """
    option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    for results in _batches_of_results(artifact, stream, alpha, explain, tally, extrapolated):
        yield b"".join(orjson.dumps(result, option=option) for result in results).decode()


def csv_lines(
    artifact: Artifact, stream: RowStream, alpha: float, explain: int, tally: Tally, extrapolated: bool = False
) -> Iterator[str]:
    """Yield CSV, several lines at a time: a header, then a line per row. Each explained feature takes four columns.

    If the model has a window, there are also columns that say how many rows the window of a row has, and whether it is
    not full yet. The last columns are the time and the group, if the source has them, and the fault of
    a faulty row.
    """
    explained = range(1, min(explain, len(artifact.manifest.column_names)) + 1)
    columns = [f"{column}_{k}" for k in explained for column in ("feature", "value", "expected", "contribution")]
    scored = ["score", "p_value", "severity", "is_anomaly"]
    window = [] if artifact.manifest.window is None else ["window_rows", "warming_up"]
    passed_on = [name for name, column in (("time", stream.time), ("group", stream.group)) if column is not None]
    yield _csv([["row", *scored, *columns, *window, *passed_on, "detail"]])
    for results in _batches_of_results(artifact, stream, alpha, explain, tally, extrapolated):
        yield _csv(
            [
                result["row"],
                *(_csv_cells(result, scored) if "score" in result else [""] * (len(scored) + len(columns))),
                *(int(result[name]) if name in result else "" for name in window),
                *(result.get(name, "") for name in passed_on),
                result.get("detail", ""),
            ]
            for result in results
        )


def _csv_cells(result: dict[str, Any], scored: Sequence[str]) -> Iterator[object]:
    for name in scored:
        yield int(result[name]) if name == "is_anomaly" else result[name]
    for feature in result["features"]:
        yield from feature.values()


def _csv(lines: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([str(cell) for cell in line] for line in lines)
    return buffer.getvalue()


# The fields are those of `results_and_errors` in service/anomaly/verdicts.py. No module can hold the code for both:
# training must not import service, and service imports only the artifact, the manifest and the errors from models.
def _batches_of_results(
    artifact: Artifact, stream: RowStream, alpha: float, explain: int, tally: Tally, extrapolated: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """Yield the results of the rows of `stream` in order, a batch at a time. Count them in `tally`.

    If the model has a window, the result of a row also says how many rows its window has, and whether it is not full
    yet. A row whose window has less than a third of its rows is never anomalous.

    As in responses of /anomaly, a number that is too large for float32 is given as the largest float32.
    """
    window = artifact.manifest.window
    for batch in judged_batches(stream, artifact.manifest):
        rows, counts = batch.rows, batch.counts
        tally.note_pixels(artifact, rows.x)
        verdicts = judge(artifact, stream, batch, alpha, extrapolated)
        scores, contribution = verdicts.scores, verdicts.contribution
        top = np.argsort(-contribution, axis=1, kind="stable")[:, :explain]  # [B, explain], largest first
        shown = np.where(rows.missing, np.float32(np.nan), rows.x)  # a missing value is null in NDJSON
        lacks_values = np.asarray(rows.missing.any(axis=1))
        results = []
        for i in range(len(rows.x)):
            fault = rows.faults.get(i)
            result: dict[str, Any] = {"row": rows.first + i}
            if fault is None and verdicts.usable[i]:
                result |= _verdict(artifact, stream, scores, shown, i, top[i])
                result |= explain_columns(stream.columns, scores, shown, i, top[i], contribution[i], rows)
                if lacks_values[i]:
                    result["imputed"] = _missing_columns(stream, rows.missing[i])
                result |= _window_fields(counts, window, i) | (SILENCED if verdicts.silenced[i] else {})
            for name, values in (("time", rows.time), ("group", rows.group)):
                if values is not None and values[i] is not None:
                    result[name] = values[i]
            if (fault := verdicts.fault(i, fault)) is not None:
                result["detail"] = fault
                tally.add_fault(rows.first + i, fault)
            results.append(result)
        tally.rows += len(results)
        yield results


def _without_short_windows(scores: Scores, counts: Counts | None, window: Window | None) -> Scores:
    """Return `scores` with a severity of at most 1 where a window has too few rows to judge its row."""
    if counts is None or window is None:
        return scores
    severity = np.where(counts < window.least_rows, np.minimum(scores.severity, 1), scores.severity)
    return replace(scores, severity=severity)


def silenced_rows(
    manifest: Manifest, times: Sequence[Any] | None, groups: Sequence[str | None] | None, rows: int
) -> npt.NDArray[np.bool_]:
    """Return for which rows a silence of the policy holds, [B]. It holds for no row whose time is unknown."""
    if times is None or manifest.policy is None or not manifest.policy.rules.silences:
        return np.zeros(rows, bool)
    seconds = np.array([time if isinstance(time, float) else np.nan for time in times])
    held = Silences(manifest.policy.rules.silences).hold(seconds, groups, rows, now=0.0)
    return np.asarray(held & ~np.isnan(seconds))


def _window_fields(counts: Counts | None, window: Window | None, i: int) -> dict[str, Any]:
    """Return the fields on the window of row i: `counts` [B] says how many rows each window has."""
    if counts is None or window is None:
        return {}
    return {"window_rows": int(counts[i]), "warming_up": bool(counts[i] < window.rows)}


def _verdict(
    artifact: Artifact, stream: RowStream, scores: Scores, x: Floats, i: int, top: npt.NDArray[np.intp]
) -> dict[str, Any]:
    """Return the fields of the verdict on row i of x [B, D], whose largest contributions are those of columns `top`."""
    return {
        "score": scores.score[i],
        "p_value": scores.p_value[i],
        "severity": scores.severity[i],
        "is_anomaly": bool(scores.severity[i] > 1),
        "parts": dict(zip(artifact.manifest.parts, scores.parts[i], strict=True)),
        "features": [
            {
                "name": stream.names[j],
                "value": x[i, j],
                "expected": scores.expected[i, j],
                "contribution": scores.contribution[i, j],
            }
            for j in (() if stream.columns else top)
        ],
    }


def _missing_columns(stream: RowStream, missing: npt.NDArray[np.bool_]) -> list[str]:
    """Return the names of the columns of a row that lack a value: `missing` [D] says which features do."""
    if stream.columns is None:
        return [stream.names[j] for j in np.flatnonzero(missing)]
    return [stream.columns.names[j] for j in np.flatnonzero(stream.columns.missing(missing[None])[0])]


def explain_columns(
    columns: CategoryColumns | None,
    scores: Scores,
    x: Floats,
    i: int,
    top: npt.NDArray[np.intp],
    contribution: Floats,
    rows: StreamedRows,
) -> dict[str, Any]:
    """Return the fields of the verdict on row i of x [B, D] that a model with categories has, or none.

    Args:
        top: the columns with the largest contributions, largest first.
        contribution: the contribution of each column, [n + J].
        rows: the rows, with the levels that the model does not know.
    """
    if columns is None:
        return {}
    unknown, numbers = dict(rows.unknown_levels.get(i, [])), len(columns.numbers)
    features = []
    for j in top.tolist():
        name = columns.names[j]
        value: Any = x[i, j] if j < numbers else unknown.get(name) or columns.level_of(j - numbers, x[i])
        expected: Any = scores.expected[i, j] if j < numbers else columns.level_of(j - numbers, scores.expected[i])
        features.append({"name": name, "value": value, "expected": expected, "contribution": contribution[j]})
    return {"features": features, **_unseen_levels(columns, rows.unknown_levels.get(i, []))}


def _unseen_levels(columns: CategoryColumns, unknown: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the field on the levels of a row that the model does not know: `unknown` has column and text."""
    levels = [columns.code(name, text)[1] for name, text in unknown]
    found = [level._asdict() for level in levels if level is not None]
    return {"unseen_levels": found} if found else {}


class Verdicts(NamedTuple):
    """What a model says of B rows of a stream."""

    scores: Scores  # the largest float32 replaces infinity
    usable: npt.NDArray[np.bool_]  # [B], whether a row without a fault has a verdict
    overflows: npt.NDArray[np.bool_]  # [B], whether the score of a row was too large for float32
    silenced: npt.NDArray[np.bool_]  # [B], whether a silence of the policy holds
    contribution: Floats  # [B, D], or [B, n + J] for a model with categories: one per column

    def fault(self, i: int, fault: str | None) -> str | None:
        """Return why row i has no score, or no exact one; None if nothing is wrong. `fault`: what its reader found."""
        if fault is None and not self.usable[i]:
            return OVERFLOW
        return SCORE_OVERFLOW if fault is None and self.overflows[i] else fault


def judge(
    artifact: Artifact, stream: RowStream, batch: JudgedBatch, alpha: float, extrapolated: bool = False
) -> Verdicts:
    """Return the verdicts of the model on the rows of `batch`."""
    window = artifact.manifest.window
    scores = _without_short_windows(score_rows(artifact, batch.inputs, alpha, extrapolated), batch.counts, window)
    usable, overflows = scores.usable, ~np.isfinite(scores.score)
    with np.errstate(invalid="ignore"):
        scores = scores.clipped()
    contribution = scores.contribution
    if stream.columns is not None:
        contribution = stream.columns.contributions(contribution)
    silenced = silenced_rows(artifact.manifest, batch.rows.time, batch.rows.group, len(batch.rows.x))
    return Verdicts(scores, usable, overflows, silenced, contribution)


class JudgedRows(NamedTuple):
    """Rows of a table that a model judges, and its inputs for them: the rows, or their windows."""

    numbers: npt.NDArray[np.int64]  # [B], row numbers
    rows: Floats  # [B, D]
    inputs: Floats  # [B, D], [B, N, D], or with conditions [B, D + C]


def batches(table: Table, windows: TableWindows | None) -> Iterator[JudgedRows]:
    """Yield the rows of `table` in order, in batches of at most BATCH_ROWS rows.

    Args:
        windows: the windows of the rows; None if the model judges each row alone. Rows whose windows have too few rows
            are left out, because the model does not judge them.
    """
    judged = None if windows is None else windows.judged
    for start, block in table.x.blocks():
        for first in range(0, len(block), BATCH_ROWS):
            rows = block[first : first + BATCH_ROWS]
            numbers = np.arange(start + first, start + first + len(rows))
            if windows is None or judged is None:
                yield JudgedRows(numbers, rows, rows if table.coded is None else table.inputs.take(numbers))
                continue
            numbers, rows = numbers[judged[numbers]], rows[judged[numbers]]
            if len(rows):
                yield JudgedRows(numbers, rows, windows.take(numbers))


def refuse_overflow(scores: Floats, rows: npt.NDArray[np.int64], source: str) -> None:
    """Raise DataError if one of the scores [B] is not finite. `rows` are the row numbers of the scores, [B]."""
    if not np.isfinite(scores).all():
        row = rows[int(np.argmin(np.isfinite(scores)))]
        raise DataError(f"{source}: the score of row {row} overflows float32: expected values near the training data")
