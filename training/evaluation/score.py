"""What a published model says of each row of a table."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import orjson
import torch

from models.artifact import Artifact
from training.data.row_store import Floats
from training.data.table import DataError, Table

BATCH = 1024  # rows that go through the model at once


@dataclass(frozen=True)
class Verdicts:
    """What a model says of B rows at one alpha."""

    score: Floats  # [B]
    p_value: Floats  # [B]
    severity: Floats  # [B], > 1 exactly where a row is anomalous
    parts: Floats  # [B, P]
    contribution: Floats  # [B, D]
    expected: Floats  # [B, D], raw units


def judge(artifact: Artifact, x: Floats, alpha: float) -> Verdicts:
    """What `artifact` says of rows x [B, D] at `alpha`."""
    with torch.inference_mode():
        score, parts, contribution, expected = artifact.module.score(torch.from_numpy(x).to(artifact.device))
        answers = (
            score,
            artifact.module.p_value(score),
            artifact.module.severity(score, alpha),
            parts,
            contribution,
            expected,
        )
    return Verdicts(*(answer.cpu().numpy() for answer in answers))


def ndjson(artifact: Artifact, table: Table, alpha: float, explain: int) -> Iterator[str]:
    """One JSON object a row, in batches of lines: the fields of an HTTP answer of /anomaly."""
    for first, rows, verdicts, top in _batches(artifact, table, alpha, explain):
        lines = [
            orjson.dumps(
                {
                    "row": first + i,
                    "score": verdicts.score[i],
                    "p_value": verdicts.p_value[i],
                    "severity": verdicts.severity[i],
                    "is_anomaly": bool(verdicts.severity[i] > 1),
                    "parts": dict(zip(artifact.manifest.parts, verdicts.parts[i], strict=True)),
                    "features": [
                        {
                            "name": table.names[j],
                            "value": rows[i, j],
                            "expected": verdicts.expected[i, j],
                            "contribution": verdicts.contribution[i, j],
                        }
                        for j in top[i]
                    ],
                },
                option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE,
            )
            for i in range(len(rows))
        ]
        yield b"".join(lines).decode()


def csv_lines(artifact: Artifact, table: Table, alpha: float, explain: int) -> Iterator[str]:
    """A header, then one line a row, in batches: the features that contribute most in columns of their own."""
    explained = range(1, min(explain, len(table.names)) + 1)
    columns = [f"{column}_{k}" for k in explained for column in ("feature", "value", "expected", "contribution")]
    yield _csv([["row", "score", "p_value", "severity", "is_anomaly", *columns]])
    for first, rows, verdicts, top in _batches(artifact, table, alpha, explain):
        yield _csv(
            [
                first + i,
                verdicts.score[i],
                verdicts.p_value[i],
                verdicts.severity[i],
                int(verdicts.severity[i] > 1),
                *(
                    cell
                    for j in top[i]
                    for cell in (table.names[j], rows[i, j], verdicts.expected[i, j], verdicts.contribution[i, j])
                ),
            ]
            for i in range(len(rows))
        )


def _csv(lines: Sequence[Sequence[object]] | Iterator[Sequence[object]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([str(cell) for cell in line] for line in lines)
    return buffer.getvalue()


def _batches(
    artifact: Artifact, table: Table, alpha: float, explain: int
) -> Iterator[tuple[int, Floats, Verdicts, npt.NDArray[np.intp]]]:
    """The first row's number, the rows, the verdicts, and the features [B, explain] that contribute most, per batch."""
    for first, rows in batches(table):
        verdicts = judge(artifact, rows, alpha)
        refuse_overflow(verdicts.score, first, table.source)
        yield first, rows, verdicts, np.argsort(-verdicts.contribution, axis=1, kind="stable")[:, :explain]


def batches(table: Table) -> Iterator[tuple[int, Floats]]:
    """The rows of `table` in order, at most BATCH at a time, each batch with the number of its first row."""
    for start, block in table.x.blocks():
        for first in range(0, len(block), BATCH):
            yield start + first, block[first : first + BATCH]


def refuse_overflow(scores: Floats, first: int, source: str) -> None:
    """Raise DataError, naming the row, if a score is not finite. `first` is the number of the first row."""
    if not np.isfinite(scores).all():
        row = first + int(np.argmin(np.isfinite(scores)))
        raise DataError(f"{source}: row {row} overflows in the model: expected values near those it was trained on")
