"""Model selection for `--model auto`: compare candidates row by row on held-out rows."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from models.levels import columns_of_features, sizes_of
from models.likelihood import GaussianLikelihood
from models.pca import PCA
from models.pipeline import Pipeline
from models.vae import VAE
from training.config import TrainConfig
from training.evaluation.metrics import count_latents, importance_weighted
from training.evaluation.worth import STANDARD_ERRORS, trimmed_mean
from training.fitting.prepared_data import PreparedData
from training.progress import Reporter
from training.reports.history import HistoryRecorder

SWAPPED_SHARE = 0.1  # share of the values of a row that `swap_values` replaces
SAMPLES = 100  # importance samples per row
MEANING = {
    "reconstruction_error": "mean square per value, model units, 10 % trimmed mean of rows; lower is better",
    "log_likelihood": "nats per row, model units, 10 % trimmed mean of rows; a lower bound for a VAE; higher is better",
    "detection": "AUROC of the score: rows with a tenth of their values swapped against intact rows",
}
SIGN = {"reconstruction_error": -1.0, "log_likelihood": 1.0, "detection": 1.0}  # -1 if lower values are better
BATCH = 4096  # rows processed at once; limits the memory

Measures = dict[str, Tensor]  # by name: one value per row, higher is better; the rows are the same for all models


@dataclass(frozen=True)
class Candidate:
    """A fitted model with its metrics on the held-out rows."""

    config: TrainConfig
    pipeline: Pipeline
    metrics: dict[str, float]
    others: dict[str, dict[str, float]]  # by kind: metrics of the models that this model was compared with
    recorder: HistoryRecorder
    warnings: list[str]  # why the model may be of no use
    is_worse_than_mean: bool = False  # whether predicting the mean reconstructs held-out rows better


def compare(
    candidates: Sequence[Candidate], data: PreparedData, report: Reporter
) -> tuple[Candidate, dict[str, dict[str, float]]]:
    """Return the candidate to publish, and the metrics of all candidates by kind. The reasons go to `report`.

    A model beats another on a measure if it is better by more than STANDARD_ERRORS standard errors of the paired
    difference; see `mean_of`. The candidate with the highest count of wins minus losses is published. Candidates are in
    order of increasing complexity, and on a tie the first of the tied candidates is published.
    """
    if len(candidates) == 1:
        return candidates[0], candidates[0].others
    report.stage("comparing the models")
    rows, seed = data.fill_missing(data.held_out), candidates[0].config.seed
    scale = candidates[0].pipeline.scaling.scale  # all errors are in the model units of the first candidate
    measures: dict[str, Measures] = {c.config.model: measure(c.pipeline, rows, scale, seed) for c in candidates}
    wins = significant_wins(measures)
    # A model that is worse than the mean is published only if all are.
    best = max(candidates, key=lambda c: (not c.is_worse_than_mean, wins_minus_losses(wins, c.config.model)))
    means: dict[str, dict[str, float]] = {
        kind: {name: SIGN[name] * mean_of(name, values)[0] for name, values in m.items()}
        for kind, m in measures.items()
    }
    for line in _table(means, len(rows)):
        report.note(line)
    best.recorder.note(_explanation(wins, best.config.model))
    return best, {c.config.model: c.metrics | {"detection": means[c.config.model]["detection"]} for c in candidates}


def significant_wins(measures: Mapping[str, Measures]) -> list[tuple[str, str, str]]:
    """Return each (winner, loser, measure) whose paired difference is significant."""
    found = []
    for one, other in combinations(measures, 2):
        for name in measures[one].keys() & measures[other].keys():
            difference, error = mean_of(name, measures[one][name] - measures[other][name])
            if abs(difference) > STANDARD_ERRORS * error:
                found.append((one, other, name) if difference > 0 else (other, one, name))
    return sorted(found)


def mean_of(name: str, values: Tensor) -> tuple[float, float]:
    """Return the mean of the measure `name` over rows, values [M], and its standard error.

    Errors and likelihoods have no bound, so one extreme row could outweigh all others: their means are trimmed.
    """
    if name != "detection":
        return trimmed_mean(values)
    error = float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return float(values.double().mean()), error


def wins_minus_losses(wins: Sequence[tuple[str, str, str]], kind: str) -> int:
    """Return on how many measures the model `kind` beats others, minus on how many others beat it."""
    return sum((winner == kind) - (loser == kind) for winner, loser, _ in wins)


def measure(pipeline: Any, x: Tensor, scale: Tensor, seed: int, sizes: Sequence[int] | None = None) -> Measures:
    """Return the measures for rows x [M, D] in raw units, without missing values. Errors are divided by `scale` [D].

    Args:
        pipeline: a pipeline, or the module of an artifact, for which the log-likelihood is left out.
        x: the rows.
        scale: the unit of errors.
        seed: seed of the values that are swapped, and of the importance samples.
        sizes: the number of levels of each category; by default, those of `pipeline`, which must not be frozen.
    """
    errors, intact_scores, swapped_scores = [], [], []
    core = pipeline.core if isinstance(pipeline, Pipeline) else None
    sizes = sizes_of(pipeline) if sizes is None else sizes
    columns = columns_of_features(x.shape[1], sizes)
    with torch.inference_mode():
        for rows, swapped in zip(x.split(BATCH), swap_values(x, seed, columns).split(BATCH), strict=True):
            errors.append(((rows - pipeline(rows)) / scale).double().square().mean(dim=1))
            intact_scores.append(pipeline.score(rows)[0])
            swapped_scores.append(pipeline.score(swapped)[0])
        ranks = torch.searchsorted(torch.cat(intact_scores).sort().values, torch.cat(swapped_scores))
        # `detection` is the share of intact rows that score lower than the swapped row. The mean is the AUROC.
        measures = {"reconstruction_error": -torch.cat(errors), "detection": ranks / len(x)}
        # A density of rows and a probability of levels do not compare.
        if (not sizes and isinstance(core, PCA)) or (
            isinstance(core, VAE) and isinstance(core.likelihood, GaussianLikelihood)
        ):
            bound = importance_weighted(core.log_weight, pipeline.scaling(x), count_latents(core, x), SAMPLES, seed)
            measures["log_likelihood"] = bound.by_row
    return measures


def swap_values(x: Tensor, seed: int, columns: Tensor | None = None) -> Tensor:
    """Return x [M, D] with some values of each row replaced by the values of the previous row.

    SWAPPED_SHARE of the values are replaced, but at least one. Each value on its own remains normal; only the
    combination is anomalous.

    Args:
        columns: the column of each feature, [D]: features of the same column are replaced together. By default, each
            feature is a column.
    """
    columns = torch.arange(x.shape[1]) if columns is None else columns
    random = torch.Generator().manual_seed(seed)
    width = int(columns[-1]) + 1
    count = max(1, round(SWAPPED_SHARE * width))
    chosen = torch.rand(len(x), width, generator=random).argsort(dim=1) < count  # [M, columns]
    return torch.where(chosen[:, columns], x.roll(1, dims=0), x)


def _table(means: Mapping[str, Mapping[str, float]], rows: int) -> list[str]:
    lines = [f"{f'on {rows:,} held-out rows':<24}" + "".join(f"{kind:>12}" for kind in means)]
    for name, meaning in MEANING.items():
        values = (f"{kind[name]:12.4g}" if name in kind else f"{'-':>12}" for kind in means.values())
        lines.append(f"{name:<24}{''.join(values)}   {meaning}")
    return lines


def _explanation(wins: Sequence[tuple[str, str, str]], best: str) -> str:
    """Return why `best` is published."""
    won: dict[str, list[str]] = {}
    for winner, loser, name in wins:
        if winner == best:
            won.setdefault(loser, []).append(name)
    reasons = [f"it beats {other} on {' and '.join(names)}" for other, names in won.items()]
    text = f"publishing {best}: {'; '.join(reasons) or 'no model is significantly better, and it is the simplest'}"
    return text if best != "pca" else f"{text}. No network beats PCA on these data"
