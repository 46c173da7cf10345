"""`elbo score`: score the rows of a table with a published model, as NDJSON or CSV."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import torch

from models.artifact import Artifact
from training.data.row_store import Floats
from training.data.table import DataError, Table

BATCH_ROWS = 1024  # rows scored at once


@dataclass(frozen=True)
class Scores:
    """The output of a model for B rows at one alpha, with D features and P parts of the score."""

    score: Floats  # [B]
    p_value: Floats  # [B]
    severity: Floats  # [B], above 1 if and only if the row is anomalous
    parts: Floats  # [B, P]
    contribution: Floats  # [B, D]
    expected: Floats  # [B, D], raw units


def score_rows(artifact: Artifact, x: Floats, alpha: float) -> Scores:
    """Return the scores of rows x [B, D] at `alpha`."""
    with torch.inference_mode():
        score, parts, contribution, expected = artifact.module.score(torch.from_numpy(x).to(artifact.device))
        p_value = artifact.module.p_value(score)
        severity = artifact.module.severity(score, alpha)
    return Scores(
        score=score.cpu().numpy(),
        p_value=p_value.cpu().numpy(),
        severity=severity.cpu().numpy(),
        parts=parts.cpu().numpy(),
        contribution=contribution.cpu().numpy(),
        expected=expected.cpu().numpy(),
    )


def ndjson_lines(artifact: Artifact, table: Table, alpha: float, explain: int) -> Iterator[str]:
    """Yield NDJSON, several lines at a time. Each row is an object with the same fields as a result of /anomaly."""
    option = orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE
    for results in _batches_of_results(artifact, table, alpha, explain):
        yield b"".join(orjson.dumps(result, option=option) for result in results).decode()


def csv_lines(artifact: Artifact, table: Table, alpha: float, explain: int) -> Iterator[str]:
    """Yield CSV, several lines at a time: a header, then a line per row. Each explained feature takes four columns."""
    explained = range(1, min(explain, len(table.names)) + 1)
    columns = [f"{column}_{k}" for k in explained for column in ("feature", "value", "expected", "contribution")]
    yield _csv([["row", "score", "p_value", "severity", "is_anomaly", *columns]])
    for results in _batches_of_results(artifact, table, alpha, explain):
        yield _csv(
            [
                result["row"],
                result["score"],
                result["p_value"],
                result["severity"],
                int(result["is_anomaly"]),
                *(cell for feature in result["features"] for cell in feature.values()),
            ]
            for result in results
        )


def _csv(lines: Iterable[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([str(cell) for cell in line] for line in lines)
    return buffer.getvalue()


# The fields are those of `results_and_errors` in service/anomaly/verdicts.py. No module can hold the code for both:
# training must not import service, and service imports only the artifact, the manifest and the errors from models.
def _batches_of_results(artifact: Artifact, table: Table, alpha: float, explain: int) -> Iterator[list[dict[str, Any]]]:
    """Yield the results of the rows of `table` in order, a batch at a time.

    Raises:
        DataError: a score is not finite.
    """
    for first, x in batches(table):
        scores = score_rows(artifact, x, alpha)
        refuse_overflow(scores.score, first, table.source)
        top = np.argsort(-scores.contribution, axis=1, kind="stable")[:, :explain]  # [B, explain], largest first
        yield [
            {
                "row": first + i,
                "score": scores.score[i],
                "p_value": scores.p_value[i],
                "severity": scores.severity[i],
                "is_anomaly": bool(scores.severity[i] > 1),
                "parts": dict(zip(artifact.manifest.parts, scores.parts[i], strict=True)),
                "features": [
                    {
                        "name": table.names[j],
                        "value": x[i, j],
                        "expected": scores.expected[i, j],
                        "contribution": scores.contribution[i, j],
                    }
                    for j in top[i]
                ],
            }
            for i in range(len(x))
        ]


def batches(table: Table) -> Iterator[tuple[int, Floats]]:
    """Yield the rows of `table` in order, in batches [B, D]. Each batch comes with the number of its first row."""
    for start, block in table.x.blocks():
        for first in range(0, len(block), BATCH_ROWS):
            yield start + first, block[first : first + BATCH_ROWS]


def refuse_overflow(scores: Floats, first: int, source: str) -> None:
    """Raise DataError if a score is not finite. `first` is the row number of scores[0]."""
    if not np.isfinite(scores).all():
        row = first + int(np.argmin(np.isfinite(scores)))
        raise DataError(f"{source}: the score of row {row} overflows float32: expected values near the training data")
