"""Which of several models is published: compared row by row on what none of them was fitted to."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from models.likelihood import GaussianLikelihood
from models.pca import PCA
from models.pipeline import Pipeline
from models.vae import VAE
from training.config import TrainConfig
from training.evaluation.metrics import importance_weighted, latents
from training.fitting.prepared_data import PreparedData
from training.progress import Reporter
from training.reports.history import Recorder

BROKEN = 0.1  # share of a row's values that come from another row, when scores are to tell it from a whole one
STANDARD_ERRORS = 2.0  # by which a difference must exceed zero to count
DRAWS = 100  # a row, for the importance-weighted likelihood
MEANING = {
    "reconstruction_error": "mean square a value in model units; lower is better",
    "log_likelihood": "nats a row in model units, for a VAE a lower bound; higher is better",
    "detection": "AUROC: the score ranks rows, a tenth of whose values was swapped, above whole ones",
}
SIGN = {"reconstruction_error": -1.0, "log_likelihood": 1.0, "detection": 1.0}  # of what is better when higher
BATCH = 4096  # rows at a time: bounds memory

Measures = dict[str, Tensor]  # by name: a value for each row, paired between models, higher being better


@dataclass(frozen=True)
class Candidate:
    """A model that could be published, and how it does on the held-out rows."""

    config: TrainConfig
    pipeline: Pipeline
    metrics: dict[str, float]
    others: dict[str, dict[str, float]]  # by kind: the metrics of what it was compared with
    recorder: Recorder


def compare(
    candidates: Sequence[Candidate], data: PreparedData, report: Reporter
) -> tuple[Candidate, dict[str, dict[str, float]]]:
    """The candidate to publish, and the metrics by kind of what it was compared with; why is told to `report`.

    A model wins against another on a measure if it is better by more than STANDARD_ERRORS standard errors of the paired
    difference. The most wins less defeats are published, of equals the simpler kind, which comes first.
    """
    if len(candidates) == 1:
        return candidates[0], candidates[0].others
    rows, seed = data.fill_missing(data.held_out), candidates[0].config.seed
    scale = candidates[0].pipeline.scaling.scale  # one for all, whatever each scales by
    measures: dict[str, Measures] = {c.config.model: _measured(c.pipeline, rows, scale, seed) for c in candidates}
    beaten = victories(measures)
    best = max(candidates, key=lambda candidate: _points(beaten, candidate.config.model))
    means: dict[str, dict[str, float]] = {
        kind: {name: SIGN[name] * float(values.mean()) for name, values in m.items()} for kind, m in measures.items()
    }
    for line in _table(means, len(rows)):
        report.note(line)
    best.recorder.note(_verdict(beaten, best.config.model))
    return best, {c.config.model: c.metrics | {"detection": means[c.config.model]["detection"]} for c in candidates}


def victories(measures: Mapping[str, Measures]) -> list[tuple[str, str, str]]:
    """Each (winner, loser, measure) among models whose paired values differ beyond chance."""
    found = []
    for one, other in combinations(measures, 2):
        for name in measures[one].keys() & measures[other].keys():
            difference = (measures[one][name] - measures[other][name]).double()
            error = float(difference.std()) / math.sqrt(len(difference))
            if abs(float(difference.mean())) > STANDARD_ERRORS * error:
                found.append((one, other, name) if difference.mean() > 0 else (other, one, name))
    return sorted(found)


def _points(beaten: Sequence[tuple[str, str, str]], kind: str) -> int:
    return sum((winner == kind) - (loser == kind) for winner, loser, _ in beaten)


def _measured(pipeline: Pipeline, x: Tensor, scale: Tensor, seed: int) -> Measures:
    """The measures of rows x [M, D], raw units, nothing missing."""
    errors, whole, broken = [], [], []
    core = pipeline.core
    with torch.inference_mode():
        for rows, mixed in zip(x.split(BATCH), swapped(x, seed).split(BATCH), strict=True):
            score, _, _, expected = pipeline.score(rows)
            errors.append(((rows - expected) / scale).double().square().mean(dim=1))
            whole.append(score)
            broken.append(pipeline.score(mixed)[0])
        ranks = torch.searchsorted(torch.cat(whole).sort().values, torch.cat(broken))
        measures = {"reconstruction_error": -torch.cat(errors), "detection": ranks / len(x)}  # its mean is the AUROC
        if isinstance(core, PCA) or (isinstance(core, VAE) and isinstance(core.likelihood, GaussianLikelihood)):
            bound = importance_weighted(core.log_weight, pipeline.scaling(x), latents(core, x), DRAWS, seed)
            measures["log_likelihood"] = bound.by_row
    return measures


def swapped(x: Tensor, seed: int) -> Tensor:
    """x [M, D] with a share BROKEN of each row's values, at least one, taken from the next rows: usual one by one."""
    random = torch.Generator().manual_seed(seed)
    count = max(1, round(BROKEN * x.shape[1]))
    chosen = torch.rand(x.shape, generator=random).argsort(dim=1) < count  # [M, D]
    return torch.where(chosen, x.roll(1, dims=0), x)


def _table(means: Mapping[str, Mapping[str, float]], rows: int) -> list[str]:
    lines = [f"{f'on {rows:,} held-out rows':<24}" + "".join(f"{kind:>12}" for kind in means)]
    for name, meaning in MEANING.items():
        values = (f"{kind[name]:12.4g}" if name in kind else f"{'-':>12}" for kind in means.values())
        lines.append(f"{name:<24}{''.join(values)}   {meaning}")
    return lines


def _verdict(beaten: Sequence[tuple[str, str, str]], best: str) -> str:
    """Why `best` is published, and what a network gains over PCA."""
    won: dict[str, list[str]] = {}
    for winner, loser, name in beaten:
        if winner == best:
            won.setdefault(loser, []).append(name)
    reasons = [f"it beats {other} on {' and '.join(names)}" for other, names in won.items()]
    text = f"publishing {best}: {'; '.join(reasons) or 'none is better beyond chance, and it is the simplest'}"
    return text if best != "pca" else f"{text}. No network does better than PCA here"
