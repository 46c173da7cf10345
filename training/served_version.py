"""Compare a new model with the served version on held-out rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.artifact import Artifact
from training.evaluation.model_selection import (
    SIGN,
    Measures,
    mean_of,
    measure,
    significant_wins,
    wins_minus_losses,
)

NOT_COMPARABLE = ("window", "condition", "scale_by_group")  # models with these options take more than the row itself
SERVED, NEW = "served", "new"  # the names of the models in comparisons


def held_out_rows(data: Any) -> tuple[Tensor, Tensor]:
    """Return the held-out rows [M, D] without missing values, and the unit of errors [D].

    The unit is the standard deviation of each column of these rows, or 1 if the column is constant.

    Args:
        data: the `PreparedData` of a model.
    """
    rows: Tensor = data.fill_missing(data.held_out)
    scale = rows.std(dim=0, correction=0)
    return rows, torch.where(scale > 0, scale, torch.ones_like(scale))


def is_comparable(artifact: Artifact, features: Sequence[str]) -> bool:
    """Return whether a served model takes rows of `features` and nothing else. The model is tried on two rows."""
    manifest = artifact.manifest
    if [feature.name for feature in manifest.features] != list(features):
        return False
    if manifest.window is not None or manifest.conditions is not None or manifest.training.get("scale_by_group"):
        return False
    medians = torch.tensor([[feature.median for feature in manifest.features]] * 2)
    try:
        measure_artifact(artifact, medians, torch.ones(medians.shape[1]), 0)
    except (RuntimeError, AttributeError):  # an adopted module without forward or score, or one that takes other rows
        return False
    return True


def measure_artifact(artifact: Artifact, rows: Tensor, scale: Tensor, seed: int) -> Measures:
    """Return the measures of a served model for rows [M, D]; see `measure`."""
    sizes = [len(category.levels) for category in artifact.manifest.categories]
    return measure(artifact.module, rows, scale, seed, sizes)


def why_not_better(new: Measures, served: Measures | None, *, is_worse_than_mean: bool) -> str | None:
    """Return why a new model should not replace the served version, or None.

    Args:
        new: the measures of the new model.
        served: the measures of the served version on the same rows; None if it was not compared.
        is_worse_than_mean: whether predicting the mean reconstructs held-out rows better than the new model.
    """
    if is_worse_than_mean:
        return "it reconstructs held-out rows worse than predicting the mean of every column"
    if served is None:
        return None
    wins = significant_wins({NEW: new, SERVED: served})
    if wins_minus_losses(wins, NEW) > 0:
        return None
    return "it is not significantly better than the served version on the held-out rows"


def means_of(measures: Measures) -> dict[str, float]:
    """Return the mean of each measure, as people read it: of errors, lower is better."""
    return {name: SIGN[name] * mean_of(name, values)[0] for name, values in measures.items()}
