"""A published model applied to a table: how well it does on all rows, and what it says of each."""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt
import orjson
import torch

from models.artifact import Artifact
from training.data import DataError, Table

ALPHAS = (0.1, 0.05, 0.01)
BATCH = 1024  # rows that go through the model at once

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Verdicts:
    """What a model says of B rows at one alpha."""

    score: Floats  # [B]
    p_value: Floats  # [B]
    severity: Floats  # [B], > 1 exactly where a row is anomalous
    parts: Floats  # [B, P]
    contribution: Floats  # [B, D]
    expected: Floats  # [B, D], raw units


@dataclass(frozen=True)
class Evaluation:
    """How a model does on a table. Errors are mean squared errors a feature, in raw units squared."""

    model: str  # name@version
    source: str
    rows: int
    reconstruction_error: float
    median_error: float  # of predicting the medians of the training rows
    mean_score: float
    alarm_rates: dict[str, float]  # by alpha: the share of the normal rows (of all, without labels) that is flagged
    detection_rates: dict[str, float] | None  # by alpha: the share of the rows labelled 1 that is flagged
    auroc: float | None
    average_precision: float | None
    seen: bool  # whether these are the very rows that the model was trained, held out and calibrated on


def evaluate(artifact: Artifact, table: Table) -> Evaluation:
    """Judge `artifact` on `table`. Labels count if they are 0 (normal) and 1 (anomalous), both present."""
    scores, errors = _scores_and_errors(artifact, table.x)
    _refuse_overflow(scores, 0, table.source)
    medians = np.array([feature.median for feature in artifact.manifest.features])
    labels = table.labels if table.labels is not None and set(np.unique(table.labels)) == {0, 1} else None
    normal = np.ones(len(scores), bool) if labels is None else labels == 0
    flagged = {str(alpha): _flagged(artifact, scores, alpha) for alpha in ALPHAS}
    auroc, precision = (None, None) if labels is None else _ranking(labels, scores)
    return Evaluation(
        model=f"{artifact.manifest.name}@{artifact.path.parent.name}",
        source=table.source,
        rows=len(table.x),
        reconstruction_error=float(errors.mean()),
        median_error=float(np.square(table.x - medians).mean()),
        mean_score=float(scores.mean(dtype=np.float64)),
        alarm_rates={alpha: float(rows[normal].mean()) for alpha, rows in flagged.items()},
        detection_rates=None if labels is None else {a: float(rows[~normal].mean()) for a, rows in flagged.items()},
        auroc=auroc,
        average_precision=precision,
        seen=table.fingerprint == artifact.manifest.data.fingerprint,
    )


def _scores_and_errors(artifact: Artifact, x: Floats) -> tuple[Floats, npt.NDArray[np.float64]]:
    """score [N] and the mean squared error of each row [N]."""
    scores, errors = [], []
    with torch.inference_mode():
        for rows in torch.from_numpy(x).to(artifact.device).split(BATCH):
            scores.append(artifact.module.score(rows)[0].cpu().numpy())
            errors.append((rows - artifact.module(rows)).double().square().mean(dim=1).cpu().numpy())
    return np.concatenate(scores), np.concatenate(errors)


def _flagged(artifact: Artifact, scores: Floats, alpha: float) -> npt.NDArray[np.bool_]:
    with torch.inference_mode():
        severity = artifact.module.severity(torch.from_numpy(scores).to(artifact.device), alpha)
    flagged: npt.NDArray[np.bool_] = (severity > 1).cpu().numpy()
    return flagged


def _ranking(labels: npt.NDArray[np.int64], scores: Floats) -> tuple[float, float]:
    from sklearn.metrics import average_precision_score, roc_auc_score

    return float(roc_auc_score(labels, scores)), float(average_precision_score(labels, scores))


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
    for first in range(0, len(table.x), BATCH):
        rows = table.x[first : first + BATCH]
        verdicts = judge(artifact, rows, alpha)
        _refuse_overflow(verdicts.score, first, table.source)
        yield first, rows, verdicts, np.argsort(-verdicts.contribution, axis=1, kind="stable")[:, :explain]


def _refuse_overflow(scores: Floats, first: int, source: str) -> None:
    if not np.isfinite(scores).all():
        row = first + int(np.argmin(np.isfinite(scores)))
        raise DataError(f"{source}: row {row} overflows in the model: expected values near those it was trained on")


def evaluation_text(evaluation: Evaluation) -> str:
    """`evaluation` in a few lines for a person."""
    flagged = "flagged" if evaluation.detection_rates is None else "false alarms"
    alarms = "  ".join(f"{rate:.4f} at {alpha}" for alpha, rate in evaluation.alarm_rates.items())
    lines = [
        f"{evaluation.model} on {evaluation.source}: {evaluation.rows:,} rows"
        + (", the ones that it was trained on" if evaluation.seen else ""),
        f"reconstruction error   {evaluation.reconstruction_error:.6g}  (mean square a feature, raw units)",
        f"predicting the median  {evaluation.median_error:.6g}",
        f"mean score             {evaluation.mean_score:.6g}",
        f"{flagged:<21}  {alarms}",
    ]
    if evaluation.detection_rates is not None:
        found = "  ".join(f"{rate:.4f} at {alpha}" for alpha, rate in evaluation.detection_rates.items())
        lines.append(f"anomalies found        {found}")
        lines.append(f"AUROC                  {evaluation.auroc:.4f}")
        lines.append(f"average precision      {evaluation.average_precision:.4f}")
    return "\n".join(lines)


def evaluation_json(evaluation: Evaluation) -> str:
    """`evaluation` for a machine."""
    return orjson.dumps(asdict(evaluation), option=orjson.OPT_INDENT_2).decode()
